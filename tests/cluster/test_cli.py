"""The command line as its users meet it: a process with an exit code and one or two lines on stderr."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from cluster.cli import VERBS, main

ROOT = Path(__file__).parents[2]
CLI = [sys.executable, "-m", "cluster.cli"]

FAKE = """
import signal, sys, types
from cluster import cli
from cluster.errors import *

def ready():
    print("ready", flush=True)

def ingest(config):
BODY

module = types.ModuleType("training.ingest")
module.ingest = ingest
sys.modules["training.ingest"] = module
sys.exit(cli.main(["ingest", "images", "--out", "o", *sys.argv[1:]]))
"""


def rayograph(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*CLI, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


def ingest_that(body: str) -> list[str]:
    """The command of a process whose `ingest` does `body`."""
    return [sys.executable, "-c", FAKE.replace("BODY", textwrap.indent(body, "    "))]


def run_ingest(body: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [*ingest_that(body), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


def start_ingest(body: str) -> subprocess.Popen[str]:
    """A started process whose `ingest` does `body` and has come to its `ready()`."""
    process = subprocess.Popen(ingest_that(body), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def signalled(body: str, *kinds: signal.Signals) -> tuple[int, str]:
    process = start_ingest(body)
    for kind in kinds:
        process.send_signal(kind)
    _, errors = process.communicate(timeout=30)
    return process.returncode, errors


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], *([verb, "--help"] for verb in VERBS)])
def test_help_is_printed_without_importing_anything_heavy(arguments: list[str]) -> None:
    code = (
        "import json, sys; from cluster.cli import main; code = main(sys.argv[1:]);"
        "print('MODULES', json.dumps(sorted(sys.modules))); sys.exit(code)"
    )
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    text, _, modules = done.stdout.rpartition("MODULES ")
    assert "Usage: rayograph" in text
    assert not {"torch", "ray", "numpy", "pyarrow", "sklearn", "matplotlib", "jinja2"} & set(json.loads(modules))


def test_help_answers_in_under_half_a_second() -> None:
    def user_seconds() -> float:
        before = os.times()
        assert rayograph("--help").returncode == 0
        after = os.times()
        return after.children_user + after.children_system - before.children_user - before.children_system

    tries = 6  # whatever shares the processor's caches and cores makes some of them slower
    assert any(user_seconds() < 0.5 for _ in range(tries))


def test_every_field_of_every_config_is_in_the_help_of_its_verb() -> None:
    text = rayograph("pretrain", "--help").stdout
    for flag in ("--data", "--out", "--epochs", "--batch-size", "--workers", "--overwrite", "--config", "--debug"):
        assert flag in text


def test_version_is_printed() -> None:
    done = rayograph("--version")
    assert done.returncode == 0
    assert done.stdout.startswith("rayograph ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pretrian", "x"], 'Did you mean "pretrain"?'),
        (["pretrain", "x", "--out", "o", "--bach-size", "3"], "Did you mean --batch-size?"),
        (["pretrain", "x", "--out", "o", "--epochs", "many"], "--epochs"),
        (["pretrain", "x", "--out", "o", "--epochs", "0"], "--epochs 0: must be at least 1"),
        (["pretrain", "x", "--out", "o", "--preset", "huge"], "Choose from"),
        (["pretrain", "x", "y", "--out", "o"], "Unused Tokens: ['y']"),
        (["pretrain", "x"], "--out"),
        (["pretrain", "--out", "o"], "--data"),
        (["ingest", "--out", "o"], "--source"),
        (["--config", "run.yaml"], "name the verb first"),
        (["pretrain", "x", "--config", "gone.yaml"], "gone.yaml: no such file"),
    ],
)
def test_wrong_usage_is_exit_code_2_and_one_line_without_boxes(arguments: list[str], message: str) -> None:
    done = rayograph(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.startswith("rayograph: error: ")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_an_unknown_key_of_a_config_file_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("epoch: 3\n")
    done = rayograph("pretrain", "x", "--out", "o", "--config", str(tmp_path / "run.yaml"))
    assert done.returncode == 2
    assert "Did you mean 'epochs'?" in done.stderr


def test_a_wrong_value_in_a_config_file_names_file_and_key(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("epochs: many\n")
    done = rayograph("pretrain", "x", "--out", "o", "--config", str(tmp_path / "run.yaml"))
    assert done.returncode == 2
    assert "[epochs]" in done.stderr
    assert "run.yaml" in done.stderr


@pytest.mark.parametrize(
    ("error", "code"),
    [("UsageError", 2), ("DataError", 1), ("ResourceError", 1), ("LockedError", 1), ("StoppedError", 75)],
)
def test_each_error_has_its_exit_code_and_its_one_line(error: str, code: int) -> None:
    done = run_ingest(f"raise {error}('images/a.png: broken')")
    assert done.returncode == code
    assert "images/a.png: broken" in done.stderr
    assert done.stderr.count("\n") == 1


def test_an_unexpected_error_is_two_lines_and_debug_adds_the_traceback() -> None:
    done = run_ingest("{}['key']")
    assert done.returncode == 1
    assert done.stderr == "rayograph: error: KeyError: 'key'\nrun again with --debug for the traceback\n"
    done = run_ingest("{}['key']", "--debug")
    assert done.returncode == 1
    assert "Traceback" in done.stderr


def test_an_error_that_a_ray_task_wrapped_is_told_in_its_own_words() -> None:
    body = "e = RuntimeError('ray::task() traceback'); e.cause = UsageError('the window is empty'); raise e"
    done = run_ingest(body)
    assert (done.returncode, done.stderr) == (2, "rayograph: error: the window is empty\n")


def test_ctrl_c_is_130_and_one_line() -> None:
    code, errors = signalled("ready(); signal.pause()", signal.SIGINT)
    assert (code, errors) == (130, "rayograph: stopped; the same command again goes on\n")


CLEAN_UP = """
try:
    ready()
    signal.pause()
finally:
    signal.raise_signal(signal.SIGINT)
    print("cleaned", file=sys.stderr)
"""


def test_a_ctrl_c_that_arrives_twice_does_not_disturb_the_clean_up() -> None:
    code, errors = signalled(CLEAN_UP, signal.SIGINT)
    assert (code, errors) == (130, "cleaned\nrayograph: stopped; the same command again goes on\n")


def test_sigterm_is_75_and_resumable() -> None:
    code, errors = signalled("ready(); signal.pause()", signal.SIGTERM)
    assert (code, errors) == (75, "rayograph: stopped by SIGTERM; the same command again goes on\n")


def test_sigterm_is_75_also_when_ray_has_replaced_the_handler() -> None:
    body = "signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number)); signal.raise_signal(signal.SIGTERM)"
    assert run_ingest(body).returncode == 75


def test_a_reader_that_goes_away_causes_no_noise() -> None:
    command = ingest_that("[print('x' * 100) for _ in range(10_000)]")
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(timeout=30) == 0
    process.stderr.close()


def test_main_returns_the_code_for_python_callers(capsys: pytest.CaptureFixture[str]) -> None:
    handlers = {kind: signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)}
    try:
        assert main(["--version"]) == 0
        assert main(["nothing"]) == 2
    finally:
        for kind, handler in handlers.items():
            signal.signal(kind, handler)
    assert "rayograph: error" in capsys.readouterr().err
