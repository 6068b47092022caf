"""Images that models have seen, and new images of patients that they have: refused, allowed and told. By hand."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pyarrow as pa
import pytest

from cluster.errors import UsageError
from training import report
from training.dataset import Selection
from training.lineage import SEEN, dump, named_by, own_groups, own_images
from training.novelty import Seen, blocks, known_of, require_new


def digest_of(image: str) -> str:
    return hashlib.sha256(image.encode()).hexdigest()


def rows(*pairs: str) -> pa.Table:
    """A table of `image group` pairs."""
    split = [pair.split(" ") for pair in pairs]
    return pa.table({"sha256": [digest_of(image) for image, _ in split], "group": [group for _, group in split]})


def run_of(folder: Path, table: pa.Table, *, named: bool = True) -> str:
    """A RUN that was trained on the rows of a table; without `named` as older code left it."""
    (folder / "model").mkdir(parents=True)
    groups = own_groups(Selection(table)) if named else frozenset[str]()
    (folder / "model" / SEEN).write_bytes(dump(own_images(Selection(table)), groups=groups))
    return str(folder)


MANIFEST = rows("a ann", "b ann", "c bob", "d cid", "e image:e")


def test_new_images_of_patients_of_the_training_are_refused_and_counted_where_they_are_allowed(tmp_path: Path) -> None:
    run, judged = run_of(tmp_path / "run", rows("a ann", "c bob")), Selection(MANIFEST.slice(1, 4))
    with pytest.raises(UsageError) as caught:
        require_new("DATA", judged, MANIFEST, [run])
    said = str(caught.value).splitlines()
    assert said[0] == (
        f"DATA: 1 of 4 images were seen in the (pre)training of {run}, and 1 more are of groups (patients, slides) of "
        "which it saw other images, such as 'ann', so the figures would be too good"
    )
    assert len(said) == 2 and "--allow-seen" in said[1]
    found = require_new("DATA", judged, MANIFEST, [run], allow_seen=True)
    assert found == Seen(images=1, relatives=1, groups=2, example="ann", namesakes=0)
    (warning,) = blocks(found)
    assert isinstance(warning, report.Warning)
    assert "1 of these images and 1 others of groups (patients, slides) of which an image was seen" in warning.text


def test_relatives_alone_are_reason_enough(tmp_path: Path) -> None:
    run, judged = run_of(tmp_path / "run", rows("a ann")), Selection(MANIFEST.slice(1, 3))
    with pytest.raises(UsageError, match=r"DATA: 0 of 3 images were seen .*, but 1 are of groups .* such as 'ann'"):
        require_new("DATA", judged, MANIFEST, [run])


def test_each_model_is_asked_and_all_of_them_are_told(tmp_path: Path) -> None:
    first, second = run_of(tmp_path / "first", rows("z zoe")), run_of(tmp_path / "second", rows("d cid"))
    with pytest.raises(UsageError, match=f"training of {second}"):
        require_new("DATA", Selection(MANIFEST), MANIFEST, [first, second])
    found = require_new("DATA", Selection(MANIFEST), MANIFEST, [first, second], allow_seen=True)
    assert (found.images, found.relatives, found.groups) == (1, 0, 1)


def test_groups_of_other_data_that_are_called_alike_are_warned_of_and_not_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_of(tmp_path / "run", rows("x ann", "y zoe", "z image:e"))
    found = require_new("DATA", Selection(MANIFEST), MANIFEST, [run])
    assert (found.any, found.namesakes) == (False, 1)
    assert "warning: 1 groups of DATA are called as groups of a model's training are" in capsys.readouterr().err
    (warning,) = blocks(found)
    assert isinstance(warning, report.Warning) and "if they are the same patients" in warning.text


def test_a_model_of_older_code_keeps_no_names_so_nothing_is_said_of_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_of(tmp_path / "run", rows("x ann"), named=False)
    assert named_by(run) == named_by("imagenet") == frozenset()
    assert require_new("DATA", Selection(MANIFEST), MANIFEST, [run]) == Seen(0, 0, 0, "", 0)
    assert not capsys.readouterr().err and blocks(Seen(0, 0, 0, "", 0)) == []


def test_a_group_that_is_known_by_its_images_is_no_namesake_as_well() -> None:
    judged = Selection(MANIFEST)
    names = own_groups(Selection(rows("a ann", "x bob")))
    assert known_of(judged, MANIFEST, {digest_of("a")[:32]}, names) == Seen(1, 1, 1, "ann", 1)
