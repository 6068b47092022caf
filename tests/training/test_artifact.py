"""RUN/model/: what was saved is what is loaded, by us and by anyone with timm; and nothing changed is loaded at all."""

from __future__ import annotations

import hashlib
import io
import json
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import skops.io
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import FunctionTransformer
from torch import nn

from cluster.errors import UsageError
from cluster.outfile import claim_file
from training import lineage
from training.artifact import (
    FORMAT,
    OLDER,
    ModelCard,
    card_sha256,
    forward,
    load_model,
    model_folder,
    read_card,
    refuse_changed,
    save_model,
)
from training.configs import EvaluateConfig, ExportConfig, InferenceConfig, SuggestConfig
from training.encoder import Architecture, seed_weights
from training.evaluate import evaluate
from training.export import export
from training.images import ImagePath
from training.inference import embedding_key, predict
from training.suggest import suggest
from training.tasks.frozen import ESTIMATORS, Frozen, load_estimator
from training.transform import Input, evaluation_view

VIT = Architecture("test_vit", 32, 48, 3, 16)
CONV = Architecture("test_efficientnet", 32, 32, 1)
every_architecture = pytest.mark.parametrize("architecture", [VIT, CONV])


def card(architecture: Architecture, **options: Any) -> ModelCard:
    c = architecture.channels
    shown = Input(architecture.height, architecture.width, c, (0.4, 0.5, 0.6)[:c], (0.2, 0.3, 0.1)[:c])
    return ModelCard(architecture, ImagePath(40, 40, "crop", window="10:300"), shown, **options)


def network_of(architecture: Architecture, classes: int = 0) -> nn.Module:
    network = architecture.build(classes)
    seed_weights(network, 0)
    return network.eval()


def pixels(count: int = 5) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 40, 40, 3), dtype=np.uint8)


def saved(folder: Path, architecture: Architecture = CONV, **options: Any) -> Path:
    save_model(folder / "model", card(architecture, **options), network_of(architecture))
    return folder


def edited(run: Path, **changes: Any) -> Path:
    file = run / "model" / "model.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return run


def refused(run: Path) -> str:
    with pytest.raises(UsageError) as caught:
        load_model(run)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# What goes in comes out


@every_architecture
def test_a_loaded_encoder_gives_the_features_of_the_saved_one(architecture: Architecture, tmp_path: Path) -> None:
    network: Any = network_of(architecture)
    save_model(tmp_path / "model", card(architecture), network)
    model = load_model(tmp_path)
    with torch.no_grad():
        expected = network(evaluation_view(pixels(), card(architecture).input)).numpy()
    found = model.embed(pixels())
    assert found.dtype == np.float32 and np.array_equal(found, expected)
    assert np.allclose(model.embed(pixels(), batch_size=2), expected, atol=1e-5)
    with pytest.raises(UsageError, match="without classes"):
        model.probabilities(pixels())


@every_architecture
def test_a_classifier_s_probabilities_are_the_softmax_at_its_temperature(
    architecture: Architecture, tmp_path: Path
) -> None:
    network: Any = network_of(architecture, 3)
    names = ("a", "b/c", "b/d")
    save_model(tmp_path / "model", card(architecture, head="network", classes=names, temperature=2.5), network)
    model = load_model(tmp_path)
    with torch.no_grad():
        logits = network(evaluation_view(pixels(), card(architecture).input)).double()
    features = model.embed(pixels())
    probabilities = model.classify(features)
    assert np.allclose(probabilities, torch.softmax(logits / 2.5, dim=1), atol=1e-7)
    assert np.array_equal(probabilities, model.probabilities(pixels()))
    weight = network.get_classifier().weight.detach().numpy()
    bias = network.get_classifier().bias.detach().numpy()
    assert np.allclose(features @ weight.T + bias, logits, atol=1e-4)


@every_architecture
def test_of_several_labels_each_probability_is_a_sigmoid_at_the_temperature(
    architecture: Architecture, tmp_path: Path
) -> None:
    network: Any = network_of(architecture, 3)
    described = card(architecture, head="network", classes=("a", "b", "c"), temperature=2.5, activation="sigmoid")
    save_model(tmp_path / "model", described, network)
    model = load_model(tmp_path)
    with torch.no_grad():
        logits = network(evaluation_view(pixels(), described.input)).double()
    assert np.allclose(model.probabilities(pixels()), torch.sigmoid(logits / 2.5), atol=1e-6)


def test_a_model_from_before_activations_has_one_class_per_image(tmp_path: Path) -> None:
    run = saved(tmp_path)
    file = run / "model" / "model.json"
    values = json.loads(file.read_text())
    assert values.pop("activation") == "softmax" and values.pop("ordered") is False
    file.write_text(json.dumps(values))
    assert (read_card(run)[0].activation, read_card(run)[0].ordered) == ("softmax", False)
    assert "model.json is damaged (activation 'tanh')" in refused(edited(run, activation="tanh"))


@every_architecture
def test_forward_gives_timm_s_own_features_and_logits(architecture: Architecture) -> None:
    network: Any = network_of(architecture, 4)
    images = evaluation_view(pixels(), card(architecture).input)
    with torch.no_grad():
        features, logits = forward(network, images)
        assert torch.allclose(logits, network(images), atol=1e-5)
        network.reset_classifier(0)
        assert torch.allclose(features, network(images), atol=1e-5)


def test_models_that_see_images_otherwise_are_other_models_and_equal_ones_the_same(tmp_path: Path) -> None:
    """Of a conv net neither size nor normalisation nor the stored image is in a tensor."""
    plain = card(CONV)
    others = [
        replace(plain, input=replace(plain.input, height=64)),
        replace(plain, input=replace(plain.input, mean=(0.1,))),
        replace(plain, image_path=ImagePath(40, 40, "crop", window="0:300")),
    ]
    found = []
    for at, own in enumerate([*others, *[plain] * 6]):
        save_model(tmp_path / str(at) / "model", own, network_of(CONV))
        found.append(load_model(tmp_path / str(at)).sha256)
    assert len(set(found)) == len(others) + 1 and len(set(found[len(others) :])) == 1
    one, other = (read_card(tmp_path / str(at))[1] for at in (0, 3))
    dataset = SimpleNamespace(version="1")
    assert embedding_key(one, dataset, ["a"]) != embedding_key(other, dataset, ["a"])  # type: ignore[arg-type]


def test_a_model_from_before_its_input_was_in_its_weights_is_read_and_known_by_them(tmp_path: Path) -> None:
    run = saved(tmp_path)
    file = run / "model" / "model.safetensors"
    save_file(load_file(file), file, metadata={"format": "pt"})
    values = json.loads((run / "model" / "model.json").read_text())
    values["sha256"]["model.safetensors"] = hashlib.sha256(file.read_bytes()).hexdigest()
    assert load_model(edited(run, sha256=values["sha256"])).sha256 == values["sha256"]["model.safetensors"]


@pytest.mark.parametrize("verb", ["evaluate", "suggest", "export"])
def test_what_was_made_of_a_model_that_changed_is_not_called_done(verb: str, tmp_path: Path) -> None:
    """A temperature, or a classifier beside the weights, leaves their sha256 as it was."""
    run, out = str(saved(tmp_path)), str(tmp_path / "out")
    made: dict[str, tuple[Any, Any]] = {
        "evaluate": (evaluate, EvaluateConfig(model=run, data=str(tmp_path), out=out)),
        "suggest": (suggest, SuggestConfig(model=run, data=str(tmp_path), out=out)),
        "export": (export, ExportConfig(model=run, to="timm", out=out)),
    }
    command, config = made[verb]
    with config.open_out(verb) as claimed:
        claimed.finish({"models": {run: card_sha256(run)}})
    assert command(config) == {"models": {run: card_sha256(run)}}
    edited(Path(run), temperature=3.0)
    with pytest.raises(
        UsageError, match=rf"--out {out}: was made of what {run} held before; use --overwrite"
    ) as caught:
        command(config)
    assert len(str(caught.value).splitlines()) == 1
    refuse_changed(out, {}, {run: "ab"})  # of before models were noted


def test_probabilities_of_a_model_that_changed_are_not_called_done(tmp_path: Path) -> None:
    run, images = saved(tmp_path, head="metric", classes=("a", "b")), tmp_path / "images"
    images.mkdir()
    Image.fromarray(pixels(1)[0]).save(images / "one.png")
    config = InferenceConfig(str(images), model=str(run), out=str(tmp_path / "found.parquet"))
    known = config.identity() | {
        "model_sha256": read_card(run)[1]["model.safetensors"],
        "card_sha256": card_sha256(run),
    }
    with claim_file(config.out, verb="predict", identity=known, overwrite=False) as claimed:
        claimed.tmp.write_bytes(b"")
        claimed.finish({"images": 1})
    assert predict(config) == {"images": 1}
    edited(run, temperature=3.0)
    with pytest.raises(UsageError, match=r"card_sha256 differs .*use --overwrite or another --out"):
        predict(config)


def test_the_whole_card_survives(tmp_path: Path) -> None:
    full = card(
        VIT,
        head="network",
        classes=("é", "b/c"),
        ordered=True,
        activation="sigmoid",
        temperature=1.5,
        metrics={"auroc": 0.5},
        lineage={"a": [1, {"b": None}]},
    )
    save_model(tmp_path / "model", full, network_of(VIT, 2))
    assert read_card(tmp_path)[0] == load_model(tmp_path).card == full
    values = json.loads((tmp_path / "model" / "model.json").read_text())
    assert values["format"] == OLDER
    assert values["versions"]["torch"] == torch.__version__.split("+")[0] or values["versions"]["torch"]


def test_a_loaded_model_is_in_evaluation_mode_and_frozen(tmp_path: Path) -> None:
    network = load_model(saved(tmp_path)).network
    assert not network.training and not any(p.requires_grad for p in network.parameters())


def test_saving_again_replaces_the_whole_folder(tmp_path: Path) -> None:
    save_model(tmp_path / "model", card(VIT), network_of(VIT), files=[("extra.bin", b"x")])
    save_model(tmp_path / "model", card(CONV), network_of(CONV))
    assert {p.name for p in (tmp_path / "model").iterdir()} == {"model.json", "model.safetensors", lineage.SEEN}
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert load_model(tmp_path).card.architecture == CONV


def test_a_model_folder_is_found_from_the_run_and_from_itself(tmp_path: Path) -> None:
    saved(tmp_path)
    assert model_folder(tmp_path) == model_folder(tmp_path / "model") == tmp_path / "model"


@pytest.mark.parametrize("classes", [0, 3])
@every_architecture
def test_the_printed_snippet_loads_the_model_without_us(
    architecture: Architecture, classes: int, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"head": "network", "classes": tuple("abc")} if classes else {}
    save_model(tmp_path / "model", card(architecture, **options), network_of(architecture, classes))
    names: dict[str, Any] = {}
    exec(architecture.snippet(str(tmp_path / "model" / "model.safetensors"), classes), names)
    ours = load_model(tmp_path)
    images = evaluation_view(pixels(), ours.card.input)
    with torch.no_grad():
        assert torch.equal(names["model"](images), ours.network(images))
    assert not names["model"].training


# What was changed is refused


@pytest.mark.parametrize("at", [0, 8, 60, 0.5, -1])
def test_a_flipped_bit_in_the_weights_is_refused(at: float, tmp_path: Path) -> None:
    file = saved(tmp_path) / "model" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[int(at * len(data)) if isinstance(at, float) else at] ^= 1
    file.write_bytes(data)
    assert "model.safetensors: missing or changed" in refused(tmp_path)


def test_missing_cut_and_swapped_files_are_refused(tmp_path: Path) -> None:
    weights = saved(tmp_path / "cut") / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    (saved(tmp_path / "gone") / "model" / "model.safetensors").unlink()
    (saved(tmp_path / "seen") / "model" / lineage.SEEN).write_bytes(lineage.dump(["00" * 16]))
    for name in ("cut", "gone", "seen"):
        assert "missing or changed" in refused(tmp_path / name)


@pytest.mark.parametrize("hashes", [{}, {"seen.safetensors": "0"}])
def test_weights_that_no_hash_vouches_for_are_refused(hashes: dict[str, str], tmp_path: Path) -> None:
    assert "model" in refused(edited(saved(tmp_path), sha256=hashes))


def test_a_head_that_no_hash_vouches_for_is_refused(tmp_path: Path) -> None:
    run = saved(tmp_path)
    (run / "model" / "head.skops").write_bytes(fitted().dumps())
    assert "head.skops" in refused(edited(run, head="estimator", classes=["a", "b"]))


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    assert f"model format {FORMAT + 1} is newer" in refused(edited(saved(tmp_path), format=FORMAT + 1))


@pytest.mark.parametrize(
    "changes",
    [
        {"architecture": {"name": "test_vit"}},
        {"architecture": 3},
        {"classes": None},
        {"temperature": "hot"},
        {"input": {}},
        {"sha256": None},
    ],
)
def test_a_damaged_card_is_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    assert "model.json is damaged" in refused(edited(saved(tmp_path), **changes))


def test_what_is_no_run_and_what_has_not_finished_are_told_apart(tmp_path: Path) -> None:
    assert "not a RUN" in refused(tmp_path)
    assert "not a RUN" in refused(tmp_path / "nothing")
    (tmp_path / "config.yaml").write_text("verb: pretrain\n")
    assert "has not finished" in refused(tmp_path)


# Estimators


def fitted(classes: int = 2) -> Frozen:
    rng = np.random.default_rng(0)
    truth = np.arange(60) % classes
    features = rng.normal(size=(60, 4)) + 3 * truth[:, None]
    folds = [(np.arange(30), np.arange(30, 60)), (np.arange(30, 60), np.arange(30))]
    return Frozen(ESTIMATORS["linear"](features, truth, folds), classes)


def test_an_estimator_on_features_survives(tmp_path: Path) -> None:
    network: Any = network_of(CONV)
    with torch.no_grad():
        features = network(evaluation_view(pixels(30), card(CONV).input)).numpy()
    folds = [(np.arange(15), np.arange(15, 30)), (np.arange(15, 30), np.arange(15))]
    head = Frozen(ESTIMATORS["linear"](features, np.arange(30) % 3, folds), 3)
    described = card(CONV, head="estimator", classes=("a", "b", "c"))
    save_model(tmp_path / "model", described, network, files=[("head.skops", head.dumps())])
    found = load_model(tmp_path).probabilities(pixels(30))
    assert np.allclose(found, head.probabilities(features), atol=1e-9)
    file = tmp_path / "model" / "head.skops"
    file.write_bytes(fitted().dumps())
    assert "head.skops: missing or changed" in refused(tmp_path)


def test_an_estimator_with_a_foreign_type_is_refused_and_its_module_never_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    canary = tmp_path / "canary"
    (tmp_path / "rayograph_evil.py").write_text(
        "from pathlib import Path\n"
        "from sklearn.linear_model import LogisticRegression\n"
        f"Path({str(canary)!r}).write_text('executed')\n"
        "class Evil(LogisticRegression):\n    pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    import importlib

    evil = importlib.import_module("rayograph_evil")
    assert canary.exists()  # the canary sings where the module is imported
    content = skops.io.dumps(evil.Evil().fit([[0.0], [1.0]], [0, 1]))
    del sys.modules["rayograph_evil"]
    canary.unlink()
    head = card(CONV, head="estimator", classes=("a", "b"))
    save_model(tmp_path / "model", head, network_of(CONV), files=[("head.skops", content)])
    assert "rayograph_evil.Evil" in refused(tmp_path)
    assert not canary.exists() and "rayograph_evil" not in sys.modules


def test_an_estimator_that_calls_a_function_is_refused() -> None:
    import os

    for content in (
        skops.io.dumps(FunctionTransformer(func=os.system)),
        skops.io.dumps({"a": LogisticRegression(), "b": os.remove}),
    ):
        with pytest.raises(UsageError, match="types that Rayograph never writes"):
            load_estimator(content, 2)


@pytest.mark.parametrize("damage", ["text", "cut", "schema"])
def test_a_file_that_is_no_estimator_is_refused(damage: str) -> None:
    content = fitted().dumps()
    if damage == "schema":
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w") as archive:
            archive.writestr("other.json", "{}")
        content = out.getvalue()
    broken = {"text": b"hello", "cut": content[: len(content) // 2], "schema": content}[damage]
    with pytest.raises(UsageError, match=r"head\.skops"):
        load_estimator(broken, 2)
