"""Other ways to serve the same model with the same decoding: `python -m tests.benchmarks.peers NAME RUN PORT`.

`fastapi`: plain FastAPI on uvicorn, a request at a time in its thread pool. `batcher`: the same with a micro-batcher.
`litserve`: LitServe with dynamic batching; it hands requests to its workers pickled, so images come in JSON.
"""

from __future__ import annotations

import asyncio
import base64
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from fastapi import FastAPI, Request

from cluster.session import cores
from serving.answers import ranked
from training.artifact import Model, load_model
from training.images import decode, to_channels

try:
    import litserve
except ImportError:  # only its own row needs it
    litserve = None

BATCH = 16


def pixels_of(model: Model, body: bytes) -> np.ndarray:
    return to_channels(decode(body, model.card.image_path), model.card.input.channels)


def answers_of(model: Model, pixels: list[np.ndarray]) -> list[dict[str, Any]]:
    probabilities = model.probabilities(np.stack(pixels), BATCH)
    return [{"classes": ranked(model.card.classes, row)} for row in probabilities.tolist()]


def fastapi(run: str) -> FastAPI:
    app, model = FastAPI(), load_model(run)
    pool = ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(cores(),))

    @app.post("/v1/classify")
    async def classify(request: Request) -> dict[str, Any]:
        body = await request.body()
        work = lambda: answers_of(model, [pixels_of(model, body)])[0]  # noqa: E731
        return await asyncio.get_running_loop().run_in_executor(pool, work)

    return app


def batcher(run: str) -> FastAPI:
    app, model = FastAPI(), load_model(run)
    decoding = ThreadPoolExecutor(2)
    computing = ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(cores(),))
    queue: asyncio.Queue[tuple[np.ndarray, asyncio.Future[dict[str, Any]]]] = asyncio.Queue()
    tasks: set[asyncio.Task[None]] = set()

    async def work() -> None:
        loop = asyncio.get_running_loop()
        while True:
            waiting = [await queue.get()]
            while len(waiting) < BATCH and not queue.empty():
                waiting.append(queue.get_nowait())
            found = await loop.run_in_executor(computing, answers_of, model, [p for p, _ in waiting])
            for (_, future), answer in zip(waiting, found, strict=True):
                future.set_result(answer)

    @app.post("/v1/classify")
    async def classify(request: Request) -> dict[str, Any]:
        loop = asyncio.get_running_loop()
        if not tasks:
            tasks.add(loop.create_task(work()))
        future: asyncio.Future[dict[str, Any]] = loop.create_future()
        await queue.put((await loop.run_in_executor(decoding, pixels_of, model, await request.body()), future))
        return await future

    return app


class LitApi(litserve.LitAPI if litserve else object):  # type: ignore[misc]
    """The model behind LitServe, which starts its workers by pickling this: hence no local class."""

    run: str

    def setup(self, device: str) -> None:
        torch.set_num_threads(cores())
        self.model = load_model(self.run)

    # unannotated: LitServe makes its route of the annotation, which is text in this module
    def decode_request(self, request):  # type: ignore[no-untyped-def]
        return pixels_of(self.model, base64.b64decode(request["image"]))

    def batch(self, inputs: list[np.ndarray]) -> list[np.ndarray]:
        return list(inputs)

    def predict(self, x: list[np.ndarray]) -> list[dict[str, Any]]:
        return answers_of(self.model, x)

    def unbatch(self, output: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return output

    def encode_response(self, output: dict[str, Any]) -> dict[str, Any]:
        return output


def serve_with_litserve(run: str, port: int) -> None:
    api = LitApi(max_batch_size=BATCH, batch_timeout=0.005, api_path="/v1/classify")
    api.run = run
    litserve.LitServer(api, accelerator="cpu", timeout=60).run(port=port, host="127.0.0.1", generate_client_file=False)


if __name__ == "__main__":
    name, run, port = sys.argv[1], sys.argv[2], int(sys.argv[3])
    if name == "litserve":
        serve_with_litserve(run, port)
    else:
        import uvicorn

        app = {"fastapi": fastapi, "batcher": batcher}[name](run)
        uvicorn.run(app, host="127.0.0.1", port=port, access_log=False, log_level="warning")
