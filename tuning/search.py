"""Trials on Ray Tune: suggested by the ledger, stopped early by ASHA, each a plain function on one core or GPU.

Ray's own record of the experiment is pickled: it goes to a scratch folder, is never read, and is thrown away.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from ray import tune
from ray.tune.schedulers import ASHAScheduler, TrialScheduler
from ray.tune.search import Searcher

from cluster import storage
from cluster.errors import RayographError
from tuning.ledger import Ledger, Outcome, Record, State
from tuning.spaces import Params
from tuning.trial import IN_FULL, Report

LOG = "metrics.jsonl"
SCRATCH = ".ray"
REDUCTION = 3
"""Of the trials that reach a rung, about one in this many goes on."""
DEATHS = 1
"""How often a trial is started again because its process or node died; its own errors end it at once."""
VARIABLES = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # it would end the search as if it were done
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_RESULT_BUFFER_LENGTH": "1",  # results held back would let a trial run on past its rung
}
REPORTED = ("epoch", "loss", "held_loss", "value", "best_epoch", "seconds", "failed")
"""What of a trial's results is kept; Ray adds much of its own."""


class Bench(Protocol):
    """What trials of a study share, and how one is run: see `tuning.trial` and `tuning.hierarchical`."""

    @property
    def epochs(self) -> int: ...

    def run(self, params: Params, report: Report) -> None: ...


OnFinished = Callable[[Record], None]


def run_search(
    ledger: Ledger,
    bench: Bench,
    out: Path,
    *,
    chatter: Path,
    trials: int,
    workers: int,
    gpu: bool,
    on_finished: OnFinished,
) -> None:
    """The ledger holds `trials` finished trials; those it held before were not run again. Ray must be up.

    At most `workers` run at the same time. Every start, epoch and end is a row of `metrics.jsonl` in `out`; `chatter`
    takes what Ray prints.

    Raises:
        RayographError: Ray ended before all were finished.
    """
    before = ledger.finished()
    if len(before) >= trials:
        return
    scratch = out / SCRATCH
    storage.remove(scratch)
    epochs = bench.epochs
    with _environment(VARIABLES), TrialLog(out / LOG) as log:
        searcher = LedgerSearch(ledger, trials, log, on_finished, epochs)
        limits: dict[str, float] = {"cpu": 1, "gpu": 1 if gpu else 0}
        tuner = tune.Tuner(
            tune.with_resources(tune.with_parameters(_trial, bench=bench), limits),
            tune_config=tune.TuneConfig(
                search_alg=searcher,
                scheduler=Halving(epochs, before),
                num_samples=trials - len(before),
                max_concurrent_trials=workers,
                reuse_actors=True,  # a fresh process would import torch anew for each trial
            ),
            run_config=tune.RunConfig(
                name="search",
                storage_path=str(scratch.absolute()),
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=DEATHS),
            ),
        )
        try:
            # Tune prints a table even when told not to
            with chatter.open("a", encoding="utf-8") as sink, contextlib.redirect_stdout(sink):
                tuner.fit()
        finally:
            storage.remove(scratch)
    done = len(ledger.finished())
    if done < trials:
        raise RayographError(f"only {done} of {trials} trials were finished: see {chatter}; the same command goes on")


def grace_of(epochs: int) -> int:
    """Epochs that every trial may train: a fifth, for a rate that still warms up tells little."""
    return max(1, epochs // 5)


class LedgerSearch(Searcher):
    """Ray Tune's view of the ledger: gives out its trials, and enters their outcomes as they end."""

    def __init__(self, ledger: Ledger, trials: int, log: TrialLog, on_finished: OnFinished, epochs: int) -> None:
        super().__init__(metric="value", mode="max")
        self._ledger, self._trials, self._log = ledger, trials, log
        self._on_finished, self._epochs = on_finished, epochs
        self._running: dict[str, _Running] = {}

    def suggest(self, trial_id: str) -> Any:
        given = self._ledger.next(self._trials)
        if given is None:
            return Searcher.FINISHED
        number, params = given
        self._running[trial_id] = _Running(number)
        self._log.write({"trial": number, "event": "start", "params": params})
        return {"number": number, "params": params}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        self._note(trial_id, result)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """The trial is finished in the ledger; one that was taken back without any result stays to be run."""
        if result is not None:
            self._note(trial_id, result)
        running = self._running.pop(trial_id, None)
        if running is None or not (error or running.last):
            return
        record = self._ledger.finish(running.number, running.outcome(self._epochs, died=error))
        self._log.write({"trial": record.number, "event": record.outcome.state, "value": record.value})
        self._on_finished(record)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the ledger is what a search goes on from."""

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError("a search goes on from its ledger")

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Ray pickles its experiment; nobody reads that

    def _note(self, trial_id: str, result: dict[str, Any]) -> None:
        """A result is kept and logged once: the one that ends a trial comes twice."""
        running = self._running[trial_id]
        row = {name: result[name] for name in REPORTED if name in result}
        if running.last != row:
            running.add(row)
            self._log.write({"trial": running.number, **row})


@dataclass
class _Running:
    """A trial under way: the rows that it has reported, by epoch."""

    number: int
    rows: dict[int, dict[str, Any]] = field(default_factory=dict)
    last: dict[str, Any] = field(default_factory=dict)

    def add(self, row: dict[str, Any]) -> None:
        """One that was started again after a death reports its epochs anew, from the first."""
        self.rows = {epoch: old for epoch, old in self.rows.items() if epoch < row["epoch"]}
        self.last = row
        if "failed" not in row:
            self.rows[row["epoch"]] = row

    def outcome(self, epochs: int, died: bool) -> Outcome:
        """What became of it: complete only if it trained for all `epochs`."""
        seconds = self.last.get("seconds", 0.0)
        values = tuple(self.rows[epoch]["value"] for epoch in sorted(self.rows))
        if died or "failed" in self.last:
            reason = self.last.get("failed", "its process died: was it out of memory?")
            return Outcome("failed", values, seconds=seconds, reason=reason)
        state: State = "complete" if self.last["epoch"] >= epochs else "stopped"
        return Outcome(state, values, self.last["held_loss"], self.last["best_epoch"], seconds)


class Halving(ASHAScheduler):
    """ASHA (Li et al., 2020) over epochs.

    Deviations: the first `IN_FULL` trials always run in full, for Ray's would stop the second one as soon as it is
    behind the first, and the defaults must be there to compare with. And it starts from the rungs as the trials
    `before` left them, so that a search that was interrupted stops trials as one that was not.
    """

    def __init__(self, epochs: int, before: list[Record]) -> None:
        super().__init__("epoch", "value", "max", epochs, min(grace_of(epochs), epochs), REDUCTION)
        self._epochs = epochs
        nobody: Any = None  # ASHA does not ask the controller
        for record in before:
            trial: Any = _Past(f"past {record.number}")
            self.on_trial_add(nobody, trial)
            for epoch, value in enumerate(record.outcome.values, start=1):
                super().on_trial_result(nobody, trial, {"epoch": epoch, "value": value})

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        decision = super().on_trial_result(tune_controller, trial, result)
        spared = trial.config["number"] < IN_FULL and result["epoch"] < self._epochs
        return TrialScheduler.CONTINUE if spared else decision


class _Past:
    """Stands for a trial of an earlier process, of which ASHA only wants an id."""

    def __init__(self, trial_id: str) -> None:
        self.trial_id = trial_id


class TrialLog:
    """`metrics.jsonl`: rows are added to those of earlier processes, of which one may have been cut off."""

    def __init__(self, path: Path) -> None:
        if path.exists():
            content = path.read_bytes()
            os.truncate(path, content.rfind(b"\n") + 1)
        self._file = path.open("a", encoding="utf-8")

    def write(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def _trial(config: dict[str, Any], *, bench: Bench) -> None:
    bench.run(config["params"], tune.report)


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """The variables are set inside the block, and as they were after it."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
