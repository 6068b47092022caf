"""What is said of a result's limits: each sentence if, and only if, there is reason for it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from training.limits import Known, limits_of, sites_in


def metrics(**intervals: tuple[float, float]) -> dict[str, Any]:
    return {name: {"value": sum(ci) / 2, "ci95": list(ci), "per_fold": []} for name, ci in intervals.items()}


SOUND = Known(
    split="group",
    images={"a": 200, "b": 150},
    class_groups={"a": 80, "b": 60},
    groups=140,
    metrics=metrics(balanced_accuracy=(0.7, 0.8), ece=(0.01, 0.04)),
    guessing={"balanced_accuracy": 0.5},
    sites=("site", 3),
)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"split": "image"}, "Split by image"),
        ({"ungrouped": 7}, "7 labelled images came without a group"),
        ({"shared": 350}, "transductive"),
        ({"searched": "here"}, "labels of images that are judged here had a say"),
        ({"searched": "elsewhere"}, "on another version of a data set"),
        ({"groups": 29}, "Only 29 groups"),
        ({"class_groups": {"a": 80, "b": 19}}, "Few groups in b (19)"),
        ({"images": {"a": 2000, "b": 150}}, "13 times the images"),
        ({"sites": None}, "Nothing says that these images come from more than one site"),
        ({"sites": ("site", 1)}, "Nothing says that these images come from more than one site"),
        ({"split": "site"}, "Each site was judged by a model of the others"),
        ({"metrics": metrics(balanced_accuracy=(0.49, 0.6), ece=(0.0, 0.1))}, "holds what guessing reaches"),
        ({"metrics": metrics(balanced_accuracy=(0.7, 0.8), ece=(0.06, 0.1))}, "Uncalibrated"),
        ({"conflicting": 2}, "2 sets of identical pictures carry different labels"),
        ({"quarantined": 0.03}, "3.0% of the source's images"),
    ],
)
def test_a_limit_is_said_where_there_is_reason_and_nowhere_else(changes: dict[str, Any], words: str) -> None:
    assert words not in " ".join(limits_of(SOUND))
    found = limits_of(replace(SOUND, **changes))
    assert sum(words in sentence for sentence in found) == 1


def test_even_a_sound_study_is_of_its_own_places_and_its_model_of_its_siblings() -> None:
    said = limits_of(SOUND)
    assert len(said) == 2
    assert "Images come from 3 places (column site)" in said[0] and "siblings" in said[1]


def test_undefined_intervals_are_no_reason_for_anything() -> None:
    undefined = {name: {"value": None, "ci95": [None, None], "per_fold": []} for name in ("balanced_accuracy", "ece")}
    assert limits_of(replace(SOUND, metrics=undefined)) == limits_of(SOUND)


def test_a_column_of_sites_is_known_by_its_name() -> None:
    assert sites_in({"label": ["x"], "Hospital": ["A", "B", "A", "", None]}) == ("hospital", 2)
    assert sites_in({"label": ["x"], "site": ["", None]}) is None
