"""Gated attention pooling: the formula by a loop, a sign in one view among many that it finds, and what it may see."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from cluster.errors import UsageError
from training.encoder import seed_weights
from training.tasks.pooling import GatedAttention, Pooler, fit_attention, load_pooler

NOBODY = np.empty(0, np.int64)
both_kinds = pytest.mark.parametrize("several", [False, True])


def views(cases: int = 300, dimension: int = 8, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Cases of 4 to 12 views, one of which is marked and shows the class, in the signs that the other views show at
    random: features [N, D], the case of each row, truth [U] and the row [U] that tells."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, 2, cases)
    features: list[np.ndarray] = []
    unit: list[int] = []
    telling: list[int] = []
    for case in range(cases):
        count = int(rng.integers(4, 13))
        own = rng.normal(0, 1, (count, dimension))
        own[:, 1] += rng.choice([-3, 3], count)
        shown = int(rng.integers(count))
        own[shown, 0] += 6
        own[shown, 1] = (3 if truth[case] else -3) + rng.normal(0, 1)
        telling.append(len(unit) + shown)
        features.append(own)
        unit += [case] * count
    return np.concatenate(features).astype(np.float32), np.asarray(unit), truth, np.asarray(telling)


def sets_of(truth: np.ndarray) -> np.ndarray:
    """Two labels for each class number: the class, and what holds for a third of the cases at random."""
    return np.stack([truth == 1, np.random.default_rng(0).random(len(truth)) < 0.3], axis=1)


def trained(several: bool = False) -> tuple[Pooler, np.ndarray, np.ndarray, np.ndarray]:
    features, unit, truth, _ = views(40)
    labels = sets_of(truth) if several else truth
    sides = np.arange(30), np.arange(30, 40)
    return fit_attention(features, unit, labels, *sides, classes=2, seed=1, epochs=15), features, unit, labels


def test_attention_and_logits_are_those_of_the_formula_case_by_case() -> None:
    rng = np.random.default_rng(0)
    network = GatedAttention(5, 3)
    seed_weights(network, 3, "test.")
    network.mean.copy_(torch.full((5,), 0.3))
    network.scale.copy_(torch.full((5,), 2.0))
    features, unit = rng.normal(size=(9, 5)).astype(np.float32), np.asarray([1, 0, 1, 1, 2, 0, 1, 1, 1])
    with torch.no_grad():
        logits, attention = network.eval()(torch.from_numpy(features), torch.from_numpy(unit), 3)
    tensors = {name: value.numpy().astype(np.float64) for name, value in network.state_dict().items()}
    for case in range(3):
        rows = np.flatnonzero(unit == case)
        h = (features[rows] - 0.3) / 2
        value = np.tanh(h @ tensors["value.weight"].T + tensors["value.bias"])
        gate = 1 / (1 + np.exp(-(h @ tensors["gate.weight"].T + tensors["gate.bias"])))
        scores = np.asarray([tensors["score.weight"][0] @ (v * g) for v, g in zip(value, gate, strict=True)])
        shares = np.exp(scores) / np.exp(scores).sum()
        assert np.allclose(attention[rows], shares, atol=1e-5)
        summed = sum(share * row for share, row in zip(shares, h, strict=True))
        expected = tensors["classifier.weight"] @ summed + tensors["classifier.bias"]
        assert np.allclose(logits[case], expected, atol=1e-4)


def test_a_sign_in_one_view_is_found_where_the_mean_of_all_views_drowns_it() -> None:
    features, unit, truth, telling = views()
    train, held, test = np.split(np.arange(300), [165, 210])
    pooler = fit_attention(features, unit, truth, train, held, classes=2, seed=0)
    found = pooler.probabilities(features, unit)[test]
    right = (found.argmax(axis=1) == truth[test]).mean()
    means = np.stack([features[unit == case].mean(axis=0) for case in range(300)])
    plain = LogisticRegression(C=0.1).fit(means[train], truth[train])
    assert right > 0.85 > plain.score(means[test], truth[test]) + 0.1
    attention = pooler.attention(features, unit)
    likeliest = [np.flatnonzero(unit == case)[attention[unit == case].argmax()] for case in test]
    assert (np.asarray(likeliest) == telling[test]).mean() > 0.8


@both_kinds
def test_neither_the_order_of_the_views_nor_other_cases_matter(several: bool) -> None:
    pooler, features, unit, _ = trained(several)
    order = np.random.default_rng(0).permutation(len(unit))
    found = pooler.probabilities(features, unit)
    assert found.shape == (40, 2) and found.dtype == np.float64
    assert np.allclose(found.sum(axis=1), 1) != several
    assert np.allclose(pooler.probabilities(features[order], unit[order]), found, atol=1e-6)
    mine = unit == 7
    assert np.allclose(pooler.probabilities(features[mine], unit[mine] * 0), found[[7]], atol=1e-6)


@both_kinds
def test_a_kept_attention_answers_exactly_as_before(several: bool) -> None:
    pooler, features, unit, _ = trained(several)
    again = load_pooler(pooler.dumps(1.75), features.shape[1], 2)
    assert np.array_equal(again.probabilities(features, unit), pooler.probabilities(features, unit))
    assert (again.temperature, again.best_epoch, again.several) == (1.75, pooler.best_epoch, several)


@pytest.mark.parametrize("content", [b"", b"\x08" + b"\x00" * 7 + b"{}      ", b"junk" * 100])
def test_a_damaged_attention_is_refused_in_one_line(content: bytes) -> None:
    with pytest.raises(UsageError, match=r"pooling.safetensors: not an attention") as caught:
        load_pooler(content, 24, 2)
    assert "\n" not in str(caught.value)
    pooler, features, _, _ = trained()
    with pytest.raises(UsageError, match=r"pooling.safetensors: not an attention"):
        load_pooler(pooler.dumps(1.0), features.shape[1] + 1, 2)


@both_kinds
def test_fitting_twice_gives_the_same_and_never_looks_at_other_cases(several: bool) -> None:
    one, features, unit, truth = trained(several)
    sides = np.arange(20), np.arange(20, 30)
    first = fit_attention(features, unit, truth, *sides, classes=2, seed=1, epochs=15)
    changed, labels = features.copy(), truth.copy()
    changed[unit >= 30] = 100
    labels[30:] = ~labels[30:] if several else 1 - labels[30:]
    second = fit_attention(changed, unit, labels, *sides, classes=2, seed=1, epochs=15)
    assert np.array_equal(first.probabilities(features, unit), second.probabilities(features, unit))
    assert not np.array_equal(first.probabilities(features, unit), one.probabilities(features, unit))


def test_held_cases_choose_the_epoch_and_without_them_all_epochs_are_done() -> None:
    features, unit, truth, _ = views(40)
    held = fit_attention(features, unit, truth, np.arange(30), np.arange(30, 40), classes=2, seed=0, epochs=60)
    assert held.best_epoch < 60  # 30 cases are soon known by heart
    again = fit_attention(features, unit, truth, np.arange(30), NOBODY, classes=2, seed=0, epochs=held.best_epoch)
    assert again.best_epoch == held.best_epoch
    assert np.allclose(again.probabilities(features, unit), held.probabilities(features, unit), atol=1e-6)
