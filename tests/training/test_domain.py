"""Whether an image is unlike the training set: distances, their calibration, and the file they are kept in."""

from __future__ import annotations

import numpy as np
import pytest

from cluster.errors import UsageError
from training import domain


def cloud(count: int, seed: int, centre: int = 0) -> np.ndarray:
    """Points near one axis of a 16-dimensional space."""
    values = 0.1 * np.random.default_rng(seed).normal(size=(count, 16))
    values[:, centre] += 1
    return values.astype(np.float32)


def known(count: int = 400) -> domain.Domain:
    reference, looks, others, other_looks = (cloud(n, seed) for n, seed in ((300, 0), (300, 5), (count, 1), (count, 6)))
    far = domain.distances_to(reference, others), domain.look_distances_to(looks, other_looks)
    return domain.learn(reference, looks, *far)


def typicality(learnt: domain.Domain, features: np.ndarray, looks: np.ndarray) -> np.ndarray:
    return learnt.judge(features, looks)[0]


def test_feature_distance_is_the_mean_cosine_distance_of_the_nearest() -> None:
    reference, query = cloud(50, 0), cloud(7, 1)
    unit = reference / np.linalg.norm(reference, axis=1, keepdims=True)
    by_hand = []
    for row in query:
        cosines = sorted(unit @ (row / np.linalg.norm(row)), reverse=True)
        by_hand.append(1 - np.mean(cosines[: domain.NEAREST]))
    assert np.allclose(domain.distances_to(reference, query), by_hand, atol=1e-6)


def test_look_distance_counts_in_units_of_spread() -> None:
    reference, query = cloud(50, 0), cloud(7, 1)
    scale = np.linspace(1, 100, 16)
    plain = domain.look_distances_to(reference * 1000, query * 1000)
    assert np.allclose(domain.look_distances_to(reference * 1000 * scale, query * 1000 * scale), plain, rtol=1e-3)
    z = (query[0] - reference.mean(axis=0)) / (reference.std(axis=0) + 1e-3)
    others = (reference - reference.mean(axis=0)) / (reference.std(axis=0) + 1e-3)
    nearest = np.sort(np.linalg.norm(others - z, axis=1))[: domain.NEAREST]
    assert domain.look_distances_to(reference, query)[0] == pytest.approx(nearest.mean(), rel=1e-4)


def test_fewer_references_than_neighbours_are_all_averaged() -> None:
    assert domain.distances_to(cloud(2, 0), cloud(3, 1)).shape == (3,)
    assert domain.look_distances_to(cloud(1, 0), cloud(3, 1)).shape == (3,)


def test_about_one_percent_of_its_own_kind_is_refused() -> None:
    """Also of images that calibrated nothing, although two distances are asked."""
    learnt = known(1000)
    refused = typicality(learnt, cloud(20_000, 3), cloud(20_000, 8)) < domain.LIMIT
    assert 0.002 < refused.mean() < 0.03


@pytest.mark.parametrize(("features", "looks"), [(5, 0), (0, 5), (5, 5)])
def test_what_is_odd_in_features_or_in_looks_is_refused(features: int, looks: int) -> None:
    found = typicality(known(), cloud(100, 4, centre=features), cloud(100, 9, centre=looks))
    assert (found < domain.LIMIT).all()


def test_too_few_known_images_refuse_nothing() -> None:
    assert typicality(known(40), cloud(1, 3, centre=9), cloud(1, 4, centre=9))[0] >= domain.LIMIT


def test_typicality_is_a_share_and_falls_with_distance() -> None:
    learnt, steps = known(), np.linspace(0, 1, 30)[:, None]
    path = ((1 - steps) * cloud(1, 7) + steps * cloud(1, 7, centre=3)).astype(np.float32)
    values, distance = learnt.judge(path, np.repeat(cloud(1, 8), 30, axis=0))
    assert (np.diff(values[distance.argsort()]) <= 0).all()
    assert 0 < values.min() < domain.LIMIT < values.max() <= 1


def test_looks_tell_colour_brightness_and_sharpness() -> None:
    grey = np.full((1, 16, 16, 3), 128, dtype=np.uint8)
    red, dark = grey.copy(), grey // 4
    red[..., 1:] = 0
    noisy = np.random.default_rng(0).integers(0, 255, grey.shape, dtype=np.uint8)
    looks = domain.look_of(np.concatenate([grey, red, dark, noisy]))
    assert looks.shape == (4, 25) and looks.dtype == np.float32
    assert domain.look_of(grey[..., :1]).shape == (1, 9)
    distances = np.linalg.norm(looks[:, None] - looks[None], axis=2)
    assert (distances[~np.eye(4, dtype=bool)] > 0.3).all()
    assert np.allclose(looks[0, :15], 128 / 255) and np.allclose(looks[0, 15:], 0)


def test_large_sets_are_sampled_always_alike() -> None:
    rows = domain.sampled_rows(50_000, 10_000)
    assert len(set(rows)) == 10_000
    assert (rows == domain.sampled_rows(50_000, 10_000)).all()
    assert (domain.sampled_rows(5, 10) == np.arange(5)).all()


def test_bytes_round_trip_and_damage_is_one_line() -> None:
    learnt = known()
    again = domain.load_domain(learnt.dumps())
    for name in ("vectors", "looks", "distances", "look_distances"):
        assert np.array_equal(getattr(again, name), getattr(learnt, name))
    with pytest.raises(UsageError, match=r"reference\.safetensors: damaged"):
        domain.load_domain(learnt.dumps()[:40])
