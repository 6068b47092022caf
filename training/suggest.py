"""`suggest`: which unlabelled images are worth a label next, and which labels look wrong."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cluster import storage
from cluster.errors import UsageError
from cluster.progress import say
from cluster.session import cores, session
from training import choose
from training.artifact import Model, ModelCard, card_sha256, load_model, read_card, refuse_changed, run_name
from training.configs import InferenceConfig, SuggestConfig
from training.dataset import Dataset, Selection, own_group
from training.domain import look_of
from training.doubt import doubts, neighbour_probabilities
from training.images import to_channels
from training.inference import embed, embedding_key
from training.ingest import resolve_data
from training.lineage import labelled_by, seen_by, short_digests
from training.suggestions import (
    ALIKE,
    DOUBT,
    GUESS,
    LOOK_AGAIN,
    SHEET_IMAGES,
    TO_LABEL,
    Sheet,
    Suggestion,
    Told,
    write_list,
    write_suggestions_report,
)

PREDICTIONS = "predictions.parquet"
CROSS_VALIDATION, MODEL, NEIGHBOURS, NOTHING = "cross-validation", "model", "neighbours", "nothing"
"""What a label was judged by: the RUN's own out-of-fold predictions, the model, which has never seen the image nor its
group, the labels of the most similar images of other groups, or nothing, where the label itself shaped the features."""

HOW = (
    "Those without a label were sorted into kinds by their looks. Of each kind that has no label yet, the largest "
    "first, the image most like the others was taken. No group (patient, slide) is asked more often than allowed: ten "
    "pictures of one patient teach little more than one. Images that a model is unsure of were tried instead, and "
    "taught no more than images drawn by chance. Typical is not the same as useful: where the images are of another "
    "origin than the labelled ones, a large kind may be empty or out of focus. Pass over those."
)
LOOKED_AT = 1024
"""Images whose pixels are held at once."""


@dataclass(frozen=True, eq=False)
class Rows:
    """The ok rows of a dataset, by what is known of them; `disputed` are those whose copies carry different labels."""

    selection: Selection
    labels: np.ndarray
    groups: np.ndarray
    labelled: np.ndarray
    unlabelled: np.ndarray
    disputed: np.ndarray

    @property
    def several(self) -> bool:
        """Whether an image carries several labels at once."""
        return any("|" in label for label in self.labels[self.labelled])


def suggest(config: SuggestConfig) -> dict[str, Any]:
    """`config.out` holds what to label next and which labels look wrong; returns its summary.

    Raises:
        UsageError: no such model or data, or there is nothing to suggest.
    """
    models = {config.model: card_sha256(config.model)}
    with config.open_out("suggest") as out:
        if out.state == "done":
            refuse_changed(config.out, out.summary(), models)
            return out.summary()
        started = time.monotonic()
        card, _ = read_card(config.model)
        size = f"{card.image_path.height}x{card.image_path.width}"
        dataset = resolve_data(config.data, out=config.out, image_size=size, images=config.images)
        rows = sort_out(dataset, dataset.select(config.where))
        _require_some(config, rows)
        features = kept_features(config, dataset, rows.selection, out.log)
        model = load_model(config.model)
        strange = _strange(config, model, dataset, rows, features)
        next_ones, how = _to_label(config, model, dataset, rows, features, strange)
        wrong, judged = _look_again(config, model, dataset, rows, features)
        columns = ALIKE if card.head == "none" or card.inputs else ALIKE + GUESS
        first = Sheet(TO_LABEL, columns, next_ones, _pixels(dataset, rows, next_ones))
        second = Sheet(LOOK_AGAIN, DOUBT, wrong, _pixels(dataset, rows, wrong))
        groups = len(set(rows.groups[rows.unlabelled]))
        told = Told(run_name(config.model), len(rows.labelled), len(rows.unlabelled), groups, how, judged)
        for sheet in (first, second):
            write_list(out.path, rows.selection, sheet)
        write_suggestions_report(out.path, first, second, told, images=config.images)
        summary = {
            "images": len(rows.selection),
            "labelled": len(rows.labelled),
            "unlabelled": len(rows.unlabelled),
            "disputed": len(rows.disputed),
            "unlabelled_groups": groups,
            "left_out": int(strange.sum()),
            "to_label": len(next_ones),
            "look_again": len(wrong),
            "models": models,
            "seconds": time.monotonic() - started,
        }
        out.finish(summary)
        say(
            f"done: {len(next_ones):,} images worth labelling, {len(wrong):,} labels that look wrong, "
            f"report in {out.name('report.html')}"
        )
        return summary


def sort_out(dataset: Dataset, selection: Selection) -> Rows:
    """The rows of `selection` by what is known of them; an image without a group is its own."""
    labels = np.asarray(selection.column("label"), dtype=object).astype(str)
    pairs = zip(selection.column("group"), selection.column("image_id"), strict=True)
    groups = np.asarray([own_group(group, image) for group, image in pairs], dtype=object).astype(str)
    conflicts = {path for paths in dataset.info.get("conflicting_copies", []) for path in paths}
    conflicting = np.asarray([path in conflicts for path in selection.column("path")], dtype=bool)
    without = labels == ""
    return Rows(
        selection,
        labels,
        groups,
        labelled=np.flatnonzero(~without),
        unlabelled=np.flatnonzero(without & ~conflicting),
        disputed=np.flatnonzero(without & conflicting),
    )


def _require_some(config: SuggestConfig, rows: Rows) -> None:
    if not len(rows.unlabelled):
        say(f"note: {config.data} has no unlabelled image, so none is suggested for labelling")
        kinds = set(rows.labels[rows.labelled])
        if len(kinds) < 2 and not len(rows.disputed):
            raise UsageError(
                f"{config.data}: nothing to suggest: no image is without a label, and labels of a single class "
                "cannot look wrong"
            )
    elif not len(rows.labelled):
        say(f"note: {config.data} has no label, so none can look wrong")


def kept_features(config: SuggestConfig, dataset: Dataset, selection: Selection, log: Path) -> np.ndarray:
    """Features float32 [N, D] of a selection under the model, kept beside `--out` by model and data."""
    _, hashes = read_card(config.model)
    key = embedding_key(hashes, dataset, selection.column("image_id"))
    place = storage.workplace(config.out) / f".{storage.name_of(config.data)}-{key}.embeddings.parquet"
    if place.is_file():
        say(f"features of {len(selection):,} images: kept from before")
    else:
        wanted = InferenceConfig(
            dataset.uri, model=config.model, out=str(place), where=config.where, device=config.device
        )
        with session(cpus=cores() + 2, log=log):
            embed(wanted)
    table = pq.read_table(place, columns=["image_id", "embedding"])
    order = pc.index_in(pa.array(selection.column("image_id")), table["image_id"].combine_chunks())
    lists = table["embedding"].take(order).combine_chunks()
    return np.asarray(lists.flatten().to_numpy().reshape(len(lists), -1), dtype=np.float32)


# What to label


def unlike(model: Model, dataset: Dataset, selection: Selection, features: np.ndarray) -> np.ndarray:
    """bool [N]: which images of a selection, with these features [N, D], `in_domain` of the service would call unlike
    the model's training set. None of them where the model keeps no domain."""
    found = np.zeros(len(selection), dtype=bool)
    if model.domain is None:
        return found
    for at in range(0, len(selection), LOOKED_AT):
        part = np.arange(at, min(at + LOOKED_AT, len(selection)))
        pixels = to_channels(dataset.pixels(selection.take(part)), model.card.input.channels)
        found[part] = model.domain.judge(features[part], look_of(pixels))[0] < model.domain.limit
    return found


def _strange(config: SuggestConfig, model: Model, dataset: Dataset, rows: Rows, features: np.ndarray) -> np.ndarray:
    """Which of the unlabelled rows are left out as unlike the model's training set, and says so: bool [U]."""
    pool = rows.unlabelled
    if config.unlike:
        return np.zeros(len(pool), dtype=bool)
    found = unlike(model, dataset, rows.selection.take(pool), features[pool])
    if found.any():
        say(
            f"note: {found.sum():,} of {len(pool):,} unlabelled images left out as unlike the labelled images that "
            "the model was trained on; --unlike suggests them too"
        )
    return found


def _how(config: SuggestConfig, model: Model, strange: np.ndarray) -> str:
    """In words how the images to label were chosen, where there were any to choose from."""
    if config.unlike:
        return f"{HOW} Images unlike the labelled ones were asked for (--unlike) and are among them."
    if model.domain is None:
        return f"{HOW} The model keeps no record of labelled images, so none could be left out as unlike them."
    return (
        f"{HOW} Left out as unlike the labelled images that the model was trained on: {strange.sum():,} of "
        f"{len(strange):,}, such as empty fields, another stain or another device. Where the model is to learn such "
        "images too, --unlike suggests them."
    )


def _classified(model: Model, dataset: Dataset, rows: Rows, chosen: np.ndarray, features: np.ndarray) -> np.ndarray:
    """Probabilities [C, K] of the rows `chosen`; their pixels are read where the model takes more than features."""
    pixels = dataset.pixels(rows.selection.take(chosen)) if model.needs_pixels else None
    return model.classify(features[chosen], pixels)


def _to_label(
    config: SuggestConfig, model: Model, dataset: Dataset, rows: Rows, features: np.ndarray, strange: np.ndarray
) -> tuple[list[Suggestion], str]:
    """(the images worth labelling, in words how they were chosen)."""
    if not len(rows.unlabelled):
        return [], "Every image has a label already, so there is none to suggest."
    pool, how = rows.unlabelled[~strange], _how(config, model, strange)
    if not len(pool):
        return [], how
    budget = choose.Budget(config.n, config.per_group, config.seed)
    chosen, sizes = choose.typical(features, rows.labelled, pool, rows.groups, budget)
    known = model.card.head != "none" and not model.card.inputs
    guesses = np.empty((len(chosen), 0))
    if known:
        guesses = _classified(model, dataset, rows, chosen, features)
    found = [
        _suggestion(int(row), int(size), guess, model.card)
        for row, size, guess in zip(chosen, sizes, guesses, strict=True)
    ]
    if len(found) < config.n:
        say(
            f"note: {len(found):,} of --n {config.n:,} images suggested: there are {len(pool):,} to choose from, of "
            f"{len(set(rows.groups[pool])):,} groups, and of each at most --per-group {config.per_group}"
        )
    return found, how


def _suggestion(row: int, size: int, probabilities: np.ndarray, card: ModelCard) -> Suggestion:
    """One image to label; without classes nothing is guessed."""
    classes = card.classes
    reason, alike = f"typical of {size:,} images that look alike", f"one of {size:,} alike"
    if not classes:
        return Suggestion(row, reason, alike, (size,))
    first, second = np.argsort(-probabilities, kind="stable")[:2]
    guesses = (classes[first], float(probabilities[first]), classes[second], float(probabilities[second]))
    of = choose.label_uncertainty if card.activation == "sigmoid" else choose.uncertainty
    uncertainty = float(of(probabilities[None])[0])
    shown = f"{alike}\n{_leaf(classes[first])} {guesses[1]:.0%}\n{_leaf(classes[second])} {guesses[3]:.0%}"
    return Suggestion(row, reason, shown, (size, *guesses, uncertainty))


def _leaf(name: str) -> str:
    return name.rpartition("/")[2]


# Which labels look wrong


def _look_again(
    config: SuggestConfig, model: Model, dataset: Dataset, rows: Rows, features: np.ndarray
) -> tuple[list[Suggestion], str]:
    """(the labels that look wrong, in words what they were judged by)."""
    disputed = [
        Suggestion(int(row), "copies of this image carry different labels", "copies disagree", ("", "", "", "", ""))
        for row in rows.disputed[: config.n]
    ]
    also = f" {len(disputed):,} more stand first because copies of them carry different labels." if disputed else ""
    names = rows.labels[rows.labelled]
    if rows.several or model.card.activation == "sigmoid":
        return disputed, "Images with several labels at once are not judged yet." + also
    if len(set(names)) < 2:
        return disputed, "There are labels of fewer than two classes, so none can look wrong." + also
    classes, probabilities, by = held_out(config.model, model, dataset, rows, features)
    fair = by != NOTHING
    if not fair.all():
        untold = (
            f"{(~fair).sum():,} labels were not judged: the model's network was trained with them, and no model that "
            "was trained without them has said anything of their images."
        )
        say(f"note: {untold}")
        also += f" {untold}"
    if not fair.any():
        return disputed, "No label could be judged." + also
    labelled, names, probabilities, by = rows.labelled[fair], names[fair], probabilities[fair], by[fair]
    y = np.searchsorted(classes, names)
    found = doubts(probabilities, y)
    suspects = [
        _doubt(int(labelled[at]), (classes[own], classes[rival]), probabilities[at, [own, rival]], str(by[at]))
        for at, own, rival in zip(found.rows, y[found.rows], found.rivals, strict=True)
    ]
    agreed = float((probabilities.argmax(axis=1) == y).mean())
    share = len(suspects) / len(names)
    words = (
        f"Each of the {len(names):,} labels was compared with what its image looks like {_judges(by)}. Of "
        f"{len(suspects):,} ({share:.0%}) another class looks as likely as it does for images that carry it (confident "
        "learning, Northcutt et al., 2021); the least believable stand first. What judges them agrees with "
        f"{agreed:.0%} of all labels: the lower this is, the more of the list are hard images with a right label."
        + also
    )
    return (disputed + suspects)[: config.n], words


def _judges(by: np.ndarray) -> str:
    said = {
        CROSS_VALIDATION: "to models of the run's cross-validation that were trained without it and its group",
        MODEL: "to the model, which has seen neither it nor its group",
        NEIGHBOURS: "by the labels of the 20 most similar images of other groups",
    }
    return ", or ".join(words for name, words in said.items() if (by == name).any())


def _doubt(row: int, pair: tuple[str, str], probabilities: np.ndarray, by: str) -> Suggestion:
    given, rival = pair
    own, other = (float(p) for p in probabilities)
    caption = f"{_leaf(given)} {own:.0%}\nlike {_leaf(rival)} {other:.0%}"
    return Suggestion(row, f"looks like {rival}", caption, (given, rival, own, other, by))


def held_out(
    run: str, model: Model, dataset: Dataset, rows: Rows, features: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(classes [K] sorted, probabilities [L, K] of the labelled rows, made without their labels, what made each [L]).

    The RUN's out-of-fold predictions where it has them, else the model's own answer where neither the image nor its
    group was seen in training, else `neighbour_probabilities`. Neighbours alone where labels are not the model's. Of
    images whose labels the model's network was trained with there are none but out-of-fold ones, else NaN: under its
    features they lie where their labels put them.
    """
    names, groups = rows.labels[rows.labelled], rows.groups[rows.labelled]
    ours = set(names) <= set(model.card.classes)
    classes = np.asarray(sorted(model.card.classes) if ours else sorted(set(names)))
    own = features[rows.labelled]
    by = np.full(len(names), NEIGHBOURS, dtype=object)
    probabilities = np.full((len(names), len(classes)), np.nan)
    if ours:
        order = [model.card.classes.index(name) for name in classes]
        predicted = out_of_fold(run, model.card.classes)
        seen = seen_by(run)
        old = np.asarray([digest in seen for digest in short_digests(rows.selection.take(rows.labelled))])
        ids = rows.selection.take(rows.labelled).column("image_id")
        covered = old & np.asarray([image in predicted for image in ids])
        fresh = ~old & ~np.isin(groups, groups[old]) & (not model.card.inputs)
        if fresh.any():
            probabilities[fresh] = _classified(model, dataset, rows, rows.labelled[fresh], features)[:, order]
        for at in np.flatnonzero(covered):
            probabilities[at] = predicted[ids[at]][order]
        by[fresh], by[covered] = MODEL, CROSS_VALIDATION
    learnt, digests = labelled_by(run), short_digests(rows.selection.take(rows.labelled))
    taught = np.asarray([digest in learnt for digest in digests], dtype=bool)
    by[taught & (by == NEIGHBOURS)] = NOTHING
    rest = np.flatnonzero(by == NEIGHBOURS)
    if len(rest):
        labels = np.searchsorted(classes, names)
        probabilities[rest] = neighbour_probabilities(own, labels, groups, len(classes), rest)
    return classes, probabilities, by


def out_of_fold(run: str, classes: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Mean probabilities [K] over the repeats of each image that a RUN's cross-validation judged, by its id."""
    inside = storage.name_of(run) == "model"  # of a RUN its model folder was given
    place = storage.sibling(run, PREDICTIONS) if inside else storage.join(run, PREDICTIONS)
    if not storage.exists(place):
        return {}
    table = pq.read_table(pa.BufferReader(storage.read_bytes(place)))
    values = np.stack([table[name].to_numpy() for name in classes], axis=1)
    ids, member, counts = np.unique(
        np.asarray(table["image_id"].to_pylist(), dtype=str), return_inverse=True, return_counts=True
    )
    total = np.zeros((len(ids), len(classes)))
    np.add.at(total, member, values)
    return dict(zip(ids.tolist(), total / counts[:, None], strict=True))


def _pixels(dataset: Dataset, rows: Rows, found: list[Suggestion]) -> np.ndarray:
    return dataset.pixels(rows.selection.take([one.row for one in found[:SHEET_IMAGES]]))
