"""The door of a training worker. Ray Train's controller loads this too, which must not cost it timm and our loop."""

from __future__ import annotations

from typing import Any


def enter(values: dict[str, Any]) -> None:
    """Ray Train's `train_loop_per_worker`: the worker loop, loaded where it runs. `values` as in `loop.train`."""
    from training.loop import train

    train(values)
