"""Whether judged images are new to the models that judge them: by their bytes, by their groups, by those groups' names.

Near copies (another scan, crop or format of a seen picture) are found within a DATASET by ingest, which gives them one
group; across DATASETs only a group's name can tell.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import pyarrow as pa

from cluster import storage
from cluster.errors import UsageError
from cluster.progress import say
from training import report
from training.dataset import Selection
from training.lineage import group_digests, named_by, seen_by, short_digests
from training.overlap import groups_of


@dataclass(frozen=True)
class Seen:
    """What of the judged rows was seen in training or pretraining, with labels or without.

    `images` were seen themselves; `relatives` are further ones of the `groups`, such as group `example`, of which an
    image was. `namesakes` are further groups that only have their name in common with a group of the training.
    """

    images: int
    relatives: int
    groups: int
    example: str
    namesakes: int

    @property
    def any(self) -> bool:
        return bool(self.images or self.relatives)

    @property
    def in_words(self) -> str:
        """What was seen, as the subject of a sentence; of rows of which something was."""
        own = f"{self.images:,} of these images"
        others = f"{self.relatives:,} others of groups (patients, slides) of which an image was seen"
        return " and ".join(part for part, count in ((own, self.images), (others, self.relatives)) if count)


def known_of(selection: Selection, manifest: pa.Table, seen: Collection[str], names: Collection[str]) -> Seen:
    """What of a selection of a DATASET was seen.

    Args:
        manifest: of that DATASET: an image of a judged group may have been seen in any of its rows.
        seen, names: as `lineage.seen_by` and `lineage.named_by` give them.
    """
    groups = selection.column("group")
    known = groups_of(seen, manifest, selection.table)
    images = [digest in seen for digest in short_digests(selection)]
    relatives = sum(group in known and not own for group, own in zip(groups, images, strict=True))
    digests = group_digests(groups)
    namesakes = {group for group, digest in digests.items() if digest in names} - known
    return Seen(sum(images), relatives, len(known), min(known, default=""), len(namesakes))


def require_new(
    data: str, selection: Selection, manifest: pa.Table, runs: Sequence[str], *, allow_seen: bool = False
) -> Seen:
    """What any of the models of `runs` has seen of the rows of the DATASET `data`; of namesakes a warning is said.

    Raises:
        UsageError: one of them has seen an image of a judged group, and that is not allowed.
    """
    for run in runs:
        found = known_of(selection, manifest, seen_by(run), ())
        if found.any and not allow_seen:
            raise UsageError(
                f"{data}: {_seen_by(run, found, len(selection))}, so the figures would be too good\n"
                "judge on other images (--where), or accept it with --allow-seen"
            )
    seen, names = (frozenset[str]().union(*map(of, runs)) for of in (seen_by, named_by))
    whole = known_of(selection, manifest, seen, names)
    if whole.namesakes:
        say(f"warning: {_NAMESAKES.format(whole.namesakes, data)}")
    return whole


def blocks(known: Seen) -> list[report.Block]:
    """What a report says of it; nothing where nothing was seen."""
    found: list[report.Block] = []
    if known.any:
        found.append(report.Warning(f"Of a model's own lineage: {known.in_words}. The figures are too good."))
    if known.namesakes:
        found.append(report.Warning(f"{_NAMESAKES.format(known.namesakes, 'the judged data')}."))
    return found


_NAMESAKES = (
    "{:,} groups of {} are called as groups of a model's training are; if they are the same patients, "
    "the figures are too good"
)


def _seen_by(run: str, known: Seen, images: int) -> str:
    said = f"{known.images:,} of {images:,} images were seen in the (pre)training of {run}"
    if not known.relatives:
        return said
    joint = "and {:,} more are" if known.images else "but {:,} are"
    return (
        f"{said}, {joint.format(known.relatives)} of groups (patients, slides) of which it saw other images, such as "
        f"{storage.printable(known.example)!r}"
    )
