"""Two RUNs of `transfer` with the same folds, image by image: a metric's difference, and what may be said of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from training.compare import differences
from training.predictions import aligned, read_predictions

METRIC = "balanced_accuracy"


def gain(ours: Path, theirs: Path, metric: str = METRIC) -> Mapping[str, Any]:
    """Ours less theirs, `{difference, ci95, p}`: both resampled together, by group."""
    one, other = read_predictions(str(ours)), read_predictions(str(theirs))
    (found,) = differences(
        one.truth,
        one.probabilities,
        [aligned(one, other)],
        group=one.column("group"),
        fold=np.asarray(one.column("fold"), dtype=np.int64),
        repeat=np.asarray(one.column("repeat"), dtype=np.int64),
        seed=0,
    )
    return found[metric]


def verdict(found: Mapping[str, Any]) -> str:
    """What the interval of a paired gain allows to say of the claim that it is above zero."""
    low, high = found["ci95"]
    if low is not None and low > 0:
        return "held"
    if high is not None and high < 0:
        return "did not hold: the other way round"
    return "not shown: may be chance"


def interval(value: float, ends: Sequence[float | None], sign: str = "") -> str:
    """`0.512 [0.47, 0.55]`; `sign` is "+" for differences."""
    low, high = ends
    shown = f"{value:{sign}.3f}"
    return shown if low is None or high is None else f"{shown} [{low:{sign}.2f}, {high:{sign}.2f}]"


def told(found: Mapping[str, Any]) -> str:
    """A gain with its interval."""
    return interval(found["difference"] or 0.0, found["ci95"], sign="+")
