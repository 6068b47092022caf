"""Counted arithmetic and measured peak."""

from __future__ import annotations

import copy
import time
from typing import Any

import pytest
import torch

from training.encoder import Architecture
from training.methods.mae import MAE
from training.speed import flops_per_image, matmul_peak_gflops
from training.transform import Input
from training.views import Views

VIEWS = Views(Input(48, 96, 3, (0.5,) * 3, (0.2,) * 3))


def mae(depth: int = 3) -> MAE:
    encoder = Architecture("vit_tiny_patch16_224", 48, 96, 3, 12).build()
    return MAE(encoder, decoder_width=96, decoder_depth=depth, mask_ratio=0.75, norm_pix=True)


def forward_by_hand(module: Any) -> float:
    """2 per multiply-add of the forward pass's matrix products: patch embedding, blocks, decoder."""
    pixels = module.channels * module.patch**2

    def blocks(tokens: int, width: int, depth: int) -> float:
        return depth * (24 * tokens * width**2 + 4 * tokens**2 * width)

    width, small = module.encoder.embed_dim, module.decoder_embed.out_features
    return float(
        2 * module.visible * pixels * width
        + blocks(1 + module.visible, width, len(module.encoder.blocks))
        + 2 * (1 + module.visible) * width * small
        + blocks(1 + module.patches, small, len(module.decoder_blocks))
        + 2 * (module.patches - module.visible) * small * pixels
    )


@pytest.mark.parametrize("depth", [1, 3])
def test_a_training_step_is_three_forward_passes_less_the_gradient_of_the_pixels(depth: int) -> None:
    module = mae(depth)
    pixels = 2 * module.visible * module.channels * module.patch**2 * module.encoder.embed_dim
    expected = 3 * forward_by_hand(module) - pixels
    assert flops_per_image(module, [VIEWS]) == pytest.approx(expected, rel=1e-6)


def test_counting_leaves_the_module_as_it_was() -> None:
    module = mae(1).eval()
    before = copy.deepcopy(module.state_dict())
    flops_per_image(module, [VIEWS])
    assert not module.training and all(p.grad is None and p.device.type == "cpu" for p in module.parameters())
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_the_peak_is_a_rate_a_processor_can_have_and_takes_the_time_it_was_given() -> None:
    threads, began = torch.get_num_threads(), time.perf_counter()
    peak = matmul_peak_gflops(1, seconds=0.2)
    assert 0.5 < peak < 10_000
    assert time.perf_counter() - began < 30
    assert torch.get_num_threads() == threads
