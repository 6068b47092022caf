"""Hosts of a Ray cluster on one machine: namespaces with a network, a process table and mounts of their own.

A host is what its processes see: processes of others are not in its /proc (a Ray driver looks there for its own node),
its name resolves to its own address (torch's gloo asks for that), its Ray folder and its /dev/shm are its own, and a
folder can be hidden from it alone. All else of the file system is shared, as by hosts with a network file system.
Needs Linux and root; `unavailable` says what is missing.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

START_S = 90
"""How long a Ray node may take to come up, on a machine that is busy with something else."""
STORE_BYTES = 200 * 1024**2
GCS_PORT, DASHBOARD_PORT = 6379, 8265
SUBNETS = [ipaddress.IPv4Network(f"{start}.{number}.0/24") for start in ("10.77", "198.18") for number in range(256)]
"""One of them is taken that no route of this machine knows; 198.18.0.0/15 is set apart for tests (RFC 2544)."""
HEALTH = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "3000",
    "RAY_health_check_failure_threshold": "3",
}
"""A head gives up a host that refuses connections at once, a silent one within 12 s: a busy one must not look so."""

SPACES = ("--net", "--mount", "--pid", "--uts", "--ipc")
"""What a host has of its own. `unshare` makes the first process, which dies with the process that made it."""
_UNSHARE = ("setpriv", "--pdeathsig=KILL", "unshare", "--fork", "--kill-child", "--mount-proc", "--propagation=private")
_HOLD = """
set -e
mount --bind "$1/{name}" "$1/ray"
mount -t tmpfs -o size=1g tmpfs /dev/shm
mount --bind "$1/{name}.hosts" /etc/hosts
mount --bind "$1/resolv.conf" /etc/resolv.conf
echo {name} > /proc/sys/kernel/hostname
echo ready
while :; do sleep infinity & wait; done
"""
"""The first process of a host: its end is the end of all others, by the kernel. A shell, as it reaps orphans."""

_WATCH = """
import json, sys
from ray._raylet import GcsClient
from ray.core.generated.gcs_pb2 import GcsNodeInfo
client = GcsClient(address=sys.argv[1])
for line in sys.stdin:
    nodes = client.get_all_node_info(timeout=30).values()
    print(json.dumps([n.node_manager_address for n in nodes if n.state == GcsNodeInfo.GcsNodeState.ALIVE]), flush=True)
"""

_DRAIN = """
import sys
from ray._raylet import GcsClient
from ray.core.generated.autoscaler_pb2 import DrainNodeReason
from ray.core.generated.gcs_pb2 import GcsNodeInfo
gcs, address = sys.argv[1:]
client = GcsClient(address=gcs)
there = [n for n in client.get_all_node_info(timeout=30).values() if n.state == GcsNodeInfo.GcsNodeState.ALIVE]
(node,) = [n.node_id.hex() for n in there if n.node_manager_address == address]
reason = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
accepted, why = client.drain_node(node, reason, "taken away", 0)
sys.exit(None if accepted else why)
"""
"""As `ray drain-node`, which takes any id for a node's; no deadline."""


def unavailable() -> str:
    """Why this machine cannot have such hosts; empty if it can."""
    if sys.platform != "linux":
        return "network namespaces are a thing of Linux"
    absent = [tool for tool in ("ip", "unshare", "nsenter", "setpriv", "mount") if shutil.which(tool) is None]
    if absent:
        return f"no namespaces: not installed: {', '.join(absent)}"
    probe = ["ip", "link", "add", "probe", "type", "bridge"]
    done = subprocess.run([*_UNSHARE, *SPACES, *probe], capture_output=True, text=True, check=False)
    return f"no namespaces: not permitted here ({done.stderr.strip()})" if done.returncode else ""


class Inside(subprocess.Popen[str]):
    """A process in a host. Signals reach the process itself, not the `nsenter` that waits for it."""

    def send_signal(self, sig: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            if self.poll() is None:
                os.kill(next(iter(_children(self.pid)), self.pid), sig)


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


@dataclass
class Host:
    """One host; `first` is the process in whose namespaces it lives, seen from outside."""

    name: str
    address: str
    folder: Path
    link: str
    token: str
    holder: subprocess.Popen[str]
    first: int
    _watch: Inside | None = None
    _started: list[Inside] = field(default_factory=list)
    _node: Inside | None = None

    @property
    def gcs(self) -> str:
        """What RAY_ADDRESS says where this host is the head."""
        return f"{self.address}:{GCS_PORT}"

    @property
    def log(self) -> Path:
        """What `ray start` said on this host."""
        return self.folder / f"{self.name}.log"

    @property
    def ray_logs(self) -> Path:
        """The folder of Ray's own logs of this host, seen from outside."""
        return self.folder / self.name / "session_latest" / "logs"

    def environment(self, extra: Mapping[str, str] | None = None) -> dict[str, str]:
        """Ours, with the cluster's token, and without what would lead to another cluster."""
        ours = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "RAY_TMPDIR", "RAY_AUTH_TOKEN_PATH")}
        ray = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token, "RAY_USAGE_STATS_ENABLED": "0"}
        return ours | ray | dict(extra or {})

    def popen(
        self, argv: Sequence[str], *, env: Mapping[str, str] | None = None, cwd: str | Path = "/", **streams: Any
    ) -> Inside:
        """The started process, in the host's namespaces; it ends with the host. `streams` as for `subprocess.Popen`."""
        # `env` changes the folder after the host is entered: nsenter's --wd would lead past what is hidden there
        enter = ["nsenter", f"--target={self.first}", *SPACES, "env", "-C", str(cwd)]
        streams = {"stdin": subprocess.DEVNULL} | streams
        process = Inside([*enter, *argv], env=self.environment(env), text=True, start_new_session=True, **streams)
        self._started.append(process)
        return process

    def run(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | Path = "/",
        timeout_s: float = 120,
    ) -> subprocess.CompletedProcess[str]:
        """The ended process with its output; one that takes longer than `timeout_s` is killed, and TimeoutExpired."""
        process = self.popen(argv, env=env, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        try:
            out, err = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
            raise subprocess.TimeoutExpired(list(argv), timeout_s, out, err) from None
        return subprocess.CompletedProcess(list(argv), process.returncode, out, err)

    def hide(self, path: str | Path) -> None:
        """The folder is empty on this host from now on; elsewhere it is as it was."""
        self._enter("mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(path))

    def ray_head(
        self,
        *,
        cpus: int = 1,
        resources: Mapping[str, float] | None = None,
        env: Mapping[str, str] | None = None,
        dashboard: bool = False,
    ) -> None:
        """This host is a Ray head, and alive; with `dashboard` it also takes jobs, at `DASHBOARD_PORT`."""
        flags = ["--head", f"--port={GCS_PORT}", f"--include-dashboard={dashboard}"]
        flags += ["--dashboard-host=0.0.0.0", f"--dashboard-port={DASHBOARD_PORT}"] if dashboard else []
        self._ray_start(flags, cpus, resources, {**HEALTH, **(env or {})})
        self._until(lambda: _listens(self.address, GCS_PORT), "the head's control store listens")
        self._watch = self.popen(
            [sys.executable, "-c", _WATCH, self.gcs], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self._until(lambda: self.address in self.alive(), "the head is alive")

    def ray_worker(
        self,
        head: Host,
        *,
        cpus: int = 1,
        resources: Mapping[str, float] | None = None,
        env: Mapping[str, str] | None = None,
        wait: bool = True,
    ) -> None:
        """This host is a node of the head's cluster; with `wait` it is alive, else it comes when it comes."""
        self._until(lambda: self.address not in head.alive(), "the node that was killed here is given up")
        self._ray_start([f"--address={head.gcs}"], cpus, resources, env)
        if wait:
            self._until(lambda: self.address in head.alive(), "the node is alive")

    def ray_ended(self, timeout_s: float) -> int:
        """The exit code of `ray start`, which ends by itself within that time."""
        assert self._node is not None
        return self._node.wait(timeout_s)

    def alive(self) -> set[str]:
        """Addresses of the nodes that this head takes for alive."""
        assert self._watch is not None, "only a Ray head knows"
        assert self._watch.stdin is not None and self._watch.stdout is not None
        self._watch.stdin.write("\n")
        self._watch.stdin.flush()
        return set(json.loads(self._watch.stdout.readline()))

    def drain(self, head: Host) -> None:
        """The node is about to be taken away, as a cloud says it beforehand: alive, and given nothing new to do."""
        done = head.run([sys.executable, "-c", _DRAIN, head.gcs, self.address])
        assert done.returncode == 0, done.stderr

    def cut(self) -> None:
        """The host's cable is pulled: nothing arrives, nobody is told."""
        _ip("link", "set", self.link, "down")

    def heal(self) -> None:
        _ip("link", "set", self.link, "up")

    def kill(self, *, silent: bool = False) -> None:
        """kill -9 of everything on the host at once. Its peers see their connections close, unless `silent`.

        A host killed is one without processes: it may be used again, after `heal` if it was silent.
        """
        if silent:
            self.cut()
        self._enter("sh", "-c", "kill -9 -1")  # reaches all but the first process and this one
        for process in self._started:
            process.wait(30)
        for stream in (self._watch.stdin, self._watch.stdout) if self._watch else ():
            with contextlib.suppress(OSError):  # a question that nobody read
                stream.close()  # type: ignore[union-attr]
        self._started, self._watch, self._node = [], None, None

    def end(self) -> None:
        """Nothing of the host is left."""
        if self.first:
            self.kill()
            os.kill(self.first, signal.SIGKILL)
        else:
            self.holder.kill()
        self.holder.communicate(timeout=30)
        _gone(self.link)

    def _ray_start(
        self,
        flags: Iterable[str],
        cpus: int,
        resources: Mapping[str, float] | None,
        env: Mapping[str, str] | None,
    ) -> None:
        node = [
            f"--node-ip-address={self.address}",
            f"--num-cpus={cpus}",
            f"--resources={json.dumps(dict(resources or {}))}",
            f"--object-store-memory={STORE_BYTES}",
            f"--temp-dir={self.folder / 'ray'}",
            "--disable-usage-stats",
            "--block",
        ]
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", *flags, *node]
        quiet = {"RAY_enable_metrics_collection": "0"}  # its agent takes a tenth of a core
        with self.log.open("a") as log:
            self._node = self.popen(command, env={**quiet, **(env or {})}, stdout=log, stderr=subprocess.STDOUT)

    def _until(self, condition: Callable[[], bool], what: str) -> None:
        began = time.monotonic()
        while not condition():
            ended = self._node is not None and self._node.poll() is not None
            if ended or time.monotonic() - began > START_S:
                why = "as `ray start` ended" if ended else f"after {START_S} s"
                raise RuntimeError(f"{self.name}: not so {why}: {what}\n{self.log.read_text()[-2000:]}")
            time.sleep(0.1)

    def _enter(self, *command: str) -> None:
        # --net leads to the host's link, --mount and --pid to its /proc
        _call("nsenter", f"--target={self.first}", "--net", "--mount", "--pid", "--", *command)


class Hosts:
    """`n` hosts on a bridge inside the block; after it nothing of them is left, however it ended.

    A server of this process that listens on `address` is reached by all of them. If this process is killed, so are the
    hosts; the bridge and the folder that it then leaves are removed by the next `Hosts`.
    """

    def __init__(self, n: int) -> None:
        self._count = n
        self._all: list[Host] = []
        self._bridge = ""
        self.folder = Path()
        self.address = ""
        self.token = secrets.token_hex(16)

    def __enter__(self) -> Hosts:
        try:
            _sweep()
            self.folder = Path(tempfile.mkdtemp(prefix="rg", dir="/tmp"))  # short: Ray puts sockets below it
            (self.folder / "ray").mkdir()
            subnet = self._take_subnet()
            for number in range(1, self._count + 1):
                self._add(number, subnet)
        except BaseException:
            self._clear()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            for host in self._all:
                if host.log.exists():
                    print(f"--- ray start on {host.name}:\n{host.log.read_text()[-4000:]}", file=sys.stderr)
        self._clear()

    def __getitem__(self, number: int) -> Host:
        return self._all[number]

    def __len__(self) -> int:
        return len(self._all)

    def _take_subnet(self) -> ipaddress.IPv4Network:
        """Making the bridge takes its name, which says which subnet it has: two processes cannot take the same one."""
        routes = json.loads(_call("ip", "-json", "-4", "route", "show", "table", "all"))
        words = [str(route["dst"]) for route in routes if str(route["dst"]) != "default"]
        known = [ipaddress.ip_network(word, strict=False) for word in words]
        for number, subnet in enumerate(SUBNETS):
            if any(subnet.overlaps(other) for other in known):
                continue
            bridge = f"rg{number}"
            made = subprocess.run(["ip", "link", "add", bridge, "type", "bridge"], capture_output=True, check=False)
            if made.returncode:
                continue
            self._bridge = bridge
            self.address = str(subnet[-2])
            _ip("link", "set", bridge, "alias", f"{os.getpid()} {self.folder}")
            _ip("address", "add", f"{self.address}/24", "dev", bridge)
            _ip("link", "set", bridge, "up")
            return subnet
        raise RuntimeError(f"no bridge could be made for any subnet from {SUBNETS[0]} to {SUBNETS[-1]}")

    def _add(self, number: int, subnet: ipaddress.IPv4Network) -> None:
        name, address, link = f"host{number}", str(subnet[number]), f"{self._bridge}-{number}"
        (self.folder / name).mkdir()
        (self.folder / "resolv.conf").touch()  # a name server that cannot be reached costs gloo ten seconds a start
        names = [f"{subnet[other]} host{other}" for other in range(1, self._count + 1)]
        (self.folder / f"{name}.hosts").write_text("\n".join(["127.0.0.1 localhost", *names]) + "\n")
        holder = subprocess.Popen(
            [*_UNSHARE, *SPACES, "sh", "-c", _HOLD.format(name=name), "sh", str(self.folder)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # Ctrl-C on the terminal is ours to handle
        )
        host = Host(name, address, self.folder, link, self.token, holder, 0)
        self._all.append(host)
        assert holder.stdout is not None
        said = holder.stdout.readline().strip()
        if said != "ready":
            raise RuntimeError(f"{name}: its namespaces could not be made ({said})")
        (host.first,) = _children(holder.pid)
        _ip("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", str(host.first))
        _ip("link", "set", link, "master", self._bridge, "up")
        host._enter("ip", "link", "set", "lo", "up")
        host._enter("ip", "address", "add", f"{address}/24", "dev", "eth0")
        host._enter("ip", "link", "set", "eth0", "up")
        # leads nowhere, but Ray takes the address that a packet to the internet would have for the host's own
        host._enter("ip", "route", "add", "default", "via", self.address)

    def _clear(self) -> None:
        for host in self._all:
            host.end()
        _gone(self._bridge)
        if self.folder != Path():
            shutil.rmtree(self.folder, ignore_errors=True)


def _sweep() -> None:
    """What hosts of processes left that did not live to clear it is gone."""
    links = json.loads(_call("ip", "-json", "link", "show"))
    for link in links:
        pid, _, folder = str(link.get("ifalias", "")).partition(" ")
        if link["ifname"].startswith("rg") and pid.isdigit() and not Path(f"/proc/{pid}").exists():
            for port in links:  # a dead host's namespace, and its link with it, may take the kernel some time
                if port["ifname"].startswith(f"{link['ifname']}-"):
                    _gone(port["ifname"])
            _gone(link["ifname"])
            if folder.startswith("/tmp/rg"):
                shutil.rmtree(folder, ignore_errors=True)


def _gone(link: str) -> None:
    if link:
        subprocess.run(["ip", "link", "delete", link], capture_output=True, check=False)


def _listens(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), timeout=1).close()
    except OSError:
        return False
    return True


def _ip(*words: str) -> None:
    _call("ip", *words)


def _call(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout
