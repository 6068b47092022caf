"""What learns to answer the questions of a class tree: a whole network on pixels, or a small one on frozen features.

Both begin with given weights and with a classifier of their own, stop where held rows are judged best, and give back
modules whose weights another can start from.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import nn

from training import keyed
from training.artifact import features_of
from training.configs import TransferConfig
from training.encoder import seed_weights
from training.schedule import parameter_groups, warmup_cosine
from training.tasks.finetune import WARMUP, Loss, Recipe, fine_tune
from training.tasks.scaling import FLOOR, spread_of
from training.transform import Input

Weights = Mapping[str, torch.Tensor]
WIDTH = 64
"""Hidden units on frozen features: our choice."""
DROPOUT = 0.25
PASSES, RATE, DECAY = 5, 5.0, 200.0
"""How many times as many passes, as large steps and as strong a decay it takes as a network: our choice, after ImageNet
and MAE features of Pap smear cells. With a network's own, it learnt too little of 192 features, and 1,280 by heart."""
SMALL = 0.1
"""How much smaller than Xavier's a classifier's first weights are, as in fine-tuning."""


@dataclass(frozen=True, eq=False)
class Question:
    """What one module is to learn: rows `train` of all, stopped where rows `held` are judged best."""

    outputs: int
    objective: Loss
    truth: np.ndarray
    """[N] of all rows, as the objective takes it; rows outside `train` and `held` are not looked at."""
    train: np.ndarray
    held: np.ndarray
    key: tuple[object, ...]
    """Separates the randomness of folds and nodes."""
    start: Weights | None = None
    """First weights but those of the classifier; the learner's own where None."""
    stop_after: int | None = None
    """Passes, of the schedule's, after which it ends."""


@dataclass(frozen=True, eq=False)
class Answer:
    module: nn.Module
    best_epoch: int


class Learner(Protocol):
    """Fits modules and asks them about rows."""

    @property
    def smoothing(self) -> float: ...

    def fit(self, question: Question) -> Answer: ...

    def logits(self, module: nn.Module, rows: np.ndarray) -> np.ndarray:
        """float32 [R, outputs]"""
        ...

    def seen(self, module: nn.Module, rows: np.ndarray) -> np.ndarray:
        """float32 [R, D]: the features that the module's classifier, or the module, is given."""
        ...


@dataclass(frozen=True, eq=False)
class Networks:
    """Fine-tunes timm networks on pixels uint8 [N, H, W, C]; the recipe's `init` is where they begin."""

    recipe: Recipe
    pixels: np.ndarray
    input: Input

    @property
    def smoothing(self) -> float:
        return self.recipe.label_smoothing

    def fit(self, question: Question) -> Answer:
        outcome = fine_tune(
            replace(self.recipe, classes=question.outputs),
            self.pixels,
            question.truth,
            question.train,
            question.held,
            *question.key,
            stop_after=question.stop_after,
            objective=question.objective,
            start=question.start,
        )
        return Answer(outcome.network, outcome.best_epoch)

    def logits(self, module: nn.Module, rows: np.ndarray) -> np.ndarray:
        if not len(rows):
            return np.empty((0, classifier_of(module).out_features), dtype=np.float32)
        return asked(module, self.seen(module, rows))

    def seen(self, module: nn.Module, rows: np.ndarray) -> np.ndarray:
        return features_of(module, self.input, self.pixels[rows])


class SmallNetwork(nn.Module):
    """Frozen features [B, D] -> logits [B, outputs]: standardised, one hidden layer, a linear classifier."""

    mean: torch.Tensor
    scale: torch.Tensor

    def __init__(self, dimension: int, outputs: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(dimension))
        self.register_buffer("scale", torch.ones(dimension))
        self.trunk = nn.Linear(dimension, WIDTH)
        self.dropout = nn.Dropout(DROPOUT)
        self.classifier = nn.Linear(WIDTH, outputs)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        hidden = nn.functional.gelu(self.trunk((features - self.mean) / self.scale))
        answers: torch.Tensor = self.classifier(self.dropout(hidden))
        return answers

    def get_classifier(self) -> nn.Linear:
        return self.classifier


@dataclass(frozen=True, eq=False)
class SmallNetworks:
    """Trains `SmallNetwork`s on features float32 [N, D]; those that start from another keep its scale of features."""

    features: np.ndarray
    epochs: int
    batch_size: int
    lr: float
    weight_decay: float
    smoothing: float
    seed: int

    def fit(self, question: Question) -> Answer:
        torch.manual_seed(keyed.number("dropout", self.seed, *question.key) % 2**63)
        network = self.first(question)
        optimizer = torch.optim.AdamW(parameter_groups(network, self.weight_decay), lr=self.lr)
        best, best_loss, best_epoch = None, float("inf"), question.stop_after or self.epochs
        for epoch in range(question.stop_after or self.epochs):
            self._one_epoch(network, optimizer, question, epoch)
            if not len(question.held):
                continue
            said = torch.from_numpy(self.logits(network, question.held))
            loss = float(question.objective.plain()(said, question.truth[question.held]))
            if loss < best_loss:
                best, best_loss, best_epoch = copy.deepcopy(network.state_dict()), loss, epoch + 1
        if best is not None:
            network.load_state_dict(best)
        return Answer(network.eval(), best_epoch)

    def first(self, question: Question) -> SmallNetwork:
        """The network before its first step."""
        shown = self.features[question.train]
        network = SmallNetwork(shown.shape[1], question.outputs)
        seed_weights(network, self.seed, "hierarchy.")
        with torch.no_grad():
            network.classifier.weight.mul_(SMALL)
        network.mean.copy_(torch.from_numpy(shown.mean(axis=0)))
        network.scale.copy_(torch.from_numpy(spread_of(shown)))
        if question.start is not None:
            network.load_state_dict(trunk_of(question.start, "classifier."), strict=False)
        return network

    def _one_epoch(
        self, network: SmallNetwork, optimizer: torch.optim.Optimizer, question: Question, epoch: int
    ) -> None:
        network.train()
        order = keyed.generator("order", self.seed, *question.key, epoch).permutation(question.train)
        batches = np.array_split(order, max(1, len(order) // self.batch_size))
        for number, rows in enumerate(batches):
            share = warmup_cosine(epoch * len(batches) + number, self.epochs * len(batches), WARMUP, floor=0.01)
            for group in optimizer.param_groups:
                group["lr"] = self.lr * share
            loss = question.objective(network(torch.from_numpy(self.features[rows])), question.truth[rows])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()

    def logits(self, module: nn.Module, rows: np.ndarray) -> np.ndarray:
        return asked(module, self.features[rows])

    def seen(self, module: nn.Module, rows: np.ndarray) -> np.ndarray:
        return np.asarray(self.features[rows])


def settled() -> dict[str, float]:
    """What small networks are made and trained with beside a config's fields: part of what their fits are known by."""
    made = {"width": WIDTH, "dropout": DROPOUT, "small": SMALL, "floor": FLOOR}
    return made | {"passes": PASSES, "rate": RATE, "decay": DECAY}


def small_networks_for(config: TransferConfig, features: np.ndarray) -> SmallNetworks:
    """The learner on frozen features that a config asks for, in proportion to what a network would be given."""
    return SmallNetworks(
        features,
        config.epochs * PASSES,
        config.batch_size,
        config.lr * RATE,
        config.weight_decay * DECAY,
        config.label_smoothing,
        config.seed,
    )


def trunk_of(weights: Weights, classifier: str) -> dict[str, torch.Tensor]:
    """The weights but those whose names begin with `classifier`."""
    return {name: tensor for name, tensor in weights.items() if not name.startswith(classifier)}


def classifier_of(module: nn.Module) -> nn.Linear:
    """The last layer of a timm network or a `SmallNetwork`."""
    found: nn.Linear = module.get_classifier()  # type: ignore[operator]
    return found


@torch.inference_mode()
def asked(module: nn.Module, features: np.ndarray) -> np.ndarray:
    """Logits float32 [N, outputs] of features [N, D]: pooled ones of a timm network itself, or a `SmallNetwork`'s."""
    head = module.eval() if isinstance(module, SmallNetwork) else classifier_of(module)
    device = next(head.parameters()).device
    return np.asarray(head(torch.from_numpy(features).to(device)).float().cpu().numpy())
