"""The search space is plain data that `transfer` accepts, with its defaults inside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace

import pytest

from cluster.errors import UsageError
from training.configs import TransferConfig
from training.tasks.finetune import PRETRAINED_LAYER_DECAY
from tuning.configs import FIXED, TuneConfig
from tuning.spaces import STUDIES, Range, defaults, space_for, suggestion

RANGES = [
    (study, name, setting)
    for study, space in STUDIES.items()
    for name, setting in space.items()
    if isinstance(setting, Range)
]


@pytest.mark.parametrize(("study", "name", "range"), RANGES)
def test_a_range_holds_its_default_and_transfer_accepts_its_ends(study: str, name: str, range: Range) -> None:
    default = defaults({name: replace(range, when=None)})[name]
    assert isinstance(default, float)
    assert range.low < range.high
    assert range.low <= default <= range.high
    assert not range.log or range.low > 0
    for value in (range.low, range.high):
        beside = dict([range.when]) if range.when else {}
        changed = TuneConfig(data="d", out="o", study=study).trial({**beside, name: value})
        found = changed.as_dict()[name]
        assert (found[-1] if name == "level_weights" else found) == value


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
    judged = {"by", "prevalence", "searched_on"}
    frozen = {"features", "layers"}
    metric = {"loss", "embedding", "margin", "centres", "steps"}  # of --task metric, which no study searches
    hierarchy = {"structure", "level_weights", "stack", "inputs", "learner", "input_column"}  # a study of its own
    preset = {"modality"}  # decides min_crop and jitter, which are searched
    views = {"tta"}  # of the judgement, not of the training: trials are judged in one
    names = {field.name for field in fields(TransferConfig)}
    tasks = frozen | metric | hierarchy | preset | views
    assert set(STUDIES["transfer"]) | set(FIXED) | run | splits | labels | judged | tasks == names
    assert set(STUDIES["transfer"]).isdisjoint(FIXED)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trials": 0}, "--trials 0: needs at least 1, which is the defaults"),
        (
            {"study": "transfr"},
            r"--study transfr: no such study \(known: transfer, hierarchical\). Did you mean 'transfer'\?",
        ),
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


class Scripted:
    """An Optuna trial that says what it is told to, and notes what it was asked."""

    def __init__(self, **said: float | str) -> None:
        self.said, self.asked = said, list[str]()

    def suggest_float(self, name: str, low: float, high: float, *, log: bool) -> float:
        self.asked.append(name)
        return float(self.said.get(name, low))

    def suggest_categorical(self, name: str, choices: Sequence[str]) -> str:
        self.asked.append(name)
        return str(self.said.get(name, choices[0]))


def test_weights_of_levels_are_searched_only_where_there_is_one_loss_of_all() -> None:
    space = space_for("hierarchical", pretrained_vit=False)
    for structure in ("flat", "joint"):
        trial = Scripted(structure=structure, level_weights=2.0)
        found = suggestion(space, trial)
        assert ("level_weights" in found) == ("level_weights" in trial.asked) == (structure == "joint")
    config = TuneConfig(data="d", out="o", study="hierarchical").trial(found)
    assert (config.task, config.learner, config.level_weights) == ("hierarchical", "features", (1.0, 2.0))


def test_inputs_and_first_weights_are_searched_only_where_there_are_several() -> None:
    plain = TuneConfig(data="d", out="o", study="hierarchical")
    assert not {"init", "inputs"} & set(space_for("hierarchical", pretrained_vit=False, given=plain.given))
    more = TuneConfig(data="d", out="o", study="hierarchical", inits=("none",), inputs=("oct", "fundus"))
    space = space_for("hierarchical", pretrained_vit=False, given=more.given)
    first = defaults(space)
    assert (first["init"], first["inputs"], first["structure"]) == ("imagenet", "oct fundus", "transferred")
    assert more.trial(first).inputs == ("oct", "fundus") and more.trial(first).unit == "case"
    assert more.trial({**first, "inputs": "oct", "init": "none"}).inputs == ("oct",)
    with pytest.raises(UsageError, match=r"--inputs .*: needs --study hierarchical"):
        TuneConfig(data="d", out="o", inputs=("oct", "fundus"))
