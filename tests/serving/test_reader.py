"""The HTTP server over a socket: what comes before a body, and after it, has bounds too."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import pytest
import uvicorn

from serving import deployments
from serving.app import create_app
from serving.deployments import HEAD_BYTES, Reader, bound
from serving.door import Door, Limits
from tests.asgi import Fake, service
from tests.hostile import encoded, picture
from tests.runs import wait_until

HEAD = b"POST /v1/classify HTTP/1.1\r\nHost: x\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
PNG = encoded(picture(), "PNG")
SOCKETS = 16 << 20
"""Bytes that may lie in the sockets' own buffers."""


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """A server as the ingress runs it."""
    door = Door(create_app(service(), Fake()), Limits(1 << 20, 5.0, 8))
    link = bound("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(door, http=Reader, ws="none", lifespan="off", log_config=None))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [link]})
    thread.start()
    wait_until(lambda: server.started, 60, "the server listens")
    yield int(link.getsockname()[1])
    server.should_exit = True
    thread.join(30)


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=30)


def sent(link: socket.socket, piece: bytes, most: int = 1 << 27) -> int:
    """Bytes that went out before the server hung up."""
    total = 0
    with contextlib.suppress(OSError):
        while total < most:
            link.sendall(piece)
            total += len(piece)
    return total


def status(link: socket.socket) -> int:
    """The status of the next answer, read to its end; 0 where the connection was cut."""
    with contextlib.suppress(OSError):
        reader = link.makefile("rb")
        line, length = reader.readline(1000), 0
        while (header := reader.readline(10_000)).strip():
            if header.lower().startswith(b"content-length:"):
                length = int(header.split(b":")[1])
        reader.read(length)
        return int(line.split()[1]) if line else 0
    return 0


@pytest.mark.parametrize("start", [b"", HEAD, HEAD + b"X: ", CHUNKED + b"1\r\nx\r\n0\r\n", CHUNKED + b"1;a="])
@pytest.mark.parametrize("piece", [b"a" * 60_000, b"X: " + b"a" * 60_000 + b"\r\n", b"X: y\r\n" * 10_000])
def test_what_is_no_body_and_has_no_end_is_cut_off(port: int, start: bytes, piece: bytes) -> None:
    with connect(port) as link:
        link.sendall(start)
        assert sent(link, piece) < HEAD_BYTES + SOCKETS
        assert status(link) in {400, 0}


def test_a_large_head_and_tiny_chunks_are_no_attack(port: int) -> None:
    with connect(port) as link:
        link.sendall(HEAD + b"X: " + b"a" * 60_000 + b"\r\nContent-Length: %d\r\n\r\n" % len(PNG) + PNG)
        assert status(link) == 200
        pieces = b"".join(b"1\r\n%c\r\n" % byte for byte in PNG)
        for _ in range(3):  # on one connection
            link.sendall(CHUNKED + pieces + b"0\r\n\r\n")
            assert status(link) == 200


def test_a_connection_that_says_nothing_is_ended(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deployments, "HEAD_S", 0.3)
    began = time.monotonic()
    with connect(port) as silent, connect(port) as slow, connect(port) as done:
        slow.sendall(HEAD)
        done.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(PNG) + PNG)
        assert status(done) == 200
        assert silent.recv(10) == b"" and slow.recv(10) == b""
        assert time.monotonic() - began < 10
        done.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(PNG) + PNG)  # between requests, patience is longer
        assert status(done) == 200


@pytest.mark.parametrize(
    "extra",
    [
        b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nabc",
        b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"Content-Length: -3\r\n\r\nabc",
        b"Transfer-Encoding: chunked\r\n\r\nFFFFFFFFFFFFFFFFFF\r\n",
        b"Transfer-Encoding: chunked\r\n\r\n-5\r\n",
        b"Transfer-Encoding: identity, chunked, x\r\n\r\n",
        b"Bad Header\x00: x\r\n\r\n",
    ],
)
def test_requests_that_can_be_read_in_two_ways_are_refused(port: int, extra: bytes) -> None:
    with connect(port) as link:
        link.sendall(HEAD + extra)
        assert status(link) in {400, 0}
