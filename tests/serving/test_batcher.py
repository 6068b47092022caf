"""Batches of what waits."""

from __future__ import annotations

import asyncio

import pytest

from serving.batcher import Batcher


class Doubler:
    """Doubles numbers, when it may; knows its batches."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.may = asyncio.Event()
        self.running = 0

    async def __call__(self, numbers: list[int]) -> list[int]:
        self.running += 1
        assert self.running == 1, "never two at once"
        self.batches.append(numbers)
        await self.may.wait()
        self.running -= 1
        if -1 in numbers:
            raise ValueError("no such number")
        return [2 * number for number in numbers]


async def asked(batcher: Batcher[int, int], numbers: list[int]) -> list[asyncio.Task[int]]:
    tasks = [asyncio.create_task(batcher.ask(number)) for number in numbers]
    await asyncio.sleep(0.01)
    return tasks


def test_an_idle_one_starts_at_once_and_the_next_batch_gathers_meanwhile() -> None:
    async def go() -> None:
        doubler = Doubler()
        batcher = Batcher(doubler, 4)
        first = await asked(batcher, [1])
        assert doubler.batches == [[1]]
        rest = await asked(batcher, [2, 3, 4, 5, 6])
        assert doubler.batches == [[1]]
        doubler.may.set()
        assert await asyncio.gather(*first, *rest) == [2, 4, 6, 8, 10, 12]
        assert doubler.batches == [[1], [2, 3, 4, 5], [6]]
        assert await batcher.ask(7) == 14

    asyncio.run(go())


def test_a_failed_batch_fails_only_those_in_it() -> None:
    async def go() -> None:
        doubler = Doubler()
        batcher = Batcher(doubler, 2)
        tasks = await asked(batcher, [1, -1, 5, 6])
        doubler.may.set()
        found = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(f) if isinstance(f, Exception) else f for f in found] == [ValueError, ValueError, 10, 12]

    asyncio.run(go())


def test_who_left_is_not_computed_for() -> None:
    async def go() -> None:
        doubler = Doubler()
        batcher = Batcher(doubler, 4)
        first = await asked(batcher, [1])
        leaving, staying = await asked(batcher, [2, 3])
        leaving.cancel()
        doubler.may.set()
        assert await asyncio.gather(*first, staying) == [2, 6]
        with pytest.raises(asyncio.CancelledError):
            await leaving
        assert doubler.batches == [[1], [3]]

    asyncio.run(go())
