"""What a report says of judged predictions: the data, the figures, and tables of classes, labels and units."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from training import figures, metrics, multilabel, report
from training.dataset import Dataset, Selection
from training.fit import FoldResult
from training.judgement import Judged, confusion_of, guessing
from training.learnt import asked_of
from training.units import Units

WORDS = {
    "accuracy": "share of images named right",
    "balanced_accuracy": "mean over classes of the share named right",
    "kappa": "agreement beyond chance (Cohen)",
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
MOST_CLASSES = 12
"""Classes named in a sentence."""


def figures_of(judged: Judged, folder: Path, results: Sequence[FoldResult] = ()) -> None:
    """metrics.png, reliability.png, confusion.png of one class per image, and learning.png of fine-tuning stand in
    `folder`."""
    folder.mkdir(exist_ok=True)
    if judged.several:
        bins = multilabel.reliability(judged.probabilities, judged.truth)
    else:
        figures.confusion_matrix(confusion_of(judged), judged.classes, folder / "confusion.png")
        bins = metrics.reliability(judged.probabilities, judged.truth)
    levels = guessing(judged.truth, len(judged.classes))
    drawn = [
        (metrics.title_of(name), m["value"], *m["ci95"], levels.get(name))
        for name, m in metrics.meaningful(judged.metrics).items()
        if name in levels and m["value"] is not None
    ]
    figures.intervals(drawn, folder / "metrics.png", "value; 1 is best")
    axes = {"axes": ("probability of a label", "share that has it")} if judged.several else {}
    figures.reliability_diagram(*bins, judged.metrics["ece"]["value"], folder / "reliability.png", **axes)
    series = {}
    for result in results:
        epochs = np.asarray([row["epoch"] for row in result.history])
        if len(epochs):
            held = np.asarray([row["held_loss"] for row in result.history])
            series[f"repeat {result.repeat} fold {result.fold}"] = (epochs, held)
    if series:
        judged_by = "loss" if asked_of(results) is None else "1 - mAP@R"
        figures.curves(series, folder / "learning.png", "epoch", f"{judged_by} on groups held back for stopping")


def metrics_table(values: dict[str, Any], caption: str) -> report.Table:
    words = WORDS | ORDINAL_WORDS if set(metrics.ORDINAL) <= set(values) else WORDS
    words = LABEL_SET_WORDS if "hamming" in values else words
    rows = [
        [metrics.title_of(name), report.with_interval(m["value"], m["ci95"]), words.get(name, "")]
        for name, m in metrics.meaningful(values).items()
    ]
    return report.Table(["metric", "value [95 % interval]", "meaning"], rows, caption)


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


def class_counts(selection: Selection, classes: Sequence[str]) -> tuple[dict[str, int], dict[str, int]]:
    """(images, groups) per class of labelled rows; an image with several labels counts for each of them."""
    return _counted(selection.column("label"), selection.column("group"), classes)


def counts_table(labels: Sequence[str], groups: Sequence[str], classes: Sequence[str], caption: str) -> report.Table:
    """Images and groups of each class; `labels` and `groups` hold one entry per image."""
    images, own = _counted(labels, groups, classes)
    rows = [[name, f"{images[name]:,}", f"{own[name]:,}"] for name in classes]
    return report.Table(["class", "images", "groups"], rows, caption)


def _counted(
    labels: Sequence[str], groups: Sequence[str], classes: Sequence[str]
) -> tuple[dict[str, int], dict[str, int]]:
    sets = [[label] if label in classes else label.split("|") for label in labels]
    pairs = [(name, group) for own, group in zip(sets, groups, strict=True) for name in own]
    images, own = Counter(name for name, _ in pairs), Counter(name for name, _ in set(pairs))
    return {name: images[name] for name in classes}, {name: own[name] for name in classes}


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
    ]
    if judged.several:
        blocks.append(label_table(judged))
    else:
        blocks.append(class_table(judged))
        blocks.append(
            report.Figure(
                folder / "confusion.png",
                "Confusion matrix: how often each class was taken for each.",
                "Rows: truth. Columns: what the model said. The diagonal is right.",
            )
        )
    blocks.append(
        report.Figure(
            folder / "reliability.png",
            "Reliability diagram: how often a label is there, by how likely it was said to be."
            if judged.several
            else "Reliability diagram: how often the model is right, by how sure it is.",
            "On the diagonal, a stated probability is met as often as it says; below it, the model is too sure.",
        )
    )
    if learning and (folder / "learning.png").exists():
        blocks.append(
            report.Figure(
                folder / "learning.png",
                "Learning curves: the loss on images held back, epoch by epoch.",
                "Where each fold's training was stopped: at the lowest point of its curve.",
            )
        )
    return report.Section("Results", blocks)


# The question and its answer, in words


def question_of(judged: Judged, unit: str) -> str:
    """What was to be told apart from what; `unit`: image, case or group."""
    names = list(judged.classes[:MOST_CLASSES])
    listed = (
        f"{', '.join(names[:-1])} or {names[-1]}" if len(judged.classes) <= MOST_CLASSES else ", ".join(names) + ", …"
    )
    shown = "the image alone" if unit == "image" else f"the images of a {unit} alone"
    question = f"which of {len(judged.classes)} classes {'it shows' if unit == 'image' else 'they show'}"
    if judged.several:
        question += ", of which there may be several"
    return f"Can a model tell from {shown} {question}: {listed}?"


def answer_of(judged: Judged, unit: str) -> str:
    """The main figure, its interval, and what guessing reaches."""
    metric = judged.metrics["balanced_accuracy"]
    value, (low, high) = metric["value"], metric["ci95"]
    level = guessing(judged.truth, len(judged.classes))["balanced_accuracy"]
    if value is None:
        return "The answer is not defined: no class was judged."
    interval = "" if low is None or high is None else f" (95 % interval {low:.1%} to {high:.1%})"
    answer = f"On average over the classes it named {value:.1%} of the {unit}s right{interval}"
    if judged.several:
        answer = (
            f"On average over the classes it was right in {value:.1%} of the {unit}s{interval}, those that have the "
            "class and those that lack it counted alike"
        )
    answer += f"; guessing reaches {level:.1%}."
    if interval and low <= level:
        answer += " That cannot be told from guessing."
    return answer
