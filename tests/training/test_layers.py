"""Features from chosen layers and radiomics: what they are, and that a kept model gives them as training did."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch

from cluster.errors import UsageError
from training.artifact import OLDER, ModelCard, load_model, read_card, save_model
from training.configs import ExportConfig, TransferConfig
from training.encoder import Architecture, seed_weights
from training.export import export
from training.features import PLAIN, Features, chosen, described
from training.images import ImagePath
from training.layers import layer_features, pooled, resolved
from training.radiomics import COLUMNS, radiomics
from training.tasks.frozen import Inner
from training.tasks.fusion import fit_fused
from training.transform import Input, evaluation_view

VIT = Architecture("test_vit", 32, 48, 3, 16)
CONV = Architecture("test_efficientnet", 32, 32, 1)
SHOWN = {a.name: Input(a.height, a.width, a.channels, (0.4,) * a.channels, (0.3,) * a.channels) for a in (VIT, CONV)}
both = pytest.mark.parametrize("architecture", [VIT, CONV], ids=["vit", "conv"])


def network_of(architecture: Architecture) -> Any:
    network = architecture.build()
    seed_weights(network, 0)
    return network.eval()


def pixels(count: int = 12) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 40, 40, 3), dtype=np.uint8)


# Layers


@both
def test_the_names_of_layers_are_numbers_from_the_input_on(architecture: Architecture) -> None:
    network = network_of(architecture)
    depth = len(network.feature_info)
    every = tuple(str(k) for k in range(1, depth + 1))
    assert resolved(("last",), network) == ("last",)
    assert resolved(("all",), network) == (*every, "last")
    assert resolved(("-1", "1"), network) == resolved(("1", str(depth), "-1"), network) == ("1", str(depth))
    assert resolved(("last", "2"), network) == ("2", "last")
    with pytest.raises(UsageError, match=f"--layers 99: this network has layers 1 to {depth}, and last"):
        resolved(("99",), network)


@both
def test_last_alone_is_what_a_classifier_would_get(architecture: Architecture) -> None:
    network = network_of(architecture)
    images = evaluation_view(pixels(), SHOWN[architecture.name])
    with torch.no_grad():
        assert torch.equal(layer_features(network, images, ("last",)), pooled(network, images))
        assert torch.equal(pooled(network, images), network(images))


@pytest.mark.parametrize(
    "name", ["test_vit", "test_efficientnet", "resnet10t", "convnext_atto", "swin_tiny_patch4_window7_224"]
)
def test_each_layer_is_a_mean_over_positions_of_unit_length(name: str) -> None:
    """By hooks that catch what each block or stage gives, whatever its layout; last by the network itself."""
    torch.manual_seed(0)
    network: Any = timm.create_model(name, num_classes=0).eval()
    layers = resolved(("all",), network)
    size = network.pretrained_cfg["input_size"]
    images = torch.randn(2, *size)
    with torch.no_grad():
        found = layer_features(network, images, layers)
        end = torch.nn.functional.normalize(network(images), dim=1)
        maps = network.forward_intermediates(images, intermediates_only=True)
    widths = [one.shape[1] for one in maps] + [end.shape[1]]
    parts = found.split(widths, dim=1)
    assert len(layers) == len(parts)
    assert torch.allclose(parts[-1], end, atol=1e-6)
    for part, one in zip(parts, maps, strict=False):
        expected = one.flatten(2).mean(dim=2)
        assert torch.allclose(part, expected / expected.norm(dim=1, keepdim=True), atol=1e-5)
        assert torch.allclose(part.norm(dim=1), torch.ones(2), atol=1e-5)
    some = layer_features(network, images, (layers[0], layers[2]))
    assert torch.allclose(some, torch.cat([parts[0], parts[2]], dim=1), atol=1e-6)


def test_a_vit_s_layer_is_the_mean_of_its_patches_after_that_block() -> None:
    network, caught = network_of(VIT), []
    network.blocks[2].register_forward_hook(lambda *at: caught.append(at[-1]))
    images = evaluation_view(pixels(3), SHOWN["test_vit"])
    with torch.no_grad():
        found = layer_features(network, images, ("3",))
    patches = caught[0][:, network.num_prefix_tokens :].mean(dim=1)
    assert torch.allclose(found, patches / patches.norm(dim=1, keepdim=True), atol=1e-6)


# With radiomics


@both
def test_radiomics_stand_after_the_layers_whatever_size_the_pixels_come_in(architecture: Architecture) -> None:
    network, shown = network_of(architecture), SHOWN[architecture.name]
    of = Features(("1", "last"), radiomic=True)
    found = described(of, network, shown, (40, 40), pixels())
    layers = described(replace(of, radiomic=False), network, shown, (40, 40), pixels())
    assert np.array_equal(found[:, : layers.shape[1]], layers)
    np.testing.assert_allclose(found[:, layers.shape[1] :] * len(COLUMNS) ** 0.5, radiomics(pixels()), rtol=1e-6)
    larger = pixels().repeat(2, axis=1).repeat(2, axis=2)  # as in a DATASET of another stored size
    again = described(Features((), radiomic=True), network, shown, (40, 40), larger)
    assert again.shape == (12, len(COLUMNS)) and np.abs(again - found[:, layers.shape[1] :]).max() < 0.2


def test_flags_mean_features() -> None:
    network = network_of(CONV)
    assert chosen("deep", ("last",), network) == PLAIN == Features() and PLAIN.plain and PLAIN.tag == ""
    assert chosen("radiomic", ("last",), network) == Features((), radiomic=True)
    assert chosen("fused", ("1", "-1"), network) == chosen("both", ("1", "-1"), network)
    assert chosen("both", ("1",), network).tag == "-1-radiomic"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": "both"}, "--features both: needs frozen features: --task linear, knn or svm"),
        ({"layers": ("1",)}, r"--layers .*needs frozen features"),
        ({"task": "svm", "layers": ("0",)}, "give last, all, or numbers such as 1 3 -1"),
        ({"task": "svm", "layers": ("deep",)}, "give last, all, or numbers"),
        ({"task": "svm", "layers": ()}, "give last, all, or numbers"),
        ({"task": "svm", "layers": ("1",), "features": "radiomic"}, "radiomics have no layers"),
    ],
)
def test_flags_that_cannot_be_right_are_refused_in_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        TransferConfig("d", out="o", **changes)
    assert "\n" not in str(caught.value)


# Kept models


def kept(folder: Path, architecture: Architecture, features: Features) -> tuple[Any, np.ndarray]:
    """A fused SVM of these features kept as a model, and the features that it was fitted on."""
    network, shown = network_of(architecture), SHOWN[architecture.name]
    shown_pixels, truth = pixels(36), np.arange(36) % 2
    found = described(features, network, shown, (40, 40), shown_pixels)
    rows = np.arange(36)
    inner: Inner = [(rows[rows // 4 % 3 != k], rows[rows // 4 % 3 == k]) for k in range(3)]
    head = fit_fused("svm", found, truth, inner, 2, found.shape[1] - len(COLUMNS))
    card = ModelCard(architecture, ImagePath(40, 40), shown, "estimator", ("a", "b"), features=features)
    save_model(folder / "model", card, network, files=[("head.skops", head.dumps())])
    return head, found


@both
def test_a_kept_model_gives_the_features_and_probabilities_of_its_training(
    architecture: Architecture, tmp_path: Path
) -> None:
    head, found = kept(tmp_path, architecture, Features(("1", "3", "last"), radiomic=True))
    model = load_model(tmp_path)
    np.testing.assert_allclose(model.embed(pixels(36)), found, atol=1e-6)
    np.testing.assert_allclose(model.probabilities(pixels(36)), head.probabilities(found), atol=1e-5)
    one = np.concatenate([model.embed(pixels(36)[at : at + 1]) for at in range(3)])  # as a service is asked
    np.testing.assert_allclose(one, found[:3], atol=1e-5)
    assert read_card(tmp_path)[0].features == Features(("1", "3", "last"), radiomic=True)


def test_models_of_other_features_have_another_sha256_and_plain_ones_that_of_before(tmp_path: Path) -> None:
    """So that an index or kept embeddings of one are refused by the other, though the weights are the same."""
    network, shas = network_of(CONV), {}
    for name, features in {
        "plain": PLAIN,
        "again": PLAIN,
        "layer": Features(("1",)),
        "all": Features((), True),
    }.items():
        card = ModelCard(CONV, ImagePath(40, 40), SHOWN[CONV.name], features=features)
        save_model(tmp_path / name / "model", card, network)
        shas[name] = load_model(tmp_path / name).sha256
    assert shas["plain"] == shas["again"] and len(set(shas.values())) == 3


def test_a_model_of_the_format_before_has_plain_features(tmp_path: Path) -> None:
    import json

    save_model(tmp_path / "model", ModelCard(CONV, ImagePath(40, 40), SHOWN[CONV.name]), network_of(CONV))
    file = tmp_path / "model" / "model.json"
    values = json.loads(file.read_text())
    assert values.pop("features") == {"layers": ["last"], "radiomic": False} and values["format"] == OLDER
    file.write_text(json.dumps(values))
    assert read_card(tmp_path)[0].features == PLAIN


def test_such_a_classifier_is_not_exported_but_its_encoder_is(tmp_path: Path) -> None:
    kept(tmp_path / "run", CONV, Features(("1", "last"), radiomic=True))
    run = str(tmp_path / "run")
    with pytest.raises(UsageError, match="chosen layers or radiomics has no ONNX form") as caught:
        export(ExportConfig(model=run, to="onnx", out=str(tmp_path / "onnx")))
    assert "\n" not in str(caught.value)
    assert export(ExportConfig(model=run, to="timm", out=str(tmp_path / "timm")))["classes"] == 0
    again = timm.create_model("local-dir:" + str(tmp_path / "timm"), pretrained=True, num_classes=0).eval()
    images = evaluation_view(pixels(2), SHOWN[CONV.name])
    with torch.no_grad():
        assert torch.allclose(again(images), pooled(network_of(CONV), images), atol=1e-5)
