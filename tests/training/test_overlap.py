"""What a stage and the target share: by image, by group, and through copies. Cases written out by hand."""

from __future__ import annotations

import pyarrow as pa
import pytest

from training.overlap import Overlap, groups_of, overlap_between


def rows(*pairs: str) -> pa.Table:
    """A table of `image group` pairs."""
    split = [pair.split(" ") for pair in pairs]
    return pa.table(
        {"sha256": pa.array([s for s, _ in split], pa.string()), "group": pa.array([g for _, g in split], pa.string())}
    )


def test_strangers_share_nothing() -> None:
    ours, theirs = rows("a p1", "b p2"), rows("c q1", "d q2")
    assert overlap_between(theirs, theirs, ours, ours, same=False) == Overlap(0, 0, "", 0)


def test_an_image_of_both_is_shared_with_its_group() -> None:
    ours, theirs = rows("a p1", "b p2"), rows("a q1", "d q2")
    assert overlap_between(theirs, theirs, ours, ours, same=False) == Overlap(1, 1, "p1", 0)


def test_in_one_dataset_other_images_of_the_same_patient_are_a_shared_group() -> None:
    manifest = rows("a p1", "b p1", "c p2")
    assert overlap_between(manifest, manifest.slice(0, 1), manifest, manifest.slice(1, 2), same=True) == Overlap(
        0, 1, "p1", 0
    )


def test_two_rows_of_one_dataset_without_a_common_group_share_nothing() -> None:
    manifest = rows("a p1", "b p2")
    assert overlap_between(manifest, manifest.slice(0, 1), manifest, manifest.slice(1, 1), same=True).groups == 0


def test_a_patient_of_the_target_is_found_through_an_image_that_neither_side_uses() -> None:
    """The target's DATASET says that image x, which the stage trained on, is of patient p1: so are others judged."""
    target, judged, stage = rows("a p1", "x p1"), rows("a p1"), rows("x q7")
    assert overlap_between(stage, stage, target, judged, same=False) == Overlap(0, 1, "p1", 0)


def test_a_patient_of_the_stage_is_found_through_an_image_that_only_its_dataset_lists() -> None:
    """The stage's DATASET says that image a, which is judged, is of patient q7, on whose image x it trained."""
    stage, trained, target = rows("a q7", "x q7", "y q8"), rows("x q7", "y q8"), rows("a p1", "b p2")
    assert overlap_between(stage, trained, target, target, same=False) == Overlap(0, 1, "p1", 0)


def test_groups_of_other_datasets_that_only_have_the_same_name_are_counted_apart() -> None:
    ours, theirs = rows("a 17", "b 18", "c image:x"), rows("d 17", "e 19", "f image:x")
    assert overlap_between(theirs, theirs, ours, ours, same=False) == Overlap(0, 0, "", 1)


def test_an_unreadable_image_without_a_group_links_nothing() -> None:
    ours, theirs = rows("a p1", "bad "), rows("bad ", "c q1", " q1")
    assert overlap_between(theirs, theirs, ours, ours, same=False) == Overlap(0, 0, "", 0)


@pytest.mark.parametrize("length", [4, 2])
def test_groups_are_found_by_whole_and_by_shortened_hashes(length: int) -> None:
    manifest = rows("aaaa p1", "bbbb p1", "cccc p2", "dddd p3")
    judged = manifest.slice(1, 2)
    assert groups_of({"aaaa"[:length], "dddd"[:length]}, manifest, judged) == {"p1"}
    assert groups_of(set(), manifest, judged) == set()
