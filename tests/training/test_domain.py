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


def known() -> domain.Domain:
    return domain.learn(cloud(300, 0), domain.distances_to(cloud(300, 1), cloud(400, 2)))


def test_distance_is_the_mean_cosine_distance_of_the_nearest() -> None:
    reference, query = cloud(50, 0), cloud(7, 1)
    unit = reference / np.linalg.norm(reference, axis=1, keepdims=True)
    by_hand = []
    for row in query:
        cosines = sorted(unit @ (row / np.linalg.norm(row)), reverse=True)
        by_hand.append(1 - np.mean(cosines[: domain.NEAREST]))
    assert np.allclose(domain.distances_to(reference, query), by_hand, atol=1e-6)


def test_fewer_references_than_neighbours_are_all_averaged() -> None:
    assert domain.distances_to(cloud(2, 0), cloud(3, 1)).shape == (3,)


def test_about_one_percent_of_its_own_kind_is_refused() -> None:
    """Also of images that calibrated nothing."""
    learnt = known()
    refused = learnt.typicality(learnt.distance(cloud(20_000, 3))) < domain.LIMIT
    assert 0.001 < refused.mean() < 0.03


def test_another_kind_is_refused() -> None:
    learnt = known()
    assert (learnt.typicality(learnt.distance(cloud(100, 4, centre=5))) < domain.LIMIT).all()


def test_threshold_is_where_typicality_crosses_the_limit() -> None:
    learnt = known()
    edge = np.float32(learnt.threshold)
    assert learnt.typicality(np.asarray([edge]))[0] >= domain.LIMIT
    assert learnt.typicality(np.asarray([np.nextafter(edge, np.float32(2))]))[0] < domain.LIMIT


def test_too_few_known_images_refuse_nothing() -> None:
    small = domain.learn(cloud(40, 0), domain.distances_to(cloud(40, 1), cloud(40, 2)))
    far = small.distance(cloud(1, 3, centre=9))
    assert small.typicality(far)[0] >= domain.LIMIT
    assert small.threshold == float("inf")


def test_typicality_falls_with_distance() -> None:
    values = known().typicality(np.linspace(0, 2, 50))
    assert (np.diff(values) <= 0).all()
    assert values[0] == 1


def test_large_sets_are_sampled_always_alike() -> None:
    rows = domain.sampled_rows(50_000, 10_000)
    assert len(set(rows)) == 10_000
    assert (rows == domain.sampled_rows(50_000, 10_000)).all()
    assert (domain.sampled_rows(5, 10) == np.arange(5)).all()


def test_bytes_round_trip_and_damage_is_one_line() -> None:
    learnt = known()
    again = domain.load_domain(learnt.dumps())
    assert (again.vectors == learnt.vectors).all()
    assert (again.distances == learnt.distances).all()
    with pytest.raises(UsageError, match=r"reference\.safetensors: damaged"):
        domain.load_domain(learnt.dumps()[:40])
