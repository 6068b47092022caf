"""The contract of a network: whatever name `--model` takes builds, is seeded, kept, loaded, looked into and reset."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import nn

from cluster.errors import UsageError
from tests.hostile import picture
from training.artifact import ModelCard, load_model, save_model
from training.attention import looker_of
from training.encoder import OWN, Architecture, architecture_for, check_model, layer_of, seed_weights
from training.images import ImagePath
from training.layers import pooled
from training.parallel_resnet import KERNELS, ParallelResNet
from training.transform import Input
from training.weights import Wanted, initial_weights

NAMES = ("resnet18", "convnext_atto", "efficientnet_lite0", "mobilenetv3_small_050", "vit_tiny_patch16_224")
every_network = pytest.mark.parametrize("name", [*NAMES, *sorted(OWN)])


def architecture(name: str, size: str = "64x96", channels: int = 3) -> Architecture:
    return architecture_for(preset="auto", model=name, image_size=size, channels=channels)


def seeded(found: Architecture, classes: int = 0, seed: int = 0) -> Any:
    network = found.build(classes)
    seed_weights(network, seed, "encoder.")
    return network.eval()


def images(found: Architecture, count: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, found.channels, found.height, found.width, generator=generator)


@every_network
@pytest.mark.parametrize("channels", [1, 3])
def test_features_are_as_wide_as_the_network_says_and_the_classifier_takes_them(name: str, channels: int) -> None:
    found = architecture(name, channels=channels)
    network = seeded(found)
    with torch.inference_mode():
        features = pooled(network, images(found))
        assert features.shape == (2, network.head_hidden_size)
        assert torch.isfinite(features).all() and not torch.allclose(features[0], features[1])
        assert torch.equal(network(images(found)), features)
        network.reset_classifier(3)
        assert network.num_classes == 3
        logits = network(images(found))
        assert torch.allclose(logits, network.get_classifier()(features), atol=1e-5) and logits.shape == (2, 3)
    network.reset_classifier(0)
    assert isinstance(network.get_classifier(), nn.Identity)


@every_network
def test_weights_follow_from_the_seed_and_survive_the_artifact(name: str, tmp_path: Path) -> None:
    found = architecture(name, "64")
    one, same, other = seeded(found), seeded(found), seeded(found, seed=1)
    state = one.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in same.state_dict().items())
    assert any(not torch.equal(tensor, state[key]) for key, tensor in other.state_dict().items())
    shown = Input(64, 64, 3, (0.5,) * 3, (0.2,) * 3)
    save_model(tmp_path / "model", ModelCard(found, ImagePath(64, 64), shown), one)
    pixels = np.stack([picture(64, 64, at) for at in range(2)])
    model = load_model(tmp_path)
    assert model.card.architecture == found
    assert np.array_equal(model.embed(pixels), np.asarray(pooled(one, shown_images(shown, pixels)).detach()))


def shown_images(shown: Input, pixels: np.ndarray) -> torch.Tensor:
    return shown.normalise(torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255)


@every_network
def test_every_trainable_weight_learns_and_has_a_depth(name: str) -> None:
    found = architecture(name, "64")
    network = seeded(found, 3).train()
    network(images(found, 4)).square().sum().backward()
    silent = [key for key, weight in network.named_parameters() if weight.grad is None]
    assert silent == [], "no gradient"
    depth = {key: layer_of(network, key) for key, _ in network.named_parameters()}
    assert set(depth.values()) == set(range(max(depth.values()) + 1))
    assert {depth[f"{key}"] for key in depth if network.get_classifier().weight is network.get_parameter(key)} == {
        max(depth.values())
    }


@every_network
def test_the_network_can_be_looked_into(name: str) -> None:
    found = architecture(name, "64")
    shown = Input(64, 64, 3, (0.5,) * 3, (0.2,) * 3)
    looker = looker_of(seeded(found, 3), shown)
    assert looker.method == ("rollout" if found.patch else "grad_cam")
    maps = looker.maps(np.stack([picture(70, 80, 0)]), np.asarray([1]))
    assert maps.shape == (1, 70, 80) and 0 <= maps.min() <= maps.max() <= 1


def test_an_unknown_name_is_refused_with_the_nearest_also_of_our_own() -> None:
    for wrong, right in (("paralel_resnet", "parallel_resnet"), ("resnet_18", "resnet18")):
        with pytest.raises(
            UsageError, match=f"--model {wrong}: timm has no such model. Did you mean '{right}'"
        ) as caught:
            check_model(wrong)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "mixer_s32_224"])
def test_a_network_of_one_size_is_built_for_the_size_asked_for(name: str) -> None:
    found = architecture(name, "64")
    network = found.build().eval()
    with torch.inference_mode():
        assert pooled(network, images(found)).shape == (2, network.head_hidden_size)
    assert "img_size=(64, 64)" in found.snippet("w.safetensors")


def test_a_size_that_a_network_cannot_take_is_refused_in_one_line_with_its_own() -> None:
    with pytest.raises(
        UsageError, match=r"--model levit_128s: takes no images of 70x110 .* --image-size 224x224"
    ) as caught:
        architecture("levit_128s", "70x110")
    assert "\n" not in str(caught.value)


def test_a_network_without_stochastic_depth_is_trained_without() -> None:
    extra = (("drop_path_rate", 0.1),)
    wanted = Wanted("none", "auto", "ghostnet_050", "32", 0, "cpu", 3, (0.5,) * 3, (0.2,) * 3, extra)
    with pytest.raises(TypeError, match="drop_path_rate"):
        architecture("ghostnet_050", "32").build(0, **dict(extra))
    assert initial_weights(wanted).architecture.name == "ghostnet_050"


# parallel_resnet


def test_our_networks_have_no_weights_to_download() -> None:
    for name in OWN:
        with pytest.raises(RuntimeError, match="No pretrained weights"):
            timm.create_model(name, pretrained=True)


def by_hand(network: ParallelResNet, x: torch.Tensor) -> torch.Tensor:
    """The features of `images` by the formula, a layer at a time."""

    def normed(layer: Any, values: torch.Tensor) -> torch.Tensor:
        weight, norm = layer.conv.weight, layer.norm
        made = nn.functional.conv2d(values, weight, stride=layer.conv.stride, padding=weight.shape[-1] // 2)
        shape = (1, -1, 1, 1)
        scaled = (made - norm.running_mean.view(shape)) / (norm.running_var.view(shape) + norm.eps).sqrt()
        found: torch.Tensor = scaled * norm.weight.view(shape) + norm.bias.view(shape)
        return found

    def pool(values: torch.Tensor) -> torch.Tensor:
        return nn.functional.max_pool2d(values, 3, 2, 1)

    made = [normed(network.stem[1], normed(network.stem[0], x).relu()).relu()]
    for number, block in enumerate(network.blocks):
        dense = [pool(made[-1]), pool(pool(made[-2]) if number > 1 else made[-2])] if number else [made[0]]
        entering = torch.cat(dense, dim=1)
        parallel = torch.cat([normed(branch, entering).relu() for branch in block.branches], dim=1)  # type: ignore[union-attr]
        made.append((parallel + normed(block.project, entering)).relu())
    return made[-1]


@pytest.mark.parametrize(("height", "width"), [(32, 32), (33, 47), (8, 8)])
def test_the_network_is_its_formula_at_any_size(height: int, width: int) -> None:
    network: Any = timm.create_model("parallel_resnet_tiny", num_classes=0)
    for buffer in network.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(0))
    x = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        found = network.eval().forward_features(x)
        assert found.shape[1] == network.num_features
        assert torch.allclose(found, by_hand(network, x), atol=1e-4)
    assert [branch.conv.kernel_size[0] for branch in network.blocks[0].branches] == list(KERNELS)


def test_its_maps_are_where_feature_info_says() -> None:
    network: Any = timm.create_model("parallel_resnet_tiny", features_only=True)
    found = network(torch.zeros(1, 3, 64, 64))
    expected = list(zip(network.feature_info.channels(), network.feature_info.reduction(), strict=True))
    assert [(maps.shape[1], 64 // maps.shape[2]) for maps in found] == expected
    assert len(expected) == 5


def test_dropout_is_of_classifiers_alone_so_that_an_encoder_has_no_randomness_of_its_own() -> None:
    found = architecture("parallel_resnet_tiny", "32")
    network, batch = seeded(found).train(), images(found, 4)
    with torch.no_grad():
        assert torch.equal(network(batch), network(batch))
        network.reset_classifier(3)
        assert not torch.equal(network(batch), network(batch))
        assert torch.equal(network.eval()(batch), network(batch))


def test_widths_can_be_chosen_and_stochastic_depth_is_taken() -> None:
    options: dict[str, Any] = {"widths": (8, 8), "stem": (4, 4), "hidden": (6, 5), "drop_path_rate": 0.5}
    network: Any = timm.create_model("parallel_resnet", num_classes=2, **options)
    assert (network.num_features, network.head_hidden_size) == (8, 5)
    network.train()(torch.zeros(2, 3, 16, 16)).sum().backward()
    with pytest.raises(ValueError, match="global_pool 'max'"):
        timm.create_model("parallel_resnet", global_pool="max")
