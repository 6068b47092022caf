"""The hosts that other tests build Ray clusters of: apart and lost like real ones, and nothing is left of them."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hosts import Host, Hosts
from tests.runs import ROOT, wait_until

pytestmark = [pytest.mark.chaos, pytest.mark.ray, pytest.mark.usefixtures("namespaces")]

ADDRESSES = """
import json, socket, sys, ray
ray.init(log_to_driver=False)
def address():
    return [ray.util.get_node_ip_address(), socket.gethostbyname(socket.gethostname())]
asked = [ray.remote(address).options(resources={name: 1}).remote() for name in sys.argv[1:]]
print(json.dumps(ray.get(asked)))
"""
"""A driver that runs a task with each of the named resources, and prints where each ran."""


def where_tasks_run(head: Host, *resources: str) -> list[list[str]]:
    done = head.run([sys.executable, "-c", ADDRESSES, *resources], env={"RAY_ADDRESS": head.gcs})
    assert done.returncode == 0, done.stderr
    found: list[list[str]] = json.loads(done.stdout)
    return found


def test_two_hosts_join_with_the_token_and_run_a_task_each_under_their_own_address_and_name(hosts: Hosts) -> None:
    first, second = hosts[0], hosts[1]
    assert first.address != second.address
    assert first.alive() == {first.address, second.address}
    assert where_tasks_run(first, "first", "second") == [[first.address] * 2, [second.address] * 2]


def test_a_node_with_another_token_is_refused(hosts: Hosts) -> None:
    head, stranger = hosts[0], hosts[2]
    stranger.ray_worker(head, env={"RAY_AUTH_TOKEN": "f" * 32, "RAY_NUM_REDIS_GET_RETRIES": "2"}, wait=False)
    assert stranger.ray_ended(60) != 0
    assert "oken" in stranger.log.read_text()
    assert stranger.address not in head.alive()


def test_a_hidden_folder_is_hidden_on_one_host_only(hosts: Hosts, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("here")
    hosts[2].hide(tmp_path)
    assert hosts[2].run(["ls", str(tmp_path)]).stdout == ""
    assert hosts[1].run(["ls", str(tmp_path)]).stdout == "file\n"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_all_hosts_reach_a_server_of_this_process_and_one_that_is_cut_does_not_until_it_is_healed(hosts: Hosts) -> None:
    with greeting(hosts.address) as port:
        hear = ["bash", "-c", f"read -t 2 word < /dev/tcp/{hosts.address}/{port} && echo $word"]
        reach = ["timeout", "3", *hear]
        assert [host.run(reach).stdout for host in (hosts[0], hosts[2])] == ["hello\n"] * 2
        hosts[2].cut()
        assert hosts[2].run(reach).stdout == ""
        assert hosts[0].run(reach).stdout == "hello\n"
        hosts[2].heal()
        wait_until(lambda: hosts[2].run(reach).stdout == "hello\n", 20, "the healed host reaches the server")


@contextlib.contextmanager
def greeting(address: str) -> Iterator[int]:
    with socket.create_server((address, 0)) as server:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    with connection:
                        connection.sendall(b"hello\n")

        threading.Thread(target=serve, daemon=True).start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)


def test_signals_reach_the_process_in_the_host(hosts: Hosts) -> None:
    say = "import signal, time\nsignal.signal(15, lambda *_: exit(7))\nprint('up', flush=True)\ntime.sleep(60)"
    process = hosts[2].popen([sys.executable, "-c", say], stdout=subprocess.PIPE)
    assert process.stdout is not None
    with process.stdout:
        assert process.stdout.readline() == "up\n"
        process.terminate()
        assert process.wait(20) == 7


@pytest.mark.parametrize(("silent", "notice_s"), [(False, 10), (True, 25)])
def test_the_head_notices_a_lost_host_and_goes_on_without_it(silent: bool, notice_s: float) -> None:
    with Hosts(2) as hosts:
        head, lost = hosts[0], hosts[1]
        head.ray_head(resources={"first": 1})
        lost.ray_worker(head)
        lost.kill(silent=silent)
        wait_until(lambda: head.alive() == {head.address}, notice_s, "the head has noticed")
        assert where_tasks_run(head, "first") == [[head.address] * 2]


def processes_in(namespaces: set[str]) -> set[int]:
    """The processes whose network is one of these."""
    found = set()
    for path in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if path.name.isdigit() and str((path / "ns/net").readlink()) in namespaces:
                found.add(int(path.name))
    return found


def networks(firsts: list[int]) -> set[str]:
    return {str(Path(f"/proc/{first}/ns/net").readlink()) for first in firsts}


def links() -> str:
    return subprocess.run(["ip", "link"], capture_output=True, text=True, check=True).stdout


def test_nothing_is_left_when_the_body_is_interrupted() -> None:
    with pytest.raises(KeyboardInterrupt), Hosts(2) as hosts:
        hosts[0].ray_head()
        hosts[1].popen(["sleep", "1000"])
        networks_then = networks([hosts[0].first, hosts[1].first])
        assert len(processes_in(networks_then)) > 8
        bridge = hosts[0].link.partition("-")[0]
        assert bridge in links()
        raise KeyboardInterrupt
    assert processes_in(networks_then) == set()
    assert f"{bridge}:" not in links()
    assert f"{bridge}-" not in links()
    assert not hosts.folder.exists()
    assert str(hosts.folder) not in Path("/proc/self/mountinfo").read_text()


def test_hosts_die_with_the_process_that_made_them_and_the_next_ones_clear_what_it_left() -> None:
    make = (
        "import time\nfrom tests.hosts import Hosts\nwith Hosts(1) as hosts:\n"
        "    print(hosts[0].first, hosts.folder, hosts[0].link, flush=True)\n    time.sleep(60)"
    )
    made = subprocess.Popen([sys.executable, "-c", make], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert made.stdout is not None
    with made.stdout:
        first, folder, link = made.stdout.readline().split()
    networks_then = networks([int(first)])
    made.send_signal(signal.SIGKILL)
    made.wait(20)
    wait_until(lambda: not processes_in(networks_then), 20, "the hosts of a killed process are gone")
    with Hosts(1) as hosts:
        assert hosts.folder != Path(folder)
        assert f"{link.partition('-')[0]}:" not in links() or hosts[0].link == link
        assert not Path(folder).exists()
