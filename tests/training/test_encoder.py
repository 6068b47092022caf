"""Architectures: weights by name, positions by formula, and sizes that do not fit are answered with ones that do."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

from cluster.errors import UsageError
from training import configs
from training.encoder import (
    PRESETS,
    Architecture,
    architecture_for,
    check_divides,
    check_model,
    choose_preset,
    is_vit,
    layer_of,
    seed_weights,
    sincos,
)

VIT = Architecture("test_vit", 32, 40, 3, 8)
CONV = Architecture("test_efficientnet", 32, 32, 3)


def seeded(module: nn.Module, seed: int = 0, prefix: str = "") -> dict[str, Tensor]:
    seed_weights(module, seed, prefix)
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("architecture", [VIT, CONV])
def test_weights_depend_on_seed_and_name_and_on_no_history(architecture: Architecture) -> None:
    torch.manual_seed(0)
    first = seeded(architecture.build(), 3)
    torch.manual_seed(1)
    seeded(CONV.build(5), 3)  # other modules before
    network = architecture.build()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter))
    assert equal(seeded(network, 3), first)
    assert not equal(seeded(network, 4), first)
    assert not equal(seeded(network, 3, "other."), first)


def test_a_part_seeded_under_its_full_name_equals_the_part_of_the_whole() -> None:
    whole: Any = VIT.build()
    state = seeded(whole, 0, "encoder.")
    part: Any = VIT.build()
    seed_weights(part.blocks[2], 0, "encoder.blocks.2.")
    for name, tensor in part.blocks[2].state_dict().items():
        assert torch.equal(tensor, state[f"blocks.2.{name}"]), name


def test_the_order_of_modules_does_not_matter() -> None:
    def pair(names: tuple[str, ...]) -> dict[str, Tensor]:
        module = nn.ModuleDict({name: nn.Linear(4, 4) for name in names})
        return seeded(module)

    assert equal(pair(("a", "b", "c")), pair(("c", "a", "b")))
    assert not torch.equal(pair(("a", "b"))["a.weight"], pair(("a", "b"))["b.weight"])


def test_seeding_leaves_torch_s_own_stream_alone() -> None:
    network = VIT.build()
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    seed_weights(network, 0)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    "name", ["test_vit", "test_vit2", "test_efficientnet", "test_convnext", "test_resnet", "test_nfnet", "lcnet_035"]
)
def test_every_seeded_network_is_finite_and_still_tells_images_apart(name: str) -> None:
    network: Any = timm.create_model(name, num_classes=0)
    state = seeded(network)
    assert all(torch.isfinite(tensor).all() for tensor in state.values())
    images = torch.randn(2, *network.pretrained_cfg["input_size"], generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features = network.eval()(images)
    assert torch.isfinite(features).all() and not torch.allclose(features[0], features[1])


def test_weights_spread_as_their_layer_s_rule_says() -> None:
    linear, conv, patches = nn.Linear(300, 500), nn.Conv2d(64, 128, 3), nn.Conv2d(3, 200, 8, stride=8)
    norm, batch = nn.LayerNorm(7), nn.BatchNorm2d(7)
    for module in (linear, conv, patches, norm, batch):
        seed_weights(module, 0)
        module.requires_grad_(False)
    assert float(linear.weight.std()) == pytest.approx(math.sqrt(6 / 800 / 3), rel=0.02)
    assert float(linear.weight.abs().max()) <= math.sqrt(6 / 800)
    assert float(conv.weight.std()) == pytest.approx(math.sqrt(2 / (128 * 9)), rel=0.02)
    assert float(patches.weight.std()) == pytest.approx(math.sqrt(6 / (200 + 192) / 3), rel=0.02)
    for module in (linear, conv, patches, norm, batch):
        assert not module.bias.any()  # type: ignore[union-attr]
    assert (norm.weight == 1).all() and (batch.weight == 1).all()


def test_biases_that_go_by_another_name_are_zero_too() -> None:
    network: Any = timm.create_model("beit_base_patch16_224", depth=1, embed_dim=48, num_heads=2, num_classes=0)
    seed_weights(network, 0)
    assert not network.blocks[0].attn.q_bias.any() and not network.blocks[0].attn.v_bias.any()


def test_running_statistics_are_reset() -> None:
    network: Any = CONV.build()
    network.train()(torch.randn(4, 3, 32, 32))
    assert network.bn1.running_mean.any()
    seed_weights(network, 0)
    assert not network.bn1.running_mean.any() and (network.bn1.running_var == 1).all()


def test_positions_are_sines_and_cosines_of_row_and_column() -> None:
    network: Any = VIT.build()
    seed_weights(network, 0)
    assert network.pos_embed.shape == (1, 1 + 4 * 5, 64)
    assert not network.pos_embed[0, 0].any()  # the class token has no place
    for number in range(20):
        row, column = divmod(number, 5)
        for k in range(16):
            scale = 10000 ** (-k / 16)
            expected = [
                math.sin(row * scale),
                math.sin(column * scale),
                math.cos(row * scale),
                math.cos(column * scale),
            ]
            found = network.pos_embed[0, 1 + number, k::16]
            assert found.tolist() == pytest.approx(expected, abs=1e-5)


def test_places_of_a_grid_have_positions_of_their_own() -> None:
    positions = sincos([6, 9], 32).double()
    assert positions.shape == (54, 32)
    assert positions.norm(dim=1).numpy() == pytest.approx(np.full(54, 4.0), rel=1e-5)  # sin^2 + cos^2, 16 times
    assert float(torch.pdist(positions).min()) > 0.5


@pytest.mark.parametrize(
    ("size", "suggestion"), [("100", "96x96"), ("96x100", "96x96"), ("8", "12x12"), ("1000x97", "996x96")]
)
def test_a_size_that_the_patch_does_not_divide_is_refused_with_one_that_it_does(size: str, suggestion: str) -> None:
    with pytest.raises(UsageError) as caught:
        architecture_for(preset="tiny", model=None, image_size=size, channels=3)
    assert str(caught.value).endswith(f"the patch of 12 px does not divide it; try {suggestion}")
    height, width = map(int, suggestion.split("x"))
    check_divides(height, width, 12)
    assert architecture_for(preset="tiny", model=None, image_size=suggestion, channels=3).height == height


@pytest.mark.parametrize("text", ["", "x", "12x", "12x12x12", "-8", "1e3", "7", "5000", "²", "12 x 12"])
def test_a_size_that_is_none_is_refused_with_its_flag(text: str) -> None:
    with pytest.raises(UsageError, match="--image-size"):
        configs.parse_size(text)


def test_an_unknown_model_is_refused_with_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"no such model\. Did you mean 'vit_tiny_patch16_224'\?"):
        check_model("vit_tinny_patch16_224")
    with pytest.raises(UsageError, match="--model nothing_like_it_at_all_xyz"):
        architecture_for(preset="auto", model="nothing_like_it_at_all_xyz", image_size="auto", channels=3)


def test_presets_are_what_they_say() -> None:
    tiny = architecture_for(preset="auto", model=None, image_size="auto", channels=1, device="cpu")
    assert tiny == Architecture("vit_tiny_patch16_224", 96, 96, 1, 12)
    network: Any = tiny.build()
    assert (network.embed_dim, len(network.blocks), network.patch_embed.num_patches) == (192, 12, 64)
    assert (choose_preset("auto", "cuda"), choose_preset("small", "cpu")) == ("base", "small")
    for preset in PRESETS.values():
        assert is_vit(preset.model) and preset.size % preset.patch == 0


def test_a_model_name_brings_its_own_patch_and_a_conv_net_has_none() -> None:
    assert architecture_for(preset="tiny", model="test_vit", image_size="32x48", channels=3).patch == 16
    conv = architecture_for(preset="tiny", model="test_efficientnet", image_size="33x47", channels=3)
    assert (conv.patch, conv.height, conv.width) == (None, 33, 47)
    assert is_vit("test_vit") and not is_vit("test_efficientnet")


@pytest.mark.parametrize("architecture", [VIT, CONV, Architecture("test_vit", 24, 24, 1, 8)])
def test_an_architecture_survives_its_dictionary_and_its_snippet_names_all_its_arguments(
    architecture: Architecture,
) -> None:
    assert Architecture(**architecture.as_dict()) == architecture
    snippet = architecture.snippet("w.safetensors", 4)
    assert f'"{architecture.name}", num_classes=4' in snippet
    for name, value in architecture.kwargs.items():
        assert f"{name}={value!r}" in snippet


@pytest.mark.parametrize("name", ["test_vit", "vit_tiny_patch16_224", "test_efficientnet", "efficientnet_lite0"])
def test_layers_rise_from_the_stem_to_the_head(name: str) -> None:
    network: Any = timm.create_model(name, num_classes=3)
    depth = {n: layer_of(network, n) for n, _ in network.named_parameters()}
    head = [d for n, d in depth.items() if n.startswith(("head.", "classifier."))]
    blocks = [
        (tuple(map(int, n.split(".")[1:3:2] if "vit" in name else [n.split(".")[1]])), d)
        for n, d in depth.items()
        if n.startswith("blocks.")
    ]
    stem = [d for n, d in depth.items() if n.startswith(("patch_embed", "conv_stem", "pos_embed", "cls_token"))]
    assert set(stem) == {0}
    in_order = [d for _, d in sorted(blocks)]
    assert in_order == sorted(in_order) and in_order[0] > 0
    assert set(head) == {max(depth.values())} and max(depth.values()) > in_order[-1] >= len(set(in_order))
    assert set(depth.values()) == set(range(max(depth.values()) + 1))


def test_a_copy_of_a_network_seeds_alike() -> None:
    network = VIT.build()
    assert equal(seeded(copy.deepcopy(network)), seeded(network))
