"""What a model *is*: RUN/model/, its weights in timm's keys and model.json with the whole image path. No pickle."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from cluster import storage
from cluster.errors import UsageError
from training import lineage
from training.domain import REFERENCE, Domain, load_domain
from training.encoder import Architecture
from training.features import PLAIN, Features, deep, described
from training.images import ImagePath
from training.layers import pooled
from training.nearby import nearby
from training.probabilities import ACTIVATIONS, Activation, calibrated
from training.tasks.nearness import METRIC, load_metric
from training.tasks.progressive import Progressive
from training.transform import TTA, VIEWS_CODE, Input, evaluation_view, over_views

if TYPE_CHECKING:
    from training.tasks.chains import Hierarchy
    from training.tasks.inputs import Inputs

FORMAT = 3
"""The newest that is read, which models with `Input.tta` have."""
HEADED = 2
"""What is written for kinds of heads and of features that the first code did not know."""
OLDER = 1
"""What is written where the code that knows no other reads it rightly."""
WEIGHTS, HEAD, HIERARCHY = "model.safetensors", "head.skops", "hierarchy.safetensors"
HEADS = {"estimator": (HEAD,), "metric": (METRIC,), "hierarchy": (HIERARCHY,)}
"""Files beside the weights that a kind of head cannot do without."""


@dataclass(frozen=True)
class ModelCard:
    """model.json: everything but the weights."""

    architecture: Architecture
    image_path: ImagePath
    input: Input
    head: str = "none"
    """none (an encoder), network (its own classifier), estimator (scikit-learn's, on its features), metric (an
    embedding on the network, and where classes lie in it) or hierarchy (the modules of a class tree, see
    `training.tasks.chains`)."""
    classes: tuple[str, ...] = ()
    ordered: bool = False
    """Whether the classes stand in an order of theirs, lowest first."""
    activation: Activation = "softmax"
    """softmax: one class per image; sigmoid: each class by itself, an image may have several."""
    temperature: float = 1.0
    metrics: dict[str, Any] = field(default_factory=dict)
    lineage: dict[str, Any] = field(default_factory=dict)
    features: Features = PLAIN
    """What `embed` gives, and an estimator judges; of a metric model what its embedding starts from."""

    @property
    def inputs(self) -> tuple[str, ...]:
        """The kinds of images that it judges together, case by case; empty where it judges each image."""
        return tuple(self.lineage.get("inputs", {}).get("names", ()))

    @property
    def input_column(self) -> str | None:
        """The column of a DATASET that told them apart; None where `inputs` is empty."""
        column = self.lineage.get("inputs", {}).get("column")
        return None if column is None else str(column)

    def snippet(self, weights: str) -> str:
        """The lines that load the network without Rayograph, from a file of that name."""
        lines = self.architecture.snippet(weights, len(self.classes) if self.head == "network" else 0)
        return "\n".join([lines, VIEWS_CODE[self.input.tta]]).rstrip()

    @property
    def format(self) -> int:
        """The oldest that code must know to read this model rightly."""
        if self.input.tta != "none":
            return FORMAT
        return HEADED if self.head in {"hierarchy", "metric"} or not self.features.plain else OLDER

    def as_dict(self) -> dict[str, Any]:
        return {
            "format": self.format,
            "architecture": self.architecture.as_dict(),
            "image_path": self.image_path.as_dict(),
            "input": self.input.as_dict(),
            "head": self.head,
            "features": self.features.as_dict(),
            "classes": list(self.classes),
            "ordered": self.ordered,
            "activation": self.activation,
            "temperature": self.temperature,
            "metrics": self.metrics,
            "lineage": self.lineage,
            "versions": versions(),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelCard:
        return cls(
            architecture=Architecture(**values["architecture"]),
            image_path=ImagePath.from_dict(values["image_path"]),
            input=Input.from_dict(values["input"]),
            head=values["head"],
            features=Features.from_dict(values["features"]) if "features" in values else PLAIN,
            classes=tuple(values["classes"]),
            ordered=bool(values.get("ordered", False)),
            activation=_activation(values.get("activation", "softmax")),
            temperature=float(values["temperature"]),
            metrics=values["metrics"],
            lineage=values["lineage"],
        )


def _activation(name: str) -> Activation:
    if name not in ACTIVATIONS:
        raise ValueError(f"activation {name!r}")
    return name


class Estimator(Protocol):
    """A classifier on features; see `training.tasks.frozen` and `training.tasks.nearness`."""

    def probabilities(self, features: np.ndarray) -> np.ndarray: ...


@dataclass(frozen=True)
class Model:
    """A loaded artifact, in evaluation mode on `device`."""

    card: ModelCard
    network: nn.Module
    estimator: Estimator | None
    domain: Domain | None
    """What its training set looked like; None where the run had no labelled images to measure it on."""
    device: str
    sha256: str
    metric: Progressive | None = None
    """The embedding on the network, see `training.tasks.progressive`; None where features are the network's own."""
    hierarchy: Hierarchy | None = None

    def embed(self, pixels: np.ndarray, batch_size: int = 64) -> np.ndarray:
        """Features float32 [N, D] of stored pixels uint8 [N, H, W, 1|3]; those of a metric model have length 1."""
        card, stored = self.card, (self.card.image_path.height, self.card.image_path.width)
        if self.metric is not None:
            return features_of(self.metric, card.input, pixels, self.device, batch_size)
        return described(card.features, self.network, card.input, stored, pixels, self.device, batch_size)

    @torch.inference_mode()
    def classify(self, features: np.ndarray, pixels: np.ndarray | None = None) -> np.ndarray:
        """Calibrated class probabilities float64 [N, K] of features [N, D], as `embed` gives them; a row's sum to 1
        where an image has one class.

        Args:
            pixels: those that the features are of, where `needs_pixels`; not looked at elsewhere.

        Raises:
            UsageError: the model is an encoder without classes, or judges cases of several inputs, not images.
        """
        if self.card.head == "none":
            raise UsageError("this model is an encoder without classes; train one with: rayograph transfer --init RUN")
        several = self.card.activation == "sigmoid"
        if self.hierarchy is not None:
            if self.card.inputs:
                raise UsageError(
                    f"this model judges cases of {', '.join(self.card.inputs)} together, not single images"
                )
            raw = self.hierarchy.probabilities([self.answers(features, pixels)])
        elif self.estimator is not None:
            raw = self.estimator.probabilities(features)
        else:
            head: nn.Module = self.network.get_classifier()  # type: ignore[operator]
            logits = head(torch.from_numpy(features).to(self.device)).float().cpu()
            raw = (torch.sigmoid(logits.double()) if several else torch.softmax(logits.double(), dim=1)).numpy()
        return calibrated(raw, self.card.temperature, several=several)

    def probabilities(self, pixels: np.ndarray, batch_size: int = 64) -> np.ndarray:
        """Calibrated class probabilities float64 [N, K] of stored pixels uint8 [N, H, W, 1|3]; errors of `classify`."""
        return self.classify(self.embed(pixels, batch_size), pixels)

    def answers(
        self, features: np.ndarray, pixels: np.ndarray | None = None, of_input: np.ndarray | None = None
    ) -> np.ndarray:
        """What the hierarchy's nodes say of images, float64 [N, width], each by the chain of its input: `of_input` [N]
        numbers, of the first where None. Features and pixels as in `classify`."""
        hierarchy = self.hierarchy
        assert hierarchy is not None
        numbers = np.zeros(len(features), dtype=np.int64) if of_input is None else of_input
        found = np.empty((len(features), hierarchy.chains[0].tree.width))
        for number, chain in enumerate(hierarchy.chains):
            own = numbers == number
            if own.any():
                shown = None if pixels is None else pixels[own]
                found[own] = hierarchy.answers(chain, features[own], self._seeing(shown))
        return found

    def classify_cases(self, answers: np.ndarray, inputs: Inputs) -> np.ndarray:
        """Calibrated class probabilities float64 [N, K] of images by `answers` [N, width], each that of its case."""
        assert self.hierarchy is not None
        rows = np.arange(len(answers))
        means = [inputs.means(number, rows, answers[inputs.of_row == number]) for number in range(inputs.count)]
        place = np.searchsorted(inputs.cases(rows), inputs.case_of_row)
        return calibrated(self.hierarchy.probabilities(means)[place], self.card.temperature, several=False)

    def _seeing(self, pixels: np.ndarray | None) -> Callable[[nn.Module], np.ndarray] | None:
        if pixels is None:
            return None
        return lambda network: features_of(network, self.card.input, pixels, self.device)

    @property
    def needs_pixels(self) -> bool:
        """Whether a class takes more than features: networks of a hierarchy each look for themselves."""
        return self.hierarchy is not None and self.hierarchy.needs_pixels


def features_of(
    network: nn.Module, wanted: Input, pixels: np.ndarray, device: str | torch.device = "cpu", batch_size: int = 64
) -> np.ndarray:
    """Features float32 [N, D] of stored pixels uint8 [N, H, W, 1|3], under a timm network or a metric embedding on one,
    in evaluation mode."""
    if not isinstance(network, Progressive):
        return np.concatenate(list(deep(PLAIN, network, wanted, pixels, device, batch_size)))
    parts = []
    for at in range(0, len(pixels), batch_size):
        images = evaluation_view(pixels[at : at + batch_size], wanted, device)
        parts.append(network(images)[-1].float().cpu().numpy())
    return np.concatenate(parts)


def forward(network: nn.Module, images: torch.Tensor, tta: TTA = "none") -> tuple[torch.Tensor, torch.Tensor]:
    """(pooled features [B, D], logits [B, K] or the features again) of a timm network.

    Features are the mean over the views of `tta`; a linear classifier's logits of it are the mean of the views' logits.
    """
    features = over_views(lambda view: pooled(network, view), images, tta)
    return features, network.get_classifier()(features)  # type: ignore[operator]


def versions() -> dict[str, str]:
    """Versions of the code and of the packages that decide numbers."""
    names = ("rayograph", "torch", "timm", "numpy", "pillow", "scikit-learn", "scikit-image", "ray")
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def save_model(
    folder: Path,
    card: ModelCard,
    network: nn.Module,
    *,
    seen: Iterable[str] = (),
    labelled: Iterable[str] = (),
    groups: Iterable[str] = (),
    files: Sequence[tuple[str, bytes]] = (),
) -> None:
    """`folder` holds the artifact, whole.

    Args:
        seen: hashes of the images of its lineage, see `training.lineage`.
        labelled: those whose labels had a part in its network's weights.
        groups: hashes of the names of their groups.
        files: further named parts, such as the estimator.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    tensors = {k: v.detach().cpu().contiguous() for k, v in network.state_dict().items()}
    # what decides features beside the weights is in their file, whose sha256 vectors and kept features are known by
    decides = {"input": card.input.as_dict(), "image_path": card.image_path.as_dict()}
    decides |= {} if card.features.plain else {"features": card.features.as_dict()}
    about = {name: json.dumps(value, sort_keys=True) for name, value in decides.items()}
    save_file(tensors, partial / WEIGHTS, metadata={"format": "pt"} | about)
    _put_in_order(partial / WEIGHTS)
    for name, content in [(lineage.SEEN, lineage.dump(seen, labelled, groups)), *files]:
        storage.write_bytes(partial / name, content)
    hashes = {p.name: storage.sha256_file(p) for p in sorted(partial.iterdir())}
    storage.write_json(partial / "model.json", card.as_dict() | {"sha256": hashes})
    storage.publish_folder(partial, folder)


def _put_in_order(file: Path) -> None:
    """The metadata of a safetensors file stands by name; the library writes it in an order of chance."""
    with file.open("r+b") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        content = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        if len(content) > size:
            raise RuntimeError(f"{file}: a header of {size} bytes became one of {len(content)}")
        stream.seek(8)
        stream.write(content.ljust(size))


def model_folder(run: str | Path) -> Path:
    """RUN/model, or `run` itself where it is such a folder; of a remote one the copy on this machine.

    Raises:
        UsageError: it holds no model.
    """
    path = nearby(run)
    for folder in (path / "model", path):
        if (folder / "model.json").is_file():
            return folder
    if (path / "config.yaml").is_file():
        raise UsageError(f"{run}: this run has not finished, so it has no model yet; run its command again")
    raise UsageError(f"{run}: not a RUN (no model/model.json)")


def run_name(run: str | Path) -> str:
    """The RUN's own name, also where its model folder was given."""
    if not storage.is_local(run):
        name = storage.name_of(run)
        return name if name != "model" else storage.name_of(storage.sibling(run, ""))
    folder = model_folder(run).resolve()
    return folder.parent.name if folder.name == "model" else folder.name


def located_model(run: str | Path) -> str:
    """`run` as any process on any node finds it: a URI, or the absolute path of its model folder; errors as there."""
    return str(run) if not storage.is_local(run) else str(model_folder(run).resolve())


def read_card(run: str | Path) -> tuple[ModelCard, dict[str, str]]:
    """(model.json, the sha256 of the files beside it), after a check of its format version."""
    folder = model_folder(run)
    values = storage.read_json(folder / "model.json")
    if values.get("format", 0) > FORMAT:
        raise UsageError(f"{run}: model format {values['format']} is newer than this Rayograph's {FORMAT}; upgrade")
    try:
        card = ModelCard.from_dict(values)
        if not timm.is_model(card.architecture.name):  # a name such as hf-hub:… would reach for the network
            raise UsageError(f"{run}: model.json names {card.architecture.name!r}, which is no model of timm's")
        return card, dict(values["sha256"])
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{run}: model.json is damaged ({error})") from error


def card_sha256(run: str | Path) -> str:
    """The sha256 of model.json, which holds those of all files beside it: what a model says is known by it."""
    return storage.sha256_file(model_folder(run) / "model.json")


def refuse_changed(out: str, summary: Mapping[str, Any], now: Mapping[str, str]) -> None:
    """A finished result at `out` was made of models that are what they were.

    Args:
        summary: its summary, with `models` as `now` has it; without, it is of before that was noted.
        now: `card_sha256` by RUN.

    Raises:
        UsageError: one of them changed.
    """
    then = summary.get("models", {})
    changed = [run for run, digest in now.items() if then.get(run, digest) != digest]
    if changed:
        raise UsageError(f"--out {out}: was made of what {changed[0]} held before; use --overwrite or another --out")


def load_model(run: str | Path, device: str = "cpu") -> Model:
    """The model of a RUN, its files checked against their sha256.

    Raises:
        UsageError: it is not one, is newer than this code, or a file was changed.
    """
    folder = model_folder(run)
    card, hashes = read_card(run)
    read = {WEIGHTS, *HEADS.get(card.head, ())}
    for name in sorted(read | set(hashes)):
        if not (folder / name).is_file() or storage.sha256_file(folder / name) != hashes.get(name):
            raise UsageError(f"{folder / name}: missing or changed since the model was written (sha256 differs)")
    network = card.architecture.build(len(card.classes) if card.head == "network" else 0)
    network.load_state_dict(load_file(folder / WEIGHTS))
    estimator: Estimator | None = None
    if card.head == "estimator":
        from training.tasks.fusion import load_head

        several = card.activation == "sigmoid"
        estimator = load_head((folder / HEAD).read_bytes(), len(card.classes), several=several)
    metric = None
    if card.head == "metric":
        metric, estimator = _metric_of(card, network, (folder / METRIC).read_bytes())
    hierarchy = _hierarchy_in(folder, card, network) if card.head == "hierarchy" else None
    domain = load_domain((folder / REFERENCE).read_bytes()) if REFERENCE in hashes else None
    network.requires_grad_(False)
    if metric is not None:
        metric = metric.requires_grad_(False).eval().to(device)
    if hierarchy is not None:
        hierarchy.to(device)
    return Model(card, network.eval().to(device), estimator, domain, device, hashes[WEIGHTS], metric, hierarchy)


def _metric_of(card: ModelCard, network: nn.Module, content: bytes) -> tuple[Progressive, Estimator]:
    """The embedding on a network, and the classifier on it; errors as `load_metric`."""
    tensors, nearness, steps = load_metric(content, len(card.classes), several=card.activation == "sigmoid")
    blank = torch.zeros(1, card.input.channels, card.input.height, card.input.width)
    metric = Progressive(network, blank, nearness.means.shape[1], steps)
    try:
        metric.load_head(tensors)
    except RuntimeError as error:
        raise UsageError(f"{METRIC}: does not belong to {card.architecture.name} ({error})") from error
    return metric, nearness


def _hierarchy_in(folder: Path, card: ModelCard, network: nn.Module) -> Hierarchy:
    from training.tasks.chains import load_hierarchy

    return load_hierarchy((folder / HIERARCHY).read_bytes(), card.classes, network, card.architecture.build)
