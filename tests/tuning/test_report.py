"""What is said of a search: no more than the held-out groups allow."""

from __future__ import annotations

from typing import Any

import pytest

from tuning.ledger import Outcome, Record
from tuning.report import Judgement, verdict

WINNER = Record(4, {}, Outcome("complete", (0.9,)))
METRIC = {"balanced_accuracy": {"value": 0.7, "ci95": [0.6, 0.8], "per_fold": [0.7]}}


def judged(low: float, high: float) -> Judgement:
    difference: dict[str, Any] = {"value": (low + high) / 2, "ci95": [low, high]}
    return Judgement(METRIC, METRIC, difference)


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (0.01, 0.05, "a gain of +0.030 [+0.01, +0.05]."),
        (-0.05, -0.01, "a loss of -0.030 [-0.05, -0.01]. Keep the defaults."),
        (-0.01, 0.05, "a gain of +0.020 [-0.01, +0.05], whose interval holds 0, so that it may be chance."),
        (-0.05, 0.01, "a loss of -0.020 [-0.05, +0.01], whose interval holds 0, so that it may be chance."),
    ],
)
def test_the_verdict_claims_what_the_interval_allows(low: float, high: float, said: str) -> None:
    assert verdict(WINNER, judged(low, high)).endswith(said)


def test_the_verdict_says_when_the_defaults_won_or_failed() -> None:
    defaults = Record(0, {}, Outcome("complete", (0.9,)))
    assert verdict(defaults, judged(0, 0)).startswith("No trial did better than the defaults")
    assert verdict(WINNER, Judgement(METRIC, None, None)).endswith("The defaults failed.")
