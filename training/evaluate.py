"""`evaluate`: models judged on labelled data that they have not seen, or compared by what they said out of fold."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from cluster import storage
from cluster.errors import UsageError
from cluster.outdir import OutDir
from cluster.progress import progress, say
from training import metrics, report
from training.artifact import Model, ModelCard, load_model, located_model, read_card, run_name
from training.compare import compare
from training.configs import EvaluateConfig
from training.dataset import Dataset, Selection
from training.device import choose_device
from training.evaluation_report import (
    HEADLINE,
    Rival,
    comparison_section,
    draw_differences,
    verdict,
    write_evaluation_report,
)
from training.ingest import resolve_data
from training.judgement import Judged, counts_table, data_section, figures_of
from training.lineage import own_images, seen_by
from training.predictions import FILE, aligned, read_predictions
from training.report import with_interval
from training.transfer import write_predictions


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """A report at `config.out` judges the model, alone or against others; returns its summary.

    With `config.data`, all models judge its labelled images; without, the out-of-fold predictions of RUNs of
    `transfer` are compared, which must have judged the same images in the same folds.

    Raises:
        UsageError: a model has no classes, labels are not among them, images are of a model's lineage, or the RUNs
            were not judged alike.
    """
    runs = _named(config)
    with config.open_out("evaluate") as out:
        if out.state == "done":
            return out.summary()
        started = time.monotonic()
        found = _out_of_fold(config, runs, out) if config.data is None else _unseen(config, config.data, runs, out)
        rivals = _rivals(config, found)
        name = next(iter(runs))
        _write_report(config, out, name, found, rivals)
        summary = {
            "protocol": found.protocol,
            "images": found.images,
            "seen": found.seen,
            "seconds": time.monotonic() - started,
            "metrics": found.judged.metrics,
        }
        if rivals:
            summary["against"] = {
                other: {"run": runs[other], "own": rival.metrics, **rival.comparison} for other, rival in rivals.items()
            }
        out.finish(summary)
        _say_result(out, name, found.judged, rivals)
        return summary


@dataclass(frozen=True, eq=False)
class _Evidence:
    """What all models were judged on, and what they said of it."""

    judged: Judged
    """The model's own."""
    group: list[str]
    """[M], of the rows of `judged`."""
    others: dict[str, np.ndarray]
    """Probabilities [M, K] of the models that it is compared with."""
    protocol: dict[str, Any]
    images: int
    seen: int
    before: list[report.Section]
    caption: str


def _named(config: EvaluateConfig) -> dict[str, str]:
    """The RUNs by name, `--model` first: their own names, or, where two share one, as they were given."""
    runs = [config.model, *config.against]
    places = [located_model(run) for run in runs]
    twice = next((run for at, run in enumerate(runs) if places[at] in places[:at]), None)
    if twice is not None:
        raise UsageError(f"--against {twice}: is named twice; a model is compared with others")
    names = [run_name(run) for run in runs]
    return dict(zip(names if len(set(names)) == len(names) else runs, runs, strict=True))


def _out_of_fold(config: EvaluateConfig, runs: Mapping[str, str], out: OutDir) -> _Evidence:
    (_, ours), *theirs = [(name, read_predictions(run)) for name, run in runs.items()]
    others = {name: aligned(ours, one) for name, one in theirs}
    temperature = read_card(config.model)[0].temperature
    fold, repeat = (np.asarray(ours.column(name), dtype=np.int64) for name in ("fold", "repeat"))
    group = ours.column("group")
    judged = _judged(config, ours.classes, ours.truth, ours.probabilities, group, fold, repeat, temperature)
    partial = out.path / f".{FILE}"
    pq.write_table(ours.table, partial)
    storage.publish_file(partial, out.path / FILE)
    once = np.flatnonzero(repeat == repeat.min())
    labels, groups = ([ours.column(name)[row] for row in once] for name in ("truth", "group"))
    said = ours.protocol
    protocol = report.Section(
        "Protocol",
        [
            report.Text(
                f"{', '.join(runs)}: each judged by {said['repeats']} x {said['folds']}-fold cross-validation, split "
                f"by {said['split']}, on the same images in the same folds. Every prediction is of an image that the "
                "fit which made it was not trained on."
            ),
            *([report.Warning(_LEAK)] if said["split"] == "image" else []),
        ],
    )
    data = report.Section(
        "Data", [counts_table(labels, groups, ours.classes, "Labelled images that all models judged")]
    )
    caption = f"Out-of-fold predictions of {next(iter(runs))}"
    return _Evidence(judged, group, others, said, len(once), 0, [protocol, data], caption)


_LEAK = (
    "Split by image: pictures of one patient stand on both sides, so the figures of all models are too good, and the "
    "difference between them is of models that may know the patient. Judge by --split group."
)


def _unseen(config: EvaluateConfig, data: str, runs: Mapping[str, str], out: OutDir) -> _Evidence:
    cards = {run: _card(run) for run in runs.values()}
    size = [
        max(side) for side in zip(*((c.image_path.height, c.image_path.width) for c in cards.values()), strict=True)
    ]
    dataset = resolve_data(data, out=config.out, image_size=f"{size[0]}x{size[1]}")
    selection = dataset.select(config.where, labelled=True)
    classes = list(cards[config.model].classes)
    seen = _check(config, cards, selection)
    found = [_probabilities(config, run, classes, dataset, selection) for run in runs.values()]
    truth = np.asarray([classes.index(name) for name in selection.column("label")])
    zeros, group = np.zeros(len(truth), dtype=np.int64), selection.column("group")
    judged = _judged(config, classes, truth, found[0], group, zeros, zeros, cards[config.model].temperature)
    write_predictions(out.path / FILE, selection, judged)
    protocol: list[report.Block] = [
        report.Text(
            f"{', '.join(runs)}: judged on images not seen in training; intervals come from a bootstrap over groups. "
            "Images are compared by their bytes with those of each model's training and pretraining."
        )
    ]
    if seen:
        words = f"{seen:,} of these images are of a model's own lineage: the figures are too good."
        protocol.append(report.Warning(words))
    return _Evidence(
        judged,
        group,
        dict(zip(list(runs)[1:], found[1:], strict=True)),
        {"split": "unseen", "folds": 1, "repeats": 1, "groups": len(set(group))},
        len(selection),
        seen,
        [report.Section("Protocol", protocol), data_section(dataset, selection, classes)],
        f"Predictions of {next(iter(runs))} as it is served",
    )


def _card(run: str) -> ModelCard:
    card = read_card(run)[0]
    if card.head == "none":
        raise UsageError(f"{run}: an encoder without classes; train one with: rayograph transfer --init RUN")
    return card


def _check(config: EvaluateConfig, cards: Mapping[str, ModelCard], selection: Selection) -> int:
    """Number of images of the models' lineages, where they are allowed."""
    classes = cards[config.model].classes
    for run, card in cards.items():
        other = sorted(set(card.classes) ^ set(classes))
        if other:
            raise UsageError(
                f"{run} and {config.model}: only one of them knows class {other[0]!r}, so they differ in task"
            )
    strange = sorted(set(selection.column("label")) - set(classes))
    if strange:
        raise UsageError(f"{config.data}: the model has no class {strange[0]!r}; its classes: {', '.join(classes)}")
    own, all_seen = own_images(selection), frozenset[str]()
    for run in cards:
        seen = own & seen_by(run)
        if seen and not config.allow_seen:
            raise UsageError(
                f"{config.data}: {len(seen):,} of {len(selection):,} images were seen in the (pre)training of {run}, "
                "so the figures would be too good\njudge on other images (--where), or accept it with --allow-seen"
            )
        all_seen |= seen
    return len(all_seen)


def _probabilities(
    config: EvaluateConfig, run: str, classes: list[str], dataset: Dataset, selection: Selection
) -> np.ndarray:
    """What the model of a RUN says of a selection, [M, K], in the order of `classes`."""
    model: Model = load_model(run, choose_device(config.device))
    parts = []
    step = 512
    with progress("evaluate", len(selection), "images") as bar:
        for at in range(0, len(selection), step):
            part = selection.take(np.arange(at, min(at + step, len(selection))))
            parts.append(model.probabilities(dataset.pixels(part), config.batch_size))
            bar.advance(len(part))
    return np.concatenate(parts)[:, [model.card.classes.index(name) for name in classes]]


def _judged(
    config: EvaluateConfig,
    classes: list[str],
    truth: np.ndarray,
    probabilities: np.ndarray,
    group: list[str],
    fold: np.ndarray,
    repeat: np.ndarray,
    temperature: float,
) -> Judged:
    found = metrics.summarise(truth, probabilities, group=group, fold=fold, repeat=repeat, seed=config.seed)
    rows = np.arange(len(truth))
    return Judged(
        classes=classes,
        rows=rows,
        truth=truth,
        probabilities=probabilities,
        raw=probabilities,
        fold=fold,
        repeat=repeat,
        metrics=dict(found),
        temperature=temperature,
    )


def _rivals(config: EvaluateConfig, found: _Evidence) -> dict[str, Rival]:
    if not found.others:
        return {}
    ours = found.judged
    rows: dict[str, Any] = {"group": found.group, "fold": ours.fold, "repeat": ours.repeat, "seed": config.seed}
    compared = compare(ours.truth, ours.probabilities, found.others, **rows)
    return {
        name: Rival(metrics.summarise(ours.truth, theirs, **rows), compared[name])
        for name, theirs in found.others.items()
    }


def _write_report(
    config: EvaluateConfig, out: OutDir, name: str, found: _Evidence, rivals: Mapping[str, Rival]
) -> None:
    figures_of(found.judged, out.path / "figures")
    comparison = None
    if rivals:
        figure = out.path / "figures" / "differences.png"
        draw_differences(figure, rivals)
        comparison = comparison_section(
            name,
            found.judged.metrics,
            rivals,
            images=found.images,
            groups=len(set(found.group)),
            repeats=found.protocol["repeats"],
            figure=figure,
        )
    write_evaluation_report(
        out.path, found.judged, before=found.before, comparison=comparison, caption=found.caption, images=config.images
    )


def _say_result(out: OutDir, name: str, judged: Judged, rivals: Mapping[str, Rival]) -> None:
    for other, rival in rivals.items():
        say(verdict(name, other, rival.comparison["metrics"][HEADLINE], len(rivals)))
    own = judged.metrics[HEADLINE]
    shown = with_interval(own["value"], own["ci95"])
    say(f"done: balanced accuracy {shown}, report in {out.name('report.html')}")
