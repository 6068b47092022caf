"""What a stage's images and the target's have in common: images by their bytes, groups by name and through copies.

A group (patient, slide) of the target that a labelled stage has seen is no longer unseen in any test fold.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import pyarrow as pa

from training.dataset import UNGROUPED, Dataset, Selection


@dataclass(frozen=True)
class Overlap:
    """Of a target: how many of its images, and of its groups, a stage shares, such as group `example`.

    `namesakes` are further groups that only have their name in common with one of another DATASET: perhaps the same
    patients, perhaps two that were both called 17.
    """

    images: int
    groups: int
    example: str
    namesakes: int

    def as_dict(self) -> dict[str, int]:
        return {"images": self.images, "groups": self.groups, "namesakes": self.namesakes}


def overlap(stage: Dataset, trained: Selection, target: Dataset, judged: Selection) -> Overlap:
    """What the rows `trained` of the DATASET of a stage share with the rows `judged` of the target's."""
    return overlap_between(
        stage.manifest, trained.table, target.manifest, judged.table, same=stage.version == target.version
    )


def overlap_between(
    stage_manifest: pa.Table, trained: pa.Table, target_manifest: pa.Table, judged: pa.Table, *, same: bool
) -> Overlap:
    """As `overlap`, over tables with columns `sha256` and `group`; `same`: both manifests are of one DATASET.

    Groups are shared by name within one DATASET (where ingest gave copies one group), and between two of them where
    either manifest, in any of its rows, puts an image of the one side into a group of the other.
    """
    own, theirs = _pairs(judged), _pairs(trained)
    own_groups, their_groups = {g for _, g in own}, {g for _, g in theirs}
    their_images = {s for s, _ in theirs}
    shared = _groups_with(their_images, target_manifest) & own_groups
    # groups of the stage that hold, anywhere in its DATASET, an image of the target; then those images' groups here
    linked = _groups_with({s for s, _ in own}, stage_manifest) & their_groups
    twins = {s for s, g in _pairs(stage_manifest) if g in linked}
    shared |= {g for s, g in own if s in twins}
    named = {g for g in own_groups & their_groups if not g.startswith(UNGROUPED)}
    if same:
        shared |= own_groups & their_groups
    images = sum(s in their_images for s, _ in own)
    return Overlap(images, len(shared), min(shared, default=""), len(named - shared))


def groups_of(images: Collection[str], manifest: pa.Table, judged: pa.Table) -> set[str]:
    """Groups of the rows `judged` that hold, in any row of their DATASET's manifest, one of `images` (whole sha256 or
    its beginning, all of one length)."""
    size = len(next(iter(images), ""))
    known = {g for s, g in _pairs(manifest) if s[:size] in images} if images else set()
    return known & {g for _, g in _pairs(judged)}


def _pairs(table: pa.Table) -> list[tuple[str, str]]:
    """(sha256, group) of the rows that have both; an unreadable image has no group."""
    rows = zip(table["sha256"].to_pylist(), table["group"].to_pylist(), strict=True)
    return [(s, g) for s, g in rows if s and g]


def _groups_with(images: Collection[str], table: pa.Table) -> set[str]:
    return {g for s, g in _pairs(table) if s in images}
