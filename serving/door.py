"""What stands before every request: keys, sizes and times, checked before a body is held in memory. Plain ASGI.

Requests reach the application only when their whole body is here, within the limits; until then a slow or endless
upload costs one connection and no place in the queue.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

OPEN = ("/", "/openapi.json", "/healthz", "/readyz")
"""Paths that need no key: the page must load to ask for one. Besides, everything below /page/."""
BUFFERS = 8
"""Largest bodies that may be held at once, over all requests."""


@dataclass(frozen=True)
class Limits:
    """Bounds of one request, and of all at once."""

    body_bytes: int
    seconds: float
    requests: int
    """Requests in work or waiting; further ones are told to come back."""


class Door:
    """ASGI middleware. `key_hashes` are SHA-256 of the keys, one of which a request must carry; none means no key."""

    def __init__(self, app: Application, limits: Limits, key_hashes: tuple[bytes, ...] = ()) -> None:
        self.app, self.limits, self.key_hashes = app, limits, key_hashes
        self.inside = 0
        self.held = 0

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
            return
        headers = {k.lower(): v for k, v in scope["headers"]}
        if not self._may_enter(scope["path"], headers):
            await refuse(send, 401, "key_required", "give a valid key: Authorization: Bearer KEY", bearer=True)
            return
        if scope["method"] in {"GET", "HEAD"}:
            await self.app(scope, receive, send)
            return
        declared = headers.get(b"content-length") or b"0"
        if not declared.isdigit() or len(declared) > 19:
            await refuse(send, 400, "bad_request", "Content-Length is not a number")
        elif int(declared) > self.limits.body_bytes:
            await refuse(send, 413, "too_large", self._too_large())
        else:
            await self._with_body(scope, receive, send)

    def _may_enter(self, path: str, headers: dict[bytes, bytes]) -> bool:
        if not self.key_hashes or path in OPEN or path.startswith("/page/"):
            return True
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        given = hashlib.sha256(key.strip()).digest()
        known = [hmac.compare_digest(given, one) for one in self.key_hashes]  # all of them: no timing tells which
        return scheme.lower() == b"bearer" and any(known)

    async def _with_body(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        body, held = bytearray(), 0
        try:
            async with asyncio.timeout(self.limits.seconds):
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return
                    chunk = message.get("body", b"")
                    body += chunk
                    held += len(chunk)
                    self.held += len(chunk)
                    more = message.get("more_body", False)
                    if held > self.limits.body_bytes:
                        await refuse(send, 413, "too_large", self._too_large())
                        return
                    if self.held > BUFFERS * self.limits.body_bytes:
                        await self._come_back(send)
                        return
        except TimeoutError:
            await refuse(send, 408, "too_slow", f"the upload took longer than {self.limits.seconds:g} seconds")
        else:
            if self.inside >= self.limits.requests:
                await self._come_back(send)
                return
            self.inside += 1
            try:
                await self.app(scope, _replay(body, receive), send)
            finally:
                self.inside -= 1
        finally:
            self.held -= held

    async def _come_back(self, send: Send) -> None:
        await refuse(send, 429, "busy", "too many requests at once; come back in a second", retry_after=1)

    def _too_large(self) -> str:
        return f"the body is larger than {self.limits.body_bytes // 2**20} MiB"


def _replay(body: bytearray, receive: Receive) -> Receive:
    """A `receive` that gives the whole body once, keeping none of it, then whatever follows (a disconnect)."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        whole = bytes(body)
        body.clear()
        return {"type": "http.request", "body": whole, "more_body": False}

    return again


async def refuse(
    send: Send, status: int, code: str, message: str, *, retry_after: int | None = None, bearer: bool = False
) -> None:
    """An error in the form that all errors have; the connection ends, for the rest of the body was not read."""
    content = json.dumps({"error": {"code": code, "message": message}}).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(content)).encode()),
        (b"connection", b"close"),
    ]
    headers += [(b"retry-after", str(retry_after).encode())] if retry_after is not None else []
    headers += [(b"www-authenticate", b"Bearer")] if bearer else []
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": content})
