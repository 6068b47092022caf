"""A closed-loop HTTP client that costs little: `python -m tests.benchmarks.load URL FILE CLIENTS SECONDS`, JSON out.

Each client keeps one connection and sends the next request when the answer is there. Every body differs (bytes after
the image's end), so that no cache answers. With --json they are base64 in JSON. With --retry a failed request is sent
again, with back-off, for 15 s.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import resource
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit


@dataclass
class Tally:
    taken: list[float] = field(default_factory=list)
    failed: int = 0
    lost: int = 0
    """Requests that failed, and of those, the ones that failed for good."""
    slowest_recovery: float = 0.0


@dataclass(frozen=True)
class Target:
    host: str
    port: int
    path: str
    content: bytes
    json: bool
    """Send the image as base64 in JSON, for a server that takes no other body."""

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection(self.host, self.port, limit=1 << 22)

    async def ask(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> int:
        """The status of one answer, read to its end."""
        body, kind = self.content + os.urandom(16), "application/octet-stream"
        if self.json:
            body, kind = b'{"image": "' + base64.b64encode(body) + b'"}', "application/json"
        head = (
            f"POST {self.path} HTTP/1.1\r\nHost: {self.host}\r\nContent-Type: {kind}\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        writer.write(head.encode() + body)
        await writer.drain()
        answer = await reader.readuntil(b"\r\n\r\n")
        length = next(int(x.split(b":")[1]) for x in answer.lower().split(b"\r\n") if x.startswith(b"content-length"))
        await reader.readexactly(length)
        return int(answer[9:12])


async def client(target: Target, until: float, tally: Tally, retry: bool) -> None:
    link = None
    while time.monotonic() < until:
        began, failed_at, wait = time.monotonic(), 0.0, 0.05
        while True:
            try:
                link = link or await target.connect()
                status = await asyncio.wait_for(target.ask(*link), 60)
            except (OSError, EOFError, TimeoutError, StopIteration):
                status, link = 0, None
            if status == 200:
                tally.taken.append(time.monotonic() - began)
                if failed_at:
                    tally.slowest_recovery = max(tally.slowest_recovery, time.monotonic() - failed_at)
                break
            if status >= 400:
                link = None
            tally.failed += not failed_at
            failed_at = failed_at or time.monotonic()
            if not retry or time.monotonic() - failed_at > 15:
                tally.lost += 1
                break
            await asyncio.sleep(wait)
            wait = min(2 * wait, 1.0)


async def main() -> None:
    url, file, clients, seconds = sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
    parts = urlsplit(url)
    path = parts.path + (f"?{parts.query}" if parts.query else "")
    content, as_json = Path(file).read_bytes(), "--json" in sys.argv
    target = Target(parts.hostname or "", parts.port or 80, path, content, as_json)
    warm = Tally()
    await asyncio.gather(*(client(target, time.monotonic() + min(3, seconds), warm, True) for _ in range(clients)))
    tally, began = Tally(), time.monotonic()
    used = resource.getrusage(resource.RUSAGE_SELF)
    await asyncio.gather(*(client(target, began + seconds, tally, "--retry" in sys.argv) for _ in range(clients)))
    now, span = resource.getrusage(resource.RUSAGE_SELF), time.monotonic() - began
    taken = sorted(tally.taken)
    print(
        json.dumps(
            {
                "requests": len(taken),
                "per_second": len(taken) / span,
                "p50_ms": 1000 * taken[len(taken) // 2] if taken else None,
                "p99_ms": 1000 * taken[int(len(taken) * 0.99)] if taken else None,
                "failed": tally.failed,
                "lost": tally.lost,
                "slowest_recovery_s": tally.slowest_recovery,
                "client_cpu": (now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime) / span,
            }
        )
    )


if __name__ == "__main__":
    asyncio.run(main())
