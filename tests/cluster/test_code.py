"""The fingerprint of our code is the same wherever the same code lies, and another for other code."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest

from cluster import code
from cluster.errors import UsageError
from tests.runs import ROOT, tree_of, wheel_of


def fingerprint_in(folder: Path, elsewhere: Path) -> str:
    """What a process prints that imports the packages from `folder` and was started somewhere else."""
    ask = "import sys; from cluster.code import fingerprint; print(fingerprint()); sys.exit('ray' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", ask],
        cwd=elsewhere,
        env={"PYTHONPATH": str(folder), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def folders(tree: Path) -> dict[str, Path]:
    return {name: tree / name for name in code.PACKAGES}


def test_a_copy_of_the_packages_has_the_fingerprint_of_the_checkout(tmp_path: Path) -> None:
    assert code.fingerprint_of(folders(tree_of(tmp_path / "copy"))) == code.fingerprint_of(folders(ROOT))
    assert fingerprint_in(tmp_path / "copy", tmp_path) == fingerprint_in(ROOT, tmp_path) == code.fingerprint()


def test_a_zipped_and_unpacked_checkout_has_its_fingerprint(tmp_path: Path) -> None:
    packed = shutil.make_archive(str(tmp_path / "packed"), "zip", tree_of(tmp_path / "copy"))
    shutil.unpack_archive(packed, tmp_path / "unpacked")
    assert fingerprint_in(tmp_path / "unpacked", tmp_path) == code.fingerprint()


@pytest.mark.slow
def test_an_installed_wheel_has_the_fingerprint_of_the_checkout_it_was_built_from(tmp_path: Path) -> None:
    assert fingerprint_in(wheel_of(tmp_path), tmp_path) == code.fingerprint()


def _one_byte(tree: Path) -> None:
    path = tree / "training" / "loop.py"
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "change",
    [
        _one_byte,
        lambda tree: (tree / "tuning" / "more.py").write_text(""),
        lambda tree: (tree / "serving" / "page" / "app.js").write_text(""),
        lambda tree: (tree / "training" / "plan.py").rename(tree / "training" / "plans.py"),
    ],
    ids=["one byte of a module", "one more module", "the web page", "a module's name"],
)
def test_other_code_has_another_fingerprint(tmp_path: Path, change: Callable[[Path], object]) -> None:
    tree = tree_of(tmp_path)
    before = code.fingerprint_of(folders(tree))
    change(tree)
    assert code.fingerprint_of(folders(tree)) != before


def test_what_changes_no_run_changes_no_fingerprint(tmp_path: Path) -> None:
    tree = tree_of(tmp_path)
    before = code.fingerprint_of(folders(tree))
    (tree / "tests").mkdir()
    (tree / "tests" / "test_more.py").write_text("x = 1\n")
    (tree / "training" / "__pycache__").mkdir()
    (tree / "training" / "__pycache__" / "loop.cpython-311.pyc").write_bytes(b"x")
    (tree / "training" / "__pycache__" / "left.py").write_text("x = 1\n")
    (tree / "training" / ".loop.py.swp").write_bytes(b"x")
    (tree / "pyproject.toml").write_text("")
    assert code.fingerprint_of(folders(tree)) == before


def test_the_fingerprint_is_there_in_less_than_50_ms() -> None:
    times = []
    for _ in range(5):
        code.fingerprint.cache_clear()
        began = time.perf_counter()
        code.fingerprint()
        times.append(time.perf_counter() - began)
    assert min(times) < 0.05


def test_a_process_with_the_expected_code_goes_on() -> None:
    code.check_here(code.this_code())


def test_other_code_and_other_versions_are_refused_in_one_line_with_both_values() -> None:
    ours, versions = code.this_code()
    with pytest.raises(UsageError, match=f"another rayograph .*{ours[:12]}.*ffffffffffff.*install the same") as other:
        code.check_here(("f" * 64, versions))
    with pytest.raises(UsageError, match=f"torch {versions['torch']}, the driver has 1.0: install the same") as older:
        code.check_here((ours, versions | {"torch": "1.0"}))
    with pytest.raises(UsageError, match="numpy"):
        code.check_here(("f" * 64, versions | {"numpy": "1.0"}))
    assert "\n" not in str(other.value) + str(older.value)


def test_builds_of_one_version_for_different_machines_do_not_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: f"2.14.1+{'cpu' if name == 'torch' else 'x'}")
    assert code.versions()["torch"] == "2.14.1"
