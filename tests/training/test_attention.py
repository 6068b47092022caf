"""Where a network looks: each method against its formula by hand, and a planted mark that must light up."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import timm
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from training.attention import Looker, eigen_cam, grad_cam, linear_head, looker_of, maps, rollout_of
from training.encoder import Architecture, seed_weights
from training.tasks.frozen import knn
from training.transform import Input, evaluation_view

VIT = Architecture("test_vit", 32, 48, 3, 16)
CONV = Architecture("test_efficientnet", 64, 96, 3)
every_architecture = pytest.mark.parametrize("architecture", [VIT, CONV])


def network_of(architecture: Architecture, classes: int = 3) -> nn.Module:
    network = architecture.build(classes)
    seed_weights(network, 0)
    return network.eval().requires_grad_(False)


def input_of(architecture: Architecture) -> Input:
    return Input(architecture.height, architecture.width, 3, (0.5,) * 3, (0.25,) * 3)


def pixels(count: int = 3, height: int = 40, width: int = 56) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


# The maps as they are asked for


@every_architecture
def test_a_map_has_the_size_of_the_stored_image_and_the_range_0_to_1(architecture: Architecture) -> None:
    found = maps(network_of(architecture), input_of(architecture), pixels(), np.asarray([0, 1, 2]))
    assert found.shape == (3, 40, 56) and found.dtype == np.float32
    assert found.min() >= 0 and found.max() <= 1
    assert all(one.max() == pytest.approx(1) or not one.any() for one in found)


@every_architecture
def test_asking_leaves_the_network_as_it_was(architecture: Architecture) -> None:
    network: Any = network_of(architecture)
    images = evaluation_view(pixels(), input_of(architecture))
    before = network(images)
    maps(network, input_of(architecture), pixels(), np.asarray([0, 1, 2]))
    assert torch.equal(network(images), before)
    assert not any(module._forward_hooks for module in network.modules())
    assert not any(p.requires_grad or p.grad is not None for p in network.parameters())


def test_a_network_that_was_just_trained_is_asked_in_evaluation_mode() -> None:
    expected = maps(network_of(CONV), input_of(CONV), pixels(), np.asarray([0, 1, 2]))
    found = maps(network_of(CONV).train(), input_of(CONV), pixels(), np.asarray([0, 1, 2]))
    assert np.array_equal(found, expected)


def test_many_images_give_the_maps_that_each_gives_alone() -> None:
    network, many = network_of(CONV), pixels(19)
    classes = np.arange(19) % 3
    together = maps(network, input_of(CONV), many, classes)
    alone = np.concatenate([maps(network, input_of(CONV), many[[i]], classes[[i]]) for i in (0, 17, 18)])
    np.testing.assert_allclose(together[[0, 17, 18]], alone, atol=1e-4)


def test_no_image_gives_no_map() -> None:
    assert maps(network_of(VIT), input_of(VIT), pixels(0)).shape == (0, 40, 56)


def test_the_method_follows_from_the_network_and_its_head() -> None:
    assert Looker(network_of(VIT), input_of(VIT)).method == "rollout"
    assert Looker(network_of(CONV), input_of(CONV)).method == "eigen_cam"
    assert Looker(network_of(CONV), input_of(CONV), nn.Linear(8, 2)).method == "grad_cam"
    mixer = timm.create_model("mixer_s32_224", pretrained=False).eval()
    looker = Looker(mixer, Input(224, 224, 3, (0.5,) * 3, (0.5,) * 3))
    assert looker.method == ""
    with pytest.raises(ValueError, match="MlpMixer: neither"):
        looker.maps(pixels(1))


# Attention rollout


def test_rollout_of_two_layers_is_the_product_worked_out_by_hand() -> None:
    """One head, three tokens; each matrix mixed half with the identity, the second times the first."""
    first = torch.tensor([[[0.2, 0.3, 0.5], [0.1, 0.8, 0.1], [0.6, 0.2, 0.2]]])
    second = torch.tensor([[[0.5, 0.5, 0.0], [0.3, 0.3, 0.4], [0.0, 0.1, 0.9]]])
    expected = np.zeros((3, 3))
    mixed = [[[float(a[0, i, j]) / 2 + (i == j) / 2 for j in range(3)] for i in range(3)] for a in (first, second)]
    for i in range(3):
        for j in range(3):
            expected[i, j] = sum(mixed[1][i][k] * mixed[0][k][j] for k in range(3))
    found = rollout_of([first[None], second[None]])
    np.testing.assert_allclose(found[0], expected, atol=1e-6)


def test_rollout_averages_heads_and_its_rows_sum_to_1() -> None:
    raw = torch.softmax(torch.randn(4, 2, 3, 7, 7, generator=torch.Generator().manual_seed(0)) * 3, dim=-1)
    found = rollout_of(list(raw))
    assert found.shape == (2, 7, 7)
    torch.testing.assert_close(found.sum(dim=-1), torch.ones(2, 7))
    torch.testing.assert_close(found, rollout_of([one.mean(dim=1, keepdim=True) for one in raw]))


@pytest.mark.parametrize("pool", ["avg", "token"])
def test_rollout_of_a_vit_is_that_of_the_attention_computed_from_its_own_layers(pool: str) -> None:
    network: Any = timm.create_model("test_vit", img_size=(32, 48), patch_size=16, global_pool=pool, num_classes=2)
    seed_weights(network, 3)
    network.eval()
    with torch.no_grad():
        for block in network.blocks:
            block.attn.qkv.weight.mul_(6)  # far from an even spread
    wanted = Input(32, 48, 3, (0.5,) * 3, (0.25,) * 3)
    shown = pixels(1, 32, 48)
    with torch.no_grad():
        tokens = network.patch_embed(evaluation_view(shown, wanted))
        tokens = network.norm_pre(network._pos_embed(tokens))
        rolled = torch.eye(tokens.shape[1])
        for block in network.blocks:
            normed = block.norm1(tokens)
            heads, count = block.attn.num_heads, tokens.shape[1]
            q, k, _ = block.attn.qkv(normed).reshape(count, 3, heads, -1).permute(1, 2, 0, 3)
            weights = torch.softmax(q @ k.transpose(1, 2) / q.shape[-1] ** 0.5, dim=-1).mean(dim=0)
            rolled = (0.5 * weights + 0.5 * torch.eye(count)) @ rolled
            tokens = block(tokens)
    prefix = 1
    row = rolled[0, prefix:] if pool == "token" else rolled[prefix:, prefix:].mean(dim=0)
    grid = row.reshape(2, 3)
    expected = torch.nn.functional.interpolate(grid[None, None], (32, 48), mode="bilinear", align_corners=False)[0, 0]
    expected = (expected - expected.min()) / (expected.max() - expected.min())
    np.testing.assert_allclose(maps(network, wanted, shown)[0], expected, atol=1e-4)


# Grad-CAM and Eigen-CAM


class Tiny(nn.Module):
    """Two convolutions, mean pooling and a linear layer, with the names that timm's networks have."""

    num_features = 4

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, stride=2, padding=1))
        self.classifier = nn.Linear(4, 3)

    def forward_features(self, images: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.body(images))

    def forward_head(self, features: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        pooled = (features**2).mean(dim=(2, 3))  # not linear, so that places have gradients of their own
        return pooled if pre_logits else self.classifier(pooled)

    def get_classifier(self) -> nn.Module:
        return self.classifier


def test_grad_cam_is_the_formula_by_autograd() -> None:
    torch.manual_seed(0)
    network = Tiny().eval()
    images, classes = torch.randn(3, 3, 8, 12), torch.tensor([2, 0, 1])
    expected = []
    for image, wanted in zip(images, classes, strict=True):
        features = network.forward_features(image[None]).detach().requires_grad_(True)
        network.forward_head(features)[0, wanted].backward()
        assert features.grad is not None
        alpha = [features.grad[0, c].mean() for c in range(4)]
        expected.append(torch.relu(sum((a * features[0, c] for c, a in enumerate(alpha)), torch.zeros(4, 6))).detach())
    found = grad_cam(network, network.classifier, images, classes)
    torch.testing.assert_close(found, torch.stack(expected))
    assert not torch.allclose(found, grad_cam(network, network.classifier, images, classes.flip(0)))


def test_eigen_cam_projects_on_the_first_eigenvector_of_the_channels() -> None:
    torch.manual_seed(1)
    network = Tiny().eval()
    images = torch.randn(2, 3, 8, 12)
    for at, found in enumerate(eigen_cam(network, images)):
        rows = network.forward_features(images[[at]])[0].flatten(1).T.detach().numpy().astype(np.float64)
        vector = np.linalg.eigh(rows.T @ rows)[1][:, -1]
        expected = rows @ vector
        expected = np.maximum(expected * np.sign(expected.sum()), 0).reshape(4, 6)
        np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("classes", [2, 3])
def test_a_linear_probe_is_folded_into_one_layer(classes: int) -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(3, [1, 10, 0.1, 2], (60, 4))
    truth = rng.integers(0, classes, 60) + 1  # class 0 of `classes + 1` never occurs
    fitted = make_pipeline(StandardScaler(), LogisticRegression()).fit(features, truth)
    head = linear_head(fitted, classes + 1)
    assert head is not None
    with torch.no_grad():
        logits = head(torch.as_tensor(features, dtype=torch.float32))[:, 1:]
    np.testing.assert_allclose(torch.softmax(logits, dim=1), fitted.predict_proba(features), atol=1e-4)


def test_neighbours_have_no_layer_and_are_shown_by_eigen_cam() -> None:
    rng = np.random.default_rng(0)
    fitted = knn(rng.normal(size=(30, 4)), rng.integers(0, 2, 30), [])
    assert linear_head(fitted, 2) is None
    network = network_of(CONV, 0)
    looker = looker_of(network, input_of(CONV), fitted, 2)
    assert looker.method == "eigen_cam"
    assert looker.maps(pixels(), np.zeros(3, dtype=np.int64)).shape == (3, 40, 56)


# A mark that decides


def marked(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Noise [N, 64, 96, 3]; images of class 1 have a bright square in their lower right corner."""
    rng = np.random.default_rng(4)
    images = rng.integers(60, 120, (count, 64, 96, 3), dtype=np.uint8)
    truth = np.arange(count) % 2
    images[truth == 1, 40:64, 72:96] = 250
    return images, truth


def share_in_corner(found: np.ndarray) -> np.ndarray:
    """Of each map's sum, what lies in the corner's cell of 32 pixels, which is a sixth of the image."""
    return np.asarray(found[:, 32:, 64:].sum(axis=(1, 2)) / found.sum(axis=(1, 2)))


def trained(network: nn.Module, shown: np.ndarray, truth: np.ndarray, wanted: Input, steps: int) -> nn.Module:
    torch.manual_seed(0)
    network.requires_grad_(True).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    images, targets = evaluation_view(shown, wanted), torch.as_tensor(truth)
    for _ in range(steps):
        loss = torch.nn.functional.cross_entropy(network(images), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.eval()


def test_grad_cam_lights_up_the_mark_that_a_trained_network_goes_by() -> None:
    images, truth = marked(32)
    wanted = Input(64, 96, 3, (0.4,) * 3, (0.2,) * 3)
    network: Any = timm.create_model("test_efficientnet", num_classes=2)
    seed_weights(network, 0)
    trained(network, images, truth, wanted, 30)
    with torch.no_grad():
        said = network(evaluation_view(images, wanted)).argmax(dim=1).numpy()
    assert (said == truth).mean() > 0.95
    shown = images[truth == 1]
    found = maps(network, wanted, shown, np.ones(len(shown), dtype=np.int64))
    assert np.median(share_in_corner(found)) > 0.4
    peaks = [np.unravel_index(one.argmax(), one.shape) for one in found]
    assert np.mean([row >= 32 and column >= 64 for row, column in peaks]) > 0.9


def test_rollout_lights_up_the_square_that_a_vit_was_built_to_attend_to() -> None:
    """Every query equals one vector, every key the brightness of its patch: attention goes to the bright corner."""
    images, _ = marked(2)
    wanted = Input(64, 96, 3, (0.4,) * 3, (0.2,) * 3)
    network: Any = timm.create_model("test_vit", img_size=(64, 96), patch_size=16, global_pool="avg", num_classes=2)
    seed_weights(network, 0)
    width = network.embed_dim
    with torch.no_grad():
        network.patch_embed.proj.weight.zero_()
        network.patch_embed.proj.weight[0].fill_(1 / (3 * 256))
        network.patch_embed.proj.bias.zero_()
        network.pos_embed.zero_()
        network.cls_token.zero_()
        for block in network.blocks:
            block.norm1 = nn.Identity()
            block.attn.qkv.weight.zero_()
            block.attn.qkv.bias.zero_()
            block.attn.qkv.bias[:width] = 3.0
            block.attn.qkv.weight[width : 2 * width, 0] = 1.0
            block.attn.proj.weight.zero_()
            block.attn.proj.bias.zero_()
            block.mlp.fc2.weight.zero_()
            block.mlp.fc2.bias.zero_()
    found = maps(network.eval(), wanted, images)
    dark, bright = share_in_corner(found)
    assert dark < 0.4 and bright > 0.6
