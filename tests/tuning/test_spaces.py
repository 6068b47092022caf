"""The search space is plain data that `transfer` accepts, with its defaults inside."""

from __future__ import annotations

from dataclasses import fields

import pytest

from cluster.errors import UsageError
from training.configs import TransferConfig
from training.tasks.finetune import PRETRAINED_LAYER_DECAY
from tuning.configs import FIXED, TuneConfig
from tuning.spaces import STUDIES, Range, defaults, space_for

RANGES = [(study, name, range) for study, space in STUDIES.items() for name, range in space.items()]


@pytest.mark.parametrize(("study", "name", "range"), RANGES)
def test_a_range_holds_its_default_and_transfer_accepts_its_ends(study: str, name: str, range: Range) -> None:
    (default,) = defaults({name: range}).values()
    assert range.low < range.high
    assert range.low <= default <= range.high
    assert not range.log or range.low > 0
    for value in (range.low, range.high):
        changed = TuneConfig(data="d", out="o", study=study).trial({name: value})
        assert changed.as_dict()[name] == value


def test_the_defaults_are_those_of_transfer() -> None:
    plain = TransferConfig("d", out="o").as_dict()
    found = defaults(STUDIES["transfer"])
    assert found.pop("layer_decay") == PRETRAINED_LAYER_DECAY
    assert found == {name: plain[name] for name in found}
    assert TuneConfig(data="d", out="o").trial({}) == TransferConfig("d", out="o")


def test_layer_decay_is_searched_only_where_it_means_something() -> None:
    assert set(space_for("transfer", pretrained_vit=True)) == set(STUDIES["transfer"])
    assert set(STUDIES["transfer"]) - set(space_for("transfer", pretrained_vit=False)) == {"layer_decay"}


def test_a_field_of_transfer_is_searched_fixed_or_its_own_affair() -> None:
    """A new field of `transfer` must be thought about here."""
    run = {"data", "out", "task", "workers", "images", "overwrite", "stages"}
    splits = {"folds", "repeats", "split", "test_fraction", "site_column", "label_fraction"}
    labels = {"multi_label", "order", "unit", "pooling"}  # trials choose by one class per image
    judged = {"by", "prevalence"}
    frozen = {"features", "layers"}
    metric = {"loss", "embedding", "margin", "centres", "steps"}  # of --task metric, which no study searches
    preset = {"modality"}  # decides min_crop and jitter, which are searched
    names = {field.name for field in fields(TransferConfig)}
    known = set(STUDIES["transfer"]) | set(FIXED) | run | splits | labels | judged | frozen | metric | preset
    assert known == names
    assert set(STUDIES["transfer"]).isdisjoint(FIXED)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trials": 0}, "--trials 0: needs at least 1, which is the defaults"),
        ({"study": "transfr"}, r"--study transfr: no such study \(known: transfer\). Did you mean 'transfer'\?"),
        ({"holdout": 0.0}, "--holdout 0.0: must lie above 0"),
        ({"holdout": 0.6}, "--holdout 0.6: .* at most 0.5"),
        ({"epochs": 0}, "--epochs 0: must be at least 1"),
        ({"batch_size": 1}, "--batch-size 1: must be at least 2"),
    ],
)
def test_a_flag_that_cannot_be_right_is_refused_in_one_line(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        TuneConfig(data="d", out="o", **changes)  # type: ignore[arg-type]
    assert len(str(caught.value).splitlines()) == 1
