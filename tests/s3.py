"""A real S3 server on this machine, in memory, that can be told to misbehave."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.request import Request, urlopen

from moto.core.models import DEFAULT_ACCOUNT_ID
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from moto.s3.models import s3_backends
from werkzeug.serving import make_server

KEY = "AKIATEST"
ERROR = '<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code><Message>{message}</Message></Error>'
NAMES = {403: "InvalidAccessKeyId", 500: "InternalError", 503: "SlowDown"}
HOLD_S = 60
Seen = tuple[str, str, int]
"""Method, path and bytes answered of one request."""


class Hold:
    """The first request of `method` whose path holds `part` waits at the server until it is let go, and then fails."""

    def __init__(self, method: str, part: str) -> None:
        self.caller = self.path = ""
        """Address and path of the request; empty until it is there."""
        self._wanted, self._first, self._free = (method, part), threading.Lock(), threading.Event()

    def meet(self, method: str, path: str, caller: str) -> int:
        """The status with which the request is refused; 0 lets it pass."""
        if method != self._wanted[0] or self._wanted[1] not in path or not self._first.acquire(blocking=False):
            return 0
        self.path, self.caller = path, caller
        self._free.wait(HOLD_S)
        return 503

    def let_go(self) -> None:
        self._free.set()


@dataclass
class Store:
    """The server at `endpoint`; `bucket` is the URI of a bucket in it."""

    endpoint: str
    bucket: str = ""
    buckets: list[str] = field(default_factory=list)
    refuse: Callable[[str, str], int] = field(default=lambda method, path: 0)
    """Status with which a request is refused; 0 lets it pass."""
    hold: Hold | None = None
    seen: list[Seen] = field(default_factory=list)
    """Requests since the list was last cleared."""

    @contextlib.contextmanager
    def refusing(self, refuse: Callable[[str, str], int]) -> Iterator[None]:
        """Inside the block, requests are refused as `refuse` says."""
        before, self.refuse = self.refuse, refuse
        try:
            yield
        finally:
            self.refuse = before

    @contextlib.contextmanager
    def holding(self, method: str, part: str) -> Iterator[Hold]:
        """Inside the block, the first such request waits, so that its caller can be killed in the middle of it."""
        self.hold = Hold(method, part)
        try:
            yield self.hold
        finally:
            self.hold.let_go()
            self.hold = None

    @property
    def environment(self) -> dict[str, str]:
        """Where the server is, and the credentials that it takes."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_REGION": "us-east-1",
        }

    def keys(self) -> dict[str, bytes]:
        """Everything in the bucket, seen from within the server."""
        held = s3_backends[DEFAULT_ACCOUNT_ID]["aws"].buckets[self.bucket.removeprefix("s3://")].keys
        return {name: bytes(held[name].value) for name in list(held)}

    def make(self, bucket: str) -> str:
        """A new bucket's URI."""
        self.buckets.append(bucket)
        headers = {"Authorization": f"AWS4-HMAC-SHA256 Credential={KEY}/20260101/us-east-1/s3/aws4_request"}
        with urlopen(Request(f"{self.endpoint}/{bucket}", method="PUT", headers=headers)):
            return f"s3://{bucket}"


class _Front:
    """Stands before moto: refuses on demand, keeps a record, and asks for the credentials that moto does not."""

    def __init__(self, store: Store, app: Any) -> None:
        self.store, self.app = store, app

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        known = f"Credential={KEY}/" in environ.get("HTTP_AUTHORIZATION", "")
        hold = self.store.hold
        held = hold.meet(method, path, environ["REMOTE_ADDR"]) if hold else 0
        status = held or self.store.refuse(method, path) or (0 if known else 403)
        if status:
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            body = b"" if method == "HEAD" else ERROR.format(code=NAMES[status], message="no").encode()
            start_response(f"{status} No", [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
            return [body]
        body = b"".join(self.app(environ, start_response))
        self.store.seen.append((method, path, len(body)))
        return [body]


@contextlib.contextmanager
def running(address: str = "127.0.0.1") -> Iterator[Store]:
    """A server without a bucket.

    address: where it listens: loopback, or one of a network that the test made.
    """
    store = Store("")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = make_server(address, 0, _Front(store, DomainDispatcherApplication(create_backend_app)), threaded=True)
    store.endpoint = f"http://{address}:{server.server_port}"
    threading.Thread(target=server.serve_forever, name="s3", daemon=True).start()
    try:
        yield store
    finally:
        server.shutdown()
