"""A session on a cluster of several hosts: all run our code, however it came there, or one line says which does not."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.hosts import DASHBOARD_PORT, Host, Hosts
from tests.runs import ROOT, tree_of, wheel_of

pytestmark = [pytest.mark.slow, pytest.mark.ray]

SESSION = """
from cluster.errors import RayographError
from cluster.session import session
try:
    with session() as found:
        print(found.nodes)
except RayographError as error:
    print(type(error).__name__, error)
"""


def joined(head: Host, code: Path = ROOT, script: str = SESSION, *arguments: str) -> str:
    """What a driver on the head prints that has this code, and was started in a folder without any."""
    env = {"RAY_ADDRESS": head.gcs, "PYTHONPATH": str(code)}
    done = head.run([sys.executable, "-c", script, *arguments], env=env, cwd="/")
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@contextmanager
def third(hosts: Hosts, code: Path) -> Iterator[Host]:
    """The third host is a node too, with this code."""
    try:
        hosts[2].ray_worker(hosts[0], env={"PYTHONPATH": str(code)})
        yield hosts[2]
    finally:
        hosts[2].kill()


def test_hosts_with_the_same_code_are_a_session(hosts: Hosts) -> None:
    assert joined(hosts[0]) == "2"


def test_a_checkout_here_and_an_installed_wheel_there_are_the_same_code(hosts: Hosts, tmp_path: Path) -> None:
    wheel = wheel_of(tmp_path)
    with third(hosts, wheel):
        assert joined(hosts[0]) == "3"
        assert joined(hosts[0], wheel) == "3"


def test_a_host_whose_code_differs_in_one_byte_is_named(hosts: Hosts, tmp_path: Path) -> None:
    changed = tree_of(tmp_path / "changed")
    with (changed / "training" / "schedule.py").open("a") as file:
        file.write("#")
    with third(hosts, changed) as host:
        said = joined(hosts[0])
    assert said.startswith(f"UsageError node {host.address}: another rayograph (code ")
    assert "install the same version" in said
    assert "\n" not in said


def test_a_host_that_lacks_our_code_is_named(hosts: Hosts, tmp_path: Path) -> None:
    (tmp_path / "cluster.py").write_text("x = 'something else of that name'\n")
    with third(hosts, tmp_path) as host:
        said = joined(hosts[0])
    assert said.startswith(f"UsageError node {host.address}: cannot import rayograph (No module named 'cluster.code'")
    assert "\n" not in said


def test_a_host_that_does_not_answer_is_named_and_what_ray_says_of_it_goes_to_the_log(
    hosts: Hosts, tmp_path: Path
) -> None:
    script = """
import sys, time
from pathlib import Path
from cluster.errors import RayographError
from cluster.nodes import alive, check_code
from cluster.session import session
log = Path(sys.argv[1])
with session(log=log):
    print(len(alive()), flush=True)
    input()
    try:
        check_code(timeout_s=2)
    except RayographError as error:
        print(type(error).__name__, error)
    while not log.exists() or sys.argv[2] not in log.read_text():
        time.sleep(0.1)
"""
    with third(hosts, ROOT) as host:
        env = {"RAY_ADDRESS": hosts[0].gcs, "PYTHONPATH": str(ROOT)}
        driver = hosts[0].popen(
            [sys.executable, "-c", script, str(tmp_path / "log"), host.address],
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert driver.stdout is not None
        assert driver.stdout.readline() == "3\n"
        host.cut()
        try:
            said, chatter = driver.communicate("\n", timeout=90)
        finally:
            host.heal()
    assert said.startswith(f"ResourceError node {host.address}: no answer within 2 s")
    assert said.count("\n") == 1
    assert chatter == ""


def test_an_out_that_a_host_does_not_see_is_found(hosts: Hosts, tmp_path: Path) -> None:
    script = """
import json, sys
from cluster.nodes import unseen_by
from cluster.session import session
with session():
    print(json.dumps([unseen_by(folder) for folder in sys.argv[1:]]))
"""
    for name in ("shared", "own"):
        (tmp_path / name).mkdir()
    hosts[1].hide(tmp_path / "own")
    said = joined(hosts[0], ROOT, script, str(tmp_path / "shared"), str(tmp_path / "own"))
    assert json.loads(said) == [[], [hosts[1].address]]
    assert [list((tmp_path / name).iterdir()) for name in ("shared", "own")] == [[], []]


def test_doctor_says_whether_the_cluster_has_our_code(hosts: Hosts, tmp_path: Path) -> None:
    script = "from cluster.doctor import check_cluster; print(*check_cluster())"
    assert joined(hosts[0], ROOT, script).startswith(f"ok    cluster: {hosts[0].gcs}: 2 nodes")
    other = tree_of(tmp_path / "other")
    (other / "tuning" / "spaces.py").write_text("")
    said = joined(hosts[0], other, script)
    assert said.startswith(f"fail  cluster: nodes {hosts[0].address}, {hosts[1].address}: another rayograph")


@pytest.mark.chaos
def test_a_job_brings_its_working_directory_to_all_hosts(namespaces: None, tmp_path: Path) -> None:
    (tmp_path / "cluster.py").write_text("x = 'without the job, nothing here runs'\n")
    out, nothing = tmp_path / "dataset", {"PYTHONPATH": str(tmp_path)}
    with Hosts(2) as hosts:
        hosts[0].ray_head(cpus=2, dashboard=True, env=nothing)
        hosts[1].ray_worker(hosts[0], cpus=2, env=nothing)
        submit = ["job", "submit", f"--address=http://{hosts[0].address}:{DASHBOARD_PORT}", "--working-dir=."]
        verb = [sys.executable, "-m", "cluster.cli", "ingest", "phantom:20", "--out", str(out), "--image-size=32"]
        done = hosts[0].run(
            [sys.executable, "-m", "ray.scripts.scripts", *submit, "--", *verb], env=nothing, cwd=ROOT, timeout_s=240
        )
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((out / "summary.json").read_text())["ok"] == 20
