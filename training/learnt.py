"""What a learnt embedding retrieves, out of fold: measured in each fold's own space, told beside the first weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from training.bootstrap import Units
from training.retrieval import NAMES, Queries, Retrieved, per_query, summarise
from training.splits import Fold

if TYPE_CHECKING:
    from training.fit import FoldResult

GALLERIES = ("all", "test")
"""Where a test image's neighbours are looked for: among all images of other groups, those of the training side too,
whether or not a share of the labels left them to the fit, as a service does and as the first weights are asked
everywhere; or among the other test images alone, which the embedding has not been fitted to either (papers of the
field: query and gallery are of the test set)."""
WIDTH = 2 * len(NAMES) + 1


def name_of(gallery: str, step: int) -> str:
    """Under which `FoldResult.more` keeps [T, 13] of a gallery and a step, counted from 1: scores, chances, judged."""
    return f"retrieved/{gallery}/{step}"


def retrieved(
    known: Sequence[np.ndarray],
    asked: Sequence[np.ndarray],
    truth: np.ndarray,
    groups: Sequence[str],
    fold: Fold,
    seed: int,
) -> dict[str, np.ndarray]:
    """What the test rows of a fold find, by `name_of`, from the embeddings of its training and test rows at each step.

    Rows of a query's own group are never found.
    """
    found = {}
    everyone = np.concatenate([fold.test, fold.train])
    sides: dict[str, np.ndarray] = {"all": everyone, "test": fold.test}
    for step, (train, test) in enumerate(zip(known, asked, strict=True), start=1):
        features = np.concatenate([test, train])
        for gallery, rows in sides.items():
            own = [groups[r] for r in rows]
            queries = np.arange(len(fold.test))
            one = per_query(features[: len(rows)], truth[rows], own, asked=queries, seed=seed)
            found[name_of(gallery, step)] = np.column_stack([one.scores, one.chances, one.judged])
    return found


@dataclass(frozen=True, eq=False)
class Asked:
    """Queries of all folds and repeats, [Q] each in order; `rows` are of the selection."""

    rows: np.ndarray
    fold: np.ndarray
    repeat: np.ndarray
    found: Mapping[tuple[str, int], Queries]
    """By gallery and step."""

    @property
    def steps(self) -> int:
        return max(step for _, step in self.found)

    def metrics(self, groups: Sequence[str], *, seed: int) -> dict[tuple[str, int], dict[str, Retrieved]]:
        """The figures of each gallery and step; `groups` [N] are those of the selection's rows."""
        own = [groups[r] for r in self.rows]
        units = Units.of(own, self.fold, self.repeat, seed=seed)
        return {key: summarise(queries, units) for key, queries in self.found.items()}


def asked_of(results: Sequence[FoldResult]) -> Asked | None:
    """The queries of results in order; None where their task retrieves nothing by itself."""
    if not results or name_of("all", 1) not in results[0].more:
        return None
    steps = 1
    while name_of("all", steps + 1) in results[0].more:
        steps += 1
    found = {}
    for gallery in GALLERIES:
        for step in range(1, steps + 1):
            table = np.concatenate([r.more[name_of(gallery, step)] for r in results])
            found[gallery, step] = _queries(table)
    return Asked(
        np.concatenate([r.test for r in results]),
        np.concatenate([np.full(len(r.test), r.fold) for r in results]),
        np.concatenate([np.full(len(r.test), r.repeat) for r in results]),
        found,
    )


def _queries(table: np.ndarray) -> Queries:
    count = len(NAMES)
    return Queries(table[:, :count], table[:, count : 2 * count], table[:, -1].astype(bool))


def in_summary(metrics: Mapping[tuple[str, int], dict[str, Retrieved]], steps: int) -> dict[str, Any]:
    """Entries of `metrics` in summary.json: plain names are the last step's among all images; `test_gallery/…` its
    figures among test images alone; `step_1/…` and so on those of the steps before, where there are any."""
    entries: dict[str, Any] = {}
    for (gallery, step), values in metrics.items():
        prefix = ("" if step == steps else f"step_{step}/") + ("" if gallery == "all" else "test_gallery/")
        entries |= {f"{prefix}{name}": metric for name, metric in values.items()}
    return entries
