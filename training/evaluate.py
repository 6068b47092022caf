"""`evaluate`: models judged on labelled data that they have not seen, or compared by what they said out of fold."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from cluster.errors import UsageError
from cluster.outdir import OutDir
from cluster.progress import progress, say
from training import report
from training.artifact import (
    Model,
    ModelCard,
    card_sha256,
    load_model,
    located_model,
    model_folder,
    read_card,
    refuse_changed,
    run_name,
)
from training.compare import compare
from training.configs import EvaluateConfig
from training.dataset import Dataset, Selection, truth_of
from training.device import choose_device
from training.evaluation_report import (
    HEADLINE,
    Rival,
    comparison_section,
    draw_differences,
    verdict,
    write_evaluation_report,
)
from training.findings import statistics_of
from training.hits import hits_compared
from training.ingest import resolve_data
from training.judgement import Inner, Judged, of_units, summarise
from training.lineage import own_images, seen_by
from training.predictions import aligned, read_predictions, write_predictions, write_units
from training.probabilities import calibrated
from training.protocol import in_words, protocol_of
from training.report import with_interval
from training.results import counts_table, data_section, figures_of, unit_blocks
from training.tasks import pooling
from training.tasks.inputs import inputs_of, joined
from training.units import Units, pooled, units_of


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """A report at `config.out` judges the model, alone or against others; returns its summary.

    With `config.data`, all models judge its labelled images; without, the out-of-fold predictions of RUNs of
    `transfer` are compared, which must have judged the same images in the same folds.

    Raises:
        UsageError: a model has no classes, labels are not among them, images are of a model's lineage, or the RUNs
            were not judged alike.
    """
    runs = _named(config)
    models = {run: card_sha256(run) for run in runs.values()}
    with config.open_out("evaluate") as out:
        if out.state == "done":
            refuse_changed(config.out, out.summary(), models)
            return out.summary()
        started = time.monotonic()
        found = _out_of_fold(config, runs, out) if config.data is None else _unseen(config, config.data, runs, out)
        rivals = _rivals(config, found)
        name = next(iter(runs))
        asked: dict[str, Any] = {"by": config.by, "prevalence": config.prevalence, "seed": config.seed}
        after, more = statistics_of(found.judged, found.selection, **asked, chosen=OUT_OF_FOLD)
        rankings, kept = hits_compared(runs, seed=config.seed) if config.data is None else ([], {})
        _write_report(config, out, name, found, rivals, [*rankings, *after])
        summary = {
            "protocol": found.protocol,
            "images": found.images,
            "seen": found.seen,
            "models": models,
            "seconds": time.monotonic() - started,
            **more,
            "metrics": found.judged.metrics | more.get("metrics", {}),
        }
        if rivals:
            summary["against"] = {
                other: {"run": runs[other], "own": rival.metrics, **rival.comparison, **kept.get(other, {})}
                for other, rival in rivals.items()
            }
        out.finish(summary)
        _say_result(out, name, found.judged, rivals)
        return summary


@dataclass(frozen=True, eq=False)
class _Evidence:
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
    seen: int
    before: list[report.Section]
    caption: str
    selection: Selection
    """That the rows of `judged` index."""


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
    protocol = report.Section(
        "Protocol",
        [
            report.Text(
                f"{', '.join(runs)}: each judged on the same images in the same folds. {in_words(ours.config)} Every "
                "prediction is of an image that the fit which made it was not trained on."
            ),
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
    return _Evidence(
        by_unit,
        card.ordered,
        [groups[r] for r in by_unit.rows],
        pooled_others,
        said | protocol_of(units, config.pooling),
        len(images),
        0,
        [protocol, data],
        f"Out-of-fold predictions of {next(iter(runs))}",
        images,
    )


OUT_OF_FOLD = "on what the run had said, out of fold, of the images that it was trained on"
_OF_UNITS = ("unit", "pooling", "units", "units_left_out")
_LEAK = (
    "Split by image: pictures of one patient stand on both sides, so the figures of all models are too good, and the "
    "difference between them is of models that may know the patient. Judge by --split group."
)


def _unseen(config: EvaluateConfig, data: str, runs: Mapping[str, str], out: OutDir) -> _Evidence:
    cards = {run: _card(run) for run in runs.values()}
    _require_comparable(config, cards)
    size = [
        max(side) for side in zip(*((c.image_path.height, c.image_path.width) for c in cards.values()), strict=True)
    ]
    dataset = resolve_data(data, out=config.out, image_size=f"{size[0]}x{size[1]}", images=config.images)
    card = cards[config.model]
    _require_same_inputs(config, cards)
    labelled = dataset.select(config.where, labelled=True)
    selection = Selection(joined(labelled.table, card.inputs, card.input_column))
    classes = list(card.classes)
    seen = _check(config, cards, selection)
    labels, groups = selection.column("label"), selection.column("group")
    units = units_of(config.unit, labels, selection.column("case"), groups)
    truth = truth_of(labels, classes, several=card.activation == "sigmoid")
    said = [_probabilities(config, run, classes, dataset, selection, units) for run in runs.values()]
    zeros = np.zeros(len(truth), dtype=np.int64)
    rows = np.arange(len(truth))
    by_image = _judged(config, card, classes, truth, said[0].images, rows=rows, fold=zeros, repeat=zeros, groups=groups)
    if config.pooling == "attention":
        standing = units.first[units.judged]
        zeros = np.zeros(len(standing), dtype=np.int64)
        place: dict[str, Any] = {"rows": standing, "fold": zeros, "repeat": zeros, "groups": groups}
        judged = _judged(config, card, classes, truth[standing], said[0].units, **place)
        others = [one.units for one in said[1:]]
    else:
        judged = _of_units(config, card, by_image, units, groups)
        others = [_mean(units, by_image, one.images) for one in said[1:]]
    _write_judged(config, out, selection, by_image, judged, units)
    if config.unit == "image" and not judged.several:
        judged = replace(judged, inner=_out_of_fold_of(config.model, classes))
    protocol: list[report.Block] = [
        report.Text(
            f"{', '.join(runs)}: judged on images not seen in training; intervals come from a bootstrap over groups. "
            "Images are compared by their bytes with those of each model's training and pretraining."
        ),
        *unit_blocks(units, config.pooling),
    ]
    if seen:
        words = f"{seen:,} of these images are of a model's own lineage: the figures are too good."
        protocol.append(report.Warning(words))
    return _Evidence(
        judged,
        card.ordered,
        [groups[r] for r in judged.rows],
        dict(zip(list(runs)[1:], others, strict=True)),
        {"split": "unseen", "folds": 1, "repeats": 1, "groups": len(set(groups))} | protocol_of(units, config.pooling),
        len(selection),
        seen,
        [report.Section("Protocol", protocol), data_section(dataset, selection, classes)],
        f"Predictions of {next(iter(runs))} as it is served",
        selection,
    )


def _out_of_fold_of(run: str, classes: list[str]) -> dict[tuple[int, int], Inner]:
    """What the RUN said of its own images out of fold: what thresholds may be chosen on. A model folder has none."""
    try:
        found = read_predictions(run)
    except UsageError:
        return {}
    order = [found.classes.index(name) for name in classes]
    truth = np.argsort(order)[found.truth]
    return {(0, 0): Inner(truth, found.probabilities[:, order], np.arange(len(truth)))}


def _require_comparable(config: EvaluateConfig, cards: Mapping[str, ModelCard]) -> None:
    several = next((run for run, card in cards.items() if card.activation == "sigmoid"), None)
    if config.against and several is not None:
        raise UsageError(f"{several}: judges label sets, which are not compared; evaluate it without --against")


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


def _check(config: EvaluateConfig, cards: Mapping[str, ModelCard], selection: Selection) -> int:
    """Number of images of the models' lineages, where they are allowed."""
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


class _Said(NamedTuple):
    """Calibrated probabilities of a model, its classes in the order that is asked for."""

    images: np.ndarray
    """[N, K], of every row of the selection."""
    units: np.ndarray
    """[U, K], by attention, of the units with a label; none of them where another pooling is asked for."""


def _probabilities(
    config: EvaluateConfig, run: str, classes: list[str], dataset: Dataset, selection: Selection, units: Units
) -> _Said:
    """What the model of a RUN says of a selection."""
    model: Model = load_model(run, choose_device(config.device))
    width = len(classes)
    pooler = _pooler(run, _dimension(model), width) if config.pooling == "attention" else None
    features, parts = [], []
    step = 512
    card = model.card
    inputs = inputs_of(selection.table, card.inputs, card.input_column) if card.inputs else None
    with progress("evaluate", len(selection), "images") as bar:
        for at in range(0, len(selection), step):
            part = np.arange(at, min(at + step, len(selection)))
            pixels = dataset.pixels(selection.take(part))
            features.append(model.embed(pixels, config.batch_size))
            if inputs is not None:
                parts.append(model.answers(features[-1], pixels, inputs.of_row[part]))
            else:
                parts.append(model.classify(features[-1], pixels))
            bar.advance(len(part))
    said = np.concatenate(parts)
    said = said if inputs is None else model.classify_cases(said, inputs)
    order = [model.card.classes.index(name) for name in classes]
    by_unit = np.empty((0, width))
    if pooler is not None:
        raw = pooler.probabilities(np.concatenate(features), units.of_row)[units.judged]
        by_unit = calibrated(raw, pooler.temperature, several=pooler.several)[:, order]
    return _Said(said[:, order], by_unit)


def _dimension(model: Model) -> int:
    path = model.card.image_path
    blank = np.zeros((1, path.height, path.width, model.card.input.channels), dtype=np.uint8)
    return int(model.embed(blank).shape[1])


def _pooler(run: str, dimension: int, classes: int) -> pooling.Pooler:
    file = model_folder(run) / pooling.FILE
    if not file.is_file():
        raise UsageError(
            f"--pooling attention: {run} has none; use --pooling mean, or transfer with --pooling attention"
        )
    return pooling.load_pooler(file.read_bytes(), dimension, classes)


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


def _rivals(config: EvaluateConfig, found: _Evidence) -> dict[str, Rival]:
    if not found.others:
        return {}
    ours = found.judged
    rows: dict[str, Any] = {"group": found.group, "fold": ours.fold, "repeat": ours.repeat, "seed": config.seed}
    compared = compare(ours.truth, ours.probabilities, found.others, **rows)
    return {
        name: Rival(summarise(ours.truth, theirs, ordered=found.ordered, **rows), compared[name])
        for name, theirs in found.others.items()
    }


def _write_report(
    config: EvaluateConfig,
    out: OutDir,
    name: str,
    found: _Evidence,
    rivals: Mapping[str, Rival],
    after: Sequence[report.Section],
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
            images=len(np.unique(found.judged.rows)),
            unit=config.unit,
            groups=len(set(found.group)),
            repeats=found.protocol["repeats"],
            figure=figure,
        )
    write_evaluation_report(
        out.path,
        found.judged,
        before=found.before,
        comparison=comparison,
        after=after,
        caption=found.caption,
        images=config.images,
    )


def _say_result(out: OutDir, name: str, judged: Judged, rivals: Mapping[str, Rival]) -> None:
    for other, rival in rivals.items():
        say(verdict(name, other, rival.comparison["metrics"][HEADLINE], len(rivals)))
    own = judged.metrics[HEADLINE]
    shown = with_interval(own["value"], own["ci95"])
    say(f"done: balanced accuracy {shown}, report in {out.name('report.html')}")
