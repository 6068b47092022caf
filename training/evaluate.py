"""`evaluate`: a report on labelled data that a model has not seen."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from cluster.errors import UsageError
from cluster.progress import progress, say
from training.artifact import Model, load_model, model_folder
from training.configs import EvaluateConfig
from training.dataset import Dataset, Selection, truth_of
from training.device import choose_device
from training.ingest import resolve_data
from training.judgement import Judged, figures_of, of_units, summarise, write_evaluation_report
from training.lineage import own_images, seen_by
from training.probabilities import calibrated
from training.report import with_interval
from training.tasks import pooling
from training.transfer import protocol_of, write_predictions, write_units
from training.units import Units, units_of


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """A report at `config.out` judges the model on the labelled images of `config.data`; returns its summary.

    Raises:
        UsageError: the model has no classes, labels are not among them, or images are of the model's lineage.
    """
    model_folder(config.model)
    with config.open_out("evaluate") as out:
        if out.state == "done":
            return out.summary()
        started = time.monotonic()
        model = load_model(config.model, choose_device(config.device))
        if model.card.head == "none":
            raise UsageError(
                f"{config.model}: an encoder without classes; train one with: rayograph transfer --init RUN"
            )
        size = f"{model.card.image_path.height}x{model.card.image_path.width}"
        dataset = resolve_data(config.data, out=config.out, image_size=size)
        selection = dataset.select(config.where, labelled=True)
        seen = _check(config, model, selection)
        columns = (selection.column(name) for name in ("label", "case", "group"))
        units = units_of(config.unit, *columns)
        features = _features(config, model, dataset, selection)
        by_image = _judge(config, model, selection, features)
        judged = _judge_units(config, model, selection, features, by_image, units)
        write_predictions(out.path / "predictions.parquet", selection, by_image)
        if config.unit != "image":
            write_units(out.path / "units.parquet", selection, judged, units)
        figures_of(judged, out.path / "figures")
        write_evaluation_report(out.path, config, dataset, selection, judged, model.card, seen, units)
        groups = len(set(selection.column("group")))
        protocol = {"split": "unseen", "folds": 1, "repeats": 1, "groups": groups}
        summary = {
            "protocol": protocol | protocol_of(units, config.pooling),
            "images": len(selection),
            "seen": seen,
            "seconds": time.monotonic() - started,
            "metrics": judged.metrics,
        }
        out.finish(summary)
        balanced = judged.metrics["balanced_accuracy"]
        shown = with_interval(balanced["value"], balanced["ci95"])
        say(f"done: balanced accuracy {shown}, report in {out.name('report.html')}")
        return summary


def _check(config: EvaluateConfig, model: Model, selection: Selection) -> int:
    """Number of images of the model's lineage, where they are allowed."""
    several = model.card.activation == "sigmoid"
    labels = selection.column("label")
    strange = sorted({name for label in labels for name in (label.split("|") if several else [label])})
    strange = [name for name in strange if name not in model.card.classes]
    if strange:
        raise UsageError(
            f"{config.data}: the model has no class {strange[0]!r}; its classes: {', '.join(model.card.classes)}"
        )
    seen = len(own_images(selection) & seen_by(config.model))
    if seen and not config.allow_seen:
        raise UsageError(
            f"{config.data}: {seen:,} of {len(selection):,} images were seen in the model's (pre)training, so "
            "the figures would be too good\njudge on other images (--where), or accept it with --allow-seen"
        )
    return seen


def _features(config: EvaluateConfig, model: Model, dataset: Dataset, selection: Selection) -> np.ndarray:
    parts = []
    step = 512
    with progress("evaluate", len(selection), "images") as bar:
        for at in range(0, len(selection), step):
            part = selection.take(np.arange(at, min(at + step, len(selection))))
            parts.append(model.embed(dataset.pixels(part), config.batch_size))
            bar.advance(len(part))
    return np.concatenate(parts)


def _judge(config: EvaluateConfig, model: Model, selection: Selection, features: np.ndarray) -> Judged:
    classes = list(model.card.classes)
    truth = truth_of(selection.column("label"), classes, several=model.card.activation == "sigmoid")
    groups = selection.column("group")
    return _judged(config, model, np.arange(len(truth)), truth, model.classify(features), groups)


def _judge_units(
    config: EvaluateConfig, model: Model, selection: Selection, features: np.ndarray, by_image: Judged, units: Units
) -> Judged:
    """The judgement of the units: of the images' probabilities, or by the attention that lies beside the model."""
    groups = selection.column("group")
    if config.unit == "image":
        return by_image
    if config.pooling == "mean":
        return of_units(by_image, units, groups, config.seed, ordered=model.card.ordered)
    pooler = _pooler(config, features.shape[1], len(by_image.classes))
    raw = pooler.probabilities(features, units.of_row)[units.judged]
    rows = units.first[units.judged]
    probabilities = calibrated(raw, pooler.temperature, several=pooler.several)
    return _judged(config, model, rows, by_image.truth[rows], probabilities, [groups[r] for r in rows])


def _pooler(config: EvaluateConfig, dimension: int, classes: int) -> pooling.Pooler:
    file = model_folder(config.model) / pooling.FILE
    if not file.is_file():
        raise UsageError(
            f"--pooling attention: {config.model} has none; use --pooling mean, or transfer with --pooling attention"
        )
    return pooling.load_pooler(file.read_bytes(), dimension, classes)


def _judged(
    config: EvaluateConfig,
    model: Model,
    rows: np.ndarray,
    truth: np.ndarray,
    probabilities: np.ndarray,
    groups: list[str],
) -> Judged:
    zeros = np.zeros(len(truth), dtype=np.int64)
    summary = summarise(
        truth,
        probabilities,
        group=groups,
        fold=zeros,
        repeat=zeros,
        seed=config.seed,
        ordered=model.card.ordered,
    )
    classes = list(model.card.classes)
    return Judged(classes, rows, truth, probabilities, zeros, zeros, dict(summary), model.card.temperature)
