"""Fine-tuning of the whole network: AdamW, one cycle, class weights, layer-wise decay for pretrained ViTs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from training import keyed
from training.artifact import forward
from training.augment import augmentation_of
from training.configs import TransferConfig
from training.encoder import layer_of, seed_weights
from training.schedule import decays, warmup_cosine
from training.tasks.objective import objective_for
from training.transform import Augmentation, Input, evaluation_view, sample_draws, training_view
from training.weights import Initial, Wanted, initial_weights

WARMUP = 0.1
EVALUATION_BATCH = 128
PRETRAINED_LAYER_DECAY = 0.75
"""What `--layer-decay` is for a pretrained ViT when nothing is said; 1 for everything else."""

OnEpoch = Callable[[dict[str, float], np.ndarray], None]
"""Told the history's row of an epoch, and the logits [H, K] of the held rows after it, where rows are held."""


class Loss(Protocol):
    """What a network is trained to, of logits [B, K] and the truth of their rows; `Objective` is one."""

    def __call__(self, logits: torch.Tensor, truth: np.ndarray) -> torch.Tensor: ...

    def plain(self) -> Loss:
        """Without smoothing: what judges."""
        ...


@dataclass(frozen=True)
class Recipe:
    """How a network is fine-tuned; plain values, shipped to the task that does it."""

    wanted: Wanted
    classes: int
    epochs: int
    batch_size: int
    lr: float
    weight_decay: float
    layer_decay: float | None
    label_smoothing: float
    augmentation: Augmentation
    seed: int
    device: str
    threads: int


def recipe_for(config: TransferConfig, wanted: Wanted, classes: int, threads: int) -> Recipe:
    """The recipe that `transfer` follows for its config; the network is built with the config's stochastic depth."""
    return Recipe(
        wanted=replace(wanted, extra=(("drop_path_rate", config.drop_path),)),
        classes=classes,
        epochs=config.epochs,
        batch_size=config.batch_size,
        lr=config.lr,
        weight_decay=config.weight_decay,
        layer_decay=config.layer_decay,
        label_smoothing=config.label_smoothing,
        augmentation=augmentation_of(config),
        seed=config.seed,
        device=wanted.device,
        threads=threads,
    )


@dataclass(frozen=True)
class Outcome:
    network: nn.Module
    initial: Initial
    best_epoch: int
    """Passes after which the held rows' loss was lowest; all of them where nothing was held."""
    history: list[dict[str, float]] = field(default_factory=list)


def fine_tune(
    recipe: Recipe,
    pixels: np.ndarray,
    truth: np.ndarray,
    train: np.ndarray,
    held: np.ndarray,
    *key: object,
    stop_after: int | None = None,
    on_epoch: OnEpoch | None = None,
    objective: Loss | None = None,
    start: Mapping[str, torch.Tensor] | None = None,
) -> Outcome:
    """A network trained on rows `train` of `pixels` (uint8 [N, H, W, C]), stopped where rows `held` were judged best.

    `truth` is class numbers [N], or label sets bool [N, K]: then each class is learnt by itself.
    The schedule spans `recipe.epochs`, of which `stop_after` are done; with no held rows the last one counts. `key`
    separates the randomness of folds and repeats. What `on_epoch` raises ends the training.
    `objective` is another loss than that of classes; `start` are weights of the same network to begin with in place of
    the recipe's, but for those of its classifier.
    """
    torch.set_num_threads(recipe.threads)
    torch.manual_seed(keyed.number("dropout", recipe.seed, *key) % 2**63)
    initial = initial_weights(recipe.wanted)
    network = started_from(with_classifier(initial.network, recipe), start).to(recipe.device)
    if initial.architecture.patch is None:
        network = network.to(memory_format=torch.channels_last)  # convolutions train 1.6 times as fast on a CPU
    optimizer = torch.optim.AdamW(layer_groups(network, recipe, initial), lr=recipe.lr)
    if objective is None:
        objective = objective_for(truth[train], recipe.classes, recipe.label_smoothing)
    once = replace(initial.input, tta="none")  # views multiply what judging costs; to choose the epoch one is enough
    best, best_loss, best_epoch, history = None, float("inf"), recipe.epochs, []
    for epoch in range(stop_after or recipe.epochs):
        loss = _one_epoch(recipe, network, optimizer, initial.input, objective, pixels, truth, train, epoch, key)
        row = {"epoch": epoch + 1, "loss": loss}
        if len(held):
            _, logits = predict(network, once, pixels[held], recipe.device)
            row["held_loss"] = float(objective.plain()(torch.from_numpy(logits), truth[held]))
            if row["held_loss"] < best_loss:
                best, best_loss, best_epoch = copy.deepcopy(network.state_dict()), row["held_loss"], epoch + 1
            if on_epoch is not None:
                on_epoch(row, logits)
        history.append(row)
    if best is not None:
        network.load_state_dict(best)
    network = network.eval().cpu().to(memory_format=torch.contiguous_format)
    return Outcome(network, initial, best_epoch, history)


def with_classifier(network: nn.Module, recipe: Recipe) -> nn.Module:
    """The network with a fresh classifier of small weights, keyed by the seed."""
    network.reset_classifier(recipe.classes)  # type: ignore[operator]
    head: nn.Module = network.get_classifier()  # type: ignore[operator]
    seed_weights(head, recipe.seed, "classifier.")
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.mul_(0.1)
    return network


def started_from(network: nn.Module, weights: Mapping[str, torch.Tensor] | None) -> nn.Module:
    """The network with these weights in all layers but its classifier, whose own may be of another width."""
    if weights is not None:
        head: nn.Module = network.get_classifier()  # type: ignore[operator]
        prefix = next(name for name, module in network.named_modules() if module is head) + "."
        trunk = {name: tensor for name, tensor in weights.items() if not name.startswith(prefix)}
        found = network.load_state_dict(trunk, strict=False)
        if not all(name.startswith(prefix) for name in found.missing_keys) or found.unexpected_keys:
            raise ValueError("the weights to start from are of another network")
    return network


def layer_groups(network: nn.Module, recipe: Recipe, initial: Initial) -> list[dict[str, Any]]:
    """AdamW groups with learning rates that fall by `layer_decay` per layer below the head (Bao et al. 2022)."""
    decay = recipe.layer_decay
    if decay is None:
        pretrained = initial.architecture.patch is not None and recipe.wanted.init != "none"
        decay = PRETRAINED_LAYER_DECAY if pretrained else 1.0
    depth = {n: layer_of(network, n) for n, p in network.named_parameters() if p.requires_grad}
    top = max(depth.values())
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            continue
        key = (depth[name], decays(name, parameter))
        scale = decay ** (top - depth[name])
        group = groups.setdefault(
            key, {"params": [], "scale": scale, "weight_decay": recipe.weight_decay if key[1] else 0.0}
        )
        group["params"].append(parameter)
    return list(groups.values())


def _one_epoch(
    recipe: Recipe,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    shown: Input,
    objective: Loss,
    pixels: np.ndarray,
    truth: np.ndarray,
    train: np.ndarray,
    epoch: int,
    key: tuple[object, ...],
) -> float:
    """Mean training loss of one pass in an order keyed by (seed, key, epoch)."""
    network.train()
    order = keyed.generator("order", recipe.seed, *key, epoch).permutation(train)
    batches = np.array_split(order, max(1, len(order) // recipe.batch_size))
    total = 0.0
    for number, rows in enumerate(batches):
        share = warmup_cosine(epoch * len(batches) + number, recipe.epochs * len(batches), WARMUP, floor=0.01)
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * share * group["scale"]
        draws, _ = sample_draws(recipe.augmentation, 0, recipe.seed, *key, epoch, positions=rows)
        logits = network(training_view(pixels[rows], shown, draws, recipe.device))
        loss = objective(logits, truth[rows])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        total += float(loss.detach()) * len(rows)
    return total / len(order)


@torch.inference_mode()
def predict(network: nn.Module, shown: Input, pixels: np.ndarray, device: str) -> tuple[np.ndarray, np.ndarray]:
    """(features [N, D], logits [N, K]), both float32, by the evaluation transform and in the views of `shown.tta`."""
    network.eval()
    features, logits = [], []
    for at in range(0, len(pixels), EVALUATION_BATCH):
        f, z = forward(network, evaluation_view(pixels[at : at + EVALUATION_BATCH], shown, device), shown.tta)
        features.append(f.float().cpu().numpy())
        logits.append(z.float().cpu().numpy())
    return np.concatenate(features), np.concatenate(logits)
