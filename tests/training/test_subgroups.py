"""Subgroups against metrics of the rows alone; bands, marks and the gap by hand."""

from __future__ import annotations

import numpy as np
import pytest

from cluster.errors import UsageError
from training.bootstrap import tail_share
from training.metrics import summarise
from training.subgroups import SHOWN, Rows, banded, blocks, by_column, columns_of, in_words


def rows(seed: int = 0, size: int = 400) -> tuple[Rows, list[str]]:
    """Predictions that are better on one site than on another, and a third site of two groups."""
    rng = np.random.default_rng(seed)
    group = np.repeat(np.arange(size // 4), 4)
    site = ["tiny" if g < 2 else ("good" if g % 2 else "bad") for g in group]
    truth = rng.integers(0, 3, size)
    help_ = np.asarray([{"good": 2.0, "bad": 0.3, "tiny": 1.0}[s] for s in site])
    p = rng.dirichlet(np.ones(3), size) + help_[:, None] * np.eye(3)[truth]
    image, zeros = np.arange(size), np.zeros(size, dtype=int)
    return Rows(truth, p / p.sum(axis=1, keepdims=True), image, group.astype(str), group % 3, zeros), site


def test_each_value_is_judged_as_if_its_rows_were_all() -> None:
    data, site = rows()
    found = by_column(data, site, resamples=40, seed=3)["parts"]
    assert list(found) == ["bad", "good", "tiny"]
    for name, part in found.items():
        keep = np.asarray(site) == name
        alone = summarise(
            data.truth[keep],
            data.probabilities[keep],
            group=np.asarray(data.group)[keep],
            fold=np.asarray(data.fold)[keep],
            repeat=np.asarray(data.repeat)[keep],
            resamples=40,
            seed=3,
        )
        assert part["metrics"] == {metric: alone[metric] for metric in SHOWN}
        assert part["images"] == keep.sum()
        assert part["groups"] == len(set(np.asarray(data.group)[keep]))


def test_few_groups_are_marked_and_not_compared() -> None:
    data, site = rows()
    found = by_column(data, site, resamples=40)
    assert found["parts"]["tiny"]["marks"][0] == "few groups"
    assert not found["parts"]["good"]["marks"]
    assert found["gap"] is not None
    assert (found["gap"]["best"], found["gap"]["worst"]) == ("good", "bad")


def test_the_gap_is_the_difference_of_the_two_and_its_interval_that_of_resampled_groups() -> None:
    data, site = rows()
    found = by_column(data, site, resamples=300, seed=1)
    assert found["gap"] is not None
    gap = found["gap"]["balanced_accuracy"]
    values = {n: found["parts"][n]["metrics"]["balanced_accuracy"]["value"] or 0 for n in ("good", "bad")}
    assert gap["value"] == pytest.approx(values["good"] - values["bad"])
    group, names = np.asarray(data.group), np.unique(data.group)
    right, where = data.probabilities.argmax(axis=1) == data.truth, np.asarray(site)
    differences = []
    for draw in np.random.default_rng(1).integers(len(names), size=(300, len(names))):
        picked = np.concatenate([np.flatnonzero(group == names[g]) for g in draw])
        recalls = {
            n: np.mean([right[picked][(where[picked] == n) & (data.truth[picked] == c)].mean() for c in range(3)])
            for n in ("good", "bad")
        }
        differences.append(recalls["good"] - recalls["bad"])
    share = tail_share(len(names))
    assert gap["ci95"] == pytest.approx(np.quantile(differences, [share, 1 - share]))


def test_a_value_that_lacks_a_class_is_marked() -> None:
    data, _ = rows()
    values = ["no third" if t != 2 and i % 2 else "all" for i, t in enumerate(data.truth)]
    found = by_column(data, values, resamples=5)
    assert found["parts"]["no third"]["marks"] == ["lacks a class"]
    assert found["gap"] is None
    assert "none are compared" in str(blocks({"x": found}))


def test_repeats_of_an_image_count_once() -> None:
    data, site = rows()
    twice = Rows(
        *(np.concatenate([np.asarray(a), np.asarray(a)]) for a in data[:5]),
        *[np.repeat([0, 1], 400)],
    )
    once, both = by_column(data, site, resamples=5), by_column(twice, site + site, resamples=5)
    assert [p["images"] for p in once["parts"].values()] == [p["images"] for p in both["parts"].values()]


def test_numbers_are_cut_at_quartiles_and_missing_values_stand_last() -> None:
    ages = [*range(1, 101), None, ""]
    texts, names = banded(ages)
    assert names == ["1 to 25", "above 25 to 50", "above 50 to 75", "above 75 to 100", "not given"]
    assert [texts.count(name) for name in names] == [25, 25, 25, 25, 2]
    assert texts[24] == "1 to 25" and texts[25] == "above 25 to 50"
    as_text, same = banded([str(a) if a else "" for a in ages])
    assert (as_text, same) == (texts, names)


def test_few_distinct_numbers_and_words_stay_as_they_are() -> None:
    assert banded([10, 2, 10])[1] == ["2", "10"]
    assert banded(["m", "f", None, "m"]) == (["m", "f", "not given", "m"], ["f", "m", "not given"])
    assert banded([True, False])[1] == ["False", "True"]


def test_numbers_that_pile_up_give_fewer_bands() -> None:
    values = [0.0] * 80 + [float(i) for i in range(1, 21)]
    texts, names = banded(values)
    assert len(names) == 2 and set(texts) == set(names)


def test_columns_are_named_by_commas_or_blanks_and_must_exist() -> None:
    assert columns_of(("sex,site", "age", "sex"), ["sex", "site", "age"]) == ["sex", "site", "age"]
    with pytest.raises(UsageError, match=r"--by sexx: no column 'sexx'.*sex"):
        columns_of(("sexx",), ["sex", "site"])


def test_a_checklist_is_told_each_value_its_marks_and_the_gap() -> None:
    data, site = rows()
    found = by_column(data, site, resamples=40)
    value = found["parts"]["bad"]["metrics"]["balanced_accuracy"]["value"]
    said = in_words({"site": found})
    assert f"Balanced accuracy by site: bad {value:.3f} [" in said and "tiny (few groups" in said
    assert "best value of site (good) and the worst (bad)" in said
    many = by_column(data, [f"s{at % 12}" for at in range(len(site))], resamples=40)
    assert "judged for each of 12 values of site, see Subgroups" in in_words({"site": many})
    assert in_words({}) == ""
