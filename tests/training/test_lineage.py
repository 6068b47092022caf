"""What a model has seen: kept as hashes, found again, and inherited."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from safetensors.numpy import load_file, save_file

from cluster.errors import UsageError
from training.artifact import ModelCard, save_model
from training.dataset import Dataset, Selection
from training.encoder import Architecture
from training.images import ImagePath
from training.lineage import SEEN, dump, labelled_by, named_by, own_groups, own_images, seen_by
from training.transfer import refuse_taught
from training.transform import Input


def digests(*texts: str) -> list[str]:
    return [hashlib.sha256(text.encode()).hexdigest() for text in texts]


def selection(*texts: str) -> Selection:
    return Selection(pa.table({"sha256": pa.array(digests(*texts), pa.string())}))


def save_run(
    run: Path, seen: frozenset[str], labelled: frozenset[str] = frozenset(), lineage: dict[str, Any] | None = None
) -> Path:
    card = ModelCard(
        Architecture("test_efficientnet", 16, 16, 3),
        ImagePath(16, 16),
        Input(16, 16, 3, (0.5,) * 3, (0.5,) * 3),
        lineage=lineage or {},
    )
    save_model(run / "model", card, card.architecture.build(), seen=seen, labelled=labelled)
    return run


def test_hashes_survive_the_model_s_file(tmp_path: Path) -> None:
    seen = own_images(selection("one", "two", "three"))
    run = save_run(tmp_path, seen)
    assert seen_by(str(run)) == seen_by(str(run / "model")) == seen
    assert own_images(selection("two")) <= seen_by(str(run))
    assert not own_images(selection("four")) & seen_by(str(run))


def test_the_weights_file_of_a_run_has_seen_what_the_run_has(tmp_path: Path) -> None:
    seen = own_images(selection("one", "two"))
    run = save_run(tmp_path, seen)
    assert seen_by(str(run / "model" / "model.safetensors")) == seen


def test_a_model_that_has_seen_nothing_says_so(tmp_path: Path) -> None:
    assert seen_by(str(save_run(tmp_path, frozenset()))) == frozenset()


def test_what_is_no_run_has_seen_nothing_of_ours(tmp_path: Path) -> None:
    for init in ("imagenet", "none", "timm:test_vit", str(tmp_path), str(tmp_path / "gone")):
        assert seen_by(init) == frozenset()


def test_the_file_does_not_depend_on_the_order(tmp_path: Path) -> None:
    names = sorted(own_images(selection(*map(str, range(50)))))
    assert dump(names) == dump(reversed(names)) == dump(iter(names))
    (tmp_path / SEEN).write_bytes(dump(names))
    assert seen_by(str(tmp_path)) == frozenset(names)


def test_two_datasets_add_up(tmp_path: Path) -> None:
    first = save_run(tmp_path / "first", own_images(selection("a", "b")))
    second = save_run(tmp_path / "second", own_images(selection("b", "c")) | seen_by(str(first)))
    assert seen_by(str(second)) == own_images(selection("a", "b", "c"))


def test_images_seen_with_their_labels_are_told_from_the_others(tmp_path: Path) -> None:
    run = save_run(tmp_path, own_images(selection("a", "b", "c")), own_images(selection("b")))
    assert labelled_by(str(run)) == labelled_by(str(run / "model")) == own_images(selection("b"))
    assert seen_by(str(run)) == own_images(selection("a", "b", "c"))
    assert labelled_by("imagenet") == frozenset()


def test_groups_are_kept_as_hashes_of_their_names_and_those_that_nobody_named_are_not(tmp_path: Path) -> None:
    groups = own_groups(Selection(pa.table({"group": ["ann", "bob", "ann", "image:1f"]})))
    assert groups == {digest[:32] for digest in digests("ann", "bob")}
    (tmp_path / SEEN).write_bytes(dump((), groups=sorted(groups)))
    assert named_by(str(tmp_path)) == groups and seen_by(str(tmp_path)) == frozenset()
    assert dump((), groups=sorted(groups)) == dump((), groups=sorted(groups, reverse=True))


@pytest.mark.parametrize(
    ("lineage", "counts"),
    [
        ({"verb": "pretrain", "initial": {"init": "none"}}, False),
        ({"verb": "transfer", "task": "svm", "initial": {"init": "imagenet"}}, False),
        ({"verb": "transfer", "task": "finetune", "initial": {"init": "none"}}, True),
        ({"verb": "pretrain", "initial": {"lineage": {"verb": "transfer", "task": "finetune"}}}, True),
    ],
)
def test_an_older_model_counts_all_its_images_where_labels_trained_its_network(
    tmp_path: Path, lineage: dict[str, Any], counts: bool
) -> None:
    seen = own_images(selection("a", "b"))
    run = save_run(tmp_path, seen, lineage=lineage)
    file = run / "model" / SEEN
    save_file({"sha256": load_file(file)["sha256"]}, file)
    assert labelled_by(str(run)) == (seen if counts else frozenset())
    assert seen_by(str(run)) == seen


def test_weights_that_learnt_labels_of_judged_groups_are_refused_and_those_that_saw_images_alone_are_not(
    tmp_path: Path,
) -> None:
    known = digests("a", "b", "c")
    manifest = pa.table({"sha256": known, "group": ["ann", "ann", "bob"]})
    dataset, judged = Dataset("/nowhere", {}), Selection(manifest.slice(1, 2))
    dataset.__dict__["manifest"] = manifest
    for name, labelled in (("taught", known[:1]), ("shown", known[:0])):  # image a is of ann, whose image b is judged
        (tmp_path / name / "model").mkdir(parents=True)
        kept = dump((d[:32] for d in known), (d[:32] for d in labelled))
        (tmp_path / name / "model" / SEEN).write_bytes(kept)
    refuse_taught(str(tmp_path / "shown"), dataset, judged)
    refuse_taught("imagenet", dataset, judged)
    with pytest.raises(
        UsageError, match=r"labels of 1 of the groups that are judged here, such as 'ann'.*leak"
    ) as caught:
        refuse_taught(str(tmp_path / "taught"), dataset, judged)
    assert len(str(caught.value).splitlines()) == 1
