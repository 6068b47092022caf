"""Judged predictions: their figures, and the reports of `transfer` and `evaluate`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from training import figures, metrics, multilabel, report
from training.artifact import ModelCard
from training.configs import EvaluateConfig, TransferConfig
from training.dataset import Dataset, Selection
from training.fit import FoldResult
from training.units import Units, pooled

WORDS = {
    "accuracy": "share of images named right",
    "balanced_accuracy": "mean over classes of the share named right",
    "kappa": "agreement beyond chance (Cohen)",
    "kappa_quadratic": "without meaning here: no order of the classes was given (--order)",
    "f1_macro": "mean over classes of F1",
    "auroc": "area under the ROC curve, one class against the rest, mean over classes and folds",
    "ece": "expected calibration error: how far stated probabilities are from the truth, 0 is best",
}

ORDINAL_WORDS = {
    "kappa_quadratic": "agreement beyond chance in the order of the classes, far errors weigh more",
    "mean_level_error": "mean distance of what was said from the truth, in levels, 0 is best",
}
LABEL_SET_WORDS = {
    "accuracy": "share of images whose whole set of labels is right",
    "balanced_accuracy": "mean over labels of the mean of sensitivity and specificity, at a probability of a half",
    "f1_macro": "mean over labels of F1",
    "f1_micro": "F1 of all decisions on all labels together",
    "hamming": "share of all decisions on all labels that are wrong, 0 is best",
    "auroc": "area under the ROC curve, mean over labels and folds",
    "average_precision": "mean precision along the ranking by probability (mAP), mean over labels and folds",
    "ece": "expected calibration error of all labels' probabilities, 0 is best",
}


@dataclass(frozen=True)
class Judged:
    """Predictions with their truth. `rows` [M] are rows of the selection; probabilities [M, K] are calibrated.

    `truth` is class numbers [M], or where images may have several labels bool [M, K].
    """

    classes: list[str]
    rows: np.ndarray
    truth: np.ndarray
    probabilities: np.ndarray
    fold: np.ndarray
    repeat: np.ndarray
    metrics: dict[str, Any]
    temperature: float

    @property
    def several(self) -> bool:
        """Whether an image may have several labels."""
        return self.truth.ndim == 2


def summarise(truth: np.ndarray, probabilities: np.ndarray, *, ordered: bool, **rows: Any) -> dict[str, metrics.Metric]:
    """The metrics of class numbers [M], or of label sets bool [M, K]; `rows` as in `metrics.summarise`."""
    if truth.ndim == 2:
        return multilabel.summarise(truth, probabilities, **rows)
    return metrics.summarise(truth, probabilities, ordered=ordered, **rows)


def of_units(judged: Judged, units: Units, groups: Sequence[str], seed: int, *, ordered: bool) -> Judged:
    """The judgement of units by the mean of their images' probabilities; its rows are those that stand for units.

    `groups` [N] are those of the selection's rows. Units whose images disagree on their label are left out.
    """
    p = pooled(units, judged.rows, judged.truth, judged.probabilities, judged.fold, judged.repeat)
    summary = summarise(
        p.truth,
        p.probabilities,
        group=[groups[r] for r in p.rows],
        fold=p.fold,
        repeat=p.repeat,
        seed=seed,
        ordered=ordered,
    )
    return replace(
        judged,
        rows=p.rows,
        truth=p.truth,
        probabilities=p.probabilities,
        fold=p.fold,
        repeat=p.repeat,
        metrics=dict(summary),
    )


def unit_blocks(units: Units, pooling: str) -> list[report.Block]:
    """What the report says of the units, nothing where each image is one."""
    if units.kind == "image":
        return []
    sizes = np.bincount(units.of_row)[units.judged]
    how = "the mean of the probabilities of its images"
    if pooling == "attention":
        how = "gated attention over the frozen features of its images, trained inside each fold"
    blocks: list[report.Block] = [
        report.Text(
            f"Judged by {units.kind}: every figure counts a {units.kind} once, however many images it has. "
            f"{len(sizes):,} were judged, of {np.median(sizes):g} images at the median and {sizes.max():,} at most; "
            f"each by {how}. A single image is answered by the image's own model."
        )
    ]
    if units.conflicting.any():
        named = [units.names[u] for u in np.flatnonzero(units.conflicting)]
        shown = ", ".join(named[:5]) + (", …" if len(named) > 5 else "")
        blocks.append(
            report.Warning(
                f"{len(named):,} {units.kind}s have images of several labels and are left out of the figures: {shown}."
            )
        )
    return blocks


def figures_of(judged: Judged, folder: Path, results: Sequence[FoldResult] = ()) -> None:
    """reliability.png, confusion.png of one class per image, and learning.png of fine-tuning stand in `folder`."""
    folder.mkdir(exist_ok=True)
    if judged.several:
        bins = multilabel.reliability(judged.probabilities, judged.truth)
    else:
        counts = metrics.confusion(judged.truth, judged.probabilities.argmax(axis=1), len(judged.classes))
        figures.confusion_matrix(counts, judged.classes, folder / "confusion.png")
        bins = metrics.reliability(judged.probabilities, judged.truth)
    axes = {"axes": ("probability of a label", "share that has it")} if judged.several else {}
    figures.reliability_diagram(*bins, judged.metrics["ece"]["value"], folder / "reliability.png", **axes)
    series = {}
    for result in results:
        epochs = np.asarray([row["epoch"] for row in result.history])
        if len(epochs):
            held = np.asarray([row["held_loss"] for row in result.history])
            series[f"repeat {result.repeat} fold {result.fold}"] = (epochs, held)
    if series:
        figures.curves(series, folder / "learning.png", "epoch", "loss on groups held back for stopping")


def metrics_table(values: dict[str, Any], caption: str) -> report.Table:
    words = WORDS | ORDINAL_WORDS if set(metrics.ORDINAL) <= set(values) else WORDS
    words = LABEL_SET_WORDS if "hamming" in values else words
    rows = [[name, report.with_interval(m["value"], m["ci95"]), words.get(name, "")] for name, m in values.items()]
    return report.Table(["metric", "value [95 % interval]", "meaning"], rows, caption)


def label_table(judged: Judged) -> report.Table:
    """How well each label is told, where images may have several."""
    found = multilabel.of_each_label(judged.truth, judged.probabilities, judged.fold, judged.repeat)
    shown = ("sensitivity", "specificity", "auroc", "average_precision")
    rows = [
        [name, f"{own['rows']:,.0f}", *(report.with_interval(_defined(own[key]), (None, None)) for key in shown)]
        for name, own in zip(judged.classes, found, strict=True)
    ]
    return report.Table(["label", "have it", *shown], rows, "Each label by itself, said at a probability of a half")


def _defined(value: float) -> float | None:
    return None if np.isnan(value) else value


def _data_section(dataset: Dataset, selection: Selection, classes: Sequence[str]) -> report.Section:
    counts = dataset.info["counts"]
    labels, groups = selection.column("label"), selection.column("group")
    sets = [label.split("|") for label in labels]
    tally = Counter(name for own in sets for name in own)
    rows = [
        [name, f"{tally[name]:,}", f"{len({g for g, own in zip(groups, sets, strict=True) if name in own}):,}"]
        for name in classes
    ]
    return report.Section(
        "Data",
        [
            report.Text(
                f"Dataset version {dataset.version}: {counts['images']:,} source images, {counts['ok']:,} usable, "
                f"{counts['duplicate']:,} byte-identical copies left out, {counts['quarantined']:,} unreadable. "
                f"The largest group holds {counts['largest_group_fraction']:.1%} of the images."
            ),
            report.Table(["class", "images", "groups"], rows, "Labelled images used here"),
        ],
    )


def _result_section(out: Path, judged: Judged, caption: str, learning: bool) -> report.Section:
    blocks: list[Any] = [metrics_table(judged.metrics, caption)]
    folder = out / "figures"
    if judged.several:
        blocks.append(label_table(judged))
    else:
        words = "Rows: truth. Columns: what the model said."
        blocks.append(report.Figure(folder / "confusion.png", "Confusion matrix", words))
    blocks += [
        report.Figure(
            folder / "reliability.png",
            "Reliability diagram",
            "On the diagonal, a stated probability is met as often as it says.",
        ),
    ]
    if learning and (folder / "learning.png").exists():
        blocks.append(
            report.Figure(folder / "learning.png", "Learning curves", "Where each fold's training was stopped.")
        )
    return report.Section("Results", blocks)


def write_transfer_report(
    out: Path,
    config: TransferConfig,
    dataset: Dataset,
    selection: Selection,
    judged: Judged,
    card: ModelCard,
    best_epoch: int,
    units: Units,
) -> None:
    """report.html of a transfer, for a reader who does not program."""
    whole = config.split == "group"
    protocol: list[Any] = [
        report.Text(
            f"{config.repeats} x {config.folds}-fold cross-validation, stratified by class"
            + (", no group (patient, slide) on both sides of a split." if whole else ", split image by image.")
            + " Every figure is of images that the model judging them was not trained on; intervals come from a "
            "bootstrap over groups. When to stop was decided on groups held back from each fold's own training part."
        ),
        *unit_blocks(units, config.pooling),
    ]
    if not whole:
        protocol.append(
            report.Warning(
                "Split by image: pictures of one patient stand on both sides, so these figures are too good. "
                "Judge by --split group."
            )
        )
    model: list[Any] = [
        report.Text(
            f"First weights: {config.init}. Task: {config.task}. The model kept was fitted again on all labelled images"
            + (f" for {best_epoch} epochs, the median of the folds" if best_epoch else "")
            + f"; its probabilities are divided by temperature {card.temperature:.2f}, fitted out of fold."
        ),
        report.Code(
            card.architecture.snippet("model/model.safetensors", len(card.classes) if card.head == "network" else 0)
        ),
    ]
    sections = [
        report.Section("Protocol", protocol),
        _data_section(dataset, selection, judged.classes),
        _result_section(out, judged, "Pooled out-of-fold predictions", learning=True),
        report.Section("The model", model),
    ]
    report.write_report(out / "report.html", title=f"Transfer: {out.name}", sections=sections, images=config.images)


def write_evaluation_report(
    out: Path,
    config: EvaluateConfig,
    dataset: Dataset,
    selection: Selection,
    judged: Judged,
    card: ModelCard,
    seen: int,
    units: Units,
) -> None:
    """report.html of an evaluation."""
    protocol: list[Any] = [
        report.Text(
            f"The model of {config.model} on images that it has not seen; intervals come from a bootstrap over groups. "
            "Images are compared by their bytes with those of the model's training and pretraining."
        ),
        *unit_blocks(units, config.pooling),
    ]
    if seen:
        protocol.append(
            report.Warning(f"{seen:,} of these images are of the model's own lineage: the figures are too good.")
        )
    sections = [
        report.Section("Protocol", protocol),
        _data_section(dataset, selection, judged.classes),
        _result_section(out, judged, "Predictions of the model as it is served", learning=False),
    ]
    report.write_report(out / "report.html", title=f"Evaluation: {out.name}", sections=sections, images=config.images)
