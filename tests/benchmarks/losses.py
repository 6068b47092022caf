"""Ours beside other losses of metric learning, pytorch-metric-learning's: a linear embedding on frozen features.

Part of `python -m tests.benchmarks.results retrieval`. Nothing but the loss differs: the same folds, batches, steps and
optimiser; a loss with weights of its own has them start at the class means, as ours do, and trained at ten times the
rate. Of several weights for a class each starts a little beside its mean, or they would stay one.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_metric_learning.losses as theirs
import torch
from safetensors.numpy import load_file
from torch import Tensor, nn

from training.bootstrap import Units
from training.dataset import Dataset
from training.learnt import retrieved
from training.losses import LOSSES
from training.losses.centre import unit
from training.losses.centres import Centres, start_at
from training.retrieval import NAMES, RANKS, Queries, summarise
from training.splits import cross_validation
from training.tasks.metric import balanced_batches
from training.tasks.scaling import spread_of

DIMENSION, BATCH, EPOCHS, RATE = 64, 64, 30, 1e-3
SHOWN = (f"recall_at_{RANKS[0]}", "recall_at_8", "map_at_r")
PEERS: dict[str, Callable[[int], nn.Module]] = {
    "contrastive, all pairs of a batch": lambda classes: theirs.ContrastiveLoss(),
    "N-pair": lambda classes: theirs.NPairsLoss(),
    "InfoNCE": lambda classes: theirs.NTXentLoss(),
    "multi-similarity": lambda classes: theirs.MultiSimilarityLoss(),
    "normalised softmax": lambda classes: theirs.NormalizedSoftmaxLoss(classes, DIMENSION),
    "Proxy-NCA": lambda classes: theirs.ProxyNCALoss(classes, DIMENSION),
    "SoftTriple": lambda classes: theirs.SoftTripleLoss(classes, DIMENSION),
}


def other_losses(data: Path, run: Path, where: tuple[str, ...], repeats: int) -> list[str]:
    """Rows of Markdown: out-of-fold retrieval among all images, of every loss on the features that `run` kept."""
    torch.set_num_threads(1)
    selection = Dataset.open(data).select(where, labelled=True)
    names, groups = selection.column("label"), selection.column("group")
    truth = np.unique(names, return_inverse=True)[1]
    features = load_file(run / "features.safetensors")["features"]
    folds = cross_validation(names, groups, folds=5, repeats=repeats, split="group", seed=0)
    lines = ["| a linear embedding of the same frozen features | " + " | ".join(SHOWN) + " |", "|---" * 4 + "|"]
    for name in ("none", *LOSSES, *PEERS):
        parts = [_found(features, truth, groups, fold, name) for fold in folds]
        table = np.concatenate(parts)
        units = Units.of(
            [groups[row] for fold in folds for row in fold.test],
            np.concatenate([np.full(len(fold.test), fold.fold) for fold in folds]),
            np.concatenate([np.full(len(fold.test), fold.repeat) for fold in folds]),
        )
        count = len(NAMES)
        queries = Queries(table[:, :count], table[:, count : 2 * count], table[:, -1].astype(bool))
        found = summarise(queries, units)
        cells = [f"{found[n]['value']:.3f} [{found[n]['ci95'][0]:.2f}, {found[n]['ci95'][1]:.2f}]" for n in SHOWN]
        lines.append(f"| {name if name != 'none' else 'the features themselves'} | " + " | ".join(cells) + " |")
    return lines


def _found(features: np.ndarray, truth: np.ndarray, groups: list[str], fold: Any, name: str) -> np.ndarray:
    known = features[fold.train]
    x = (features - known.mean(axis=0)) / spread_of(known)
    shown = x if name == "none" else _embedded(x, truth, fold, name)
    lengths = np.maximum(np.linalg.norm(shown, axis=1, keepdims=True), 1e-12)
    rows = shown / lengths
    return retrieved([rows[fold.train]], [rows[fold.test]], truth, groups, fold, 0)["retrieved/all/1"]


def _embedded(x: np.ndarray, truth: np.ndarray, fold: Any, name: str) -> np.ndarray:
    rows, labels = torch.from_numpy(x[fold.train].astype(np.float32)), torch.from_numpy(truth[fold.train])
    classes = int(truth.max()) + 1
    members = torch.eye(classes, dtype=torch.bool)[labels]
    torch.manual_seed(fold.repeat)  # weights of the peers' own
    layer = nn.Linear(x.shape[1], DIMENSION)
    loss, extra, after = _loss(name, classes, start_at(unit(layer(rows)).detach(), members))
    groups: list[dict[str, Any]] = [{"params": list(layer.parameters())}]
    groups += [{"params": extra, "lr": 10 * RATE}] if extra else []
    optimizer = torch.optim.Adam(groups, lr=RATE)
    generator = np.random.default_rng(fold.repeat)
    for _ in range(EPOCHS):
        for batch in balanced_batches(members.numpy(), BATCH, generator):
            chosen = torch.from_numpy(batch)
            found = unit(layer(rows[chosen]))
            value = loss(found, chosen, labels, members)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            after(found, members[chosen])
    with torch.no_grad():
        return np.asarray(unit(layer(torch.from_numpy(x.astype(np.float32)))).numpy())


def _loss(name: str, classes: int, start: Tensor) -> tuple[Callable[..., Tensor], list[Any], Callable[..., None]]:
    """(loss of embeddings of rows, its own weights, what follows a batch)."""
    if name in PEERS:
        peer = started(PEERS[name](classes), start)
        return lambda found, rows, labels, members: peer(found, labels[rows]), list(peer.parameters()), _nothing
    ours = LOSSES[name]  # type: ignore[index]
    centres = Centres(start, ours.centres or "rule")
    after = centres.after_batch if ours.centres else _nothing

    def loss(found: Tensor, rows: Tensor, labels: Tensor, members: Tensor) -> Tensor:
        return ours.function(found, members[rows], centres(), ours.margin)

    return loss, list(centres.parameters()), after


def started(peer: nn.Module, start: Tensor) -> nn.Module:
    """A peer whose proxies, if it has any, lie at `start` [K, d]: rows of `proxies`, columns of `W` and `fc`."""
    for name, weights in peer.named_parameters():
        assert name in {"proxies", "W", "fc"}, name
        each = weights.numel() // start.numel()
        points = start.repeat_interleave(each, dim=0)
        if each > 1:
            points = points + 0.1 * start.shape[1] ** -0.5 * torch.randn(points.shape)
        with torch.no_grad():
            weights.copy_(points if name == "proxies" else points.T)
    return peer


def _nothing(found: Tensor, members: Tensor) -> None:
    pass
