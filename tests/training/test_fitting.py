"""What the tasks of `transfer` share: features that are kept by what they are of, and what is said before any fit."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from cluster.errors import UsageError
from cluster.session import cores
from tests.runs import weights_run
from training.configs import TransferConfig
from training.dataset import Dataset, Selection
from training.fit import Labels
from training.fitting import Fitting
from training.splits import Fold

ROWS, SIZE = 12, 32


@dataclass(frozen=True)
class Drawn(Dataset):
    """Noise, by the seed that is its version."""

    def pixels(self, selection: Selection) -> np.ndarray:
        rng = np.random.default_rng(int(self.version))
        shown = rng.integers(0, 255, (ROWS, SIZE, SIZE, 3), dtype=np.uint8)
        return np.asarray(shown[[int(name) for name in selection.column("image_id")]])


@pytest.fixture
def first(tmp_path: Path) -> Iterator[Fitting]:
    """The task of frozen features on twelve images, from the weights of a RUN."""
    path = {"height": SIZE, "width": SIZE}
    dataset = Drawn("/nowhere", {"version": "1", "channels": 3, "mean": [0.5] * 3, "std": [0.2] * 3, "path": path})
    truth = np.arange(ROWS) % 2
    labels = Labels(truth, ["ab"[t] for t in truth], [f"g{row // 2}" for row in range(ROWS)], "group")
    init = weights_run(tmp_path / "init")
    config = TransferConfig("d", out=str(tmp_path / "run"), init=str(init), task="knn")
    folds = [Fold(0, 0, np.arange(8), np.arange(8, ROWS))]
    with config.open_out("transfer") as out:
        yield Fitting(config, dataset, rows(range(ROWS)), ["a", "b"], labels, folds, 1.0, np.arange(8), out, "cpu", 1)


def rows(numbers: Any) -> Selection:
    names = [str(number) for number in numbers]
    return Selection(pa.table({"image_id": names, "sha256": names}))


def test_features_are_computed_once(first: Fitting) -> None:
    found = first.features()
    (kept,) = first.out.path.glob("features*.safetensors")
    before = kept.stat().st_mtime_ns
    np.testing.assert_array_equal(replace(first).features(), found)
    assert kept.stat().st_mtime_ns == before


def test_kept_features_of_other_weights_images_or_sizes_are_not_taken_for_these(first: Fitting, tmp_path: Path) -> None:
    """Between a kill and the resume the RUN was trained further, or the DATASET ingested anew at the same path."""
    found = [first.features()]
    shutil.rmtree(tmp_path / "init")
    weights_run(tmp_path / "init")  # other random weights at the same path
    found.append(replace(first).features())
    dataset = Drawn("/nowhere", first.dataset.info | {"version": "2"})
    found.append(replace(first, dataset=dataset).features())
    found.append(replace(first, dataset=dataset, selection=rows(reversed(range(ROWS)))).features())
    found.append(replace(first, dataset=dataset, config=replace(first.config, image_size="48")).features())
    for number, values in enumerate(found):
        assert not any(np.allclose(values, other) for other in found[:number])
    np.testing.assert_allclose(found[3], found[2][::-1], atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "flag", "way_out"),
    [
        ({"task": "svm"}, "--task svm", "use --task finetune"),
        (
            {"task": "hierarchical", "learner": "features", "stack": "forest"},
            "--stack forest",
            "leave --stack out",
        ),
    ],
)
def test_a_class_of_one_group_is_named_before_anything_is_fitted(
    changes: dict[str, Any], flag: str, way_out: str, first: Fitting
) -> None:
    """Of class c there are two groups, of which the fold trains on one; the inner folds would have had none to judge
    it by."""
    names = ["a", "b"] * 6
    names[0] = names[10] = "c"
    labels = Labels(np.asarray(["abc".index(name) for name in names]), names, first.labels.groups, "group")
    config = replace(first.config, **changes)
    with pytest.raises(UsageError) as caught:
        replace(first, labels=labels, classes=["a", "b", "c"], config=config).run()
    assert str(caught.value) == (
        f"{flag}: class 'c' has one group in the training side of a fold, but its inner folds need two: merge or drop "
        f"the class, or {way_out}"
    )
    assert not list(first.out.path.glob("features*"))


def in_process(
    fit: Any, shared: tuple[Any, ...], each: Sequence[tuple[Any, ...]], *, workers: int, gpu: bool
) -> Iterator[Any]:
    """`run_folds` without Ray."""
    yield from (fit(*shared, *own) for own in each)


def test_a_single_fit_has_all_cores_however_many_fits_there_might_be_at_a_time(
    first: Fitting, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("training.fitting.run_folds", in_process)
    alone = replace(first, workers=8)
    alone.run()
    assert "; 1 fit, split by group, 1 at a time" in capsys.readouterr().err
    assert alone.recipe(alone.workers).threads == cores()


def test_fits_of_small_networks_are_known_by_what_no_flag_says_of_them(
    first: Fitting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.fitting.run_folds", in_process)
    config = replace(first.config, task="hierarchical", learner="features", epochs=1)
    fits = first.out.path / "folds"
    for known, (name, value) in enumerate(
        [("SMALL", 0.1), ("WIDTH", 8), ("DROPOUT", 0.5), ("PASSES", 1), ("DECAY", 1)]
    ):
        monkeypatch.setattr(f"training.tasks.learners.{name}", value)
        for _ in range(2):
            replace(first, config=config).run()
            assert len(list(fits.iterdir())) == known + 1


def test_a_refit_takes_its_medians_over_the_fits_that_had_the_module(
    first: Fitting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two folds of three train on no image of `b/two`, so they ask nothing below b, and say nothing of how long the
    module of the refit, which does, is to be trained."""
    monkeypatch.setattr("training.fitting.run_folds", in_process)
    names = ["a", "b/one", "a", "b/two"] * 3
    classes = sorted(set(names))
    rare = np.flatnonzero(np.asarray(names) == "b/two")
    others = np.setdiff1d(np.arange(ROWS), rare)
    folds = [Fold(0, at, side, others[:2]) for at, side in enumerate([np.arange(ROWS), others[2:], others[2:]])]
    labels = Labels(np.asarray([classes.index(n) for n in names]), names, [f"g{at}" for at in range(ROWS)], "group")
    config = replace(first.config, task="hierarchical", learner="features", epochs=4, structure="independent")
    fitting = replace(first, labels=labels, classes=classes, folds=folds, kept=np.arange(ROWS), config=config)
    results = fitting.run().results
    epochs, temperatures = (np.stack([r.more[name][0] for r in results]) for name in ("epochs", "temperatures"))
    assert np.isnan(epochs[1:, 1]).all() and np.isnan(temperatures[1:, 1]).all()
    assert epochs[0, 1] >= 1
    for name, values in (("epochs", epochs), ("temperatures", temperatures)):
        found = fitting.median_of(name, results, otherwise=7)
        np.testing.assert_allclose(found, [[np.median(values[:, 0]), values[0, 1]]])
    nothing = [replace(r, more={"epochs": np.full((1, 2), np.nan)}) for r in results]
    assert fitting.median_of("epochs", nothing, otherwise=7).tolist() == [[7, 7]]
