"""Trials of the study `hierarchical`: structures, meta-learners and inputs over frozen features. No Ray in here."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from training import metrics
from training.configs import TransferConfig
from training.fit import Labels
from training.hierarchical_fit import Ground, hierarchical_fold
from training.splits import Fold, Rows
from training.tasks.inputs import Inputs
from training.tasks.learners import small_networks_for
from tuning.configs import TuneConfig
from tuning.spaces import Params
from tuning.trial import Report, Sides, reason_of


@dataclass(frozen=True, eq=False)
class HierarchicalBench:
    """What all trials share: rows `train` fit, and the cases of rows `judged` judge; others are not looked at."""

    config: TuneConfig
    features: Mapping[str, np.ndarray]
    """[N, D] under each of the first weights."""
    labels: Labels
    inputs: Inputs
    classes: tuple[str, ...]
    train: Rows
    judged: Rows

    @property
    def epochs(self) -> int:
        return self.config.epochs

    def run(self, params: Params, report: Report) -> None:
        """One report, after the last epoch: `value` is the balanced accuracy on the cases of the validation rows. An
        error ends the trial with a report that has `failed`."""
        started = time.monotonic()
        try:
            probabilities, best_epoch = self.judge(params)
            truth = self.labels.truth[self.standing]
            value = metrics.balanced_accuracy(metrics.confusion(truth, probabilities.argmax(axis=1), len(self.classes)))
            own = np.maximum(probabilities[np.arange(len(truth)), truth], 1e-12)
            loss = float(-np.log(own).mean())
            found = {"value": float(value), "loss": loss, "held_loss": loss, "best_epoch": best_epoch}
            report({**found, "epoch": self.epochs, "seconds": time.monotonic() - started})
        except Exception as error:
            seconds = time.monotonic() - started
            report({"epoch": 0, "value": float("nan"), "failed": reason_of(error), "seconds": seconds})

    @property
    def standing(self) -> Rows:
        """The first of the judged rows of each case."""
        _, first = np.unique(self.inputs.case_of_row[self.judged], return_index=True)
        return self.judged[np.sort(first)]

    def judge(self, params: Params) -> tuple[np.ndarray, int]:
        """(probabilities [U, K] of the judged cases, the first module's best epoch)."""
        config = self.config.trial(params)
        result = hierarchical_fold(self.ground(config), Fold(0, 0, self.train, self.judged))
        return result.probabilities[np.searchsorted(self.judged, self.standing)], result.best_epoch

    def ground(self, config: TransferConfig) -> Ground:
        learner = small_networks_for(config, self.features[config.init])
        chosen = chosen_inputs(self.inputs, config.inputs)
        return Ground(
            learner,
            self.labels,
            chosen,
            self.classes,
            config.structure,
            config.learner,
            config.level_weights,
            config.stack,
            config.seed,
        )


def chosen_inputs(inputs: Inputs, names: tuple[str, ...]) -> Inputs:
    """Some of the inputs; the cases stay, also those that then have no image: they are answered by what was true of
    the training rows, so that all choices are judged on the same cases."""
    if not names:
        return inputs
    number = np.full(len(inputs.names) + 1, -1)
    for place, name in enumerate(names):
        number[inputs.names.index(name)] = place
    return replace(inputs, names=names, of_row=number[inputs.of_row])


def search_bench(bench: HierarchicalBench, sides: Sides) -> HierarchicalBench:
    """What trials are given: the search's rows alone, numbered anew; the held-out ones are not in there."""
    search = sides.search
    labels = bench.labels
    names, groups = labels.take(search)
    cut: dict[str, Any] = {
        "features": {init: values[search] for init, values in bench.features.items()},
        "labels": Labels(labels.truth[search], names, groups, labels.split),
        "inputs": replace(
            bench.inputs, of_row=bench.inputs.of_row[search], case_of_row=bench.inputs.case_of_row[search]
        ),
        "train": np.searchsorted(search, sides.fit),
        "judged": np.searchsorted(search, sides.validation),
    }
    return replace(bench, **cut)


def final_fit(bench: HierarchicalBench, params: Params) -> np.ndarray:
    """Probabilities [U, K] of the held-out cases, by what these settings make of all rows of the search."""
    return bench.judge(params)[0]
