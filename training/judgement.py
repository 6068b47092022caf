"""Judged predictions: their figures, the sections that reports share, and the report of `transfer`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from training import calibration, figures, metrics, report
from training.artifact import ModelCard
from training.configs import TransferConfig
from training.dataset import Dataset, Selection
from training.fit import FoldResult, Labels

WORDS = {
    "accuracy": "share of images named right",
    "balanced_accuracy": "mean over classes of the share named right",
    "kappa": "agreement beyond chance (Cohen)",
    "kappa_quadratic": "agreement beyond chance, far errors weigh more; only where the classes have an order",
    "f1_macro": "mean over classes of F1",
    "auroc": "area under the ROC curve, one class against the rest, mean over classes and folds",
    "ece": "expected calibration error: how far stated probabilities are from the truth, 0 is best",
}


PROTOCOLS = {
    "group": "{repeats} x {folds}-fold cross-validation, stratified by class, no group (patient, slide) on both sides.",
    "image": "{repeats} x {folds}-fold cross-validation, stratified by class, split image by image.",
    "site": "One site ({site_column}) after the other is left out and judged by a model that saw only the others.",
    "holdout": "{repeats} x a share of {test_fraction:.0%} of the groups held out, stratified by class.",
}


@dataclass(frozen=True)
class Inner:
    """What a fit said of rows of its own training side that it was not fitted on: truth [I], probabilities [I, K]."""

    truth: np.ndarray
    probabilities: np.ndarray


@dataclass(frozen=True)
class Judged:
    """Predictions with their truth. `rows` [M] are rows of the selection; probabilities [M, K] are calibrated."""

    classes: list[str]
    rows: np.ndarray
    truth: np.ndarray
    probabilities: np.ndarray
    raw: np.ndarray
    """As the fits said, float64 [M, K]; the calibrated ones where nothing else is known."""
    fold: np.ndarray
    repeat: np.ndarray
    metrics: dict[str, Any]
    temperature: float
    inner: Mapping[tuple[int, int], Inner] = field(default_factory=dict)
    """By (repeat, fold), calibrated like the fold's own predictions: what thresholds may be chosen on."""


def judge(results: Sequence[FoldResult], labels: Labels, classes: list[str], seed: int) -> Judged:
    """Out-of-fold predictions of one protocol, each fold calibrated by a temperature of its own inner predictions.

    The temperature that is kept for the final model comes from all out-of-fold predictions.
    """
    rows = np.concatenate([r.test for r in results])
    fold = np.concatenate([np.full(len(r.test), r.fold) for r in results])
    repeat = np.concatenate([np.full(len(r.test), r.repeat) for r in results])
    raw = np.concatenate([r.probabilities for r in results])
    parts, inner = [], {}
    for one in results:
        truth = labels.truth[one.inner_rows]
        temperature = calibration.fit_temperature(_logs(one.inner_probabilities), truth)
        parts.append(calibration.apply_temperature(one.probabilities, temperature))
        known = calibration.apply_temperature(one.inner_probabilities, temperature)
        inner[one.repeat, one.fold] = Inner(truth, known)
    truth, calibrated = labels.truth[rows], np.concatenate(parts)
    groups = [labels.groups[r] for r in rows]
    summary = metrics.summarise(truth, calibrated, group=groups, fold=fold, repeat=repeat, seed=seed)
    temperature = calibration.fit_temperature(_logs(raw), truth)
    return Judged(classes, rows, truth, calibrated, raw, fold, repeat, dict(summary), temperature, inner)


def _logs(probabilities: np.ndarray) -> np.ndarray:
    return np.asarray(np.log(np.maximum(probabilities, 1e-12)))


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
    rows = [[name, report.with_interval(m["value"], m["ci95"]), WORDS.get(name, "")] for name, m in values.items()]
    return report.Table(["metric", "value [95 % interval]", "meaning"], rows, caption)


def class_table(labels: Sequence[str], groups: Sequence[str], classes: Sequence[str], caption: str) -> report.Table:
    """Images and groups of each class; `labels` and `groups` hold one entry per image."""
    tally = Counter(labels)
    rows = [
        [name, f"{tally[name]:,}", f"{len({g for g, n in zip(groups, labels, strict=True) if n == name}):,}"]
        for name in classes
    ]
    return report.Table(["class", "images", "groups"], rows, caption)


def data_section(dataset: Dataset, selection: Selection, classes: Sequence[str]) -> report.Section:
    counts = dataset.info["counts"]
    return report.Section(
        "Data",
        [
            report.Text(
                f"Dataset version {dataset.version}: {counts['images']:,} source images, {counts['ok']:,} usable, "
                f"{counts['duplicate']:,} byte-identical copies left out, {counts['quarantined']:,} unreadable. "
                f"The largest group holds {counts['largest_group_fraction']:.1%} of the images."
            ),
            class_table(selection.column("label"), selection.column("group"), classes, "Labelled images used here"),
        ],
    )


def result_section(out: Path, judged: Judged, caption: str, learning: bool) -> report.Section:
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
    curve: report.Section | None = None,
) -> None:
    """report.html of a transfer, for a reader who does not program."""
    protocol: list[Any] = [
        report.Text(
            f"{PROTOCOLS[config.split].format(**config.as_dict())} Every figure is of images that the model judging "
            "them was not trained on; intervals come from a bootstrap over groups. Whatever is chosen (when to stop, "
            "how strongly to regularise, the temperature of the probabilities) was chosen inside each fit's own "
            "training side, on groups that it was not fitted on."
        )
    ]
    if config.split == "image":
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
        data_section(dataset, selection, judged.classes),
        result_section(out, judged, "Pooled out-of-fold predictions", learning=True),
        *([curve] if curve else []),
        report.Section("The model", model),
    ]
    report.write_report(out / "report.html", title=f"Transfer: {out.name}", sections=sections, images=config.images)
