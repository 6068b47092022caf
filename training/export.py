"""`export`: a model for others, as an ONNX graph or in timm's hub format, checked against ours before it is published.

The image path is described beside it in `preprocessing.json`, and a README shows runnable lines.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from safetensors.torch import save_file
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from cluster import storage
from cluster.errors import RayographError, ResourceError, UsageError
from cluster.progress import say
from training.artifact import Model, ModelCard, card_sha256, forward, load_model, refuse_changed, versions
from training.calibration import FLOOR
from training.configs import ExportConfig
from training.encoder import OWN
from training.features import PLAIN
from training.images import AUTO_PERCENTILES, REDUCING_GAP
from training.probabilities import HALF
from training.tasks.chains import Hierarchy
from training.tasks.frozen import Frozen
from training.tasks.hierarchy import paths
from training.tasks.label_sets import LabelSets
from training.tasks.learners import SmallNetwork, classifier_of
from training.tasks.nearness import Nearness
from training.tasks.progressive import Progressive
from training.tasks.structures import Chain
from training.transform import TTA, VIEWS, Input, to_tensor

OPSET = 18
TOLERANCE = 1e-4
BATCHES = (1, 2, 3, 5, 7)
"""Batch sizes at which the exported model is compared with ours."""
ONNX_PACKAGES = ("onnx", "onnxruntime", "onnxscript")
ABSENT = -1e4
"""Logit of a class that was absent in training: its probability is 0 in any precision."""


def export(config: ExportConfig) -> dict[str, Any]:
    """`config.out` holds the model in the form `config.to`, equal to ours within 1e-4; returns its summary.

    Raises:
        UsageError: the model's classifier has no such form.
        ResourceError: packages of the extra `onnx` are missing.
        RayographError: the exported model's numbers differ from ours; nothing is published.
    """
    models = {config.model: card_sha256(config.model)}
    if config.to == "onnx":
        _require_onnx()
    with config.open_out("export") as out:
        if out.state == "done":
            refuse_changed(config.out, out.summary(), models)
            return out.summary()
        started = time.monotonic()
        model = load_model(config.model)
        _refuse_own(config, model)
        plan = _plan(config, model)
        partial = out.path / ".partial"
        storage.remove(partial)
        try:
            partial.mkdir()
            found = FORMS[config.to](plan, partial)
            _check_parity(config, found["max_abs_difference"])
            storage.write_json(partial / "preprocessing.json", preprocessing(plan))
            for file in sorted(partial.iterdir()):
                storage.publish_file(file, out.path / file.name)
        finally:
            storage.remove(partial)
        summary = {
            "to": config.to,
            **found,
            "tolerance": TOLERANCE,
            "classes": len(plan.classes),
            "source_sha256": model.sha256,
            "models": models,
            "seconds": time.monotonic() - started,
        }
        out.finish(summary)
        say(f"done: {config.to} in {config.out}, differs from ours by at most {found['max_abs_difference']:.1e}")
        return summary


# What is exported


@dataclass(frozen=True)
class Probe:
    """A linear classifier on standardised features: logits = weight @ ((features - mean) / scale) + bias."""

    mean: np.ndarray
    scale: np.ndarray
    weight: np.ndarray
    bias: np.ndarray

    def folded(self) -> tuple[np.ndarray, np.ndarray]:
        """(weight [K, D], bias [K]) of the same classifier on plain features."""
        weight = self.weight / self.scale
        return weight, self.bias - weight @ self.mean


@dataclass(frozen=True)
class Plan:
    """A model and the part of it that is exported: without classes only its features."""

    model: Model
    classes: tuple[str, ...]
    probe: Probe | None
    metric: Progressive | None = None
    """The embedding whose numbers are exported as features; None where they are the network's own."""
    chain: Chain | None = None
    """The modules of a class tree, where these classify."""

    def embed(self, pixels: np.ndarray) -> np.ndarray:
        """What our own model gives for the exported features [N, D]."""
        return replace(self.model, metric=self.metric).embed(pixels)

    @property
    def input(self) -> Input:
        return self.model.card.input


def _plan(config: ExportConfig, model: Model) -> Plan:
    card = model.card
    if not card.features.plain:
        return _plain_plan(config, model)
    if card.head == "metric":
        return _metric_plan(config, model)
    if config.encoder_only or card.head in {"none", "network"}:
        return Plan(model, () if config.encoder_only else card.classes, None)
    if model.hierarchy is not None:
        return _plan_of_hierarchy(config, model, model.hierarchy)
    probe = probe_of(model.estimator, len(card.classes))
    if probe is not None:
        return Plan(model, card.classes, probe)
    if config.to == "onnx":
        raise UsageError(
            f"{config.model}: a k-NN or SVM classifier has no ONNX form here; use --to timm or --encoder-only "
            "(features alone), or a model of `rayograph transfer --task linear` or `finetune`"
        )
    say("the classifier on top (k-NN or SVM) has no timm form: only the encoder is exported")
    return Plan(model, (), None)


def _plain_plan(config: ExportConfig, model: Model) -> Plan:
    """The encoder alone of a model whose classifier judges other features than those at its end."""
    if config.to == "onnx" and not config.encoder_only:
        raise UsageError(
            f"{config.model}: a classifier of chosen layers or radiomics has no ONNX form here; use --to timm or "
            "--encoder-only (the network's last features alone)"
        )
    if not config.encoder_only:
        say("the classifier on top (of chosen layers or radiomics) has no timm form: only the encoder is exported")
    return Plan(replace(model, card=replace(model.card, features=PLAIN)), (), None)


def _metric_plan(config: ExportConfig, model: Model) -> Plan:
    """Of an embedding; crops are found outside of the network's arithmetic, so with them there is no graph."""
    metric = model.metric
    assert isinstance(metric, Progressive)
    if config.to == "timm":
        say("the embedding on top has no timm form: only the encoder under it is exported")
        return Plan(model, (), None)
    if len(metric.embeddings) > 1:
        raise UsageError(
            f"{config.model}: an embedding of --steps {len(metric.embeddings)} crops images, which has no ONNX form "
            "here; use --to timm (the network alone), or a model of --steps 1"
        )
    return Plan(model, () if config.encoder_only else model.card.classes, None, metric)


def _refuse_own(config: ExportConfig, model: Model) -> None:
    name = model.card.architecture.name
    if config.to == "timm" and name in OWN:
        raise UsageError(
            f"{config.model}: its network, {name}, is Rayograph's own, which timm elsewhere does not know; "
            "use --to onnx"
        )
    if config.to == "timm" and model.card.input.tta != "none":
        raise UsageError(
            f"{config.model}: averages over {VIEWS[model.card.input.tta]} views of an image (--tta), for which a timm "
            "model has no place; use --to onnx"
        )


def _plan_of_hierarchy(config: ExportConfig, model: Model, hierarchy: Hierarchy) -> Plan:
    if config.to == "timm":
        say("the classifiers of a class tree have no timm form: only the encoder is exported")
        return Plan(model, (), None)
    if hierarchy.meta is not None or len(hierarchy.chains) > 1:
        raise UsageError(
            f"{config.model}: a meta-learner and several inputs have no ONNX form here; use --encoder-only (features "
            "alone), or a model of `rayograph transfer --task hierarchical` without --stack and --inputs"
        )
    return Plan(model, model.card.classes, None, chain=hierarchy.chains[0])


def probe_of(estimator: object, classes: int) -> Probe | None:
    """The linear classifier over all `classes` that a scikit-learn head is, or None if it is another kind.

    Two classes: scikit-learn keeps one row, whose sigmoid is the second class; here rows 0 and that one. A class that
    was absent in training gets the logit -10,000.
    """
    if isinstance(estimator, LabelSets):
        return _probe_of_labels(estimator, classes)
    if not (isinstance(estimator, Frozen) and isinstance(estimator.estimator, Pipeline)):
        return None
    steps = [step for _, step in estimator.estimator.steps]
    if [type(step) for step in steps] != [StandardScaler, LogisticRegression]:
        return None
    scaler, regression = steps
    rows, offsets = np.atleast_2d(regression.coef_), np.atleast_1d(regression.intercept_)
    if len(regression.classes_) == 2:
        rows, offsets = np.vstack([np.zeros_like(rows), rows]), np.concatenate([[0.0], offsets])
    weight, bias = np.zeros((classes, rows.shape[1])), np.full(classes, ABSENT)
    weight[regression.classes_], bias[regression.classes_] = rows, offsets
    return Probe(np.asarray(scaler.mean_), np.asarray(scaler.scale_), weight, bias)


def _probe_of_labels(sets: LabelSets, classes: int) -> Probe | None:
    """One row for each label's own linear classifier, all on features standardised alike; an absent label as above."""
    weight, bias, scaler = None, np.zeros(classes), None
    for at, estimator in enumerate(sets.estimators):
        if isinstance(estimator, float):
            bias[at] = ABSENT if estimator < HALF else -ABSENT
            continue
        steps = [step for _, step in estimator.steps] if isinstance(estimator, Pipeline) else []
        if [type(step) for step in steps] != [StandardScaler, LogisticRegression]:
            return None
        scaler, regression = steps
        weight = np.zeros((classes, regression.coef_.shape[1])) if weight is None else weight
        weight[at], bias[at] = regression.coef_[0], regression.intercept_[0]
    if weight is None or scaler is None:
        return None
    return Probe(np.asarray(scaler.mean_), np.asarray(scaler.scale_), weight, bias)


def preprocessing(plan: Plan) -> dict[str, Any]:
    """`preprocessing.json`: how a file becomes the network's input, as numbers and in words."""
    path, wanted = plan.model.card.image_path, plan.input
    return {
        "stored": path.as_dict() | {"resize": "Pillow BICUBIC", "reducing_gap": REDUCING_GAP, "bits": 8},
        "input": wanted.as_dict()
        | {
            "layout": "float32 [batch, channels, height, width], values in 0..1",
            "channel_order": "RGB" if wanted.channels == 3 else "grey (ITU-R 601 luma)",
            "resize": "bicubic, antialiased, clipped to 0..1; only where the stored size differs",
        },
        "classes": list(plan.classes),
        "activation": plan.model.card.activation,
        "temperature": plan.model.card.temperature,
        "steps": _steps(plan),
        "sha256": plan.model.sha256,
        "versions": versions(),
    }


def _steps(plan: Plan) -> list[str]:
    path, wanted = plan.model.card.image_path, plan.input
    low, high = AUTO_PERCENTILES
    fits = {
        "letterbox": "scaled to fit inside, centred, the rest black",
        "squash": "scaled to exactly that size, whatever its aspect",
        "crop": "scaled to cover it, the middle kept",
    }
    grey = f"grey values {path.window} become black and white"
    if path.window == "auto":
        grey = f"images of more than 8 bits: the {low} and {high} percentiles of the grey values become black and white"
    return [
        "turned upright by EXIF; alpha over black; colour profiles ignored",
        f"{grey}, linear between, rounded to 8 bits",
        f"stored at {path.height}x{path.width} (height x width): {fits[path.fit]}",
        f"{wanted.channels} channel(s): " + ("grey is repeated" if wanted.channels == 3 else "colour becomes its luma"),
        "divided by 255",
        f"resized to {wanted.height}x{wanted.width}",
        f"normalised: (value - {list(wanted.mean)}) / {list(wanted.std)} (the ONNX graph does this itself)",
        "large JPEG files are decoded at 1/2, 1/4 or 1/8 before that, which changes values slightly",
    ]


# ONNX


class Graph(nn.Module):
    """Pixel values [B, C, H, W] in 0..1 -> features [B, D], and calibrated probabilities [B, K] if it classifies."""

    mean: Tensor
    std: Tensor
    probe_mean: Tensor
    probe_scale: Tensor
    probe_weight: Tensor
    probe_bias: Tensor

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.network = plan.model.network
        self.metric = plan.metric
        self.nearness = plan.model.estimator if isinstance(plan.model.estimator, Nearness) else None
        self.probe = plan.probe is not None
        self.classifies = bool(plan.classes)
        self.card = plan.model.card
        self._keep("mean", np.reshape(plan.input.mean, (1, -1, 1, 1)))
        self._keep("std", np.reshape(plan.input.std, (1, -1, 1, 1)))
        self.chain = None if plan.chain is None else Questions(plan.chain, self.card.input.tta)
        if plan.probe is not None:
            for name in ("mean", "scale", "weight", "bias"):
                self._keep(f"probe_{name}", getattr(plan.probe, name))

    def _keep(self, name: str, values: np.ndarray) -> None:
        self.register_buffer(name, torch.tensor(values, dtype=torch.float32))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        shown = (images - self.mean) / self.std
        if self.metric is not None and self.nearness is not None:
            features = self.metric(shown)[-1]
            logits = self.nearness.logits(features)
        else:
            features, logits = forward(self.network, shown, self.card.input.tta)
        if not self.classifies:
            return (features,)
        if self.chain is not None:
            logits = self.chain(shown, features)
        if self.probe:
            standard = (features - self.probe_mean) / self.probe_scale
            logits = nn.functional.linear(standard, self.probe_weight, self.probe_bias)
        return features, _activated(logits, self.card)


class Questions(nn.Module):
    """Normalised images [B, C, H, W] and their features [B, D] -> log-probabilities [B, K] by the chain rule."""

    paths: Tensor

    def __init__(self, chain: Chain, tta: TTA) -> None:
        super().__init__()
        self.chain, self.tta = chain, tta
        self.asked = nn.ModuleList(chain.modules)
        self.register_buffer("paths", torch.tensor(paths(chain.tree), dtype=torch.float32))

    def forward(self, images: Tensor, features: Tensor) -> Tensor:
        said = []
        for number, module in enumerate(self.asked):
            if isinstance(module, SmallNetwork):
                said.append(module(features))
            else:
                seen = forward(module, images, self.tta)[1] if number else classifier_of(module)(features)
                said.append(seen)
        parts = []
        for node, head in zip(self.chain.tree.nodes, self.chain.heads, strict=True):
            if head.module < 0:
                constant = torch.tensor(head.guess, dtype=torch.float32).log()
                parts.append(constant.expand(features.shape[0], node.width))
            else:
                own = said[head.module][:, head.first : head.first + node.width]
                parts.append(torch.log_softmax(own / head.temperature, dim=1))
        return torch.cat(parts, dim=1) @ self.paths


def _activated(logits: Tensor, card: ModelCard) -> Tensor:
    """Calibrated probabilities [B, K] of logits [B, K]; they are floored as `training.calibration` floors them."""
    if card.activation == "sigmoid":
        return torch.sigmoid(logits.clamp(FLOOR, -FLOOR) / card.temperature)
    return torch.softmax(torch.log_softmax(logits, dim=1).clamp(min=FLOOR) / card.temperature, dim=1)


def _to_onnx(plan: Plan, folder: Path) -> dict[str, Any]:
    import onnx
    import onnxruntime

    outputs = ["features", "probabilities"] if plan.classes else ["features"]
    proto = _traced(plan, outputs)
    about = {"classes": "\n".join(plan.classes), "activation": plan.model.card.activation, "sha256": plan.model.sha256}
    for key, value in about.items():
        proto.metadata_props.add(key=key, value=value)
    file = folder / "model.onnx"
    onnx.save(proto, file)
    onnx.checker.check_model(str(file))
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    difference = _difference(plan, lambda images: session.run(None, {"images": images}))
    storage.write_text(folder / "README.md", _onnx_readme(plan))
    opset = next(entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx"))
    return {"opset": opset, "outputs": outputs, "max_abs_difference": difference, "bytes": file.stat().st_size}


def _traced(plan: Plan, outputs: list[str]) -> Any:
    shape = (2, plan.input.channels, plan.input.height, plan.input.width)  # a batch of 1 would be taken for a constant
    with _hushed():
        program = torch.onnx.export(
            Graph(plan).eval(),
            (torch.rand(shape, generator=torch.Generator().manual_seed(0)),),
            input_names=["images"],
            output_names=outputs,
            opset_version=OPSET,
            dynamic_shapes={"images": {0: torch.export.Dim("batch", min=1)}},
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    return program.model_proto


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    """The exporter's remarks on its own code stay off the terminal."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _require_onnx() -> None:
    missing = [name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ResourceError(f"--to onnx needs {', '.join(missing)}: pip install 'rayograph[onnx]'")


# timm


def _to_timm(plan: Plan, folder: Path) -> dict[str, Any]:
    network = _timm_network(plan)
    tensors = {k: v.detach().contiguous() for k, v in network.state_dict().items()}
    file = folder / "model.safetensors"
    save_file(tensors, file, metadata={"format": "pt"})
    storage.write_json(folder / "config.json", _timm_config(plan, network))
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    difference = _difference(plan, lambda images: _timm_answer(plan, loaded, images))
    storage.write_text(folder / "README.md", _timm_readme(plan))
    return {"max_abs_difference": difference, "bytes": file.stat().st_size}


def _timm_network(plan: Plan) -> nn.Module:
    """The network with the exported classifier inside, and with none where only features are exported."""
    network = plan.model.card.architecture.build(len(plan.classes))
    own = plan.model.network.state_dict()
    network.load_state_dict({k: v for k, v in own.items() if k in network.state_dict()}, strict=False)
    if plan.probe is not None:
        classifier: nn.Linear = network.get_classifier()  # type: ignore[operator]
        weight, bias = plan.probe.folded()
        with torch.no_grad():
            classifier.weight.copy_(torch.tensor(weight).view_as(classifier.weight))
            classifier.bias.copy_(torch.tensor(bias))
    return network.eval()


def _timm_config(plan: Plan, network: Any) -> dict[str, Any]:
    """timm's `config.json`, as `timm.models.save_for_hf` writes it; the stored size is cropped by none of it."""
    architecture, wanted = plan.model.card.architecture, plan.input
    name, _, _ = architecture.name.partition(".")
    known = network.pretrained_cfg or {}
    return {
        "architecture": name,
        "num_classes": len(plan.classes),
        "num_features": int(network.num_features),
        "label_names": list(plan.classes),
        "model_args": {k: list(v) if isinstance(v, tuple) else v for k, v in architecture.kwargs.items()},
        "pretrained_cfg": {
            "num_classes": len(plan.classes),
            "input_size": [wanted.channels, wanted.height, wanted.width],
            "fixed_input_size": architecture.patch is not None,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "mean": list(wanted.mean),
            "std": list(wanted.std),
            "classifier": known.get("classifier"),
            "custom_load": False,
        },
    }


def _timm_answer(plan: Plan, network: nn.Module, images: np.ndarray) -> list[np.ndarray]:
    with torch.inference_mode():
        features, logits = forward(network, plan.input.normalise(torch.from_numpy(images)))
        probabilities = _activated(logits, plan.model.card)
    return [features.numpy(), probabilities.numpy()]


# Parity


def _difference(plan: Plan, answer: Callable[[np.ndarray], list[np.ndarray]]) -> float:
    """The largest difference from our own features and probabilities, over random images at several batch sizes."""
    rng = np.random.default_rng(0)
    largest = 0.0
    for number, count in enumerate(BATCHES):
        pixels = _random_pixels(rng, count, plan.input, coarse=number % 2 == 0)
        images = np.ascontiguousarray(to_tensor(pixels, plan.input.channels).numpy())
        found = answer(images)
        features = plan.embed(pixels)
        expected = (features, plan.model.classify(features, pixels)) if plan.classes else (features,)
        for ours, theirs in zip(expected, found, strict=False):
            if ours.shape != theirs.shape or not np.isfinite(theirs).all():
                return float("inf")
            largest = max(largest, float(np.abs(ours - theirs).max()))
    return largest


def _random_pixels(rng: np.random.Generator, count: int, wanted: Input, *, coarse: bool) -> np.ndarray:
    """uint8 [count, H, W, C]: noise, or coarse blocks, which move a network farther."""
    if not coarse:
        return rng.integers(0, 256, (count, wanted.height, wanted.width, wanted.channels), dtype=np.uint8)
    blocks = rng.integers(0, 256, (count, 4, 4, wanted.channels), dtype=np.uint8)
    rows, columns = np.arange(wanted.height) * 4 // wanted.height, np.arange(wanted.width) * 4 // wanted.width
    return blocks[:, rows][:, :, columns]


def _check_parity(config: ExportConfig, difference: float) -> None:
    if not difference <= TOLERANCE:
        raise RayographError(
            f"{config.model}: the {config.to} model differs from ours by {difference:.1e}, more than {TOLERANCE:.0e}; "
            "nothing was written"
        )


FORMS: dict[str, Callable[[Plan, Path], dict[str, Any]]] = {"onnx": _to_onnx, "timm": _to_timm}


# Words

NOTICE = "Research use only; not a medical device. Do not base decisions about patients on it.\n"

READ_PICTURE = '''\
import json
import sys

import numpy as np
from PIL import Image, ImageOps

how = json.load(open("preprocessing.json"))
stored, wanted = how["stored"], how["input"]


def eight_bit(image):
    deep = image.mode.startswith("I") or image.mode == "F"
    if not deep:
        image = image.convert("L" if image.mode in ("1", "L") else "RGB")
    if stored["window"] == "auto" and not deep:
        return image
    values = np.asarray(image).astype(float)
    limits = np.percentile(values, PERCENTILES) if stored["window"] == "auto" else stored["window"].split(":")
    low, high = map(float, limits)
    return Image.fromarray(np.rint(np.clip((values - low) / (high - low) * 255, 0, 255)).astype(np.uint8))


def fitted(image):
    x, y = stored["width"] / image.width, stored["height"] / image.height
    if stored["fit"] != "squash":
        x = y = min(x, y) if stored["fit"] == "letterbox" else max(x, y)
    cut_x, cut_y = max(0, image.width - stored["width"] / x) / 2, max(0, image.height - stored["height"] / y) / 2
    box = (cut_x, cut_y, image.width - cut_x, image.height - cut_y) if stored["fit"] == "crop" else None
    size = [max(1, min(stored[n], round(s))) for n, s in (("width", image.width * x), ("height", image.height * y))]
    small = image.resize(size, Image.Resampling.BICUBIC, box, stored["reducing_gap"])
    whole = Image.new(image.mode, (stored["width"], stored["height"]))
    whole.paste(small, ((stored["width"] - size[0]) // 2, (stored["height"] - size[1]) // 2))
    return whole.convert("RGB" if wanted["channels"] == 3 else "L")


def pixels(file):
    """float32 [1, channels, height, width], values in 0..1."""
    image = fitted(eight_bit(ImageOps.exif_transpose(Image.open(file))))
    planes = [Image.fromarray(np.asarray(plane, np.float32) / 255) for plane in image.split()]
    size = (wanted["width"], wanted["height"])
    if image.size != size:
        planes = [plane.resize(size, Image.Resampling.BICUBIC) for plane in planes]
    return np.clip(np.stack([np.asarray(plane) for plane in planes])[None], 0, 1)
'''.replace("PERCENTILES", str(list(AUTO_PERCENTILES)))

ONNX_ANSWER = """

import onnxruntime

session = onnxruntime.InferenceSession("model.onnx")
answer = dict(zip([o.name for o in session.get_outputs()], session.run(None, {"images": pixels(sys.argv[1])})))
"""

TIMM_ANSWER = """

import timm
import torch

model = timm.create_model("local-dir:.", pretrained=True).eval()
mean, std = (torch.tensor(wanted[name]).view(1, -1, 1, 1) for name in ("mean", "std"))
with torch.inference_mode():
    tokens = model.forward_features((torch.from_numpy(pixels(sys.argv[1])) - mean) / std)
    features = model.forward_head(tokens, pre_logits=True)
"""

TIMM_CLASSES = """\
    logits = model.get_classifier()(features) / how["temperature"]
several = how["activation"] == "sigmoid"
answer = {"probabilities": (torch.sigmoid(logits) if several else torch.softmax(logits, dim=1)).numpy()}
"""

SHOW_CLASSES = """\
for name, probability in zip(how["classes"], answer["probabilities"][0]):
    print(f"{probability:.4f} {name}")
"""


def _readme(plan: Plan, title: str, packages: str, about: str, snippet: str) -> str:
    steps = "\n".join(f"{number}. {step}" for number, step in enumerate(_steps(plan), start=1))
    return (
        f"# {title}\n\n{NOTICE}\n{about}\n\nNeeds `pip install {packages}`. In this folder, as `python classify.py "
        f"PICTURE`:\n\n```python\n{snippet}```\n\n## From a file to the input\n\n{steps}\n\n"
        "The lines above drop an alpha channel, and decode JPEG files in full.\n"
    )


def _onnx_readme(plan: Plan) -> str:
    shown = SHOW_CLASSES if plan.classes else 'print(answer["features"][0])\n'
    about = (
        f"`model.onnx` (opset {OPSET}) takes `images`, float32 [batch, {plan.input.channels}, {plan.input.height}, "
        f"{plan.input.width}] of values in 0..1; it normalises them itself and gives `features`"
        + (
            " and calibrated `probabilities` in the order of `classes` in `preprocessing.json`"
            + (", of each class by itself." if plan.model.card.activation == "sigmoid" else ".")
            if plan.classes
            else "."
        )
    )
    return _readme(plan, "ONNX model", "numpy pillow onnxruntime", about, READ_PICTURE + ONNX_ANSWER + shown)


def _timm_readme(plan: Plan) -> str:
    about = '`timm.create_model("local-dir:FOLDER", pretrained=True)` loads it, in timm\'s own keys.'
    if plan.classes:
        about += " Its logits are calibrated by the temperature in `preprocessing.json`."
    shown = TIMM_CLASSES + SHOW_CLASSES if plan.classes else "print(features[0].numpy())\n"
    return _readme(plan, "timm model", "numpy pillow timm", about, READ_PICTURE + TIMM_ANSWER + shown)
