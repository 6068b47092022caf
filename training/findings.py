"""What a transfer says beside its main metrics: statistics, neighbours, overlap, the price of a leak."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from training import leak_price, report, retrieval, statistics
from training.calibration import IN_FOLDS
from training.dataset import Dataset, Selection
from training.judgement import Judged
from training.learnt import Asked, in_summary
from training.metrics import title_of
from training.subgroups import columns_of
from training.transductive import FIRST_WEIGHTS, overlap_blocks, overlap_of

SHOWN = 4_000
"""Rows that are asked for their neighbours, or compared pair by pair, at most: evenly spread ones."""

BY_CHANCE = (
    "By chance: the same neighbours, had each group the labels of another, drawn at random. Images of one group are "
    "alike, so eight neighbours are of fewer than eight groups, and find less than a random order of the images would."
)

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
    """Calibration, thresholds, prediction sets, levels of the class tree and subgroups of judged predictions; of label
    sets thresholds and subgroups."""
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


def first_neighbours(features: np.ndarray, truth: np.ndarray, groups: Sequence[str], *, seed: int) -> Asked:
    """What rows, at most `SHOWN`, find among all under features [N, D] in which no label of theirs had a part."""
    rows = np.unique(np.linspace(0, len(features) - 1, min(len(features), SHOWN)).astype(np.int64))
    unit = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    found = retrieval.per_query(unit, truth, groups, asked=rows, seed=seed)
    nothing = np.zeros(len(rows), dtype=np.int64)
    return Asked(rows, nothing, nothing, {("all", 1): found})


def neighbours_of(
    asked: Asked,
    features: np.ndarray,
    truth: np.ndarray,
    names: Sequence[str],
    groups: Sequence[str],
    *,
    seed: int,
    prefix: str = "",
) -> Found:
    """Retrieval as `first_neighbours` found it, named in the summary after `prefix`, and the price of a split by image
    under the same features."""
    rows = asked.rows
    own = [groups[row] for row in rows]
    (found,) = asked.metrics(groups, seed=seed).values()
    table = [
        [title_of(name), report.with_interval(m["value"], m["ci95"]), _plain(m["chance"])] for name, m in found.items()
    ]
    blocks: list[report.Block] = [
        report.Text(
            "Each image was asked for its most similar ones under the first weights, which know no label of theirs; "
            "images of its own group were left out. Recall at k: how often one of the first k is of its class. "
            + BY_CHANCE
        ),
        report.Table(["", "value [95 % interval]", "by chance"], table, "Nearest neighbours of other groups"),
    ]
    sections = [report.Section("Nearest neighbours", blocks)]
    values: dict[str, Any] = {"retrieval": {f"{prefix}{name}": metric for name, metric in found.items()}}
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


def learnt_neighbours(asked: Asked, groups: Sequence[str], *, seed: int) -> Found:
    """Retrieval in the embedding that the run trained, out of fold; see `training.learnt`."""
    metrics = asked.metrics(groups, seed=seed)
    blocks: list[report.Block] = [
        report.Text(
            "Each image was asked for its most similar ones in the embedding of the fit that was not trained on its "
            "group; images of its own group were left out. Among all images: also those that the fit was trained on, "
            "as a service has them. Among test images: only those that it was not, so there are fewer to find. "
            + BY_CHANCE
        )
    ]
    for gallery, words in (("all", "among all images"), ("test", "among test images alone")):
        own = {step: metrics[gallery, step] for step in range(1, asked.steps + 1)}
        shown = ["value [95 % interval]"] if asked.steps == 1 else [f"step {step}" for step in own]
        rows = [
            [
                title_of(name),
                *(report.with_interval(own[step][name]["value"], own[step][name]["ci95"]) for step in own),
                _plain(own[asked.steps][name]["chance"]),
            ]
            for name in retrieval.NAMES
        ]
        blocks.append(report.Table(["", *shown, "by chance"], rows, f"Nearest neighbours of other groups, {words}"))
    if asked.steps > 1:
        blocks.append(report.Text(STEP_WORDS))
    section = report.Section("Nearest neighbours in the learnt embedding", blocks)
    return [section], {"retrieval": in_summary(metrics, asked.steps)}


STEP_WORDS = (
    "Step 1 sees the whole image, step 2 also the part of it that the network responds to, step 3 also that part under "
    "attention; the embedding of the last step is the model's."
)


def overlap_with(
    seen: frozenset[str],
    dataset: Dataset,
    selection: Selection,
    judged: Judged,
    *,
    seed: int,
    who: str = FIRST_WEIGHTS,
) -> Found:
    """What of the judged images was seen by `who` (see `overlap_blocks`); nothing where they have seen none of
    anything."""
    if not seen:
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
        who=who,
        seed=seed,
    )
    return [report.Section("Seen before", blocks)], {"overlap": entry}


def _plain(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
