"""Models on an object store: found, fetched once, and never half."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster import storage
from cluster.errors import UsageError
from tests.s3 import Store
from training.artifact import ModelCard, load_model, located_model, run_name, save_model
from training.encoder import Architecture, seed_weights
from training.images import ImagePath
from training.lineage import seen_by
from training.nearby import nearby
from training.transform import Input
from training.weights import Wanted, initial_weights, located

CONV = Architecture("test_efficientnet", 32, 32, 1)
SEEN = ["ab" * 16]


@pytest.fixture
def run(s3: Store, tmp_path: Path) -> str:
    """A RUN of an encoder in the store."""
    network = CONV.build(0)
    seed_weights(network, 0)
    card = ModelCard(CONV, ImagePath(40, 40, "crop"), Input(32, 32, 1, (0.4,), (0.2,)))
    save_model(tmp_path / "my-run" / "model", card, network, seen=SEEN)
    (tmp_path / "my-run" / "config.yaml").write_text("verb: pretrain\n")
    storage.upload(tmp_path / "my-run", f"{s3.bucket}/my-run")
    return f"{s3.bucket}/my-run"


def test_a_remote_run_and_its_model_folder_are_the_local_model(run: str, tmp_path: Path) -> None:
    local = load_model(tmp_path / "my-run")
    for given in (run, f"{run}/model", f"{run}/"):
        assert load_model(given).sha256 == local.sha256
        assert run_name(given) == "my-run"
        assert seen_by(given) == frozenset(SEEN)
        assert located_model(given) == given, "other nodes fetch it themselves"


def test_a_remote_model_is_fetched_once(run: str, s3: Store) -> None:
    load_model(run)
    s3.seen.clear()
    load_model(run)
    assert not [path for method, path, _ in s3.seen if path.endswith(".safetensors")]


def test_another_model_in_the_same_place_is_fetched_anew(run: str, s3: Store, tmp_path: Path) -> None:
    before = load_model(run).sha256
    network = CONV.build(0)
    seed_weights(network, 1)
    save_model(tmp_path / "other" / "model", load_model(run).card, network)
    storage.upload(tmp_path / "other", run)
    assert load_model(run).sha256 != before


def test_a_model_that_is_just_being_written_is_refused_and_not_kept(run: str, s3: Store) -> None:
    weights = storage.read_bytes(f"{run}/model/model.safetensors")
    storage.write_bytes(f"{run}/model/model.safetensors", weights[:-1])
    with pytest.raises(UsageError, match=r"model.safetensors is missing or not the one of model.json"):
        load_model(run)
    storage.write_bytes(f"{run}/model/model.safetensors", weights)
    assert load_model(run).sha256


def test_first_weights_come_from_a_remote_run_or_file(run: str) -> None:
    wanted = Wanted(located(run), "auto", None, "auto", 0, "cpu", 1, (0.4,), (0.2,))
    from_run = initial_weights(wanted)
    assert from_run.provenance["model"] == run
    file = f"{run}/model/model.safetensors"
    assert nearby(file).read_bytes() == storage.read_bytes(file)
    assert seen_by(file) == frozenset(SEEN)
    alone = f"{run}/../weights.safetensors".replace("my-run/../", "")
    storage.write_bytes(alone, storage.read_bytes(file))
    assert nearby(alone).read_bytes() == storage.read_bytes(file)
    assert seen_by(alone) == frozenset()


def test_what_is_no_model_is_refused_in_one_line(s3: Store) -> None:
    with pytest.raises(UsageError, match="not a RUN"):
        load_model(f"{s3.bucket}/nothing")
    storage.write_text(f"{s3.bucket}/begun/config.yaml", "verb: transfer\n")
    with pytest.raises(UsageError, match="this run has not finished"):
        load_model(f"{s3.bucket}/begun")


def test_a_card_without_hashes_is_damaged(run: str) -> None:
    storage.write_text(f"{run}/model/model.json", json.dumps({"format": 1}))
    with pytest.raises(UsageError, match=r"model\.json is damaged"):
        load_model(run)
