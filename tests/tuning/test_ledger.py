"""The ledger: which trial comes next, after any interruption, and who wins."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.errors import UsageError
from tuning import ledger
from tuning.ledger import FILE, Ledger, Outcome, Record, best_of, by_rank
from tuning.spaces import STUDIES, Params, Range, defaults

SPACE = STUDIES["transfer"]
SUBJECT = "dataset 1"


@pytest.fixture(autouse=True)
def modelled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Suggestions learn from results after few trials, so that a short search does both."""
    monkeypatch.setattr(ledger, "RANDOM_TRIALS", 3)


def opened(folder: Path, seed: int = 0, subject: str = SUBJECT) -> Ledger:
    return Ledger.open(folder, SPACE, defaults(SPACE), seed=seed, subject=subject)


def given(book: Ledger, trials: int) -> tuple[int, Params]:
    found = book.next(trials)
    assert found is not None
    return found


def score(params: Params) -> Outcome:
    """A fake trial: two epochs, and a value that the parameters alone decide."""
    value = 1 - abs(float(params["drop_path"]) - 0.2) - abs(float(params["jitter"]) - 0.3)
    return Outcome("complete", (value / 2, value), held_loss=1 - value, best_epoch=2, seconds=1.0)


def searched(folder: Path, trials: int, stop_at: int | None = None) -> list[Record]:
    """A search of fake trials by as many processes as it takes; each gives up where it is asked for trial `stop_at`."""
    book = opened(folder)
    while (found := book.next(trials)) is not None:
        if found[0] == stop_at:
            return []
        book.finish(found[0], score(found[1]))
    return book.finished()


def test_trial_0_is_the_defaults_and_the_others_lie_in_their_ranges(tmp_path: Path) -> None:
    first, *others = searched(tmp_path, 5)
    assert first.params == defaults(SPACE)
    for record in others:
        assert set(record.params) == set(SPACE)
        for name, value in record.params.items():
            setting = SPACE[name]
            assert isinstance(setting, Range) and setting.low <= float(value) <= setting.high
        assert record.params != first.params
    assert len({tuple(r.params.values()) for r in others}) == 4


def test_numbers_are_given_out_once_and_never_beyond_the_budget(tmp_path: Path) -> None:
    book = opened(tmp_path)
    assert [given(book, 3)[0] for _ in range(3)] == [0, 1, 2]
    assert book.next(3) is None
    book.finish(1, Outcome("stopped", (0.5,)))
    assert book.next(3) is None
    assert given(book, 4)[0] == 3


@pytest.mark.parametrize("end", ["complete", "stopped", "failed"])
def test_only_what_was_cut_off_is_given_out_again_with_its_parameters(tmp_path: Path, end: str) -> None:
    book = opened(tmp_path)
    first = [given(book, 4) for _ in range(3)]
    book.finish(1, Outcome(end, (0.5,), 1.0, 1, reason="broke" if end == "failed" else ""))  # type: ignore[arg-type]
    again = opened(tmp_path)  # the process before is gone, with trials 0 and 2 under way
    assert [given(again, 4) for _ in range(2)] == [first[0], first[2]]
    assert given(again, 4)[0] == 3
    assert again.next(4) is None
    (record,) = again.finished()
    assert (record.number, record.params, record.outcome.state) == (1, first[1][1], end)


def test_an_interrupted_or_raised_search_suggests_what_an_uninterrupted_one_does(tmp_path: Path) -> None:
    for name in ("whole", "cut", "raised"):
        (tmp_path / name).mkdir()
    whole = searched(tmp_path / "whole", 6)
    for stop_at in (0, 1, 4):
        assert searched(tmp_path / "cut", 6, stop_at) == []
    assert searched(tmp_path / "cut", 6) == whole
    assert searched(tmp_path / "raised", 4) == whole[:4]
    assert searched(tmp_path / "raised", 6) == whole


def test_another_seed_suggests_something_else(tmp_path: Path) -> None:
    second = []
    for seed in (0, 1):
        (tmp_path / str(seed)).mkdir()
        book = opened(tmp_path / str(seed), seed=seed)
        assert given(book, 2)[1] == defaults(SPACE)
        second.append(given(book, 2)[1])
    assert second[0] != second[1]


def test_outcomes_come_back_as_they_were_entered(tmp_path: Path) -> None:
    outcomes = {
        0: Outcome("complete", (0.25, 0.5), 1.25, 2, 3.5),
        1: Outcome("stopped", (0.125,), 2.0, 1, 0.5),
        2: Outcome("failed", (0.5,), seconds=1.5, reason="ValueError: no"),
    }
    book = opened(tmp_path)
    for number, outcome in outcomes.items():
        given(book, 3)
        book.finish(number, outcome)
    records = opened(tmp_path).finished()
    assert {r.number: r.outcome for r in records} == outcomes
    assert [r.value for r in records] == [0.5, 0.125, None]


def test_a_finished_trial_cannot_be_finished_again(tmp_path: Path) -> None:
    book = opened(tmp_path)
    given(book, 1)
    book.finish(0, Outcome("complete", (0.5,)))
    with pytest.raises(Exception, match="has already finished"):
        book.finish(0, Outcome("complete", (0.9,)))
    assert opened(tmp_path).finished()[0].value == 0.5


def test_a_ledger_that_was_never_published_is_begun_again(tmp_path: Path) -> None:
    (tmp_path / f".{FILE}").write_bytes(b"half a database")
    assert given(opened(tmp_path), 1)[0] == 0
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_a_ledger_of_other_data_is_refused(tmp_path: Path) -> None:
    opened(tmp_path).close()
    with pytest.raises(UsageError, match="was searched on other data; use --overwrite"):
        opened(tmp_path, subject="dataset 2")


@pytest.mark.parametrize("name", ["a b", "50%", "what?", "a#b", "ü", "a:b@c"])
def test_the_folder_may_have_any_name(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    folder.mkdir()
    searched(folder, 1)
    assert [path.name for path in folder.iterdir()] == [FILE]
    assert len(opened(folder).finished()) == 1


def records(*outcomes: Outcome) -> list[Record]:
    return [Record(number, {}, outcome) for number, outcome in enumerate(outcomes)]


def test_the_winner_was_trained_in_full_and_ties_go_to_the_lower_loss_then_the_earlier() -> None:
    complete, stopped = Outcome("complete", (0.1, 0.7), 0.9), Outcome("stopped", (0.99,), 0.1)
    failed, closer = Outcome("failed", (0.99,)), Outcome("complete", (0.7,), 0.8)
    best = best_of(records(complete, stopped, failed, closer, closer))
    assert best is not None and best.number == 3
    only = best_of(records(failed, stopped))
    assert only is not None and only.number == 1
    assert best_of(records(failed)) is None
    ranked = by_rank(records(failed, stopped, complete, closer, Outcome("complete", (0.2,), 0.1)))
    assert [r.number for r in ranked] == [3, 2, 4, 1, 0]
