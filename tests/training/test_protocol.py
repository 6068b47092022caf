"""A protocol in words: what is said is what was done. And the folds of a column of sites."""

from __future__ import annotations

import re
from typing import Any

import pyarrow as pa
import pytest

from cluster.errors import UsageError
from training.configs import TransferConfig
from training.dataset import Selection
from training.protocol import folds_for, in_words


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"repeats": 3, "folds": 4}, "3 x 4-fold cross-validation, stratified by class, no group"),
        ({"split": "image"}, "split image by image"),
        ({"split": "site", "site_column": "hospital"}, r"One site \(hospital\) after the other is left out"),
        ({"split": "holdout", "test_fraction": 0.3, "repeats": 2}, "2 x a share of 30% of the groups held out"),
    ],
)
def test_each_protocol_is_told_with_its_own_numbers(flags: dict[str, Any], said: str) -> None:
    words = in_words(TransferConfig("data", out="run", **flags).as_dict())
    assert re.search(said, words)
    assert ("fold" in words) == (flags.get("split", "group") in {"group", "image"})


def test_sites_are_the_values_of_the_column_that_was_named_and_each_row_needs_one() -> None:
    names, groups = ["a", "b", "a", "b"], ["g0", "g1", "g2", "g3"]

    def folds(column: str, values: list[Any]) -> list[tuple[list[int], list[int]]]:
        config = TransferConfig("data", out="run", split="site", site_column=column)
        found = folds_for(config, names, groups, Selection(pa.table({"hospital": values})))
        return [(fold.train.tolist(), fold.test.tolist()) for fold in found]

    assert folds("hospital", [2, 2, 1, 1]) == [([0, 1], [2, 3]), ([2, 3], [0, 1])]
    with pytest.raises(UsageError, match=r"--site-column hopital: no such column. Did you mean 'hospital'\?"):
        folds("hopital", [1, 1, 2, 2])
    with pytest.raises(UsageError, match="1 of 4 labelled images have no site"):
        folds("hospital", ["x", None, "y", "y"])
