"""Questions to every node of the running cluster: does it have our code, does it see this folder."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.code import SAME_CODE, Code, difference, this_code
from cluster.errors import ResourceError, UsageError

ANSWER_S = 60.0
"""How long a node may take to answer: to start a worker process there, and fetch a job's code."""


@dataclass(frozen=True)
class Node:
    """One living node of the cluster."""

    id: str
    address: str


def alive() -> list[Node]:
    """The nodes that Ray takes for alive, in the order of their addresses. Ray must be up."""
    import ray

    nodes = [Node(node["NodeID"], node["NodeManagerAddress"]) for node in ray.nodes() if node["Alive"]]
    return sorted(nodes, key=lambda node: (node.address, node.id))


def ask(
    question: Callable[[], Any], nodes: Sequence[Node] | None = None, *, timeout_s: float = ANSWER_S
) -> dict[Node, Any]:
    """What `question` returns on each of the nodes (default: all that are alive), or the exception that came of it.

    It runs as a task that takes no CPU. It must be a function made inside another one, and import inside itself: such a
    function travels by value, one of a module would need this very module there.

    Raises:
        ResourceError: a node that is still alive gave no answer within `timeout_s`.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task = ray.remote(num_cpus=0, max_retries=0)(question)
    asked = {
        task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False)).remote(): node
        for node in (alive() if nodes is None else nodes)
    }
    done, silent = ray.wait(list(asked), num_returns=len(asked), timeout=timeout_s) if asked else ([], [])
    answers: dict[Node, Any] = {}
    for reference in done:
        try:
            answers[asked[reference]] = ray.get(reference)
        except Exception as error:
            answers[asked[reference]] = error
    for reference in silent:
        ray.cancel(reference, force=True)
    failed = silent or any(isinstance(answer, Exception) for answer in answers.values())
    left = set(alive()) if failed else set(asked.values())  # one that died meanwhile is no longer asked
    lost = [asked[reference] for reference in silent if asked[reference] in left]
    if lost:
        raise ResourceError(
            f"{_named(lost)}: no answer within {timeout_s:g} s: see `ray status`, or take it out of the cluster"
        )
    return {node: answer for node, answer in answers.items() if node in left}


def check_code(*, timeout_s: float = ANSWER_S) -> int:
    """Every node of the running cluster runs this process's code and versions; returns how many were asked.

    Nobody is asked where this process's own node is the only one.

    Raises:
        UsageError: a node runs something else, or cannot import us.
        ResourceError: a node gave no answer.
    """
    import ray

    nodes, ours = alive(), this_code()
    if [node.id for node in nodes] == [ray.get_runtime_context().get_node_id()]:
        return 0

    def code_there() -> Code | str:
        try:
            from cluster.code import this_code
        except ImportError as error:
            return str(error)
        return this_code()

    wrong: dict[str, list[Node]] = {}
    for node, answer in ask(code_there, nodes, timeout_s=timeout_s).items():
        found = _complaint(answer, ours)
        if found:
            wrong.setdefault(found, []).append(node)
    for found, where in wrong.items():
        raise UsageError(f"{_named(where)}: {found}")
    return len(nodes)


def unseen_by(folder: str | Path, nodes: Sequence[Node] | None = None, *, timeout_s: float = ANSWER_S) -> list[str]:
    """Addresses of the nodes (default: all that are alive) that do not see this process's `folder`, or cannot read it.

    A file with a random content is written there, read by every node, and removed.

    Raises:
        OSError: this process cannot write to the folder.
        ResourceError: a node gave no answer.
    """
    content = secrets.token_hex(16)
    path = str(Path(folder).absolute() / f".seen-{secrets.token_hex(8)}")

    def seen_there() -> bool:
        try:
            return Path(path).read_text() == content
        except OSError:
            return False

    try:
        Path(path).write_text(content)
        answers = ask(seen_there, nodes, timeout_s=timeout_s)
    finally:
        with contextlib.suppress(OSError):
            Path(path).unlink()
    return [node.address for node, seen in answers.items() if seen is not True]


def _complaint(answer: Any, ours: Code) -> str:
    match answer:
        case Exception():
            return f"cannot run a task ({_first_line(answer)})"
        case str():
            return f"cannot import rayograph ({answer}): {SAME_CODE}"
        case _:
            return difference(answer, ours)


def _named(nodes: Sequence[Node]) -> str:
    return ("node " if len(nodes) == 1 else "nodes ") + ", ".join(node.address for node in nodes)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
