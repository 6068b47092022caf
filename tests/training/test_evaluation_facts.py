"""What an evaluation says of itself: external only where it is, and its limits by what it knows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa

from training import metrics, report
from training.artifact import ModelCard
from training.checklist import FACTS
from training.configs import EvaluateConfig
from training.dataset import Dataset, Selection
from training.encoder import Architecture
from training.evaluation_facts import Facts, asked_section, checklist_facts, closing_sections
from training.images import ImagePath
from training.judgement import Judged
from training.novelty import Seen
from training.transform import Input

CLASSES = ["benign", "malign"]
NEW = Seen(0, 0, 0, "", 0)


def facts_of(**changes: Any) -> Facts:
    """A model of data set `beef`, asked about 60 images of data set `cafe`."""
    rng = np.random.default_rng(0)
    truth, zeros = np.arange(60) % 2, np.zeros(60, dtype=np.int64)
    p = rng.dirichlet(np.ones(2), 60) + np.eye(2)[truth]
    p /= p.sum(axis=1, keepdims=True)
    groups = [f"patient-{at // 3}" for at in range(60)]
    values = metrics.summarise(truth, p, group=groups, fold=zeros, repeat=zeros, resamples=40)
    path = ImagePath(40, 40)
    card = ModelCard(
        Architecture("test_efficientnet", 32, 32, 3),
        path,
        Input(32, 32, 3, (0.5,) * 3, (0.25,) * 3),
        head="network",
        classes=tuple(CLASSES),
        lineage={
            "verb": "transfer",
            "task": "linear",
            "dataset": "beef",
            "images": 900,
            "initial": {"init": "/s/first"},
        },
    )
    counts = {"images": 60, "ok": 60, "duplicate": 0, "quarantined": 0}
    facts = Facts(
        name="mine",
        config=EvaluateConfig(model="/secret/mine", data="/secret/clinic", out="/secret/out"),
        card=card,
        judged=Judged(CLASSES, np.arange(60), truth, p, p, zeros, zeros, dict(values), 1.0),
        selection=Selection(pa.table({"label": [CLASSES[t] for t in truth], "group": groups})),
        split="unseen",
        protocol="Judged once.",
        seen=NEW,
        dataset=Dataset("/nowhere", {"version": "cafe", "image_path": path.as_dict(), "counts": counts}),
        others=(),
    )
    return replace(facts, **changes)


def test_other_data_of_which_nothing_was_seen_is_external_validation() -> None:
    facts = facts_of()
    known = checklist_facts(facts)
    assert set(known) <= set(FACTS)
    assert "external validation" in known["design"] and "internal" not in known
    assert known["external"].startswith("Data set clinic: 60 images of 20 groups.")
    assert "task linear, on 900 labelled images of data set version beef" in known["training"]
    assert known["initial"] == "first." and "/secret" not in " ".join(known.values())
    assert not any("patients of the data set that the model was trained on" in limit for limit in facts.limits)
    assert any("One finished model is judged" in limit for limit in facts.limits)


def test_a_part_of_the_training_s_own_data_set_is_internal_and_a_limit() -> None:
    facts = facts_of()
    own = replace(facts, card=replace(facts.card, lineage={**facts.card.lineage, "dataset": "cafe"}))
    known = checklist_facts(own)
    assert "held out" in known["design"] and "internal" in known and "external" not in known
    assert any("other patients of the data set that the model was trained on" in limit for limit in own.limits)


def test_what_was_seen_is_neither_and_is_said_where_the_answer_stands() -> None:
    facts = facts_of(seen=Seen(4, 2, 3, "x", 0))
    known = checklist_facts(facts)
    assert "external" not in known and "internal" not in known
    assert known["disjoint"].startswith("Not disjoint") and "4 of these images and 2 others" in known["disjoint"]
    (text,) = asked_section(facts).blocks
    assert isinstance(text, report.Text) and "of which it had seen a part (4 of these images" in text.paragraph
    assert any(limit.startswith("Seen in training or pretraining: 4 of these") for limit in facts.limits)


def test_namesakes_are_a_limit_and_stand_beside_the_claim_to_be_disjoint() -> None:
    facts = facts_of(seen=Seen(0, 0, 0, "", 7))
    assert "7 groups share a name with one of the training" in checklist_facts(facts)["disjoint"]
    assert any(limit.startswith("7 judged groups are called as") for limit in facts.limits)


def test_runs_that_are_compared_out_of_fold_are_an_internal_evaluation_without_a_dataset() -> None:
    facts = facts_of()
    table = facts.selection.table.rename_columns(["truth", "group"])
    compared = replace(facts, split="group", dataset=None, selection=Selection(table), others=("theirs",))
    known = checklist_facts(compared)
    assert "internal evaluation" in known["design"] and known["internal"] == "Judged once."
    assert known["classes"] == "benign: 30 images, 20 groups; malign: 30 images, 20 groups."
    assert known["failures"] == "See the confusion matrix." and "source" not in known
    said = str(asked_section(replace(compared, verdicts=("mine is ahead.",))).blocks)
    assert "mine and theirs were asked about 60" in said and "mine is ahead." in said
    assert [section.heading for section in closing_sections(compared)] == ["Limits", "Checklist"]
