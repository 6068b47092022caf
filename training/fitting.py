"""The tasks of `transfer`: each makes fits and a refitted model out of labelled rows and first weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from torch import nn

from cluster import storage
from cluster.errors import UsageError
from cluster.outdir import OutDir
from cluster.progress import counted, progress, say
from cluster.session import cores
from training.artifact import HEAD, HIERARCHY
from training.configs import TransferConfig
from training.dataset import Dataset, Selection
from training.device import threads_for
from training.features import PLAIN, Features, chosen, deep, radiomic, radiomic_columns
from training.fit import (
    FoldResult,
    Labels,
    finetune_fold,
    fit_frozen,
    frozen_fold,
    fused_fold,
    metric_fold,
    refit_metric,
    refit_network,
    require_judges,
)
from training.fits import PROTOCOL, Fits
from training.folds import run_folds
from training.hierarchical_fit import Ground, hierarchical_fold, refit_hierarchy, require_stackable
from training.splits import Fold
from training.tasks.finetune import Recipe, recipe_for, started_from
from training.tasks.frozen import chosen_by
from training.tasks.fusion import Fused
from training.tasks.inputs import inputs_of
from training.tasks.label_sets import LabelSets
from training.tasks.learners import Learner, Networks, settled, small_networks_for
from training.tasks.metric import metric_recipe
from training.tasks.nearness import METRIC
from training.tasks.structures import tree_for
from training.weights import initial_weights, wanted_for

RADIOMIC_IMAGES = 128
"""Images whose radiomics one task measures."""


@dataclass(frozen=True)
class Trained:
    """What a task leaves: a result per fit, and the model refitted on all rows that the run keeps."""

    results: list[FoldResult]
    network: nn.Module
    features: np.ndarray
    """Of (a sample of) the kept rows under the final network: what the model's domain is learnt from."""
    best_epoch: int = 0
    head: str = "network"
    """As in `ModelCard`."""
    estimator: Any = None
    """The classifier on features whose weights tell where it looks; None where the network is its own."""
    files: tuple[tuple[str, bytes], ...] = ()
    """Named parts of the artifact beside the network's weights."""
    taught: bool = True
    """Whether labels had a part in the network's weights."""
    described: Features = PLAIN
    """As in `ModelCard.features`."""


@dataclass(eq=False)
class Fitting:
    """What every task works on, with the machinery that all share: fits kept by content, features kept by the run."""

    config: TransferConfig
    dataset: Dataset
    selection: Selection
    classes: list[str]
    labels: Labels
    folds: list[Fold]
    """Of every share of the labels."""
    share: float
    """The largest share: the run's own, whose fits decide the refit."""
    kept: np.ndarray
    """Rows that the refitted model learns from."""
    out: OutDir
    device: str
    workers: int
    """Fits at a time, where there are so many."""

    def __post_init__(self) -> None:
        self.wanted = wanted_for(self.config, self.dataset, self.device)
        self.initial = initial_weights(self.wanted)
        self.described = chosen(self.config.features, self.config.layers, self.initial.network)
        self.pixels = self.dataset.pixels(self.selection)
        self.workers = min(self.workers, len(self.folds))

    def run(self) -> Trained:
        """The config's task."""
        self._announce()
        return TASKS[self.config.task](self)

    def _announce(self) -> None:
        config, network = self.config, self.initial.architecture
        say(
            f"{config.task}: {counted(len(self.selection), 'labelled image')}, "
            f"{counted(len(set(self.labels.groups)), 'group')}, {len(self.classes)} classes; "
            f"{counted(len(self.folds), 'fit')}, split by {config.split}, {self.workers} at a time"
        )
        digest = self.initial.provenance.get("sha256", "")
        say(
            f"initial weights: {config.init}{f' (sha256 {digest})' if digest else ''}; "
            f"{network.name} at {network.height}x{network.width}, "
            f"{counted(network.channels, 'channel')}, on {self.device}"
        )

    def recipe(self, workers: int) -> Recipe:
        """How a network is trained where `workers` do so at a time."""
        return recipe_for(self.config, self.wanted, len(self.classes), threads_for(workers))

    def alone(self, fit: Callable[..., Any], *arguments: Any) -> Any:
        """What one fit by itself, such as the final one, returns: with all threads, in a task of Ray's."""
        (found,) = run_folds(fit, arguments, [()], workers=1, gpu=self.device == "cuda")
        return found

    def median_epoch(self, results: list[FoldResult]) -> int:
        """The median best epoch of the fits with the run's own share of the labels."""
        return int(np.median([r.best_epoch for r in results if r.share == self.share]))

    def median_of(self, name: str, results: list[FoldResult], *, otherwise: float) -> np.ndarray:
        """The median, entry by entry, of `more[name]` of the fits with the run's own share of the labels that have the
        entry: that are not NaN there; `otherwise` where none has."""
        values = np.stack([r.more[name] for r in results if r.share == self.share])
        some, found = ~np.isnan(values).all(axis=0), np.full(values.shape[1:], float(otherwise))
        found[some] = np.nanmedian(values[:, some], axis=0)
        return found

    def features(self) -> np.ndarray:
        """Features [N, D] of all labelled rows, under the initial network or radiomic, kept for an interrupted run."""
        cache, key = self.out.path / f"features{self.described.tag}.safetensors", self._features_key()
        if not cache.exists() or _key_in(cache) != key:
            parts = [self._deep()] if self.described.layers else []
            parts += [self._radiomic()] if self.described.radiomic else []
            partial = cache.with_name(f".{cache.name}")
            save_file({"features": np.concatenate(parts, axis=1)}, partial, metadata={"key": key})
            storage.publish_file(partial, cache)
        return np.asarray(load_file(cache)["features"])

    def _features_key(self) -> str:
        """All that decides the features: between a kill and the resume a RUN at `--init` may have been trained further,
        and `--data` ingested anew."""
        first = self.initial
        network = [first.provenance, first.architecture.as_dict(), first.input.as_dict(), self.described.as_dict()]
        known = [self.dataset.version, self.image_ids, network]
        return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()

    def _deep(self) -> np.ndarray:
        torch.set_num_threads(cores())
        network, parts = self.initial.network.eval().to(self.device), []
        with progress("features", len(self.pixels), "images") as bar:
            for part in deep(self.described, network, self.initial.input, self.pixels, self.device):
                parts.append(part)
                bar.advance(len(part))
        network.cpu()
        return np.concatenate(parts)

    def _radiomic(self) -> np.ndarray:
        """By tasks on all cores: each image takes a core some milliseconds."""
        path, count = self.dataset.image_path, len(self.pixels)
        starts = range(0, count, RADIOMIC_IMAGES)
        found: dict[int, np.ndarray] = {}
        with progress("radiomics", count, "images") as bar:
            each = [(at,) for at in starts]
            shared = (self.pixels, (path.height, path.width))
            for at, part in run_folds(_radiomic_part, shared, each, workers=cores(), gpu=False):
                found[at] = part
                bar.advance(len(part))
        return np.concatenate([found[at] for at in starts])

    def each_fold(
        self,
        fit: Callable[..., FoldResult],
        *shared: Any,
        what: str = "",
        folds: list[Fold] | None = None,
        kept_in: str = "folds",
        more: dict[str, Any] | None = None,
    ) -> list[FoldResult]:
        """`fit(*shared, fold)` of all folds; those finished before an interruption are read, not computed again.

        Args:
            what: the progress bar's name; the task's where empty.
            folds: those of images where None.
            kept_in: folder of the RUN that keeps the results.
            more: all that decides a result beside config, first weights, labels and the fold's rows.
        """
        fits = self._fits(kept_in, more or {})
        done = [(fold, fits.load(fold)) for fold in (self.folds if folds is None else folds)]
        found = [result for _, result in done if result is not None]
        missing = {(f.share, f.repeat, f.fold): f for f, result in done if result is None}
        with progress(what or self.config.task, len(done), "folds", done=len(found)) as bar:
            each = [(fold,) for fold in missing.values()]
            for result in run_folds(fit, shared, each, workers=self.workers, gpu=self.device == "cuda"):
                fits.save(missing[result.share, result.repeat, result.fold], result)
                self.out.push()
                found.append(result)
                bar.advance(1)
        return found

    def _fits(self, folder: str, more: dict[str, Any]) -> Fits:
        chosen = {k: v for k, v in self.config.identity().items() if k not in PROTOCOL}
        subject = {
            "config": chosen | {"by_group": self.config.split != "image"},
            "initial": self.initial.provenance,
            "dataset": self.dataset.version,
            "labels": self.labels.names,
            "groups": self.labels.groups,
            **more,
        }
        return Fits(self.out.path / folder, subject, self.image_ids)

    @property
    def sides(self) -> list[np.ndarray]:
        """The rows that each fit, and the refit, learns from."""
        return [*(fold.train for fold in self.folds), self.kept]

    @property
    def image_ids(self) -> list[str]:
        return self.selection.column("image_id")


def finetune(fitting: Fitting) -> Trained:
    """The whole network is trained; the refit takes the median best epoch of the folds."""
    results = fitting.each_fold(finetune_fold, fitting.recipe(fitting.workers), fitting.pixels, fitting.labels)
    best = fitting.median_epoch(results)
    say(f"refitting on {counted(len(fitting.kept), 'image')} for {counted(best, 'epoch')}, the median of the folds")
    alone = (fitting.recipe(1), fitting.pixels, fitting.labels, fitting.kept, best)
    state, features = fitting.alone(refit_network, *alone)
    network = fitting.initial.architecture.build(len(fitting.classes))
    network.load_state_dict({k: torch.from_numpy(v.copy()) for k, v in state.items()})
    return Trained(results, network, features, best)


def metric(fitting: Fitting) -> Trained:
    """Network and embedding are trained so that classes lie apart; the refit takes the median best epoch."""
    config = fitting.config
    shared = (fitting.pixels, fitting.labels)
    results = fitting.each_fold(metric_fold, metric_recipe(config, fitting.recipe(fitting.workers)), *shared)
    best = fitting.median_epoch(results)
    say(f"refitting on {counted(len(fitting.kept), 'image')} for {counted(best, 'epoch')}, the median of the folds")
    alone = (metric_recipe(config, fitting.recipe(1)), *shared, fitting.kept, best)
    state, content, features = fitting.alone(refit_metric, *alone)
    network = fitting.initial.architecture.build(0)
    network.load_state_dict({k: torch.from_numpy(v.copy()) for k, v in state.items()})
    return Trained(results, network, features, best, head="metric", files=((METRIC, content),))


def frozen(fitting: Fitting) -> Trained:
    """A classifier on the features of the first weights, which stay as they are; or two whose scores are averaged."""
    config, described = fitting.config, fitting.described
    require_judges(fitting.labels, fitting.sides, config.task)
    features = fitting.features()
    shared = (config.task, features, fitting.labels)
    count, seed = len(fitting.classes), config.seed
    if config.features == "fused":
        columns = features.shape[1] - radiomic_columns()
        results = fitting.each_fold(fused_fold, columns, *shared, count, seed)
    else:
        columns = 0
        results = fitting.each_fold(frozen_fold, *shared, count, seed)
    head = fit_frozen(*shared, fitting.kept, count, seed, columns)
    own = head if isinstance(head, Fused) else head.estimators if isinstance(head, LabelSets) else head.estimator
    if told := chosen_by(own):
        say(f"the refitted SVM: {told}, by inner folds of the training groups")
    return Trained(
        results,
        fitting.initial.network,
        features[fitting.kept],
        head="estimator",
        estimator=own if described.plain else head,  # the weights of other features say nothing of where it looks
        files=((HEAD, head.dumps()),),
        taught=False,
        described=described,
    )


def _key_in(cache: Path) -> str | None:
    """What a file of features was kept by; None for one of older code."""
    with safe_open(cache, framework="np") as file:
        return (file.metadata() or {}).get("key")


def _radiomic_part(pixels: np.ndarray, stored: tuple[int, int], at: int) -> tuple[int, np.ndarray]:
    return at, radiomic(pixels[at : at + RADIOMIC_IMAGES], stored)


def hierarchical(fitting: Fitting) -> Trained:
    """A classifier per parent of the class tree, or one of all; networks, or small ones on frozen features."""
    config = fitting.config
    if fitting.labels.several:
        raise UsageError("--task hierarchical: images have several labels, and it judges one class for each")
    require_stackable(fitting.labels, config.stack, fitting.sides)
    more = {"small_networks": settled()} if config.learner == "features" else {}
    results = fitting.each_fold(hierarchical_fold, _ground(fitting, fitting.workers), more=more)
    epochs = np.rint(fitting.median_of("epochs", results, otherwise=0)).astype(np.int64)  # 0: the learner decides
    say(f"refitting on {counted(len(fitting.kept), 'image')} for the median epochs of the folds: {_listed(epochs)}")
    alone = (_ground(fitting, 1), fitting.kept, epochs, fitting.median_of("temperatures", results, otherwise=1))
    content, weights, features = fitting.alone(refit_hierarchy, *alone)
    network = fitting.initial.network
    if config.learner == "network":
        tensors = {name: torch.from_numpy(values.copy()) for name, values in weights.items()}
        network = started_from(fitting.initial.architecture.build(0), tensors)
    return Trained(
        results,
        network,
        features,
        best_epoch=int(epochs[0, 0]),
        head="hierarchy",
        files=((HIERARCHY, content),),
        taught=config.learner == "network",
    )


def _ground(fitting: Fitting, workers: int) -> Ground:
    config = fitting.config
    tree = tree_for(config.structure, fitting.classes)
    if len(config.level_weights) > tree.levels:
        raise UsageError(
            f"--level-weights {_listed(config.level_weights)}: the class tree has {tree.levels} levels at which "
            "something is to be told apart; give that many at most"
        )
    learner: Learner
    if config.learner == "network":
        learner = Networks(fitting.recipe(workers), fitting.pixels, fitting.initial.input)
    else:
        learner = small_networks_for(config, fitting.features())
    return Ground(
        learner,
        fitting.labels,
        inputs_of(fitting.selection.table, config.inputs, config.input_column),
        tuple(fitting.classes),
        config.structure,
        config.learner,
        config.level_weights,
        config.stack,
        config.seed,
    )


def _listed(values: Any) -> str:
    return " ".join(f"{value:g}" for value in np.ravel(values))


TASKS: dict[str, Callable[[Fitting], Trained]] = {
    "finetune": finetune,
    "linear": frozen,
    "knn": frozen,
    "svm": frozen,
    "metric": metric,
    "hierarchical": hierarchical,
}
