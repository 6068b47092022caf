"""The pictures that a report shows: the most confident mistakes and the least certain right answers, each beside where
the model looks. No name of a group, file or image is in them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from training import figures, report
from training.attention import WORDS
from training.dataset import label_of
from training.probabilities import HALF

MISTAKES, HITS = 12, 6
"""Pictures shown at most."""
PER_GROUP = 2
"""Of one group at most: one odd patient must not fill the page."""

Pictures = Callable[[np.ndarray], np.ndarray]
"""Rows [n] of the data -> their pictures uint8 [n, H, W, C]."""
Maps = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(pixels [N, H, W, C], class indices [N]) -> maps [N, H, W] in 0..1, see `training.attention`."""
OUT_OF_FOLD = (
    "What was said, and how surely, is the judgement of a model that was not trained on the picture; the colours show "
    "where the final model looks, which was fitted again on all pictures, this one too."
)


def confident_mistakes(
    truth: ArrayLike, probabilities: ArrayLike, groups: Sequence[str], rows: ArrayLike, most: int = MISTAKES
) -> np.ndarray:
    """Places [<= most] of wrong predictions, in the order of their confidence, the highest first.

    Args:
        truth, rows: [M] class indices or label sets bool [M, C], and the row of the data each prediction is of: a row
            that several repeats judged is taken once.
        probabilities: [M, C].
        groups: [M] names.

    Classes take turns, each giving its most confident mistake that is left; at most `PER_GROUP` of one group. Of a
    label set what counts is the label that is wrong most surely.
    """
    t, p = np.asarray(truth), np.asarray(probabilities, dtype=np.float64)
    if t.ndim == 2:
        surest, label = _surest_wrong(t, p)
        order = np.flatnonzero(surest > 0)
        return _spread(order[np.argsort(-surest[order], kind="stable")], label, groups, np.asarray(rows), most)
    wrong = np.flatnonzero(p.argmax(axis=1) != t)
    order = wrong[np.argsort(-p.max(axis=1)[wrong], kind="stable")]
    return _spread(order, t, groups, np.asarray(rows), most)


def hesitant_hits(
    truth: ArrayLike, probabilities: ArrayLike, groups: Sequence[str], rows: ArrayLike, most: int = HITS
) -> np.ndarray:
    """Places [<= most] of right predictions, the least confident first; chosen as `confident_mistakes` are.

    A label set is right as a whole, and as sure as the label that is said least surely.
    """
    t, p = np.asarray(truth), np.asarray(probabilities, dtype=np.float64)
    if t.ndim == 2:
        sureness = _sureness(p)
        order = np.flatnonzero(((p >= HALF) == t).all(axis=1))
        order = order[np.argsort(sureness.min(axis=1)[order], kind="stable")]
        return _spread(order, sureness.argmin(axis=1), groups, np.asarray(rows), most)
    right = np.flatnonzero(p.argmax(axis=1) == t)
    order = right[np.argsort(p.max(axis=1)[right], kind="stable")]
    return _spread(order, t, groups, np.asarray(rows), most)


def _sureness(probabilities: np.ndarray) -> np.ndarray:
    """[M, C] probability of what is said of each label by itself, a half to 1."""
    return np.asarray(np.maximum(probabilities, 1 - probabilities))


def _surest_wrong(truth: np.ndarray, probabilities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(sureness [M] of the label that is wrong most surely, 0 where none is; that label [M])."""
    sureness = np.where((probabilities >= HALF) != truth, _sureness(probabilities), 0.0)
    return sureness.max(axis=1), sureness.argmax(axis=1)


def _spread(order: np.ndarray, truth: np.ndarray, groups: Sequence[str], rows: np.ndarray, most: int) -> np.ndarray:
    """Of places in order of interest, at most `most`: classes in turns, `PER_GROUP` of a group, a row once."""
    queues = {int(c): [int(at) for at in order if truth[at] == c] for c in dict.fromkeys(truth[order])}
    taken: list[int] = []
    shown: dict[str, int] = {}
    seen: set[int] = set()
    while any(queues.values()) and len(taken) < most:
        for queue in queues.values():
            while queue:
                at = queue.pop(0)
                if int(rows[at]) not in seen and shown.get(groups[at], 0) < PER_GROUP:
                    taken.append(at)
                    seen.add(int(rows[at]))
                    shown[groups[at]] = shown.get(groups[at], 0) + 1
                    break
            if len(taken) == most:
                break
    place = {int(at): rank for rank, at in enumerate(order)}
    return np.asarray(sorted(taken, key=place.__getitem__), dtype=np.int64)


def mistakes_section(
    folder: Path,
    *,
    classes: Sequence[str],
    truth: np.ndarray,
    probabilities: np.ndarray,
    groups: Sequence[str],
    rows: np.ndarray,
    pixels: Pictures,
    maps: Maps | None,
    method: str,
    judged: str = "",
    whose: str = OUT_OF_FOLD,
) -> report.Section:
    """The section "Mistakes"; `folder` holds mistakes.png and hesitant.png where there is something to show.

    Args:
        truth, probabilities, groups, rows: [M], see `confident_mistakes`.
        pixels: gives the pictures uint8 [n, H, W, C] of some of `rows`.
        maps: of the final model; None where it has none.
        method: a key of `training.attention.WORDS`, or "".
        judged: of what, where the report's figures are of something else, such as "images".
        whose: sentences on whose the judgements are, and whose the maps.
    """
    folder.mkdir(exist_ok=True)
    wrong = confident_mistakes(truth, probabilities, groups, rows)
    unsure = hesitant_hits(truth, probabilities, groups, rows)
    several = truth.ndim == 2
    missed = int((_surest_wrong(truth, probabilities)[0] > 0 if several else _said(probabilities) != truth).sum())
    of, what_is_wrong = f" of single {judged}" if judged else "", " in a label at least" if several else ""
    blocks: list[report.Block] = [
        report.Text(
            f"{missed:,} of {len(truth):,} judgements{of} were wrong{what_is_wrong}. What follows is not a sample of "
            "them but the worst: those in which the model was most sure of itself, classes in turns and at most "
            f"{PER_GROUP} pictures of one patient or group. Look for what they share: a class that two readers would "
            "not agree on either, a label that may be wrong, a picture of poor quality, a mark that has nothing to do "
            "with the disease."
        )
    ]
    if maps is not None:
        blocks.append(
            report.Text(
                "Beside each picture stands the same picture with a coloured layer, violet for little and yellow "
                f"for much. It is {WORDS[method]}. {whose} The layer does not say why the answer was wrong."
            )
        )
    for places, name, what in (
        (wrong, "mistakes.png", "The most confident mistakes"),
        (unsure, "hesitant.png", "Right answers of which the model was least certain"),
    ):
        if len(places):
            blocks += _gallery(folder / name, what, places, classes, truth, probabilities, pixels(rows[places]), maps)
    if not len(wrong):
        blocks.append(report.Text("There was no mistake to show."))
    return report.Section("Mistakes", blocks)


def _gallery(
    path: Path,
    what: str,
    places: np.ndarray,
    classes: Sequence[str],
    truth: np.ndarray,
    probabilities: np.ndarray,
    pictures: np.ndarray,
    maps: Maps | None,
) -> list[report.Block]:
    several = truth.ndim == 2
    asked, captions, table = [], [], list[list[report.Cell]]()
    for number, at in enumerate(places, 1):
        line = (_label_line if several else _class_line)(classes, truth[at], probabilities[at])
        asked.append(line.asked)
        about = f" {line.more[0]}" if several else ""
        said = f"truth: {line.truth or 'none'}\nsaid: {line.said or 'none'}"
        captions.append(f"{number}   {line.probability:.2f}{about}\n{said}")
        table.append([str(number), line.truth, line.said, *line.more])
    overlays = None if maps is None else maps(pictures, np.asarray(asked))
    figures.overlays(pictures, overlays, captions, path)
    beside = ", each beside its map of where the model looks" if overlays is not None else ""
    meant = "of the label named after it" if several else "the model gave to what it said"
    return [
        report.Figure(
            path,
            f"{len(places)} pictures of the data{beside}; the table that follows says what each is and was said to be.",
            f"{what}{beside}. The number after the picture's own is the probability {meant}.",
            contains_data=True,
        ),
        report.Table(
            ["picture", "truth", "the model said", *(LABEL_HEADERS if several else CLASS_HEADERS)],
            table,
            f"{what}, in words",
        ),
    ]


CLASS_HEADERS = ("probability", "next likeliest")
LABEL_HEADERS = ("the label in question", "its probability")


class _Line(NamedTuple):
    """What is told of a picture; `asked` is the class that its map is of."""

    truth: str
    said: str
    probability: float
    asked: int
    more: tuple[str, ...]


def _class_line(classes: Sequence[str], truth: np.ndarray, probabilities: np.ndarray) -> _Line:
    said, second = (int(place) for place in np.argsort(-probabilities, kind="stable")[:2])
    sure, runner_up = float(probabilities[said]), f"{classes[second]} ({probabilities[second]:.2f})"
    return _Line(classes[int(truth)], classes[said], sure, said, (f"{sure:.2f}", runner_up))


def _label_line(classes: Sequence[str], truth: np.ndarray, probabilities: np.ndarray) -> _Line:
    """The label in question is the one that is wrong most surely, or, where none is, the one least sure."""
    surest, label = _surest_wrong(truth[None], probabilities[None])
    at = int(label[0]) if surest[0] > 0 else int(_sureness(probabilities).argmin())
    own = float(probabilities[at])
    said = label_of(probabilities >= HALF, classes)
    return _Line(label_of(truth, classes), said, own, at, (classes[at], f"{own:.2f}"))


def _said(probabilities: np.ndarray) -> np.ndarray:
    return np.asarray(probabilities.argmax(axis=1))
