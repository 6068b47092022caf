"""How labelled rows are judged: their classes, labels, units, and the folds of a config's protocol."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cluster.errors import UsageError, nearest
from training.configs import TransferConfig
from training.dataset import Dataset, Selection, leaves, several_labels, truth_of
from training.fit import Labels
from training.splits import Fold, cross_validation, hold_outs, leave_one_site_out
from training.tasks.inputs import joined
from training.units import Units, units_of


@dataclass(frozen=True, eq=False)
class Layout:
    """What a transfer is laid out on: `classes` in their order, and the rest by row of its selection."""

    classes: list[str]
    labels: Labels
    units: Units
    folds: list[Fold]
    """With all training groups, whatever share of them is fitted."""


def judged_rows(config: TransferConfig, dataset: Dataset) -> Selection:
    """The labelled rows of a transfer; with `--inputs` those of them, joined into cases.

    Raises:
        UsageError: none is left, or no column tells the inputs.
    """
    labelled = dataset.select(config.where, labelled=True)
    return Selection(joined(labelled.table, config.inputs, config.input_column))


def laid_out(config: TransferConfig, selection: Selection) -> Layout:
    """The layout of a transfer of these rows.

    Raises:
        UsageError: the labels or cases do not allow it.
    """
    names, groups = selection.column("label"), selection.column("group")
    several = config.multi_label or several_labels(names)
    if several and config.order:
        raise UsageError("--order: images have several labels, whose classes are judged by themselves; leave it out")
    classes = leaves(names, config.order, several=several)
    labels = Labels(truth_of(names, classes, several=several), names, groups, config.split)
    cases = selection.column("case") if config.unit == "case" else [""] * len(names)
    units = units_of(config.unit, names, cases, groups)
    return Layout(classes, labels, units, folds_for(config, names, groups, selection))


def folds_for(config: TransferConfig, names: list[str], groups: list[str], selection: Selection) -> list[Fold]:
    """The fits of a config's protocol over labelled rows, with all training groups.

    Raises:
        UsageError: there is no such column, or the labels do not allow it.
    """
    if config.split == "site":
        column, known = str(config.site_column), selection.table.column_names
        if column not in known:
            raise UsageError(f"--site-column {column}: no such column.{nearest(column, known)}")
        return leave_one_site_out(names, groups, ["" if s is None else str(s) for s in selection.column(column)])
    if config.split == "holdout":
        return hold_outs(names, groups, fraction=config.test_fraction, repeats=config.repeats, seed=config.seed)
    folds, repeats, seed = config.folds, config.repeats, config.seed
    return cross_validation(names, groups, folds=folds, repeats=repeats, split=config.split, seed=seed)


def protocol_of(units: Units, pooling: str) -> dict[str, Any]:
    """What `protocol` of summary.json says of the units."""
    if units.kind == "image":
        return {"unit": "image"}
    left_out = int(units.conflicting.sum())
    return {"unit": units.kind, "pooling": pooling, "units": len(units) - left_out, "units_left_out": left_out}


_WORDS = {
    "group": "{repeats} x {folds}-fold cross-validation, stratified by class, no group (patient, slide) on both sides "
    "of a split.",
    "image": "{repeats} x {folds}-fold cross-validation, stratified by class, split image by image.",
    "site": "One site ({site_column}) after the other is left out and judged by a model that saw only the others.",
    "holdout": "{repeats} x a share of {test_fraction:.0%} of the groups held out, stratified by class.",
}


def in_words(config: Mapping[str, Any]) -> str:
    """How a transfer of this config judges, in a sentence."""
    return _WORDS[config["split"]].format(**config)
