"""The spread by which features of a network are divided: that of the training rows, but of no column next to nothing.

A convolutional network's pooled features have columns that hardly any image wakes. In few training rows such a column
is (nearly) constant, and divided by its own deviation there it would drown all others in the first new image that wakes
it.
"""

from __future__ import annotations

import numpy as np

FLOOR = 0.1
"""Share of the median column's deviation, of those that vary, that every column is taken to have at least: our
choice."""


def spread_of(features: np.ndarray) -> np.ndarray:
    """What the columns of features [N, D] are divided by, float [D]: their standard deviations, none below the floor;
    all 1 where no column varies. Columns must be of one kind, such as a layer's: not for radiomics, whose units
    differ."""
    deviations = np.asarray(features).std(axis=0)
    varying = deviations[deviations > 0]
    return np.maximum(deviations, FLOOR * np.median(varying)) if len(varying) else np.ones_like(deviations)
