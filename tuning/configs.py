"""The config of `tune`: what is searched, on what, and how far; the fields of `transfer` that a search leaves alone."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar, Literal

from cyclopts import Parameter

from cluster.errors import UsageError, nearest
from cluster.settings import Config
from training.configs import TransferConfig, Words
from tuning.spaces import STUDIES, Params

FIXED = ("init", "preset", "model", "where", "epochs", "batch_size", "flip", "turns", "image_size", "seed", "device")
"""Fields that a trial takes over from `tune` as they are."""
HIERARCHICAL = "hierarchical"
OF_HIERARCHY = ("task", "learner", "inputs", "input_column", "unit")
"""Fields that the study of hierarchies sets."""


@Parameter(name="*")
@dataclass(frozen=True)
class TuneConfig(Config):
    RAISABLE: ClassVar[frozenset[str]] = frozenset({"trials"})

    _: KW_ONLY
    data: str
    "A labelled DATASET, or any SOURCE that ingest takes."
    out: str
    "Where the search goes; an unfinished one of the same config goes on."
    study: str = "transfer"
    "What is searched: transfer, the settings of fine-tuning, or hierarchical, how a tree of classes is learnt."
    trials: int = 20
    "Settings tried, trial 0 (the defaults of transfer) included; may be raised when --out is taken up again."
    epochs: int = 20
    "Passes of a trial that is not stopped early."
    holdout: float = 0.2
    "Share of the groups that the search never sees; winner and defaults are judged on them."
    init: str = "imagenet"
    "Starting weights: imagenet, a RUN, timm:NAME, hf-hub:NAME, a safetensors file in timm keys, or none."
    inits: Words = ()
    "Of --study hierarchical: further starting weights to choose among."
    inputs: Words = ()
    "Of --study hierarchical: kinds of images of a case, such as oct fundus: one of them or all."
    input_column: str | None = None
    "The column that tells the kinds of --inputs; default the one that has all their names."
    preset: Literal["auto", "tiny", "small", "base", "large"] = "auto"
    "Model size where --init names no model."
    model: str | None = None
    "A timm name where --init names no model."
    where: tuple[str, ...] = ()
    "Keep only rows whose COLUMN=VALUE."
    batch_size: int = 32
    "Global batch size."
    flip: bool = True
    "Mirror half of the images left to right."
    turns: bool = False
    "Turn images by quarter turns: only where a picture has no upright."
    image_size: str = "auto"
    "N or HxW; auto is the size of the initial weights' model."
    workers: str = "auto"
    "Trials at the same time; with one, the same seed gives the same search."
    seed: int = 0
    "Decides splits, suggestions, order, augmentation and initial weights."
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    "Where training runs."
    overwrite: bool = False
    "Throw away what is at --out."

    def __post_init__(self) -> None:
        if self.study not in STUDIES:
            known = f"known: {', '.join(STUDIES)}"
            raise UsageError(f"--study {self.study}: no such study ({known}).{nearest(self.study, STUDIES)}")
        self._require("trials", self.trials >= 1, "needs at least 1, which is the defaults")
        self._require("holdout", 0 < self.holdout <= 0.5, "must lie above 0 and be at most 0.5")
        for name in ("inits", "inputs"):
            needs = not getattr(self, name) or self.study == HIERARCHICAL
            self._require(name, needs, f"needs --study {HIERARCHICAL}")
        self.trial({})  # raises what `transfer` would refuse

    @property
    def given(self) -> dict[str, tuple[str, ...]]:
        """What a search may choose from beside the values that its study names."""
        several = [" ".join(self.inputs)] if self.inputs else []
        return {"init": (self.init, *self.inits), "inputs": (*several, *self.inputs)}

    def trial(self, params: Params) -> TransferConfig:
        """The `transfer` that a trial with these parameters stands for; with none, the defaults."""
        values: dict[str, Any] = {name: getattr(self, name) for name in FIXED} | params
        if self.study == HIERARCHICAL:
            chosen = str(params.get("inputs", " ".join(self.inputs))).split()
            values |= {"task": "hierarchical", "learner": "features", "inputs": tuple(chosen)}
            values |= {"unit": "case", "input_column": self.input_column} if chosen else {}
            if "level_weights" in params:  # of all levels below the first
                values["level_weights"] = (1.0, params["level_weights"])
        return TransferConfig(self.data, out=self.out, **values)
