"""Checkpoints: going on from one equals never having stopped, and a damaged one is noticed and passed over."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from cluster import storage
from cluster.errors import RayographError, UsageError
from tests.s3 import Store
from training import checkpoint
from training.checkpoint import DamagedError, Position, Saver, State, collect, newest, restore, save


def build() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2))
    module[0].bias.requires_grad_(False)
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = [{"params": trained[:2], "weight_decay": 0.1}, {"params": trained[2:], "weight_decay": 0.0}]
    return module, torch.optim.AdamW(groups, lr=0.05, betas=(0.9, 0.95), amsgrad=True)


def train(module: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> list[float]:
    losses = []
    for step in range(first, last):
        images = torch.randn(6, 1, 4, 4, generator=torch.Generator().manual_seed(step))
        loss = (module(images) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def state(step: int) -> State:
    return State(Position(1, 2, step, step * 6), {"model.a": torch.full((3,), float(step))})


def steps(folder: Path) -> list[int]:
    """The steps of what lies in the folder, which is nothing but checkpoints."""
    return sorted(checkpoint.step_of(path.name) for path in folder.iterdir())


def at_step(folder: Path, step: int) -> Path:
    (found,) = folder.glob(f"step-{step:09d}-*")
    return found


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)


def test_training_that_goes_on_from_a_checkpoint_equals_training_that_was_never_interrupted(tmp_path: Path) -> None:
    module, optimizer = build()
    uninterrupted = train(module, optimizer, 0, 4)
    expected = collect(module, optimizer)

    module, optimizer = build()
    train(module, optimizer, 0, 2)
    save(tmp_path, State(Position(0, 2, 2, 12), collect(module, optimizer)), keep=1)
    module, optimizer = build()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    found, complaints = newest(tmp_path)
    assert found is not None and (found.position, complaints) == (Position(0, 2, 2, 12), [])
    restore(module, optimizer, found.tensors)
    assert train(module, optimizer, 2, 4) == uninterrupted[2:]
    assert equal(collect(module, optimizer), expected)


def test_all_of_a_fused_optimiser_s_state_comes_to_where_its_parameters_are() -> None:
    module, optimizer = build()
    train(module, optimizer, 0, 1)
    tensors = collect(module, optimizer)
    other, other_optimizer = build()
    other.to("meta")
    other_optimizer.param_groups.clear()
    other_optimizer.add_param_group({"params": [p for p in other.parameters() if p.requires_grad]})
    restore(other, other_optimizer, tensors)
    found = [(key, tensor.device.type) for own in other_optimizer.state.values() for key, tensor in own.items()]
    assert ("step", "meta") in found and {device for _, device in found} == {"meta"}


def test_everything_of_model_and_optimiser_is_collected_and_no_live_tensor_is_shared() -> None:
    module, optimizer = build()
    train(module, optimizer, 0, 1)
    tensors = collect(module, optimizer)
    assert {n for n in tensors if n.startswith("model.")} == {f"model.{n}" for n in module.state_dict()}
    trained = [n for n, p in module.named_parameters() if p.requires_grad]
    kinds = ("step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    assert {n for n in tensors if n.startswith("optimizer.")} == {f"optimizer.{k}.{n}" for k in kinds for n in trained}
    other, other_optimizer = build()
    restore(other, other_optimizer, tensors)
    kept = {name: tensor.clone() for name, tensor in tensors.items()}
    train(other, other_optimizer, 1, 2)
    assert equal(tensors, kept)


def test_a_checkpoint_of_another_shape_is_not_squeezed_in() -> None:
    module, optimizer = build()
    tensors = collect(module, optimizer)
    with pytest.raises(RuntimeError, match="size mismatch"):
        restore(module, optimizer, tensors | {"model.3.weight": torch.zeros(2, 17)})


def test_the_newest_is_the_one_with_the_most_steps(tmp_path: Path) -> None:
    for step in (9, 10, 1_000_000_00):
        save(tmp_path, state(step), keep=9)
    found, complaints = newest(tmp_path)
    assert found is not None and found.position == Position(1, 2, 100_000_000, 600_000_000)
    assert torch.equal(found.tensors["model.a"], torch.full((3,), 1e8)) and complaints == []


def test_a_folder_without_checkpoints_has_no_newest_one(tmp_path: Path) -> None:
    assert newest(tmp_path) == (None, [])
    assert newest(tmp_path / "not there") == (None, [])


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_only_as_many_as_asked_for_are_kept(keep: int, tmp_path: Path) -> None:
    for step in range(1, 6):
        save(tmp_path, state(step), keep)
    assert steps(tmp_path) == list(range(6 - keep, 6))


def truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-3])


def emptied(file: Path) -> None:
    file.write_bytes(b"")


def flipped(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def cut(share: float) -> Callable[[Path], None]:
    def damage(file: Path) -> None:
        os.truncate(file, int(file.stat().st_size * share))

    return damage


@pytest.mark.parametrize("damage", [truncated, cut(0), cut(0.5), cut(0.99), flipped, Path.unlink])
@pytest.mark.parametrize("name", ["state.safetensors", "checkpoint.json"])
def test_a_damaged_newest_one_is_named_and_the_one_before_is_taken(damage: Any, name: str, tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, state(step), keep=3)
    damage(at_step(tmp_path, 3) / name)
    found, complaints = newest(tmp_path)
    assert found is not None and found.position.step == 2
    assert [text.startswith("step-000000003-") and " is damaged (" in text for text in complaints] == [True]
    assert steps(tmp_path) == [1, 2, 3], "to look is not to throw away"
    assert checkpoint.newest_name(tmp_path) == (at_step(tmp_path, 2).name, complaints)
    assert steps(tmp_path) == [1, 2], "else the damaged one would count among those kept"


def test_no_single_flipped_bit_of_the_manifest_moves_the_position(tmp_path: Path) -> None:
    save(tmp_path, state(1), keep=2)
    save(tmp_path, state(2), keep=2)
    file = at_step(tmp_path, 2) / "checkpoint.json"
    whole = file.read_bytes()
    for at in range(len(whole)):
        broken = bytearray(whole)
        broken[at] ^= 1  # the last bit makes a digit another digit
        file.write_bytes(broken)
        found, _ = newest(tmp_path)
        assert found is not None and found.position in (state(1).position, state(2).position), at


@pytest.mark.parametrize("look", [newest, checkpoint.newest_name])
def test_when_all_are_damaged_each_is_named_and_none_is_thrown_away(look: Any, tmp_path: Path) -> None:
    for step in (1, 2):
        truncated(tmp_path / save(tmp_path, state(step), keep=2) / "state.safetensors")
    with pytest.raises(DamagedError, match=r"no checkpoint is intact.*step-000000002-.*step-000000001-.*--overwrite"):
        look(tmp_path)
    assert steps(tmp_path) == [1, 2]


def test_of_a_store_a_first_checkpoint_that_was_never_finished_is_none_and_goes(s3: Store) -> None:
    folder = f"{s3.bucket}/run/checkpoints"
    name = save(folder, state(1), keep=2)
    storage.remove(f"{folder}/{name}/checkpoint.json")
    assert newest(folder)[0] is None and checkpoint.names(folder) == [name]
    found, complaints = checkpoint.newest_name(folder)
    assert found is None and [name in text for text in complaints] == [True]
    assert checkpoint.names(folder) == []


def test_what_a_killed_upload_left_on_this_machine_goes_with_the_next_one(s3: Store) -> None:
    folder = f"{s3.bucket}/run/checkpoints"
    beside = storage.scratch(folder)
    for left in (".step-000000001-0a1b2c3d.partial", ".read-x.partial"):
        (beside / left).mkdir(parents=True)
    save(folder, state(2), keep=2)
    assert [path.name for path in beside.iterdir()] == [".read-x.partial"], "a probe may be reading"
    checkpoint.newest_name(folder)
    assert list(beside.iterdir()) == []


def test_an_older_checkpoint_that_cannot_be_removed_does_not_cost_the_new_one(s3: Store) -> None:
    folder = f"{s3.bucket}/run/checkpoints"
    save(folder, state(1), keep=1)
    told: list[str] = []
    with s3.refusing(lambda method, path: 403 if method in {"DELETE", "POST"} else 0):
        save(folder, state(2), keep=1, complain=told.append)
    assert len(told) == 1 and "an old checkpoint could not be removed" in told[0]
    assert [checkpoint.step_of(name) for name in checkpoint.names(folder)] == [2, 1]
    save(folder, state(3), keep=1, complain=told.append)
    assert [checkpoint.step_of(name) for name in checkpoint.names(folder)] == [3] and len(told) == 1


def test_a_checkpoint_knows_the_order_that_its_position_is_a_place_in(tmp_path: Path) -> None:
    save(tmp_path, replace(state(1), order="an order"), keep=2)
    found, _ = newest(tmp_path)
    assert found is not None and found.order == "an order"
    save(tmp_path, state(2), keep=2)
    found, _ = newest(tmp_path)
    assert found is not None and found.order == ""


def test_what_an_interrupted_save_leaves_behind_is_ignored_and_written_over(tmp_path: Path) -> None:
    save(tmp_path, state(1), keep=2)
    partial = tmp_path / ".step-000000002-0a1b2c3d.partial"
    partial.mkdir()
    (partial / "state.safetensors").write_bytes(b"half of a")
    found, complaints = newest(tmp_path)
    assert found is not None and (found.position.step, complaints) == (1, [])
    save(tmp_path, state(2), keep=2)
    assert steps(tmp_path) == [1, 2]
    found, _ = newest(tmp_path)
    assert found is not None and found.position.step == 2


def test_a_step_saved_again_takes_the_place_of_its_damaged_checkpoint(tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path, state(step), keep=2)
    flipped(at_step(tmp_path, 2) / "state.safetensors")
    checkpoint.newest_name(tmp_path)
    save(tmp_path, state(2), keep=2)
    found, complaints = newest(tmp_path)
    assert found is not None and (found.position.step, complaints) == (2, [])
    shutil.rmtree(at_step(tmp_path, 2))
    assert newest(tmp_path)[0] is not None


def sealed(content: dict[str, Any]) -> str:
    """A manifest as a writer of that format would have left it."""
    return json.dumps(content | {"digest": checkpoint._digest(content)})


def test_a_checkpoint_of_a_newer_format_is_refused_and_not_passed_over(tmp_path: Path) -> None:
    file = tmp_path / save(tmp_path, State(Position(step=1), {"model.w": torch.zeros(1)}), keep=2) / "checkpoint.json"
    content = {k: v for k, v in json.loads(file.read_text()).items() if k != "digest"}
    file.write_text(sealed(content | {"format": checkpoint.FORMAT + 1}))
    with pytest.raises(UsageError, match="newer"):
        newest(tmp_path)


def test_the_format_before_is_read(tmp_path: Path) -> None:
    file = tmp_path / save(tmp_path, state(1), keep=2) / "checkpoint.json"
    content = json.loads(file.read_text())
    digests = {**content["sha256"], "position": checkpoint._digest(content["position"])}
    file.write_text(json.dumps({"format": 1, "position": content["position"], "sha256": digests}))
    found, complaints = newest(tmp_path)
    assert found is not None and (found.position.step, complaints) == (1, [])
    file.write_text(json.dumps({"format": 1, "position": content["position"] | {"step": 7}, "sha256": digests}))
    with pytest.raises(DamagedError, match="its manifest was changed"):
        newest(tmp_path)


# Written while training goes on


def saver_of(folder: Path, keep: int = 2, **more: Any) -> Saver:
    def nothing(_: Any) -> None:
        return

    settings: dict[str, Any] = {"order": "an order", "before": nothing, "after": nothing, "complain": nothing}
    return Saver(folder, keep, **settings | more)


def _wait(gate: threading.Event) -> None:
    assert gate.wait(10)


def test_what_is_saved_is_the_state_at_the_call_whatever_training_does_meanwhile(tmp_path: Path) -> None:
    module, optimizer = build()
    train(module, optimizer, 0, 2)
    expected = collect(module, optimizer)
    gate = threading.Event()
    saver = saver_of(tmp_path, before=lambda step: _wait(gate))
    saver.save(Position(0, 2, 2, 12), module, optimizer)
    assert saver.busy
    train(module, optimizer, 2, 4)
    assert not list(tmp_path.glob("step-*")), "nothing is visible before it is whole"
    gate.set()
    saver.wait()
    found, _ = newest(tmp_path)
    assert found is not None and equal(found.tensors, expected)


def test_rows_are_durable_before_the_checkpoint_that_relies_on_them(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    module, optimizer = build()

    def look(step: int) -> None:
        seen.append((step, len(list(tmp_path.glob("step-*")))))

    saver = saver_of(tmp_path, before=look, after=look)
    for step in (1, 2):
        saver.save(Position(step=step), module, optimizer)
    saver.wait()
    assert seen == [(1, 0), (1, 1), (2, 1), (2, 2)]
    assert {newest(tmp_path)[0].order} == {"an order"}  # type: ignore[union-attr]


def test_a_checkpoint_that_cannot_be_written_is_told_and_leaves_the_one_before(tmp_path: Path) -> None:
    module, optimizer = build()
    saver = saver_of(tmp_path, keep=1)
    saver.save(Position(step=1), module, optimizer)
    saver.wait()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limit[1]))
    try:
        saver.save(Position(step=2), module, optimizer)
        with pytest.raises(RayographError, match=str(tmp_path)):
            saver.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, ignored)
    assert saver.failed
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_host_without_room_to_fetch_a_checkpoint_to_says_so_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "home").touch()
    with pytest.raises(RayographError, match="home"):
        checkpoint._fetching(tmp_path / "home" / "scratch")


def test_a_full_disk_says_so(tmp_path: Path) -> None:
    error = SafetensorError("I/O error: No space left on device (os error 28)")
    with pytest.raises(RayographError, match="the disk is full"), storage.explained(tmp_path):
        raise OSError(checkpoint._errno_of(error), "x")
