"""Checkpoints: complete or invisible, written while training goes on.

Tensors as safetensors, the position as JSON; the manifest names a sha256 of each and is published last, and carries one
of itself. A name holds the step and a token of its own, so that no writer ever replaces what another one wrote.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from cluster import storage
from cluster.errors import RayographError, UsageError

FORMAT = 2
MANIFEST, STATE = "checkpoint.json", "state.safetensors"


class NewerFormatError(UsageError):
    """A checkpoint of a later Rayograph."""


class DamagedError(RayographError):
    """What the manifest promises is not what is there."""


class UnfinishedError(DamagedError):
    """On its way to a store when its writer ended; the manifest would have come last."""


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
    order: str = ""
    """The data order that `position` is a place in, as of `Plan.digest`; empty in checkpoints that tell none."""


def collect(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """A copy of everything of model and optimiser by parameter name, on the CPU: training may go on at once."""
    tensors = {f"model.{k}": _copy(v) for k, v in module.state_dict().items()}
    names = {id(p): n for n, p in module.named_parameters()}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            tensors[f"optimizer.{key}.{names[id(parameter)]}"] = _copy(torch.as_tensor(value))
    return tensors


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    return (
        tensor.cpu().contiguous()
        if tensor.device.type != "cpu"
        else tensor.clone(memory_format=torch.contiguous_format)
    )


def restore(module: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    """The inverse of `collect`, into freshly built ones of the same shapes."""
    module.load_state_dict({k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")})
    parameters = dict(module.named_parameters())
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, key, parameter = name.split(".", 2)
            target = parameters[parameter]
            optimizer.state[target][key] = value.to(target.device).clone()  # fused AdamW has its `step` there too


def save(folder: Path | str, state: State, keep: int, complain: Callable[[str], None] = warnings.warn) -> str:
    """`folder` (a path or URI) holds the state as `step-N-TOKEN`, whole; older ones beyond `keep` are gone.

    complain: told where an older one could not be removed, which the next save tries again.

    Raises:
        RayographError: it could not be written; what was there before is untouched.
    """
    name = f"step-{state.position.step:09d}-{secrets.token_hex(4)}"
    beside = _beside(folder)
    partial = beside / f".{name}.partial"
    with storage.explained(partial):
        _sweep(beside)
        partial.mkdir(parents=True)
        try:
            _write(partial, state)
            storage.publish_folder(partial, storage.join(folder, name), manifest=MANIFEST)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    try:
        _prune(folder, keep)
    except RayographError as error:
        complain(f"warning: an old checkpoint could not be removed: {error}")
    return name


def _beside(folder: Path | str) -> Path:
    """Where this machine keeps what is on its way to or from `folder`, in a place of its own for each."""
    return storage.local_path(folder) if storage.is_local(folder) else storage.scratch(str(folder))


def _write(partial: Path, state: State) -> None:
    try:
        save_file(state.tensors, partial / STATE)
    except SafetensorError as error:
        raise OSError(_errno_of(error), f"cannot be written ({error})") from error
    content = {
        "format": FORMAT,
        "position": vars(state.position),
        "sha256": {STATE: storage.sha256_file(partial / STATE)},
    } | ({"order": state.order} if state.order else {})
    storage.write_json(partial / MANIFEST, content | {"digest": _digest(content)})


def _errno_of(error: SafetensorError) -> int:
    """safetensors tells the operating system's error only as text: `I/O error: … (os error 28)`."""
    code = str(error).rpartition("(os error ")[2].rstrip(") ")
    return int(code) if code.isdigit() else 5


def _sweep(folder: Path, kind: str = "step") -> None:
    """What a killed writer (`step`) or reader (`read`) left of a checkpoint is gone."""
    for partial in folder.glob(f".{kind}-*.partial"):
        shutil.rmtree(partial, ignore_errors=True)


def _prune(folder: Path | str, keep: int) -> None:
    for name in names(folder)[keep:]:
        storage.remove(storage.join(folder, name), MANIFEST)


def names(folder: Path | str) -> list[str]:
    """The checkpoints in `folder`, complete or not, newest first."""
    return sorted((n for n in storage.list_names(str(folder)) if n.startswith("step-")), reverse=True)


def step_of(name: str) -> int:
    """The step of the checkpoint called `name`."""
    return int(name.split("-")[1])


def newest(folder: Path | str) -> tuple[State | None, list[str]]:
    """(the newest intact state, complaints about newer ones that are not); None where none was ever finished.

    Raises:
        DamagedError: none is intact any more; all are left as they are.
        NewerFormatError: the newest is whole, and of a later Rayograph: falling back would lose work.
        RayographError: the storage cannot be read now; falling back would lose work here, too.
    """
    _, state, complaints = _newest(folder, repair=False)
    return state, complaints


def newest_name(folder: Path | str) -> tuple[str | None, list[str]]:
    """(the name of the newest intact one, complaints); damaged newer ones, which would count as kept, are removed.

    Raises:
        DamagedError, NewerFormatError, RayographError: as of `newest`.
    """
    _sweep(_beside(folder), "read")
    name, _, complaints = _newest(folder, repair=True)
    return name, complaints


def _newest(folder: Path | str, repair: bool) -> tuple[str | None, State | None, list[str]]:
    passed: dict[str, DamagedError] = {}
    found: tuple[str | None, State | None] = None, None
    for name in names(folder):
        try:
            found = name, load(folder, name)
            break
        except DamagedError as error:
            passed[name] = error
    if found[0] is None and not all(isinstance(error, UnfinishedError) for error in passed.values()):
        told = "; ".join(f"{name} ({error})" for name, error in passed.items())
        raise DamagedError(
            f"{storage.printable(str(folder))}: no checkpoint is intact, and all are left as they are: {told}; restore "
            "one, or begin anew with --overwrite"
        )
    for name in passed if repair else []:
        storage.remove(storage.join(folder, name), MANIFEST)
    return *found, [f"{name} is damaged ({error}); falling back to the one before" for name, error in passed.items()]


def load(folder: Path | str, name: str) -> State:
    """The state in checkpoint `name`, every byte as it was written.

    Raises:
        DamagedError: it is not complete, or was changed.
        NewerFormatError: it is whole, and of a later Rayograph.
    """
    where = storage.join(folder, name)
    if not storage.is_local(where) and not storage.exists(storage.join(where, MANIFEST)):
        raise UnfinishedError(f"its {MANIFEST} is not there")
    try:
        manifest = _manifest(storage.join(where, MANIFEST))
        if storage.is_local(where):
            return _loaded(manifest, storage.local_path(where) / STATE)
        with _fetching(_beside(folder)) as scratch:
            storage.fetch(storage.join(where, STATE), Path(scratch) / STATE)
            return _loaded(manifest, Path(scratch) / STATE)
    except NewerFormatError:
        raise
    except UsageError as error:  # a file that is not there
        raise DamagedError(str(error)) from error


def _fetching(beside: Path) -> tempfile.TemporaryDirectory[str]:
    """A folder of its own in `beside` to fetch to, gone after a `with` block."""
    with storage.explained(beside):
        beside.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryDirectory(prefix=".read-", suffix=".partial", dir=beside)


def _manifest(file: str) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = json.loads(storage.read_bytes(file))
        if manifest["format"] == 1 and "digest" not in manifest:
            intact = manifest["sha256"].pop("position") == _digest(manifest["position"])
        else:
            intact = manifest.pop("digest") == _digest(manifest)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(f"its manifest cannot be read: {type(error).__name__}") from error
    if not intact:
        raise DamagedError("its manifest was changed")
    if manifest["format"] > FORMAT:
        raise NewerFormatError(
            f"{file}: checkpoint format {manifest['format']} is newer than this Rayograph's; upgrade"
        )
    return manifest


def _loaded(manifest: dict[str, Any], file: Path) -> State:
    if storage.sha256_file(file) != manifest["sha256"][STATE]:
        raise DamagedError(f"the sha256 of {STATE} differs from its manifest")
    return State(Position(**manifest["position"]), load_file(file), manifest.get("order", ""))


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class Saver:
    """Writes one checkpoint at a time in a thread of its own, so that training goes on meanwhile.

    Args:
        order: as of `State.order`.
        before: called in that thread with the step, ahead of publishing: what must be durable before the checkpoint is.
        after: called in it with the step when the checkpoint is published.
        complain: told what did not go well, and does not matter yet.
    """

    def __init__(
        self,
        folder: Path | str,
        keep: int,
        *,
        order: str,
        before: Callable[[int], None],
        after: Callable[[int], None],
        complain: Callable[[str], None],
    ) -> None:
        self._folder, self._keep, self._order = folder, keep, order
        self._before, self._after, self._complain = before, after, complain
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    @property
    def failed(self) -> bool:
        return self._error is not None

    def save(self, position: Position, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """The state as it is now will be in `folder`; waits for the one before, if that is still being written."""
        self.wait()
        state = State(position, collect(module, optimizer), self._order)
        self._thread = threading.Thread(target=self._write, args=(state,), name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Returns when nothing is being written.

        Raises:
            RayographError: why the last checkpoint could not be written.
        """
        if self._thread is not None:
            self._thread.join()
        if self._error is not None:
            raise self._error

    def _write(self, state: State) -> None:
        try:
            if sys.platform == "linux":  # there it is the thread's own: behind those that train
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
            self._before(state.position.step)
            save(self._folder, state, self._keep, self._complain)
            self._after(state.position.step)
        except BaseException as error:  # handed to the trainer's thread, which raises it
            self._error = error
