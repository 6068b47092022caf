"""What the model of a RUN says of a selection: of its images, of its units by attention, and where it looks."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from cluster.errors import UsageError
from cluster.progress import progress
from training.artifact import Model, load_model, model_folder
from training.attention import Looker, looker_of
from training.dataset import Dataset, Selection
from training.probabilities import calibrated
from training.tasks import pooling
from training.tasks.frozen import Frozen
from training.tasks.inputs import inputs_of
from training.tasks.label_sets import LabelSets
from training.units import Units

STEP = 512
"""Images whose pixels are held at once."""


class Said(NamedTuple):
    """Calibrated probabilities of a model, its classes in the order that is asked for."""

    images: np.ndarray
    """[N, K], of every row of the selection."""
    units: np.ndarray
    """[U, K], by attention, of the units with a label; none of them where another pooling is asked for."""
    looker: Looker | None
    """Shows where it looks; None where nobody asked, or its answer is not of its network's features."""


def said_of(
    run: str,
    classes: list[str],
    dataset: Dataset,
    selection: Selection,
    units: Units,
    *,
    attention: bool,
    look: bool,
    device: str,
    batch_size: int,
) -> Said:
    """What the model of `run` says of the rows of a selection.

    Args:
        classes: its own, in the order that is asked for.
        attention: also pool the images of a unit by the attention that lies beside the model.
        look: also find out where it looks; its classes then must be in its own order.
        device: cpu, cuda or mps.
        batch_size: images per forward pass.

    Raises:
        UsageError: it has no attention.
    """
    model: Model = load_model(run, device)
    width = len(classes)
    pooler = _pooler(run, _dimension(model), width) if attention else None
    features, parts = [], []
    card = model.card
    inputs = inputs_of(selection.table, card.inputs, card.input_column, some=True) if card.inputs else None
    with progress("evaluate", len(selection), "images") as bar:
        for at in range(0, len(selection), STEP):
            part = np.arange(at, min(at + STEP, len(selection)))
            pixels = dataset.pixels(selection.take(part))
            features.append(model.embed(pixels, batch_size))
            if inputs is not None:
                parts.append(model.answers(features[-1], pixels, inputs.of_row[part]))
            else:
                parts.append(model.classify(features[-1], pixels))
            bar.advance(len(part))
    said = np.concatenate(parts)
    said = said if inputs is None else model.classify_cases(said, inputs)
    order = [model.card.classes.index(name) for name in classes]
    by_unit = np.empty((0, width))
    if pooler is not None:
        raw = pooler.probabilities(np.concatenate(features), units.of_row)[units.judged]
        by_unit = calibrated(raw, pooler.temperature, several=pooler.several)[:, order]
    return Said(said[:, order], by_unit, looker_in(model) if look else None)


def looker_in(model: Model) -> Looker | None:
    """The `Looker` of a loaded model; None where it would show nothing of what the answer was made of."""
    features, head = model.card.features, model.estimator
    if features.plain and isinstance(head, Frozen):  # the weights of other features say nothing of where it looks
        looker = looker_of(model.network, model.card.input, head.estimator, head.classes)
    elif features.plain and isinstance(head, LabelSets):
        looker = looker_of(model.network, model.card.input, head.estimators, head.classes)
    else:
        looker = looker_of(model.network, model.card.input, head, len(model.card.classes))
    return looker if features.layers and looker.method else None


def _dimension(model: Model) -> int:
    path = model.card.image_path
    blank = np.zeros((1, path.height, path.width, model.card.input.channels), dtype=np.uint8)
    return int(model.embed(blank).shape[1])


def _pooler(run: str, dimension: int, classes: int) -> pooling.Pooler:
    file = model_folder(run) / pooling.FILE
    if not file.is_file():
        raise UsageError(
            f"--pooling attention: {run} has none; use --pooling mean, or transfer with --pooling attention"
        )
    return pooling.load_pooler(file.read_bytes(), dimension, classes)
