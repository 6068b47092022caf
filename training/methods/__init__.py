"""Pretraining methods: one file and one entry each."""

from __future__ import annotations

from typing import Any

from training.methods.mae import MAE

METHODS: dict[str, Any] = {"mae": MAE}

NEED_VIT = frozenset({"mae"})
"""Methods that hand the encoder single patches: no convolutional network will do."""
