"""The checklists: no item is missing, none is filled without a fact, none is blank with one."""

from __future__ import annotations

from pathlib import Path

import pytest

from training import report
from training.checklist import BLANK, CLAIM, FACTS, LISTS, TRIPOD_AI, Item, checklist_section


def answers(facts: dict[str, str]) -> dict[tuple[str, str], object]:
    """(list, item number) -> the cell of its answer."""
    tables = [block for block in checklist_section(facts).blocks if isinstance(block, report.Table)]
    return {(t.caption, str(row[0])): row[-1] for t in tables for row in t.rows}


def everything() -> list[tuple[str, Item]]:
    return [(name, item) for name, items in LISTS.items() for item in items]


def test_the_numbers_are_those_of_the_guidelines() -> None:
    assert [item.number for item in CLAIM] == [str(n) for n in range(1, 45)]
    parts = {
        3: "abc",
        5: "ab",
        6: "abc",
        8: "abc",
        9: "abc",
        12: "abcdefg",
        18: "abcdef",
        20: "abc",
        23: "ab",
        27: "abc",
    }
    expected = [f"{n}{letter}" for n in range(1, 28) for letter in parts.get(n, " ")]
    assert [item.number for item in TRIPOD_AI] == [number.strip() for number in expected]


def test_without_facts_every_item_stands_there_blank() -> None:
    found = answers({})
    assert set(found) == {(name, item.number) for name, item in everything()}
    assert set(map(id, found.values())) == {id(BLANK)}


@pytest.mark.parametrize("fact", sorted(FACTS))
def test_a_fact_fills_the_items_that_ask_for_it_and_no_other(fact: str) -> None:
    found = answers({fact: "the answer"})
    asking = {(name, item.number) for name, item in everything() if fact in item.facts}
    assert asking, "no item asks for it"
    assert {key for key, cell in found.items() if cell == "Reported: the answer"} == asking
    assert all(cell is BLANK for key, cell in found.items() if key not in asking)


def test_an_item_that_asks_for_facts_that_do_not_exist_would_be_found() -> None:
    assert {fact for _, item in everything() for fact in item.facts} == set(FACTS)


def test_an_empty_fact_is_no_answer_and_an_unknown_one_is_refused() -> None:
    assert answers({"results": ""}) == answers({})
    with pytest.raises(ValueError, match="facts resutls: no such fact"):
        checklist_section({"resutls": "0.9"})


def test_blank_cells_are_marked_in_the_page_and_counted_in_words(tmp_path: Path) -> None:
    section = checklist_section({"results": "<b>0.9</b>"})
    report.write_report(tmp_path / "report.html", title="T", sections=[section])
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    total = len(CLAIM) + len(TRIPOD_AI)
    assert html.count('<span class="blank">to be filled by the authors</span>') == total - 2
    assert f"to 2; the other {total - 2} are for the authors" in html
    assert "<b>" not in html and "&lt;b&gt;0.9" in html
