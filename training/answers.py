"""What any study knows of the items of the checklists, in sentences: of its data, its network and its figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from training import report, subgroups
from training.artifact import ModelCard, versions
from training.attention import WORDS
from training.bootstrap import interval_words
from training.dataset import Dataset, Selection
from training.images import ImagePath
from training.judgement import Judged, guessing
from training.results import class_counts


def about_data(
    dataset: Dataset, selection: Selection, classes: Sequence[str], *, name: str, where: Sequence[str], path: ImagePath
) -> dict[str, str]:
    """Of the labelled images of the DATASET `name` that are judged; `path` is how the model takes them."""
    counts, (images, groups) = dataset.info["counts"], class_counts(selection, classes)
    per_class = "; ".join(f"{one}: {images[one]:,} images, {groups[one]:,} groups" for one in classes)
    rows = " and ".join(where)
    return {
        "source": f"Data set {name}, version {dataset.version}.",
        "excluded": f"Of {counts['images']:,} images {counts['quarantined']:,} unreadable and {counts['duplicate']:,} "
        f"byte-identical copies were left out; {len(selection):,} labelled ones were judged.",
        "preprocessing": f"Pixels only. Images brought to {path.height} x {path.width} ({path.fit}; grey values "
        f"windowed: {path.window}), then normalised by channel.",
        "subset": f"Rows with {rows}." if rows else "All labelled, readable images.",
        "missing": "Images without label were not used to train or judge the classifier; unreadable images were set "
        "aside, each with its reason; labelled images without a group "
        f"({counts.get('ungrouped', 0):,}) count as their own group.",
        "copies": "Copies of an image, also near ones that were found, are in one group.",
        "classes": f"{per_class}.",
        "size": f"{len(selection):,} images of {len(set(selection.column('group'))):,} groups.",
    }


def about_network(card: ModelCard) -> dict[str, str]:
    """Of the model, whatever it was trained on."""
    network = card.architecture
    return {
        "category": "Deep learning, image classification.",
        "goal": f"To tell apart {len(card.classes)} classes: {', '.join(card.classes)}.",
        "model": f"timm {network.name}, {network.height} x {network.width} pixels, {network.channels} channels, in; "
        f"{len(card.classes)} probabilities out. {card.input.told}".rstrip(),
        "versions": ", ".join(f"{name} {version}" for name, version in versions().items()) + ".",
        "artifact": "The run's folder model/: weights, architecture, preparation of images, model card.",
        "unsuited": "Unreadable images are refused with a reason; images unlike the training set are marked as such.",
    }


def about_results(
    judged: Judged, selection: Selection, by: Mapping[str, subgroups.ByColumn], *, method: str, mistakes: bool = True
) -> dict[str, str]:
    """Of the figures; `method` is a key of `training.attention.WORDS`, or ""."""
    values, names = judged.metrics, selection.column("group")
    rule = (
        "A class is said at a probability of a half." if judged.several else "No threshold: the likeliest class wins."
    )
    level = guessing(judged.truth, len(judged.classes))["balanced_accuracy"]
    shown = [f"{name} {report.with_interval(m['value'], m['ci95'])}" for name, m in values.items() if name != "ece"]
    table, ece = "table of labels" if judged.several else "confusion matrix", values["ece"]
    return {
        "metrics": f"{', '.join(values)}.",
        "uncertainty": interval_words(len({names[row] for row in judged.rows})),
        "results": f"{'; '.join(shown)}.",
        "guessing": f"Guessing reaches a balanced accuracy of {level:.3f}.",
        "calibration": f"Probabilities by temperature scaling ({judged.temperature:.2f} for the final model); "
        f"expected calibration error {report.with_interval(ece['value'], ece['ci95'])}. {rule}",
        "explanation": f"By {WORDS[method]}. Not validated." if method else "",
        "subgroups": subgroups.in_words(by),
        "failures": f"See {'Mistakes and ' if mistakes else ''}the {table}.",
    }


def spread_of_folds(judged: Judged) -> str:
    """How far the folds differ; nothing where none has a value."""
    values: list[Any] = [v for v in judged.metrics["balanced_accuracy"]["per_fold"] if v is not None]
    return f"Balanced accuracy of the folds: {min(values):.3f} to {max(values):.3f}." if values else ""
