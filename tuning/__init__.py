"""Searches over the settings of other verbs, on Ray Tune and Optuna."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tuning.configs import TuneConfig

if TYPE_CHECKING:
    from tuning.study import tune

__all__ = ["TuneConfig", "tune"]


def __getattr__(name: str) -> Any:
    """`from tuning import tune` without importing torch, Ray and Optuna before it is used."""
    if name != "tune":
        raise AttributeError(f"module 'tuning' has no attribute {name!r}")
    from tuning.study import tune

    return tune
