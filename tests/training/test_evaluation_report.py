"""What is said of a comparison: no more than interval and correction allow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from training import report
from training.compare import Adjusted, compare
from training.evaluation_report import Rival, comparison_section, draw_differences, p_words, verdict
from training.metrics import NAMES, summarise, title_of


def adjusted(value: float, low: float, high: float, p: float, p_holm: float) -> Adjusted:
    return Adjusted(difference=value, ci95=[low, high], p=p, p_holm=p_holm)


@pytest.mark.parametrize(
    ("difference", "comparisons", "said"),
    [
        (
            adjusted(0.03, 0.01, 0.05, 0.004, 0.004),
            1,
            "a is ahead of b on balanced accuracy by +0.030 [+0.010, +0.050]. "
            "The 95 % interval excludes 0, so it is more than chance (p 0.004).",
        ),
        (
            adjusted(-0.03, -0.05, -0.01, 0.0004, 0.001),
            2,
            "b is ahead of a on balanced accuracy by +0.030 [+0.010, +0.050]. "
            "The 95 % interval excludes 0, so it is more than chance (p < 0.001, 0.001 corrected for 2 comparisons).",
        ),
        (
            adjusted(0.02, -0.01, 0.05, 0.2, 0.2),
            1,
            "a is ahead of b on balanced accuracy by +0.020 [-0.010, +0.050]. "
            "The 95 % interval holds 0, so the difference may be chance (p 0.200).",
        ),
        (
            adjusted(0.03, 0.01, 0.05, 0.03, 0.09),
            3,
            "a is ahead of b on balanced accuracy by +0.030 [+0.010, +0.050]. The 95 % interval excludes 0, but "
            "several models were compared: it may be chance (p 0.030, 0.090 corrected for 3 comparisons).",
        ),
        (
            adjusted(0.0, 0.0, 0.0, 1.0, 1.0),
            1,
            "a and b are level on balanced accuracy: +0.000 [+0.000, +0.000], p 1.000.",
        ),
    ],
)
def test_the_verdict_claims_what_interval_and_correction_allow(
    difference: Adjusted, comparisons: int, said: str
) -> None:
    assert verdict("a", "b", difference, comparisons) == said


def test_the_verdict_says_when_there_is_too_little_to_compare() -> None:
    alone = Adjusted(difference=0.1, ci95=[None, None], p=None, p_holm=None)
    assert verdict("a", "b", alone, 1) == "a against b: too few groups to compare their balanced accuracy."
    assert p_words(None) == "–"


@pytest.mark.parametrize(("classes", "others"), [(2, 1), (3, 2)])
def test_the_section_holds_a_sentence_and_a_table_for_each_model_and_what_groups_do_to_mcnemar(
    tmp_path: Path, classes: int, others: int
) -> None:
    rng = np.random.default_rng(0)
    truth = rng.integers(classes, size=90)
    rows: dict[str, Any] = {"group": np.arange(90) // 3, "fold": np.zeros(90), "repeat": np.zeros(90), "resamples": 50}
    ours, *theirs = (rng.dirichlet(np.ones(classes), 90) for _ in range(1 + others))
    names = [f"model-{at}" for at in range(others)]
    compared = compare(truth, ours, dict(zip(names, theirs, strict=True)), **rows)
    rivals = {n: Rival(summarise(truth, p, **rows), compared[n]) for n, p in zip(names, theirs, strict=True)}
    draw_differences(tmp_path / "figures" / "differences.png", rivals)
    figure = tmp_path / "figures" / "differences.png"
    section = comparison_section("mine", summarise(truth, ours, **rows), rivals, images=90, groups=30, figure=figure)
    texts = [block.paragraph for block in section.blocks if isinstance(block, report.Text)]
    tables = [block for block in section.blocks if isinstance(block, report.Table)]
    assert len(texts) == others + 1 and "same 90 images of 30 groups" in texts[-1]
    assert all("mine" in text and name in text for text, name in zip(texts, names, strict=False))
    assert len(tables) == others + 1 + (classes == 2)
    for name, table in zip(names, tables, strict=False):
        assert [row[0] for row in table.rows] == [title_of(metric) for metric in NAMES if metric != "kappa_quadratic"]
        assert ("p corrected" in table.headers) == (others > 1)
        assert name in table.headers
    assert "images as independent" in tables[others].caption
    report.write_report(tmp_path / "report.html", title="t", sections=[section])
    assert "data:image/png" in (tmp_path / "report.html").read_text()
