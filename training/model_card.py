"""RUN/model/README.md: a model card as Hugging Face reads it, YAML in front and Markdown behind."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import yaml

from training.artifact import HEAD, HEADS, HIERARCHY, WEIGHTS, ModelCard, versions
from training.report import with_interval
from training.tasks.nearness import METRIC

README = "README.md"
METRICS = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced_accuracy",
    "kappa": "cohen_kappa",
    "kappa_quadratic": "cohen_kappa_quadratic",
    "f1_macro": "f1",
    "auroc": "roc_auc",
    "ece": "expected_calibration_error",
}
"""Names of our metrics in the front matter, where the hub knows another."""


@dataclass(frozen=True)
class Trained:
    """What a model card says that model.json does not."""

    name: str
    """Of the run."""
    data: str
    """Name of the data set, without its place."""
    images: Mapping[str, int]
    """Labelled images per class."""
    labelled: int
    """Labelled images: fewer than those of all classes together where an image may have several."""
    groups: int
    protocol: str
    """One or two sentences."""
    metrics: Mapping[str, Any]
    """As in summary.json: name -> value, ci95, per_fold."""
    limits: Sequence[str] = ()


def model_card(card: ModelCard, trained: Trained) -> str:
    """The text of README.md. Names of classes and runs are escaped: they can be neither markup nor YAML."""
    return f"---\n{_front_matter(card, trained)}---\n\n{_body(card, trained)}"


def first_weights(init: str) -> str:
    """What `--init` named, without the place where it lay."""
    return init if init.startswith(("timm:", "hf-hub:")) else PurePosixPath(init).name


def _front_matter(card: ModelCard, trained: Trained) -> str:
    results = [
        {"type": METRICS.get(name, name), "name": name, "value": metric["value"]}
        for name, metric in trained.metrics.items()
        if metric["value"] is not None
    ]
    values: dict[str, Any] = {
        "library_name": "timm",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "medical-imaging", "timm", "rayograph"],
        "metrics": [entry["type"] for entry in results],
        "model-index": [
            {
                "name": one_line(trained.name),
                "results": [
                    {
                        "task": {"type": "image-classification"},
                        "dataset": {"name": one_line(trained.data), "type": "private"},
                        "metrics": results,
                    }
                ],
            }
        ],
    }
    text: str = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=10_000)
    return "# license: to be chosen by the author\n" + text


def _body(card: ModelCard, trained: Trained) -> str:
    title = [
        f"# {escaped(trained.name)}",
        "",
        "**Research use only; not a medical device. Do not base decisions about patients on it.**",
        "",
        f"A classifier of images into {len(card.classes)} classes"
        f"{', of which an image may have several' if card.activation == 'sigmoid' else ''}, made with Rayograph.",
    ]
    parts = [title, *(["## " + heading, "", *lines] for heading, lines in _sections(card, trained).items())]
    return "\n\n".join("\n".join(part) for part in parts) + "\n"


def _sections(card: ModelCard, trained: Trained) -> dict[str, list[str]]:
    counts = [[escaped(name), f"{count:,}"] for name, count in trained.images.items()]
    figures = [[escaped(name), with_interval(m["value"], m["ci95"])] for name, m in trained.metrics.items()]
    limits = [f"- {escaped(limit)}" for limit in trained.limits]
    several = card.activation == "sigmoid"
    scores = "logits" if several else "logarithms"
    told = "It always names one of its classes, also for an image that shows none of them."
    if several:
        told = "It says of each of its classes by itself whether an image shows it, and knows no others."
    return {
        "Intended use": [
            "Research on images like those it was trained on: same examination, same classes, same preparation.",
            f"{told} It was not tested in any",
            "clinic. Who it is for, and who must not use it: to be filled in by the author.",
        ],
        "Training data": [
            f"{trained.labelled:,} labelled images of {trained.groups:,} groups (patients, slides) of the "
            f"data set {escaped(trained.data)}, version `{card.lineage.get('dataset', 'unknown')}`.",
            "",
            *_table(["class", "images"], counts),
        ],
        "How it was judged": [
            escaped(trained.protocol),
            "",
            *_table(["metric", "value [95 % interval]"], figures),
            "",
            f"Calibration: its probabilities are divided by temperature {card.temperature:.3f} (their {scores} are); "
            "`ece` above is how far stated probabilities are from the truth, 0 is best.",
        ],
        "Limits": limits or ["To be filled in by the author."],
        "The model": _model(card),
        "How to load it": _loading(card),
        "License": ["To be chosen by the author."],
    }


_CLASSIFIERS = {
    "network": "its own",
    "estimator": f"scikit-learn, `{HEAD}`",
    "metric": f"the nearest class mean in an embedding of unit length, `{METRIC}`",
    "hierarchy": f"of a class tree, `{HIERARCHY}`",
}


def _model(card: ModelCard) -> list[str]:
    network, shown, initial = card.architecture, card.input, card.lineage.get("initial", {})
    classifier = _CLASSIFIERS.get(card.head, "none")
    digest = f", sha256 `{initial['sha256']}`" if initial.get("sha256") else ""
    return [
        f"- Network: `{network.name}` of timm, {network.height} x {network.width} pixels, {network.channels} channels; "
        f"classifier: {classifier}",
        f"- First weights: {escaped(first_weights(str(initial.get('init', 'unknown'))))}{digest}",
        f"- Input: values in 0 to 1, less {numbers(shown.mean)}, divided by {numbers(shown.std)}; images are brought "
        f"to {card.image_path.height} x {card.image_path.width} by `{card.image_path.fit}` first",
        f"- Versions: {', '.join(f'{name} {version}' for name, version in versions().items())}",
    ]


def _loading(card: ModelCard) -> list[str]:
    own = card.head == "network"
    return [
        "With Rayograph, which prepares images as in training:",
        "",
        "```bash",
        "rayograph predict IMAGES --model RUN --out predictions.parquet",
        "```",
        "",
        "```python",
        "from training.artifact import load_model",
        "",
        'model = load_model("RUN")',
        "probabilities = model.probabilities(pixels)  # uint8 [N, height, width, channels]",
        "```",
        "",
        "With timm alone" + (":" if own else f", the features that `{HEADS.get(card.head, (HEAD,))[0]}` works on:"),
        "",
        "```python",
        card.snippet(WEIGHTS),
        "```",
    ]


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [headers, ["---"] * len(headers), *rows]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def numbers(values: Sequence[float]) -> str:
    return f"({', '.join(f'{value:.4g}' for value in values)})"


def escaped(text: str) -> str:
    """One line in which no character is Markdown or HTML."""
    return re.sub(r"([\\`*_\[\]<>|~&$])", r"\\\1", one_line(text))


def one_line(text: str) -> str:
    """A line `---` in a name would end the front matter."""
    return " ".join(text.split())
