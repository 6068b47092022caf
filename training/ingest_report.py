"""`report.html` and `copies.parquet` of a DATASET: what was read, what was not, and which images are one picture.

Written before anything is trained, for copies across patients are found by looking, not by a score.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cluster import storage
from training import figures, report
from training.copies import CORRELATION, LOOK, TURNS, Near
from training.dataset import UNGROUPED, Dataset, Selection, own_group
from training.images import content

SHOWN, LOOKS_SHOWN = 24, 12
"""Pairs shown as pictures: copies, and those that are none but look alike."""
LOOKS_KEPT = 10_000
"""Pairs kept that look alike: adjacent slices can be thousands."""
LISTED = 20
"""Rows of a table."""
BRIGHTER, CONTRAST = 4.0, 1.06
"""Grey levels by which means, and factor by which standard deviations, must differ to be called another tone."""

Pictures = Callable[[Sequence[int]], list[np.ndarray]]


@dataclass(frozen=True, eq=False)
class Found:
    """Copies of a listing, by row: byte-identical pairs [P, 2] with the first one first, and near ones.

    `grey` gives the 64x64 thumbnail of a row, flat.
    """

    same: np.ndarray
    near: Near
    grey: Callable[[int], np.ndarray]

    @property
    def merged(self) -> np.ndarray:
        """[Q, 2]: the pairs whose groups are welded."""
        return np.concatenate([self.same, self.near.rows[self.near.copies]])


def pair_table(found: Found, ids: list[str], rows: pa.Table, labels: list[str], merged: list[str]) -> pa.Table:
    """One row per pair: copies, those across groups first and the least sure first among them; then pairs that only
    look alike and are of different groups, the most alike first.

    Args:
        ids, labels: [N] of the listing; the labels as they were given.
        rows: [N] with the columns `path` and `group`, as they were given.
        merged: [N] groups after the copies were welded.
    """
    near = found.near
    apart = np.asarray([merged[i] != merged[j] for i, j in near.rows], dtype=bool)
    looks = np.flatnonzero(~near.copies & apart)
    looks = looks[np.argsort(-near.correlation[looks], kind="stable")][:LOOKS_KEPT]
    kept = near.take(np.concatenate([np.flatnonzero(near.copies), looks]))
    pairs = np.concatenate([found.same, kept.rows])
    given, paths = rows["group"].to_pylist(), rows["path"].to_pylist()
    own = [own_group(group, at) for at, group in zip(ids, given, strict=True)]
    columns: dict[str, Any] = {"row_a": pairs[:, 0], "row_b": pairs[:, 1]}
    for name, values in (("image_id", ids), ("path", paths), ("group", given), ("label", labels)):
        columns |= {f"{name}_{side}": [values[at] for at in pairs[:, k]] for k, side in enumerate("ab")}
    columns["correlation"] = np.concatenate([np.ones(len(found.same), np.float32), kept.correlation])
    columns["kind"] = ["the same bytes"] * len(found.same) + [_kind(kept, at, found.grey) for at in range(len(kept))]
    columns["merged"] = np.concatenate([np.ones(len(found.same), dtype=bool), kept.copies])
    columns["across_groups"] = np.asarray([own[i] != own[j] for i, j in pairs], dtype=bool)
    kinds = {"row_a": pa.int64(), "row_b": pa.int64(), "correlation": pa.float32()}
    kinds |= {"merged": pa.bool_(), "across_groups": pa.bool_()}
    schema = pa.schema([(name, kinds.get(name, pa.string())) for name in columns])
    order = np.lexsort((columns["correlation"], ~columns["across_groups"], ~columns["merged"]))
    copies = int(columns["merged"].sum())
    return pa.table(columns, schema).take(pa.array(np.concatenate([order[:copies], order[copies:][::-1]])))


def _kind(near: Near, at: int, grey: Callable[[int], np.ndarray]) -> str:
    """What became of the first image to make the second, in words."""
    one, other = (grey(int(row)).astype(np.float32) for row in near.rows[at])
    gap, spread = float(other.mean() - one.mean()), float((other.std() + 1e-6) / (one.std() + 1e-6))
    words = [TURNS[near.turn[at]]] if near.turn[at] else []
    words += ["brighter" if gap > 0 else "darker"] if abs(gap) > BRIGHTER else []
    words += ["more contrast" if spread > 1 else "less contrast"] if max(spread, 1 / spread) > CONTRAST else []
    return ", ".join(words) or ("nearly the same" if near.copies[at] else "alike")


def write_copies(path: Path, pairs: pa.Table) -> None:
    """copies.parquet: a row per pair of `pair_table`."""
    partial = path.with_name(f".{path.name}")
    pq.write_table(pairs.drop_columns(["row_a", "row_b"]), partial)
    storage.publish_file(partial, path)


def pictures_of(dataset: Dataset, manifest: pa.Table, same: np.ndarray) -> Pictures:
    """Reads the pictures of manifest rows from the shards, without letterbox; a copy's are those of the first."""
    first = {int(again): int(at) for at, again in same}

    def read(rows: Sequence[int]) -> list[np.ndarray]:
        wanted = Selection(manifest.take(pa.array([first.get(int(row), int(row)) for row in rows], pa.int64())))
        sizes = zip(wanted.column("height"), wanted.column("width"), strict=True)
        path = dataset.image_path
        return [content(p, h, w, path) for p, (h, w) in zip(dataset.pixels(wanted), sizes, strict=True)]

    return read


@dataclass(frozen=True, eq=False)
class Ingested:
    """What the report tells: a finished manifest, its dataset.json, the pairs, and labels as they were given [N]."""

    source: str
    manifest: pa.Table
    info: dict[str, Any]
    pairs: pa.Table
    labels: list[str]
    pictures: Pictures


def write_ingest_report(out: Path, told: Ingested, *, images: bool) -> None:
    """report.html of a DATASET, and its figures/*.png; without `images` no pictures and no names of files or groups."""
    sections = [
        _read_section(told, images),
        *_quarantine_section(told, images),
        _group_section(told, images),
        _copy_section(out, told, images),
        *_conflict_section(out, told, images),
        *_look_section(out, told, images),
    ]
    partial = out / ".report.html"
    report.write_report(partial, title=f"Data set: {out.name}", sections=sections, images=images)
    storage.publish_file(partial, out / "report.html")


def _read_section(told: Ingested, names: bool) -> report.Section:
    counts, path = told.info["counts"], told.info["image_path"]
    kept = told.manifest.filter(pc.equal(told.manifest["status"], "ok"))
    labels, groups = kept["label"].to_pylist(), kept["group"].to_pylist()
    images, members = Counter(labels), {name: set[str]() for name in set(labels)}
    for label, group in zip(labels, groups, strict=True):
        members[label].add(group)
    rows = [[name or "no label", f"{images[name]:,}", f"{len(members[name]):,}"] for name in sorted(images)]
    blocks: list[report.Block] = [
        report.Text(
            (f"From {told.source}: " if names else "")
            + f"{counts['images']:,} images were listed, {counts['ok']:,} are kept, {counts['duplicate']:,} are the "
            f"same bytes as another and left out, {counts['quarantined']:,} could not be read. Stored as "
            f"{path['height']} x {path['width']} pixels "
            f"with {told.info['channels']} channel{'s' if told.info['channels'] > 1 else ''}."
        ),
        report.Table(["class", "images", "groups"], rows[: 5 * LISTED], "Images that are kept"),
    ]
    if len(rows) > 5 * LISTED:
        blocks.append(report.Text(f"{len(rows) - 5 * LISTED:,} more classes are not shown."))
    return report.Section("What was read", blocks)


def _quarantine_section(told: Ingested, names: bool) -> list[report.Section]:
    bad = told.manifest.filter(pc.equal(told.manifest["status"], "quarantined"))
    if not bad.num_rows:
        return []
    first: dict[str, str] = {}
    for reason, path in zip(bad["reason"].to_pylist(), bad["path"].to_pylist(), strict=True):
        first.setdefault(reason, path)
    common = Counter(bad["reason"].to_pylist()).most_common()
    rows = [[reason, f"{count:,}", first[reason] if names else "left out"] for reason, count in common[:LISTED]]
    caption = f"Quarantined images by reason ({len(common)} reasons); all are in manifest.parquet"
    return [report.Section("What could not be read", [report.Table(["reason", "images", "the first"], rows, caption)])]


def _group_section(told: Ingested, names: bool) -> report.Section:
    counts = told.info["counts"]
    kept = told.manifest.filter(pc.equal(told.manifest["status"], "ok"))
    sizes = Counter(kept["group"].to_pylist())
    largest, size = sizes.most_common(1)[0]
    given = len(set(told.manifest["group_given"].to_pylist()) - {""})
    blocks: list[report.Block] = [
        report.Text(
            f"A group (patient, slide, …) is what no split takes apart. {given:,} were given; with the images that "
            f"have none, each its own, and after copies were put together, there are {counts['groups']:,}. The largest"
            + (f", {largest}," if names and not largest.startswith(UNGROUPED) else "")
            + f" holds {size:,} images ({size / counts['ok']:.1%})."
        )
    ]
    if counts["ungrouped"]:
        blocks.append(
            report.Warning(
                f"{counts['ungrouped']:,} labelled images have no group: a patient may stand on both sides of a split, "
                "and results may be too good."
            )
        )
    return report.Section("Groups", blocks)


def _copy_section(out: Path, told: Ingested, images: bool) -> report.Section:
    copies = told.pairs.filter(told.pairs["merged"])
    if not copies.num_rows:
        return report.Section("Copies", [report.Text("No two images are copies of each other.")])
    across = copies.filter(copies["across_groups"])
    blocks: list[report.Block] = []
    if across.num_rows:
        blocks.append(
            report.Warning(
                f"{across.num_rows:,} of {copies.num_rows:,} pairs of copies are across groups (an image without a "
                "group is its own): one picture under two names. Their groups were put together, so that no split "
                "takes them apart. Look whether the groups are right."
            )
        )
    tally = Counter(zip(copies["kind"].to_pylist(), copies["across_groups"].to_pylist(), strict=True))
    kinds = sorted({kind for kind, _ in tally})
    rows = [[kind, f"{tally[kind, True]:,}", f"{tally[kind, False]:,}"] for kind in kinds]
    caption = f"Pairs of copies by kind of change; near copies correlate {CORRELATION} or more"
    blocks.append(report.Table(["kind", "across groups", "within a group"], rows, caption))
    blocks += _pair_figure(out, told, copies, "copies", SHOWN, "Pairs of copies, those across groups first", images)
    return report.Section("Copies", blocks)


def _look_section(out: Path, told: Ingested, images: bool) -> list[report.Section]:
    looks = told.pairs.filter(pc.invert(told.pairs["merged"]))
    if not looks.num_rows:
        return []
    count = f"{looks.num_rows:,}" if looks.num_rows < LOOKS_KEPT else f"More than {LOOKS_KEPT:,}"
    text = report.Text(
        f"{count} pairs of different groups are alike (correlation {LOOK} to {CORRELATION}) but were not put together: "
        "most are different images of the same kind, some may be copies that were tilted or cropped."
    )
    caption = "The most alike of different groups"
    figure = _pair_figure(out, told, looks, "alike", LOOKS_SHOWN, caption, images)
    return [report.Section("Look at these", [text, *figure])]


def _pair_figure(
    out: Path, told: Ingested, pairs: pa.Table, name: str, most: int, caption: str, images: bool
) -> list[report.Block]:
    shown = pairs.slice(0, most)
    path = out / "figures" / f"{name}.png"
    if images:
        path.parent.mkdir(exist_ok=True)
        rows = shown.to_pylist()
        pictures = told.pictures([row[f"row_{side}"] for row in rows for side in "ab"])
        figures.pairs(
            list(zip(pictures[::2], pictures[1::2], strict=True)),
            [f"{row['kind']}; correlation {row['correlation']:.4f}" for row in rows],
            [(_named(row, "a"), _named(row, "b")) for row in rows],
            path,
        )
    left = pairs.num_rows - shown.num_rows
    more = f"; {left:,} more are in copies.parquet" if left else ""
    return [report.Figure(path, f"{shown.num_rows} pairs of images side by side", f"{caption}{more}.", True)]


def _named(row: dict[str, Any], side: str) -> str:
    group, label = row[f"group_{side}"] or "none", row[f"label_{side}"] or "none"
    return f"{row[f'path_{side}']}\ngroup: {group}\nlabel: {label}"


def _conflict_section(out: Path, told: Ingested, images: bool) -> list[report.Section]:
    conflicts = told.info["conflicting_copies"]
    if not conflicts:
        return []
    text = report.Warning(
        f"Sets of copies that disagree on their label: {len(conflicts):,}. They were left unlabelled: say which label "
        "is right in the source and ingest it again."
    )
    at = {path: row for row, path in enumerate(told.manifest["path"].to_pylist())}
    rows = [at[path] for paths in conflicts for path in paths][:SHOWN]
    groups = told.manifest["group_given"].to_pylist()
    file = out / "figures" / "conflicts.png"
    if images:
        file.parent.mkdir(exist_ok=True)
        paths = told.manifest["path"].to_pylist()
        captions = [
            f"{paths[row]}\ngroup: {groups[row] or 'none'}\nlabel: {told.labels[row] or 'none'}" for row in rows
        ]
        figures.contact_sheet(told.pictures(rows), captions, file, columns=4)
    total = sum(map(len, conflicts))
    caption = f"Copies with different labels, set by set ({len(rows)} of {total:,} images); all are in copies.parquet."
    return [
        report.Section(
            "Labels that contradict each other", [text, report.Figure(file, "Copies that disagree", caption, True)]
        )
    ]
