"""The report of the kill tests, which reads the same whatever was killed, or nothing yet."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from tests.kills import Kill, report, useful_s

NAN = float("nan")


def test_kills_are_counted_by_kind_and_by_the_fifth_of_the_run_in_which_they_came() -> None:
    kills = [
        Kill("a rank", 0, 3.0, 2),
        Kill("a rank", 99, 5.0, 1),
        Kill("a rank", 100, 4.0),
        Kill("the driver", 20, NAN),
    ]
    lines = [line.split() for line in report(kills, 100, 30.0, 120.0).splitlines()]
    assert ["a", "rank", "1", "0", "0", "0", "2", "3"] in lines
    assert ["the", "driver", "0", "1", "0", "0", "0", "1"] in lines
    assert ["all", "1", "1", "0", "0", "2", "4"] in lines
    said = report(kills, 100, 30.0, 120.0)
    assert "most 2, in all 3" in said and "median 4.0, longest 5.0" in said and "goodput: 0.250" in said


@pytest.mark.parametrize("kills", [[], [Kill("the driver", 7, NAN)]])
def test_without_a_kill_that_a_run_got_over_by_itself_no_seconds_are_told(kills: list[Kill]) -> None:
    said = report(kills, 100, 1.0, 2.0)
    assert said.startswith(f"{len(kills)} kills") and "most 0, in all 0" in said and "seconds to" not in said


def test_useful_is_the_time_of_each_step_without_its_wait_for_data(tmp_path: Path) -> None:
    rows = [
        {"event": "start", "from_step": 0},
        {"step": 1, "samples": 32, "images_per_second": 16.0, "data_wait_s": 0.5},
        {"step": 2, "samples": 40, "images_per_second": 4.0, "data_wait_s": 0.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert math.isclose(useful_s(tmp_path), 1.5 + 2.0)
