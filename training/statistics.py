"""The statistics of one run, beside its main metrics: sections of its report and entries of its `summary.json`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from training import conformal, hierarchical, subgroups, thresholds
from training.bootstrap import Floats, Metric, Units, ratio
from training.calibration import (
    IN_FOLDS,
    Fold,
    Inner,
    fold_temperatures,
    isotonic_by_fold,
    rows_by_fold,
    scaled_by_fold,
    squared_errors,
)
from training.metrics import BINS, bin_gaps, meaningful, title_of
from training.probabilities import calibrated, temperature_for
from training.report import Block, Section, Table, Text, with_interval

Part = tuple[list[Section], dict[str, Any]]


@dataclass(frozen=True, eq=False)
class Predictions:
    """Predictions of M rows, made by models that had not seen them; truth is class numbers [M], or label sets bool
    [M,K].

    `raw` [M,K] are the model's own probabilities and `inner` holds, for each (repeat, fold), such probabilities of
    rows of its training side; `probabilities` [M,K] are those that the run is judged by. For a model judged on new
    data all folds and repeats are 0, and `inner` is `{(0, 0): …}` with the model's own out-of-fold predictions, on
    the scale of `raw`; or empty, and what would have to be chosen on it is left out. `image` [M] tells images apart;
    `columns` are [M] values by column name, for subgroups.
    """

    classes: Sequence[str]
    truth: NDArray[Any]
    raw: Floats
    probabilities: Floats
    image: ArrayLike
    group: ArrayLike
    fold: NDArray[np.int64]
    repeat: NDArray[np.int64]
    inner: Mapping[Fold, Inner] = field(default_factory=dict)
    chosen: str = IN_FOLDS
    """Where `inner` comes from."""
    columns: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    @property
    def several(self) -> bool:
        """Whether an image may have several labels."""
        return self.truth.ndim == 2


def sections_for(found: Predictions, *, prevalence: Sequence[float] = (), resamples: int = 1000, seed: int = 0) -> Part:
    """Sections on calibration, thresholds, prediction sets, the class tree and subgroups, and plain JSON.

    The dict is to be merged into `summary.json`: `metrics` (`brier`; where classes are paths in a tree also
    `hierarchical_*` and `level_1/…`), `calibration`, `thresholds`, `conformal`, `subgroups`. Without inner
    predictions there are no thresholds and no sets, without a tree no levels, without columns no subgroups. Of label
    sets there are thresholds and subgroups, and words on what is missing.

    Raises:
        ValueError: shapes differ, or `inner` lacks a fold of the rows.
    """
    missing = set(rows_by_fold(found.fold, found.repeat)) - set(found.inner) if found.inner else set()
    if missing:
        raise ValueError(f"inner: no predictions of (repeat, fold) {min(missing)}; give those of every fold, or none")
    units = Units.of(found.group, found.fold, found.repeat, resamples=resamples, seed=seed)
    sections: list[Section] = []
    summary: dict[str, Any] = {"metrics": {}}
    if not found.several:
        summary["metrics"]["brier"] = brier(found.probabilities, found.truth, units)
    for part in (_thresholds, _not_of_label_sets) if found.several else (_calibration, _thresholds, _sets):
        section, values = part(found, units, prevalence)
        sections += section
        summary |= values
    tree = {} if found.several else _tree(found, resamples, seed)
    if tree:
        summary["metrics"] |= tree
        sections.append(Section("Levels of the class tree", _levels(tree)))
    if found.columns:
        rows = subgroups.Rows(found.truth, found.probabilities, found.image, found.group, found.fold, found.repeat)
        tables = {
            name: subgroups.by_column(rows, values, resamples=resamples, seed=seed)
            for name, values in found.columns.items()
        }
        summary["subgroups"] = tables
        sections.append(Section("Subgroups", subgroups.blocks(tables)))
    return sections, summary


def _tree(found: Predictions, resamples: int, seed: int) -> dict[str, Metric]:
    return hierarchical.summarise(
        found.classes,
        found.truth,
        found.probabilities,
        group=found.group,
        fold=found.fold,
        repeat=found.repeat,
        resamples=resamples,
        seed=seed,
    )


def brier(probabilities: ArrayLike, truth: ArrayLike, units: Units) -> Metric:
    """The Brier score of rows [M,K], with its interval; see `training.calibration.squared_errors`."""
    return units.means(squared_errors(probabilities, truth))[0]


def calibration_error(probabilities: ArrayLike, truth: ArrayLike, units: Units) -> Metric:
    """`ece` as `training.metrics.summarise` gives it, alone."""
    gaps = bin_gaps(probabilities, truth)
    columns = np.hstack([gaps, np.ones((len(gaps), 1))])
    error = units.draw(columns, lambda sums: ratio(np.abs(sums[..., :BINS]).sum(-1), sums[..., BINS])[..., None])
    return error.metrics(unbias=True)[0]


def _calibration(found: Predictions, units: Units, _prevalence: Sequence[float]) -> Part:
    versions = {"raw": found.raw}
    temperatures: dict[Fold, float] = {}
    if found.inner:
        temperatures = fold_temperatures(found.inner)
        versions["temperature"] = scaled_by_fold(found.raw, found.fold, found.repeat, temperatures)
        versions["isotonic"] = isotonic_by_fold(found.raw, found.fold, found.repeat, found.inner)
    values = {
        name: {"ece": calibration_error(p, found.truth, units), "brier": brier(p, found.truth, units)}
        for name, p in versions.items()
    }
    rows = [
        [name, *(with_interval(m["value"], m["ci95"]) for m in metrics.values())] for name, metrics in values.items()
    ]
    words = (
        "Whether stated probabilities are met as often as they say. ECE is the mean gap between confidence and "
        "accuracy, the Brier score the mean squared error of the probabilities; of both, 0 is best."
    )
    if found.inner:
        words += (
            " Temperature divides all confidences by one number, isotonic regression bends each class's probabilities; "
            f"both were fitted {found.chosen}, none on the images judged here. "
            f"Temperature: {_spread(list(temperatures.values()))}."
        )
    blocks: list[Block] = [Text(words), Table(["probabilities", "ECE", "Brier score"], rows, "Calibration")]
    folds = rows_by_fold(found.fold, found.repeat)
    per_fold = {"temperature_per_fold": [temperatures[one] for one in folds]} if found.inner else {}
    return [Section("Calibration", blocks)], {"calibration": values | per_fold}


def _thresholds(found: Predictions, units: Units, prevalence: Sequence[float]) -> Part:
    if not found.inner:
        return ([Section("Thresholds", [Text(NO_THRESHOLDS)])] if prevalence else []), {}
    several, scaled = found.several, np.array(found.raw, dtype=np.float64)
    temperatures = {one: temperature_for(i.raw, i.truth) for one, i in found.inner.items()}
    inner = {one: (i.truth, calibrated(i.raw, temperatures[one], several=several)) for one, i in found.inner.items()}
    for one, rows in rows_by_fold(found.fold, found.repeat).items():
        scaled[rows] = calibrated(scaled[rows], temperatures[one], several=several)
    judged = thresholds.judge(found.classes, found.truth, scaled, found.fold, found.repeat, inner, units, prevalence)
    return [Section("Thresholds", thresholds.blocks(judged, found.chosen, several=several))], {"thresholds": judged}


NO_THRESHOLDS = (
    "Predictive values at a prevalence need thresholds, and there is nothing that they may be chosen on: no "
    "predictions that a RUN of transfer made of its own images, out of fold and one by one."
)
NOT_OF_LABEL_SETS = (
    "Not judged, because an image may have several labels: calibration other than by one temperature, prediction sets "
    "with a stated coverage, levels of a class tree, and the price of a split by image."
)


def _not_of_label_sets(_found: Predictions, _units: Units, _prevalence: Sequence[float]) -> Part:
    return [Section("Not judged", [Text(NOT_OF_LABEL_SETS)])], {}


def _sets(found: Predictions, units: Units, _prevalence: Sequence[float]) -> Part:
    if not found.inner:
        return [], {}
    sets = {
        f"{level:.2f}": conformal.judged_sets(
            found.classes, found.truth, found.raw, found.fold, found.repeat, found.inner, units, level
        )
        for level in conformal.LEVELS
    }
    images = len(np.unique(np.asarray(found.image)))
    return [Section("Prediction sets", conformal.blocks(sets, images, found.chosen))], {"conformal": sets}


def _levels(tree: Mapping[str, Metric]) -> list[Block]:
    own = [[title_of(name), with_interval(tree[name]["value"], tree[name]["ci95"])] for name in hierarchical.NAMES]
    levels = list(dict.fromkeys(name.split("/")[0] for name in tree if "/" in name))
    blocks: list[Block] = [
        Text(
            "A class and the branches above it are compared with those of the model's answer, so that a mistake "
            "within a branch counts less than one across branches."
        ),
        Table(["metric", "value [95 % interval]"], own, "Hierarchical metrics (Kiritchenko et al., 2005)"),
    ]
    for level in levels:
        at_level = {name.split("/")[1]: m for name, m in tree.items() if name.startswith(f"{level}/")}
        rows = [[title_of(name), with_interval(m["value"], m["ci95"])] for name, m in meaningful(at_level).items()]
        caption = f"Level {level.removeprefix('level_')} of the tree alone, probabilities of its branches summed"
        blocks.append(Table(["metric", "value [95 % interval]"], rows, caption))
    return blocks


def _spread(values: Sequence[float]) -> str:
    middle = f"{np.median(values):.2f}"
    return middle if len(values) == 1 else f"{middle} in the middle, {min(values):.2f} to {max(values):.2f}"
