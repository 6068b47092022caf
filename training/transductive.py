"""What of the judged images lay in the pool that the first weights were trained on, and what is left without it.

A model pretrained on the test patients' images, labels or not, is judged transductively. Bytes tell which images were
seen (`training.lineage`), the groups of the data set which patients.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from typing import Any

import numpy as np

from training import report
from training.bootstrap import Metric
from training.dataset import Selection
from training.judgement import summarise
from training.lineage import short_digests

FIRST_WEIGHTS = "The first weights"
SHOWN = ("accuracy", "balanced_accuracy", "kappa", "auroc", "ece")


@dataclass(frozen=True, eq=False)
class Overlap:
    """Which rows [N] of a selection were seen before: their own bytes, and any image of their group (which is more)."""

    image: np.ndarray
    group: np.ndarray

    @property
    def any(self) -> bool:
        return bool(self.group.any())


def overlap_of(selection: Selection, everything: Selection, seen: Set[str]) -> Overlap:
    """The overlap of a selection with `seen` (`lineage.seen_by`).

    A group counts as seen if any of its images in `everything` was: all ok rows of the data set, unlabelled ones too,
    for the pool is mostly of those.
    """
    pool = zip(short_digests(everything), everything.column("group"), strict=True)
    known = {group for digest, group in pool if digest in seen}
    image = np.asarray([digest in seen for digest in short_digests(selection)], dtype=bool)
    group = np.asarray([name in known for name in selection.column("group")], dtype=bool)
    return Overlap(image, image | group)


def overlap_blocks(
    found: Overlap,
    *,
    rows: np.ndarray,
    truth: np.ndarray,
    probabilities: np.ndarray,
    group: list[str],
    fold: np.ndarray,
    repeat: np.ndarray,
    who: str = FIRST_WEIGHTS,
    resamples: int = 1000,
    seed: int = 0,
) -> tuple[list[report.Block], dict[str, Any]]:
    """(blocks for a report, entry of `summary.json`) about the overlap of judged images with what was seen before.

    Args:
        found: the overlap of the selection.
        rows: [M] rows of the selection, one per prediction.
        truth, probabilities, group, fold, repeat: [M], [M, K], … as `metrics.summarise` takes them.
        who: has seen them: a plural that begins a sentence.

    The entry: `images`, `of_images`, `groups`, `of_groups`, and, where something was seen, `metrics_without`: all
    metrics of the predictions of groups of which nothing was seen, or None where none is left.
    """
    named, judged = np.asarray(group, dtype=str), np.unique(rows)
    seen = found.group[rows]
    entry: dict[str, Any] = {
        "images": int(found.image[judged].sum()),
        "of_images": len(judged),
        "groups": len(np.unique(named[seen])),
        "of_groups": len(np.unique(named)),
    }
    if not seen.any():
        return [report.Text(f"{who} have seen none of the judged images or groups.")], entry
    blocks: list[report.Block] = [
        report.Warning(
            f"{who} have seen {entry['images']:,} of the {entry['of_images']:,} judged images, and images "
            f"of {entry['groups']:,} of the {entry['of_groups']:,} judged groups, without their labels or with them "
            "(transductive): on patients who are new to them too, results may be worse."
        )
    ]

    def summary(keep: np.ndarray) -> dict[str, Metric]:
        return summarise(
            truth[keep],
            probabilities[keep],
            group=named[keep],
            fold=fold[keep],
            repeat=repeat[keep],
            ordered=False,
            resamples=resamples,
            seed=seed,
        )

    if seen.all():
        entry["metrics_without"] = None
        blocks.append(
            report.Text(
                "No group is left without them, so what the overlap is worth cannot be said from this run. To know it, "
                "train and pretrain on other patients than those that are judged."
            )
        )
        return blocks, entry
    entry["metrics_without"] = summary(~seen)
    blocks.append(_table(summary(np.ones(len(seen), dtype=bool)), entry["metrics_without"], entry))
    lost = _classes(truth) - _classes(truth[~seen])
    if lost:
        blocks.append(
            report.Text(f"Of {len(lost)} of the classes nothing is left without them: the columns are not comparable.")
        )
    return blocks, entry


def _classes(truth: np.ndarray) -> set[int]:
    """Those that some row is of."""
    return set((truth if truth.ndim == 1 else np.flatnonzero(truth.any(axis=0))).tolist())


def _table(whole: dict[str, Metric], rest: dict[str, Metric], entry: dict[str, Any]) -> report.Table:
    left = entry["of_groups"] - entry["groups"]
    cells = [
        [name, *(report.with_interval(values[name]["value"], values[name]["ci95"]) for values in (whole, rest))]
        for name in SHOWN
        if name in whole
    ]
    headers = ["metric", f"all {entry['of_groups']:,} groups", f"the {left:,} of which nothing was seen"]
    return report.Table(headers, cells, "With and without the groups of which an image was seen [95 % interval]")
