"""`evaluate`: a report on labelled data that a model has not seen."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from cluster.errors import UsageError
from cluster.progress import progress, say
from training import metrics
from training.artifact import Model, load_model, model_folder
from training.configs import EvaluateConfig
from training.dataset import Dataset, Selection
from training.device import choose_device
from training.ingest import resolve_data
from training.judgement import Judged, figures_of, write_evaluation_report
from training.lineage import own_images, seen_by
from training.report import with_interval
from training.transfer import write_predictions


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
        judged = _judge(config, model, dataset, selection)
        write_predictions(out.path / "predictions.parquet", selection, judged)
        figures_of(judged, out.path / "figures")
        write_evaluation_report(out.path, config, dataset, selection, judged, model.card, seen)
        summary = {
            "protocol": {"split": "unseen", "folds": 1, "repeats": 1, "groups": len(set(selection.column("group")))},
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
    strange = sorted(set(selection.column("label")) - set(model.card.classes))
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


def _judge(config: EvaluateConfig, model: Model, dataset: Dataset, selection: Selection) -> Judged:
    parts = []
    step = 512
    with progress("evaluate", len(selection), "images") as bar:
        for at in range(0, len(selection), step):
            part = selection.take(np.arange(at, min(at + step, len(selection))))
            parts.append(model.probabilities(dataset.pixels(part), config.batch_size))
            bar.advance(len(part))
    classes = list(model.card.classes)
    probabilities = np.concatenate(parts)
    truth = np.asarray([classes.index(name) for name in selection.column("label")])
    zeros = np.zeros(len(truth), dtype=np.int64)
    summary = metrics.summarise(
        truth,
        probabilities,
        group=selection.column("group"),
        fold=zeros,
        repeat=zeros,
        seed=config.seed,
        ordered=model.card.ordered,
    )
    rows = np.arange(len(truth))
    return Judged(classes, rows, truth, probabilities, zeros, zeros, dict(summary), model.card.temperature)
