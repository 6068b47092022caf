"""Out-of-fold predictions: read from a RUN, aligned with another's, refused where they are not of the same rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from cluster.errors import UsageError
from training.predictions import aligned, read_predictions

Columns = dict[str, Any]
CONFIG = {"verb": "transfer", "data": "d", "where": [], "split": "group", "folds": 3, "repeats": 2, "seed": 0}
CLASSES = ["a", "b"]


def columns(seed: int = 0) -> Columns:
    """12 images of 6 groups, each judged in both repeats."""
    at = np.tile(np.arange(12), 2)
    p = np.random.default_rng(seed).random(24)
    repeat = np.repeat([0, 1], 12)
    return {
        "image_id": [f"i{i}" for i in at],
        "group": [f"g{i // 2}" for i in at],
        "case": [""] * 24,
        "repeat": repeat,
        "fold": (at // 2 + repeat) % 3,
        "truth": [CLASSES[i % 2] for i in at],
        "a": p,
        "b": 1 - p,
    }


def run_of(folder: Path, values: Columns, **config: Any) -> str:
    """What `transfer` leaves of its predictions, at `folder`."""
    (folder / "model").mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG | config, sort_keys=False))
    classes = sorted({*CLASSES, *(name for name in values if len(name) == 1)} & set(values))
    protocol = {"split": "group", "folds": 3, "repeats": int(max(values["repeat"])) + 1, "groups": 6}
    (folder / "summary.json").write_text(json.dumps({"protocol": protocol, "classes": classes}))
    pq.write_table(pa.table(values), folder / "predictions.parquet")
    return str(folder)


def test_rows_in_another_order_are_brought_into_ours(tmp_path: Path) -> None:
    values = columns()
    order = np.random.default_rng(1).permutation(24)
    shuffled = {name: np.asarray(column)[order] for name, column in reversed(values.items())}
    ours, theirs = read_predictions(run_of(tmp_path / "x", values)), read_predictions(run_of(tmp_path / "y", shuffled))
    assert not np.array_equal(theirs.probabilities, ours.probabilities)
    np.testing.assert_array_equal(aligned(ours, theirs), ours.probabilities)
    np.testing.assert_array_equal(ours.truth, np.arange(24) % 2)


def test_the_model_folder_names_its_run(tmp_path: Path) -> None:
    run = run_of(tmp_path / "x", columns())
    assert read_predictions(f"{run}/model").table == read_predictions(run).table


def _without_an_image(v: Columns) -> Columns:
    keep = [i for i, image in enumerate(v["image_id"]) if image != "i3"]
    return {name: [column[i] for i in keep] for name, column in v.items()}


def _one_repeat(v: Columns) -> Columns:
    return {name: column[:12] for name, column in v.items()}


CHANGES: dict[str, tuple[Callable[[Columns], Columns], Columns, str, str]] = {
    "folds": (
        lambda v: v | {"fold": (np.asarray(v["fold"]) + 1) % 3},
        {"seed": 1},
        "24 of 24 judgements have other folds",
        "make --seed (1 and 0) equal",
    ),
    "images": (
        _without_an_image,
        {"where": ["sex=f"]},
        "judge other images (1 only in",
        "make --where (['sex=f'] and [])",
    ),
    "repeats": (_one_repeat, {"repeats": 1}, "they have 1 and 2 repeats", "make --repeats (1 and 2) equal"),
    "labels": (
        lambda v: v | {"truth": ["a"] * 24},
        {},
        "12 of 24 judgements have other labels",
        "the DATASET behind --data",
    ),
    "groups": (
        lambda v: v | {"group": ["g"] * 24},
        {"data": "e", "seed": 2},
        "24 of 24 judgements have other groups",
        "make --data (e and d) and --seed (2 and 0) equal",
    ),
    "classes": (lambda v: v | {"c": np.zeros(24)}, {}, "their classes differ (only", "has 'c'"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_differs_is_refused_in_one_line_that_says_how_to_mend_it(tmp_path: Path, what: str) -> None:
    change, config, said, advice = CHANGES[what]
    ours = read_predictions(run_of(tmp_path / "x", columns()))
    theirs = read_predictions(run_of(tmp_path / "y", change(columns()), **config))
    with pytest.raises(UsageError) as caught:
        aligned(ours, theirs)
    assert said in str(caught.value) and advice in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_what_is_no_finished_run_of_transfer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not a RUN of transfer"):
        read_predictions(run_of(tmp_path / "evaluation", columns(), verb="evaluate"))
    with pytest.raises(UsageError, match="not a RUN of transfer"):
        read_predictions(str(tmp_path / "nothing"))
    (Path(run_of(tmp_path / "cut", columns())) / "summary.json").unlink()
    with pytest.raises(UsageError, match="has not finished"):
        read_predictions(str(tmp_path / "cut"))
    with pytest.raises(UsageError, match=r"label 'a\|b' is no single class; give RUNs of one label per image"):
        read_predictions(run_of(tmp_path / "several", columns() | {"truth": ["a|b"] * 24}))
