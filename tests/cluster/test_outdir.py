"""The life of an `--out`: locks, resuming, refusing, overwriting."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.errors import LockedError, RayographError, UsageError
from cluster.outdir import OutDir
from cluster.outfile import OutFile, claim_file
from training.configs import SuggestConfig

ROOT = Path(__file__).parents[2]
CONFIG: dict[str, Any] = {"data": "images", "epochs": 10, "workers": "2:4", "lr": 1e-5, "where": [], "model": None}

HOLDER = """
import sys, signal
from cluster.outdir import OutDir
from cluster.outfile import claim_file
if sys.argv[1] == "folder":
    held = OutDir.open(sys.argv[2], verb="pretrain", config={}, identity={}, raisable={}, overwrite=False)
else:
    held = claim_file(sys.argv[2], verb="predict", identity={}, overwrite=False)
print("held", flush=True)
signal.pause()
"""


def open_out(path: Path, *, overwrite: bool = False, verb: str = "pretrain", **changes: Any) -> OutDir:
    config = CONFIG | changes
    identity = {name: value for name, value in config.items() if name not in {"workers", "epochs"}}
    raisable = {"epochs": config["epochs"]}
    return OutDir.open(str(path), verb=verb, config=config, identity=identity, raisable=raisable, overwrite=overwrite)


def claim(path: Path, *, overwrite: bool = False, **changes: Any) -> OutFile:
    return claim_file(str(path), verb="predict", identity=CONFIG | changes, overwrite=overwrite)


def run_once(path: Path, **changes: Any) -> None:
    with open_out(path, **changes) as out:
        (out.path / "model").mkdir(exist_ok=True)
        (out.path / "model" / "weights").write_text("w")
        out.finish({"steps": 3})


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def holder(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the `--out` `tmp_path / "held"`."""
    command = [sys.executable, "-c", HOLDER, request.param, str(tmp_path / "held")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_run_of_a_version_with_fewer_flags_did_what_the_new_ones_defaults_say(tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    with SuggestConfig(model="m", data="d", out=run).open_out("suggest"):
        pass
    stored = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    del stored["unlike"], stored["where"]
    (tmp_path / "run/config.yaml").write_text(yaml.safe_dump(stored, sort_keys=False))
    with SuggestConfig(model="m", data="d", out=run).open_out("suggest") as out:
        assert out.state == "resume"
    with pytest.raises(UsageError, match=r"unlike differs \(False there, True now\)"):
        SuggestConfig(model="m", data="d", out=run, unlike=True).open_out("suggest")
    del stored["data"]  # which has no default
    (tmp_path / "run/config.yaml").write_text(yaml.safe_dump(stored, sort_keys=False))
    with pytest.raises(UsageError, match="names no data"):
        SuggestConfig(model="m", data="d", out=run).open_out("suggest")


def test_a_new_folder_holds_config_and_log_and_is_resumed_by_the_same_config(tmp_path: Path) -> None:
    with open_out(tmp_path / "a" / "run") as out:
        assert out.state == "new"
        assert out.log.exists()
    stored = yaml.safe_load((tmp_path / "a/run/config.yaml").read_text())
    assert list(stored) == ["verb", "format", *CONFIG]
    assert stored == {"verb": "pretrain", "format": 1} | CONFIG
    with open_out(tmp_path / "a" / "run") as out:
        assert out.state == "resume"


def test_a_finished_folder_is_already_done_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_once(tmp_path / "run")
    with open_out(tmp_path / "run", workers="7") as out:
        assert out.state == "done"
        assert out.summary() == {"steps": 3}
    assert "already done" in capsys.readouterr().out


def test_raised_epochs_resume_a_finished_folder_until_it_is_finished_again(tmp_path: Path) -> None:
    run_once(tmp_path / "run")
    with open_out(tmp_path / "run", epochs=20) as out:
        assert out.state == "resume"
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["epochs"] == 20
    with open_out(tmp_path / "run", epochs=20) as out:
        assert out.state == "resume"
        out.finish({})
    with open_out(tmp_path / "run", epochs=20) as out:
        assert out.state == "done"


def test_lowered_epochs_are_refused(tmp_path: Path) -> None:
    run_once(tmp_path / "run")
    with pytest.raises(UsageError, match="epochs may grow but not shrink"):
        open_out(tmp_path / "run", epochs=5)


@pytest.mark.parametrize("change", [{"data": "others"}, {"lr": 1e-4}, {"where": ["a=b"]}, {"model": "vit"}])
def test_another_config_is_refused_by_the_name_of_the_field(tmp_path: Path, change: dict[str, Any]) -> None:
    run_once(tmp_path / "run")
    (name,) = change
    with pytest.raises(UsageError, match=f"{name} differs .* use --overwrite or another --out"):
        open_out(tmp_path / "run", **change)
    assert (tmp_path / "run/model/weights").exists()


def test_another_verb_is_refused(tmp_path: Path) -> None:
    run_once(tmp_path / "run")
    with pytest.raises(UsageError, match="holds a result of `rayograph pretrain`"):
        open_out(tmp_path / "run", verb="transfer")


def test_overwrite_starts_from_an_empty_folder(tmp_path: Path) -> None:
    run_once(tmp_path / "run")
    with open_out(tmp_path / "run", overwrite=True, data="others") as out:
        assert out.state == "new"
        assert names(out.path) == [".lock", "config.yaml", "run.log"]


def test_a_foreign_folder_is_refused_and_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    (tmp_path / "config.yaml").write_text("theme: dark\n")
    for overwrite in (False, True):
        with pytest.raises(UsageError, match="not a result of rayograph"):
            open_out(tmp_path, overwrite=overwrite)
    assert names(tmp_path) == ["config.yaml", "letter.txt"]


def test_an_out_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(RayographError):
            open_out(path, overwrite=True)
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.9])
def test_a_cut_off_config_is_refused_but_can_be_overwritten(tmp_path: Path, share: float) -> None:
    run_once(tmp_path / "run")
    file = tmp_path / "run/config.yaml"
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(UsageError, match="--out"):
        open_out(tmp_path / "run")
    if share > 0:
        assert open_out(tmp_path / "run", overwrite=True).state == "new"


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    run_once(tmp_path / "run")
    file = tmp_path / "run/config.yaml"
    file.write_text(file.read_text().replace("format: 1", "format: 99"))
    with pytest.raises(UsageError, match="newer rayograph"):
        open_out(tmp_path / "run")


def test_an_erasure_that_was_cut_short_is_carried_on(tmp_path: Path) -> None:
    run_once(tmp_path / "run")
    (tmp_path / "run/config.yaml").write_text("verb: erase\nformat: 1\nerased: true\n")
    with open_out(tmp_path / "run") as out:
        assert out.state == "new"
        assert not (out.path / "model").exists()


def test_what_a_process_left_that_died_before_its_config_counts_as_empty(tmp_path: Path) -> None:
    for name in (".lock", "run.log", ".config.yaml.0123abcd.tmp"):
        (tmp_path / name).touch()
    with open_out(tmp_path) as out:
        assert out.state == "new"
        assert not (tmp_path / ".config.yaml.0123abcd.tmp").exists()


def test_a_usage_error_before_anything_was_written_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError), open_out(tmp_path / "a" / "b" / "run") as out:
        (out.path / "shards").mkdir()
        raise UsageError("no such source")
    assert names(tmp_path) == []


def test_a_usage_error_after_work_was_written_keeps_it(tmp_path: Path) -> None:
    with pytest.raises(UsageError), open_out(tmp_path / "run") as out:
        (out.path / "metrics.jsonl").write_text("{}")
        raise UsageError("late")
    assert (tmp_path / "run/metrics.jsonl").exists()


@pytest.mark.parametrize("holder", ["folder"], indirect=True)
def test_a_second_writer_is_refused_in_one_line_that_names_the_first(
    tmp_path: Path, holder: subprocess.Popen[str]
) -> None:
    for overwrite in (False, True):
        with pytest.raises(LockedError, match=rf"held: another process is writing it \(pid {holder.pid} on "):
            OutDir.open(
                str(tmp_path / "held"), verb="pretrain", config={}, identity={}, raisable={}, overwrite=overwrite
            )
    assert (tmp_path / "held/config.yaml").exists()


@pytest.mark.parametrize("holder", ["folder"], indirect=True)
def test_the_lock_of_a_killed_process_is_free(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    held = OutDir.open(str(tmp_path / "held"), verb="pretrain", config={}, identity={}, raisable={}, overwrite=False)
    with held:
        assert held.state == "resume"


@pytest.mark.parametrize("holder", ["file"], indirect=True)
def test_a_file_has_one_writer_until_that_one_dies(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    with pytest.raises(LockedError, match=f"pid {holder.pid}"):
        claim_file(str(tmp_path / "held"), verb="predict", identity={}, overwrite=True)
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    with claim_file(str(tmp_path / "held"), verb="predict", identity={}, overwrite=False) as out:
        assert out.state == "new"


def test_a_file_is_new_then_already_done_and_another_config_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "sub" / "p.parquet"
    with claim(path) as out:
        assert out.state == "new"
        out.tmp.write_text("rows")
        out.finish({"images": 5})
    assert names(path.parent) == ["p.parquet", "p.parquet.json"]
    with claim(path) as out:
        assert out.state == "done"
        assert out.summary() == {"images": 5}
    assert "already done" in capsys.readouterr().out
    with pytest.raises(UsageError, match="lr differs"):
        claim(path, lr=0.1)
    with claim(path, lr=0.1, overwrite=True) as out:
        assert out.state == "new"
    assert path.read_text() == "rows"


def test_a_foreign_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "p.parquet").write_text("mine")
    with pytest.raises(UsageError, match="nothing beside it says what it is"):
        claim(tmp_path / "p.parquet")
    assert names(tmp_path) == ["p.parquet"]


def test_a_file_that_failed_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), claim(tmp_path / "p.parquet") as out:
        out.tmp.write_text("half")
        raise RuntimeError
    assert names(tmp_path) == []
