"""Ray Tune's view of the ledger, driven by hand: no Ray is started here."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher

from tuning.ledger import Ledger, Outcome, Record
from tuning.search import Halving, LedgerSearch, TrialLog, grace_of
from tuning.spaces import STUDIES, defaults
from tuning.trial import IN_FULL

SPACE = STUDIES["transfer"]
EPOCHS = 3


class Trial:
    """What Halving asks of a Ray trial."""

    def __init__(self, number: int) -> None:
        self.trial_id, self.config = f"ray-{number}", {"number": number}


def row(epoch: int, value: float = 0.5, **more: Any) -> dict[str, Any]:
    return {
        "epoch": epoch,
        "value": value,
        "loss": 1.0,
        "held_loss": 2.0 - value,
        "best_epoch": epoch,
        "seconds": epoch / 2,
        "pid": 1,
        "done": False,
        **more,
    }


@pytest.fixture
def searcher(tmp_path: Path) -> Callable[[int], LedgerSearch]:
    """A searcher as a fresh process would make it."""

    def make(trials: int) -> LedgerSearch:
        ledger = Ledger.open(tmp_path, SPACE, defaults(SPACE), seed=0, subject="s")
        return LedgerSearch(ledger, trials, TrialLog(tmp_path / "metrics.jsonl"), lambda record: None, EPOCHS)

    return make


def finished(folder: Path) -> dict[int, Outcome]:
    ledger = Ledger.open(folder, SPACE, defaults(SPACE), seed=0, subject="s")
    return {r.number: r.outcome for r in ledger.finished()}


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def test_a_trial_is_complete_only_after_its_last_epoch(tmp_path: Path, searcher: Any) -> None:
    search = searcher(2)
    assert search.suggest("a") == {"number": 0, "params": defaults(SPACE)}
    assert search.suggest("b")["number"] == 1
    for epoch in range(1, EPOCHS):
        search.on_trial_result("a", row(epoch))
    search.on_trial_complete("a", row(EPOCHS, 0.75))
    search.on_trial_complete("b", row(1, 0.25))
    assert search.suggest("c") == Searcher.FINISHED
    outcomes = finished(tmp_path)
    assert outcomes[0] == Outcome("complete", (0.5, 0.5, 0.75), 1.25, 3, 1.5)
    assert outcomes[1] == Outcome("stopped", (0.25,), 1.75, 1, 0.5)
    logged = rows_of(tmp_path)
    assert [r["event"] for r in logged if "event" in r] == ["start", "start", "complete", "stopped"]
    assert [(r["trial"], r["epoch"]) for r in logged if "epoch" in r] == [(0, 1), (0, 2), (0, 3), (1, 1)]
    assert all("pid" not in r for r in logged)


def test_the_result_that_ends_a_trial_comes_twice_and_counts_once(tmp_path: Path, searcher: Any) -> None:
    search = searcher(1)
    search.suggest("a")
    for epoch in range(1, EPOCHS + 1):
        search.on_trial_result("a", row(epoch))
    search.on_trial_complete("a", row(EPOCHS, done=True))
    assert len(finished(tmp_path)[0].values) == EPOCHS
    assert len([r for r in rows_of(tmp_path) if "epoch" in r]) == EPOCHS


def test_a_failure_is_recorded_with_its_reason_and_the_search_goes_on(tmp_path: Path, searcher: Any) -> None:
    search = searcher(3)
    for name in ("a", "b"):
        search.suggest(name)
    search.on_trial_result("a", row(1))
    search.on_trial_complete("a", {"epoch": 0, "value": math.nan, "failed": "ValueError: no", "seconds": 4.0})
    search.on_trial_complete("b", error=True)
    outcomes = finished(tmp_path)
    assert outcomes[0] == Outcome("failed", (), seconds=4.0, reason="ValueError: no")
    assert outcomes[1] == Outcome("failed", (), reason="its process died: was it out of memory?")
    assert search.suggest("c")["number"] == 2


def test_a_trial_taken_back_without_a_result_is_run_by_the_next_process(tmp_path: Path, searcher: Any) -> None:
    search = searcher(2)
    first = search.suggest("a")
    search.on_trial_complete("a")
    assert finished(tmp_path) == {}
    assert searcher(2).suggest("b") == first


def test_a_trial_started_again_after_a_death_reports_anew(tmp_path: Path, searcher: Any) -> None:
    search = searcher(1)
    search.suggest("a")
    for epoch, value in [(1, 0.1), (2, 0.2), (1, 0.3)]:
        search.on_trial_result("a", row(epoch, value, seconds=value))
    search.on_trial_complete("a", row(2, 0.4))
    assert finished(tmp_path)[0].values == (0.3, 0.4)


def test_a_line_cut_off_by_a_kill_is_dropped_from_the_log(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"trial": 0}\n{"tri', encoding="utf-8")
    with TrialLog(path) as log:
        log.write({"trial": 1})
    assert rows_of(tmp_path) == [{"trial": 0}, {"trial": 1}]


# Stopping early


def decisions(halving: Halving, number: int, values: list[float]) -> list[str]:
    trial: Any = Trial(number)
    halving.on_trial_add(None, trial)  # type: ignore[arg-type]
    return [
        halving.on_trial_result(None, trial, {"epoch": epoch, "value": value})
        for epoch, value in enumerate(values, start=1)
    ]


def test_the_first_trials_run_in_full_and_later_ones_stop_at_the_first_rung_where_they_are_behind() -> None:
    halving, epochs = Halving(10, []), 10
    go, stop = TrialScheduler.CONTINUE, TrialScheduler.STOP
    for number in range(IN_FULL):
        assert decisions(halving, number, [0.6 - number / 10] * epochs) == [go] * (epochs - 1) + [stop]
    assert grace_of(epochs) == 2
    assert decisions(halving, IN_FULL, [0.1] * 2) == [go, stop]
    assert decisions(halving, IN_FULL + 1, [0.9] * epochs) == [go] * (epochs - 1) + [stop]


@pytest.mark.parametrize("cut", range(1, 7))
def test_a_search_taken_up_again_stops_trials_as_one_that_never_ended(cut: int) -> None:
    curves = [[0.5 + 0.04 * epoch * ((number * 5) % 7 - 3) / 3 for epoch in range(9)] for number in range(8)]
    whole = Halving(9, [])
    said = [decisions(whole, number, curve) for number, curve in enumerate(curves)]
    before = [
        Record(number, {}, Outcome("complete", tuple(curve[: _length(said[number])])))
        for number, curve in enumerate(curves[:cut])
    ]
    halves = [Halving(9, []), Halving(9, before)]
    first = [decisions(halves[0], number, curve[: _length(said[number])]) for number, curve in enumerate(curves[:cut])]
    second = [decisions(halves[1], number, curve) for number, curve in list(enumerate(curves))[cut:]]
    kept = [row[: _length(row)] for row in [*first, *second]]
    assert kept == [row[: _length(row)] for row in said]
    assert TrialScheduler.STOP in [row[-2] for row in said if len(row) > 1] or any(_length(r) < 9 for r in said)


def _length(row: list[str]) -> int:
    """Epochs until the trial is stopped."""
    return row.index(TrialScheduler.STOP) + 1


@pytest.mark.parametrize(("epochs", "grace"), [(1, 1), (4, 1), (5, 1), (10, 2), (20, 4), (100, 20)])
def test_every_trial_may_train_for_a_fifth_of_the_epochs(epochs: int, grace: int) -> None:
    assert grace_of(epochs) == grace
