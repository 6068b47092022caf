"""`tune` end to end on small data: searched, cut off, gone on with, judged on groups that it never saw."""

from __future__ import annotations

import json
import re
import shutil
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from cluster.cli import build_app
from cluster.errors import RayographError, UsageError
from tests.runs import Process, rayograph, rows_of, weights_run
from training.configs import TransferConfig
from training.dataset import Dataset
from training.lineage import own_images
from tuning import TuneConfig, tune
from tuning.ledger import Ledger
from tuning.spaces import STUDIES, Range, defaults, space_for
from tuning.study import Search
from tuning.trial import Bench

pytestmark = pytest.mark.ray

SPACE = space_for("transfer", pretrained_vit=False)
METRICS = {"accuracy", "balanced_accuracy", "kappa", "kappa_quadratic", "f1_macro", "auroc", "ece"}
SMALL: dict[str, Any] = {"init": "none", "model": "test_vit", "image_size": "32", "epochs": 2, "workers": "1"}


def config(data: Path, out: Path, **changes: Any) -> TuneConfig:
    return TuneConfig(data=str(data), out=str(out), **SMALL | {"trials": 3} | changes)


def flags(wanted: TuneConfig) -> list[str]:
    names = ("data", "out", "trials", *SMALL)
    return [word for name in names for word in (f"--{name.replace('_', '-')}", str(getattr(wanted, name)))]


def trials_of(out: Path) -> list[dict[str, Any]]:
    return list(pq.read_table(out / "trials.parquet").to_pylist())


def starts(out: Path) -> Counter[int]:
    """How often each trial was begun."""
    return Counter(row["trial"] for row in rows_of(out) if row.get("event") == "start")


def ledger_of(out: Path, data: Path) -> dict[int, Any]:
    """The finished trials, whether or not the search has ended."""
    subject = f"dataset {Dataset.open(data).version}"
    ledger = Ledger.open(out, SPACE, defaults(SPACE), seed=0, subject=subject)
    try:
        return {record.number: record for record in ledger.finished()}
    finally:
        ledger.close()


@pytest.fixture(scope="module")
def tuned(phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A finished search of three trials, and its summary."""
    out = tmp_path_factory.mktemp("tuned") / "search"
    return out, tune(config(phantoms, out))


@pytest.mark.slow
def test_a_search_leaves_its_trials_its_winner_and_a_report(tuned: tuple[Path, dict[str, Any]], phantoms: Path) -> None:
    out, summary = tuned
    assert json.loads((out / "summary.json").read_text()) == summary
    trials = trials_of(out)
    assert [t["number"] for t in trials] == [0, 1, 2]
    assert {name: trials[0][name] for name in SPACE} == defaults(SPACE)
    assert summary["trials"] == summary["completed"] == 3
    assert (summary["stopped_early"], summary["failed"]) == (0, 0)
    assert summary["best_value"] == max(t["value"] for t in trials)
    assert summary["default_value"] == trials[0]["value"]
    assert summary["seconds"] > 0
    for who in ("best", "default"):
        assert set(summary["held_out"][who]) == METRICS
        low, high = summary["held_out"][who]["balanced_accuracy"]["ci95"]
        assert 0 <= low <= summary["held_out"][who]["balanced_accuracy"]["value"] <= high <= 1
    page = (out / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 1
    assert "held out before the search began" in page
    assert {path.name for path in out.iterdir()} == {
        *("best.yaml", "config.yaml", "figures", "final", "metrics.jsonl", "report.html", "run.log", "split.parquet"),
        *("study.db", "summary.json", "trials.parquet", ".lock"),
    }
    assert not (Path.home() / "ray_results").exists()


@pytest.mark.slow
def test_the_held_out_figures_are_of_one_fit_on_all_groups_of_the_search(
    tuned: tuple[Path, dict[str, Any]], phantoms: Path
) -> None:
    from safetensors.numpy import load_file

    out, summary = tuned
    rows = pq.read_table(out / "split.parquet").to_pylist()
    held = [row for row in rows if row["side"] == "held_out"]
    owners = {side: {row["group"] for row in rows if row["side"] == side} for side in ("fit", "validation", "held_out")}
    assert all(owners.values())
    assert sum(map(len, owners.values())) == len(set().union(*owners.values())) == summary["protocol"]["groups"]
    classes = sorted({row["label"] for row in rows})
    truth = np.asarray([classes.index(row["label"]) for row in held])
    for who, number in (("best", summary["best_trial"]), ("default", 0)):
        said = load_file(out / "final" / f"trial-{number}.safetensors")["probabilities"].argmax(axis=1)
        recalls = [(said == truth)[truth == c].mean() for c in range(len(classes))]
        assert summary["held_out"][who]["balanced_accuracy"]["value"] == pytest.approx(np.mean(recalls))


def test_no_held_out_image_reaches_a_trial(phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Bench] = []

    def look(ledger: Ledger, bench: Bench, out: Path, **rest: Any) -> None:
        seen.append(bench)
        raise RayographError("enough")

    monkeypatch.setattr("tuning.study.run_search", look)
    with pytest.raises(RayographError, match="enough"):
        tune(config(phantoms, tmp_path / "out"))
    side = {r["image_id"]: r["side"] for r in pq.read_table(tmp_path / "out" / "split.parquet").to_pylist()}
    dataset = Dataset.open(phantoms)
    selection = dataset.select(labelled=True)
    whose = {p.tobytes(): i for p, i in zip(dataset.pixels(selection), selection.column("image_id"), strict=True)}
    assert len(whose) == len(selection)
    (bench,) = seen
    for rows, name in ((bench.fit, "fit"), (bench.validation, "validation")):
        assert {side[whose[bench.pixels[r].tobytes()]] for r in rows} == {name}
    assert len(bench.fit) + len(bench.validation) == len(bench.pixels) == sum(s != "held_out" for s in side.values())


@pytest.mark.parametrize("changes", [{"init": "taught"}, {"study": "hierarchical", "inits": ("shown", "taught")}])
def test_first_weights_that_learnt_labels_of_the_search_s_groups_are_refused(
    changes: dict[str, Any], phantoms: Path, tmp_path: Path
) -> None:
    """Also those among which a search may choose; that images alone were seen refuses nothing."""
    images = own_images(Dataset.open(phantoms).select(labelled=True))
    runs = {"shown": weights_run(tmp_path / "shown", seen=images)}
    runs["taught"] = weights_run(tmp_path / "taught", seen=images, labelled=sorted(images)[:1])
    named = {key: [str(runs[v]) for v in value] if key == "inits" else value for key, value in changes.items()}
    named |= {"init": str(runs["taught"])} if "init" in changes else {"init": "none"}
    with pytest.raises(UsageError, match=r"first weights .*taught learnt from labels of 1 of the groups") as caught:
        tune(config(phantoms, tmp_path / "out", **named))
    assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "out" / "study.db").exists()


def test_the_report_counts_what_any_of_the_first_weights_saw(phantoms: Path, tmp_path: Path) -> None:
    dataset = Dataset.open(phantoms)
    selection = dataset.select(labelled=True)
    half = own_images(selection.take(np.arange(0, len(selection), 2)))
    run = weights_run(tmp_path / "other", seen=half)
    for inits, counted in (((), frozenset()), ((str(run),), half)):
        wanted = config(phantoms, tmp_path / f"out-{len(inits)}", study="hierarchical", inits=inits)
        with wanted.open_out("tune") as out:
            search = Search(wanted, dataset, selection, out)
            assert search.seen == len(own_images(selection.take(search.sides.held_out)) & counted)


@pytest.mark.slow
def test_best_yaml_feeds_transfer(tuned: tuple[Path, dict[str, Any]], phantoms: Path, tmp_path: Path) -> None:
    out, summary = tuned
    best = yaml.safe_load((out / "best.yaml").read_text())
    assert "data" not in best and "out" not in best
    assert best["searched_on"] == Dataset.open(phantoms).version
    assert {name: best[name] for name in SPACE} == summary["best_params"]
    run = tmp_path / "run"
    build_app().meta(
        ["transfer", "--config", str(out / "best.yaml"), "--data", str(phantoms), "--out", str(run), "--folds", "2"]
    )
    used = yaml.safe_load((run / "config.yaml").read_text())
    chosen = TransferConfig(
        str(phantoms), out=str(run), folds=2, searched_on=best["searched_on"], **SMALL | summary["best_params"]
    )
    wanted = chosen.identity()
    assert {name: used[name] for name in wanted} == wanted
    found = json.loads((run / "summary.json").read_text())
    assert found["metrics"]["accuracy"]["value"] > 0 and found["searched"] == "here"
    assert "Settings were searched beforehand on this data set" in (run / "report.html").read_text()


@pytest.mark.slow
def test_a_finished_search_is_done_and_more_trials_go_on_from_it(
    tuned: tuple[Path, dict[str, Any]], phantoms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, summary = tuned
    again = tmp_path / "again"
    shutil.copytree(out, again)
    assert tune(config(phantoms, again)) == summary
    assert capsys.readouterr().out == f"already done: {again}\n"
    raised = tune(config(phantoms, again, trials=4))
    assert raised["trials"] == 4
    assert starts(again) == {0: 1, 1: 1, 2: 1, 3: 1}
    assert trials_of(again)[:3] == trials_of(out)
    with pytest.raises(UsageError, match="trials may grow but not shrink"):
        tune(config(phantoms, again, trials=2))
    with pytest.raises(UsageError, match="epochs differs"):
        tune(config(phantoms, again, trials=4, epochs=3))


@pytest.mark.slow
def test_one_trial_is_the_defaults_and_they_win(phantoms: Path, tmp_path: Path) -> None:
    summary = tune(config(phantoms, tmp_path / "out", trials=1, epochs=1))
    assert (summary["trials"], summary["completed"], summary["best_trial"]) == (1, 1, 0)
    assert summary["best_value"] == summary["default_value"]
    assert summary["held_out"]["best"] == summary["held_out"]["default"]
    assert summary["held_out"]["difference"] == {"value": 0.0, "ci95": [0.0, 0.0]}
    assert "No trial did better than the defaults" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.slow
def test_a_trial_that_fails_is_recorded_and_the_others_go_on(
    phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rates are drawn up to 1e300, with which nothing can be trained; the defaults are as ever."""
    monkeypatch.setitem(STUDIES, "transfer", {"lr": Range(1e-3, 1e300, log=True)})
    out = tmp_path / "out"
    summary = tune(config(phantoms, out, trials=3, epochs=1))
    assert summary["trials"] == 3
    assert summary["failed"] >= 1 and summary["completed"] == 3 - summary["failed"]
    for trial in trials_of(out):
        assert (trial["state"] == "failed") == (trial["value"] is None) == (trial["reason"] != "")
        assert (trial["state"] == "failed") == (trial["lr"] > 1e10)
        assert re.match(r"\w+Error: .|$", trial["reason"])
    assert "Error: " in (out / "report.html").read_text()


@pytest.mark.slow
def test_a_search_in_which_all_fails_says_why_and_runs_nothing_twice(
    phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(STUDIES, "transfer", {"lr": Range(1e29, 1e30, default=1e30)})
    for _ in range(2):
        with pytest.raises(
            RayographError, match=r"all 2 trials failed, the defaults with: ArithmeticError.*\n.*--overw"
        ):
            tune(config(phantoms, tmp_path / "out", trials=2, epochs=1))
    assert starts(tmp_path / "out") == {0: 1, 1: 1}


@pytest.mark.slow
def test_stopped_by_sigterm_a_search_says_that_it_goes_on(phantoms: Path, tmp_path: Path) -> None:
    wanted = config(phantoms, tmp_path / "out", epochs=30)
    with rayograph("tune", *flags(wanted)) as process:
        process.until(lambda: any("epoch" in row for row in rows_of(wanted.out)), "the first epoch is over")
        process.signal(signal.SIGTERM)
        assert process.wait() == 75
        assert process.said().endswith("rayograph: stopped by SIGTERM; the same command again goes on\n")
    assert not (tmp_path / "out" / ".ray").exists()
    assert ledger_of(tmp_path / "out", phantoms) == {}


@pytest.mark.slow
def test_killed_after_its_second_trial_a_search_loses_none_and_runs_none_twice(phantoms: Path, tmp_path: Path) -> None:
    wanted = config(phantoms, tmp_path / "killed", trials=4, epochs=4)
    out, twin = tmp_path / "killed", tmp_path / "twin"

    def ended() -> int:
        return sum(row.get("event") in {"complete", "stopped", "failed"} for row in rows_of(out))

    def begun(process: Process) -> None:
        process.until(lambda: ended() >= 2 and starts(out).total() >= 3, "two trials are finished and a third begun")

    with rayograph("tune", *flags(wanted)) as process:
        begun(process)
        process.kill_group()
    assert not (out / "summary.json").exists()
    before = ledger_of(out, phantoms)
    assert 2 <= len(before) < 4
    with rayograph("tune", *flags(wanted)) as process:
        assert process.wait() == 0, process.said()
    again = starts(out)
    assert set(again) == set(range(4))
    assert {number: again[number] for number in before} == dict.fromkeys(before, 1)
    assert again.total() > 4, "a trial was cut off, and ran again under its own number"
    after = ledger_of(out, phantoms)
    assert {number: after[number] for number in before} == before
    assert json.loads((out / "summary.json").read_text())["trials"] == len(trials_of(out)) == 4

    uninterrupted = tune(config(phantoms, twin, trials=4, epochs=4))
    for ours, theirs in zip(trials_of(out), trials_of(twin), strict=True):
        decided = ("number", "state", "best_epoch", "epochs", "reason", *SPACE)
        assert {name: ours[name] for name in decided} == {name: theirs[name] for name in decided}
        assert ours["value"] == pytest.approx(theirs["value"], abs=1e-9)
        assert ours["held_loss"] == pytest.approx(theirs["held_loss"], rel=1e-4)
    assert uninterrupted["best_trial"] == json.loads((out / "summary.json").read_text())["best_trial"]
