"""What a transfer says beside its main metrics: statistics, neighbours, overlap, the price of a leak."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from training import leak_price, report, retrieval, statistics
from training.calibration import IN_FOLDS
from training.dataset import Dataset, Selection
from training.judgement import Judged
from training.subgroups import columns_of
from training.transductive import overlap_blocks, overlap_of

SHOWN = 4_000
"""Rows of which features are compared pair by pair, at most: evenly spread ones."""

Found = tuple[list[report.Section], dict[str, Any]]


def statistics_of(
    judged: Judged,
    selection: Selection,
    *,
    by: Sequence[str] = (),
    prevalence: Sequence[float] = (),
    seed: int = 0,
    chosen: str = IN_FOLDS,
) -> Found:
    """Calibration, thresholds, prediction sets, levels of the class tree and subgroups of judged predictions.

    None of it of label sets, whose classes are judged one by one already.
    """
    if judged.several:
        return [], {}
    groups, images = selection.column("group"), selection.column("image_id")
    columns = {name: selection.column(name) for name in columns_of(by, selection.table.column_names)}
    found = statistics.Predictions(
        judged.classes,
        judged.truth,
        judged.raw,
        judged.probabilities,
        image=[images[row] for row in judged.rows],
        group=[groups[row] for row in judged.rows],
        fold=judged.fold,
        repeat=judged.repeat,
        inner=judged.inner,
        chosen=chosen,
        columns={name: [values[row] for row in judged.rows] for name, values in columns.items()},
    )
    return statistics.sections_for(found, prevalence=prevalence, seed=seed)


def neighbours_of(
    features: np.ndarray, truth: np.ndarray, names: Sequence[str], groups: Sequence[str], *, seed: int
) -> Found:
    """Retrieval under features [N, D] in which no label of these rows had a part, and the price of a split by image."""
    rows = np.unique(np.linspace(0, len(features) - 1, min(len(features), SHOWN)).astype(np.int64))
    own = [groups[row] for row in rows]
    unit = features[rows] / np.maximum(np.linalg.norm(features[rows], axis=1, keepdims=True), 1e-12)
    found = retrieval.retrieval_metrics(unit, truth[rows], own, seed=seed)
    table = [
        [name.replace("_", " "), report.with_interval(m["value"], m["ci95"]), _plain(m["chance"])]
        for name, m in found.items()
    ]
    blocks: list[report.Block] = [
        report.Text(
            "Each image was asked for its most similar ones under the first weights, which know no label of theirs; "
            "images of its own group were left out. Recall at k: how often one of the first k is of its class."
        ),
        report.Table(["", "value [95 % interval]", "by chance"], table, "Nearest neighbours of other groups"),
    ]
    sections = [report.Section("Nearest neighbours", blocks)]
    values: dict[str, Any] = {"retrieval": dict(found)}
    several = truth.ndim == 2
    price = (
        None if several else leak_price.price(features[rows], truth[rows], [names[row] for row in rows], own, seed=seed)
    )
    if price is not None:
        sections.append(report.Section("The price of a leak", [report.Text(price.sentence)]))
        values["leak_price"] = {
            "by_image": price.by_image,
            "by_group": price.by_group,
            "difference": price.difference,
            "ci95": list(price.ci95),
        }
    return sections, values


def overlap_with(seen: frozenset[str], dataset: Dataset, selection: Selection, judged: Judged, *, seed: int) -> Found:
    """What of the judged images the first weights have seen; nothing where they have seen none of anything."""
    if not seen or judged.several:
        return [], {}
    groups = selection.column("group")
    blocks, entry = overlap_blocks(
        overlap_of(selection, dataset.select(), seen),
        rows=judged.rows,
        truth=judged.truth,
        probabilities=judged.probabilities,
        group=[groups[row] for row in judged.rows],
        fold=judged.fold,
        repeat=judged.repeat,
        seed=seed,
    )
    return [report.Section("Seen before", blocks)], {"overlap": entry}


def _plain(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
