"""Losses of metric learning: equal to loops by hand and to pytorch-metric-learning's, and a contract for all."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import torch
from pytorch_metric_learning.losses import ProxyAnchorLoss, TripletMarginLoss
from pytorch_metric_learning.miners import BatchHardMiner
from pytorch_metric_learning.reducers import MeanReducer
from torch import Tensor, nn

from training.configs import CentreUpdate, MetricLoss
from training.losses import LOSSES
from training.losses.centre import centre_contrastive, centre_ranking, unit
from training.losses.centres import ALPHA, KEPT, UPDATES, Centres, start_at
from training.losses.proxy_anchor import SHARPNESS, proxy_anchor
from training.losses.triplet import batch_hard_triplet

ROWS, CLASSES, DIMENSION = 12, 4, 5


def some(seed: int = 0, *, several: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings and centres of unit length, and label sets; with `several` also an empty one and a full one."""
    generator = torch.Generator().manual_seed(seed)
    embeddings = unit(torch.randn(ROWS, DIMENSION, generator=generator))
    centres = unit(torch.randn(CLASSES, DIMENSION, generator=generator))
    if several:
        members = torch.rand(ROWS, CLASSES, generator=generator) < 0.4
        members[0], members[1] = False, True
    else:
        members = torch.eye(CLASSES, dtype=torch.bool)[torch.arange(ROWS) % (CLASSES - 1)]  # the last class is absent
    return embeddings, members, centres


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.sqrt(((a - b) ** 2).sum()))


def arrays(*tensors: Tensor) -> list[np.ndarray]:
    return [t.numpy().astype(np.float64) if t.dtype != torch.bool else t.numpy() for t in tensors]


# By hand


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("margin", [1.0, 0.4])
def test_centre_contrastive_is_the_formula_written_as_a_loop(several: bool, margin: float) -> None:
    f, y, c = arrays(*some(several=several))
    total = 0.0
    for i in range(ROWS):
        own, others = np.flatnonzero(y[i]), np.flatnonzero(~y[i])
        total += sum(distance(f[i], c[k]) ** 2 for k in own) / max(1, len(own))
        total += sum(max(0, margin - distance(f[i], c[k])) ** 2 for k in others) / max(1, len(others))
    assert float(centre_contrastive(*some(several=several), margin)) == pytest.approx(total / ROWS, rel=1e-5)


@pytest.mark.parametrize("several", [False, True])
def test_centre_ranking_is_the_formula_written_as_a_loop(several: bool) -> None:
    f, y, c = arrays(*some(several=several))
    total = 0.0
    for i in range(ROWS):
        own, others = np.flatnonzero(y[i]), np.flatnonzero(~y[i])
        for k in own:
            short = [max(0, 0.5 + distance(f[i], c[k]) ** 2 - distance(f[i], c[z]) ** 2) for z in others]
            total += sum(short) / len(own)
    assert float(centre_ranking(*some(several=several), 0.5)) == pytest.approx(total / ROWS, rel=1e-5)


@pytest.mark.parametrize("several", [False, True])
def test_proxy_anchor_is_the_formula_written_as_a_loop(several: bool) -> None:
    f, y, c = arrays(*some(several=several))
    pull, push, present = 0.0, 0.0, 0
    for k in range(CLASSES):
        s = f @ c[k]
        if y[:, k].any():
            present += 1
            pull += np.log(1 + sum(np.exp(-SHARPNESS * (s[i] - 0.1)) for i in np.flatnonzero(y[:, k])))
        push += np.log(1 + sum(np.exp(SHARPNESS * (s[i] + 0.1)) for i in np.flatnonzero(~y[:, k])))
    found = float(proxy_anchor(*some(several=several), 0.1))
    assert found == pytest.approx(pull / present + push / CLASSES, rel=1e-5)


@pytest.mark.parametrize("several", [False, True])
def test_batch_hard_triplet_is_the_formula_written_as_a_loop(several: bool) -> None:
    f, y, _ = arrays(*some(several=several))
    terms = []
    for i in range(ROWS):
        like = [distance(f[i], f[j]) for j in range(ROWS) if j != i and (y[i] & y[j]).any()]
        unlike = [distance(f[i], f[j]) for j in range(ROWS) if not (y[i] & y[j]).any() and j != i]
        if like and unlike:
            terms.append(max(0, 0.2 + max(like) - min(unlike)))
    assert float(batch_hard_triplet(*some(several=several), 0.2)) == pytest.approx(np.mean(terms), rel=1e-5)


def test_a_batch_without_any_triplet_costs_nothing_and_has_a_gradient() -> None:
    embeddings, _, centres = some()
    embeddings.requires_grad_(True)
    members = torch.zeros(ROWS, CLASSES, dtype=torch.bool)
    members[:, 0] = True
    loss = batch_hard_triplet(embeddings, members, centres, 0.2)
    loss.backward()
    assert float(loss.detach()) == 0 and embeddings.grad is not None and not embeddings.grad.any()


# pytorch-metric-learning


def test_proxy_anchor_is_that_of_pytorch_metric_learning() -> None:
    embeddings, members, centres = some()
    theirs = ProxyAnchorLoss(CLASSES, DIMENSION, margin=0.1, alpha=SHARPNESS)
    with torch.no_grad():
        theirs.proxies.copy_(centres)
    expected = float(theirs(embeddings, members.int().argmax(dim=1)).detach())
    assert float(proxy_anchor(embeddings, members, centres, 0.1)) == pytest.approx(expected, rel=1e-4)


def test_batch_hard_triplet_is_that_of_pytorch_metric_learning() -> None:
    embeddings, members, centres = some()
    truth = members.int().argmax(dim=1)
    chosen = BatchHardMiner()(embeddings, truth)
    expected = float(TripletMarginLoss(margin=0.2, reducer=MeanReducer())(embeddings, truth, chosen))
    assert float(batch_hard_triplet(embeddings, members, centres, 0.2)) == pytest.approx(expected, rel=1e-4)


# Centres


def test_the_rule_of_center_loss_is_its_formula_then_the_unit_sphere() -> None:
    embeddings, members, start = some(several=True)
    centres = Centres(start, "rule")
    centres.after_batch(embeddings, members)
    f, y, c = arrays(embeddings, members, start)
    for k in range(CLASSES):
        own = np.flatnonzero(y[:, k])
        moved = c[k] - ALPHA * sum((c[k] - f[i] for i in own), start=np.zeros(DIMENSION)) / (1 + len(own))
        np.testing.assert_allclose(centres()[k].numpy(), moved / np.linalg.norm(moved), atol=1e-6)


def test_means_move_after_an_epoch_half_of_the_way_and_a_class_without_images_stays() -> None:
    embeddings, members, start = some()
    centres = Centres(start, "means")
    for rows in (slice(0, 5), slice(5, ROWS)):
        centres.after_batch(embeddings[rows], members[rows])
        assert torch.equal(centres.points, start)
    centres.after_epoch()
    for k in range(CLASSES - 1):
        mean = unit(embeddings[members[:, k]].mean(dim=0))
        torch.testing.assert_close(centres()[k], unit(KEPT * start[k] + (1 - KEPT) * mean))
    torch.testing.assert_close(centres()[CLASSES - 1], start[CLASSES - 1])
    before = centres().clone()
    centres.after_epoch()  # nothing of the epoch before is counted again
    torch.testing.assert_close(centres(), before)


def test_centres_start_at_the_means_of_their_classes() -> None:
    embeddings, members, _ = some()
    start = start_at(embeddings, members)
    torch.testing.assert_close(start[1], unit(embeddings[members[:, 1]].mean(dim=0)))
    torch.testing.assert_close(start[CLASSES - 1], unit(-embeddings.mean(dim=0)))


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("name", ["centre_contrastive", "centre_ranking"])
def test_a_gradient_reaches_the_centres_only_where_they_are_learnt(name: MetricLoss, update: str) -> None:
    embeddings, members, start = some()
    centres = Centres(start, update)
    embeddings.requires_grad_(True)
    LOSSES[name].function(embeddings, members, centres(), LOSSES[name].margin).backward()
    assert embeddings.grad is not None and embeddings.grad.abs().sum() > 0
    learnt = [p for p in centres.parameters() if p.grad is not None and p.grad.abs().sum() > 0]
    assert len(learnt) == (update == "learnt")


# The contract of every loss


def test_configs_name_every_loss_and_update() -> None:
    assert set(get_args(MetricLoss)) == set(LOSSES)
    assert set(get_args(CentreUpdate)) == set(UPDATES)
    assert {loss.centres for loss in LOSSES.values()} <= {*UPDATES, None}


def trained(name: MetricLoss, *, several: bool, steps: int = 60) -> list[float]:
    """Losses of a linear embedding of 32 rows whose classes overlap."""
    loss, generator = LOSSES[name], torch.Generator().manual_seed(0)
    truth = torch.arange(32) % CLASSES
    members = torch.eye(CLASSES, dtype=torch.bool)[truth]
    if several:
        members = members | torch.eye(CLASSES, dtype=torch.bool)[(truth + 1) % CLASSES]
    rows = torch.randn(32, 10, generator=generator) + members.float() @ torch.randn(CLASSES, 10, generator=generator)
    layer = nn.Linear(10, DIMENSION)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(DIMENSION, 10, generator=generator) / 10)
        layer.bias.zero_()
    centres = Centres(start_at(unit(layer(rows)).detach(), members), loss.centres or "rule")
    optimizer = torch.optim.Adam([*layer.parameters(), *centres.parameters()], lr=0.02)
    values = []
    for _ in range(steps):
        found = unit(layer(rows))
        value = loss.function(found, members, centres(), loss.margin)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        if loss.centres:
            centres.after_batch(found, members)
        values.append(float(value.detach()))
    return values


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_is_finite_falls_on_32_rows_and_is_the_same_twice(name: MetricLoss, several: bool) -> None:
    values = trained(name, several=several)
    assert np.isfinite(values).all()
    assert values[-1] < 0.9 * values[0]
    assert values == trained(name, several=several)


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_takes_embeddings_in_bf16_and_answers_in_float32(name: MetricLoss, several: bool) -> None:
    embeddings, members, centres = some(several=several)
    loss = LOSSES[name]
    whole = loss.function(embeddings, members, centres, loss.margin)
    short = embeddings.bfloat16().requires_grad_(True)
    value = loss.function(short, members, centres, loss.margin)
    value.backward()
    assert value.dtype == torch.float32 and short.grad is not None and torch.isfinite(short.grad).all()
    assert float(value) == pytest.approx(float(whole), rel=0.03)


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_has_finite_gradients_where_images_and_centres_coincide(name: MetricLoss) -> None:
    _, members, centres = some()
    loss = LOSSES[name]
    same = centres[members.int().argmax(dim=1)].clone().requires_grad_(True)
    loss.function(same, members, centres, loss.margin).backward()
    assert same.grad is not None and torch.isfinite(same.grad).all()


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_is_lower_where_classes_are_apart_than_where_they_are_mixed(name: MetricLoss) -> None:
    members = torch.eye(CLASSES, dtype=torch.bool)[torch.arange(ROWS) % CLASSES]
    centres = torch.eye(CLASSES, 5)
    loss = LOSSES[name]
    apart = loss.function(members.float() @ centres, members, centres, loss.margin)
    mixed = loss.function(members.roll(1, dims=0).float() @ centres, members, centres, loss.margin)
    assert apart < mixed or name == "triplet"
    if name == "triplet":  # it knows no centres: mixed are those whose classes lie on one spot
        mixed = loss.function(centres[torch.arange(ROWS) % 3], members, centres, loss.margin)
        assert apart < mixed
