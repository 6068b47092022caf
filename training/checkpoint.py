"""Checkpoints: complete or invisible. Tensors as safetensors, the position as JSON, a sha256 for each file."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from cluster import storage
from cluster.errors import RayographError, UsageError

FORMAT = 1


class NewerFormatError(UsageError):
    """A checkpoint of a later Rayograph."""


@dataclass(frozen=True)
class Position:
    """Where training stands: the next sample to consume."""

    epoch: int = 0
    batch: int = 0
    step: int = 0
    samples: int = 0


@dataclass(frozen=True)
class State:
    position: Position
    tensors: dict[str, torch.Tensor]


def collect(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Everything of model and optimiser by parameter name, on the CPU."""
    tensors = {f"model.{k}": v.detach().cpu().contiguous() for k, v in module.state_dict().items()}
    names = {id(p): n for n, p in module.named_parameters()}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            tensors[f"optimizer.{key}.{names[id(parameter)]}"] = torch.as_tensor(value).detach().cpu().contiguous()
    return tensors


def restore(module: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    """The inverse of `collect`, into freshly built ones of the same shapes."""
    module.load_state_dict({k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")})
    parameters = dict(module.named_parameters())
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, key, parameter = name.split(".", 2)
            target = parameters[parameter]
            on = value if key == "step" else value.to(target.device)
            optimizer.state[target][key] = on.clone()


def save(folder: Path, state: State, keep: int) -> Path:
    """`folder/step-N` holds the state, whole; older ones beyond `keep` are gone."""
    target = folder / f"step-{state.position.step:09d}"
    partial = folder / f".{target.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file(state.tensors, partial / "state.safetensors")
    manifest = {
        "format": FORMAT,
        "position": vars(state.position),
        "sha256": {
            "state.safetensors": storage.sha256_file(partial / "state.safetensors"),
            "position": _digest(vars(state.position)),
        },
    }
    storage.write_json(partial / "checkpoint.json", manifest)
    storage.publish_folder(partial, target)
    for old in sorted(folder.glob("step-*"))[:-keep]:
        storage.remove(old)
    return target


def newest(folder: Path) -> tuple[State | None, list[str]]:
    """(the newest intact state, complaints about newer ones that are not)."""
    complaints: list[str] = []
    for path in sorted(folder.glob("step-*"), reverse=True):
        try:
            return _load(path), complaints
        except NewerFormatError:  # whole: falling back would lose work
            raise
        except (RayographError, OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            complaints.append(f"{path.name} is damaged ({error}); falling back to the one before")
    return None, complaints


def _load(path: Path) -> State:
    manifest: dict[str, Any] = storage.read_json(path / "checkpoint.json")
    if manifest["format"] > FORMAT:
        raise NewerFormatError(
            f"{path}: checkpoint format {manifest['format']} is newer than this Rayograph's; upgrade"
        )
    file = path / "state.safetensors"
    if storage.sha256_file(file) != manifest["sha256"][file.name]:
        raise ValueError("its sha256 differs from its manifest")
    position = manifest["position"]
    if manifest["sha256"].get("position", "") not in ("", _digest(position)):
        raise ValueError("its position was changed")
    return State(Position(**position), load_file(file))


def _digest(position: dict[str, int]) -> str:
    return hashlib.sha256(json.dumps(position, sort_keys=True).encode()).hexdigest()
