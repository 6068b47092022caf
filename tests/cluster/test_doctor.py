"""What `doctor` finds, on this machine and on ones made up of files."""

from __future__ import annotations

import json
import socket
import sys
from email.message import Message
from pathlib import Path

import pytest

from cluster import doctor
from cluster.doctor import DoctorConfig, Finding


def test_every_check_gives_findings_and_none_of_them_breaks() -> None:
    quick = [check for check in doctor.CHECKS if check not in (doctor.check_torch, doctor.check_faiss)]
    for check in quick:
        found = list(check())
        assert found, check.__name__
        assert all(finding.status in ("ok", "warn", "fail") for finding in found)


@pytest.mark.slow
def test_the_whole_answer_is_printed_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    code = doctor.doctor(DoctorConfig(json=True))
    found = {item["name"]: item for item in json.loads(capsys.readouterr().out)}
    assert code == int(any(item["status"] == "fail" for item in found.values()))
    assert found["torch"]["status"] == found["faiss"]["status"] == "ok"
    assert found["device auto"]["value"] in ("cpu", "cuda", "mps")


def test_a_failure_makes_the_exit_code_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(doctor, "CHECKS", (lambda: iter([Finding("fail", "thing", "broken", "mend it")]),))
    assert doctor.doctor(DoctorConfig()) == 1
    assert capsys.readouterr().out == "fail  thing: broken - mend it\n"


def test_a_check_that_breaks_is_a_warning_not_a_crash(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def check_moon() -> list[Finding]:
        raise OSError("no such moon")

    monkeypatch.setattr(doctor, "CHECKS", (check_moon,))
    assert doctor.doctor(DoctorConfig()) == 0
    assert capsys.readouterr().out.startswith("warn  moon: could not be checked")


@pytest.mark.parametrize(
    ("code", "value"),
    [
        ("import threading; threading.Event().wait()", "gives no answer"),
        ("import os; os.abort()", "ended with -6"),
        ("raise ImportError('libx.so is missing')", "ImportError: libx.so is missing"),
    ],
)
def test_a_library_that_hangs_or_crashes_is_a_failure_in_time(
    monkeypatch: pytest.MonkeyPatch, code: str, value: str
) -> None:
    monkeypatch.setattr(doctor, "PROBE_TIMEOUT_S", 0.5)
    finding = doctor._probe("torch", code)
    assert isinstance(finding, Finding)
    assert finding.status == "fail"
    assert value in finding.value


def test_memory_and_cores_heed_the_cgroup(tmp_path: Path) -> None:
    unlimited = doctor.memory_bytes(tmp_path)
    (tmp_path / "memory.max").write_text("max\n")
    assert doctor.memory_bytes(tmp_path) == unlimited
    (tmp_path / "memory.max").write_text(f"{64 << 20}\n")
    assert doctor.memory_bytes(tmp_path) == 64 << 20
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert doctor.usable_cores(tmp_path) >= 1
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    assert doctor.usable_cores(tmp_path) == 0.5


def test_a_token_that_others_can_read_is_a_warning_with_the_command(tmp_path: Path) -> None:
    token = tmp_path / "auth_token"
    assert next(doctor.token_file(token)).status == "ok"
    token.write_text("secret")
    token.chmod(0o644)
    (finding,) = doctor.token_file(token)
    assert (finding.status, finding.advice) == ("warn", f"others can read it: chmod 600 {token}")
    token.chmod(0o600)
    assert next(doctor.token_file(token)).status == "ok"


def test_a_port_in_use_is_seen() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        assert not doctor._can_bind(listener.getsockname()[1])


@pytest.mark.parametrize(
    ("field", "value", "copyleft"),
    [
        ("License", "GPLv2", True),
        ("License-Expression", "AGPL-3.0-only", True),
        ("License-Expression", "MIT OR GPL-2.0-only", False),
        ("License-Expression", "LGPL-3.0-or-later", False),
        ("License-Expression", "GPL-3.0-or-later WITH GCC-exception-3.1", False),
        ("Classifier", "License :: OSI Approved :: GNU General Public License v3 (GPLv3)", True),
        ("Classifier", "License :: OSI Approved :: GNU Lesser General Public License v3 (LGPLv3)", False),
        ("Classifier", "License :: OSI Approved :: Apache Software License", False),
        ("License", "BSD", False),
    ],
)
def test_only_gpl_and_agpl_count_as_copyleft(field: str, value: str, copyleft: bool) -> None:
    package = Message()
    package[field] = value
    assert doctor.is_copyleft(package) is copyleft


def test_dependencies_follow_requirements_and_extras() -> None:
    needed = doctor.dependencies("pytest")
    assert {"pluggy", "iniconfig", "packaging"} <= needed
    assert "pytest" not in needed
    assert doctor.dependencies("a-distribution-that-nobody-has") == set()


def test_nothing_heavy_is_imported_by_doctor_itself() -> None:
    assert doctor._ask([sys.executable, "-c", _LIGHT], timeout_s=60) == (0, "")


_LIGHT = "import sys, cluster.doctor; sys.exit(bool({'torch', 'faiss', 'ray', 'numpy'} & sys.modules.keys()))"
