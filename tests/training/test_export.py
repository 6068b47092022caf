"""`export`: what others load gives our numbers, from file to probabilities; and what does not is not published."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from PIL import Image
from timm.data.config import resolve_model_data_config
from torch import nn

from cluster.cli import main
from cluster.errors import RayographError, ResourceError, UsageError
from training.artifact import HIERARCHY, ModelCard, load_model, save_model
from training.configs import ExportConfig
from training.encoder import Architecture, seed_weights
from training.export import Probe, export, probe_of
from training.images import ImagePath, decode
from training.tasks.chains import Hierarchy
from training.tasks.frozen import ESTIMATORS, Frozen
from training.tasks.hierarchy import tree_of
from training.tasks.label_sets import LABEL_SET_ESTIMATORS, LabelSets
from training.tasks.learners import SmallNetwork, trunk_of
from training.tasks.nearness import METRIC, dump_metric, learn_nearness
from training.tasks.progressive import Progressive
from training.tasks.structures import Chain, Head
from training.transform import Input, evaluation_view

pytestmark = pytest.mark.slow
VIT = Architecture("test_vit", 32, 48, 3, 16)
CONV = Architecture("test_efficientnet", 32, 32, 1)
every_architecture = pytest.mark.parametrize("architecture", [VIT, CONV])
NAMES = ("abnormal/a", "abnormal/b", "normal")


def card(architecture: Architecture, path: ImagePath | None = None, **options: Any) -> ModelCard:
    c = architecture.channels
    shown = Input(architecture.height, architecture.width, c, (0.4, 0.5, 0.6)[:c], (0.2, 0.3, 0.1)[:c])
    return ModelCard(architecture, path or ImagePath(40, 40), shown, **options)


def network_of(architecture: Architecture, classes: int = 0) -> Any:
    network = architecture.build(classes)
    seed_weights(network, 0)
    if classes:
        classifier: nn.Linear = network.get_classifier()  # type: ignore[operator]
        nn.init.normal_(classifier.bias, generator=torch.Generator().manual_seed(0))
    return network.eval()


def classifier(run: Path, architecture: Architecture, path: ImagePath | None = None) -> str:
    described = card(architecture, path, head="network", classes=NAMES, temperature=1.7)
    save_model(run / "model", described, network_of(architecture, 3))
    return str(run)


def encoder(run: Path, architecture: Architecture) -> str:
    save_model(run / "model", card(architecture), network_of(architecture))
    return str(run)


def head_of(task: str, width: int, truth: np.ndarray, classes: int = 3) -> Frozen:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(len(truth), width)) * rng.uniform(0.1, 2, width) + 0.3 * truth[:, None]
    half = np.arange(len(truth)) < len(truth) // 2
    folds = [(np.flatnonzero(half), np.flatnonzero(~half)), (np.flatnonzero(~half), np.flatnonzero(half))]
    return Frozen(ESTIMATORS[task](features, truth, folds), classes)


def estimated(run: Path, architecture: Architecture, task: str, truth: np.ndarray) -> str:
    network = network_of(architecture)
    head = head_of(task, network.num_features if architecture is VIT else network.head_hidden_size, truth)
    described = card(architecture, head="estimator", classes=NAMES, temperature=0.8)
    save_model(run / "model", described, network, files=[("head.skops", head.dumps())])
    return str(run)


def exported(model: str, out: Path, to: Any = "onnx", **options: Any) -> dict[str, Any]:
    return export(ExportConfig(model=model, to=to, out=str(out), **options))


def pixels(architecture: Architecture, count: int) -> np.ndarray:
    size = (count, architecture.height, architecture.width, architecture.channels)
    return np.random.default_rng(7).integers(0, 256, size, dtype=np.uint8)


def run_onnx(folder: Path, shown: np.ndarray) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    images = np.ascontiguousarray(shown.transpose(0, 3, 1, 2)).astype(np.float32) / 255
    found: list[np.ndarray] = session.run(None, {"images": images})
    return found


# ONNX


@every_architecture
def test_an_onnx_classifier_gives_our_features_and_probabilities_at_any_batch_size(
    architecture: Architecture, tmp_path: Path
) -> None:
    run = classifier(tmp_path / "run", architecture)
    summary = exported(run, tmp_path / "out")
    assert summary["opset"] == 18 and summary["outputs"] == ["features", "probabilities"]
    assert summary["max_abs_difference"] <= 1e-4
    assert summary["bytes"] == (tmp_path / "out" / "model.onnx").stat().st_size
    assert {p.name for p in (tmp_path / "out").iterdir() if p.name[0] != "."} == {
        *("model.onnx", "preprocessing.json", "README.md"),
        *("config.yaml", "summary.json", "run.log"),
    }
    for count in (1, 4, 9):
        shown = pixels(architecture, count)
        found = run_onnx(tmp_path / "out", shown)
        model = load_model(run)
        for ours, theirs in zip((model.embed(shown), model.probabilities(shown)), found, strict=True):
            assert theirs.dtype == np.float32 and np.abs(ours - theirs).max() < 1e-4
    proto = onnx.load(str(tmp_path / "out" / "model.onnx"))
    assert {entry.key: entry.value for entry in proto.metadata_props}["classes"].split("\n") == list(NAMES)
    assert exported(run, tmp_path / "out") == summary  # already done


@pytest.mark.parametrize(
    ("kind", "structure"), [("network", "transferred"), ("network", "joint"), ("features", "joint")]
)
def test_an_onnx_class_tree_multiplies_the_answers_on_a_path(kind: str, structure: str, tmp_path: Path) -> None:
    """Modules of random weights, one question without any, and temperatures."""
    tree, network = tree_of(NAMES), network_of(CONV)
    widths = [tree.width] if structure == "joint" else [tree.nodes[0].width]
    build = CONV.build if kind == "network" else partial(SmallNetwork, network.head_hidden_size)
    modules = tuple(build(width) for width in widths)
    for place, module in enumerate(modules):
        seed_weights(module, place)
    if kind == "network":
        network.load_state_dict(trunk_of(modules[0].state_dict(), "classifier."))
    heads = [Head(0, columns.start, 1.5 - at, (0.3, 0.7)) for at, columns in enumerate(tree.columns)]
    heads = heads if structure == "joint" else [heads[0], Head(-1, 0, 1.0, (0.3, 0.7))]
    chain = Chain(tree, modules, tuple(heads), (1, 1))
    content = Hierarchy(NAMES, structure, kind, (chain,)).dumps()
    described = card(CONV, head="hierarchy", classes=NAMES, temperature=0.8)
    save_model(tmp_path / "run" / "model", described, network, files=[(HIERARCHY, content)])
    assert exported(str(tmp_path / "run"), tmp_path / "out")["outputs"] == ["features", "probabilities"]
    shown = pixels(CONV, 4)
    model = load_model(tmp_path / "run")
    for ours, theirs in zip(
        (model.embed(shown), model.probabilities(shown)), run_onnx(tmp_path / "out", shown), strict=True
    ):
        assert np.abs(ours - theirs).max() < 1e-4
    assert exported(str(tmp_path / "run"), tmp_path / "timm", to="timm")["classes"] == 0


@pytest.mark.parametrize("alone", [True, False])
def test_an_encoder_gives_features_alone(alone: bool, tmp_path: Path) -> None:
    run = classifier(tmp_path / "run", CONV) if alone else encoder(tmp_path / "run", CONV)
    assert exported(run, tmp_path / "out", encoder_only=alone)["outputs"] == ["features"]
    (features,) = run_onnx(tmp_path / "out", pixels(CONV, 3))
    assert np.abs(features - load_model(run).embed(pixels(CONV, 3))).max() < 1e-4


TRUTHS = {
    "all": np.arange(60) % 3,
    "two": np.arange(60) % 2 * 2,  # the second class was absent
}


def metric(run: Path, architecture: Architecture, steps: int) -> str:
    """A model whose features are an untrained embedding."""
    shown = card(architecture, head="metric", classes=NAMES, temperature=0.7)
    c = architecture.channels
    network = network_of(architecture)
    embedding = Progressive(network, torch.zeros(1, c, architecture.height, architecture.width), 8, steps)
    embedding.seed(0)
    points = np.random.default_rng(0).normal(size=(30, 8)).astype(np.float32)
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    nearness = learn_nearness(points, np.arange(30) % 3, 3)
    save_model(run / "model", shown, network, files=[(METRIC, dump_metric(embedding.head(), nearness, steps))])
    return str(run)


@every_architecture
def test_an_embedding_becomes_a_graph_with_its_classes(architecture: Architecture, tmp_path: Path) -> None:
    model = metric(tmp_path / "run", architecture, 1)
    summary = exported(model, tmp_path / "out")
    assert summary["outputs"] == ["features", "probabilities"]
    shown = pixels(architecture, 4)
    features, probabilities = run_onnx(tmp_path / "out", shown)
    ours = load_model(model)
    np.testing.assert_allclose(features, ours.embed(shown), atol=1e-4)
    np.testing.assert_allclose(probabilities, ours.probabilities(shown), atol=1e-4)
    assert features.shape == (4, 8)


def test_an_embedding_with_crops_is_refused_as_a_graph_and_leaves_its_encoder_to_timm(tmp_path: Path) -> None:
    model = metric(tmp_path / "run", CONV, 2)
    with pytest.raises(UsageError, match="an embedding of --steps 2 crops images, which has no ONNX form") as caught:
        exported(model, tmp_path / "out")
    assert len(str(caught.value).splitlines()) == 1
    assert exported(model, tmp_path / "timm", "timm")["classes"] == 0


@pytest.mark.parametrize("truth", TRUTHS)
def test_a_linear_probe_becomes_part_of_the_graph(truth: str, tmp_path: Path) -> None:
    run = estimated(tmp_path / "run", CONV, "linear", TRUTHS[truth])
    assert exported(run, tmp_path / "out")["classes"] == 3
    expected = load_model(run).probabilities(pixels(CONV, 5))
    assert np.abs(run_onnx(tmp_path / "out", pixels(CONV, 5))[1] - expected).max() < 1e-4


@pytest.mark.parametrize("truth", TRUTHS)
def test_the_probe_is_scikit_learns_own_up_to_rounding(truth: str) -> None:
    head = head_of("linear", 12, TRUTHS[truth])
    probe = probe_of(head, 3)
    assert isinstance(probe, Probe)
    features = np.random.default_rng(1).normal(size=(50, 12)) * 3
    weight, bias = probe.folded()
    for logits in (((features - probe.mean) / probe.scale) @ probe.weight.T + probe.bias, features @ weight.T + bias):
        found = torch.softmax(torch.from_numpy(logits), dim=1).numpy()
        assert np.allclose(found, head.probabilities(features), atol=1e-12)


def test_our_own_network_has_an_onnx_form_and_timm_is_refused_in_one_line(tmp_path: Path) -> None:
    run = classifier(tmp_path / "run", Architecture("parallel_resnet_tiny", 33, 48, 1))
    summary = export(ExportConfig(model=run, to="onnx", out=str(tmp_path / "onnx")))
    assert summary["max_abs_difference"] < 1e-4
    with pytest.raises(UsageError, match=r"parallel_resnet_tiny, is Rayograph's own, .* use --to onnx") as caught:
        export(ExportConfig(model=run, to="timm", out=str(tmp_path / "timm")))
    assert "\n" not in str(caught.value) and not (tmp_path / "timm").exists()


@pytest.mark.parametrize("task", ["knn", "svm"])
def test_other_estimators_are_refused_in_one_line_that_says_what_works(task: str, tmp_path: Path) -> None:
    run = estimated(tmp_path / "run", CONV, task, TRUTHS["all"])
    with pytest.raises(UsageError, match="--to timm or --encoder-only") as caught:
        exported(run, tmp_path / "out")
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()
    assert exported(run, tmp_path / "out", encoder_only=True)["outputs"] == ["features"]
    assert exported(run, tmp_path / "timm", "timm")["classes"] == 0


def test_missing_packages_are_named_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import util

    real = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda name: None if name == "onnxruntime" else real(name))
    with pytest.raises(ResourceError, match=r"needs onnxruntime: pip install 'rayograph\[onnx\]'"):
        exported(encoder(tmp_path / "run", CONV), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("difference", [2e-4, float("nan"), float("inf")])
def test_a_model_that_differs_is_not_published(
    difference: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = sys.modules["training.export"]
    monkeypatch.setattr(source, "_difference", lambda plan, answer: difference)
    run = encoder(tmp_path / "run", CONV)
    with pytest.raises(RayographError, match="differs from ours by"):
        exported(run, tmp_path / "out", "timm")
    assert {p.name for p in (tmp_path / "out").iterdir()} <= {"config.yaml", "run.log", ".lock"}
    monkeypatch.undo()
    assert exported(run, tmp_path / "out", "timm")["max_abs_difference"] <= 1e-4


def test_parity_notices_a_changed_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source: Any = sys.modules["training.export"]
    real = source._timm_network

    def changed(plan: Any) -> Any:
        network = real(plan)
        with torch.no_grad():
            network.get_classifier().bias[0] += 0.01
        return network

    monkeypatch.setattr(source, "_timm_network", changed)
    with pytest.raises(RayographError, match="differs from ours by"):
        exported(classifier(tmp_path / "run", CONV), tmp_path / "out", "timm")


# timm


@every_architecture
def test_timm_loads_the_folder_and_gives_equal_features_and_logits(architecture: Architecture, tmp_path: Path) -> None:
    run = classifier(tmp_path / "run", architecture)
    assert exported(run, tmp_path / "out", "timm")["max_abs_difference"] <= 1e-6
    loaded = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    ours = load_model(run)
    images = evaluation_view(pixels(architecture, 3), ours.card.input)
    with torch.no_grad():
        assert torch.equal(loaded(images), ours.network(images))
        assert torch.equal(loaded.forward_features(images), ours.network.forward_features(images))  # type: ignore[operator]
    data = resolve_model_data_config(loaded)  # type: ignore[no-untyped-call]
    wanted = ours.card.input
    assert data["input_size"] == (wanted.channels, wanted.height, wanted.width)
    assert (tuple(data["mean"]), tuple(data["std"]), data["crop_pct"]) == (wanted.mean, wanted.std, 1.0)
    assert not list((tmp_path / "out").glob("*.bin")) + list((tmp_path / "out").glob("*.pth"))


def test_timm_gets_a_linear_probe_as_its_classifier(tmp_path: Path) -> None:
    run = estimated(tmp_path / "run", VIT, "linear", TRUTHS["two"])
    exported(run, tmp_path / "out", "timm")
    loaded = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    ours = load_model(run)
    with torch.no_grad():
        logits = loaded(evaluation_view(pixels(VIT, 3), ours.card.input))
    found = torch.softmax(logits / ours.card.temperature, dim=1).numpy()
    assert np.abs(found - ours.probabilities(pixels(VIT, 3))).max() < 1e-4


# From the file to the answer, by the README's own lines


def pictures(folder: Path) -> list[Path]:
    rng = np.random.default_rng(3)
    coarse = rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)
    colour = Image.fromarray(coarse).resize((90, 61), Image.Resampling.BICUBIC)
    colour.save(folder / "colour.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    colour.save(folder / "turned.png", exif=turned)
    Image.fromarray(np.asarray(colour)[:, :, 0]).save(folder / "grey.png")
    Image.fromarray(np.asarray(colour)[:, :, 0].astype(np.uint16) * 11 + 900).save(folder / "deep.png")
    return sorted(folder.glob("*.png"))


@pytest.mark.parametrize(
    ("to", "architecture", "path"),
    [
        ("onnx", CONV, ImagePath(40, 40, "crop")),
        ("onnx", VIT, ImagePath(32, 48, "letterbox", window="20:200")),
        ("timm", VIT, ImagePath(40, 50, "squash")),
    ],
)
def test_the_lines_of_the_readme_give_our_probabilities(
    to: str, architecture: Architecture, path: ImagePath, tmp_path: Path
) -> None:
    run, out = classifier(tmp_path / "run", architecture, path), tmp_path / "out"
    exported(run, out, to)
    words = (out / "README.md").read_text()
    assert "Research use only; not a medical device" in words
    (snippet,) = re.findall(r"```python\n(.*?)```", words, flags=re.DOTALL)
    ours = load_model(run)
    for at, picture in enumerate(pictures(tmp_path)):
        expected = ours.probabilities(decode(picture.read_bytes(), path)[None])[0]
        names: dict[str, Any] = {}
        lines = snippet.replace('"preprocessing.json"', repr(str(out / "preprocessing.json")))
        lines = lines.replace('"model.onnx"', repr(str(out / "model.onnx"))).replace(
            'local-dir:."', f'local-dir:{out}"'
        )
        exec(lines.replace("sys.argv[1]", repr(str(picture))), names)
        assert np.abs(names["answer"]["probabilities"][0] - expected).max() < 1e-4, picture.name
        if at == 0:  # as a user runs them
            (out / "classify.py").write_text(snippet)
            command = [sys.executable, "classify.py", str(picture)]
            done = subprocess.run(command, cwd=out, capture_output=True, text=True, check=True)
            shown = [line.split(" ", 1) for line in done.stdout.splitlines()]
            assert [name for _, name in shown] == list(NAMES)
            assert np.allclose([float(value) for value, _ in shown], expected, atol=1e-4)


def test_the_image_path_is_written_as_numbers_and_in_words(tmp_path: Path) -> None:
    path = ImagePath(40, 30, "crop", window="10:300")
    exported(classifier(tmp_path / "run", VIT, path), tmp_path / "out", "timm")
    how = json.loads((tmp_path / "out" / "preprocessing.json").read_text())
    assert how["stored"].items() >= path.as_dict().items()
    assert how["input"].items() >= {"height": 32, "width": 48, "mean": [0.4, 0.5, 0.6], "channel_order": "RGB"}.items()
    assert (how["classes"], how["temperature"]) == (list(NAMES), 1.7)
    assert "grey values 10:300 become black and white" in how["steps"][1]
    assert "40x30 (height x width): scaled to cover it" in how["steps"][2]


def test_the_command_line_exports_and_is_done_the_second_time(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = classifier(tmp_path / "run", CONV)
    command = ["export", "--model", run, "--to", "onnx", "--out", str(tmp_path / "out")]
    assert main(command) == 0
    said = capfd.readouterr()
    assert said.out == "" and len(said.err.splitlines()) == 1 and "differs from ours by at most" in said.err
    assert main(command) == 0
    assert "already done" in capfd.readouterr().out
    assert main([*command[:4], "coreml", *command[5:]]) == 2
    assert main(["export", "--model", str(tmp_path), "--to", "onnx", "--out", str(tmp_path / "other")]) == 2


# Several labels


@pytest.mark.parametrize("to", ["onnx", "timm"])
@pytest.mark.parametrize("kind", ["network", "linear"])
def test_of_several_labels_each_probability_is_its_own(to: str, kind: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    described = card(CONV, head="network", classes=NAMES, temperature=1.7, activation="sigmoid")
    if kind == "network":
        save_model(run / "model", described, network_of(CONV, 3))
    else:
        network = network_of(CONV)
        rng = np.random.default_rng(0)
        truth = np.column_stack([rng.random((60, 2)) < 0.4, np.zeros(60, bool)])  # the third was absent
        features = rng.normal(size=(60, network.head_hidden_size)) + truth[:, :1]
        half = np.arange(60) < 30
        folds = [(np.flatnonzero(half), np.flatnonzero(~half)), (np.flatnonzero(~half), np.flatnonzero(half))]
        head = LabelSets(LABEL_SET_ESTIMATORS["linear"](features, truth, folds), 3)
        described = replace(described, head="estimator")
        save_model(run / "model", described, network, files=[("head.skops", head.dumps())])
    assert exported(str(run), tmp_path / "out", to)["max_abs_difference"] <= 1e-4
    shown = pixels(CONV, 4)
    expected = load_model(run).probabilities(shown)
    assert not np.allclose(expected.sum(axis=1), 1)
    assert json.loads((tmp_path / "out" / "preprocessing.json").read_text())["activation"] == "sigmoid"
    if to == "onnx":
        assert np.abs(run_onnx(tmp_path / "out", shown)[1] - expected).max() < 1e-4
        return
    picture = tmp_path / "picture.png"
    Image.fromarray(np.random.default_rng(3).integers(0, 256, (40, 40), dtype=np.uint8)).save(picture)
    snippet = re.search(r"```python\n(.*?)```", (tmp_path / "out" / "README.md").read_text(), re.DOTALL)
    assert snippet is not None
    done = subprocess.run(
        [sys.executable, "-c", snippet[1], str(picture)],
        cwd=tmp_path / "out", capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    said = {line.split(" ", 1)[1]: float(line.split(" ", 1)[0]) for line in done.stdout.splitlines()}
    ours = load_model(run).probabilities(decode(picture.read_bytes(), ImagePath(40, 40))[None])[0]
    assert [said[name] for name in NAMES] == pytest.approx(ours.tolist(), abs=2e-4)
