"""What this machine has and lacks, each finding with what to do about it.

Whatever may hang or crash (torch, FAISS, drivers) is asked in a process of its own, with a time limit.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

PROBE_TIMEOUT_S = 90.0
RAY_PORTS = {6379: "Ray's control store", 8265: "Ray's dashboard", 10001: "Ray clients", 8000: "serving"}
GIB = 1 << 30

Status = Literal["ok", "warn", "fail"]


@Parameter(name="*")
@dataclass(frozen=True)
class DoctorConfig:
    json: Annotated[bool, Parameter(negative=())] = False
    "Print one JSON list instead of lines."


@dataclass(frozen=True)
class Finding:
    """One line of the answer; `advice` says what to do, and is empty where nothing is."""

    status: Status
    name: str
    value: str
    advice: str = ""

    def __str__(self) -> str:
        return f"{self.status:<4}  {self.name}: {self.value}" + (f" - {self.advice}" if self.advice else "")


def doctor(config: DoctorConfig) -> int:
    """Every finding is printed; returns the exit code, 1 if any of them is a failure."""
    found = [finding for check in CHECKS for finding in _checked(check)]
    if config.json:
        print(json.dumps([asdict(finding) for finding in found], indent=2))
    else:
        print("\n".join(str(finding) for finding in found))
    return int(any(finding.status == "fail" for finding in found))


def _checked(check: Callable[[], Iterator[Finding]]) -> list[Finding]:
    """The check's findings; a check that breaks is itself a finding."""
    try:
        return list(check())
    except Exception as error:
        name = getattr(check, "__name__", "check").strip("_").removeprefix("check_")
        return [Finding("warn", name, f"could not be checked ({type(error).__name__}: {error})")]


def check_python() -> Iterator[Finding]:
    version = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    good = sys.version_info >= (3, 11)
    yield Finding("ok" if good else "fail", "python", version, "" if good else "install Python 3.11 or newer")


def check_cores() -> Iterator[Finding]:
    usable, total = usable_cores(), os.cpu_count() or 1
    few = usable < 2
    yield Finding(
        "warn" if few else "ok",
        "cores",
        f"{usable:g} of {total}",
        "training and decoding will share one" if few else "",
    )


def usable_cores(cgroup: Path = Path("/sys/fs/cgroup")) -> float:
    """Cores this process may use: its affinity, cut by the cgroup's quota."""
    affinity = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    quota, period = [*_words(cgroup / "cpu.max"), "", ""][:2]
    return min(float(affinity), int(quota) / int(period)) if quota.isdigit() and period.isdigit() else affinity


def check_memory() -> Iterator[Finding]:
    limit = memory_bytes()
    low = limit < 4 * GIB
    yield Finding("warn" if low else "ok", "memory", _gib(limit), "4 GiB are the least for two workers" if low else "")


def memory_bytes(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Memory of the machine, cut by the cgroup's limit (version 2 or 1)."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [_words(cgroup / name) for name in ("memory.max", "memory/memory.limit_in_bytes")]
    return min([physical, *(int(words[0]) for words in limits if words and words[0].isdigit())])


def check_shared_memory() -> Iterator[Finding]:
    if not Path("/dev/shm").is_dir():
        yield Finding("warn", "/dev/shm", "absent", "Ray keeps objects in /tmp, which is slower")
        return
    free = shutil.disk_usage("/dev/shm").free
    low = free < 2 * GIB
    advice = "Ray falls back to /tmp, which is slower; in a container start it with --shm-size=4g" if low else ""
    yield Finding("warn" if low else "ok", "/dev/shm", f"{_gib(free)} free", advice)


def check_gpu() -> Iterator[Finding]:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        yield Finding("ok", "gpu", "no NVIDIA driver", "runs on the CPU")
        return
    query = [tool, "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    code, out = _ask(query, timeout_s=20)
    if code or not out:
        yield Finding("warn", "gpu", f"nvidia-smi fails: {_last_line(out)}", "reinstall the driver or reboot")
    for line in out.splitlines() if not code else []:
        yield Finding("ok", "gpu", line.strip())


TORCH_PROBE = """
import json, torch
cuda = torch.cuda.is_available()
mps = torch.backends.mps.is_available()
device = "cuda" if cuda else "mps" if mps else "cpu"
bf16 = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
print(json.dumps({"version": torch.__version__, "built": torch.version.cuda or "no CUDA", "device": device,
                  "bf16": bool(bf16), "threads": torch.get_num_threads()}))
"""


def check_torch() -> Iterator[Finding]:
    answer = _probe("torch", TORCH_PROBE)
    if isinstance(answer, Finding):
        yield answer
        return
    yield Finding("ok", "torch", f"{answer['version']} (built for {answer['built']}), {answer['threads']} threads")
    blind = answer["device"] == "cpu" and shutil.which("nvidia-smi") is not None
    advice = "there is a driver, but torch cannot use it: install a torch built for it" if blind else ""
    yield Finding("warn" if blind else "ok", "device auto", str(answer["device"]), advice)
    yield Finding("ok", "precision auto", "bf16" if answer["bf16"] else "fp32, as bf16 gains nothing here")


FAISS_PROBE = """
import json, faiss
print(json.dumps({"version": faiss.__version__, "options": faiss.get_compile_options().strip(),
                  "gpus": faiss.get_num_gpus() if hasattr(faiss, "get_num_gpus") else 0}))
"""


def check_faiss() -> Iterator[Finding]:
    answer = _probe("faiss", FAISS_PROBE)
    if isinstance(answer, Finding):
        yield answer
        return
    yield Finding("ok", "faiss", f"{answer['version']} ({answer['options']}), {answer['gpus']} GPUs")


def check_ports() -> Iterator[Finding]:
    if not _can_bind(0):
        yield Finding("fail", "loopback", "cannot listen on 127.0.0.1", "Ray needs it; check the container or firewall")
        return
    yield Finding("ok", "loopback", "can listen on 127.0.0.1")
    taken = [f"{port} ({use})" for port, use in RAY_PORTS.items() if not _can_bind(port)]
    if taken:
        yield Finding(
            "warn", "ports", f"in use: {', '.join(taken)}", "another Ray may be running: ray status, ray stop"
        )
    else:
        yield Finding("ok", "ports", f"{', '.join(map(str, RAY_PORTS))} are free")


def check_ray() -> Iterator[Finding]:
    version = _version("ray")
    if version is None:
        yield Finding("fail", "ray", "not installed", "pip install 'ray[data,train,tune,serve]'")
        return
    yield Finding("ok", "ray", version)
    mode = os.environ.get("RAY_AUTH_MODE", "")
    if mode.lower() == "disabled":
        yield Finding(
            "warn", "ray token", "RAY_AUTH_MODE=disabled", "anyone who reaches the ports can run code; unset it"
        )
    else:
        yield Finding("ok", "ray token", f"RAY_AUTH_MODE={mode}" if mode else "Ray's default (RAY_AUTH_MODE not set)")
    yield from token_file(Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token"))


def token_file(path: Path) -> Iterator[Finding]:
    """Whether others of this machine may read the token that opens the cluster."""
    if not path.exists():
        yield Finding("ok", "ray token file", f"{path} does not exist yet")
        return
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        yield Finding("warn", "ray token file", f"{path} has mode {mode:04o}", f"others can read it: chmod 600 {path}")
    else:
        yield Finding("ok", "ray token file", f"{path} has mode {mode:04o}")


CLUSTER_PROBE = """
import sys
from cluster.errors import RayographError
from cluster.session import session
try:
    with session() as found:
        print(f"{found.nodes} nodes, {found.cpus} CPUs, {found.gpus} GPUs")
except RayographError as error:
    sys.exit(str(error))
"""


def check_cluster() -> Iterator[Finding]:
    """Whether the cluster of `RAY_ADDRESS` can be joined, and all its nodes run our code."""
    address = os.environ.get("RAY_ADDRESS")
    if address is None:
        yield Finding("ok", "cluster", "RAY_ADDRESS is not set: work runs on this machine")
        return
    status, out = _ask([sys.executable, "-c", CLUSTER_PROBE], timeout_s=PROBE_TIMEOUT_S)
    if status == 0:
        yield Finding("ok", "cluster", f"{address}: {_last_line(out)}, all with this machine's code and versions")
    else:
        said = _last_line(out) or f"{address} gives no answer within {PROBE_TIMEOUT_S:g} s"
        yield Finding("fail", "cluster", said, "" if out else "start it, or unset RAY_ADDRESS to run locally")


def check_disk() -> Iterator[Finding]:
    ray_folder = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir())
    yield from disk("disk here", Path.cwd())
    yield from disk("disk for Ray", ray_folder)


def disk(name: str, path: Path) -> Iterator[Finding]:
    """Free space at `path`; Ray stops spilling at 95 % full."""
    usage = shutil.disk_usage(path)
    full = usage.free < 2 * GIB or usage.free < 0.05 * usage.total
    advice = "free some space; Ray stops at 95 % full" if full else ""
    yield Finding("warn" if full else "ok", name, f"{_gib(usage.free)} of {_gib(usage.total)} free at {path}", advice)


def check_files() -> Iterator[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    low = soft != resource.RLIM_INFINITY and soft < 4096
    advice = f"ulimit -n 65535 before starting Ray (at most {hard} here)" if low else ""
    yield Finding("warn" if low else "ok", "open files", f"{soft} (hard limit {hard})", advice)


def check_licences() -> Iterator[Finding]:
    names = sorted(dependencies("rayograph"))
    if not names:
        yield Finding("warn", "licences", "rayograph is not installed", "pip install -e . in the checkout")
        return
    copyleft = [name for name in names if is_copyleft(metadata.metadata(name))]
    if copyleft:
        yield Finding("warn", "licences", f"GPL or AGPL: {', '.join(copyleft)}", "mind their terms when you distribute")
    else:
        yield Finding("ok", "licences", f"{len(names)} packages, none under GPL or AGPL")


def dependencies(root: str) -> set[str]:
    """Names of the installed distributions that `root` needs, directly or not, without `root` itself."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    seen: set[tuple[str, str]] = set()
    todo: list[tuple[str, str]] = [(canonicalize_name(root), "")]
    while todo:
        name, extra = todo.pop()
        if (name, extra) in seen or _version(name) is None:
            continue
        seen.add((name, extra))
        for need in map(Requirement, metadata.requires(name) or []):
            if need.marker is None or need.marker.evaluate({"extra": extra}):
                todo += [(canonicalize_name(need.name), wanted) for wanted in ["", *need.extras]]
    return {name for name, _ in seen} - {canonicalize_name(root)}


def is_copyleft(package: Any) -> bool:
    """Whether a distribution's metadata offers it under the GPL or AGPL alone; the LGPL and free choices are not."""
    expression = package.get("License-Expression") or ""
    classifiers = [c for c in package.get_all("Classifier") or [] if c.startswith("License ::")]
    stated = expression or "; ".join(classifiers) or (package.get("License") or "").split("\n")[0]
    choices = expression.split(" OR ") if expression else classifiers or [stated]
    return bool(stated) and all(_names_gpl(choice) for choice in choices)


def _names_gpl(text: str) -> bool:
    plain = text.upper().replace("LESSER GENERAL PUBLIC", "").replace("LGPL", "")
    if "EXCEPTION" in plain:  # such as GCC's run-time exception: made to be linked by anything
        return False
    return "GPL" in plain or "GENERAL PUBLIC LICENSE" in plain


CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    check_python,
    check_cores,
    check_memory,
    check_shared_memory,
    check_gpu,
    check_torch,
    check_faiss,
    check_ports,
    check_ray,
    check_cluster,
    check_disk,
    check_files,
    check_licences,
)


def _probe(module: str, code: str) -> dict[str, Any] | Finding:
    """The JSON that `code` prints in a process of its own, or the failure."""
    status, out = _ask([sys.executable, "-c", code], timeout_s=PROBE_TIMEOUT_S)
    if status is None:
        return Finding("fail", module, f"gives no answer within {PROBE_TIMEOUT_S:g} s", f"import it by hand: {module}")
    try:
        return dict(json.loads(_last_line(out)))
    except ValueError:
        return Finding("fail", module, _last_line(out) or f"ended with {status}", f"reinstall it: pip install {module}")


def _ask(command: list[str], timeout_s: float) -> tuple[int | None, str]:
    """Exit code and output of a command; the code is None when it took too long."""
    run = partial(subprocess.run, text=True, errors="replace", stdin=subprocess.DEVNULL, timeout=timeout_s)
    try:
        done = run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    except subprocess.TimeoutExpired:
        return None, ""
    except OSError as error:
        return 1, str(error)
    return done.returncode, done.stdout


def _can_bind(port: int) -> bool:
    with closing(socket.socket()) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", port))
            listener.listen()
        except OSError:
            return False
        return True


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else ""


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / GIB:.1f} GiB"
