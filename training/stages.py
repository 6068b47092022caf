"""The stages of `transfer --stages FILE.yaml`: read, checked, and known by their content. Nothing is trained here.

A chain is a list: each stage starts from the weights of the one before it, so it cannot run in a circle.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, replace
from typing import Any

from cluster import storage
from cluster.errors import UsageError, nearest
from cluster.settings import configured, fields_of, read_mapping
from training import artifact
from training.configs import PretrainConfig, TransferConfig, parse_size
from training.encoder import PRESETS, Architecture, architecture_for, check_divides, check_model, is_vit
from training.methods import METHODS, NEED_VIT, check_method
from training.tasks.frozen import ESTIMATORS
from training.weights import IMAGENET_MODEL, IMAGENET_SHA256

FORMAT = 1
"""Part of every key: raised when a stage of the same config would give other weights."""
VERBS: dict[str, type[PretrainConfig] | type[TransferConfig]] = {"pretrain": PretrainConfig, "transfer": TransferConfig}
SCRATCH, START = "none", "start"
"""Points before the first stage: random weights, and the first weights that the chain names."""
_RESERVED = frozenset({SCRATCH, START, "imagenet"})
_OURS = ("out", "overwrite", "stages")
_NETWORK = ("model", "preset")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,39}")
_PREFIX = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")


@dataclass(frozen=True)
class Stage:
    """One training of a chain. Its config's `out` is a placeholder, and so is `init` but for the first stage."""

    name: str
    verb: str
    config: PretrainConfig | TransferConfig
    where: str
    """How errors about it begin."""

    @property
    def labelled(self) -> bool:
        """Whether it is trained with labels."""
        return self.verb == "transfer"


def read_chain(path: str) -> list[Stage]:
    """The stages of a YAML file, in order; relative paths in it count from the folder that holds it.

    Raises:
        UsageError: no such file, not YAML, or a stage that cannot be right, in one line that names it.
    """
    values = read_mapping(path)
    unknown = next((key for key in values if key != "stages"), None)
    if unknown is not None:
        raise UsageError(f"{path}: unknown key {storage.printable(unknown)!r}; a chain has one key, stages")
    listed = values.get("stages")
    if not isinstance(listed, list) or not listed:
        raise UsageError(f"{path}: stages must be a list of one stage or more, each with name, verb and data")
    stages: list[Stage] = []
    for entry in listed:
        stages.append(_stage(path, entry, stages))
    return stages


def _stage(path: str, entry: object, before: list[Stage]) -> Stage:
    where = f"{path}: stage {len(before) + 1}"
    if not isinstance(entry, dict) or not all(isinstance(key, str) for key in entry):
        raise UsageError(f"{where}: must be a mapping with name, verb and data")
    name, verb = _word(entry, "name"), _word(entry, "verb")
    if not _NAME.fullmatch(name) or name in _RESERVED:
        rule = f"letters, digits, - and _, at most 40, and none of {', '.join(sorted(_RESERVED))}"
        raise UsageError(f"{where}: name {storage.printable(name)!r}: needs {rule}")
    where = f"{path}: stage {name!r}"
    if name in {stage.name for stage in before}:
        raise UsageError(f"{where}: two stages have this name; give each its own")
    if verb not in VERBS:
        said = f"verb {storage.printable(verb)!r}: must be {' or '.join(VERBS)}.{nearest(verb, VERBS)}"
        raise UsageError(f"{where}: {said}")
    settings = {key: value for key, value in entry.items() if key not in {"name", "verb"}}
    settings = fields_of(where, settings, VERBS[verb], verb=verb)
    _refuse_given(where, settings, before)
    settings["data"] = _beside(path, str(settings["data"]))
    if "init" in settings:
        settings["init"] = _beside(path, str(settings["init"]))
    if "teacher" in settings:
        settings["teacher"] = _beside(path, str(settings["teacher"]))
    stage = Stage(name, verb, configured(VERBS[verb], settings | {"out": "-"}, where), where)
    _refuse_useless(stage)
    return stage


def _word(entry: dict[str, Any], key: str) -> str:
    value = entry.get(key, "")
    return value if isinstance(value, str) else str(value)


def _refuse_given(where: str, settings: dict[str, Any], before: list[Stage]) -> None:
    """What a stage may not say, and what it must."""
    ours = next((key for key in _OURS if key in settings), None)
    if ours is not None:
        raise UsageError(f"{where}: {ours} is not a stage's to set: where its result is kept follows from its content")
    if "data" not in settings:
        raise UsageError(f"{where}: has no data; name a DATASET or a SOURCE")
    if not before:
        return
    if "init" in settings:
        raise UsageError(f"{where}: init is the stage before it, {before[-1].name!r}; leave it out")
    network = next((key for key in _NETWORK if key in settings), None)
    if network is not None:
        raise UsageError(f"{where}: {network} is decided by the first stage, {before[0].name!r}; leave it out")


def _refuse_useless(stage: Stage) -> None:
    config = stage.config
    if isinstance(config, PretrainConfig):
        try:
            check_method(config)
        except UsageError as error:
            raise UsageError(f"{stage.where}: {error}") from error
    if isinstance(config, TransferConfig) and (config.task in ESTIMATORS or config.learner == "features"):
        raise UsageError(
            f"{stage.where}: task {config.task} leaves the network as it was, so the stage would hand nothing on; "
            "use task finetune"
        )


def _beside(path: str, given: str) -> str:
    """A path as it is found from the folder of the file `path`; URIs, and names that are no paths, stay."""
    if given in {"none", "imagenet"} or _PREFIX.match(given) or given.startswith("/"):
        return given
    return storage.sibling(path, given)


# The networks of a chain


def architectures(stages: list[Stage], channels: list[int], device: str | None) -> list[Architecture | None]:
    """The network that each stage leaves; None where it is only known once weights were fetched.

    Args:
        channels: of each stage's data.
        device: where training will run; None where that is not known yet.

    Raises:
        UsageError: a stage cannot train the network that it would be given.
    """
    found: list[Architecture | None] = []
    for at, (stage, own) in enumerate(zip(stages, channels, strict=True)):
        try:
            before = _first(stage.config, own, device) if at == 0 else found[-1]
            found.append(_resized(before, stage.config.image_size, own))
        except UsageError as error:
            raise UsageError(f"{stage.where}: {error}") from error
        _require_fit(stage, before, stages[at - 1].name if at else "")
    return found


def _first(config: PretrainConfig | TransferConfig, channels: int, device: str | None) -> Architecture | None:
    """The network of the first weights, as `training.weights` will build it."""
    init = config.init
    if init == "imagenet":
        size = 224 if device not in {"cpu", None} else 128
        return Architecture(IMAGENET_MODEL, size, size, 3)
    if init.startswith("hf-hub:"):
        return None
    if init.startswith("timm:"):
        name = init.removeprefix("timm:")
        check_model(name)
        # a ViT's own size is not known without its weights
        return None if is_vit(name) else Architecture(name, 224, 224, channels)
    if init == "none" or init.endswith(".safetensors"):
        if device is None and config.preset == "auto" and config.model is None:
            return None
        chosen = {"preset": config.preset, "model": config.model, "image_size": config.image_size}
        return architecture_for(**chosen, channels=channels, device=device or "cpu")  # type: ignore[arg-type]
    return artifact.read_card(init)[0].architecture


def _resized(before: Architecture | None, image_size: str, channels: int) -> Architecture | None:
    if before is None:
        return None
    height, width = (before.height, before.width) if image_size == "auto" else parse_size(image_size)
    if before.patch is not None:
        check_divides(height, width, before.patch)
    return replace(before, height=height, width=width, channels=max(before.channels, channels))


def _require_fit(stage: Stage, network: Architecture | None, before: str) -> None:
    config = stage.config
    if isinstance(config, TransferConfig) or network is None or network.patch is not None:
        return
    if config.method in NEED_VIT:
        giver = f"stage {before!r}" if before else f"--init {config.init}"
        raise UsageError(
            f"{stage.where}: --method {config.method} needs a ViT, but {giver} gives {network.name}, a convolutional "
            "network"
        )


def scratch_flags(network: Architecture) -> dict[str, Any] | None:
    """`preset` and `model` that give this network random weights at its size; None where none do."""
    flags: list[dict[str, Any]] = [{"preset": preset, "model": None} for preset in PRESETS]
    for chosen in [*flags, {"preset": "auto", "model": network.name}]:
        try:
            size = f"{network.height}x{network.width}"
            found = architecture_for(**chosen, image_size=size, channels=network.channels)
        except UsageError:  # another patch
            continue
        if (found.name, found.patch) == (network.name, network.patch):
            return chosen
    return None


# What a stage is known by


def key_of(
    verb: str, config: PretrainConfig | TransferConfig, dataset: str, before: str, network: Architecture | None = None
) -> str:
    """The name of a result: the same for the same verb, settings, images and first weights, wherever they lie.

    Args:
        dataset: version of the DATASET.
        before: key of the stage before, or `origin_key`.
        network: what `--preset auto` and sizes come to on this machine.
    """
    settings = {k: v for k, v in config.identity().items() if k not in {"data", "init", "stages"}}
    if settings.get("searched_on", "") is None:  # says nothing of the weights, and keys of before it was known stand
        del settings["searched_on"]
    teacher = teacher_of(config)
    if teacher is not None:
        settings["teacher"] = origin_key(teacher)
    content = [FORMAT, artifact.FORMAT, verb, settings, dataset, before, network.as_dict() if network else None]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def teacher_of(config: PretrainConfig | TransferConfig) -> str | None:
    """The weights that a stage learns from beside its images, where its method has a teacher."""
    if isinstance(config, TransferConfig) or not METHODS[config.method].NEEDS_TEACHER:
        return None
    return config.teacher


def origin_key(init: str) -> str:
    """The first weights of a chain, by content where they lie on this machine or a store.

    Raises:
        UsageError: they are neither named weights nor there.
    """
    if init == "imagenet":
        return f"imagenet {IMAGENET_SHA256}"
    if init == SCRATCH or init.startswith(("timm:", "hf-hub:")):
        return init
    if init.endswith(".safetensors"):
        return hashlib.sha256(storage.read_bytes(init)).hexdigest()
    return artifact.read_card(init)[1][artifact.WEIGHTS]
