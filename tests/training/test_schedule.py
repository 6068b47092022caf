"""Learning rates in closed form, and which parameters decay."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import timm
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from training.schedule import decays, parameter_groups, warmup_cosine


def test_the_schedule_is_a_line_up_and_half_a_cosine_down() -> None:
    rates = [warmup_cosine(step, 100, 0.1, 0.01) for step in range(100)]
    for step in range(10):
        assert rates[step] == pytest.approx((step + 1) / 11)
    for step in range(10, 100):
        angle = math.pi * (step - 10) / 90
        assert rates[step] == pytest.approx(0.01 + 0.99 * (1 + math.cos(angle)) / 2)
    assert rates[10] == 1
    assert rates[55] == pytest.approx(0.505)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 400), st.floats(0, 0.99), st.floats(0, 0.5))
def test_rates_lie_between_floor_and_peak_rise_once_and_never_jump_up(total: int, warmup: float, floor: float) -> None:
    rates = [warmup_cosine(step, total, warmup, floor) for step in range(total)]
    rising = math.ceil(warmup * total)
    assert all(0 < rate <= 1 for rate in rates)
    assert all(a < b for a, b in pairwise(rates[:rising]))
    assert all(a >= b for a, b in pairwise(rates[rising:]))
    assert all(rate >= floor - 1e-12 for rate in rates[rising:])


def test_without_warm_up_the_first_step_has_the_peak_rate() -> None:
    assert warmup_cosine(0, 10, 0.0) == 1


def test_after_the_last_step_the_rate_stays_at_the_floor() -> None:
    for step in (100, 101, 1000):
        assert warmup_cosine(step, 100, 0.1, 0.03) == pytest.approx(0.03)


def test_a_single_step_has_a_rate() -> None:
    assert 0 < warmup_cosine(0, 1, 0.05) <= 1


def test_biases_norms_and_tokens_do_not_decay() -> None:
    network = timm.create_model("test_vit", num_classes=3)
    kept = {name for name, parameter in network.named_parameters() if decays(name, parameter)}
    expected = {"patch_embed.proj.weight", "head.weight"}
    for block in range(6):
        expected |= {f"blocks.{block}.{part}.weight" for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}
    assert kept == expected


def test_every_trainable_parameter_is_in_one_group() -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    module[2].weight.requires_grad_(False)
    with_decay, without = parameter_groups(module, 0.05)
    assert (with_decay["weight_decay"], without["weight_decay"]) == (0.05, 0.0)
    assert [id(p) for p in with_decay["params"]] == [id(module[0].weight)]
    rest = (module[0].bias, module[1].weight, module[1].bias, module[2].bias)
    assert [id(p) for p in without["params"]] == [id(p) for p in rest]
