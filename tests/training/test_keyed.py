"""Randomness by name: the key alone decides, in whatever process and order it is asked for."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from training import keyed

Keys = st.lists(st.one_of(st.integers(), st.text(max_size=8), st.booleans(), st.none()), max_size=4)


@settings(max_examples=200, deadline=None)
@given(Keys, Keys)
def test_equal_keys_give_equal_numbers_and_other_keys_give_others(one: list[object], other: list[object]) -> None:
    assert keyed.number(*one) == keyed.number(*one)
    assert (keyed.number(*one) == keyed.number(*other)) == (repr(tuple(one)) == repr(tuple(other)))


def test_a_number_is_the_blake2b_hash_of_the_key_s_repr() -> None:
    for key in (("weights", 0, "encoder.head"), (1,), ()):
        digest = hashlib.blake2b(repr(key).encode(), digest_size=16).digest()
        assert keyed.number(*key) == sum(byte << (8 * at) for at, byte in enumerate(digest))


def test_parts_of_a_key_do_not_run_together() -> None:
    assert len({keyed.number("a", "b"), keyed.number("ab"), keyed.number("ab", ""), keyed.number("", "ab")}) == 4
    assert len({keyed.number(1, 23), keyed.number(12, 3), keyed.number("1", 23), keyed.number(1, 23.0)}) == 4


def test_drawing_from_one_generator_leaves_the_others_alone() -> None:
    alone = keyed.generator("mask", 3).random(5)
    keyed.generator("mask", 2).random(1000)
    np.random.default_rng(0).random(7)
    assert np.array_equal(keyed.generator("mask", 3).random(5), alone)


def test_another_process_with_another_hash_seed_draws_the_same() -> None:
    code = "from training import keyed; print(keyed.generator('x', 1, None).integers(2**62, size=3).tolist())"
    root = Path(__file__).parents[2]
    found = {
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=root,
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for seed in ("1", "2")
    }
    assert found == {str(keyed.generator("x", 1, None).integers(2**62, size=3).tolist())}


def test_streams_of_neighbouring_keys_are_uncorrelated() -> None:
    streams = np.stack([keyed.generator("sample", 0, epoch, at).random(500) for epoch in range(3) for at in range(20)])
    alike = np.asarray(np.corrcoef(streams))
    np.fill_diagonal(alike, 0)
    assert np.abs(alike).max() < 5 / np.sqrt(500)
    assert abs(streams.mean() - 0.5) < 5 * np.sqrt(1 / 12 / streams.size)
