"""ASGI applications asked directly, without a network; and a backend that answers without a model."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from serving.app import Judgement, Seen, Service
from serving.door import Application, Message
from training.images import ImagePath

SHA = "5e41c917" * 8
CARD_SHA = "c9031d77" * 8
CLASSES = ("abnormal/mild", "abnormal/severe", "normal")
SECRET = "/srv/secret/model.py line 7"


@dataclass
class Reply:
    """What an application said; `status` is 0 where it said nothing."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    received: int = 0
    """Bytes of the request's body that it took."""

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> str:
        """The code of an error, which has the form that all have."""
        body = self.json()
        assert set(body) == {"error"} and set(body["error"]) == {"code", "message"}
        assert self.headers["content-type"] == "application/json"
        assert not any(word in self.body.decode() for word in ("/srv", "/tmp", "Traceback", "line ", ".py"))
        return str(body["error"]["code"])


async def ask(
    app: Application,
    path: str,
    body: bytes | Iterable[bytes] = b"",
    *,
    method: str = "POST",
    headers: dict[str, str] | None = None,
    query: str = "",
    declare: bool = True,
    then: Callable[[], Any] | None = None,
) -> Reply:
    """One request.

    Args:
        body: whole, with its Content-Length unless `declare` is off; or chunks, without.
        then: awaited where the body is at its end; its default says that the client waits. A chunk of None disconnects.
    """
    given = {k.lower(): v for k, v in (headers or {}).items()}
    if isinstance(body, bytes):
        if declare and method not in {"GET", "HEAD"}:
            given.setdefault("content-length", str(len(body)))
        body = [body]
    chunks: Iterator[bytes | None] = iter(body)
    pending = next(chunks, b"")
    reply = Reply()
    ended = False

    async def receive() -> Message:
        nonlocal pending, ended
        if ended:
            await asyncio.sleep(3600)
        await asyncio.sleep(0)
        now, following = pending, next(chunks, b"")
        if now is None:
            return {"type": "http.disconnect"}
        pending, more = following, following != b""
        if not more:
            ended = True
            if then is not None:
                await then()
        reply.received += len(now)
        return {"type": "http.request", "body": now, "more_body": more}

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            assert not reply.status, "a second answer"
            reply.status = message["status"]
            reply.headers = {k.decode().lower(): v.decode() for k, v in message["headers"]}
        else:
            reply.body += message.get("body", b"")

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": query.encode(),
        "headers": [(k.encode(), v.encode("latin-1")) for k, v in given.items()],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 8000),
    }
    await app(scope, receive, send)
    return reply


def form(*files: tuple[str, bytes], field_name: str = "image") -> tuple[bytes, dict[str, str]]:
    """A multipart body and its header, written by hand."""
    parts = [
        f'--edge\r\nContent-Disposition: form-data; name="{field_name}"; filename="{name}"\r\n'
        "Content-Type: application/octet-stream\r\n\r\n".encode()
        + content
        + b"\r\n"
        for name, content in files
    ]
    return b"".join(parts) + b"--edge--\r\n", {"Content-Type": "multipart/form-data; boundary=edge"}


@dataclass
class Fake:
    """A backend whose features are the mean colour, and that can be slow, busy, lost or broken."""

    classes: tuple[str, ...] = CLASSES
    fault: BaseException | None = None
    hold: asyncio.Event | None = None
    embedded: int = 0
    searched: list[tuple[int, str | None, bool]] = field(default_factory=list)

    async def _pause(self) -> None:
        await asyncio.sleep(0)
        if self.hold is not None:
            await self.hold.wait()
        if self.fault is not None:
            raise self.fault

    async def see(self, pixels: np.ndarray, look: np.ndarray) -> Seen:
        self.embedded += 1
        await self._pause()
        features = np.asarray(pixels.reshape(-1, pixels.shape[-1]).mean(axis=0), dtype=np.float32)
        if not self.classes:
            return features, Judgement(None, None, None)
        scores = np.exp(features[: len(self.classes)] / 100)
        distance = float(features[0] / 255)
        return features, Judgement((scores / scores.sum()).tolist(), distance, 1 - distance)

    async def search(
        self, features: np.ndarray, k: int, group: str | None, labelled: bool
    ) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        self.searched.append((k, group, labelled))
        hit = {"id": "a", "score": 0.5, "label": "", "group": "g", "thumbnail": "data:image/jpeg;base64,"}
        return [hit] * min(k, 3), {"vectors": 3, "kind": "flat", "recall_at_10": 1.0, "snapshot": "000001"}

    async def ready(self) -> None:
        await self._pause()


def service(**changes: Any) -> Service:
    """A service of three classes and an index."""
    values: dict[str, Any] = {
        "name": "run",
        "sha256": SHA,
        "card_sha256": CARD_SHA,
        "classes": CLASSES,
        "image_path": ImagePath(24, 32).as_dict(),
        "channels": 3,
        "metrics": {},
        "limit": 0.1,
        "index": {"snapshot": "000001"},
        "body_bytes": 1 << 20,
        "timeout_s": 20.0,
    }
    return Service(**(values | changes))
