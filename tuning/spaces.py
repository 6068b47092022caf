"""What each study searches, as plain data: a range per field of the verb that it tunes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from training.configs import TransferConfig

PRETRAINED_VIT = "a pretrained ViT"


@dataclass(frozen=True)
class Range:
    """Values from `low` to `high`, both included, evenly or on a logarithmic scale.

    `only` names the one kind of first weights for which the field means anything; empty where it always does.
    """

    low: float
    high: float
    log: bool = False
    only: str = ""
    default: float | None = None
    """The verb's default, where its config says None and leaves it to the weights."""


Space = Mapping[str, Range]

STUDIES: dict[str, dict[str, Range]] = {
    "transfer": {
        "lr": Range(1e-4, 1e-2, log=True),
        "weight_decay": Range(1e-3, 0.3, log=True),
        "layer_decay": Range(0.5, 1.0, only=PRETRAINED_VIT, default=0.75),
        "drop_path": Range(0.0, 0.3),
        "label_smoothing": Range(0.0, 0.2),
        "min_crop": Range(0.25, 1.0),
        "jitter": Range(0.0, 0.4),
    },
}


def space_for(study: str, *, pretrained_vit: bool) -> dict[str, Range]:
    """The fields of a study that mean something for these first weights."""
    return {name: range for name, range in STUDIES[study].items() if pretrained_vit or range.only != PRETRAINED_VIT}


def defaults(space: Space) -> dict[str, float]:
    """The values that trial 0 takes: what the verb does when nothing is said."""
    declared: dict[str, Any] = {field.name: field.default for field in fields(TransferConfig)}
    return {name: float(declared[name] if range.default is None else range.default) for name, range in space.items()}
