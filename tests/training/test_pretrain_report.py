"""The report of a pretraining run: it says what was done, shows it, and warns of a collapse.

`python tests/training/test_pretrain_report.py FOLDER` writes reports there, for looking at.
"""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.training.test_report import Page
from training import figures, phantom
from training.artifact import ModelCard, save_model
from training.configs import PretrainConfig
from training.encoder import Architecture
from training.images import ImagePath
from training.pretrain_report import Facts, speed_of, write_pretrain_report
from training.probe import row_of
from training.transform import Input

STEPS, PER_EPOCH, BATCH = 200, 10, 64
RUN_MODEL = Architecture("test_vit", 32, 32, 1, 8)
PROBED = "Scores are of 300 labelled images. The encoder was pretrained on these images too, without their labels."


def step(number: int, rate: float = 500.0) -> dict[str, Any]:
    wobble = 0.03 * math.sin(number * 12.9898)
    return {
        "step": number,
        "epoch": (number - 1) // PER_EPOCH + 1,
        "loss": 0.55 + 0.5 * math.exp(-number / 60) + wobble,
        "lr": 1e-3,
        "images_per_second": rate,
        "grad_norm": 1.0,
        "data_wait_s": 0.01,
        "samples": number * BATCH,
    }


def found(rank: float, score: float | None, collapsed: bool = False) -> dict[str, Any]:
    scores = {"knn_balanced_accuracy": score, "linear_balanced_accuracy": (score or 0) + 0.06, "chance": 0.25}
    values = {"effective_rank": rank, "feature_spread": 0.2, "feature_dimension": 64, "collapsed": collapsed}
    return (scores if score is not None else {}) | values


def rows_of(probes: int = 6, starts: int = 3, labels: bool = True, collapsed: bool = False) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [
        {"event": "start", "from_step": 60 * k, "workers": 2 - k % 2, "device": "cpu", "pid": 7} for k in range(starts)
    ]
    rows += [step(number) for number in range(1, STEPS + 1)]
    for k in range(probes):
        score = 0.25 + 0.4 * (1 - math.exp(-k / 2)) if labels else None
        rows.append(row_of(k * STEPS // max(1, probes - 1), found(9 + 4 * k, score, collapsed), probe_seconds=4.2))
    return rows


def facts(**changes: Any) -> Facts:
    card = ModelCard(
        RUN_MODEL,
        ImagePath(32, 32),
        Input(32, 32, 1, (0.5,), (0.25,)),
        lineage={"verb": "pretrain", "dataset": "0123456789abcdef", "initial": {"sha256": "ef" * 32}},
    )
    plain = Facts(
        config=PretrainConfig("data", out="run", epochs=20, batch_size=BATCH, init="none"),
        card=card,
        images=640,
        workers=2,
        device="cpu",
        precision="fp32",
        seconds=754.0,
        probed=PROBED,
        flops_per_image=0.4e9,
        peak_gflops=400.0,
    )
    return replace(plain, **changes)


def reported(run: Path, rows: list[dict[str, Any]], **changes: Any) -> Page:
    """A finished run's report, parsed."""
    (run / "figures").mkdir(parents=True, exist_ok=True)
    pixels = np.stack([phantom.render(at, 36, 0, 96)[..., None] for at in range(0, 36, 5)])
    figures.reconstructions(pixels, pixels // 2, 255 - pixels, run / "figures" / "reconstructions.png")
    chosen = facts(**changes)
    save_model(run / "model", chosen.card, chosen.card.architecture.build())
    write_pretrain_report(run, chosen, rows)
    return Page((run / "report.html").read_text(encoding="utf-8"))


def test_a_run_is_told_in_words_pictures_and_tables(tmp_path: Path) -> None:
    page = reported(tmp_path / "run", rows_of(), receipt="Proven: 640 images, each shown once.")
    for words in (
        "Pretraining: run",
        "was trained on 640 images without using any label",
        "of each image it was shown 25%",
        "It saw all images 20 times, in 200 steps of 64 images, at 32 x 32 pixels.",
        "It knows no diagnosis yet.",
        "Proven: 640 images, each shown once.",
        PROBED,
        "nearest neighbours went from 0.25 to 0.62, linear classifier went from 0.31 to 0.68",
        "; guessing would give 0.25.",
        "measured 6 times, without teaching it anything",
        "The run was started again 2 times, each time from its last checkpoint.",
        "dataset version 0123456789abcdef",
        f"none (sha256 {'ef' * 32})",
        "rayograph transfer --data DATASET --init RUN --out RESULT",
        "test_vit, 32 x 32, 1 channel\n",
        RUN_MODEL.snippet("model/model.safetensors"),
    ):
        assert words in page.words, words
    assert len([img for img in page.all("img") if img["src"].startswith("data:image/png;base64,")]) == 3
    assert all(len(img["alt"]) > 20 for img in page.all("img"))
    assert "Warning:" not in page.words
    for name in ("loss.png", "probes.png"):
        assert (tmp_path / "run" / "figures" / name).read_bytes().startswith(b"\x89PNG")


def test_the_first_and_last_loss_are_means_of_their_epochs(tmp_path: Path) -> None:
    rows = rows_of()
    page = reported(tmp_path / "run", rows)
    loss = [row["loss"] for row in rows if "step" in row]
    first, last = np.mean(loss[:PER_EPOCH]), np.mean(loss[-PER_EPOCH:])
    assert f"Its mean was {first:.3f} in the first epoch and {last:.3f} in the last" in page.words


def test_speed_is_the_median_and_shares_are_of_time_and_peak(tmp_path: Path) -> None:
    rows = [step(1, 100), step(2, 400), step(3, 400)]
    speed = speed_of(rows, flops_per_image=2e9, peak_gflops=1600)
    seconds = 64 / 100 + 2 * 64 / 400
    assert speed.images_per_second == 400
    assert speed.wait_share == pytest.approx(0.03 / seconds)
    assert speed.gflops == pytest.approx(800) and speed.peak_share == pytest.approx(0.5)
    assert speed_of(rows).peak_share is None
    page = reported(tmp_path / "run", rows_of())
    for words in ("200 GFLOP/s", "50%", "of 400 GFLOP/s", "13 min", "7.8%"):
        assert words in page.words, words


def test_a_run_never_interrupted_says_so_and_shows_no_table_of_starts(tmp_path: Path) -> None:
    page = reported(tmp_path / "run", rows_of(starts=1))
    assert "The run was never interrupted." in page.words and "Starts and interruptions" not in page.words


def test_other_events_stand_in_the_table_whatever_their_keys(tmp_path: Path) -> None:
    rows = [*rows_of(), {"event": "worker_lost", "step": 61, "rank": 1, "reason": "killed <9>"}]
    page = reported(tmp_path / "run", rows)
    assert "worker lost" in page.words and "rank 1, reason killed <9>" in page.words


def test_a_collapse_is_a_warning_at_the_top(tmp_path: Path) -> None:
    page = reported(tmp_path / "run", rows_of(collapsed=True))
    assert "The encoder has collapsed at step 200: " in page.words
    assert page.words.index("Warning:") < page.words.index("was trained on 640 images")
    assert page.words.count("Warning:") == 1


def test_without_labels_the_rank_alone_is_shown(tmp_path: Path) -> None:
    page = reported(tmp_path / "run", rows_of(labels=False), probed="Too few labelled groups for a score.")
    assert "Too few labelled groups for a score." in page.words
    assert "nearest neighbours" not in page.words and "effective rank" in page.words
    assert len(page.all("img")) == 3


def test_without_probes_that_is_said(tmp_path: Path) -> None:
    page = reported(tmp_path / "run", rows_of(probes=0))
    assert "No probe was made during this run" in page.words and len(page.all("img")) == 2
    assert not (tmp_path / "run" / "figures" / "probes.png").exists()


def test_many_probes_are_thinned_to_a_table_that_keeps_both_ends(tmp_path: Path) -> None:
    page = reported(tmp_path / "run", rows_of(probes=101))
    assert "Probes (12 of 101)" in page.words
    assert len([th for th in page.all("th") if th["scope"] == "row"]) == 12 + 6 + 3 + 7


def test_pictures_of_the_data_can_be_left_out(tmp_path: Path) -> None:
    page = reported(tmp_path / "run", rows_of(), pictures=False)
    assert len(page.all("img")) == 2 and "Figure left out, because it shows images of the data" in page.words


if __name__ == "__main__":
    for name, rows in (("plain", rows_of()), ("collapsed", rows_of(labels=False, collapsed=True, starts=1))):
        reported(Path(sys.argv[1]) / name, rows)
