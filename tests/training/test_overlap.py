"""Judged images that the first weights have seen: counted by image and by group, and left out."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pyarrow as pa

from training import metrics, report
from training.dataset import Selection
from training.lineage import own_images
from training.overlap import Overlap, overlap_blocks, overlap_of


def selection(rows: dict[str, str]) -> Selection:
    """One row per content, which names its group."""
    digests = [hashlib.sha256(content.encode()).hexdigest() for content in rows]
    return Selection(pa.table({"sha256": pa.array(digests, pa.string()), "group": pa.array(list(rows.values()))}))


def predictions(count: int, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    values = rng.random((count, 2)) + 1e-3
    return {
        "rows": np.arange(count),
        "truth": np.arange(count) % 2,
        "probabilities": values / values.sum(axis=1, keepdims=True),
        "fold": np.arange(count) % 3,
        "repeat": np.zeros(count, dtype=np.int64),
    }


def test_a_group_counts_if_any_of_its_images_was_seen_also_one_that_is_not_judged() -> None:
    judged = {"a1": "ann", "a2": "ann", "b1": "bob", "c1": "cat"}
    everything = judged | {"b unlabelled": "bob", "d unlabelled": "dan"}
    seen = own_images(selection({"a1": "", "b unlabelled": "", "elsewhere": ""}))
    found = overlap_of(selection(judged), selection(everything), seen)
    assert found.image.tolist() == [True, False, False, False]
    assert found.group.tolist() == [True, True, True, False]


def test_nothing_seen_is_one_sentence() -> None:
    judged = {f"{n}": f"p{n}" for n in range(12)}
    found = overlap_of(selection(judged), selection(judged), frozenset())
    blocks, entry = overlap_blocks(found, group=list(judged.values()), **predictions(12))
    assert entry == {"images": 0, "of_images": 12, "groups": 0, "of_groups": 12}
    assert len(blocks) == 1 and isinstance(blocks[0], report.Text)


def test_everything_seen_leaves_nothing_to_judge_and_says_so_in_words() -> None:
    judged = {f"{n}": f"p{n % 4}" for n in range(12)}
    found = overlap_of(selection(judged), selection(judged), own_images(selection(judged)))
    blocks, entry = overlap_blocks(found, group=list(judged.values()), **predictions(12))
    assert entry == {"images": 12, "of_images": 12, "groups": 4, "of_groups": 4, "metrics_without": None}
    assert isinstance(blocks[0], report.Warning) and "12 of the 12 judged images" in blocks[0].text
    assert isinstance(blocks[1], report.Text) and "No group is left" in blocks[1].paragraph


def test_metrics_without_are_those_of_the_groups_of_which_nothing_was_seen() -> None:
    values = predictions(60)
    group = [f"p{n // 4}" for n in range(60)]
    image = np.isin(np.arange(60), [0, 9])
    found = Overlap(image, np.isin(np.arange(60) // 4, [0, 2]))
    blocks, entry = overlap_blocks(found, group=group, resamples=200, **values)
    keep = ~found.group
    expected = metrics.summarise(
        values["truth"][keep],
        values["probabilities"][keep],
        group=np.asarray(group)[keep],
        fold=values["fold"][keep],
        repeat=values["repeat"][keep],
        resamples=200,
    )
    assert entry["metrics_without"] == expected
    assert (entry["images"], entry["groups"], entry["of_groups"]) == (2, 2, 15)
    table = blocks[1]
    assert isinstance(table, report.Table)
    assert table.headers[1:] == ["all 15 groups", "the 13 of which nothing was seen"]
    assert any(row[0] == "balanced_accuracy" and row[1] != row[2] for row in table.rows)


def test_images_judged_in_several_repeats_count_once() -> None:
    values = predictions(12)
    twice = {name: np.concatenate([v, v]) for name, v in values.items()} | {"repeat": np.repeat([0, 1], 12)}
    group = [f"p{n % 4}" for n in range(12)] * 2
    found = Overlap(np.arange(12) % 4 == 0, np.arange(12) % 4 == 0)
    _, entry = overlap_blocks(found, group=group, resamples=50, **twice)
    assert (entry["images"], entry["of_images"], entry["groups"]) == (3, 12, 1)


def test_a_class_of_which_nothing_is_left_is_said() -> None:
    values = predictions(12)
    found = Overlap(values["truth"] == 1, values["truth"] == 1)
    blocks, _ = overlap_blocks(found, group=[f"p{n}" for n in range(12)], resamples=50, **values)
    assert any(isinstance(b, report.Text) and "not comparable" in b.paragraph for b in blocks)
