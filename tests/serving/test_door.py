"""The door before the application: who may enter, how large, how slow, how many."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any

import pytest

from serving.door import BUFFERS, Door, Limits, Receive, Send
from tests.asgi import Reply, ask

LIMIT = 1000
KEYS = tuple(hashlib.sha256(key).digest() for key in (b"first-key-of-two", b"second-key-of-two"))


class Echo:
    """Says how many bytes came; can be held up, and can fail."""

    def __init__(self) -> None:
        self.asked = 0
        self.hold: asyncio.Event | None = None
        self.fault: Exception | None = None

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        self.asked += 1
        size, more = 0, scope["method"] == "POST"
        while more:
            message = await receive()
            size, more = size + len(message["body"]), message["more_body"]
        if self.hold is not None:
            await self.hold.wait()
        if self.fault is not None:
            raise self.fault
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": str(size).encode()})


def door(keys: tuple[bytes, ...] = (), **limits: Any) -> tuple[Door, Echo]:
    echo = Echo()
    return Door(echo, Limits(**{"body_bytes": LIMIT, "seconds": 5.0, "requests": 4, **limits}), keys), echo


def asked(door: Door, *arguments: Any, **more: Any) -> Reply:
    """One request; afterwards the door holds nothing."""
    reply = asyncio.run(ask(door, *arguments, **more))
    assert (door.held, door.inside) == (0, 0)
    return reply


# Keys


@pytest.mark.parametrize(
    ("header", "status"),
    [
        (None, 401),
        ("", 401),
        ("Bearer", 401),
        ("Bearer ", 401),
        ("Bearer wrong", 401),
        ("Bearer first-key-of-tw", 401),
        ("Bearer first-key-of-two second-key-of-two", 401),
        ("Basic first-key-of-two", 401),
        ("first-key-of-two", 401),
        ("Bearer first-key-of-two", 200),
        ("Bearer second-key-of-two", 200),
        ("bearer first-key-of-two", 200),
        ("BEARER  first-key-of-two ", 200),
    ],
)
def test_only_a_request_with_one_of_the_keys_enters(header: str | None, status: int) -> None:
    front, echo = door(KEYS)
    headers = {} if header is None else {"Authorization": header}
    reply = asked(front, "/v1/classify", b"x", headers=headers)
    assert reply.status == status
    assert echo.asked == (status == 200)
    if status == 401:
        assert reply.error == "key_required"
        assert reply.headers["www-authenticate"] == "Bearer"
        assert reply.received == 0, "a stranger's body was read"


@pytest.mark.parametrize("path", ["/", "/openapi.json", "/healthz", "/readyz", "/page/app.js"])
def test_the_page_and_health_need_no_key(path: str) -> None:
    assert asked(door(KEYS)[0], path, method="GET").status == 200


@pytest.mark.parametrize("path", ["/v1/model", "/docs", "/page", "//", "/healthz/", "/HEALTHZ", "/v1/classify?/page/"])
def test_every_other_path_needs_one_whatever_the_method(path: str) -> None:
    for method in ("GET", "POST", "HEAD", "OPTIONS", "DELETE"):
        assert asked(door(KEYS)[0], path, method=method).status == 401


# Sizes


@pytest.mark.parametrize(
    ("declared", "status", "code"),
    [
        (str(LIMIT), 200, ""),
        (str(LIMIT + 1), 413, "too_large"),
        ("1000000000", 413, "too_large"),
        ("9" * 19, 413, "too_large"),
        ("9" * 5000, 400, "bad_request"),
        ("-1", 400, "bad_request"),
        ("+5", 400, "bad_request"),
        ("1e3", 400, "bad_request"),
        ("12, 12", 400, "bad_request"),
        ("½", 400, "bad_request"),
        ("", 200, ""),
    ],
)
def test_the_declared_size_is_judged_before_anything_is_read(declared: str, status: int, code: str) -> None:
    front, echo = door()
    reply = asked(front, "/", b"abc", headers={"Content-Length": declared})
    assert reply.status == status
    if status != 200:
        assert reply.error == code
        assert (reply.received, echo.asked) == (0, 0)


def test_a_body_without_a_declared_size_is_taken_up_to_the_limit() -> None:
    assert asked(door()[0], "/", b"x" * LIMIT, declare=False).body == str(LIMIT).encode()
    assert asked(door()[0], "/", b"x" * (LIMIT + 1), declare=False).error == "too_large"


def test_a_body_that_lied_about_its_size_stops_at_the_limit() -> None:
    reply = asked(door()[0], "/", (b"x" * 100 for _ in range(50)), headers={"Content-Length": "5"})
    assert reply.status == 413


def test_an_endless_body_stops_at_the_limit() -> None:
    def endless() -> Iterator[bytes]:
        while True:
            yield b"x" * 300

    front, echo = door()
    reply = asked(front, "/", endless())
    assert (reply.status, reply.error) == (413, "too_large")
    assert reply.received <= LIMIT + 300
    assert reply.headers["connection"] == "close"
    assert echo.asked == 0


def test_200_000_chunks_of_six_bytes_are_quick() -> None:
    front, _ = door(body_bytes=1 << 24, seconds=60)
    began = time.process_time()
    assert asked(front, "/", (b"sixby\n" for _ in range(200_000))).body == b"1200000"
    assert time.process_time() - began < 15  # 1 s where the machine has nothing else to do


def test_a_slow_upload_is_ended() -> None:
    async def stall() -> None:
        await asyncio.sleep(60)

    front, echo = door(seconds=0.2)
    reply = asked(front, "/", [b"x", b"y"], then=stall)
    assert (reply.status, reply.error, echo.asked) == (408, "too_slow", 0)


def test_a_slow_answer_is_no_slow_upload() -> None:
    """The time of an upload ends with it; what the application raises is the application's."""
    front, echo = door(seconds=0.05)
    echo.fault = TimeoutError("of something else")

    async def go() -> None:
        echo.hold = asyncio.Event()
        asyncio.get_running_loop().call_later(0.2, echo.hold.set)
        await ask(front, "/", b"x")

    with pytest.raises(TimeoutError, match="of something else"):
        asyncio.run(go())
    assert (front.held, front.inside) == (0, 0)


# Many at once


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


def test_more_requests_than_places_are_told_to_come_back_and_then_may() -> None:
    front, echo = door()

    async def go() -> list[Reply]:
        echo.hold = asyncio.Event()
        inside = [asyncio.create_task(ask(front, "/", b"x")) for _ in range(4)]
        await until(lambda: front.inside == 4)
        refused = await ask(front, "/", b"x")
        echo.hold.set()
        return [refused, *await asyncio.gather(*inside), await ask(front, "/", b"x")]

    refused, *others = asyncio.run(go())
    assert (refused.status, refused.error, refused.headers["retry-after"]) == (429, "busy", "1")
    assert [reply.status for reply in others] == [200] * 5
    assert (front.held, front.inside) == (0, 0)


def test_slow_uploads_take_no_place() -> None:
    front, _ = door()

    async def go() -> None:
        stop = asyncio.Event()
        slow = [asyncio.create_task(ask(front, "/", [b"x", b"y"], then=stop.wait)) for _ in range(200)]
        await until(lambda: front.held == 200)
        assert (await ask(front, "/", b"z")).status == 200
        stop.set()
        assert {reply.status for reply in await asyncio.gather(*slow)} <= {200, 429}

    asyncio.run(go())
    assert (front.held, front.inside) == (0, 0)


def test_what_all_uploads_hold_together_is_bounded() -> None:
    front, _ = door()
    largest = 0

    def chunks() -> Iterator[bytes]:
        nonlocal largest
        for _ in range(9):
            largest = max(largest, front.held)
            yield b"x" * 110

    async def go() -> list[Reply]:
        stop = asyncio.Event()
        uploads = [asyncio.create_task(ask(front, "/", chunks(), then=stop.wait)) for _ in range(40)]
        await asyncio.sleep(0.3)
        stop.set()
        return await asyncio.gather(*uploads)

    statuses = [reply.status for reply in asyncio.run(go())]
    assert largest <= BUFFERS * LIMIT + 110
    assert set(statuses) <= {200, 429} and statuses.count(429) >= 40 - BUFFERS - 1
    assert (front.held, front.inside) == (0, 0)


def test_a_client_that_goes_away_leaves_nothing_behind() -> None:
    front, echo = door()
    gone: Any = [b"x" * 100, None]
    assert asked(front, "/", gone).status == 0
    assert echo.asked == 0


def test_an_application_that_fails_leaves_nothing_behind() -> None:
    front, echo = door()
    echo.fault = RuntimeError("broken")
    with pytest.raises(RuntimeError, match="broken"):
        asyncio.run(ask(front, "/", b"x"))
    assert (front.held, front.inside) == (0, 0)


def test_a_cancelled_request_leaves_nothing_behind() -> None:
    front, echo = door()

    async def go() -> None:
        echo.hold = asyncio.Event()
        task = asyncio.create_task(ask(front, "/", b"x"))
        await until(lambda: front.inside == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(go())
    assert (front.held, front.inside) == (0, 0)


def test_a_websocket_is_closed_at_once() -> None:
    front, echo = door()
    sent: list[Any] = []

    async def go() -> None:
        async def receive() -> Any:
            return {"type": "websocket.connect"}

        async def send(message: Any) -> None:
            sent.append(message)

        await front({"type": "websocket", "path": "/", "headers": []}, receive, send)

    asyncio.run(go())
    assert [message["type"] for message in sent] == ["websocket.close"]
    assert echo.asked == 0
