"""Trials of the study of hierarchies: what one reports, and what it cannot see."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pytest
import yaml

from cluster.errors import UsageError
from training.dataset import Dataset, Selection
from training.fit import Labels
from training.tasks.inputs import Inputs, inputs_of, one_input
from tuning.configs import TuneConfig
from tuning.hierarchical import HierarchicalBench, chosen_inputs, final_fit, search_bench
from tuning.ledger import Outcome, Record
from tuning.report import write_best
from tuning.spaces import defaults, space_for
from tuning.study import Search
from tuning.trial import split_sides

CLASSES = ("healthy", "ill/early", "ill/late")
CASES = 48
PASSED = Outcome("complete", (0.9,))


def benches(inputs: tuple[str, ...] = ()) -> tuple[HierarchicalBench, HierarchicalBench]:
    """(that of the trials, that of the last judgement) of 48 cases of two rows, each of another patient."""
    rng = np.random.default_rng(0)
    case = np.repeat(np.arange(CASES), 2)
    truth = case % 3
    names, groups = [CLASSES[t] for t in truth], [f"p{c}" for c in case]
    features = (np.eye(6)[truth] * 2 + rng.normal(0, 0.6, (len(truth), 6))).astype(np.float32)
    sides = split_sides(names, groups, holdout=0.25, seed=0)
    found = Inputs(inputs, np.arange(len(case)) % 2, case) if inputs else one_input(len(case))
    config = TuneConfig(data="d", out="o", study="hierarchical", epochs=60, inputs=inputs, inits=("none",))
    shown = {"imagenet": features, "none": rng.normal(size=features.shape).astype(np.float32)}
    whole = HierarchicalBench(
        config, shown, Labels(truth, names, groups, "group"), found, CLASSES, sides.search, sides.held_out
    )
    return search_bench(whole, sides), whole


def reports(bench: HierarchicalBench, **params: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    given = defaults(space_for("hierarchical", pretrained_vit=False, given=bench.config.given))
    bench.run(given | params, found.append)
    return found


def test_a_trial_reports_once_and_good_features_beat_noise() -> None:
    bench, _ = benches()
    (good,) = reports(bench, weight_decay=0.001)  # six features need less of it than a thousand
    assert (good["epoch"], good["value"]) == (60, pytest.approx(1.0, abs=0.15))
    assert good["held_loss"] > 0 and good["best_epoch"] >= 1
    (noise,) = reports(bench, init="none", weight_decay=0.001)
    assert noise["value"] < good["value"] - 0.3


@pytest.mark.parametrize("changes", [{"structure": "joint", "level_weights": 2.0}, {"stack": "logistic"}, {"lr": 1e-4}])
def test_every_setting_changes_what_is_learnt(changes: dict[str, Any]) -> None:
    bench, _ = benches()
    assert reports(bench, **changes)[0]["held_loss"] != reports(bench)[0]["held_loss"]


def test_an_error_is_the_only_report() -> None:
    bench, _ = benches()
    (said,) = reports(bench, stack="none", label_smoothing=float("nan"), init="strange")
    assert "KeyError" in said["failed"] and np.isnan(said["value"])


def test_trials_are_given_the_rows_of_the_search_alone() -> None:
    bench, whole = benches()
    assert len(bench.labels.truth) == len(whole.train)
    np.testing.assert_array_equal(bench.features["imagenet"], whole.features["imagenet"][whole.train])
    assert not {whole.labels.groups[row] for row in whole.judged} & set(bench.labels.groups)
    assert sorted([*bench.train, *bench.judged]) == list(range(len(whole.train)))


def test_all_choices_of_inputs_are_judged_on_the_same_cases() -> None:
    bench, whole = benches(("oct", "fundus"))
    assert len(bench.standing) == len(bench.judged) / 2
    for chosen in ("oct fundus", "fundus"):
        assert len(final_fit(whole, {"inputs": chosen})) == len(whole.standing)
    alone = chosen_inputs(bench.inputs, ("fundus",))
    assert set(alone.of_row[bench.inputs.of_row == 0]) == {-1}
    assert set(alone.of_row[bench.inputs.of_row == 1]) == {0}


# What a search is begun on


def search(**changes: list[str]) -> Search:
    """That of 48 cases of two images, `oct` and `fundus`, each of another patient; `changes` are columns."""
    case = np.repeat(np.arange(CASES), 2)
    columns: dict[str, Any] = {"label": [CLASSES[c % 3] for c in case], "group": [f"p{c}" for c in case]}
    columns |= {"case": [f"c{c}" for c in case], "modality": ["oct", "fundus"] * CASES}
    columns["device"] = ["oct", "camera"] * CASES
    config = TuneConfig(data="d", out="o", study="hierarchical", inputs=("oct", "fundus"))
    return Search(config, Dataset("/nowhere", {}), Selection(pa.table(columns | changes)), cast(Any, None))


def test_a_case_that_lies_in_two_groups_is_refused_as_transfer_refuses_it() -> None:
    named = [f"c{row // 2}" for row in range(2 * CASES)]
    assert len(search().sides.held_out)
    with pytest.raises(UsageError, match="case 'c0' lies in the groups p0, p3: a case must be of one patient"):
        search(case=[*named[:6], "c0", *named[7:]])


def test_weights_of_levels_are_not_searched_of_classes_of_one_level_for_transfer_refuses_them() -> None:
    flat = [name.replace("/", " ") for name in search().selection.column("label")]
    assert "level_weights" in search().space_of(pretrained_vit=False)
    assert "level_weights" not in search(label=flat).space_of(pretrained_vit=False)


def test_a_winner_of_one_input_says_in_which_column_it_is_found(tmp_path: Path) -> None:
    """Of `oct` and `fundus` one column tells, of `oct` alone two do."""
    made = search()
    write_best(tmp_path / "best.yaml", made.config, Record(1, {"inputs": "oct"}, PASSED), "of it", made.input_column)
    best = yaml.safe_load((tmp_path / "best.yaml").read_text())
    assert (best["inputs"], best["unit"]) == (["oct"], "case")
    table = made.selection.table
    assert inputs_of(table, best["inputs"], best["input_column"]).of_row.tolist() == [0, -1] * CASES
    with pytest.raises(UsageError, match="the columns modality, device all have these values"):
        inputs_of(table, best["inputs"])
