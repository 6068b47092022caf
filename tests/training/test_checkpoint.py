"""Checkpoints: going on from one equals never having stopped, and a damaged one is noticed and passed over."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cluster.errors import UsageError
from training import checkpoint
from training.checkpoint import Position, State, collect, newest, restore, save


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


def steps(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


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
    assert steps(tmp_path) == [f"step-{step:09d}" for step in range(6 - keep, 6)]


def truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-3])


def emptied(file: Path) -> None:
    file.write_bytes(b"")


def flipped(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("damage", [truncated, emptied, flipped, Path.unlink])
@pytest.mark.parametrize("name", ["state.safetensors", "checkpoint.json"])
def test_a_damaged_newest_one_is_named_and_the_one_before_is_taken(damage: Any, name: str, tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, state(step), keep=3)
    damage(tmp_path / "step-000000003" / name)
    found, complaints = newest(tmp_path)
    assert found is not None and found.position.step == 2
    assert [text.startswith("step-000000003 is damaged (") for text in complaints] == [True]


def test_no_single_flipped_bit_of_the_manifest_moves_the_position(tmp_path: Path) -> None:
    save(tmp_path, state(1), keep=2)
    save(tmp_path, state(2), keep=2)
    file = tmp_path / "step-000000002" / "checkpoint.json"
    whole = file.read_bytes()
    for at in range(len(whole)):
        broken = bytearray(whole)
        broken[at] ^= 1  # the last bit makes a digit another digit
        file.write_bytes(broken)
        found, _ = newest(tmp_path)
        assert found is not None and found.position in (state(1).position, state(2).position), at


def test_when_all_are_damaged_each_is_named(tmp_path: Path) -> None:
    for step in (1, 2):
        truncated(save(tmp_path, state(step), keep=2) / "state.safetensors")
    found, complaints = newest(tmp_path)
    assert found is None
    assert [text.split()[0] for text in complaints] == ["step-000000002", "step-000000001"]


def test_what_an_interrupted_save_leaves_behind_is_ignored_and_written_over(tmp_path: Path) -> None:
    save(tmp_path, state(1), keep=2)
    partial = tmp_path / ".step-000000002.partial"
    partial.mkdir()
    (partial / "state.safetensors").write_bytes(b"half of a")
    found, complaints = newest(tmp_path)
    assert found is not None and (found.position.step, complaints) == (1, [])
    save(tmp_path, state(2), keep=2)
    assert steps(tmp_path) == ["step-000000001", "step-000000002"]
    found, _ = newest(tmp_path)
    assert found is not None and found.position.step == 2


def test_a_step_saved_again_replaces_its_damaged_checkpoint(tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path, state(step), keep=2)
    flipped(tmp_path / "step-000000002" / "state.safetensors")
    save(tmp_path, state(2), keep=2)
    found, complaints = newest(tmp_path)
    assert found is not None and (found.position.step, complaints) == (2, [])
    shutil.rmtree(tmp_path / "step-000000002")
    assert newest(tmp_path)[0] is not None


def test_a_checkpoint_of_a_newer_format_is_refused_and_not_passed_over(tmp_path: Path) -> None:
    path = save(tmp_path, State(Position(step=1), {"model.w": torch.zeros(1)}), keep=2)
    manifest = json.loads((path / "checkpoint.json").read_text())
    (path / "checkpoint.json").write_text(json.dumps(manifest | {"format": checkpoint.FORMAT + 1}))
    with pytest.raises(UsageError, match="newer"):
        newest(tmp_path)
