"""Nothing that is chosen on the way may know the patient: labels at random, and a mark that tells who it is.

A mark is all that there is to learn. By patient nothing does better than guessing, whatever is chosen inside the folds:
when to stop, temperature, thresholds, sets, stacking, settings of a search. By image the same network reads the mark.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cluster.session import Resources
from training.configs import IngestConfig, TransferConfig
from training.ingest import ingest
from training.transfer import transfer
from tuning import TuneConfig, tune

pytestmark = [pytest.mark.ray, pytest.mark.slow]

PATIENTS, PICTURES, SIDE = 60, 4, 32
CLASSES = ("ill/late", "ill/soon", "well")
CHANCE = 1 / len(CLASSES)
BOUND = 3 * (CHANCE * (1 - CHANCE) / PATIENTS) ** 0.5
"""Three standard errors of a share of 60 patients."""
SMALL: dict[str, Any] = {"init": "none", "model": "test_vit", "image_size": str(SIDE)}


@pytest.fixture(scope="module")
def marked(ray_session: Resources, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DATASET of pictures that show nothing but noise and a mark of 4 x 4 coloured tiles of their patient's own."""
    folder, rng = tmp_path_factory.mktemp("marked"), np.random.default_rng(0)
    rows = []
    for patient, label in enumerate(rng.choice(CLASSES, PATIENTS)):
        mark = np.kron(rng.uniform(40, 215, (4, 4, 3)), np.ones((SIDE // 4, SIDE // 4, 1)))
        for number in range(PICTURES):
            name = f"{patient}-{number}.png"
            noisy = mark + rng.normal(0, 12, mark.shape)
            Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / name)
            rows.append({"path": name, "label": label, "group": f"patient {patient}"})
    with (folder / "index.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, ["path", "label", "group"])
        table.writeheader()
        table.writerows(rows)
    ingest(IngestConfig(str(folder / "index.csv"), out=str(folder / "dataset"), image_size=str(SIDE)))
    return folder / "dataset"


def judged(data: Path, out: Path, **changes: Any) -> dict[str, Any]:
    return transfer(TransferConfig(str(data), out=str(out), **SMALL | {"folds": 3} | changes))


WAYS: dict[str, dict[str, Any]] = {
    "stopped early, calibrated": {"task": "finetune", "epochs": 30},
    "stacked": {
        **{"task": "hierarchical", "learner": "features", "structure": "transferred", "stack": "forest"},
        "epochs": 30,
    },
}


@pytest.mark.parametrize("way", WAYS)
def test_the_mark_is_read_where_patients_stand_on_both_sides(marked: Path, tmp_path: Path, way: str) -> None:
    by_image = judged(marked, tmp_path / "run", split="image", **WAYS[way])
    assert by_image["metrics"]["balanced_accuracy"]["value"] > CHANCE + 2 * BOUND


@pytest.mark.parametrize("way", WAYS)
def test_no_choice_inside_the_folds_makes_more_of_it_than_guessing(marked: Path, tmp_path: Path, way: str) -> None:
    found = judged(marked, tmp_path / "run", **WAYS[way])
    assert abs(found["metrics"]["balanced_accuracy"]["value"] - CHANCE) < BOUND
    assert found["metrics"]["auroc"]["value"] < 0.5 + BOUND
    for goals in found["thresholds"].values():
        chosen = goals["Youden"]
        assert abs(chosen["sensitivity"]["value"] + chosen["specificity"]["value"] - 1) < 2 * BOUND
    for kind, scores in found["calibration"].items():
        if isinstance(scores, dict):
            assert scores["brier"]["value"] > 1 - CHANCE - BOUND / 2, f"{kind}: no surer and right than who guesses"


def test_a_search_finds_no_settings_that_read_it(marked: Path, tmp_path: Path) -> None:
    config: dict[str, Any] = SMALL | {"epochs": 30, "workers": "2", "trials": 4}
    found = tune(TuneConfig(data=str(marked), out=str(tmp_path / "search"), **config))
    held_out = 0.2 * PATIENTS
    bound = 3 * (CHANCE * (1 - CHANCE) / held_out) ** 0.5
    assert abs(found["held_out"]["best"]["balanced_accuracy"]["value"] - CHANCE) < bound
