"""The book of trials: an Optuna study in SQLite, in which a trial is finished once its outcome is committed.

Knows no image, no network and no Ray. Nothing here is pickled: parameters and outcomes are rows and JSON.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.samplers import TPESampler
from optuna.storages import RDBStorage
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import URL

from cluster import storage
from cluster.errors import UsageError
from training import keyed
from tuning.spaces import Params, Space, suggestion

FILE, STUDY = "study.db", "tune"
RANDOM_TRIALS = 8
"""Trials, the defaults included, before suggestions are modelled on results."""

State = Literal["complete", "stopped", "failed"]
_STATES: dict[State, TrialState] = {
    "complete": TrialState.COMPLETE,
    "stopped": TrialState.PRUNED,
    "failed": TrialState.FAIL,
}


@dataclass(frozen=True)
class Outcome:
    """What became of a trial. `values` are the objective after each epoch, the last one counts."""

    state: State
    values: tuple[float, ...] = ()
    held_loss: float | None = None
    """Lowest loss on the validation groups, and the number of epochs it took."""
    best_epoch: int = 0
    seconds: float = 0.0
    reason: str = ""


@dataclass(frozen=True)
class Record:
    """A finished trial."""

    number: int
    params: Params
    outcome: Outcome = field(default_factory=lambda: Outcome("failed"))

    @property
    def value(self) -> float | None:
        return self.outcome.values[-1] if self.outcome.values and self.outcome.state != "failed" else None


class Ledger:
    """The trials of one search, numbered from 0; one process writes it (`--out` is locked)."""

    def __init__(self, study: Study, stored: RDBStorage, space: Space, seed: int) -> None:
        self._study, self._storage, self._space, self._seed = study, stored, space, seed
        self._taken: set[int] = set()

    @classmethod
    def open(cls, folder: Path, space: Space, defaults: Params, *, seed: int, subject: str) -> Ledger:
        """The ledger in `folder`, which appears there whole, with the defaults waiting as trial 0.

        Args:
            subject: what is searched on, such as the dataset's version.

        Raises:
            UsageError: the ledger there belongs to another subject.
        """
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        path = folder / FILE
        if not path.exists():
            partial = folder / f".{FILE}"
            storage.remove(partial)
            stored = _sqlite(partial)
            new = optuna.create_study(storage=stored, study_name=STUDY, direction="maximize")
            new.set_user_attr("subject", subject)
            new.enqueue_trial(defaults)
            stored.engine.dispose()
            storage.publish_file(partial, path)
        stored = _sqlite(path)
        study = optuna.load_study(storage=stored, study_name=STUDY)
        if study.user_attrs["subject"] != subject:
            raise UsageError(f"{path}: was searched on other data; use --overwrite or another --out")
        return cls(study, stored, space, seed)

    def close(self) -> None:
        """No connection to the file is left open."""
        self._storage.engine.dispose()

    def next(self, trials: int) -> tuple[int, Params] | None:
        """Number and parameters of the next trial of `trials`: first those that were cut off, then new ones.

        None when all are finished or given out by this object. A suggestion is a pure function of the seed, the
        number, and the trials before it, so that an interrupted search suggests what an uninterrupted one does.
        """
        known = self._trials()
        cut_off = [t for t in known if t.state == TrialState.RUNNING and t.number not in self._taken]
        started = sum(t.state != TrialState.WAITING for t in known)
        if not cut_off and started >= trials:
            return None
        number = cut_off[0].number if cut_off else started
        self._study.sampler = TPESampler(
            seed=keyed.number("tune", self._seed, number) % 2**32, n_startup_trials=RANDOM_TRIALS, constant_liar=True
        )
        if cut_off:
            trial = optuna.trial.Trial(self._study, cut_off[0]._trial_id)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                trial = self._study.ask()
        if trial.number != number:
            raise RuntimeError(f"trial {trial.number} was given out as {number}: is another process writing?")
        self._taken.add(number)
        # what a killed process had drawn already comes back as it was
        return number, suggestion(self._space, trial)

    def finish(self, number: int, outcome: Outcome) -> Record:
        """The trial is finished for good: its last commit is the one that makes it so."""
        trial = self._trials()[number]
        for epoch, reached in enumerate(outcome.values, start=1):
            self._storage.set_trial_intermediate_value(trial._trial_id, epoch, reached)
        self._storage.set_trial_user_attr(trial._trial_id, "outcome", _as_json(outcome))
        value = outcome.values[-1] if outcome.state == "complete" else None
        self._study.tell(number, value, state=_STATES[outcome.state])
        return Record(number, dict(trial.params), outcome)

    def finished(self) -> list[Record]:
        """All finished trials, by number."""
        return [_record(trial) for trial in self._trials() if trial.state.is_finished()]

    def _trials(self) -> list[FrozenTrial]:
        return sorted(self._study.get_trials(deepcopy=False), key=lambda t: t.number)


def best_of(records: list[Record]) -> Record | None:
    """The complete trial of the highest value; of equals the one of lowest loss, then the earliest.

    A trial that was stopped early wins only where none is complete; one that failed, never.
    """
    candidates = [r for r in records if r.outcome.state == "complete"] or [r for r in records if r.value is not None]
    return max(candidates, key=_rank, default=None)


def by_rank(records: list[Record]) -> list[Record]:
    """Complete trials first, then those stopped early, then those that failed; each from the best value down."""
    order: tuple[State, ...] = ("failed", "stopped", "complete")
    return sorted(records, key=lambda r: (order.index(r.outcome.state), *_rank(r)), reverse=True)


def _rank(record: Record) -> tuple[float, float, int]:
    loss = record.outcome.held_loss
    value = -1.0 if record.value is None else record.value
    return value, -(float("inf") if loss is None else loss), -record.number


def _record(trial: FrozenTrial) -> Record:
    stored: dict[str, Any] = trial.user_attrs["outcome"]
    return Record(trial.number, dict(trial.params), Outcome(**stored | {"values": tuple(stored["values"])}))


def _as_json(outcome: Outcome) -> dict[str, Any]:
    return {
        "state": outcome.state,
        "values": list(outcome.values),
        "held_loss": outcome.held_loss,
        "best_epoch": outcome.best_epoch,
        "seconds": outcome.seconds,
        "reason": outcome.reason,
    }


def _sqlite(path: Path) -> RDBStorage:
    return RDBStorage(URL.create("sqlite", database=str(path.absolute())).render_as_string(hide_password=False))
