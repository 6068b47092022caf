"""One trial: a fine-tuning on the search's own rows, judged after every epoch. No Ray in here."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from cluster.errors import UsageError
from training import metrics
from training.configs import TransferConfig
from training.splits import Rows, hold_out
from training.tasks.finetune import fine_tune, recipe_for
from training.weights import Wanted
from tuning.spaces import Params

VALIDATION = 0.25
"""Share of the search's groups that judge its trials."""
IN_FULL = 3
"""First trials, the defaults among them, that are never stopped early: they set the bar for those after them."""
FEWEST = 4
"""Groups of each class: one to judge the winner, one to judge trials, two to fit."""
SPLITS = 20
"""Shuffles tried before a class is declared impossible to have on all sides."""

Report = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, eq=False)
class Sides:
    """Ascending rows of the three sides of a search, which share no group: every class is on each."""

    fit: Rows
    validation: Rows
    held_out: Rows

    @property
    def search(self) -> Rows:
        return np.sort(np.concatenate([self.fit, self.validation]))


def split_sides(names: list[str], groups: list[str], *, holdout: float, seed: int) -> Sides:
    """A stratified split by group: `holdout` of the groups for the end, `VALIDATION` of the others for the trials.

    Raises:
        UsageError: there are too few groups for every class to be on all three sides.
    """
    classes = sorted(set(names))
    counts = {c: len({g for g, n in zip(groups, names, strict=True) if n == c}) for c in classes}
    rarest = min(classes, key=lambda c: counts[c])
    if counts[rarest] < FEWEST:
        raise UsageError(
            f"class {rarest!r} has {counts[rarest]} groups, but a search needs {FEWEST} of each class: to fit, to "
            "choose, and to judge the choice on groups it never saw; add groups, or merge or drop the class"
        )
    label, group = np.asarray(names), np.asarray(groups)
    for shuffle in range(SPLITS):
        search, held_out = hold_out(label.tolist(), group.tolist(), fraction=holdout, seed=seed + shuffle)
        inner = (label[search].tolist(), group[search].tolist())
        fit, validation = (search[rows] for rows in hold_out(*inner, fraction=VALIDATION, seed=seed + shuffle))
        if all(len(np.unique(label[rows])) == len(classes) for rows in (fit, validation, held_out)):
            return Sides(fit, validation, held_out)
    raise UsageError(
        f"class {rarest!r} has only {counts[rarest]} groups: no split into three sides, each with every class, was "
        "found; add groups, try another --holdout, or merge or drop the class"
    )


@dataclass(frozen=True, eq=False)
class Bench:
    """What all trials share. `pixels` and `truth` hold the search's rows alone: the held-out ones are not in here."""

    config: TransferConfig
    """The defaults, which a trial's parameters override."""
    wanted: Wanted
    classes: int
    threads: int
    pixels: np.ndarray
    truth: np.ndarray
    fit: Rows
    validation: Rows

    @property
    def epochs(self) -> int:
        return self.config.epochs

    def run(self, params: Params, report: Report) -> None:
        run_trial(self, params, report)


def bench_for(
    config: TransferConfig,
    wanted: Wanted,
    pixels: np.ndarray,
    truth: np.ndarray,
    sides: Sides,
    *,
    classes: int,
    threads: int,
) -> Bench:
    """The search's part of all `pixels` and `truth`, its rows numbered anew."""
    search = sides.search
    fit, validation = (np.searchsorted(search, rows) for rows in (sides.fit, sides.validation))
    return Bench(config, wanted, classes, threads, pixels[search], truth[search], fit, validation)


def run_trial(bench: Bench, params: Params, report: Report) -> None:
    """Reports `epoch`, `value`, `loss`, `held_loss`, `best_epoch` and `seconds` after every epoch.

    `value` is the balanced accuracy on the validation rows after the epoch, of those so far, in which their loss was
    lowest: what `transfer` would keep if it stopped here. An error ends the trial with a last report that has `failed`.
    """
    started = time.monotonic()
    kept: dict[str, Any] = {"held_loss": float("inf")}

    def judge(row: dict[str, float], logits: np.ndarray) -> None:
        if not np.isfinite([row["loss"], row["held_loss"]]).all():
            raise ArithmeticError(f"the loss was not finite after epoch {row['epoch']}")
        if row["held_loss"] < kept["held_loss"]:
            said = metrics.confusion(bench.truth[bench.validation], logits.argmax(axis=1), bench.classes)
            value = float(metrics.balanced_accuracy(said))
            kept.update(held_loss=row["held_loss"], value=value, best_epoch=row["epoch"])
        report({**kept, "epoch": row["epoch"], "loss": row["loss"], "seconds": time.monotonic() - started})

    try:
        recipe = recipe_for(replace(bench.config, **params), bench.wanted, bench.classes, bench.threads)  # type: ignore[arg-type]
        fine_tune(recipe, bench.pixels, bench.truth, bench.fit, bench.validation, "tune", on_epoch=judge)
    except Exception as error:
        seconds = time.monotonic() - started
        report({"epoch": 0, "value": float("nan"), "failed": reason_of(error), "seconds": seconds})


def reason_of(error: BaseException) -> str:
    """The error in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:300] if text else type(error).__name__
