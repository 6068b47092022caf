"""Fits of a protocol, kept by content: one that was cut off, or given more to do, goes on with what is there."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from cluster import storage
from training.fit import FoldResult
from training.splits import Fold

FORMAT = 3
"""Raised when what a fit computes or keeps changes: older files are then not read."""
MORE = "more/"
"""What a file's names of `FoldResult.more` begin with."""
PROTOCOL = frozenset(
    {"data", "where", "folds", "repeats", "split", "site_column", "test_fraction", "label_fraction", "unit", "pooling"}
    | {"by", "prevalence", "init", "stages", "searched_on"}
)
"""Fields of a config that choose rows or first weights, which a fit's key holds themselves, or how it is told."""


@dataclass(frozen=True)
class Fits:
    """The fits in `folder`. `subject` is all that decides a result beside its rows: recipe, weights, labels."""

    folder: Path
    subject: dict[str, Any]
    image_ids: list[str]

    def load(self, fold: Fold) -> FoldResult | None:
        path = self._path(fold)
        if not path.exists():
            return None
        values = load_file(path)
        history = [{"epoch": e, "loss": x, "held_loss": h} for e, x, h in values["history"].tolist()]
        return FoldResult(
            repeat=fold.repeat,
            fold=fold.fold,
            test=fold.test,
            probabilities=values["probabilities"],
            best_epoch=int(values["best_epoch"][0]),
            history=history,
            distances=values["distances"],
            inner_rows=fold.train[values["inner"]],
            inner_probabilities=values["inner_probabilities"],
            share=fold.share,
            more={n.removeprefix(MORE): values[n] for n in values if n.startswith(MORE)},
        )

    def save(self, fold: Fold, result: FoldResult) -> None:
        history = np.asarray([[row["epoch"], row["loss"], row.get("held_loss", np.nan)] for row in result.history])
        tensors = {
            "probabilities": result.probabilities,
            "best_epoch": np.asarray([result.best_epoch]),
            "history": history.reshape(-1, 3).astype(np.float64),
            "distances": result.distances,
            "inner": np.searchsorted(fold.train, result.inner_rows).astype(np.int64),
            "inner_probabilities": result.inner_probabilities,
            **{f"{MORE}{name}": np.asarray(values) for name, values in result.more.items()},
        }
        tensors |= {f"{MORE}{name}": values for name, values in result.more.items()}
        target = self._path(fold)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}")
        save_file({name: np.ascontiguousarray(values) for name, values in tensors.items()}, partial)
        storage.publish_file(partial, target)

    def _path(self, fold: Fold) -> Path:
        sides = [[self.image_ids[row] for row in rows] for rows in (fold.train, fold.test)]
        # the randomness of a fit is keyed by its place in the protocol
        known = [FORMAT, self.subject, fold.repeat, fold.fold, sides]
        digest = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:12]
        share = f"-share-{fold.share:g}" if fold.share < 1 else ""
        return self.folder / f"repeat-{fold.repeat}-fold-{fold.fold}{share}-{digest}.safetensors"
