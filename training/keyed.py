"""Randomness by name: a generator is a pure function of its key, never of rank, process or call order."""

from __future__ import annotations

import hashlib

import numpy as np


def number(*key: object) -> int:
    """128 bits that only `key` decides; parts are compared by their `repr`."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=16).digest(), "little")


def generator(*key: object) -> np.random.Generator:
    """An independent stream for each key (Philox, Salmon et al. 2011, keyed by a hash)."""
    return np.random.Generator(np.random.Philox(key=number(*key)))
