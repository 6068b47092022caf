"""A protocol in words: what is said is what was done."""

from __future__ import annotations

import re
from typing import Any

import pytest

from training.configs import TransferConfig
from training.protocol import in_words


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
