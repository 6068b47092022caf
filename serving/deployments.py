"""The Ray Serve deployments: an encoder, a classifier, an index, and the ingress that HTTP requests come to.

Only here and in `serving.serve` does serving know Ray. Each deployment is its own process: FAISS never meets torch, and
the ingress imports neither.
"""

from __future__ import annotations

import asyncio
import base64
import socket
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import uvicorn
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from serving.app import Busy, Judgement, Seen, Service, Unanswered, create_app
from serving.batcher import Batcher
from serving.door import Door, Limits

Handle = DeploymentHandle[Any]
CONNECTIONS = 1000
"""Open connections; more are answered 503 at once."""
HEAD_BYTES, HEAD_S = 1 << 17, 20.0
"""Largest head of a request, and longest time that it may take."""
TRIES = 3
"""How often a part that died is asked again: every call computes, none changes anything."""


@dataclass(frozen=True)
class Listen:
    """Where and for whom the ingress listens."""

    host: str
    port: int
    limits: Limits
    key_hashes: tuple[bytes, ...]


class Encoder:
    """Pixels to features and their judgement, in batches of what waits while the one before is computed.

    On CPUs a single image is computed by all threads together, and a batch in as many parts as there are threads, one
    thread each: threads that work on one layer together wait for each other at every layer.
    """

    def __init__(self, run: str, device: str, threads: int, batch_size: int, classifier: Handle) -> None:
        import torch

        from training.artifact import load_model

        self.classifier = classifier
        self.batcher = Batcher(self._see, batch_size)
        self.parts = threads if device == "cpu" else 1
        # torch's thread count is the calling thread's own, and Ray has set OMP_NUM_THREADS=1
        self.together = ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(threads,))
        self.apart = ThreadPoolExecutor(self.parts, initializer=torch.set_num_threads, initargs=(1,))
        self.model = self.together.submit(load_model, run, device).result()
        path, channels = self.model.card.image_path, self.model.card.input.channels
        blank = np.zeros((1, path.height, path.width, channels), dtype=np.uint8)
        for pool in (self.together, self.apart):  # the first pass is slow; it is nobody's request
            pool.submit(self.model.embed, blank).result()

    async def alive(self) -> bool:
        return bool(await _ask(self.classifier.alive))

    async def see(self, shown: tuple[np.ndarray, np.ndarray]) -> Seen:
        """Features float32 [D] and judgement of a stored image uint8 [H, W, C] with its look [S]."""
        return await self.batcher.ask(shown)

    async def _see(self, shown: list[tuple[np.ndarray, np.ndarray]]) -> list[Seen]:
        pixels = np.stack([stored for stored, _ in shown])
        features = await self._embed(pixels)
        looks = np.stack([look for _, look in shown])
        judged = await _ask(self.classifier.judge, features, looks, pixels if self.model.needs_pixels else None)
        return list(zip(features, judged, strict=True))

    async def _embed(self, pixels: np.ndarray) -> np.ndarray:
        loop, model = asyncio.get_running_loop(), self.model
        if len(pixels) == 1 or self.parts == 1:
            return await loop.run_in_executor(self.together, model.embed, pixels, len(pixels))
        parts = np.array_split(pixels, min(self.parts, len(pixels)))
        work = [loop.run_in_executor(self.apart, model.embed, part, len(part)) for part in parts]
        return np.concatenate(await asyncio.gather(*work))


class Classifier:
    """Features to calibrated probabilities and to a place in the training domain."""

    def __init__(self, run: str) -> None:
        import torch

        from training.artifact import load_model

        torch.set_num_threads(1)
        self.model = load_model(run)

    def alive(self) -> bool:
        return True

    def judge(self, features: np.ndarray, looks: np.ndarray, pixels: np.ndarray | None = None) -> list[Judgement]:
        """Of images by features [N, D] and looks [N, S]; and stored pixels [N, H, W, C] where it needs them."""
        model = self.model
        classes = model.classify(features, pixels).tolist() if model.card.head != "none" else [None] * len(features)
        if model.domain is None:
            return [Judgement(p, None, None) for p in classes]
        typical, distances = model.domain.judge(features, looks)
        return [Judgement(*j) for j in zip(classes, distances.tolist(), typical.tolist(), strict=True)]


class Neighbours:
    """Features to the nearest images of an INDEX."""

    def __init__(self, index: str) -> None:
        from serving.neighbours import open_index
        from serving.snapshot import current

        self.snapshot = current(index)
        self.index = open_index(self.snapshot)

    def alive(self) -> bool:
        return True

    def facts(self) -> dict[str, Any]:
        manifest = self.snapshot.manifest
        return {
            "vectors": manifest["vectors"],
            "kind": manifest["kind"],
            "recall_at_10": manifest["recall_at_10"],
            "snapshot": self.snapshot.name,
        }

    def search(
        self, features: np.ndarray, k: int, group: str | None, labelled: bool
    ) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        from serving.neighbours import allowed_rows, hits

        allowed = allowed_rows(self.snapshot, group, labelled)
        scores, rows = self.index.search(features[None], k, allowed)
        found = hits(self.snapshot, scores[0], rows[0])
        pictures = self.snapshot.rows["thumbnail"].take([int(r) for r in rows[0] if r >= 0]).to_pylist()
        for hit, picture in zip(found, pictures, strict=True):
            hit["thumbnail"] = "data:image/jpeg;base64," + base64.b64encode(picture).decode()
        return found, self.facts()


class Ingress:
    """The HTTP server: reads, bounds and decodes requests, and puts answers together.

    It listens by itself. Behind Serve's own proxy every request crosses a process more, whose queue holds whole bodies
    without a bound; HAProxy in its place listens on all interfaces, whatever host was asked for (ray 2.60).
    """

    async def __init__(  # type: ignore[misc] # Serve awaits it, so that the server starts in the replica's own loop
        self,
        service: Service,
        listen: Listen,
        encoder: Handle,
        index: Handle | None = None,
    ) -> None:
        parts = Parts(encoder, index)
        await parts.ready()
        if index is not None:
            service = replace(service, index=await index.facts.remote())
        self.door = Door(create_app(service, parts, keyed=bool(listen.key_hashes)), listen.limits, listen.key_hashes)
        self.socket = bound(listen.host, listen.port)
        settings = uvicorn.Config(
            self.door,
            ws="none",
            lifespan="off",
            access_log=False,
            log_config=None,
            server_header=False,
            timeout_keep_alive=75,
            backlog=1024,
            limit_concurrency=CONNECTIONS,
            http=Reader,
        )
        self.server = uvicorn.Server(settings)
        self.task = asyncio.get_running_loop().create_task(self.server.serve(sockets=[self.socket]))
        while not self.server.started:
            await asyncio.sleep(0.01)
            self.check_health()

    def address(self) -> tuple[str, int]:
        host, port = self.socket.getsockname()[:2]
        return str(host), int(port)

    def check_health(self) -> None:
        if self.task.done():
            raise RuntimeError("the HTTP server has ended")


class Reader(HttpToolsProtocol):
    """uvicorn's HTTP, with bounds on what is not body (a request's head, trailers), which it keeps without end."""

    _left = HEAD_BYTES
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._left -= len(data)
        super().data_received(data)
        if self._left < 0 and not self.transport.is_closing():
            self._stop_timer()
            self.send_400_response("The request's head is too large.")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._left = HEAD_BYTES
        self._await_head()

    def on_body(self, body: bytes) -> None:
        super().on_body(body)
        self._left = HEAD_BYTES

    def on_headers_complete(self) -> None:
        self._stop_timer()
        super().on_headers_complete()

    def _await_head(self) -> None:
        self._stop_timer()
        self._timer = self.loop.call_later(HEAD_S, self._too_slow)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _too_slow(self) -> None:
        self._timer = None
        self.transport.close()


def bound(host: str, port: int) -> socket.socket:
    """A listening socket; OSError where the address is taken."""
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    found = socket.socket(family, socket.SOCK_STREAM)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind(address)
    except OSError:
        found.close()
        raise
    return found


class Parts:
    """The `Backend` of `serving.app` over the deployments' handles."""

    def __init__(self, encoder: Handle, index: Handle | None) -> None:
        self.encoder, self.index = encoder, index

    async def see(self, pixels: np.ndarray, look: np.ndarray) -> Seen:
        seen: Seen = await _ask(self.encoder.see, (pixels, look))
        return seen

    async def search(
        self, features: np.ndarray, k: int, group: str | None, labelled: bool
    ) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        assert self.index is not None
        found: tuple[list[dict[str, Any]], dict[str, Any]] = await _ask(self.index.search, features, k, group, labelled)
        return found

    async def ready(self) -> None:
        for handle in (self.encoder, self.index):
            if handle is not None:
                await _ask(handle.alive)


async def _ask(method: Any, *arguments: Any) -> Any:
    """The method's answer, also where the replica that had the call died: another one is asked."""
    for left in reversed(range(TRIES)):
        try:
            return await method.remote(*arguments)
        except BackPressureError as error:
            raise Busy from error
        except RayTaskError:  # our own code failed, and would again
            raise
        except (DeploymentUnavailableError, RayError) as error:
            if not left:
                raise Unanswered from error
    raise AssertionError
