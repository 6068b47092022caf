"""Batches of what waits: while one is computed the next one gathers, and an idle computer waits for nobody.

Not `@serve.batch`: it closes a batch after a time window even while the one before is still being computed, so that
under a steady load of slow calls every batch holds one request (ray 2.60; here that halved the throughput).
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

Q = TypeVar("Q")
A = TypeVar("A")


class Batcher(Generic[Q, A]):
    """Answers questions by `compute`, which takes at most `most` of them at a time and never runs twice at once."""

    def __init__(self, compute: Callable[[list[Q]], Awaitable[list[A]]], most: int) -> None:
        self.compute, self.most = compute, most
        self.waiting: deque[tuple[Q, asyncio.Future[A]]] = deque()
        self.worker: asyncio.Task[None] | None = None

    async def ask(self, question: Q) -> A:
        """The answer; raises what `compute` raised for its batch. One that leaves while it waits costs nothing."""
        future: asyncio.Future[A] = asyncio.get_running_loop().create_future()
        self.waiting.append((question, future))
        if self.worker is None or self.worker.done():
            self.worker = asyncio.create_task(self._work())
        return await future

    async def _work(self) -> None:
        while batch := self._next():
            try:
                answers = await self.compute([question for question, _ in batch])
            except Exception as error:
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)
                continue
            for (_, future), answer in zip(batch, answers, strict=True):
                if not future.done():
                    future.set_result(answer)

    def _next(self) -> list[tuple[Q, asyncio.Future[A]]]:
        batch: list[tuple[Q, asyncio.Future[A]]] = []
        while self.waiting and len(batch) < self.most:
            question, future = self.waiting.popleft()
            if not future.done():
                batch.append((question, future))
        return batch
