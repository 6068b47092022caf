"""Pretraining methods: one file and one entry each."""

from __future__ import annotations

from dataclasses import fields

from cluster.errors import UsageError, nearest
from training.configs import PretrainConfig
from training.methods.dino import DINO
from training.methods.distill import Distill
from training.methods.mae import MAE
from training.methods.method import Material, Method, Words
from training.methods.rotation import Rotation
from training.methods.sssd import SSSD

__all__ = ["METHODS", "NEED_VIT", "Material", "Method", "Words", "check_method"]

METHODS: dict[str, type[Method]] = {method.NAME: method for method in (MAE, SSSD, Distill, DINO, Rotation)}

NEED_VIT = frozenset(name for name, method in METHODS.items() if method.NEEDS_VIT)
"""Methods that hand the encoder single patches: no convolutional network will do."""


def check_method(config: PretrainConfig) -> None:
    """The method is one of ours, and reads every option that was given another value than its default.

    Raises:
        UsageError: it does not.
    """
    if config.method not in METHODS:
        raise UsageError(f"--method {config.method}: no such method.{nearest(config.method, METHODS)}")
    defaults = {field.name: field.default for field in fields(config)}
    for option in sorted(frozenset[str]().union(*(method.OPTIONS for method in METHODS.values()))):
        value = getattr(config, option)
        if option not in METHODS[config.method].OPTIONS and value != defaults[option]:
            readers = " and ".join(name for name, method in METHODS.items() if option in method.OPTIONS)
            flag = option.replace("_", "-")
            raise UsageError(
                f"--{flag} {value}: --method {config.method} has no such option, {readers} would; leave it out"
            )
