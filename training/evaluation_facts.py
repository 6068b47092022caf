"""What an evaluation is asked, where its limits are, and what it knows of the items of the checklists."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from training import report
from training.answers import about_data, about_network, about_results
from training.artifact import ModelCard
from training.checklist import checklist_section
from training.configs import EvaluateConfig
from training.dataset import Dataset, Selection
from training.judgement import Judged, guessing
from training.limits import UNSEEN, Known, limits_of, sites_in
from training.model_card import first_weights
from training.novelty import Seen
from training.results import answer_of, class_counts, question_of
from training.subgroups import ByColumn


@dataclass(frozen=True, eq=False)
class Facts:
    """What the report of an evaluation says beside its figures."""

    name: str
    """Of the model."""
    config: EvaluateConfig
    card: ModelCard
    judged: Judged
    selection: Selection
    """That the rows of `judged` index."""
    split: str
    """`UNSEEN`, or that of the RUNs whose out-of-fold predictions are compared."""
    protocol: str
    """How it was judged, in sentences."""
    seen: Seen
    dataset: Dataset | None
    """None where out-of-fold predictions are compared."""
    others: Sequence[str]
    """Names of the models that it is compared with."""
    verdicts: Sequence[str] = ()
    """Sentences on who is ahead."""
    by: Mapping[str, ByColumn] = field(default_factory=dict)
    method: str = ""
    """How the model's attention is shown: a key of `training.attention.WORDS`, or ""."""

    @property
    def unseen(self) -> bool:
        return self.split == UNSEEN

    @property
    def related(self) -> bool:
        """Whether the images are others of the very DATASET, in the same version, that the model was made on."""
        own = self.card.lineage.get("dataset")
        return self.dataset is not None and self.dataset.version == own and not self.seen.any

    @property
    def data(self) -> str:
        """Name of the data set, without its place."""
        return "" if self.config.data is None else Path(self.config.data.rstrip("/")).name

    @cached_property
    def groups(self) -> int:
        return len(set(self.selection.column("group")))

    @cached_property
    def limits(self) -> list[str]:
        counts: Mapping[str, Any] = {} if self.dataset is None else self.dataset.info["counts"]
        images, groups = class_counts(self.labelled, self.judged.classes)
        columns = {name: self.selection.column(name) for name in self.selection.table.column_names if name != "pixels"}
        return limits_of(
            Known(
                split=self.split,
                images=images,
                class_groups=groups,
                groups=self.groups,
                metrics=self.judged.metrics,
                guessing=guessing(self.judged.truth, len(self.judged.classes)),
                ungrouped=counts.get("ungrouped", 0),
                sites=sites_in(columns),
                seen=self.seen.in_words if self.seen.any else "",
                namesakes=self.seen.namesakes,
                related=self.related,
                conflicting=counts.get("conflicting_copies", 0),
                quarantined=counts.get("quarantined", 0) / max(1, counts.get("images", 1)),
            )
        )

    @cached_property
    def labelled(self) -> Selection:
        """With a column `label`, which predictions call truth."""
        table = self.selection.table
        if "label" in table.column_names:
            return self.selection
        return Selection(table.append_column("label", table["truth"]))


def asked_section(facts: Facts) -> report.Section:
    """The question and the answer, for a reader who does not program."""
    total, unit = len(facts.selection), facts.config.unit
    of = f"{total:,} labelled images of {facts.groups:,} groups"
    if not facts.unseen:
        how = f"were asked about {of}, each image while its group was held out of training"
        asked = f"{facts.name} and {', '.join(facts.others)} {how}."
    else:
        new = f"of which it had seen a part ({facts.seen.in_words})" if facts.seen.any else "that it had not seen"
        asked = f"{facts.name}, trained before, was asked about {of} (data set {facts.data}) {new}."
    of_one = f"Of {facts.name}: " if facts.others else ""
    words = [question_of(facts.judged, unit), asked, of_one + answer_of(facts.judged, unit)]
    blocks: list[report.Block] = [report.Text(" ".join(words))]
    return report.Section("What was asked", [*blocks, *(report.Text(verdict) for verdict in facts.verdicts)])


def closing_sections(facts: Facts) -> list[report.Section]:
    """Limits, and the checklists."""
    return [report.Section("Limits", [report.Points(facts.limits)]), checklist_section(checklist_facts(facts))]


def checklist_facts(facts: Facts) -> dict[str, str]:
    """What the evaluation can answer of `training.checklist.FACTS`."""
    results = about_results(
        facts.judged, facts.selection, facts.by, method=facts.method, mistakes=facts.dataset is not None
    )
    return about_network(facts.card) | _about_origin(facts.card) | results | _about_data(facts) | _about_design(facts)


def _about_origin(card: ModelCard) -> dict[str, str]:
    """How the model came to be, as far as it says so itself."""
    lineage = card.lineage
    initial = lineage.get("initial", {})
    digest = f" (sha256 {initial['sha256'][:12]}…)" if initial.get("sha256") else ""
    made = f"By rayograph {lineage['verb']}, task {lineage.get('task', 'unknown')}, on" if "verb" in lineage else "On"
    return {
        "initial": f"{first_weights(str(initial['init']))}{digest}." if "init" in initial else "",
        "training": f"{made} {lineage['images']:,} labelled images of data set version "
        f"{lineage.get('dataset', 'unknown')}; its own report tells how."
        if isinstance(lineage.get("images"), int)
        else "",
    }


def _about_data(facts: Facts) -> dict[str, str]:
    if facts.dataset is None:
        images, groups = class_counts(facts.labelled, facts.judged.classes)
        listed = "; ".join(f"{c}: {images[c]:,} images, {groups[c]:,} groups" for c in facts.judged.classes)
        return {"classes": f"{listed}.", "size": f"{len(facts.selection):,} images of {facts.groups:,} groups."}
    where, path = facts.config.where, facts.card.image_path
    return about_data(facts.dataset, facts.selection, facts.judged.classes, name=facts.data, where=where, path=path)


def _about_design(facts: Facts) -> dict[str, str]:
    found = {"limits": " ".join(facts.limits)}
    if not facts.unseen:
        apart = "images only, so patients may stand on both sides" if facts.split == "image" else "groups"
        return found | {
            "design": "Comparison of models by internal evaluation.",
            "partitions": facts.protocol,
            "disjoint": f"Partitions are disjoint by {apart}.",
            "internal": facts.protocol,
        }
    found["partitions"] = "All images are for testing. Thresholds, where there are any, were chosen on other images."
    found["selection"] = "None of these images had a say in any choice that evaluate made."
    if facts.seen.any:
        return found | {
            "design": "Evaluation of a finished model on data of which it has seen a part.",
            "disjoint": f"Not disjoint from the images that the model was made with: {facts.seen.in_words}.",
        }
    names = f"; {facts.seen.namesakes:,} groups share a name with one of the training" if facts.seen.namesakes else ""
    found["disjoint"] = f"From the images that the model was made with, by bytes and by group{names}."
    told = f"Data set {facts.data}: {len(facts.selection):,} images of {facts.groups:,} groups. {facts.protocol}"
    if facts.related:
        return found | {"design": "Evaluation of a finished model on a part that was held out.", "internal": told}
    return found | {"design": "Evaluation of a finished model on other data (external validation).", "external": told}
