"""`predictions.parquet` and `units.parquet`: written, and of RUNs of `transfer` read back and brought onto the same
rows."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from cluster import storage
from cluster.errors import UsageError
from cluster.outdir import short
from training.dataset import Selection, label_of, truth_of
from training.judgement import Judged
from training.units import Units

FILE, UNITS = "predictions.parquet", "units.parquet"
EQUAL = ("data", "where", "split", "folds", "repeats", "seed", "site_column", "test_fraction", "label_fraction")
"""Fields of `transfer` that decide which images are judged in which fold."""


def write_predictions(folder: Path, selection: Selection, judged: Judged) -> None:
    """predictions.parquet: image_id, group, case, repeat, fold, truth, one probability per leaf."""
    _write_judged(folder / FILE, {name: selection.column(name) for name in ("image_id", "group", "case")}, judged)


def write_units(folder: Path, selection: Selection, judged: Judged, units: Units) -> None:
    """units.parquet: unit (its case or group; the image's id where one stands alone), group, images, and the rest of
    predictions.parquet."""
    identities = selection.column("image_id")
    columns = {
        "unit": [units.names[unit] or identity for unit, identity in zip(units.of_row, identities, strict=True)],
        "group": selection.column("group"),
        "images": np.bincount(units.of_row)[units.of_row].tolist(),
    }
    _write_judged(folder / UNITS, columns, judged)


def _write_judged(path: Path, columns: dict[str, list[Any]], judged: Judged) -> None:
    table = pa.table(
        {
            **{name: [values[r] for r in judged.rows] for name, values in columns.items()},
            "repeat": judged.repeat,
            "fold": judged.fold,
            "truth": [label_of(t, judged.classes) for t in judged.truth],
            **{name: judged.probabilities[:, at] for at, name in enumerate(judged.classes)},
        }
    )
    partial = path.with_name(f".{path.name}")
    pq.write_table(table, partial)
    storage.publish_file(partial, path)


@dataclass(frozen=True, eq=False)
class Predictions:
    """What one RUN said of every labelled image, out of fold: M rows, one per image and repeat."""

    run: str
    table: pa.Table
    classes: list[str]
    config: dict[str, Any]
    protocol: dict[str, Any]
    several: bool = False
    """Whether an image may have several labels."""

    def column(self, name: str) -> list[Any]:
        return list(self.table[name].to_pylist())

    @cached_property
    def truth(self) -> np.ndarray:
        """[M] indices of `classes`, or label sets bool [M, K]."""
        return truth_of(self.column("truth"), self.classes, several=self.several)

    @cached_property
    def probabilities(self) -> np.ndarray:
        """[M, K]"""
        return np.stack([self.table[name].to_numpy() for name in self.classes], axis=1).astype(np.float64)

    @cached_property
    def rows(self) -> dict[tuple[str, int], int]:
        """(image, repeat) -> row"""
        return {key: at for at, key in enumerate(zip(self.column("image_id"), self.column("repeat"), strict=True))}


def read_predictions(run: str) -> Predictions:
    """The out-of-fold predictions of a finished RUN of `transfer`, local or remote; its model folder names it, too.

    Raises:
        UsageError: it is not one, has not finished, or says of label sets that they are single classes.
    """
    inside = storage.name_of(run) == "model" and "config.yaml" not in storage.list_names(run)
    root = storage.sibling(storage.located(run), "") if inside else run
    names = storage.list_names(root)
    config = yaml.safe_load(storage.read_bytes(storage.join(root, "config.yaml"))) if "config.yaml" in names else {}
    if config.get("verb") != "transfer":
        raise UsageError(
            f"{run}: not a RUN of transfer; without --data, the out-of-fold predictions of such are compared"
        )
    if not {FILE, "summary.json"} <= set(names):
        raise UsageError(f"{run}: this run has not finished; run its command again")
    summary = storage.read_json(storage.join(root, "summary.json"))
    table = pq.read_table(pa.BufferReader(storage.read_bytes(storage.join(root, FILE))))
    classes = [str(name) for name in summary["classes"]]
    several = bool(summary.get("multi_label"))
    strange = set(table["truth"].to_pylist()) - set(classes)
    if strange and not several:
        raise UsageError(f"{run}: label {min(strange)!r} is no single class; give RUNs of one label per image")
    return Predictions(run, table, classes, config, summary["protocol"], several)


def aligned(ours: Predictions, theirs: Predictions) -> np.ndarray:
    """Probabilities [M, K] of `theirs`, its rows and classes in the order of `ours`.

    Raises:
        UsageError: they do not judge the same images, with the same labels and groups, in the same folds.
    """
    difference = _difference(ours, theirs)
    if difference:
        raise UsageError(f"{theirs.run} and {ours.run}: {difference}; {_advice(ours, theirs)}")
    order = [theirs.rows[key] for key in ours.rows]
    columns = [theirs.classes.index(name) for name in ours.classes]
    return np.asarray(theirs.probabilities[np.ix_(order, columns)])


def _difference(ours: Predictions, theirs: Predictions) -> str:
    """In which respect the two are not of the same rows, in words; nothing where they are."""
    if ours.several != theirs.several:
        owner = ours.run if ours.several else theirs.run
        return f"only {owner} judges label sets"
    if set(ours.classes) != set(theirs.classes):
        name = min(set(ours.classes) ^ set(theirs.classes))
        owner = ours.run if name in ours.classes else theirs.run
        return f"their classes differ (only {owner} has {name!r})"
    mine, yours = ({image for image, _ in side.rows} for side in (ours, theirs))
    if mine != yours:
        only = [(len(a - b), side.run) for a, b, side in ((mine, yours, ours), (yours, mine, theirs)) if a - b]
        return "they judge other images (" + ", ".join(f"{n:,} only in {run}" for n, run in only) + ")"
    if set(ours.rows) != set(theirs.rows):
        return f"they have {theirs.protocol['repeats']} and {ours.protocol['repeats']} repeats"
    for name, words in (("truth", "labels"), ("group", "groups"), ("fold", "folds")):
        a, b = ours.column(name), theirs.column(name)
        other = sum(a[at] != b[theirs.rows[key]] for key, at in ours.rows.items())
        if other:
            return f"{other:,} of {len(a):,} judgements have other {words}"
    return ""


def _advice(ours: Predictions, theirs: Predictions) -> str:
    pairs = {name: (theirs.config.get(name), ours.config.get(name)) for name in EQUAL}
    unlike = [f"--{name} ({short(a)} and {short(b)})" for name, (a, b) in pairs.items() if a != b]
    flags = " and ".join(unlike) or "the DATASET behind --data"
    return f"make {flags} equal, or compare on unseen images with --data"
