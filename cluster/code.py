"""Which code a process runs: what the hosts of a cluster must agree on, and a word where they do not.

Knows no Ray: `cluster.nodes` asks the other hosts.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterator
from functools import cache
from importlib import metadata, util
from pathlib import Path

from cluster.errors import UsageError

PACKAGES = ("cluster", "serving", "training", "tuning")
SUFFIXES = (".py", ".j2", ".html", ".css", ".js")
"""Files that a run reads from the packages; what else lies beside them (caches, constraints) changes no run."""
LIBRARIES = ("ray", "torch", "pyarrow", "numpy")
"""Libraries whose objects travel between hosts, or whose numbers must agree."""

SAME_CODE = (
    "install the same version on every node, or send yours with: ray job submit --working-dir . -- rayograph ..."
)

Code = tuple[str, dict[str, str]]
"""Fingerprint and versions. Built-in types, as it is unpickled where our code may be another or none."""


@cache
def fingerprint() -> str:
    """sha256 of the four packages' sources, wherever they were imported from; the same for the same code.

    A checkout, an installed wheel and a job's working directory agree: names count from the packages on, and only files
    that a run reads. Computed once for each process.

    Raises:
        ModuleNotFoundError: one of the packages cannot be found.
    """
    return fingerprint_of({name: _folder(name) for name in PACKAGES})


def fingerprint_of(folders: dict[str, Path]) -> str:
    """`fingerprint` of the packages in these folders."""
    digest = hashlib.sha256()
    for package, folder in sorted(folders.items()):
        for path in sorted(_sources(folder), key=lambda path: path.relative_to(folder).as_posix()):
            content = path.read_bytes()
            digest.update(f"{package}/{path.relative_to(folder).as_posix()}\0{len(content)}\0".encode())
            digest.update(content)
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that hosts must share; "none" where one is not installed.

    Without local parts: hosts with and without a GPU may have builds of their own, such as `+cu130` and `+cpu`.
    """
    return {"python": platform.python_version(), **{name: _version(name) for name in LIBRARIES}}


def this_code() -> Code:
    """What this process runs, to be sent to others."""
    return fingerprint(), versions()


def difference(theirs: Code, driver: Code) -> str:
    """What differs between a node and the driver, and what to do; empty if nothing does."""
    for name, version in driver[1].items():
        other = theirs[1].get(name, "none")
        if other != version:
            return f"{name} {other}, the driver has {version}: install the same version on every node"
    if theirs[0] != driver[0]:
        return f"another rayograph (code {theirs[0][:12]}) than the driver's ({driver[0][:12]}): {SAME_CODE}"
    return ""


def check_here(expected: Code) -> None:
    """This process runs the same code as the driver, whose `this_code()` is given.

    To be called first by what runs on a node that may have joined after the session had been checked.

    Raises:
        UsageError: it does not.
    """
    found = difference(this_code(), expected)
    if found:
        raise UsageError(f"node {platform.node()}: {found}")


def _folder(package: str) -> Path:
    spec = util.find_spec(package)  # does not import it
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)
    return Path(next(iter(spec.submodule_search_locations)))


def _sources(folder: Path) -> Iterator[Path]:
    for path in folder.rglob("*"):
        hidden = any(part.startswith(".") or part == "__pycache__" for part in path.relative_to(folder).parts)
        if path.suffix in SUFFIXES and not hidden and path.is_file():
            yield path


def _version(name: str) -> str:
    try:
        return metadata.version(name).partition("+")[0]
    except metadata.PackageNotFoundError:
        return "none"
