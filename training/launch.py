"""Ray Train around the worker loop: starts it, follows its desk, passes on stop requests, replaces what hangs, takes up
new hosts, and explains failures. The driver's process stays the same whatever happens to the ranks.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cluster import errors, storage
from cluster.code import this_code
from cluster.errors import LockedError, RayographError, StoppedError
from cluster.progress import Bar, progress, say
from training.desk import Desk, Place, born
from training.line import ROWS
from training.loop import Job
from training.worker import enter

FAILURES = 8
"""Ends of a group that one of Ray's controllers mends before it gives up; then, if the run got on, a new one starts."""
IDLE_LAUNCHES = 3
"""Controllers that may end, one after the other, without one new step; of those that mend nothing, `FAILURES`."""
SETTLED_S = 25.0
"""How long a cluster must have been as it is before more ranks are tried: what Ray Train itself knows of it is up to
20 s old (the tick of its AutoscalingCoordinator), and a restart before that would bring as many as there were."""
LOOK_S = 0.5
STARVED_S = 10.0
"""How long ranks wait for data before it is asked whether the cluster has a CPU left that reads for them."""
HOSTS_S = 5.0
"""How often it is looked for hosts that could hold more ranks, or are about to be taken away."""
WATCH_S = 3.0
"""The least time between two acts of the watchdog."""
KILL_S = 30.0
STOP_PATIENCE_S = 7.0
"""How long a stopped run may take to the end of its step, where it has not shown longer ones."""
SAVE_PATIENCE_S = 20.0
"""How much longer one that is writing a checkpoint may take; machines that are taken away leave about 30 s in all."""
START_PATIENCE_S = 600.0
"""How long a group may take from its start to its first step, however short the user's patience."""
DATA_PATIENCE = 10
"""A rank that waits for data may take this many times longer than one that computes."""


@dataclass(frozen=True)
class Team:
    """The ranks of a run: between `least` and `most`, each taking these resources of its node."""

    least: int
    most: int
    device: str
    on: str | None = None
    """A custom resource of the nodes that may train."""
    reading: str | None = None
    """A custom resource of the nodes that may read."""

    @property
    def elastic(self) -> bool:
        return self.least < self.most

    @property
    def bundle(self) -> dict[str, float]:
        """What one rank takes."""
        own = {"GPU": 1.0} if self.device == "cuda" else {"CPU": 1.0}
        return own | ({self.on: 1.0} if self.on else {})

    @property
    def greedy(self) -> bool:
        """Whether there may be more ranks than leave a CPU to read, if it is left to Ray Train how many."""
        return self.elastic and "CPU" in self.bundle

    def crowds(self, nodes: list[dict[str, float]]) -> bool:
        """Whether ranks may take all CPUs of these nodes that could read for them."""
        apart = [n for n in self._readers(nodes) if self.on and not n.get(self.on) and n.get("CPU", 0.0) >= 1]
        return self.greedy and not apart

    def within(self, nodes: list[dict[str, float]]) -> Team:
        """This team with no more ranks than fit on these nodes. One that is not elastic waits for another node."""
        return replace(self, most=max(self.least, self.room(nodes)))

    def room(self, nodes: list[dict[str, float]]) -> int:
        """Ranks that fit on nodes with these resources, at most `most`, and leave a CPU to read for them, wherever
        Ray puts them. Where no node could ever read, as many as fit: fewer would not help."""
        fit = sum(map(self._fit, nodes))
        readers = self._readers(nodes)
        if "CPU" in self.bundle and not any(n.get("CPU", 0.0) - self._fit(n) >= 1 for n in readers):
            there = sum(map(self._fit, readers))  # all of them may fill up first
            fit = min(fit, there - 1) if there else fit
        return min(self.most, fit)

    def _fit(self, node: dict[str, float]) -> int:
        return int(min(node.get(k, 0.0) // v for k, v in self.bundle.items()))

    def _readers(self, nodes: list[dict[str, float]]) -> list[dict[str, float]]:
        return [n for n in nodes if self.reading is None or n.get(self.reading)]


def launch(
    job: Job,
    team: Team,
    out: Path,
    before: tuple[int, int],
    watch: Callable[[Any, int], None],
    held: Callable[[], None] = lambda: None,
) -> None:
    """The worker loop has come to its end on every rank, or an error says why not. Ray must be up.

    Args:
        out: the local folder of the run.
        before: step and samples of the checkpoint that it starts from.
        watch: called now and then with the desk and the step of the newest checkpoint, to look at the run from aside;
            must not block.
        held: called as often; raises where this process is not the one that writes the run any more.

    Raises:
        StoppedError, KeyboardInterrupt: stopped on request, with a checkpoint where there was time for one.
        LockedError: of `held`; the ranks have been ended.
        RayographError: what a rank raised on purpose, or why training failed for good.
    """
    desk, hosts = _Handle(out, job.out, before[0]), _Hosts(team)
    idle = 0
    plan = job.source.plan
    total, last = job.config.epochs * plan.total, job.config.epochs * plan.batches
    try:
        with _stopping(desk) as stopped, progress("pretrain", total, "images", done=before[1]) as bar:
            shown = _Shown(bar, before[1])
            while True:
                reached = desk.step
                error = _follow(job, team, out, desk, hosts, shown, stopped, watch, held)
                _raise_failure(desk, stopped())
                if error is None and desk.step >= last:
                    return
                idle = 0 if desk.step > reached else idle + 1
                why = _cause(error) if error else "hosts come or go"
                if idle >= (FAILURES if team.greedy else IDLE_LAUNCHES):
                    raise RayographError(f"training failed: {why}; details in {out / 'run.log'}") from error
                say(f"interrupted at step {desk.step} ({why}); training goes on from its last checkpoint")
    finally:
        desk.close()


class _Handle:
    """The driver's side of the desk; starts another one if it was lost."""

    def __init__(self, out: Path, uri: str, step: int) -> None:
        self._out, self._uri = out, uri
        self.name = f"rayograph-desk-{uuid.uuid4().hex[:12]}"
        self._number = 0
        self.step = step
        self.seen: dict[str, Any] = {}
        self.actor: Any
        self._started()

    def _started(self) -> None:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        remote: Any = ray.remote  # its types do not know the options for threads
        actor = remote(num_cpus=0, max_concurrency=8, concurrency_groups={ROWS: 1})(Desk)
        self._number += 1  # the name of one that was lost is free only when Ray has noticed
        name = f"{self.name}-{self._number:06d}"
        self.actor = actor.options(name=name, scheduling_strategy=here).remote()
        saved = self.seen.get("saved", self.step)
        if not ray.get(self.actor.open.remote(str(self._out), self._uri, self.step, saved)):
            raise LockedError(f"{self._out}: workers of an earlier run still write it; try again in a minute")

    def look(self) -> dict[str, Any]:
        """How the run stands. A desk that was lost is replaced: the ranks it had end, and find the new one."""
        import ray

        try:
            self.seen = ray.get(self.actor.look.remote(), timeout=60)
        except (ray.exceptions.ActorUnavailableError, ray.exceptions.GetTimeoutError):
            return self.seen  # it is busy, or on a node that is
        except ray.exceptions.RayActorError:
            say("the run's desk was lost; another one takes its place")
            self._started()
        self.step = max(self.step, self.seen.get("step", 0))
        return self.seen

    def order(self, name: str) -> None:
        self.actor.order.remote(name)

    def close(self) -> None:
        """Its files are whole, and it is gone."""
        import ray

        with contextlib.suppress(ray.exceptions.RayError):
            ray.get(self.actor.close.remote(), timeout=60)
        ray.kill(self.actor)


def _follow(
    job: Job,
    team: Team,
    out: Path,
    desk: _Handle,
    hosts: _Hosts,
    shown: _Shown,
    stopped: Callable[[], float],
    watch: Callable[[Any, int], None],
    held: Callable[[], None],
) -> BaseException | None:
    """One controller of Ray Train, from its start to its end; what it ended with."""
    outcome: list[BaseException | None] = []
    desk.look()

    def fit() -> None:
        try:
            nodes = hosts.staying()
            # Ray Train would ask for room on nodes that are going, or has not heard of it yet
            now = team.within(nodes) if team.crowds(nodes) or hosts.going else team
            _trainer(job, now, out, desk.name).fit()
            outcome.append(None)
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=fit, name="train", daemon=True)
    thread.start()
    watchdog = _Watchdog(job.config.watchdog_s)
    while thread.is_alive():
        thread.join(LOOK_S)
        seen = desk.look()
        shown.show(seen)
        held()
        if stopped():
            if time.monotonic() - stopped() > patience_to_stop(seen):
                say(f"ended before a checkpoint was written: the last one is of step {seen.get('saved', 0)}")
                break
            continue
        watchdog.look(seen, hosts.starved)
        if hosts.changed(seen):
            desk.order("regroup")
        watch(desk.actor, seen.get("saved", 0))
    shown.show(desk.look())
    return outcome[0] if outcome else None


def patience_to_stop(seen: dict[str, Any]) -> float:
    """Seconds from the request to stop until a run is ended as it is. seen: as of `Desk.look`."""
    longest: float = seen.get("longest", 0.0)
    patience = min(max(STOP_PATIENCE_S, 2 * longest), SAVE_PATIENCE_S)
    saving = any(phase == "save" for _, phase, _, _ in seen.get("pulses", {}).values())
    return patience + SAVE_PATIENCE_S if saving else patience


def aside(out: Path) -> Path:
    """Where Ray Train's own state of a run goes; absolute, for what is not it takes for a URI (ray 2.60)."""
    return out.absolute() / ".ray"


def _trainer(job: Job, team: Team, out: Path, desk: str) -> Any:
    """One that does not start a group of a greedy team again, but ends: as many ranks as before may be too many now."""
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    scaling: Any = ScalingConfig  # mypy sees the one of the first Ray Train
    # Ray's own state of a run is of no use to ours, which goes on from its own checkpoints: it is kept aside, under
    # names that are never used again, and thrown away.
    ours = aside(out)
    shutil.rmtree(ours, ignore_errors=True)
    return TorchTrainer(
        enter,
        # a reference, for Ray Train's controller unpickles what stands here, and would load our loop for a job
        train_loop_config={"job": ray.put(job), "desk": desk, "code": this_code()},
        torch_config=TorchConfig(backend="nccl" if team.device == "cuda" else "gloo", timeout_s=300),
        scaling_config=scaling(
            num_workers=(team.least, team.most) if team.elastic else team.most,
            use_gpu=team.device == "cuda",
            resources_per_worker=team.bundle,
            elastic_resize_monitor_interval_s=10**6,  # `_Growth` does it, for Ray would not ask for a checkpoint first
        ),
        run_config=RunConfig(
            name=f"rayograph-{uuid.uuid4().hex[:12]}",
            storage_path=str(ours),
            failure_config=FailureConfig(  # type: ignore[call-arg]
                max_failures=0 if team.greedy else FAILURES, controller_failure_limit=FAILURES
            ),
        ),
    )


@contextlib.contextmanager
def _stopping(desk: _Handle) -> Iterator[Callable[[], float]]:
    """Ctrl-C and SIGTERM ask the ranks for a checkpoint; yields the time of the request, 0.0 before it."""
    asked = [0.0]
    kind = [0]

    def ask(number: int, _frame: object) -> None:
        if asked[0] and number == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C does not wait
        asked[0], kind[0] = time.monotonic(), number
        desk.order("stop")

    if threading.current_thread() is not threading.main_thread():
        yield lambda: asked[0]
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked[0]
    except StoppedError:
        if kind[0] == signal.SIGINT:
            raise KeyboardInterrupt from None
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if kind[0] == signal.SIGINT:
        raise KeyboardInterrupt


class _Shown:
    """The progress bar, moved on by what the desk has seen."""

    def __init__(self, bar: Bar, samples: int) -> None:
        self._bar, self._samples = bar, samples

    def show(self, seen: dict[str, Any]) -> None:
        if seen and seen["samples"] > self._samples:
            self._bar.advance(seen["samples"] - self._samples, f"loss {seen['loss']:.4f}")
            self._samples = seen["samples"]


class _Watchdog:
    """Kills ranks that hang: where one rank is stopped, the others wait for it forever, and all for data that nothing
    reads."""

    def __init__(self, patience_s: float) -> None:
        self._patience = patience_s
        self._acted = time.monotonic()

    def look(self, seen: dict[str, Any], starved: Callable[[dict[str, Any]], bool]) -> None:
        """starved: as `_Hosts.starved`."""
        if not seen or not seen["group"] or time.monotonic() - self._acted < WATCH_S:
            return
        hungry = starved(seen)
        suspects = sorted(seen["pulses"]) if hungry else stuck(seen, self._patience)
        if not suspects:
            return
        killed = kill_ranks({rank: seen["pulses"][rank][0] for rank in suspects})
        if killed:  # else their group has ended, and the next one has not begun
            ranks = ", ".join(map(str, killed))
            lost = "a host is gone, and no CPU is left to read for so many ranks; fewer go on"
            why = lost if hungry else f"rank {ranks} hangs and is replaced"
            say(f"no step for {seen['since_step']:.0f} s after step {seen['step']}: {why}")
        self._acted = time.monotonic()


def stuck(seen: dict[str, Any], patience_s: float) -> list[int]:
    """The ranks to replace: those that fell silent, or all, if each says that it lives and none gets on.

    seen: as of `Desk.look`. Waiting for data is not hanging, until it takes `DATA_PATIENCE` times as long; a
    group without a step so far has `START_PATIENCE_S`.
    """
    patience = max(patience_s, 3 * seen["longest"])
    if not seen["steps"]:
        patience = max(patience, START_PATIENCE_S)
    if seen["since_step"] <= patience:
        return []
    silent = [rank for rank, (_, _, _, ago) in seen["pulses"].items() if ago > patience / 2]
    if silent:
        return sorted(silent)
    waits = any(phase == "data" for _, phase, _, _ in seen["pulses"].values())
    return [] if waits and seen["since_step"] <= DATA_PATIENCE * patience else sorted(seen["pulses"])


def kill_ranks(places: dict[int, Place]) -> list[int]:
    """Kills the process of each rank on its own node; those that were still alive."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task: Any = ray.remote(num_cpus=0, max_retries=0)(_kill)
    killed = []
    for rank, place in places.items():
        there = NodeAffinitySchedulingStrategy(place.node, soft=False)
        with contextlib.suppress(ray.exceptions.RayError):  # its node is gone, and the rank with it
            if ray.get(task.options(scheduling_strategy=there).remote(place), timeout=KILL_S):
                killed.append(rank)
    return killed


def _kill(place: Place) -> bool:
    if born(place.pid) != place.born:  # its number may have passed to another process
        return False
    try:
        os.kill(place.pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


class _Hosts:
    """Tells when hosts that come or go are a reason to start a group again, after a checkpoint; once for each group."""

    def __init__(self, team: Team) -> None:
        self._team = team
        self._growth = _Growth(team)
        self.going: set[str] = set()
        """Nodes that were seen to be taken away; Ray ends one by itself when nothing runs on it any more."""
        self._looked = time.monotonic()
        self._asked = 0

    def staying(self) -> list[dict[str, float]]:
        """Resources of the nodes that live and are not being taken away."""
        import ray

        return [n["Resources"] for n in ray.nodes() if n["Alive"] and n["NodeID"] not in self.going]

    def starved(self, seen: dict[str, Any]) -> bool:
        """Whether ranks wait for data that fewer of them would get: a node was lost on which it was read."""
        waits = any(phase == "data" for _, phase, _, _ in seen["pulses"].values())
        if not (self._team.greedy and waits and seen["since_step"] > STARVED_S):
            return False
        room = self._team.within(self.staying()).most
        return room < int(seen["world"])

    def changed(self, seen: dict[str, Any]) -> bool:
        if not seen or seen["group"] == self._asked or time.monotonic() - self._looked < HOSTS_S:
            return False
        self._looked = time.monotonic()
        going = _draining()
        self.going |= going
        leaving = bool(going & {place.node for place, _, _, _ in seen["pulses"].values()})
        if leaving:
            say("a host is about to be taken away: a checkpoint first, then training goes on without it")
        if leaving or self._growth.wanted(seen, self.going):
            self._asked = seen["group"]
        return bool(self._asked == seen["group"])


class _Growth:
    """Tells when the cluster has come to hold more ranks than the group has. Each change of it is tried once."""

    def __init__(self, team: Team) -> None:
        self._team = team
        self._changed = time.monotonic()
        self._nodes: tuple[str, ...] = ()
        self._tried: set[tuple[str, ...]] = set()

    def wanted(self, seen: dict[str, Any], going: set[str]) -> bool:
        """going: the nodes that are being taken away."""
        if not self._team.elastic or seen["world"] >= self._team.most:
            return False
        import ray

        alive = [n for n in ray.nodes() if n["Alive"] and n["NodeID"] not in going]
        nodes = tuple(sorted(n["NodeID"] for n in alive))
        if nodes != self._nodes:
            self._nodes, self._changed = nodes, time.monotonic()
        if time.monotonic() - self._changed < SETTLED_S:
            return False
        if nodes in self._tried or self._team.room([n["Resources"] for n in alive]) <= seen["world"]:
            return False
        self._tried.add(nodes)
        return True


def _draining() -> set[str]:
    """The nodes that are about to be taken away: alive, and given nothing new to do."""
    from ray._private.state import state  # Ray Train's own watcher asks the same; no public call tells it

    return set(state.get_draining_nodes())


def _raise_failure(desk: _Handle, stopped: float) -> None:
    failure = desk.seen.get("failure")
    if failure:
        raise getattr(errors, failure["kind"], RayographError)(failure["message"])
    if stopped:
        raise StoppedError("stopped")


def _cause(error: BaseException) -> str:
    """The innermost message of Ray's nested errors, in one line."""
    import ray

    failures = getattr(error, "worker_failures", None) or {}
    inner = next(iter(failures.values()), error)
    if isinstance(inner, ray.exceptions.RayActorError):  # its own message is a page on what may kill a process
        return "one of its processes was killed"
    lines = [line.strip() for line in str(inner).splitlines() if line.strip()]
    return storage.printable(lines[-1][:300]) if lines else type(inner).__name__
