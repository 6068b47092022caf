"""Gated attention pooling: one answer for all images of a case, from their frozen features.

Source: Ilse, Tomczak and Welling, "Attention-based Deep Multiple Instance Learning", 2018, equations 7 and 9: the
attention of image k is the softmax over its case of w' (tanh(V h_k) * sigmoid(U h_k)), and the case is the weighted
sum of its h_k. Deviations: h is a frozen feature vector, standardised by the training images; the classifier on the
sum is linear; classes weigh alike; all cases are one batch.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import nn

from cluster.errors import UsageError
from training.encoder import seed_weights
from training.probabilities import from_logits
from training.tasks.objective import objective_for
from training.tasks.scaling import spread_of

FILE = "pooling.safetensors"
WIDTH = 64
EPOCHS = 300
PATIENCE = 100
"""Epochs without a better loss of the held cases after which training ends: attention that is still even helps none."""
LEARNING_RATE, WEIGHT_DECAY, DROPOUT = 3e-3, 1.0, 0.5
INITIAL = 0.1
"""How much smaller than Xavier's the first weights of scores and classifier are: attention begins almost even."""


class GatedAttention(nn.Module):
    """Features [N, D] and the case of each, 0 to U - 1 -> logits [U, K] and attention [N], which sums to 1 per case."""

    mean: torch.Tensor
    scale: torch.Tensor

    def __init__(self, dimension: int, classes: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(dimension))
        self.register_buffer("scale", torch.ones(dimension))
        self.dropout = nn.Dropout(DROPOUT)
        self.value = nn.Linear(dimension, WIDTH)
        self.gate = nn.Linear(dimension, WIDTH)
        self.score = nn.Linear(WIDTH, 1)
        self.classifier = nn.Linear(dimension, classes)

    def forward(self, features: torch.Tensor, unit: torch.Tensor, units: int) -> tuple[torch.Tensor, torch.Tensor]:
        h = self.dropout((features - self.mean) / self.scale)
        scores = self.score(torch.tanh(self.value(h)) * torch.sigmoid(self.gate(h)))[:, 0]
        largest = scores.new_full((units,), -torch.inf).scatter_reduce(0, unit, scores, "amax")
        raised = torch.exp(scores - largest.detach()[unit])
        attention = raised / raised.new_zeros(units).index_add(0, unit, raised)[unit]
        pooled = h.new_zeros(units, h.shape[1]).index_add(0, unit, attention[:, None] * h)
        return self.classifier(pooled), attention


@dataclass(frozen=True, eq=False)
class Pooler:
    """A trained attention; `best_epoch` is that of the held cases' smallest loss, all of them where none were held."""

    network: GatedAttention
    several: bool
    best_epoch: int
    temperature: float = 1.0

    @torch.inference_mode()
    def probabilities(self, features: np.ndarray, unit: np.ndarray) -> np.ndarray:
        """float64 [U, K], not calibrated, of features [N, D] with their cases [N], numbered 0 to U - 1."""
        logits, _ = self.network(*_tensors(features, unit))
        return from_logits(logits.numpy(), several=self.several)

    @torch.inference_mode()
    def attention(self, features: np.ndarray, unit: np.ndarray) -> np.ndarray:
        """float64 [N]: the share of each image in what its case is judged by."""
        return np.asarray(self.network(*_tensors(features, unit))[1].double().numpy())

    def dumps(self, temperature: float) -> bytes:
        """The file `pooling.safetensors`."""
        about = {"several": self.several, "best_epoch": self.best_epoch, "temperature": temperature}
        tensors = {name: value.contiguous() for name, value in self.network.state_dict().items()}
        return bytes(safetensors.torch.save(tensors, metadata={"pooling": json.dumps(about)}))


def fit_attention(
    features: np.ndarray,
    unit: np.ndarray,
    truth: np.ndarray,
    train: np.ndarray,
    held: np.ndarray,
    *,
    classes: int,
    seed: int,
    epochs: int = EPOCHS,
) -> Pooler:
    """Attention trained on the cases `train`, stopped where the cases `held` were judged best.

    Args:
        features: float32 [N, D].
        unit: [N] the case of each row, 0 to U - 1.
        truth: [U] class numbers, or label sets bool [U, K], of the cases.
        train, held: numbers of cases; with none held, `epochs` decides when training ends.
    """
    torch.manual_seed(seed)  # dropout
    shown, images = _of(features, unit, train)
    network = GatedAttention(features.shape[1], classes)
    seed_weights(network, seed, "pooling.")
    with torch.no_grad():
        network.score.weight.mul_(INITIAL)
        network.classifier.weight.mul_(INITIAL)
    network.mean.copy_(shown.mean(dim=0))
    network.scale.copy_(torch.from_numpy(spread_of(shown.numpy())))
    objective = objective_for(truth[train], classes)
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    best, best_loss, best_epoch = copy.deepcopy(network.state_dict()), float("inf"), epochs
    for epoch in range(1, epochs + 1):
        network.train()
        loss = objective(network(shown, images, len(train))[0], truth[train])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if not len(held):
            continue
        with torch.inference_mode():
            held_loss = float(objective(network.eval()(*_of(features, unit, held), len(held))[0], truth[held]))
        if held_loss < best_loss:
            best, best_loss, best_epoch = copy.deepcopy(network.state_dict()), held_loss, epoch
        elif epoch - best_epoch >= PATIENCE:
            break
    if len(held):
        network.load_state_dict(best)
    return Pooler(network.eval(), truth.ndim == 2, best_epoch)


def load_pooler(content: bytes, dimension: int, classes: int) -> Pooler:
    """The inverse of `Pooler.dumps`.

    Raises:
        UsageError: it is damaged, or of another network.
    """
    try:
        network = GatedAttention(dimension, classes)
        network.load_state_dict(safetensors.torch.load(content))
        about = json.loads(_metadata(content)["pooling"])
        return Pooler(network.eval(), bool(about["several"]), int(about["best_epoch"]), float(about["temperature"]))
    except (SafetensorError, RuntimeError, KeyError, ValueError, TypeError) as error:
        raise UsageError(f"{FILE}: not an attention kept by Rayograph ({' '.join(str(error).split())})") from error


def _metadata(content: bytes) -> dict[str, str]:
    """Of safetensors in memory: a length, then as many bytes of JSON."""
    length = int.from_bytes(content[:8], "little")
    return dict(json.loads(content[8 : 8 + length]).get("__metadata__", {}))


def _of(features: np.ndarray, unit: np.ndarray, chosen: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """The features of the rows of the cases `chosen`, and those cases numbered by their place in `chosen`."""
    place = np.full(int(unit.max()) + 1, -1)
    place[chosen] = np.arange(len(chosen))
    rows = np.flatnonzero(place[unit] >= 0)
    return torch.from_numpy(features[rows]).float(), torch.from_numpy(place[unit[rows]])


def _tensors(features: np.ndarray, unit: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, int]:
    numbers = torch.from_numpy(np.asarray(unit, dtype=np.int64))
    return torch.from_numpy(features).float(), numbers, int(unit.max()) + 1
