"""The science: data, pretraining, transfer, evaluation; and one thin Ray layer that runs it."""

from __future__ import annotations

import sys
import types
from typing import TYPE_CHECKING, Any

from training.configs import (
    EvaluateConfig,
    ExportConfig,
    InferenceConfig,
    IngestConfig,
    PretrainConfig,
    SuggestConfig,
    TransferConfig,
)

if TYPE_CHECKING:
    from training.evaluate import evaluate
    from training.export import export
    from training.inference import embed, predict
    from training.ingest import ingest
    from training.pretrain import pretrain
    from training.suggest import suggest
    from training.transfer import transfer

_VERBS = {
    "ingest": "training.ingest",
    "pretrain": "training.pretrain",
    "transfer": "training.transfer",
    "evaluate": "training.evaluate",
    "predict": "training.inference",
    "embed": "training.inference",
    "export": "training.export",
    "suggest": "training.suggest",
}

__all__ = [
    "EvaluateConfig",
    "ExportConfig",
    "InferenceConfig",
    "IngestConfig",
    "PretrainConfig",
    "SuggestConfig",
    "TransferConfig",
    "embed",
    "evaluate",
    "export",
    "ingest",
    "predict",
    "pretrain",
    "suggest",
    "transfer",
]


def __getattr__(name: str) -> Any:
    """`from training import pretrain` without importing torch and Ray before a verb is used."""
    if name not in _VERBS:
        raise AttributeError(f"module 'training' has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(_VERBS[name]), name)
    globals()[name] = value
    return value


class _Package(types.ModuleType):
    """Importing `training.ingest` binds that module to `ingest` here; the function must win, whichever came first."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _VERBS and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
