"""Metric learning: a network and an embedding of unit length, trained so that images of a class lie together.

AdamW, one cycle, random views and layer-wise decay are those of `training.tasks.finetune`; batches hold as many images
of each class, and training stops where held-back groups found their like best.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cluster.errors import DataError
from training import keyed
from training.configs import MetricLoss, TransferConfig
from training.domain import sampled_rows
from training.losses import LOSSES
from training.losses.centres import Centres, start_at
from training.retrieval import per_query
from training.schedule import decays, warmup_cosine
from training.tasks.finetune import EVALUATION_BATCH, WARMUP, Recipe, layer_groups
from training.tasks.nearness import members_of
from training.tasks.progressive import Progressive
from training.transform import Input, evaluation_view, sample_draws, training_view
from training.weights import Initial, initial_weights

PER_CLASS = 4
"""Images of a class in a batch, at least, where it is large enough: a pair-wise loss needs partners."""
CENTRE_RATE = 10.0
"""Learnt centres and proxies take steps so much longer than the network's: 10 to 100 are in use."""
GALLERY = 2000
"""Training rows among which held rows are asked for their like, at most."""


@dataclass(frozen=True)
class MetricRecipe:
    """How an embedding is trained; plain values, shipped to the task that does it."""

    base: Recipe
    loss: MetricLoss = "centre_contrastive"
    embedding: int = 128
    margin: float | None = None
    """None: the loss's own."""
    centres: str | None = None
    """None: the loss's own."""
    steps: int = 1


def metric_recipe(config: TransferConfig, base: Recipe) -> MetricRecipe:
    """The recipe that a config asks for, on top of that of fine-tuning."""
    return MetricRecipe(base, config.loss, config.embedding, config.margin, config.centres, config.steps)


@dataclass(frozen=True)
class Learnt:
    """A trained embedding in evaluation mode on the CPU."""

    model: Progressive
    initial: Initial
    best_epoch: int
    """Passes after which held rows found their like best; all of them where nothing could be judged."""
    history: list[dict[str, float]] = field(default_factory=list)
    """`held_loss` is 1 - mAP@R of the held rows among those of training and themselves."""


def learn(
    recipe: MetricRecipe,
    pixels: np.ndarray,
    truth: np.ndarray,
    groups: list[str],
    train: np.ndarray,
    held: np.ndarray,
    *key: object,
    stop_after: int | None = None,
) -> Learnt:
    """An embedding trained on rows `train` of `pixels` (uint8 [N, H, W, C]), kept as it was when rows `held` found
    their like best among `train` (at most `GALLERY` of them) and themselves, images of their own group left out: among
    themselves alone, a class of which a single group is held would have nothing to find.

    `truth` is class numbers [N] or label sets bool [N, K], `groups` [N] names. An epoch draws as many images as there
    are; the schedule spans the recipe's epochs, of which `stop_after` are done. `key` separates the randomness of folds
    and repeats. The loss is the sum over steps, the last one's twice where there are several.

    Raises:
        DataError: the training diverged.
    """
    base = recipe.base
    torch.set_num_threads(base.threads)
    torch.manual_seed(keyed.number("dropout", base.seed, *key) % 2**63)
    initial = initial_weights(base.wanted)
    model = build(initial.network, initial.input, recipe.embedding, recipe.steps)
    model.seed(base.seed)
    model = model.to(base.device)
    if initial.architecture.patch is None:
        model.network.to(memory_format=torch.channels_last)
    members = members_of(truth, base.classes)
    centres = starting_centres(recipe, model, initial.input, pixels[train], members[train], *key).to(base.device)
    optimizer = torch.optim.AdamW(parameter_groups(model, centres, base, initial), lr=base.lr)
    best, best_loss, best_epoch, history = None, float("inf"), base.epochs, []
    for epoch in range(stop_after or base.epochs):
        loss = _one_epoch(recipe, model, centres, optimizer, initial.input, pixels, members, train, epoch, key)
        _refuse_diverged(model, loss, epoch, base.lr)
        row = {"epoch": epoch + 1, "loss": loss}
        if len(held):
            rows = np.concatenate([held, train[sampled_rows(len(train), GALLERY)]])
            found = embed(model, initial.input, pixels[rows], base.device)[-1]
            row["held_loss"] = 1 - _found_again(found, members[rows], [groups[r] for r in rows], len(held))
            if row["held_loss"] < best_loss:
                best, best_loss, best_epoch = copy.deepcopy(model.state_dict()), row["held_loss"], epoch + 1
        history.append(row)
    if best is not None:
        model.load_state_dict(best)
    model = model.eval().cpu()
    model.network.to(memory_format=torch.contiguous_format)
    return Learnt(model, initial, best_epoch, history)


def build(network: nn.Module, shown: Input, embedding: int, steps: int) -> Progressive:
    """The untrained embedding on a timm network without a classifier."""
    device = next(iter(network.parameters())).device
    blank = torch.zeros(1, shown.channels, shown.height, shown.width, device=device)
    return Progressive(network, blank, embedding, steps)


def parameter_groups(model: Progressive, centres: nn.Module, base: Recipe, initial: Initial) -> list[dict[str, Any]]:
    """AdamW groups: the network's with layer-wise decay, the head's as the network's last layer, centres faster."""
    groups = layer_groups(model.network, base, initial)
    named = [(n, p) for n, p in model.named_parameters() if not n.startswith("network.")]
    for decayed in (True, False):
        own = [p for n, p in named if decays(n, p) is decayed]
        groups.append({"params": own, "scale": 1.0, "weight_decay": base.weight_decay if decayed else 0.0})
    points = list(centres.parameters())
    return groups + ([{"params": points, "scale": CENTRE_RATE, "weight_decay": 0.0}] if points else [])


def balanced_batches(members: np.ndarray, batch_size: int, generator: np.random.Generator) -> list[np.ndarray]:
    """Row numbers of one epoch, N // batch_size batches (at least 1) of about `batch_size` different rows.

    Args:
        members: label sets bool [N, K]; rows without any label count as a class of their own.

    A batch holds as many images of each of its classes, 4 or more: all classes where they fit, else those whose turn it
    is, but two at least, for images of one class say nothing of what sets it apart. A class's rows come in an order
    drawn anew whenever all have been shown; a batch that needs more rows of a class than there are takes all of them.
    """
    kinds = np.column_stack([members, ~members.any(axis=1)])
    pools = [np.flatnonzero(kind) for kind in kinds.T if kind.any()]
    queues: list[list[int]] = [[] for _ in pools]
    turn: list[int] = []
    many = min(len(pools), max(2, batch_size // PER_CLASS))
    batches = []
    for _ in range(max(1, len(members) // batch_size)):
        batch: dict[int, None] = {}
        own: list[int] = []
        for at in range(many):
            if not turn:  # popped from its end: classes that the batch has already come last
                turn = sorted(generator.permutation(len(pools)).tolist(), key=lambda kind: kind not in own)
            kind = turn.pop()
            own.append(kind)
            wanted = (at + 1) * batch_size // many - at * batch_size // many
            _draw(pools[kind], queues[kind], wanted, batch, generator)
        batches.append(np.fromiter(batch, dtype=np.int64))
    return batches


def _draw(pool: np.ndarray, queue: list[int], wanted: int, batch: dict[int, None], rng: np.random.Generator) -> None:
    """Adds up to `wanted` rows of a class to a batch that has not got them yet."""
    free = sum(int(row) not in batch for row in pool)
    for _ in range(min(wanted, free)):
        later = []
        while True:
            if not queue:
                queue.extend(rng.permutation(pool).tolist())
            row = queue.pop()
            if row not in batch:
                break
            later.append(row)
        batch[row] = None
        queue.extend(later)


@torch.inference_mode()
def embed(model: Progressive, shown: Input, pixels: np.ndarray, device: str) -> list[np.ndarray]:
    """Embeddings float32 [N, d] of unit length of each step, of stored pixels, by the evaluation transform."""
    model.eval()
    parts: list[list[np.ndarray]] = [[] for _ in model.embeddings]
    for at in range(0, len(pixels), EVALUATION_BATCH):
        found = model(evaluation_view(pixels[at : at + EVALUATION_BATCH], shown, device))
        for own, embeddings in zip(parts, found, strict=True):
            own.append(embeddings.float().cpu().numpy())
    return [np.concatenate(own) for own in parts]


def starting_centres(
    recipe: MetricRecipe, model: Progressive, shown: Input, pixels: np.ndarray, members: np.ndarray, *key: object
) -> Any:
    """Centres of each step, at the class means of the untrained embedding, whose biases are set on the way.

    Where there is batch norm, of embeddings as training will see them: by the statistics of batches, in an order keyed
    by (seed, key). What batch norm has learnt so far may be of other images, and is left as it was.
    Deviation from Proxy-Anchor, whose proxies start at random: there is no time to sort them out.
    """
    base, found = recipe.base, []
    device, order = base.device, keyed.generator("start", base.seed, *key).permutation(len(pixels))
    norms = [part for part in model.eval().modules() if isinstance(part, _BatchNorm)]
    before = [{name: buffer.clone() for name, buffer in part.named_buffers()} for part in norms]
    with torch.no_grad():
        for part in norms:
            part.train()
        for rows in np.array_split(order, max(1, len(order) // base.batch_size)):
            found.append(model.descriptors(evaluation_view(pixels[rows], shown, device)))
        for part, kept in zip(norms, before, strict=True):
            part.load_state_dict(kept, strict=False)
        descriptors = [torch.cat(step) for step in zip(*found, strict=True)]
        model.eval().centre(descriptors)
        embeddings = [nn.functional.normalize(layer(x)) for layer, x in zip(model.embeddings, descriptors, strict=True)]
    labels = torch.from_numpy(members[order]).to(device)
    update = recipe.centres or LOSSES[recipe.loss].centres
    starts = [start_at(e, labels) for e in embeddings]
    return nn.ModuleList(Centres(start, update) if update else _NoCentres(start) for start in starts)


class _NoCentres(nn.Module):
    """Of a loss that has none: zeros, which never move."""

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.register_buffer("points", torch.zeros_like(start), persistent=False)

    points: Tensor

    def forward(self) -> Tensor:
        return self.points

    def after_batch(self, embeddings: Tensor, members: Tensor) -> None:
        pass

    def after_epoch(self) -> None:
        pass


def _one_epoch(
    recipe: MetricRecipe,
    model: Progressive,
    centres: Any,
    optimizer: torch.optim.Optimizer,
    shown: Input,
    pixels: np.ndarray,
    members: np.ndarray,
    train: np.ndarray,
    epoch: int,
    key: tuple[object, ...],
) -> float:
    """Mean training loss of one pass in an order keyed by (seed, key, epoch)."""
    base, loss = recipe.base, LOSSES[recipe.loss]
    margin = loss.margin if recipe.margin is None else recipe.margin
    model.train()
    generator = keyed.generator("order", base.seed, *key, epoch)
    batches = [train[b] for b in balanced_batches(members[train], base.batch_size, generator)]
    total, seen = 0.0, 0
    for number, rows in enumerate(batches):
        share = warmup_cosine(epoch * len(batches) + number, base.epochs * len(batches), WARMUP, floor=0.01)
        for group in optimizer.param_groups:
            group["lr"] = base.lr * share * group["scale"]
        places = np.arange(seen, seen + len(rows))  # a row may come twice in an epoch, each time in another view
        draws, _ = sample_draws(base.augmentation, 0, base.seed, *key, epoch, positions=places)
        found = model(training_view(pixels[rows], shown, draws, base.device))
        labels = torch.from_numpy(members[rows]).to(base.device)
        parts = [loss.function(e, labels, c(), margin) for e, c in zip(found, centres, strict=True)]
        whole = torch.stack(parts).sum() + (parts[-1] if len(parts) > 1 else 0)
        optimizer.zero_grad(set_to_none=True)
        whole.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        for embeddings, own in zip(found, centres, strict=True):
            own.after_batch(embeddings, labels)
        total, seen = total + float(whole.detach()) * len(rows), seen + len(rows)
    for own in centres:
        own.after_epoch()
    return total / seen


def _refuse_diverged(model: nn.Module, loss: float, epoch: int, lr: float) -> None:
    finite = np.isfinite(loss) and all(bool(t.isfinite().all()) for t in model.state_dict().values())
    if not finite:
        raise DataError(f"--task metric: the training diverged in epoch {epoch + 1} (loss {loss:g}); lower --lr {lr:g}")


def _found_again(embeddings: np.ndarray, members: np.ndarray, groups: list[str], asked: int) -> float:
    """mAP@R of the first `asked` rows among all; NaN where none has a like in another group."""
    found = per_query(embeddings, members, groups, asked=np.arange(asked), deals=0)
    return float(found.scores[found.judged, -1].mean()) if found.judged.any() else float("nan")
