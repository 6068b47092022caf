"""Test-time augmentation: features are the mean over an image's views, in training's judgement and ever after."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cluster.errors import UsageError
from tests.training.test_artifact import CONV, card, network_of, pixels
from tests.training.test_export import exported, run_onnx
from tests.training.test_export import pixels as shown_to_graphs
from tests.training.test_finetune import labels_of, recipe, stripes, wanted
from training.artifact import FORMAT, HIERARCHY, OLDER, ModelCard, forward, load_model, save_model
from training.configs import TransferConfig
from training.encoder import seed_weights
from training.fit import finetune_fold
from training.probabilities import from_logits
from training.splits import Fold, hold_out
from training.tasks.chains import Hierarchy
from training.tasks.finetune import fine_tune
from training.tasks.hierarchy import chain_rule, tree_of
from training.tasks.learners import trunk_of
from training.tasks.structures import Chain, Head
from training.transform import TTA, VIEWS, evaluation_view, over_views
from training.weights import initial_weights

BY_HAND: dict[TTA, Callable[[np.ndarray], list[np.ndarray]]] = {
    "none": lambda x: [x],
    "flip": lambda x: [x, x[..., ::-1]],
    "turns": lambda x: [np.rot90(y, k, (2, 3)) for y in (x, x[..., ::-1]) for k in range(4)],
}
every_tta = pytest.mark.parametrize("tta", BY_HAND)


def seen(tta: TTA, classes: int = 0) -> ModelCard:
    """A card of the test network; with three classes a classifier's."""
    options = {"head": "network", "classes": ("a", "b", "c"), "temperature": 1.7} if classes else {}
    known = card(CONV, **options)
    return replace(known, input=replace(known.input, tta=tta))


@every_tta
def test_the_mean_is_over_the_views_that_the_name_says(tta: TTA) -> None:
    images = np.random.default_rng(0).normal(size=(3, 2, 5, 5)).astype(np.float32)
    weights = torch.randn(2, 5, 5, generator=torch.Generator().manual_seed(0))
    found = over_views(lambda view: (view * weights).sum(dim=(2, 3)), torch.from_numpy(images), tta)
    views = BY_HAND[tta](images)
    assert len(views) == VIEWS[tta]
    expected = np.mean([(view * weights.numpy()).sum(axis=(2, 3)) for view in views], axis=0)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("tta", "same"), [("none", ()), ("flip", ("mirrored",)), ("turns", ("mirrored", "turned"))])
def test_what_is_averaged_over_makes_no_difference(tta: TTA, same: tuple[str, ...], tmp_path: Path) -> None:
    save_model(tmp_path / "model", seen(tta), network_of(CONV))
    model, images = load_model(tmp_path), pixels()
    others = {"mirrored": images[:, :, ::-1].copy(), "turned": np.rot90(images, 1, (1, 2)).copy()}
    for name, other in others.items():
        equal = np.allclose(model.embed(other), model.embed(images), rtol=1e-3, atol=1e-5)
        assert equal == (name in same), name


@every_tta
def test_a_kept_model_averages_features_and_so_its_classifier_s_logits(tta: TTA, tmp_path: Path) -> None:
    network, chosen = network_of(CONV, 3), seen(tta, 3)
    save_model(tmp_path / "model", chosen, network)
    model = load_model(tmp_path)
    assert model.card == replace(chosen, lineage=model.card.lineage)
    images = evaluation_view(pixels(), chosen.input).numpy()
    with torch.no_grad():
        each = [forward(network, torch.from_numpy(view.copy())) for view in BY_HAND[tta](images)]
    features, logits = (np.mean([one[part].numpy() for one in each], axis=0) for part in (0, 1))
    np.testing.assert_allclose(model.embed(pixels()), features, atol=1e-5)
    expected = torch.softmax(torch.from_numpy(logits).double() / 1.7, dim=1).numpy()
    np.testing.assert_allclose(model.probabilities(pixels()), expected, atol=1e-5)


def test_code_that_knows_no_views_refuses_the_model_and_one_without_is_as_before(tmp_path: Path) -> None:
    hashes = {}
    expected: dict[TTA, int] = {"none": OLDER, "flip": FORMAT, "turns": FORMAT}
    for tta, format in expected.items():
        save_model(tmp_path / tta / "model", seen(tta), network_of(CONV))
        values = json.loads((tmp_path / tta / "model" / "model.json").read_text())
        assert values["format"] == format and values["input"].get("tta", "none") == tta
        assert ("tta" in values["input"]) == (tta != "none")
        hashes[tta] = load_model(tmp_path / tta).sha256
    assert len(set(hashes.values())) == 3  # they see images otherwise, so they are other models
    file = tmp_path / "flip" / "model" / "model.json"
    file.write_text(file.read_text().replace('"flip"', '"twirl"'))
    with pytest.raises(UsageError, match=r"model.json is damaged"):
        load_model(tmp_path / "flip")


def test_views_judge_a_fold_and_have_no_say_in_its_training() -> None:
    images, _ = stripes(32)
    truth = np.arange(32) // 2 % 2
    fold, labels = Fold(0, 1, np.arange(24), np.arange(24, 32)), labels_of(truth)
    once, often = recipe(epochs=2), recipe(epochs=2, wanted=wanted(tta="turns"))
    plain, judged = (finetune_fold(chosen, images, labels, fold) for chosen in (once, often))
    assert judged.history == plain.history and judged.best_epoch == plain.best_epoch
    assert not np.allclose(judged.probabilities, plain.probabilities, atol=1e-4)

    train, held = hold_out(*labels.take(fold.train), fraction=0.15, seed=0)
    outcome = fine_tune(once, images, truth, fold.train[train], fold.train[held], 0, 1)
    shown = evaluation_view(images, outcome.initial.input).numpy()
    with torch.no_grad():
        logits = [forward(outcome.network, torch.from_numpy(v.copy()))[1].numpy() for v in BY_HAND["turns"](shown)]
    expected = from_logits(np.mean(logits, axis=0), several=False)
    np.testing.assert_allclose(judged.probabilities, expected[fold.test], atol=1e-4)
    np.testing.assert_allclose(judged.inner_probabilities, expected[fold.train[held]], atol=1e-4)


@pytest.mark.slow
def test_a_graph_holds_the_views_and_timm_is_refused(tmp_path: Path) -> None:
    save_model(tmp_path / "run" / "model", seen("turns", 3), network_of(CONV, 3))
    model = load_model(tmp_path / "run")
    assert exported(str(tmp_path / "run"), tmp_path / "out")["max_abs_difference"] <= 1e-4
    shown = shown_to_graphs(CONV, 3)
    for ours, theirs in zip(
        (model.embed(shown), model.probabilities(shown)), run_onnx(tmp_path / "out", shown), strict=True
    ):
        np.testing.assert_allclose(theirs, ours, atol=1e-4)
    with pytest.raises(UsageError, match=r"averages over 8 views .* use --to onnx") as caught:
        exported(str(tmp_path / "run"), tmp_path / "timm", "timm")
    assert "\n" not in str(caught.value) and not (tmp_path / "timm").exists()


@pytest.mark.slow
def test_every_network_of_a_class_tree_looks_at_all_views_here_and_in_a_graph(tmp_path: Path) -> None:
    names = ("ill/early", "ill/late", "well")
    tree, found = tree_of(names), {}
    modules = [CONV.build(node.width).eval() for node in tree.nodes]
    for place, module in enumerate(modules):
        seed_weights(module, place)
    heads = tuple(Head(number, 0, 1.0, (0.5, 0.5)) for number in range(2))
    content = Hierarchy(names, "independent", "network", (Chain(tree, tuple(modules), heads, (1, 1)),)).dumps()
    network = network_of(CONV)
    network.load_state_dict(trunk_of(modules[0].state_dict(), "classifier."))
    images = shown_to_graphs(CONV, 3)
    ttas: tuple[TTA, ...] = ("none", "turns")
    for tta in ttas:
        described = replace(seen(tta), head="hierarchy", classes=names)
        save_model(tmp_path / tta / "model", described, network, files=[(HIERARCHY, content)])
        found[tta] = load_model(tmp_path / tta).probabilities(images)
        exported(str(tmp_path / tta), tmp_path / f"{tta}-graph")
        np.testing.assert_allclose(run_onnx(tmp_path / f"{tta}-graph", images)[1], found[tta], atol=1e-4)
    shown = evaluation_view(images, seen("turns").input).numpy()
    with torch.no_grad():
        each = [
            np.mean([forward(m, torch.from_numpy(v.copy()))[1].numpy() for v in BY_HAND["turns"](shown)], axis=0)
            for m in modules
        ]
    expected = chain_rule(tree, [from_logits(logits, several=False) for logits in each])
    np.testing.assert_allclose(found["turns"], expected, atol=1e-5)
    assert not np.allclose(found["none"], expected, atol=1e-4)


def test_the_lines_that_load_it_elsewhere_name_the_views() -> None:
    assert seen("none").snippet("x").endswith("model.eval()")
    assert seen("flip").snippet("x").endswith("mean over x and x.flip(3)")
    assert "torch.rot90" in seen("turns").snippet("x")


def test_where_views_mean_nothing_they_are_refused() -> None:
    with pytest.raises(UsageError, match=r"--tta flip: .*--task metric"):
        TransferConfig("data", out="out", task="metric", tta="flip")
    with pytest.raises(UsageError, match="--tta turns: radiomics"):
        TransferConfig("data", out="out", task="svm", features="radiomic", tta="turns")
    with pytest.raises(UsageError, match=r"needs a square input, this one has 32x48 pixels; .*--tta flip"):
        initial_weights(wanted("test_vit", image_size="32x48", tta="turns"))
    assert initial_weights(wanted("test_vit", image_size="32x48", tta="flip")).input.tta == "flip"
