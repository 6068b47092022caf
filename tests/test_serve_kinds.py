"""`rayograph serve` of what `--task hierarchical` and `--task metric` leave: answers are those of the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from serving import index
from serving.configs import IndexBuildConfig, IndexSearchConfig
from tests.hostile import encoded
from tests.test_serve_chain import Parts, serving
from tests.test_transfer_chain import config
from training.artifact import read_card
from training.configs import InferenceConfig
from training.dataset import Dataset
from training.gallery import gallery
from training.inference import predict
from training.transfer import transfer

pytestmark = [pytest.mark.ray, pytest.mark.slow]

KINDS: dict[str, dict[str, Any]] = {
    "hierarchy": {"task": "hierarchical", "structure": "transferred", "learner": "features", "stack": "logistic"},
    "metric": {"task": "metric", "steps": 2, "embedding": 16},
}


@pytest.mark.parametrize("head", KINDS)
def test_a_service_of_another_kind_of_head_answers_as_the_command_line_does(
    phantoms: Path, tmp_path: Path, head: str
) -> None:
    model, built, images = tmp_path / "run", tmp_path / "index", tmp_path / "images"
    small = {"init": "none", "model": "test_efficientnet", "image_size": "32", "folds": 2, "epochs": 2}
    transfer(config(phantoms, model, **small, **KINDS[head]))
    card, _ = read_card(str(model))
    assert card.head == head
    index.build(IndexBuildConfig(model=str(model), data=str(phantoms), out=str(built)), gallery=gallery)
    dataset = Dataset.open(phantoms)
    images.mkdir()
    for at, pixels in enumerate(dataset.pixels(dataset.select().take(range(0, 200, 50)))):
        (images / f"{at}.png").write_bytes(encoded(pixels[..., 0] if pixels.shape[-1] == 1 else pixels, "PNG"))
    predict(InferenceConfig(str(images), model=str(model), out=str(tmp_path / "out.parquet")))
    predicted = {row["path"]: row for row in pq.read_table(tmp_path / "out.parquet").to_pylist()}
    with serving(Parts(model, built, images)) as running:
        for image in sorted(images.iterdir()):
            content, row = image.read_bytes(), predicted[image.name]
            answer = running.post("/v1/classify", content)
            found = {c["label"]: c["probability"] for c in answer["classes"]}
            assert found == pytest.approx({name: row[name] for name in card.classes}, abs=1e-5)
            hits = running.post("/v1/search?k=5", content)["hits"]
            wanted = index.search(IndexSearchConfig(str(image), index=str(built), k=5))["hits"]
            assert [hit["score"] for hit in hits] == pytest.approx([hit["score"] for hit in wanted], abs=1e-5)
            assert {hit["id"] for hit in hits} == {hit["id"] for hit in wanted}
    assert len({tuple(row[name] for name in card.classes) for row in predicted.values()}) == len(predicted) == 4
