"""What a session does to the process that opens it, without Ray itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from cluster.session import _own_terminal

WRITES = """
import os, sys
from pathlib import Path
from cluster.session import _own_terminal
with _own_terminal(Path(sys.argv[1])):
    if sys.argv[2] == "chatter":
        os.write(2, b"[E 1 1] core_worker.cc:2465: chatter\\n")
    print("ours", file=sys.stderr)
os.write(2, b"afterwards\\n")
print("and ours", file=sys.stderr)
"""


def written(log: Path, what: str) -> str:
    """What a process says on its stderr."""
    done = subprocess.run([sys.executable, "-c", WRITES, str(log), what], capture_output=True, text=True, check=True)
    return done.stderr


def test_what_ray_writes_to_the_terminal_goes_to_the_log_and_what_we_say_does_not(tmp_path: Path) -> None:
    log = tmp_path / "run.log"
    log.write_text("before\n")
    assert written(log, "chatter") == "ours\nafterwards\nand ours\n"
    assert log.read_text() == "before\n[E 1 1] core_worker.cc:2465: chatter\n"


def test_without_chatter_there_is_no_log(tmp_path: Path) -> None:
    assert written(tmp_path / "run.log", "nothing") == "ours\nafterwards\nand ours\n"
    assert not (tmp_path / "run.log").exists()


def test_a_stderr_that_is_somebody_elses_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with _own_terminal(tmp_path / "run.log"):
        print("ours", file=sys.stderr)
    assert capsys.readouterr().err == "ours\n"
    assert not (tmp_path / "run.log").exists()
