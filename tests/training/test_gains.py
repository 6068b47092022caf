"""What a stage gave: differences and their intervals against loops written out by hand, and the words for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import balanced_accuracy_score, cohen_kappa_score

from cluster.errors import RayographError
from training.bootstrap import tail_share
from training.compare import RESAMPLES
from training.gains import Gain, Point, gain_between, section
from training.overlap import Overlap
from training.report import Table, Text, Warning, write_report

CLASSES = ["a", "b", "c"]


def predictions(path: Path, right: float, seed: int, *, images: int = 90, repeats: int = 2, shuffle: int = 0) -> Path:
    """A file of predictions of which about a share `right` is right; images, groups and folds always the same."""
    rng, fixed = np.random.default_rng(seed), np.random.default_rng(7)
    truth, group = fixed.integers(0, 3, images), fixed.integers(0, 20, images)
    rows: list[dict[str, Any]] = []
    for repeat in range(repeats):
        for at in range(images):
            said = truth[at] if rng.random() < right else rng.integers(0, 3)
            scores = np.full(3, 0.2)
            scores[said] = 0.6
            row = {"image_id": f"i{at:03d}", "group": f"g{group[at]}", "case": "", "repeat": repeat}
            row |= {"fold": int(group[at] % 3), "truth": CLASSES[truth[at]]}
            rows.append(row | dict(zip(CLASSES, scores.tolist(), strict=True)))
    order = np.random.default_rng(shuffle).permutation(len(rows)) if shuffle else np.arange(len(rows))
    pq.write_table(pa.Table.from_pylist([rows[i] for i in order]), path)
    return path


def by_hand(path: Path) -> list[dict[str, Any]]:
    return sorted(pq.read_table(path).to_pylist(), key=lambda row: (row["repeat"], row["image_id"]))


def test_gains_are_differences_of_scikit_learn_s_figures_whatever_the_order_of_the_rows(tmp_path: Path) -> None:
    before = predictions(tmp_path / "before.parquet", 0.5, 1, shuffle=3)
    after = predictions(tmp_path / "after.parquet", 0.8, 2)
    found: Any = gain_between(before, after, CLASSES, seed=0)
    for name, score in (("balanced_accuracy", balanced_accuracy_score), ("kappa", cohen_kappa_score)):
        values = []
        for rows in (by_hand(before), by_hand(after)):
            each = []
            for repeat in (0, 1):
                own = [row for row in rows if row["repeat"] == repeat]
                said = [max(CLASSES, key=lambda c, row=row: row[c]) for row in own]  # type: ignore[misc]
                each.append(score([row["truth"] for row in own], said))
            values.append(np.mean(each))
        assert found[name]["difference"] == pytest.approx(values[1] - values[0])
        low, high = found[name]["ci95"]
        assert 0 < low < found[name]["difference"] < high


def test_the_interval_is_that_of_a_bootstrap_over_groups_with_the_same_draws_on_both_sides(tmp_path: Path) -> None:
    before = predictions(tmp_path / "before.parquet", 0.5, 1, repeats=1)
    after = predictions(tmp_path / "after.parquet", 0.7, 2, repeats=1)
    first, second = by_hand(before), by_hand(after)
    groups = sorted({row["group"] for row in first})
    drawn = np.random.default_rng(5).integers(len(groups), size=(RESAMPLES, len(groups)))
    differences = []
    for draw in drawn:
        counts = np.bincount(draw, minlength=len(groups))
        weight = np.asarray([counts[groups.index(row["group"])] for row in first])
        scores = []
        for rows in (first, second):
            said = np.asarray([int(np.argmax([row[c] for c in CLASSES])) for row in rows])
            truth = np.asarray([CLASSES.index(row["truth"]) for row in rows])
            scores.append(
                np.mean([(weight * (said == truth))[truth == c].sum() / weight[truth == c].sum() for c in range(3)])
            )
        differences.append(scores[1] - scores[0])
    expected = np.quantile(differences, [tail_share(len(groups)), 1 - tail_share(len(groups))])
    found: Any = gain_between(before, after, CLASSES, seed=5)
    np.testing.assert_allclose(found["balanced_accuracy"]["ci95"], expected, atol=1e-12)


def test_a_run_gains_exactly_nothing_over_itself(tmp_path: Path) -> None:
    same = predictions(tmp_path / "same.parquet", 0.6, 1)
    for gain in gain_between(same, same, CLASSES, seed=0).values():
        assert (gain["difference"], gain["ci95"], gain["p"]) == (0.0, [0.0, 0.0], 1.0)


def test_runs_of_other_images_are_no_pair(tmp_path: Path) -> None:
    one = predictions(tmp_path / "one.parquet", 0.6, 1)
    for changes in ({"images": 89}, {"repeats": 1}):
        other = predictions(tmp_path / "other.parquet", 0.6, 1, **changes)
        with pytest.raises(RayographError, match="not of the same images in the same folds"):
            gain_between(one, other, CLASSES, seed=0)


def point(name: str, value: float, gain: tuple[float, float, float] | None, **more: Any) -> Point:
    metric = {"value": value, "ci95": [value - 0.1, value + 0.1], "per_fold": [value]}
    verb = None if name == "none" else more.pop("verb", "pretrain")
    return Point(name, verb, None, 10, {"balanced_accuracy": metric}, gained(*gain) if gain else None, **more)


def gained(change: float, low: float | None, high: float | None) -> Gain:
    return {"balanced_accuracy": {"difference": change, "ci95": [low, high], "p": None}}


def test_the_report_claims_no_more_than_the_intervals_allow(tmp_path: Path) -> None:
    points = [
        point("none", 0.4, None),
        point("pool", 0.5, (0.1, 0.02, 0.2), overlap=Overlap(30, 5, "g1", 2)),
        point("cric", 0.52, (0.02, -0.1, 0.1), verb="transfer", overlap=Overlap(0, 0, "", 3)),
        point("last", 0.3, (-0.22, -0.3, -0.1), verb="transfer"),
    ]
    made = section(points, gained(-0.1, None, None), tmp_path / "figures", 100)
    said = " ".join(block.paragraph for block in made.blocks if isinstance(block, Text))
    assert "Stage pool: a gain of +0.100 [+0.02, +0.20]." in said
    assert "Stage cric: +0.020 [-0.10, +0.10], whose interval holds 0, so that it may be chance." in said
    assert "Stage last: a loss of -0.220 [-0.30, -0.10]." in said
    assert "The whole chain, last over none: -0.100, with too few groups to say more." in said
    assert "Stage pool was trained, without labels, on 30 of the 100 images" in said
    (warning,) = [block.text for block in made.blocks if isinstance(block, Warning)]
    assert "3 groups are called the same in the data of stage cric" in warning
    (table,) = [block for block in made.blocks if isinstance(block, Table)]
    assert [row[0] for row in table.rows] == ["none", "pool", "cric", "last"]
    assert (tmp_path / "figures" / "stages.png").stat().st_size > 5000
    write_report(tmp_path / "report.html", title="t", sections=[made])
    assert "What each stage gave" in (tmp_path / "report.html").read_text()
