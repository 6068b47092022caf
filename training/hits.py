"""`retrieval.parquet`: what each image of a RUN of `transfer` found, and the difference to what it found in another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cluster import storage
from training import report
from training.bootstrap import Units, ratio
from training.compare import RESAMPLES, Difference, difference_of
from training.dataset import Selection
from training.evaluation_report import p_words
from training.learnt import GALLERIES, Asked
from training.metrics import title_of
from training.report import with_interval
from training.retrieval import NAMES

FILE = "retrieval.parquet"


def write_hits(folder: Path, selection: Selection, asked: Asked) -> None:
    """A row per query, gallery and step: image_id, group, repeat, fold, gallery, step, judged (whether there was
    anything to find), recall_at_1 … map_at_r. Without an embedding of its own a run's are of its first weights."""
    images, groups = selection.column("image_id"), selection.column("group")
    parts = []
    for (gallery, step), found in asked.found.items():
        count = len(asked.rows)
        columns: dict[str, Any] = {
            "image_id": [images[r] for r in asked.rows],
            "group": [groups[r] for r in asked.rows],
            "repeat": asked.repeat,
            "fold": asked.fold,
            "gallery": [gallery] * count,
            "step": np.full(count, step),
            "judged": found.judged,
        }
        parts.append(pa.table(columns | {name: found.scores[:, at] for at, name in enumerate(NAMES)}))
    partial = folder / f".{FILE}"
    pq.write_table(pa.concat_tables(parts), partial)
    storage.publish_file(partial, folder / FILE)


@dataclass(frozen=True, eq=False)
class Hits:
    """The means over repeats of what Q images found at the last step: scores [Q, 6] in order of `NAMES`."""

    images: list[str]
    groups: list[str]
    scores: np.ndarray


def read_hits(run: str, gallery: str = GALLERIES[0], step: int | None = None) -> Hits | None:
    """Those images of a finished RUN, or of its model folder, that had anything to find; None where it keeps none."""
    inside = storage.name_of(run) == "model" and "config.yaml" not in storage.list_names(run)
    root = storage.sibling(storage.located(run), "") if inside else run
    if FILE not in storage.list_names(root):
        return None
    table = pq.read_table(pa.BufferReader(storage.read_bytes(storage.join(root, FILE))))
    kind, steps = np.asarray(table["gallery"].to_pylist()), table["step"].to_numpy()
    chosen = (kind == gallery) & table["judged"].to_numpy()
    if not chosen.any():
        return None
    chosen &= steps == (steps[chosen].max() if step is None else step)
    own = table.filter(pa.array(chosen))
    images, first, member = np.unique(own["image_id"].to_pylist(), return_index=True, return_inverse=True)
    scores = np.stack([own[name].to_numpy() for name in NAMES], axis=1)
    sums = np.stack([np.bincount(member, column) for column in scores.T], axis=1)
    groups = own["group"].to_pylist()
    return Hits(images.tolist(), [groups[at] for at in first], sums / np.bincount(member)[:, None])


def hits_differ(ours: Hits, theirs: Hits, *, seed: int = 0) -> dict[str, Difference] | None:
    """By name, ours less theirs over the images that both asked about, with a paired bootstrap over groups; None where
    there are none. Means over repeats are subtracted image by image."""
    place = {image: at for at, image in enumerate(theirs.images)}
    mine = [at for at, image in enumerate(ours.images) if image in place]
    if not mine:
        return None
    yours = [place[ours.images[at]] for at in mine]
    zeros = np.zeros(len(mine), dtype=np.int64)
    units = Units.of([ours.groups[at] for at in mine], zeros, zeros, resamples=RESAMPLES, seed=seed)
    columns = np.column_stack([ours.scores[mine] - theirs.scores[yours], np.ones(len(mine))])
    draws = units.draw(columns, lambda sums: ratio(sums[..., :-1], sums[..., -1:]))
    return {
        name: difference_of(float(draws.values[at]), draws.resampled[at], draws.groups, unbias=False)
        for at, name in enumerate(NAMES)
    }


def hits_compared(runs: Mapping[str, str], *, seed: int) -> tuple[list[report.Section], dict[str, dict[str, Any]]]:
    """How much more often images found their like in the first of RUNs, by name, than in each of the others: a section
    of the report, and by name what the summary says; nothing of RUNs that asked for no neighbours."""
    (name, run), *rest = runs.items()
    ours = read_hits(run) if rest else None
    if ours is None:
        return [], {}
    kept: dict[str, dict[str, Any]] = {}
    for other, theirs in ((other, read_hits(place)) for other, place in rest):
        found = None if theirs is None else hits_differ(ours, theirs, seed=seed)
        if found is not None:
            kept[other] = {"retrieval": found}
    rows = [
        [other, title_of(metric), with_interval(d["difference"], d["ci95"]), p_words(d["p"])]
        for other, values in kept.items()
        for metric, d in values["retrieval"].items()
    ]
    words = (
        f"Each image was asked for its like among all images of other groups. Above zero, it finds more in {name}. A "
        "run of --task metric is asked in the embedding that it trained, out of fold; any other in its first weights."
    )
    table = report.Table(
        ["against", "", "difference [95 % interval]", "p"], rows, "Nearest neighbours, paired by image"
    )
    return ([report.Section("Nearest neighbours", [report.Text(words), table])] if rows else []), kept
