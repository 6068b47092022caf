"""The report of a transfer and its model card: what a reader must find, in order, and that names are never markup."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import yaml

from cluster.errors import UsageError
from training import metrics, report
from training.artifact import ModelCard, load_model, save_model
from training.bootstrap import tail_share
from training.checklist import BLANK, FACTS, checklist_section
from training.configs import TransferConfig
from training.dataset import Dataset, Selection
from training.encoder import Architecture, seed_weights
from training.images import ImagePath
from training.judgement import Judged, guessing
from training.model_card import METRICS, README, Trained, model_card
from training.results import figures_of
from training.subgroups import Rows, by_column
from training.transfer_report import Facts, checklist_facts, trained_of, write_transfer_report
from training.transform import Input

CLASSES = ["benign", "malign/a", "malign/b"]
EVIL = "`x`|<script>alert(1)</script>**[a](b)"
ARCHITECTURE = Architecture("test_efficientnet", 32, 32, 3)


def facts_of(classes: list[str] = CLASSES, *, images: int = 120, skill: float = 2.0, **changes: Any) -> Facts:
    """A transfer of random predictions that are right more often than not."""
    rng = np.random.default_rng(0)
    truth = np.arange(images) % 3
    raw = rng.normal(size=(images, 3)) + skill * np.eye(3)[truth]
    probabilities = np.exp(raw) / np.exp(raw).sum(axis=1, keepdims=True)
    groups = [f"patient-{i % 40}" for i in range(images)]
    fold, repeat = np.arange(images) % 5, np.zeros(images, dtype=np.int64)
    values = metrics.summarise(truth, probabilities, group=groups, fold=fold, repeat=repeat, resamples=50)
    judged = Judged(classes, np.arange(images), truth, probabilities, probabilities, fold, repeat, dict(values), 1.25)
    counts = {
        "images": images + 9, "ok": images + 4, "duplicate": 3, "quarantined": 2, "labelled": images,
        "ungrouped": 0, "conflicting_copies": 0, "largest_group_fraction": 0.1,
    }  # fmt: skip
    path = ImagePath(40, 40, "letterbox", window="auto")
    info = {"format": 1, "version": "cafe", "image_path": path.as_dict(), "counts": counts, "channels": 3}
    dataset = Dataset("/nowhere", info)
    dataset.__dict__["manifest"] = pa.table(
        {"status": ["quarantined"] * 2 + ["ok"], "reason": ["truncated"] * 2 + [""]}
    )
    selection = Selection(pa.table({"label": [classes[t] for t in truth], "group": groups}))
    config = TransferConfig("/secret/place/moles", out="/secret/runs/first", task="linear", **changes)
    card = ModelCard(
        ARCHITECTURE,
        path,
        Input(32, 32, 3, (0.5,) * 3, (0.25,) * 3),
        head="network",
        classes=tuple(classes),
        temperature=1.25,
        lineage={"dataset": "cafe", "initial": {"init": "imagenet", "sha256": "ab" * 32}},
    )
    return Facts("first", config, dataset, selection, judged, card, 0)


def written(out: Path, facts: Facts, **options: Any) -> str:
    figures_of(facts.judged, out / "figures")
    write_transfer_report(out, facts, **options)
    return (out / "report.html").read_text(encoding="utf-8")


def headings(html: str) -> list[str]:
    return re.findall(r"<h2 [^>]*>(.*?)</h2>", html)


def text_of(html: str) -> str:
    return " ".join(re.sub(r"<[^>]+>", " ", re.sub(r"<style>.*?</style>", "", html, flags=re.DOTALL)).split())


# The report


def test_the_sections_stand_in_their_order_with_others_before_the_mistakes(tmp_path: Path) -> None:
    own = report.Section("Mistakes", [report.Text("None.")])
    extra = [report.Section("Comparison", [report.Text("Better.")])]
    html = written(tmp_path, facts_of(), mistakes=own, extra_sections=extra)
    assert headings(html) == [
        "What was asked", "Data", "Protocol", "Results", "Comparison", "Mistakes", "The model", "Limits", "Checklist",
    ]  # fmt: skip


def test_the_answer_is_the_main_figure_with_its_interval_and_the_level_of_guessing(tmp_path: Path) -> None:
    facts = facts_of()
    value, (low, high) = (facts.judged.metrics["balanced_accuracy"][k] for k in ("value", "ci95"))
    said = text_of(written(tmp_path, facts))
    assert (
        f"named {value:.1%} of the images right (95 % interval {low:.1%} to {high:.1%}); guessing reaches 33.3%" in said
    )
    assert "120 labelled images of 40 groups (data set moles)" in said
    assert "cannot be told from guessing" not in said
    assert "cannot be told from guessing" in text_of(written(tmp_path, facts_of(skill=0.0)))


def test_a_split_by_image_is_warned_of_where_the_answer_stands(tmp_path: Path) -> None:
    html = written(tmp_path, facts_of(split="image"))
    asked = html[html.index('id="section-1"') : html.index('id="section-2"')]
    assert "these figures are too good" in asked
    assert "these figures are too good" not in written(tmp_path, facts_of())


def test_the_report_names_no_group_and_no_place(tmp_path: Path) -> None:
    html = written(tmp_path, facts_of())
    assert "patient-" not in html and "/secret" not in html


def test_the_checklist_says_how_intervals_are_widened_for_few_groups_and_what_subgroups_give() -> None:
    facts = facts_of()
    rows = Rows(facts.judged.truth, facts.judged.probabilities, facts.judged.rows, *_places(facts))
    by = {"sex": by_column(rows, ["f", "m"] * 60, resamples=40)}
    known = checklist_facts(replace(facts, by=by))
    assert f"with 40 groups {100 * tail_share(40):.2f} and" in known["uncertainty"]
    assert 1 < 100 * tail_share(40) < 2.3
    assert known["subgroups"].startswith("Balanced accuracy by sex: f 0.")
    (table,) = [b for b in checklist_section(known).blocks if isinstance(b, report.Table) and "TRIPOD" in b.caption]
    assert known["subgroups"] in str({row[0]: row[-1] for row in table.rows}["23a"])


def _places(facts: Facts) -> tuple[Any, ...]:
    return facts.selection.column("group"), facts.judged.fold, facts.judged.repeat


def test_pretraining_on_judged_images_is_said_twice(tmp_path: Path) -> None:
    said = text_of(written(tmp_path, replace(facts_of(), shared=120)))
    assert "Warning: The first weights were pretrained, without labels, on 120 of the images" in said
    assert "transductive" in said and "transductive" not in text_of(written(tmp_path, facts_of()))


def test_settings_that_were_searched_on_the_judged_data_are_warned_of_and_no_longer_called_unchosen(
    tmp_path: Path,
) -> None:
    html = written(tmp_path, facts_of(searched_on="cafe"))
    said = text_of(html)
    assert "Warning: The settings were chosen by a search (rayograph tune) on this data" in said
    assert said.count("labels of images that are judged here had a say in them") == 4  # two in the checklists
    assert "No test image chose anything" not in said and "Settings were searched beforehand on this data set" in said
    elsewhere, alone = (text_of(written(tmp_path, facts_of(searched_on=on))) for on in ("beef", None))
    assert "Warning: The settings were chosen by a search (rayograph tune) on another version" in elsewhere
    assert "No test image chose anything" in alone and "rayograph tune" not in alone


def test_labels_that_look_like_markup_stay_text(tmp_path: Path) -> None:
    evil = [EVIL, "b", "c"]
    html = written(tmp_path, facts_of(evil))
    assert "<script" not in html and "&lt;script&gt;" in html


@pytest.mark.parametrize("counts", [[10, 10, 10], [28, 1, 1], [30, 0, 0], [0, 12, 18]])
def test_the_level_of_guessing_is_what_guessers_reach(counts: list[int]) -> None:
    """The better of always the most frequent class and of classes drawn by frequency, by the metrics themselves."""
    truth = np.repeat(np.arange(3), counts)
    shares = np.asarray(counts) / len(truth)
    constant = np.zeros((3, 3))
    constant[:, int(np.argmax(counts))] = counts
    drawn = np.asarray(counts)[:, None] * shares
    found = guessing(truth, 3)
    for name in ("accuracy", "balanced_accuracy", "f1_macro"):
        reached = [float(metrics.OF_CONFUSION[name](confusion)) for confusion in (constant, drawn)]
        assert found[name] == pytest.approx(max(reached)), name


def test_the_run_answers_what_it_knows_and_leaves_the_rest_blank() -> None:
    known = checklist_facts(facts_of())
    assert set(known) <= set(FACTS)
    assert not known["external"] and not known["subgroups"]
    tables = {t.caption: t for t in checklist_section(known).blocks if isinstance(t, report.Table)}
    claim = {row[0]: row[-1] for row in tables["CLAIM, update of 2024"].rows}
    assert {claim[n] for n in ("2", "11", "13", "16", "18", "33", "34", "44")} == {BLANK}
    assert "moles, version cafe" in str(claim["7"]) and "test_efficientnet" in str(claim["22"])
    assert "torch" in str(claim["23"]) and f"{known['results']}" in str(claim["37"])


# The model card


def front_matter(text: str) -> dict[str, Any]:
    _, front, _ = text.split("---\n", 2)
    values: dict[str, Any] = yaml.safe_load(front)
    return values


def test_the_front_matter_is_yaml_and_its_values_are_those_of_the_summary() -> None:
    facts = facts_of()
    values = front_matter(model_card(facts.card, trained_of(facts)))
    (result,) = values["model-index"][0]["results"]
    found = {entry["name"]: entry["value"] for entry in result["metrics"]}
    summary = json.loads(json.dumps(facts.judged.metrics))
    assert found == {name: metric["value"] for name, metric in summary.items()}
    assert set(METRICS) == set(metrics.NAMES)
    assert values["library_name"] == "timm" and "license" not in values
    assert result["dataset"]["name"] == "moles"


def test_an_undefined_metric_is_left_out_of_the_front_matter_and_dashed_in_the_table() -> None:
    facts = facts_of()
    trained = replace(trained_of(facts), metrics={"auroc": {"value": None, "ci95": [None, None], "per_fold": []}})
    text = model_card(facts.card, trained)
    assert front_matter(text)["model-index"][0]["results"][0]["metrics"] == []
    assert "| auroc | – |" in text


def test_the_card_says_what_a_user_must_know_and_no_place() -> None:
    facts = facts_of()
    text = model_card(facts.card, trained_of(facts))
    for words in (
        "not a medical device",
        "Intended use",
        "Limits",
        "cross-validation",
        "load_model",
        "timm.create_model",
    ):
        assert words in text
    value = report.with_interval(*(facts.judged.metrics["accuracy"][k] for k in ("value", "ci95")))
    assert f"| accuracy | {value} |" in text
    assert "/secret" not in text and "patient-" not in text


def test_names_in_the_card_are_neither_markup_nor_yaml() -> None:
    facts = facts_of([EVIL, "b", "c"])
    trained = replace(trained_of(facts), name="a: b\n---\n# x", data="- [x]: <b>")
    text = model_card(replace(facts.card, classes=(EVIL, "b", "c")), trained)
    assert front_matter(text)["model-index"][0]["name"] == "a: b --- # x"
    body = text.split("\n---\n\n", 1)[1]
    assert not re.search(r"(?<!\\)<", body.replace("```", ""))
    (row,) = [line for line in body.splitlines() if "alert" in line]
    assert len(re.findall(r"(?<!\\)\|", row)) == 3  # the table's own
    assert "\n# x" not in body


def test_a_model_is_loaded_with_its_card_and_without_one_but_not_with_a_changed_one(tmp_path: Path) -> None:
    facts = facts_of()
    network = ARCHITECTURE.build(3)
    seed_weights(network, 0)
    save_model(tmp_path / "older" / "model", facts.card, network)
    load_model(tmp_path / "older")
    text = model_card(facts.card, trained_of(facts))
    save_model(tmp_path / "run" / "model", facts.card, network, files=[(README, text.encode())])
    load_model(tmp_path / "run")
    file = tmp_path / "run" / "model" / README
    assert file.read_text(encoding="utf-8") == text
    file.write_text(text.replace("not a medical device", "a medical device"), encoding="utf-8")
    with pytest.raises(UsageError, match=r"README\.md: missing or changed"):
        load_model(tmp_path / "run")


def test_a_card_can_be_written_of_a_model_that_knows_nothing_of_its_lineage() -> None:
    facts = facts_of()
    bare = Trained("r", "d", {"a": 1, "b": 2}, 3, 3, "By hand.", {})
    assert "unknown" in model_card(replace(facts.card, lineage={}), bare)
