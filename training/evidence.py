"""What `evaluate` judges models on: images that they have not seen, or what RUNs said of their own out of fold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from cluster.errors import UsageError
from cluster.outdir import OutDir
from training import novelty, report
from training.artifact import ModelCard, read_card
from training.attention import Looker
from training.configs import EvaluateConfig
from training.dataset import Dataset, Selection, truth_of
from training.device import choose_device
from training.findings import Found, overlap_with
from training.ingest import resolve_data
from training.judgement import Inner, Judged, of_units, summarise
from training.limits import UNSEEN
from training.lineage import seen_by
from training.predictions import aligned, read_predictions, write_predictions, write_units
from training.protocol import in_words, protocol_of
from training.results import counts_table, data_section, unit_blocks
from training.said import said_of
from training.tasks.inputs import joined
from training.units import Units, pooled, units_of

NOTHING = novelty.Seen(0, 0, 0, "", 0)
_OF_UNITS = ("unit", "pooling", "units", "units_left_out")
_LEAK = (
    "Split by image: pictures of one patient stand on both sides, so the figures of all models are too good, and the "
    "difference between them is of models that may know the patient. Judge by --split group."
)


@dataclass(frozen=True, eq=False)
class Evidence:
    """What all models were judged on, and what they said of it."""

    judged: Judged
    """The model's own, of images or of what they are pooled into."""
    ordered: bool
    group: list[str]
    """[M], of the rows of `judged`."""
    others: dict[str, np.ndarray]
    """Probabilities [M, K] of the models that it is compared with."""
    protocol: dict[str, Any]
    images: int
    known: novelty.Seen
    words: str
    """The protocol, in sentences."""
    before: list[report.Section]
    caption: str
    selection: Selection
    """That the rows of `judged` index."""
    overlap: Found = ([], {})
    """What is left of the figures without what the models had seen."""
    dataset: Dataset | None = None
    """None where out-of-fold predictions are compared."""
    by_image: Judged | None = None
    """As `judged`, before images were pooled."""
    looker: Looker | None = None
    """Shows where the model looks."""


def out_of_fold(config: EvaluateConfig, runs: Mapping[str, str], out: OutDir) -> Evidence:
    """What the RUNs, by name, said out of fold of the same images; that of the first stands in `out`.

    Raises:
        UsageError: one is no RUN of `transfer`, or they were not judged alike.
    """
    (_, ours), *theirs = [(name, read_predictions(run)) for name, run in runs.items()]
    others = {name: aligned(ours, one) for name, one in theirs}
    card = read_card(config.model)[0]
    fold, repeat = (np.asarray(ours.column(name), dtype=np.int64) for name in ("fold", "repeat"))
    _, first, member = np.unique(ours.column("image_id"), return_index=True, return_inverse=True)
    order = np.argsort(first)
    images, rows = Selection(ours.table.take(first[order])), np.argsort(order)[member]
    labels, groups = images.column("truth"), images.column("group")
    units = units_of(config.unit, labels, images.column("case"), groups)
    place_of: dict[str, Any] = {"rows": rows, "fold": fold, "repeat": repeat, "groups": groups}
    judged = _judged(config, card, ours.classes, ours.truth, ours.probabilities, **place_of)
    said = {name: value for name, value in ours.protocol.items() if name not in _OF_UNITS}
    words = (
        f"{', '.join(runs)}: each judged on the same images in the same folds. {in_words(ours.config)} Every "
        "prediction is of an image that the fit which made it was not trained on."
    )
    protocol = report.Section(
        "Protocol",
        [
            report.Text(words),
            *([report.Warning(_LEAK)] if said["split"] == "image" else []),
            *unit_blocks(units, config.pooling),
        ],
    )
    data = report.Section(
        "Data", [counts_table(labels, groups, ours.classes, "Labelled images that all models judged")]
    )
    pooled_others = {name: _mean(units, judged, probabilities) for name, probabilities in others.items()}
    by_unit = _of_units(config, card, judged, units, groups)
    _write_judged(config, out, images, judged, by_unit, units)
    return Evidence(
        by_unit,
        card.ordered,
        [groups[r] for r in by_unit.rows],
        pooled_others,
        said | protocol_of(units, config.pooling),
        len(images),
        NOTHING,
        words,
        [data, protocol],
        f"Out-of-fold predictions of {next(iter(runs))}",
        images,
    )


def unseen(config: EvaluateConfig, data: str, runs: Mapping[str, str], out: OutDir) -> Evidence:
    """What the models, by name, say of the labelled images of `data`; that of the first stands in `out`.

    Raises:
        UsageError: a model has no classes, labels are not among them, models differ in task, or images were seen.
    """
    cards = {run: _card(run) for run in runs.values()}
    _require_comparable(config, cards)
    size = [
        max(side) for side in zip(*((c.image_path.height, c.image_path.width) for c in cards.values()), strict=True)
    ]
    dataset = resolve_data(data, out=config.out, image_size=f"{size[0]}x{size[1]}", images=config.images)
    card = cards[config.model]
    _require_same_inputs(config, cards)
    labelled = dataset.select(config.where, labelled=True)
    selection = Selection(joined(labelled.table, card.inputs, card.input_column, some=True))
    classes = list(card.classes)
    _require_known_classes(config, cards, selection)
    allow = config.allow_seen
    known = novelty.require_new(data, selection, dataset.manifest, list(runs.values()), allow_seen=allow)
    labels, groups = selection.column("label"), selection.column("group")
    units = units_of(config.unit, labels, selection.column("case"), groups)
    truth = truth_of(labels, classes, several=card.activation == "sigmoid")
    attention, device = config.pooling == "attention", choose_device(config.device)
    shared: dict[str, Any] = {"attention": attention, "device": device, "batch_size": config.batch_size}
    said = [
        said_of(run, classes, dataset, selection, units, look=run == config.model, **shared) for run in runs.values()
    ]
    zeros = np.zeros(len(truth), dtype=np.int64)
    rows = np.arange(len(truth))
    by_image = _judged(config, card, classes, truth, said[0].images, rows=rows, fold=zeros, repeat=zeros, groups=groups)
    if attention:
        standing = units.first[units.judged]
        zeros = np.zeros(len(standing), dtype=np.int64)
        place: dict[str, Any] = {"rows": standing, "fold": zeros, "repeat": zeros, "groups": groups}
        judged = _judged(config, card, classes, truth[standing], said[0].units, **place)
        others = [one.units for one in said[1:]]
    else:
        judged = _of_units(config, card, by_image, units, groups)
        others = [_mean(units, by_image, one.images) for one in said[1:]]
    _write_judged(config, out, selection, by_image, judged, units)
    if config.unit == "image":
        judged = replace(judged, inner=_out_of_fold_of(config.model, classes))
    overlap: Found = ([], {})
    if known.any:
        seen = frozenset[str]().union(*map(seen_by, runs.values()))
        overlap = overlap_with(seen, dataset, selection, judged, seed=config.seed, who="The models")
    new = "images of which some were seen in training" if known.any else "images not seen in training"
    words = (
        f"{', '.join(runs)}: judged on {new}; intervals come from a bootstrap over groups. Images are compared by "
        "their bytes with those of each model's training and pretraining; where one was seen, so was its group."
    )
    protocol: list[report.Block] = [
        report.Text(words),
        *unit_blocks(units, config.pooling),
        *novelty.blocks(known),
    ]
    return Evidence(
        judged,
        card.ordered,
        [groups[r] for r in judged.rows],
        dict(zip(list(runs)[1:], others, strict=True)),
        {"split": UNSEEN, "folds": 1, "repeats": 1, "groups": len(set(groups))} | protocol_of(units, config.pooling),
        len(selection),
        known,
        words,
        [data_section(dataset, selection, classes), report.Section("Protocol", protocol)],
        f"Predictions of {next(iter(runs))} as it is served",
        selection,
        overlap,
        dataset,
        by_image,
        said[0].looker,
    )


def _out_of_fold_of(run: str, classes: list[str]) -> dict[tuple[int, int], Inner]:
    """What the RUN said of its own images out of fold: what thresholds may be chosen on. A model folder has none."""
    try:
        found = read_predictions(run)
    except UsageError:
        return {}
    order = [found.classes.index(name) for name in classes]
    truth = found.truth[:, order] if found.several else np.argsort(order)[found.truth]
    return {(0, 0): Inner(truth, found.probabilities[:, order], np.arange(len(truth)))}


def _require_comparable(config: EvaluateConfig, cards: Mapping[str, ModelCard]) -> None:
    for run, card in cards.items():
        if card.activation != cards[config.model].activation:
            raise UsageError(f"{run} and {config.model}: only one of them judges label sets, so they differ in task")


def _require_same_inputs(config: EvaluateConfig, cards: Mapping[str, ModelCard]) -> None:
    for run, card in cards.items():
        if card.inputs and config.unit != "case":
            raise UsageError(f"{run}: judges cases of {', '.join(card.inputs)} together: add --unit case")
        if card.inputs != cards[config.model].inputs:
            raise UsageError(f"{run} and {config.model}: judge other inputs, so they differ in task")


def _card(run: str) -> ModelCard:
    card = read_card(run)[0]
    if card.head == "none":
        raise UsageError(f"{run}: an encoder without classes; train one with: rayograph transfer --init RUN")
    return card


def _require_known_classes(config: EvaluateConfig, cards: Mapping[str, ModelCard], selection: Selection) -> None:
    classes = cards[config.model].classes
    for run, card in cards.items():
        other = sorted(set(card.classes) ^ set(classes))
        if other:
            raise UsageError(
                f"{run} and {config.model}: only one of them knows class {other[0]!r}, so they differ in task"
            )
    several, labels = cards[config.model].activation == "sigmoid", selection.column("label")
    strange = sorted({name for label in labels for name in (label.split("|") if several else [label])} - set(classes))
    if strange:
        raise UsageError(f"{config.data}: the model has no class {strange[0]!r}; its classes: {', '.join(classes)}")


def _judged(
    config: EvaluateConfig,
    card: ModelCard,
    classes: list[str],
    truth: np.ndarray,
    probabilities: np.ndarray,
    *,
    rows: np.ndarray,
    fold: np.ndarray,
    repeat: np.ndarray,
    groups: list[str],
) -> Judged:
    """`groups` are those of all rows of the selection that `rows` [M] index."""
    group = [groups[r] for r in rows]
    found = summarise(
        truth, probabilities, group=group, fold=fold, repeat=repeat, seed=config.seed, ordered=card.ordered
    )
    return Judged(
        classes=classes,
        rows=rows,
        truth=truth,
        probabilities=probabilities,
        raw=probabilities,
        fold=fold,
        repeat=repeat,
        metrics=dict(found),
        temperature=card.temperature,
    )


def _of_units(config: EvaluateConfig, card: ModelCard, judged: Judged, units: Units, groups: list[str]) -> Judged:
    if units.kind == "image":
        return judged
    return of_units(judged, units, groups, config.seed, ordered=card.ordered)


def _mean(units: Units, judged: Judged, probabilities: np.ndarray) -> np.ndarray:
    """Probabilities [M, K] of the rows of `judged`, pooled into those of its units."""
    if units.kind == "image":
        return probabilities
    return pooled(units, judged.rows, judged.truth, probabilities, judged.fold, judged.repeat).probabilities


def _write_judged(
    config: EvaluateConfig, out: OutDir, selection: Selection, by_image: Judged, judged: Judged, units: Units
) -> None:
    write_predictions(out.path, selection, by_image)
    if config.unit != "image":
        write_units(out.path, selection, judged, units)
