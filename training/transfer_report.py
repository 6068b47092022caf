"""`report.html` of a transfer, for a reader who does not program: the question, the evidence, and what it is not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from cluster.progress import counted
from training import report, subgroups
from training.answers import about_data, about_network, about_results, spread_of_folds
from training.artifact import HEAD, WEIGHTS, ModelCard
from training.augment import MODALITIES, augmentation_of, described
from training.checklist import checklist_section
from training.configs import TransferConfig
from training.dataset import Dataset, Selection
from training.judgement import Judged, guessing
from training.layers import LAST
from training.limits import SEARCHED, Known, Searched, limits_of, sites_in
from training.model_card import Trained, first_weights
from training.protocol import in_words
from training.results import answer_of, class_counts, data_section, question_of, result_section, unit_blocks
from training.tasks.nearness import METRIC
from training.units import Units

TASKS = {
    "finetune": "The whole network was trained on the labelled images (fine-tuning).",
    "linear": "The network was left as it is; a linear classifier was trained on the numbers it gives for an image.",
    "knn": "The network was left as it is; an image takes the class of those that it gives similar numbers for.",
    "svm": "The network was left as it is; a support vector machine was trained on the numbers it gives for an image.",
    "metric": "The whole network was trained so that images of a class lie together in an embedding (metric learning); "
    "an image is of the class whose mean it lies nearest to.",
    "hierarchical": "The questions that lead down the class tree were learnt one by one or together, and the answers "
    "on the path to a class multiplied.",
}
TUNED = {
    "linear": "How strongly to regularise was chosen by an inner, grouped cross-validation of each training side.",
    "knn": "20 neighbours, weighted by distance; nothing was chosen.",
    "svm": "Kernel (linear or RBF) and C were chosen, and probabilities scaled, by an inner, grouped cross-validation "
    "of each training side.",
}
FEATURES = {
    "radiomic": "Those numbers are not the network's: they measure the main object of each image (intensity, shape, "
    "margin, texture).",
    "both": "Beside those numbers stand measures of the main object of each image (intensity, shape, margin, texture).",
    "fused": "A second such classifier judges measures of the main object of each image (intensity, shape, margin, "
    "texture) instead; the answer is the mean of both.",
}
_WEIGHED = "Classes were weighted to have the same say in training."
IMBALANCE = {
    "finetune": _WEIGHED,
    "linear": _WEIGHED,
    "svm": _WEIGHED,
    "metric": "Every batch held as many images of each of its classes.",
}


@dataclass(frozen=True, eq=False)
class Facts:
    """What the report, the checklist and the model card say of a transfer."""

    name: str
    """Of the run."""
    config: TransferConfig
    dataset: Dataset
    selection: Selection
    judged: Judged
    card: ModelCard
    best_epoch: int
    """Epochs of the final fit; 0 where nothing was fine-tuned."""
    shared: int = 0
    """Judged images that the first weights were pretrained on."""
    method: str = ""
    """How the model's attention is shown: a key of `training.attention.WORDS`, or ""."""
    units: Units | None = None
    """What is judged together; None where each image is by itself."""
    by: Mapping[str, subgroups.ByColumn] = field(default_factory=dict)
    """Of each column of `--by`."""

    @property
    def unit(self) -> str:
        """What one judgement is of."""
        return "image" if self.units is None else self.units.kind

    @property
    def several(self) -> bool:
        """Whether an image may have several labels."""
        return self.judged.several

    @property
    def data(self) -> str:
        """Name of the data set, without its place."""
        return Path(self.config.data.rstrip("/")).name

    @property
    def first_weights(self) -> str:
        """Where training started, without its place."""
        stages = self.card.lineage.get("stages")
        return f"those of stage {stages[-1]['name']}" if stages else first_weights(self.config.init)

    @property
    def searched(self) -> Searched:
        """Where the settings were searched."""
        version = self.config.searched_on
        return "" if version is None else "here" if version == self.dataset.version else "elsewhere"

    @cached_property
    def fits(self) -> int:
        """Models behind the judgements."""
        return len(set(zip(self.judged.repeat.tolist(), self.judged.fold.tolist(), strict=True)))

    @cached_property
    def groups(self) -> int:
        return len(set(self.selection.column("group")))

    @cached_property
    def limits(self) -> list[str]:
        counts, (images, groups) = self.dataset.info["counts"], class_counts(self.selection, self.judged.classes)
        columns = {name: self.selection.column(name) for name in self.selection.table.column_names if name != "pixels"}
        return limits_of(
            Known(
                split=self.config.split,
                images=images,
                class_groups=groups,
                groups=self.groups,
                metrics=self.judged.metrics,
                guessing=guessing(self.judged.truth, len(self.judged.classes)),
                ungrouped=counts.get("ungrouped", 0),
                sites=sites_in(columns),
                shared=self.shared,
                searched=self.searched,
                conflicting=counts.get("conflicting_copies", 0),
                quarantined=counts["quarantined"] / max(1, counts["images"]),
            )
        )

    @property
    def protocol(self) -> str:
        """How it was judged, in two sentences."""
        together = "" if self.unit == "image" else f" The images of a {self.unit} are judged together, as one."
        return (
            f"{in_words(self.config.as_dict())} Every figure is of images that the model "
            f"judging them was not trained on; intervals come from a bootstrap over groups.{together}"
        )


def trained_of(facts: Facts) -> Trained:
    """What the model card says of a transfer."""
    images, _ = class_counts(facts.selection, facts.judged.classes)
    return Trained(
        facts.name,
        facts.data,
        images,
        len(facts.selection),
        facts.groups,
        facts.protocol,
        facts.judged.metrics,
        tuple(facts.limits),
    )


def write_transfer_report(
    out: Path,
    facts: Facts,
    mistakes: report.Section | None = None,
    extra_sections: Sequence[report.Section] = (),
) -> None:
    """`out` holds report.html.

    Args:
        out: the RUN, with the figures of `judgement.figures_of`.
        mistakes: see `training.mistakes`.
        extra_sections: stand between the results and the mistakes.
    """
    sections = [
        report.Section("What was asked", _asked(facts)),
        data_section(facts.dataset, facts.selection, facts.judged.classes),
        report.Section("Protocol", _protocol(facts)),
        result_section(out, facts.judged, "Pooled out-of-fold predictions", learning=True),
        *extra_sections,
        *([mistakes] if mistakes is not None else []),
        report.Section("The model", _model(facts)),
        report.Section("Limits", [report.Points(facts.limits)]),
        checklist_section(checklist_facts(facts)),
    ]
    report.write_report(
        out / "report.html", title=f"Transfer: {facts.name}", sections=sections, images=facts.config.images
    )


# The sections


def _asked(facts: Facts) -> list[report.Block]:
    judged, total = facts.judged, len(facts.selection)
    images = "images" if facts.config.split == "image" else "images of patients or slides"
    blocks: list[report.Block] = [
        report.Text(
            f"{question_of(judged, facts.unit)} It learnt from {total:,} labelled images of "
            f"{facts.groups:,} groups (data set {facts.data}) and was asked about {images} that it had not seen. "
            f"{answer_of(judged, facts.unit)}"
        )
    ]
    if facts.config.split == "image":
        blocks.append(
            report.Warning(
                "Split by image: pictures of one patient stand on both sides, so these figures are too good. "
                "Judge by --split group."
            )
        )
    return blocks


def _protocol(facts: Facts) -> list[report.Block]:
    blocks: list[report.Block] = [
        report.Text(facts.protocol),
        *([] if facts.units is None else unit_blocks(facts.units, facts.config.pooling)),
        report.Text(
            f"That is {facts.fits} models, each fitted without the images it is asked about. What had to be chosen on "
            "the way (when to stop, how strongly to regularise, the temperature of the probabilities) was chosen on "
            "groups held back from each model's own training part, never on the images judged."
        ),
    ]
    if facts.shared:
        blocks.append(
            report.Warning(
                f"The first weights were pretrained, without labels, on {facts.shared:,} of the images that are judged."
            )
        )
    if facts.searched:
        blocks.append(report.Warning(SEARCHED[facts.searched]))
    return blocks


CHOSEN: dict[Searched, str] = {
    "": "No test image chose anything.",
    "here": "Settings were searched beforehand on this data set, images judged here among it; within the run no test "
    "image chose anything.",
    "elsewhere": "Settings were searched beforehand on another version of a data set; within the run no test image "
    "chose anything.",
}
"""What had a say in the choices that a run needs."""

_HEADS = {"estimator": f"the classifier is in {HEAD}", "metric": f"the embedding on it is in {METRIC}"}


def _done(facts: Facts) -> str:
    """What was trained on what, in words."""
    config, layers = facts.config, facts.card.features.layers
    found = [TASKS.get(config.task, config.task), *filter(None, [facts.card.input.told])]
    if layers and layers != (LAST,):
        found.append(f"Its numbers are of these layers, counted from the input: {', '.join(layers)}.")
    if config.features in FEATURES:
        found.append(FEATURES[config.features])
    return " ".join(found)


def _model(facts: Facts) -> list[report.Block]:
    card, network = facts.card, facts.card.architecture
    own, head = card.head == "network", _HEADS.get(card.head, "")
    fitted = f" for {counted(facts.best_epoch, 'epoch')}, the median of the folds" if facts.best_epoch else ""
    return [
        report.Text(
            f"{_done(facts)} The network is {network.name} at {network.height} x "
            f"{network.width} pixels; its first weights: {facts.first_weights}. The model kept was fitted "
            f"again on all labelled images{fitted}; its probabilities are divided by temperature "
            f"{card.temperature:.2f}, fitted out of fold."
        ),
        report.Text(
            "rayograph predict and rayograph serve use it as it is. To load "
            + ("it" if own else f"the network alone ({head})")
            + " with timm:"
        ),
        report.Code(card.snippet(f"model/{WEIGHTS}")),
    ]


# The checklist


def checklist_facts(facts: Facts) -> dict[str, str]:
    """What the run can answer of `training.checklist.FACTS`."""
    return {name: text for part in (_about_data, _about_training, _about_results) for name, text in part(facts).items()}


def _about_data(facts: Facts) -> dict[str, str]:
    apart = "images only, so patients may stand on both sides" if facts.config.split == "image" else "groups"
    classes, path = facts.judged.classes, facts.card.image_path
    where = facts.config.where
    return about_data(facts.dataset, facts.selection, classes, name=facts.data, where=where, path=path) | {
        "partitions": facts.protocol,
        "disjoint": f"Partitions are disjoint by {apart}.",
    }


def _about_training(facts: Facts) -> dict[str, str]:
    config, card = facts.config, facts.card
    initial = card.lineage.get("initial", {})
    digest = f" (sha256 {initial['sha256'][:12]}…)" if initial.get("sha256") else ""
    return about_network(card) | {
        "design": "Development with internal evaluation.",
        "initial": f"{facts.first_weights}{digest}.",
        "training": f"{_done(facts)} {TUNED.get(config.task) or _recipe(config)} "
        f"Seed {config.seed}; {facts.fits} models for the judgement and the final one.",
        "selection": f"{CHOSEN[facts.searched]} The final model was fitted again on all labelled images"
        + (f" for {counted(facts.best_epoch, 'epoch')}, the median of the folds." if facts.best_epoch else "."),
        "ensembles": "None: one model answers."
        if config.features != "fused"
        else "Two classifiers answer, of the network's numbers and of measures of the main object; the mean counts.",
        "imbalance": IMBALANCE.get(config.task, ""),
    }


def _recipe(config: TransferConfig) -> str:
    if config.task == "metric":
        margin = "its own margin" if config.margin is None else f"margin {config.margin:g}"
        target = f"loss {config.loss} with {margin}, {config.embedding} numbers an embedding"
    else:
        target = f"label smoothing {config.label_smoothing:g}"
    return (
        f"AdamW, at most {config.epochs} epochs, batch {config.batch_size}, learning rate {config.lr:g} with warm-up "
        f"and cosine, weight decay {config.weight_decay:g}, stochastic depth {config.drop_path:g}, "
        f"{target}; {described(augmentation_of(config))}"
        f"{'' if config.modality == 'auto' else f', as is safe for {MODALITIES[config.modality].name}'}."
    )


def _about_results(facts: Facts) -> dict[str, str]:
    return about_results(facts.judged, facts.selection, facts.by, method=facts.method) | {
        "clusters": spread_of_folds(facts.judged),
        "internal": facts.protocol,
        "external": "",
        "limits": " ".join(facts.limits),
    }
