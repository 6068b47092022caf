"""One trial and its rows: what it reports, and what it cannot see."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cluster.errors import UsageError
from training.tasks.finetune import fine_tune, recipe_for
from training.weights import Wanted
from tuning.configs import TuneConfig
from tuning.spaces import STUDIES, Range, defaults
from tuning.trial import Bench, Sides, bench_for, run_trial, split_sides

SIZE = 32


def labels(groups_per_class: int, classes: int = 3, images: int = 4) -> tuple[list[str], list[str]]:
    rows = [(c, g) for c in range(classes) for g in range(groups_per_class) for _ in range(images)]
    return [f"class{c}" for c, _ in rows], [f"patient{c}-{g}" for c, g in rows]


def bench(model: str = "test_efficientnet") -> tuple[Bench, Sides]:
    """48 pictures of lying or standing stripes, of 16 patients."""
    rng = np.random.default_rng(0)
    names, groups = labels(8, classes=2, images=3)
    truth = np.asarray([int(name[-1]) for name in names])
    wave = 80 * np.sin(np.arange(SIZE) * 1.1)
    clean = np.stack([np.broadcast_to(wave[:, None] if t else wave[None], (SIZE, SIZE)) for t in truth])
    pixels = np.clip(clean + rng.normal(128, 12, clean.shape), 0, 255).astype(np.uint8)[..., None]
    sides = split_sides(names, groups, holdout=0.25, seed=0)
    config = TuneConfig(data="d", out="o", init="none", model=model, epochs=3).trial({})
    wanted = Wanted(
        init="none",
        preset="tiny",
        model=model,
        image_size=str(SIZE),
        seed=0,
        device="cpu",
        channels=1,
        mean=(0.5,),
        std=(0.25,),
    )
    return bench_for(config, wanted, pixels, truth, sides, classes=2, threads=1), sides


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("groups_per_class", [4, 5, 9, 30])
def test_the_three_sides_share_no_group_and_each_has_every_class(groups_per_class: int, seed: int) -> None:
    names, groups = labels(groups_per_class)
    sides = split_sides(names, groups, holdout=0.2, seed=seed)
    parts = [sides.fit, sides.validation, sides.held_out]
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(names)))
    owners = [{groups[r] for r in rows} for rows in parts]
    assert sum(map(len, owners)) == len(set(groups))
    assert all({names[r] for r in rows} == set(names) for rows in parts)
    assert sides.search.tolist() == sorted(set(range(len(names))) - set(sides.held_out.tolist()))


def test_too_few_groups_are_refused_in_one_line() -> None:
    names, groups = labels(6)
    few = [g if n != "class1" else f"patient1-{at % 3}" for at, (n, g) in enumerate(zip(names, groups, strict=True))]
    with pytest.raises(UsageError, match="class 'class1' has 3 groups, but a search needs 4 of each class") as caught:
        split_sides(names, few, holdout=0.2, seed=0)
    assert len(str(caught.value).splitlines()) == 1


def test_a_share_too_small_for_a_class_is_refused() -> None:
    """A group of the rare class is a quarter of it, far more than is to be held out."""
    names = ["a"] * 120 + ["b"] * 4
    groups = [f"a{at}" for at in range(120)] + [f"b{at}" for at in range(4)]
    with pytest.raises(UsageError, match="no split into three sides"):
        split_sides(names, groups, holdout=0.05, seed=0)


def test_the_bench_holds_the_rows_of_the_search_alone() -> None:
    shared, sides = bench()
    names, groups = labels(8, classes=2, images=3)
    whole = np.arange(len(names), dtype=np.uint8)
    marked = bench_for(shared.config, shared.wanted, whole, whole, sides, classes=2, threads=1)
    assert set(marked.pixels.tolist()).isdisjoint(sides.held_out.tolist())
    assert marked.pixels[marked.fit].tolist() == marked.truth[marked.fit].tolist() == sides.fit.tolist()
    assert marked.pixels[marked.validation].tolist() == sides.validation.tolist()
    assert {groups[r] for r in marked.pixels.tolist()}.isdisjoint({groups[r] for r in sides.held_out})


def test_a_trial_reports_every_epoch_and_the_value_where_its_loss_was_lowest() -> None:
    shared, _ = bench()
    reports: list[dict[str, Any]] = []
    run_trial(shared, {"lr": 3e-3, "drop_path": 0.0}, reports.append)
    assert [r["epoch"] for r in reports] == [1, 2, 3]
    said: list[tuple[float, float]] = []

    def judge(row: dict[str, float], logits: np.ndarray) -> None:
        truth = shared.truth[shared.validation]
        recalls = [(logits.argmax(axis=1) == truth)[truth == c].mean() for c in (0, 1)]
        said.append((row["held_loss"], float(np.mean(recalls))))

    recipe = recipe_for(
        TuneConfig(data="d", out="o", init="none", model="test_efficientnet", epochs=3).trial(
            {"lr": 3e-3, "drop_path": 0.0}
        ),
        shared.wanted,
        2,
        1,
    )
    fine_tune(recipe, shared.pixels, shared.truth, shared.fit, shared.validation, "tune", on_epoch=judge)
    for report in reports:
        loss, value = min(said[: report["epoch"]])
        assert (report["held_loss"], report["value"]) == (loss, pytest.approx(value))
        assert said[report["best_epoch"] - 1][0] == loss


def test_every_parameter_of_the_space_changes_what_is_trained() -> None:
    shared, _ = bench("test_vit")
    losses = []
    for name, searched in STUDIES["transfer"].items():
        assert isinstance(searched, Range)
        params = defaults(STUDIES["transfer"]) | {name: searched.low}
        reports: list[dict[str, Any]] = []
        run_trial(shared, params, reports.append)
        losses.append(reports[-1]["loss"])
    assert len(set(losses)) == len(losses)


def test_an_error_is_the_last_report_and_does_not_escape() -> None:
    shared, _ = bench()
    reports: list[dict[str, Any]] = []
    run_trial(shared, {"lr": 1e30}, reports.append)
    assert "ArithmeticError: the loss was not finite after epoch" in reports[-1]["failed"]
    assert np.isnan(reports[-1]["value"])
    reports.clear()
    run_trial(shared, {"min_crop": 7.0}, reports.append)
    assert [set(r) for r in reports] == [{"epoch", "value", "failed", "seconds"}]
    assert "--min-crop 7.0: must lie between 0 and 1" in reports[0]["failed"]
