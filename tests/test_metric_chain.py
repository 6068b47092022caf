"""From labels to a searchable space: `transfer --task metric`, `index build` and `search`, and a comparison of two."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from cluster.errors import UsageError
from serving import index, snapshot
from tests.hostile import encoded
from tests.test_index_chain import config as index_config
from tests.test_index_chain import hits
from tests.test_transfer_chain import config
from training.artifact import load_model, read_card
from training.configs import EvaluateConfig
from training.dataset import Dataset
from training.evaluate import evaluate
from training.gallery import gallery
from training.hits import read_hits
from training.lineage import labelled_by
from training.retrieval import NAMES
from training.transfer import transfer

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_a_learnt_embedding_is_judged_searched_and_compared(phantoms: Path, tmp_path: Path) -> None:
    network = {"init": "none", "model": "test_efficientnet", "image_size": "32", "folds": 2, "epochs": 2}
    run, other = tmp_path / "run", tmp_path / "other"
    summary = transfer(config(phantoms, run, task="metric", steps=2, embedding=16, **network))
    assert {*NAMES, "step_1/recall_at_8", "test_gallery/map_at_r", "balanced_accuracy"} < set(summary["metrics"])
    card, hashes = read_card(str(run))
    assert card.head == "metric" and "metric.safetensors" in hashes
    assert labelled_by(str(run))  # its labels shaped the network
    table = pq.read_table(run / "retrieval.parquet")
    judged = pq.read_table(run / "predictions.parquet")
    assert table.num_rows == 4 * judged.num_rows  # two galleries, two steps
    own = read_hits(str(run))
    assert own is not None
    assert own.scores[:, 0].mean() == pytest.approx(summary["metrics"]["recall_at_1"]["value"])

    built = tmp_path / "index"
    index.build(index_config(run, phantoms, built, kind="flat"), gallery=gallery)
    dataset, stored = Dataset.open(phantoms), snapshot.current(built)
    model = load_model(run)
    pixels = dataset.pixels(dataset.select())
    np.testing.assert_allclose(stored.vectors, model.embed(pixels), atol=1e-4)
    query = tmp_path / "query.png"
    query.write_bytes(encoded(pixels[5][..., 0] if pixels.shape[-1] == 1 else pixels[5], "PNG"))
    groups = stored.rows["group"].to_pylist()
    found = hits(query, built, k=5, not_same_group=True, group=groups[5])
    allowed = np.asarray([g != groups[5] for g in groups])
    expected = -np.sort(-(stored.vectors @ model.embed(pixels[5:6])[0])[allowed])[:5]
    np.testing.assert_allclose([hit["score"] for hit in found], expected, atol=1e-4)

    transfer(config(phantoms, other, task="metric", loss="triplet", embedding=16, **network))
    with pytest.raises(UsageError, match="is not the model of this index"):
        hits(query, built, model=str(other))
    compared = evaluate(EvaluateConfig(model=str(run), out=str(tmp_path / "compared"), against=(str(other),)))
    difference = compared["against"]["other"]["retrieval"]["recall_at_8"]
    theirs = json.loads((other / "summary.json").read_text())["metrics"]["recall_at_8"]["value"]
    assert difference["difference"] == pytest.approx(summary["metrics"]["recall_at_8"]["value"] - theirs)
