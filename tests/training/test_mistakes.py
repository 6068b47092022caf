"""The pictures of a report: the worst mistakes, spread over classes and groups, and no name of any group."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from training import report
from training.mistakes import HITS, MISTAKES, PER_GROUP, confident_mistakes, hesitant_hits, mistakes_section

CLASSES = ["healthy", "ill/a", "ill/b"]


def predictions(count: int = 300, groups: int = 60, seed: int = 0) -> tuple[np.ndarray, np.ndarray, list[str]]:
    rng = np.random.default_rng(seed)
    probabilities = rng.dirichlet([1.0, 1.0, 1.0], count)
    return rng.integers(0, 3, count), probabilities, [f"patient-{g}" for g in rng.integers(0, groups, count)]


def test_the_mistakes_are_the_most_confident_of_each_class_in_turns() -> None:
    truth, probabilities, _ = predictions()
    alone = [f"group-{i}" for i in range(len(truth))]
    found = confident_mistakes(truth, probabilities, alone, np.arange(len(truth)))
    sure, said = probabilities.max(axis=1), probabilities.argmax(axis=1)
    assert len(found) == MISTAKES and (said[found] != truth[found]).all()
    assert (np.diff(sure[found]) <= 0).all()
    for name in range(3):
        wrong = np.flatnonzero((said != truth) & (truth == name))
        best = wrong[np.argsort(-sure[wrong])][: MISTAKES // 3]
        assert set(found[truth[found] == name]) == set(best)


def test_no_group_has_more_than_two_pictures_and_no_image_more_than_one() -> None:
    truth, probabilities, _ = predictions(groups=8)
    rows = np.arange(len(truth)) // 3  # three repeats judged each image
    groups = [f"patient-{row % 4}" for row in rows]
    for found in (
        confident_mistakes(truth, probabilities, groups, rows),
        hesitant_hits(truth, probabilities, groups, rows),
    ):
        counts = np.unique([groups[at] for at in found], return_counts=True)[1]
        assert counts.max() <= PER_GROUP and len(set(rows[found])) == len(found)
    assert len(confident_mistakes(truth, probabilities, groups, rows)) == 4 * PER_GROUP  # four groups, not twelve


def test_the_right_answers_shown_are_those_least_certain() -> None:
    truth, probabilities, _ = predictions()
    truth = np.where(np.arange(len(truth)) % 2, 0, truth)
    alone = [f"group-{i}" for i in range(len(truth))]
    found = hesitant_hits(truth, probabilities, alone, np.arange(len(truth)))
    sure, said = probabilities.max(axis=1), probabilities.argmax(axis=1)
    assert len(found) == HITS and (said[found] == truth[found]).all()
    for name in set(truth[found]):
        right = np.flatnonzero((said == truth) & (truth == name))
        mine = found[truth[found] == name]
        assert set(mine) == set(right[np.argsort(sure[right])][: len(mine)])


def section(folder: Path, **changes: object) -> report.Section:
    truth, probabilities, groups = predictions()
    rng = np.random.default_rng(1)
    values = {
        "classes": CLASSES,
        "truth": truth,
        "probabilities": probabilities,
        "groups": groups,
        "rows": np.arange(len(truth)),
        "pixels": rng.integers(0, 256, (len(truth), 20, 28, 3), dtype=np.uint8),
        "maps": lambda pixels, said: np.tile(np.linspace(0, 1, 28, dtype=np.float32), (len(pixels), 20, 1)),
        "method": "rollout",
    }
    values |= changes
    pixels = np.asarray(values["pixels"])
    return mistakes_section(folder, **values | {"pixels": pixels.__getitem__})  # type: ignore[arg-type]


@pytest.mark.parametrize("channels", [1, 3])
def test_the_gallery_shows_pictures_of_the_data_and_no_name_of_a_group(tmp_path: Path, channels: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (300, 20, 28, channels), dtype=np.uint8)
    found = section(tmp_path / "figures", pixels=pixels)
    pictures = [block for block in found.blocks if isinstance(block, report.Figure)]
    assert [p.path.name for p in pictures] == ["mistakes.png", "hesitant.png"]
    assert all(p.contains_data for p in pictures)
    for picture in pictures:
        with Image.open(picture.path) as image:
            assert np.asarray(image.convert("RGB")).std() > 1
    report.write_report(tmp_path / "report.html", title="T", sections=[found])
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "patient-" not in html
    assert "the final model looks" in html and "attention rollout" in html
    tables = [block for block in found.blocks if isinstance(block, report.Table)]
    assert [len(t.rows) for t in tables] == [MISTAKES, HITS]
    assert all(row[1] != row[2] for row in tables[0].rows) and all(row[1] == row[2] for row in tables[1].rows)


def test_the_maps_asked_for_are_of_the_class_that_was_said_out_of_fold(tmp_path: Path) -> None:
    truth, probabilities, groups = predictions()
    pixels = np.zeros((len(truth), 8, 8, 3), dtype=np.uint8)
    pixels[:, 0, 0, 0] = np.arange(len(truth)) % 256
    asked: list[tuple[np.ndarray, np.ndarray]] = []

    def maps(shown: np.ndarray, said: np.ndarray) -> np.ndarray:
        asked.append((shown[:, 0, 0, 0], said))
        return np.zeros(shown.shape[:3], dtype=np.float32)

    section(tmp_path / "figures", pixels=pixels, maps=maps)
    places = confident_mistakes(truth, probabilities, groups, np.arange(len(truth)))
    assert np.array_equal(asked[0][0], places % 256)
    assert np.array_equal(asked[0][1], probabilities[places].argmax(axis=1))


def test_without_maps_nothing_is_said_of_where_the_model_looks(tmp_path: Path) -> None:
    found = section(tmp_path / "figures", maps=None, method="")
    report.write_report(tmp_path / "report.html", title="T", sections=[found])
    assert "looks" not in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_a_model_without_mistakes_is_said_to_have_none(tmp_path: Path) -> None:
    truth = np.asarray([0, 1, 2])
    found = section(
        tmp_path / "figures", truth=truth, probabilities=np.eye(3) * 0.7 + 0.1, groups=["a", "b", "c"], rows=truth
    )
    assert any(isinstance(b, report.Text) and "no mistake" in b.paragraph for b in found.blocks)
    assert not (tmp_path / "figures" / "mistakes.png").exists() and (tmp_path / "figures" / "hesitant.png").exists()
