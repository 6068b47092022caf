"""Probes of an encoder: what the figures are on features whose truth is known, and that looking changes nothing."""

from __future__ import annotations

import copy
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor, nn

from training import phantom, probe
from training.dataset import Dataset, Selection
from training.encoder import Architecture, seed_weights
from training.probe import LIMIT, POOL_LIMIT, ProbeData, probe_data
from training.splits import cross_validation
from training.transform import Input

SIZE = 32
INPUT = Input(SIZE, SIZE, 1, (0.5,), (0.25,))


# Effective rank


def basis(count: int, dim: int, seed: int = 0) -> np.ndarray:
    """Orthonormal rows [count, dim]."""
    return np.asarray(np.linalg.qr(np.random.default_rng(seed).normal(size=(dim, count)))[0].T)


@pytest.mark.parametrize("dim", [1, 2, 7, 64])
def test_rows_that_fill_all_directions_alike_have_the_rank_of_the_dimension(dim: int) -> None:
    assert probe.effective_rank(basis(dim, dim) * 3) == pytest.approx(dim)


def test_one_direction_counts_one_and_two_equal_ones_two() -> None:
    rng = np.random.default_rng(1)
    assert probe.effective_rank(rng.normal(size=(40, 1)) * basis(1, 16)) == pytest.approx(1)
    assert probe.effective_rank(np.repeat(basis(2, 16), 20, axis=0)) == pytest.approx(2)
    assert probe.effective_rank(np.zeros((10, 4))) == 0


def test_unequal_directions_count_by_the_entropy_of_their_shares() -> None:
    shares = np.asarray([0.5, 0.25, 0.25])
    expected = 2**1.5  # an entropy of 1.5 bits
    assert probe.effective_rank(shares[:, None] * basis(3, 8)) == pytest.approx(expected)


# Scores of features


def grouped(classes: int, groups: int, per_group: int) -> tuple[np.ndarray, np.ndarray]:
    """(class, group) of each image: groups of one class each."""
    group = np.repeat(np.arange(groups), per_group)
    return group % classes, group


def data_of(truth: np.ndarray, groups: np.ndarray, pixels: np.ndarray | None = None) -> ProbeData:
    count = int(truth.max()) + 1
    images = np.zeros((len(truth), 1, 1, 1), np.uint8) if pixels is None else pixels
    folds = cross_validation(
        [str(t) for t in truth], [str(g) for g in groups], folds=3, repeats=1, split="group", seed=0
    )
    names = tuple(str(k) for k in range(count))
    return ProbeData(images, truth, groups, names, tuple(folds), images, transductive=True)


def fingerprints(groups: np.ndarray, seed: int = 0) -> np.ndarray:
    """Features that name the group and nothing else: whoever may look at the own group is always right."""
    rng = np.random.default_rng(seed)
    return np.asarray(rng.normal(size=(groups.max() + 1, 32))[groups] + 0.05 * rng.normal(size=(len(groups), 32)))


def test_neighbours_of_the_own_group_have_no_vote() -> None:
    truth, groups = grouped(classes=4, groups=120, per_group=4)
    features = fingerprints(groups)
    alone = np.arange(len(truth))  # as if every image were a group of its own
    assert (probe.knn(features, truth, alone, 4) == truth).mean() > 0.99
    assert abs((probe.knn(features, truth, groups, 4) == truth).mean() - 0.25) < 0.12


def test_groups_are_whole_in_the_linear_probe() -> None:
    truth, groups = grouped(classes=4, groups=120, per_group=4)
    found = probe.judge(fingerprints(groups), fingerprints(groups), data_of(truth, groups))
    assert abs(found["linear_balanced_accuracy"] - 0.25) < 0.12
    assert found["chance"] == 0.25


def test_neighbours_are_the_ten_nearest_by_cosine_counted_by_hand() -> None:
    rng = np.random.default_rng(2)
    truth, groups = rng.integers(0, 3, 60), rng.integers(0, 20, 60)
    features = rng.normal(size=(60, 5)) * rng.uniform(0.1, 10, (60, 1)) + 1
    for at, answer in enumerate(probe.knn(features, truth, groups, 3)):
        votes = np.zeros(3)
        others = [row for row in range(60) if groups[row] != groups[at]]
        lengths = np.linalg.norm(features, axis=1)
        similar = {row: features[row] @ features[at] / lengths[row] / lengths[at] for row in others}
        for row in sorted(others, key=lambda row: -similar[row])[:10]:
            votes[truth[row]] += np.exp(similar[row] / 0.07)
        assert answer == votes.argmax()


def test_features_that_tell_the_classes_apart_score_one_and_noise_scores_chance() -> None:
    truth, groups = grouped(classes=4, groups=100, per_group=4)
    rng = np.random.default_rng(3)
    good = np.eye(4)[truth] + 0.05 * rng.normal(size=(len(truth), 4))
    noise = rng.normal(size=(len(truth), 16))
    for features, expected, within in ((good, 1.0, 0.001), (noise, 0.25, 0.1)):
        found = probe.judge(features, features, data_of(truth, groups))
        assert found["knn_balanced_accuracy"] == pytest.approx(expected, abs=within)
        assert found["linear_balanced_accuracy"] == pytest.approx(expected, abs=within)
        assert not found["collapsed"] and probe.alarm(found) is None


def test_fewer_images_than_neighbours_still_get_an_answer() -> None:
    truth, groups = grouped(classes=2, groups=6, per_group=1)
    features = np.eye(2)[truth] + 0.01 * np.arange(6)[:, None]
    assert (probe.knn(features, truth, groups, 2) == truth).all()


# Collapse


def collapse_of(features: np.ndarray) -> dict[str, Any]:
    truth, groups = grouped(classes=2, groups=len(features) // 4, per_group=4)
    return probe.judge(features, features, data_of(truth, groups))


def test_constant_features_and_features_along_one_line_are_a_collapse() -> None:
    rng = np.random.default_rng(4)
    point = rng.normal(size=(1, 64))
    constant = np.repeat(point, 64, axis=0)
    line = point + rng.normal(size=(64, 1)) * rng.normal(size=(1, 64))
    for features in (constant, constant + 1e-5 * rng.normal(size=(64, 64)), line):
        found = collapse_of(features.astype(np.float32))
        assert found["collapsed"]
        text = probe.alarm(probe.row_of(1200, found))
        assert text is not None and text.startswith("the encoder has collapsed at step 1,200: ") and "\n" not in text
    assert collapse_of(constant.astype(np.float32))["effective_rank"] == 0


def test_a_large_constant_part_is_no_collapse_and_neither_is_a_handful_of_images() -> None:
    rng = np.random.default_rng(5)
    features = 30 + rng.normal(size=(64, 64))
    assert not collapse_of(features)["collapsed"]
    assert not collapse_of(3000 + rng.normal(size=(64, 64)))["collapsed"]
    assert not probe.collapsed(1.0, 0.0, 64, images=20)


def test_features_that_are_no_numbers_are_a_collapse_without_scores() -> None:
    features = np.random.default_rng(6).normal(size=(64, 8))
    features[5, 2] = np.nan
    found = collapse_of(features)
    assert found["collapsed"] and "knn_balanced_accuracy" not in found
    assert json.loads(json.dumps(found)) == found


# Networks


def vit(channels: int = 1) -> nn.Module:
    network = Architecture("test_vit", SIZE, SIZE, channels, 8).build()
    seed_weights(network, 0, "encoder.")
    return network


class Fake(nn.Module):
    """A network with timm's two methods whose features are a plain function of the images."""

    def __init__(self, constant: bool) -> None:
        super().__init__()
        self.constant = constant
        self.weight = nn.Parameter(torch.ones(1))

    def forward_features(self, images: Tensor) -> Tensor:
        """The one-hot code that a cheat wrote into the first pixels, or the same for all."""
        code = images[:, 0, 0, :4] * self.weight
        return torch.ones(len(images), 4) if self.constant else (code > 0).float()

    def forward_head(self, tokens: Tensor, pre_logits: bool) -> Tensor:
        assert pre_logits
        return tokens


def phantoms_of(count: int) -> ProbeData:
    """Probe data of `count` phantoms whose truth is known, without Ray and without a DATASET."""
    rows = phantom.rows(count, seed=0)
    pixels = np.stack([phantom.render(row.index, count, 0, SIZE)[..., None] for row in rows])
    truth = np.asarray([phantom.LEAVES.index(row.truth) for row in rows])
    groups = np.unique([row.group for row in rows], return_inverse=True)[1]
    return data_of(truth, groups, pixels)


@pytest.fixture(scope="module")
def images() -> ProbeData:
    return phantoms_of(300)


def test_an_untrained_network_is_near_chance_on_phantoms_and_has_not_collapsed(images: ProbeData) -> None:
    found = probe.probe(vit(), INPUT, images)
    assert found["knn_balanced_accuracy"] < 0.45 and found["linear_balanced_accuracy"] < 0.45
    assert found["feature_dimension"] == 64 and 2 < found["effective_rank"] < 64
    assert not found["collapsed"]


def test_a_network_that_cheats_scores_one(images: ProbeData) -> None:
    pixels = images.labelled.copy()
    pixels[:, 0, :4, 0] = 255 * np.eye(4)[images.truth]
    found = probe.probe(Fake(constant=False), INPUT, replace(images, labelled=pixels, pool=pixels))
    assert found["knn_balanced_accuracy"] == found["linear_balanced_accuracy"] == 1
    assert 2 < found["effective_rank"] <= 4


def test_a_constant_network_raises_the_alarm(images: ProbeData) -> None:
    found = probe.probe(Fake(constant=True), INPUT, images)
    assert found["collapsed"] and probe.alarm(found) is not None
    assert found["knn_balanced_accuracy"] == pytest.approx(0.25, abs=0.1)


def test_the_same_probe_gives_the_same_figures_ready_for_json(images: ProbeData) -> None:
    first, second = (probe.probe(vit(), INPUT, images) for _ in range(2))
    assert first == second
    assert json.loads(json.dumps(first)) == first
    assert set(probe.SCALARS) < set(first)


def test_looking_changes_neither_weights_nor_modes_nor_random_states(images: ProbeData) -> None:
    network = vit().train()
    network.blocks[1].eval()  # type: ignore[index, union-attr]
    before = copy.deepcopy(network.state_dict())
    modes = [part.training for part in network.modules()]
    states = torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[index]
    probe.probe(network, INPUT, images)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert [part.training for part in network.modules()] == modes
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])  # type: ignore[index]
    assert all(parameter.requires_grad and parameter.grad is None for parameter in network.parameters())


def test_without_labels_only_the_features_are_measured(images: ProbeData) -> None:
    none = np.empty(0, np.int64)
    data = ProbeData(images.pool[:0], none, none, (), (), images.pool, transductive=False)
    found = probe.probe(vit(), INPUT, data)
    assert set(found) == {"effective_rank", "feature_spread", "feature_dimension", "collapsed"}
    assert found["effective_rank"] == probe.probe(vit(), INPUT, images)["effective_rank"]
    assert "Too few labelled groups" in data.sentence


@pytest.mark.slow
def test_a_probe_costs_seconds() -> None:
    """`vit_tiny` at 96 px, as many images as there can be, on one thread."""
    truth, groups = grouped(classes=4, groups=LIMIT // 4, per_group=4)
    pixels = np.random.default_rng(7).integers(0, 256, (LIMIT, 96, 96, 1), dtype=np.uint8)
    data = replace(data_of(truth, groups, pixels), pool=pixels[:POOL_LIMIT])
    network = Architecture("vit_tiny_patch16_224", 96, 96, 1, 12).build()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        began = time.process_time()
        probe.probe(network, Input(96, 96, 1, (0.5,), (0.25,)), data)
        assert time.process_time() - began < 30
    finally:
        torch.set_num_threads(threads)


# What is looked at


def chosen(names: list[str], groups: list[str], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(names, groups) of the chosen rows."""
    rows = probe.choose_rows(np.asarray(names), np.asarray(groups), seed)
    assert np.array_equal(rows, np.unique(rows)) and len(rows) <= LIMIT
    return np.asarray(names)[rows], np.asarray(groups)[rows]


def test_all_images_are_taken_where_they_are_few() -> None:
    names, groups = list("aabbccdd") * 10, [f"g{at}" for at in range(80)]
    assert len(chosen(names, groups)[0]) == 80


def test_classes_are_as_equal_as_they_can_be_and_groups_stay_whole() -> None:
    names = ["common"] * 3000 + ["rare"] * 100 + ["some"] * 900
    groups = [f"{name}{at // 5}" for at, name in enumerate(names)]
    labels, units = chosen(names, groups)
    counts = {name: int((labels == name).sum()) for name in ("common", "rare", "some")}
    assert counts["rare"] == 100 and abs(counts["common"] - counts["some"]) <= 5
    assert LIMIT - 7 < sum(counts.values()) <= LIMIT
    assert {int((units == unit).sum()) for unit in np.unique(units)} == {5}


def test_a_huge_group_is_thinned_so_that_others_find_room() -> None:
    names = ["a"] * 5000 + ["b"] * 5000
    groups = [f"slide{at // 1000}" for at in range(10_000)]
    labels, units = chosen(names, groups)
    assert len(np.unique(units[labels == "a"])) >= 3 and len(np.unique(units[labels == "b"])) >= 3


def test_a_class_of_two_groups_is_dropped_and_one_class_is_none() -> None:
    names = ["a"] * 20 + ["b"] * 20 + ["c"] * 20
    groups = [f"g{at // 2}" for at in range(40)] + [f"c{at % 2}" for at in range(20)]
    labels, _ = chosen(names, groups)
    assert set(labels) == {"a", "b"}
    assert len(chosen(names[20:], groups[20:])[0]) == 0
    assert len(chosen([], [])[0]) == 0


def test_the_seed_decides_which_images() -> None:
    names, groups = ["a", "b"] * 2000, [f"g{at}" for at in range(4000)]
    first, same, other = (chosen(names, groups, seed)[1] for seed in (0, 0, 1))
    assert np.array_equal(first, same) and not np.array_equal(first, other)


@pytest.mark.ray
def test_labelled_images_of_the_pool_are_probed_and_it_is_said(phantoms: Path) -> None:
    dataset = Dataset.open(phantoms)
    pool = dataset.select()
    data = probe_data(dataset, pool, seed=0)
    labels = [name for name in pool.column("label") if name]
    assert len(data.truth) == len(data.labelled) == len(labels) and data.classes == tuple(sorted(set(labels)))
    assert data.labelled.shape[1:] == data.pool.shape[1:] == (32, 32, 1) and len(data.pool) == POOL_LIMIT
    tested = np.concatenate([fold.test for fold in data.folds])
    assert sorted(tested) == list(range(len(data.truth)))
    for fold in data.folds:
        assert not set(data.groups[fold.train]) & set(data.groups[fold.test])
    assert data.transductive and "was pretrained on these images too, without their labels" in data.sentence
    again = probe_data(dataset, pool, seed=0)
    assert np.array_equal(again.labelled, data.labelled) and np.array_equal(again.pool, data.pool)


@pytest.mark.ray
def test_labelled_images_left_out_of_the_pool_are_probed_with_none_of_their_groups_in_it(phantoms: Path) -> None:
    dataset = Dataset.open(phantoms)
    everything = dataset.select()
    labels, groups = everything.column("label"), everything.column("group")
    pool = everything.take([at for at, name in enumerate(labels) if not name or groups[at] == groups[0]])
    data = probe_data(dataset, pool, seed=0)
    expected = [at for at, name in enumerate(labels) if name and groups[at] != groups[0]]
    assert not data.transductive and len(data.truth) == len(expected)
    assert np.array_equal(data.labelled, dataset.pixels(everything.take(expected)))
    assert "Neither they nor other images of their groups are in the pretraining pool" in data.sentence


@pytest.mark.ray
def test_a_dataset_without_usable_labels_has_only_a_pool(phantoms: Path) -> None:
    opened = Dataset.open(phantoms)
    table = opened.select().table
    for label in ("", "one", "a|b"):
        column = pa.array([label] * table.num_rows)
        changed = table.set_column(table.column_names.index("label"), "label", column)
        dataset = Dataset(opened.uri, opened.info)
        vars(dataset)["manifest"] = changed
        data = probe_data(dataset, Selection(changed), seed=0)
        assert len(data.truth) == 0 and data.folds == () and len(data.pool) == POOL_LIMIT


# Rows


def test_of_a_probe_made_again_after_a_restart_the_last_is_kept() -> None:
    rows = [
        {"step": 1, "loss": 2.0},
        probe.row_of(50, {"effective_rank": 1.0}),
        probe.row_of(25, {"effective_rank": 2.0}, probe_seconds=1.5),
        {"event": "start", "from_step": 25},
        probe.row_of(50, {"effective_rank": 3.0}),
    ]
    found = probe.probes_in(rows)
    assert [(row["probed_step"], row["effective_rank"]) for row in found] == [(25, 2.0), (50, 3.0)]
    assert all("step" not in row for row in found)
