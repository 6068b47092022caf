"""Judged predictions: their figures, and the reports of `transfer` and `evaluate`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from training import figures, metrics, report
from training.artifact import ModelCard
from training.configs import EvaluateConfig, TransferConfig
from training.dataset import Dataset, Selection
from training.fit import FoldResult

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


@dataclass(frozen=True)
class Judged:
    """Predictions with their truth. `rows` [M] are rows of the selection; probabilities [M, K] are calibrated."""

    classes: list[str]
    rows: np.ndarray
    truth: np.ndarray
    probabilities: np.ndarray
    fold: np.ndarray
    repeat: np.ndarray
    metrics: dict[str, Any]
    temperature: float


def figures_of(judged: Judged, folder: Path, results: Sequence[FoldResult] = ()) -> None:
    """confusion.png, reliability.png and, for fine-tuning, learning.png stand in `folder`."""
    folder.mkdir(exist_ok=True)
    counts = metrics.confusion(judged.truth, judged.probabilities.argmax(axis=1), len(judged.classes))
    figures.confusion_matrix(counts, judged.classes, folder / "confusion.png")
    bins = metrics.reliability(judged.probabilities, judged.truth)
    figures.reliability_diagram(*bins, judged.metrics["ece"]["value"], folder / "reliability.png")
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
    rows = [[name, report.with_interval(m["value"], m["ci95"]), words.get(name, "")] for name, m in values.items()]
    return report.Table(["metric", "value [95 % interval]", "meaning"], rows, caption)


def _data_section(dataset: Dataset, selection: Selection, classes: Sequence[str]) -> report.Section:
    counts = dataset.info["counts"]
    labels, groups = selection.column("label"), selection.column("group")
    tally = Counter(labels)
    rows = [
        [name, f"{tally[name]:,}", f"{len({g for g, n in zip(groups, labels, strict=True) if n == name}):,}"]
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
    blocks += [
        report.Figure(folder / "confusion.png", "Confusion matrix", "Rows: truth. Columns: what the model said."),
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
) -> None:
    """report.html of a transfer, for a reader who does not program."""
    whole = config.split == "group"
    protocol: list[Any] = [
        report.Text(
            f"{config.repeats} x {config.folds}-fold cross-validation, stratified by class"
            + (", no group (patient, slide) on both sides of a split." if whole else ", split image by image.")
            + " Every figure is of images that the model judging them was not trained on; intervals come from a "
            "bootstrap over groups. When to stop was decided on groups held back from each fold's own training part."
        )
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
            + f"; its probabilities are divided by temperature {judged.temperature:.2f}, fitted out of fold."
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
) -> None:
    """report.html of an evaluation."""
    protocol: list[Any] = [
        report.Text(
            f"The model of {config.model} on images that it has not seen; intervals come from a bootstrap over groups. "
            "Images are compared by their bytes with those of the model's training and pretraining."
        )
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
