"""RUN/model/README.md of a pretrained encoder: a short model card, YAML in front and Markdown behind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from training.artifact import WEIGHTS, ModelCard, versions
from training.model_card import escaped, first_weights, numbers, one_line

SCORES = {
    "knn_balanced_accuracy": "balanced accuracy of nearest neighbours on its features",
    "linear_balanced_accuracy": "balanced accuracy of a linear classifier on its features",
}


def encoder_card(card: ModelCard, *, name: str, data: str, scores: Mapping[str, Any]) -> str:
    """The text of README.md. Names are escaped: they can be neither markup nor YAML.

    Args:
        name, data: of the run and of the data set, without their places.
        scores: of the last probe, by the names in `SCORES`; those that are not there were not measured.
    """
    front = {
        "library_name": "timm",
        "pipeline_tag": "image-feature-extraction",
        "tags": ["image-feature-extraction", "self-supervised", "medical-imaging", "timm", "rayograph"],
        "model_name": one_line(name),
    }
    text: str = yaml.safe_dump(front, sort_keys=False, allow_unicode=True, width=10_000)
    return f"---\n# license: to be chosen by the author\n{text}---\n\n{_body(card, name, data, scores)}"


def _body(card: ModelCard, name: str, data: str, scores: Mapping[str, Any]) -> str:
    network, shown, lineage = card.architecture, card.input, card.lineage
    initial = lineage.get("initial", {})
    digest = f", sha256 `{initial['sha256']}`" if initial.get("sha256") else ""
    measured = [f"- {words}: {scores[key]:.3f}" for key, words in SCORES.items() if scores.get(key) is not None]
    probed = [
        "While it was trained, small classifiers on its features were judged on labelled images of the same data set,",
        "split by group. These figures say whether training went well, not how good a classifier will be:",
        "",
        *measured,
    ]
    lines = [
        f"# {escaped(name)}",
        "",
        "**Research use only; not a medical device. Do not base decisions about patients on it.**",
        "",
        "An encoder of images without a classifier, pretrained without labels with Rayograph. It names no disease.",
        "",
        "## Intended use",
        "",
        "First weights for a classifier of images like those below, or features for search among them.",
        "",
        "## Training data",
        "",
        f"{lineage.get('images', 0):,} images of the data set {escaped(data)}, version "
        f"`{lineage.get('dataset', 'unknown')}`, by method `{lineage.get('method', 'unknown')}`. Hashes of them, and "
        "of their groups' names, lie beside the weights, so that a later evaluation knows what was seen.",
        "",
        "## How it was judged",
        "",
        *(probed if measured else ["It was not judged: there were too few labelled images, or nobody asked for it."]),
        "",
        "## Limits",
        "",
        "- Its features follow what is frequent in the images: devices, sites and framing as much as disease.",
        "- Images that it was pretrained on are no longer unseen: a classifier on it is tested on other patients.",
        "",
        "## The model",
        "",
        f"- Network: `{network.name}` of timm, {network.height} x {network.width} pixels, {network.channels} channels",
        f"- First weights: {escaped(first_weights(str(initial.get('init', 'unknown'))))}{digest}",
        f"- Input: values in 0 to 1, less {numbers(shown.mean)}, divided by {numbers(shown.std)}; images are brought "
        f"to {card.image_path.height} x {card.image_path.width} by `{card.image_path.fit}` first",
        f"- Versions: {', '.join(f'{package} {version}' for package, version in versions().items())}",
        "",
        "## How to load it",
        "",
        "```bash",
        "rayograph transfer --init RUN --data LABELLED --out CLASSIFIER",
        "rayograph embed IMAGES --model RUN --out features.parquet",
        "```",
        "",
        "With timm alone:",
        "",
        "```python",
        card.architecture.snippet(WEIGHTS, 0),
        "```",
        "",
        "## License",
        "",
        "To be chosen by the author.",
    ]
    return "\n".join(lines) + "\n"
