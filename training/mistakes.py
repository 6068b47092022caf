"""The pictures that a report shows: the most confident mistakes and the least certain right answers, each beside where
the model looks. No name of a group, file or image is in them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from training import figures, report
from training.attention import WORDS

MISTAKES, HITS = 12, 6
"""Pictures shown at most."""
PER_GROUP = 2
"""Of one group at most: one odd patient must not fill the page."""

Maps = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(pixels [N, H, W, C], class indices [N]) -> maps [N, H, W] in 0..1, see `training.attention`."""


def confident_mistakes(
    truth: ArrayLike, probabilities: ArrayLike, groups: Sequence[str], rows: ArrayLike, most: int = MISTAKES
) -> np.ndarray:
    """Places [<= most] of wrong predictions, in the order of their confidence, the highest first.

    Args:
        truth, rows: [M] class indices, and the row of the data each prediction is of: a row that several repeats
            judged is taken once.
        probabilities: [M, C].
        groups: [M] names.

    Classes take turns, each giving its most confident mistake that is left; at most `PER_GROUP` of one group.
    """
    t, p = np.asarray(truth, dtype=np.int64), np.asarray(probabilities, dtype=np.float64)
    wrong = np.flatnonzero(p.argmax(axis=1) != t)
    order = wrong[np.argsort(-p.max(axis=1)[wrong], kind="stable")]
    return _spread(order, t, groups, np.asarray(rows), most)


def hesitant_hits(
    truth: ArrayLike, probabilities: ArrayLike, groups: Sequence[str], rows: ArrayLike, most: int = HITS
) -> np.ndarray:
    """Places [<= most] of right predictions, the least confident first; chosen as `confident_mistakes` are."""
    t, p = np.asarray(truth, dtype=np.int64), np.asarray(probabilities, dtype=np.float64)
    right = np.flatnonzero(p.argmax(axis=1) == t)
    order = right[np.argsort(p.max(axis=1)[right], kind="stable")]
    return _spread(order, t, groups, np.asarray(rows), most)


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
    pixels: np.ndarray,
    maps: Maps | None,
    method: str,
) -> report.Section:
    """The section "Mistakes"; `folder` holds mistakes.png and hesitant.png where there is something to show.

    Args:
        truth, probabilities, groups, rows: [M], see `confident_mistakes`; predictions made out of fold.
        pixels: uint8 [N, H, W, C], which `rows` index.
        maps: of the final model; None where it has none.
        method: a key of `training.attention.WORDS`, or "".
    """
    folder.mkdir(exist_ok=True)
    wrong = confident_mistakes(truth, probabilities, groups, rows)
    unsure = hesitant_hits(truth, probabilities, groups, rows)
    missed = int((probabilities.argmax(axis=1) != truth).sum())
    blocks: list[report.Block] = [
        report.Text(
            f"{missed:,} of {len(truth):,} judgements were wrong. What follows is not a sample of them but the worst: "
            "those in which the model was most sure of itself, classes in turns and at most "
            f"{PER_GROUP} pictures of one patient or group. Look for what they share: a class that two readers would "
            "not agree on either, a label that may be wrong, a picture of poor quality, a mark that has nothing to do "
            "with the disease."
        )
    ]
    if maps is not None:
        blocks.append(
            report.Text(
                "Beside each picture stands the same picture with a coloured layer, violet for little and yellow "
                f"for much. It is {WORDS[method]}. What was said, and how surely, is the judgement of a model that was "
                "not trained on the picture; the colours show where the final model looks, which was fitted again on "
                "all pictures, this one too. The layer does not say why the answer was wrong."
            )
        )
    for places, name, what in (
        (wrong, "mistakes.png", "The most confident mistakes"),
        (unsure, "hesitant.png", "Right answers of which the model was least certain"),
    ):
        if len(places):
            blocks += _gallery(folder / name, what, places, classes, truth, probabilities, pixels[rows[places]], maps)
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
    said, sure = probabilities[places].argmax(axis=1), probabilities[places].max(axis=1)
    overlays = None if maps is None else maps(pictures, said)
    captions, table = [], []
    for number, (at, name, probability) in enumerate(zip(places, said, sure, strict=True), 1):
        true, second = classes[truth[at]], int(np.argsort(-probabilities[at])[1])
        answer = [f"truth: {true}", f"said: {classes[name]}"] if truth[at] != name else [f"truth and said: {true}"]
        captions.append("\n".join([f"{number}   {probability:.2f}", *answer]))
        runner_up = f"{classes[second]} ({probabilities[at, second]:.2f})"
        table.append([str(number), true, classes[name], f"{probability:.2f}", runner_up])
    figures.overlays(pictures, overlays, captions, path)
    beside = ", each beside its map of where the final model looks" if overlays is not None else ""
    return [
        report.Figure(
            path,
            f"{len(places)} pictures of the data{beside}; the table that follows says what each is and was said to be.",
            f"{what}{beside}. The number after the picture's own is the probability the model gave to what it said.",
            contains_data=True,
        ),
        report.Table(
            ["picture", "truth", "the model said", "probability", "next likeliest"],
            table,
            f"{what}, in words",
        ),
    ]
