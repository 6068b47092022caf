"""Files that grow as numbered parts, in a folder and on an object store."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster import parts, storage
from cluster.parts import Parts
from tests.s3 import Store


@pytest.fixture(params=["folder", "store"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where a run is: below a path, below a URI."""
    if request.param == "folder":
        return str(tmp_path / "run")
    store: Store = request.getfixturevalue("s3")
    return f"{store.bucket}/run"


def test_what_was_appended_is_read_back_in_order(place: str) -> None:
    log = Parts(place, "metrics.jsonl")
    lines = [f"line {number} \udcff\n" for number in range(12)]
    for line in lines:
        log.append(line)
        assert log.read().endswith(line)
    assert log.read() == parts.read(f"{place}/metrics.jsonl.parts") == "".join(lines)


def test_nothing_is_there_before_the_first_writer(place: str) -> None:
    assert parts.read(storage.join(place, "metrics.jsonl.parts")) == ""


def test_a_given_up_writer_neither_overwrites_nor_follows_the_next_one(place: str) -> None:
    orphan = Parts(place, "log")
    orphan.append("a")
    heir = Parts(place, "log")
    heir.append("c")
    orphan.append("b")
    heir.append("d")
    assert heir.read() == "abcd"


def test_a_writer_that_wrote_nothing_yet_has_a_generation_too(place: str) -> None:
    orphan = Parts(place, "log")
    heir = Parts(place, "log")
    heir.append("new")
    orphan.append("old")
    assert (orphan.generation, heir.generation) == (1, 2)
    assert heir.read() == "oldnew"


def test_other_files_in_the_folder_are_no_parts(place: str) -> None:
    log = Parts(place, "log")
    log.append("text")
    for name in ("999999-999999.tmp", "notes", "1-1"):
        storage.write_text(storage.join(log.uri, name), "no part")
    assert log.read() == "text"
    assert Parts(place, "log").generation == 2


def test_names_are_padded_so_that_their_order_is_the_order_of_the_text(place: str) -> None:
    Parts(place, "log").append("text")
    assert storage.list_names(f"{place}/log.parts") == ["000001-000000", "000001-000001"]
