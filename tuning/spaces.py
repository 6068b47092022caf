"""What each study searches, as plain data: a range or a choice per field of `transfer`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

from training.configs import TransferConfig

PRETRAINED_VIT, SEVERAL_LEVELS = "a pretrained ViT", "a class tree of several levels"


@dataclass(frozen=True)
class Range:
    """Values from `low` to `high`, both included, evenly or on a logarithmic scale.

    `only` names the one kind of first weights, or of classes, for which the field means anything; empty where it always
    does.
    """

    low: float
    high: float
    log: bool = False
    only: str = ""
    default: float | None = None
    """The verb's default, where its config says None and leaves it to the weights, or is not a number."""
    when: tuple[str, str] | None = None
    """Another setting and its value, without which this one means nothing."""

    def suggested(self, name: str, trial: Trial) -> float:
        return trial.suggest_float(name, self.low, self.high, log=self.log)

    def in_words(self) -> tuple[str, str]:
        """(what it may be, on which scale)."""
        return f"{self.low:g} to {self.high:g}", "logarithmic" if self.log else "even"


@dataclass(frozen=True)
class Choice:
    """One of some values; the first is the default where the verb's own is none of them."""

    values: tuple[str, ...]
    only: str = ""
    when: tuple[str, str] | None = None

    def suggested(self, name: str, trial: Trial) -> str:
        return str(trial.suggest_categorical(name, self.values))

    def in_words(self) -> tuple[str, str]:
        return ", ".join(self.values), "choice"


class Trial(Protocol):
    """What a space asks of Optuna's."""

    def suggest_float(self, name: str, low: float, high: float, *, log: bool) -> float: ...

    def suggest_categorical(self, name: str, choices: Sequence[str]) -> Any: ...


Setting = Range | Choice
Space = Mapping[str, Setting]
Params = dict[str, float | str]

STUDIES: dict[str, dict[str, Setting]] = {
    "transfer": {
        "lr": Range(1e-4, 1e-2, log=True),
        "weight_decay": Range(1e-3, 0.3, log=True),
        "layer_decay": Range(0.5, 1.0, only=PRETRAINED_VIT, default=0.75),
        "drop_path": Range(0.0, 0.3),
        "label_smoothing": Range(0.0, 0.2),
        "min_crop": Range(0.25, 1.0),
        "jitter": Range(0.0, 0.4),
    },
    "hierarchical": {
        "init": Choice(()),
        "inputs": Choice(()),
        "structure": Choice(("transferred", "independent", "flat", "joint")),
        "level_weights": Range(0.1, 10.0, log=True, only=SEVERAL_LEVELS, default=1.0, when=("structure", "joint")),
        "stack": Choice(("none", "forest", "logistic")),
        "lr": Range(1e-4, 1e-2, log=True),
        "weight_decay": Range(1e-3, 0.3, log=True),
        "label_smoothing": Range(0.0, 0.2),
    },
}
"""A choice without values is of what the search was given; of one value or none it is left out."""


def space_for(
    study: str,
    *,
    pretrained_vit: bool,
    several_levels: bool = True,
    given: Mapping[str, tuple[str, ...]] | None = None,
) -> Space:
    """The fields of a study that mean something for these first weights and classes, and for what is `given` to choose
    from."""
    holds = {"": True, PRETRAINED_VIT: pretrained_vit, SEVERAL_LEVELS: several_levels}
    found: dict[str, Setting] = {}
    for name, setting in STUDIES[study].items():
        if isinstance(setting, Choice) and not setting.values:
            setting = replace(setting, values=(given or {}).get(name, ()))  # noqa: PLW2901
        known = not isinstance(setting, Choice) or len(setting.values) > 1
        if known and holds[setting.only]:
            found[name] = setting
    return found


def suggestion(space: Space, trial: Trial) -> Params:
    """The settings that Optuna suggests, of each that means something beside those before it."""
    found: Params = {}
    for name, setting in space.items():
        if _means(setting, found):
            found[name] = setting.suggested(name, trial)
    return found


def _means(setting: Setting, chosen: Params) -> bool:
    return setting.when is None or chosen.get(setting.when[0]) == setting.when[1]


def defaults(space: Space) -> Params:
    """The values that trial 0 takes: what the verb does when nothing is said."""
    declared: dict[str, Any] = {field.name: field.default for field in fields(TransferConfig)}
    found: Params = {}
    for name, setting in space.items():
        if not _means(setting, found):
            continue
        if isinstance(setting, Choice):
            found[name] = declared[name] if declared[name] in setting.values else setting.values[0]
        else:
            found[name] = float(declared[name] if setting.default is None else setting.default)
    return found
