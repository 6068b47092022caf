"""What a model has seen: kept as hashes, found again, and inherited."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pyarrow as pa

from training.artifact import ModelCard, save_model
from training.dataset import Selection
from training.encoder import Architecture
from training.images import ImagePath
from training.lineage import SEEN, dump, own_images, seen_by
from training.transform import Input


def digests(*texts: str) -> list[str]:
    return [hashlib.sha256(text.encode()).hexdigest() for text in texts]


def selection(*texts: str) -> Selection:
    return Selection(pa.table({"sha256": pa.array(digests(*texts), pa.string())}))


def save_run(run: Path, seen: frozenset[str]) -> Path:
    card = ModelCard(
        Architecture("test_efficientnet", 16, 16, 3), ImagePath(16, 16), Input(16, 16, 3, (0.5,) * 3, (0.5,) * 3)
    )
    save_model(run / "model", card, card.architecture.build(), seen=seen)
    return run


def test_hashes_survive_the_model_s_file(tmp_path: Path) -> None:
    seen = own_images(selection("one", "two", "three"))
    run = save_run(tmp_path, seen)
    assert seen_by(str(run)) == seen_by(str(run / "model")) == seen
    assert own_images(selection("two")) <= seen_by(str(run))
    assert not own_images(selection("four")) & seen_by(str(run))


def test_the_weights_file_of_a_run_has_seen_what_the_run_has(tmp_path: Path) -> None:
    seen = own_images(selection("one", "two"))
    run = save_run(tmp_path, seen)
    assert seen_by(str(run / "model" / "model.safetensors")) == seen


def test_a_model_that_has_seen_nothing_says_so(tmp_path: Path) -> None:
    assert seen_by(str(save_run(tmp_path, frozenset()))) == frozenset()


def test_what_is_no_run_has_seen_nothing_of_ours(tmp_path: Path) -> None:
    for init in ("imagenet", "none", "timm:test_vit", str(tmp_path), str(tmp_path / "gone")):
        assert seen_by(init) == frozenset()


def test_the_file_does_not_depend_on_the_order(tmp_path: Path) -> None:
    names = sorted(own_images(selection(*map(str, range(50)))))
    assert dump(names) == dump(reversed(names)) == dump(iter(names))
    (tmp_path / SEEN).write_bytes(dump(names))
    assert seen_by(str(tmp_path)) == frozenset(names)


def test_two_datasets_add_up(tmp_path: Path) -> None:
    first = save_run(tmp_path / "first", own_images(selection("a", "b")))
    second = save_run(tmp_path / "second", own_images(selection("b", "c")) | seen_by(str(first)))
    assert seen_by(str(second)) == own_images(selection("a", "b", "c"))
