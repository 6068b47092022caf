"""Judged predictions: their figures, and what a report says of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from training import calibration, figures, metrics, report
from training.calibration import Inner
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
    """By (repeat, fold), on the scale of `raw`: what thresholds may be chosen on."""


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
        inner[one.repeat, one.fold] = Inner(truth, one.inner_probabilities)
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
    counts = confusion_of(judged)
    figures.confusion_matrix(counts, judged.classes, folder / "confusion.png")
    levels = guessing(judged.truth, len(judged.classes))
    drawn = [
        (name.replace("_", " "), m["value"], *m["ci95"], levels.get(name))
        for name, m in judged.metrics.items()
        if name in levels and m["value"] is not None
    ]
    figures.intervals(drawn, folder / "metrics.png", "value; 1 is best")
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


def confusion_of(judged: Judged) -> np.ndarray:
    """Counts [K, K]: rows are the truth, columns what the model said."""
    return metrics.confusion(judged.truth, judged.probabilities.argmax(axis=1), len(judged.classes))


def guessing(truth: np.ndarray, classes: int) -> dict[str, float]:
    """What the better of two guesses reaches, by metric: always the most frequent class, or classes drawn as often as
    they occur. Metrics of which a guess has no level of its own (ece) are left out."""
    counts = np.bincount(truth, minlength=classes)
    present = int((counts > 0).sum())
    level = 1 / max(1, present)
    return {
        "accuracy": float(counts.max() / max(1, counts.sum())),
        "balanced_accuracy": level,
        "kappa": 0.0,
        "kappa_quadratic": 0.0,
        "f1_macro": level,
        "auroc": 0.5,
    }


def class_counts(selection: Selection, classes: Sequence[str]) -> tuple[dict[str, int], dict[str, int]]:
    """(images, groups) per class of labelled rows."""
    labels, groups = selection.column("label"), selection.column("group")
    images = Counter(labels)
    own = Counter(name for name, _ in set(zip(labels, groups, strict=True)))
    return {name: images[name] for name in classes}, {name: own[name] for name in classes}


def counts_table(labels: Sequence[str], groups: Sequence[str], classes: Sequence[str], caption: str) -> report.Table:
    """Images and groups of each class; `labels` and `groups` hold one entry per image."""
    tally = Counter(labels)
    rows = [
        [name, f"{tally[name]:,}", f"{len({g for g, n in zip(groups, labels, strict=True) if n == name}):,}"]
        for name in classes
    ]
    return report.Table(["class", "images", "groups"], rows, caption)


def data_section(dataset: Dataset, selection: Selection, classes: Sequence[str]) -> report.Section:
    """What there was, what was left out and why, and what is judged."""
    counts = dataset.info["counts"]
    images, groups = class_counts(selection, classes)
    total, together = len(selection), len(set(selection.column("group")))
    labelled = counts.get("labelled", total)
    flow = [
        ["images in the source", counts["images"]],
        ["unreadable, set aside", counts["quarantined"]],
        ["byte-identical copies, left out", counts["duplicate"]],
        ["usable", counts["ok"]],
        ["usable, without a label", counts["ok"] - labelled],
        ["labelled", labelled],
        ["judged here", total],
    ]
    rows = [[name, f"{images[name]:,}", f"{images[name] / total:.0%}", f"{groups[name]:,}"] for name in classes]
    blocks: list[report.Block] = [
        report.Text(
            f"{total:,} labelled images of {together:,} groups. A group is what must not be split between training and "
            "test: all pictures of one patient, one slide or one lesion, and all copies of a picture. The largest "
            f"holds {counts['largest_group_fraction']:.1%} of the usable images."
        ),
        report.Table(["class", "images", "share", "groups"], rows, "The classes"),
        report.Table(
            ["", "images"], [[what, f"{count:,}"] for what, count in flow], "From the source to what is judged"
        ),
    ]
    blocks += _oddities(dataset)
    blocks.append(report.Text(f"Dataset version {dataset.version}: the same images and labels have the same version."))
    return report.Section("Data", blocks)


def _oddities(dataset: Dataset) -> list[report.Block]:
    """What was wrong with the data; nothing where nothing was."""
    counts, blocks = dataset.info["counts"], list[report.Block]()
    if counts["quarantined"]:
        table = dataset.manifest
        pairs = zip(table["status"].to_pylist(), table["reason"].to_pylist(), strict=True)
        reasons = Counter(reason for status, reason in pairs if status == "quarantined")
        rows = [[reason, f"{count:,}"] for reason, count in reasons.most_common(8)]
        blocks.append(report.Table(["reason", "images"], rows, "Why images were set aside"))
    if counts.get("conflicting_copies"):
        blocks.append(
            report.Warning(
                f"{counts['conflicting_copies']:,} sets of identical pictures carry different labels. They were left "
                "unlabelled; dataset.json names them."
            )
        )
    if counts.get("ungrouped"):
        blocks.append(
            report.Warning(
                f"{counts['ungrouped']:,} labelled images came without a group, so each counts as its own. Where that "
                "is not true, pictures of one patient stand in training and test."
            )
        )
    return blocks


def class_table(judged: Judged) -> report.Table:
    """Per class: how many of its images were named right, and what the others were taken for most often."""
    rows = []
    for name, line in zip(judged.classes, confusion_of(judged), strict=True):
        at, total = judged.classes.index(name), int(line.sum())
        others = np.where(np.arange(len(line)) == at, 0, line)
        worst = f"{judged.classes[int(others.argmax())]} ({others.max() / total:.0%})" if others.any() else "–"
        share = f"{line[at] / total:.0%}" if total else "–"
        rows.append([name, f"{total:,}", share, worst])
    return report.Table(
        ["class", "judgements", "named right", "most often taken for"], rows, "Class by class (sensitivity)"
    )


def result_section(out: Path, judged: Judged, caption: str, learning: bool) -> report.Section:
    """The figures of `figures_of` and their tables."""
    folder = out / "figures"
    blocks: list[report.Block] = [
        report.Figure(
            folder / "metrics.png",
            "Each metric with its interval and the level of guessing; the table that follows holds the numbers.",
            "Points: values; lines: 95 % intervals; upright marks: what guessing reaches.",
        ),
        metrics_table(judged.metrics, caption),
        class_table(judged),
        report.Figure(
            folder / "confusion.png",
            "Confusion matrix: how often each class was taken for each.",
            "Rows: truth. Columns: what the model said. The diagonal is right.",
        ),
        report.Figure(
            folder / "reliability.png",
            "Reliability diagram: how often the model is right, by how sure it is.",
            "On the diagonal, a stated probability is met as often as it says; below it, the model is too sure.",
        ),
    ]
    if learning and (folder / "learning.png").exists():
        blocks.append(
            report.Figure(
                folder / "learning.png",
                "Learning curves: the loss on images held back, epoch by epoch.",
                "Where each fold's training was stopped: at the lowest point of its curve.",
            )
        )
    return report.Section("Results", blocks)
