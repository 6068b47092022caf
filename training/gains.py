"""What each stage of a chain gave the target: metrics before and after it, paired, as numbers and for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from cluster.errors import RayographError
from training import figures, report
from training.compare import Difference, differences
from training.dataset import truth_of
from training.overlap import Overlap

HEADLINE = "balanced_accuracy"

Gain = Mapping[str, Difference]


@dataclass(frozen=True)
class Predictions:
    """The rows of a `predictions.parquet` or `units.parquet`, sorted by repeat and image or unit."""

    keys: list[tuple[int, str]]
    fold: list[int]
    groups: list[str]
    truth: np.ndarray
    """Class numbers [M], or label sets bool [M, K]."""
    probabilities: np.ndarray
    """[M, K]"""

    @classmethod
    def read(cls, path: Path, classes: Sequence[str], *, several: bool) -> Predictions:
        table = pq.read_table(path)
        name = "unit" if "unit" in table.column_names else "image_id"
        table = table.sort_by([("repeat", "ascending"), (name, "ascending")])
        probabilities = np.stack([table[name].to_numpy() for name in classes], axis=1)
        truth = truth_of(table["truth"].to_pylist(), classes, several=several)
        keys = list(zip(table["repeat"].to_pylist(), table[name].to_pylist(), strict=True))
        return cls(keys, table["fold"].to_pylist(), table["group"].to_pylist(), truth, probabilities)


def gain_between(before: Path, after: Path, classes: Sequence[str], *, several: bool = False, seed: int) -> Gain:
    """Each metric after less before, `{name: {difference, ci95, p}}`: see `training.compare.differences`.

    Both files hold predictions of the same images, or units, in the same folds; `classes` are in their order. With
    `several` labels per image the metrics are those of `training.multilabel`.

    Raises:
        RayographError: the two are not of the same images in the same folds.
    """
    first, second = (Predictions.read(path, classes, several=several) for path in (before, after))
    if (first.keys, first.fold) != (second.keys, second.fold) or not np.array_equal(first.truth, second.truth):
        raise RayographError(f"{after} and {before}: not of the same images in the same folds, so no pairs")
    repeat = [key[0] for key in first.keys]
    rows: dict[str, Any] = {"group": first.groups, "fold": first.fold, "repeat": repeat, "seed": seed}
    (found,) = differences(first.truth, second.probabilities, [first.probabilities], **rows)
    return found


@dataclass(frozen=True)
class Point:
    """A point of the chain, and how the target does from it."""

    name: str
    verb: str | None
    """None where nothing was trained."""
    key: str | None
    images: int
    """That the stage was trained on."""
    metrics: dict[str, Any]
    gain: Gain | None
    """Over the point before it; None for the first."""
    overlap: Overlap | None = None

    def as_dict(self) -> dict[str, Any]:
        shared = self.overlap.as_dict() if self.overlap else None
        values = {"name": self.name, "verb": self.verb, "key": self.key, "images": self.images}
        return values | {"metrics": self.metrics, "gain": self.gain, "overlap": shared}


_NO_GAIN = Difference(difference=None, ci95=[None, None], p=None)
_HOW = {None: "no training", "pretrain": "all its images, without labels", "transfer": "its labels"}


def section(points: Sequence[Point], whole: Gain, folder: Path, judged: int) -> report.Section:
    """What each stage gave, for a reader who does not program; draws stages.png in `folder`.

    whole: the gain of the last point over the first; empty where they are one. judged: images of the target.
    """
    folder.mkdir(exist_ok=True)
    figures.stage_gains(*_drawn(points), folder / "stages.png", HEADLINE.replace("_", " "))
    rows = [[p.name, _HOW[p.verb], f"{p.images:,}" if p.images else "–", _value(p), _shown(p.gain)] for p in points]
    sentences = [_sentence(p, p.gain) for p in points if p.gain]
    if whole:
        sentences.append(f"The whole chain, {points[-1].name} over {points[0].name}: {_verdict(whole)}.")
    blocks: list[report.Block] = [
        report.Text(
            "The same target, with the same folds and settings, was judged from every point of the chain: "
            f"{', '.join(p.name for p in points)}. A gain is the balanced accuracy after a stage less that before it, "
            "on the same images; its interval comes from a bootstrap over groups in which both sides get the same "
            "groups. Each interval holds with 95 % by itself, not all of them together."
        ),
        report.Text(" ".join(sentences)),
        report.Table(
            ["starting point", "trained on", "images", "balanced accuracy [95 % interval]", "gain [95 % interval]"],
            rows,
            "The target from every point of the chain",
        ),
        report.Figure(folder / "stages.png", "Balanced accuracy at each point, and gains", "With 95 % intervals."),
    ]
    blocks += [block for p in points if p.overlap for block in _shared(p, p.overlap, judged)]
    return report.Section("What each stage gave", blocks)


def _shared(point: Point, overlap: Overlap, judged: int) -> list[report.Block]:
    blocks: list[report.Block] = []
    if overlap.images or overlap.groups:
        blocks.append(
            report.Text(
                f"Stage {point.name} was trained, without labels, on {overlap.images:,} of the {judged:,} images that "
                f"are judged here, and knows images of {overlap.groups:,} of their groups (transductive learning). No "
                "label leaks by that, but images of other groups may fare worse than these figures say."
            )
        )
    if overlap.namesakes and point.verb == "transfer":
        blocks.append(
            report.Warning(
                f"{overlap.namesakes:,} groups are called the same in the data of stage {point.name} and in the "
                "target. If they are the same patients, what that stage gave is too good to be true."
            )
        )
    return blocks


def _sentence(point: Point, gain: Gain) -> str:
    return f"{'Stage' if point.verb else 'From'} {point.name}: {_verdict(gain)}."


def _verdict(gain: Gain) -> str:
    """The gain in words that claim no more than its interval allows."""
    low, high = gain[HEADLINE]["ci95"]
    if low is None or high is None:
        return f"{_shown(gain)}, with too few groups to say more"
    if low > 0:
        return f"a gain of {_shown(gain)}"
    if high < 0:
        return f"a loss of {_shown(gain)}"
    return f"{_shown(gain)}, whose interval holds 0, so that it may be chance"


def _value(point: Point) -> str:
    metric = point.metrics[HEADLINE]
    return report.with_interval(metric["value"], metric["ci95"])


def _shown(gain: Gain | None) -> str:
    if gain is None:
        return "–"
    change, (low, high) = gain[HEADLINE]["difference"], gain[HEADLINE]["ci95"]
    return f"{change:+.3f}" if low is None or high is None else f"{change:+.3f} [{low:+.2f}, {high:+.2f}]"


def _drawn(points: Sequence[Point]) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Names, and (value, low, high) [N, 3] of each point's metric and of its gain; what is undefined is NaN."""
    values = [[m["value"], *m["ci95"]] for m in (p.metrics[HEADLINE] for p in points)]
    gains = [[g["difference"], *g["ci95"]] for g in (p.gain[HEADLINE] if p.gain else _NO_GAIN for p in points)]
    return [p.name for p in points], np.asarray(values, dtype=np.float64), np.asarray(gains, dtype=np.float64)
