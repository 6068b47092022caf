"""The HTTP interface: a FastAPI application over a `Backend`. Knows no Ray; limits and keys are `serving.door`'s."""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Protocol

import numpy as np
from fastapi import FastAPI, Query, Request, Security
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response
from fastapi.security import HTTPBearer
from pydantic import BaseModel, ConfigDict
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser

from serving.answers import in_domain, ranked, tree
from serving.configs import MOST_HITS
from training.domain import look_of
from training.images import ImagePath, UnreadableImage, decode, to_channels

PAGE = Path(__file__).parent / "page"
MOST_IMAGES = 64
"""Most images of one multipart request."""
KEPT = 256
"""Feature vectors kept, so that classifying and searching one image runs the encoder once."""
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class Busy(Exception):  # noqa: N818 - what the backend says, not what is wrong with it
    """The backend's queue is full."""


class Unanswered(Exception):  # noqa: N818
    """The backend lost the request, as when a replica dies; the same request again may succeed."""


@dataclass(frozen=True)
class Judgement:
    """Of one image: probabilities of the leaves [K] or None for an encoder, and its place in the training domain."""

    probabilities: list[float] | None
    distance: float | None
    typicality: float | None


Seen = tuple[np.ndarray, Judgement]
"""Features [D] of one image, and what is thought of it."""


class Backend(Protocol):
    """What computes; raises `Busy` and `Unanswered`."""

    async def see(self, pixels: np.ndarray, look: np.ndarray) -> Seen:
        """Features float32 [D] and judgement of stored pixels uint8 [H, W, C] with their statistics [S] (`look_of`)."""

    async def search(
        self, features: np.ndarray, k: int, group: str | None, labelled: bool
    ) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """(hits, facts of the index)."""

    async def ready(self) -> None:
        """Returns when every part answers."""


@dataclass(frozen=True)
class Service:
    """What is served: plain values, so that they travel."""

    name: str
    sha256: str
    """Of the weights: what an index must have been built with."""
    card_sha256: str
    """Of model.json, which holds those of all files: classifiers of the same frozen network differ in it."""
    classes: tuple[str, ...]
    image_path: dict[str, Any]
    channels: int
    metrics: dict[str, Any]
    limit: float
    """Typicality below which `in_domain` turns false."""
    index: dict[str, Any] | None
    body_bytes: int
    timeout_s: float
    several: bool = False
    """Whether an image may have several labels, so that their probabilities are independent."""

    @property
    def model(self) -> dict[str, str]:
        return {"name": self.name, "sha256": self.sha256, "card_sha256": self.card_sha256}


# What the answers look like, for the OpenAPI document; examples are of a Pap smear model.


class Answer(BaseModel):
    model_config = ConfigDict(extra="allow")


class ModelName(BaseModel):
    name: str
    sha256: str
    card_sha256: str


class Fault(BaseModel):
    code: str
    message: str


class Error(BaseModel):
    """Every error."""

    error: Fault


class Domain(BaseModel):
    """Whether the image is like the training set; `answer` is null where the model cannot tell."""

    answer: bool | None
    typicality: float | None
    distance: float | None
    limit: float
    message: str


class Class(BaseModel):
    label: str
    probability: float


class Node(BaseModel):
    label: str
    probability: float
    children: list[Node]


class Classified(BaseModel):
    """Leaves, likeliest first, with calibrated probabilities; `tree` sums them up to the root.

    Where `several` labels may hold for an image, each probability is of that label by itself, they have no sum, and a
    node of `tree` has the largest of those below it.
    """

    classes: list[Class]
    several: bool
    tree: Node
    in_domain: Domain
    model: ModelName


class Hit(BaseModel):
    id: str
    score: float
    label: str
    group: str
    thumbnail: str


class Found(BaseModel):
    """Nearest images of the index, best first; `score` is the cosine similarity, `thumbnail` a data URI."""

    hits: list[Hit]
    index: dict[str, Any]
    in_domain: Domain
    model: ModelName


class Embedded(BaseModel):
    """The feature vector, as the encoder gives it."""

    embedding: list[float]
    in_domain: Domain
    model: ModelName


class ItemError(BaseModel):
    error: Fault


class Many(BaseModel):
    """Answers of a request with several images, in their order; one that cannot be read spoils no other."""

    results: list[Classified | Found | Embedded | ItemError]


class Fail(Exception):  # noqa: N818
    def __init__(self, status: int, code: str, message: str, *, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message
        self.headers = None if retry_after is None else {"Retry-After": str(retry_after)}

    def body(self) -> dict[str, Any]:
        return {"error": {"code": self.code, "message": self.message}}


ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": Error, "description": words}
    for status, words in {
        400: "The image cannot be read, or the request is malformed",
        401: "A valid key is required",
        408: "The upload was too slow",
        409: "This server has no classes, or no index",
        413: "The body is too large",
        422: "A parameter is out of range",
        429: "Too many requests at once; see Retry-After",
        503: "A part of the server is starting again; see Retry-After",
        504: "The answer took too long",
    }.items()
}
IMAGE = {"type": "string", "format": "binary"}
BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "description": "The image: a multipart field `image` (up to 64 of them), or the raw body.",
        "content": {
            "multipart/form-data": {
                "schema": {"type": "object", "required": ["image"], "properties": {"image": IMAGE}},
                "encoding": {"image": {"contentType": "image/png, image/jpeg, image/tiff, image/bmp, image/webp"}},
            },
            "application/octet-stream": {"schema": IMAGE},
        },
    }
}
EXAMPLE_DOMAIN = {"answer": True, "typicality": 0.42, "distance": 0.12, "limit": 0.01, "message": "…"}
EXAMPLE_MODEL = {"name": "pap-smear", "sha256": "5e41c917f503", "card_sha256": "c9031d77a2e4"}
LEAVES: list[dict[str, Any]] = [
    {"label": "abnormal/severe_dysplasia", "probability": 0.75},
    {"label": "normal/columnar", "probability": 0.25},
]
EXAMPLES: dict[str, dict[str, Any]] = {
    "classify": {
        "classes": LEAVES,
        "several": False,
        "tree": {
            "label": "",
            "probability": 1.0,
            "children": [
                {
                    "label": n["label"].split("/")[0],
                    "probability": n["probability"],
                    "children": [{**n, "children": []}],
                }
                for n in LEAVES
            ],
        },
        "in_domain": EXAMPLE_DOMAIN,
        "model": EXAMPLE_MODEL,
    },
    "search": {
        "hits": [
            {
                "id": "3b36e84c6bf05e6b92a7",
                "score": 0.91,
                "label": "abnormal/severe_dysplasia",
                "group": "slide-17",
                "thumbnail": "data:image/jpeg;base64,…",
            }
        ],
        "index": {"vectors": 917, "kind": "flat", "recall_at_10": 1.0, "snapshot": "000001"},
        "in_domain": EXAMPLE_DOMAIN,
        "model": EXAMPLE_MODEL,
    },
    "embed": {"embedding": [0.1, -0.2], "in_domain": EXAMPLE_DOMAIN, "model": EXAMPLE_MODEL},
}


def _described(name: str) -> dict[str, Any]:
    example = {"application/json": {"example": EXAMPLES[name]}}
    return {"responses": {200: {"content": example}, **ERRORS}, "openapi_extra": BODY}


KEY = Security(HTTPBearer(auto_error=False, description="One of the server's keys."))
"""For the OpenAPI document only: it is the door that asks for the key."""

Neighbours = Annotated[int, Query(ge=1, le=MOST_HITS, description="Neighbours wanted.")]
Excluded = Annotated[str | None, Query(max_length=500, description="Leave out images of this group (patient, slide).")]
Labelled = Annotated[bool, Query(description="Find only labelled images.")]


@dataclass
class UnderWay:
    """A computation and how many wait for it."""

    task: asyncio.Task[Seen]
    waiting: int = 0


class Desk:
    """Images in, answers out: decodes off the event loop, keeps recent features, bounds every answer's time."""

    def __init__(self, service: Service, backend: Backend, threads: int = 2) -> None:
        self.service, self.backend = service, backend
        self.path = ImagePath.from_dict(service.image_path)
        self.pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        self.kept: OrderedDict[bytes, Seen] = OrderedDict()
        self.under_way: dict[bytes, UnderWay] = {}

    async def see(self, content: bytes) -> Seen:
        """What an encoded image is to the model, computed once for all who ask meanwhile, stopped when none is left.

        Raises:
            Fail: it cannot be read.
        """
        key = hashlib.sha256(content).digest()
        if key in self.kept:
            self.kept.move_to_end(key)
            return self.kept[key]
        if key not in self.under_way:
            self.under_way[key] = UnderWay(asyncio.create_task(self._compute(content)))
        shared = self.under_way[key]
        shared.waiting += 1
        try:
            seen = await asyncio.shield(shared.task)
        finally:
            shared.waiting -= 1
            if not shared.waiting or shared.task.done():
                shared.task.cancel()  # else what nobody waits for would pile up, and hold its image
                if self.under_way.get(key) is shared:
                    del self.under_way[key]
        self.kept[key] = seen
        while len(self.kept) > KEPT:
            self.kept.popitem(last=False)
        return seen

    async def _compute(self, content: bytes) -> Seen:
        try:
            pixels, look = await asyncio.get_running_loop().run_in_executor(self.pool, self._decode, content)
        except UnreadableImage as error:
            raise Fail(400, "unreadable_image", f"the image cannot be read: {error.reason}") from error
        return await self.backend.see(pixels, look)

    def _decode(self, content: bytes) -> tuple[np.ndarray, np.ndarray]:
        pixels = to_channels(decode(content, self.path), self.service.channels)
        return pixels, look_of(pixels[None])[0]

    async def classify(self, content: bytes) -> dict[str, Any]:
        if not self.service.classes:
            raise Fail(409, "no_classes", "this model is an encoder without classes")
        _, judged = await self.see(content)
        assert judged.probabilities is not None
        return {
            "classes": ranked(self.service.classes, judged.probabilities),
            "several": self.service.several,
            "tree": tree(self.service.classes, judged.probabilities, several=self.service.several),
            **self._ending(judged),
        }

    async def search(self, content: bytes, k: int, group: str | None, labelled: bool) -> dict[str, Any]:
        if self.service.index is None:
            raise Fail(409, "no_index", "this server was started without an index")
        features, judged = await self.see(content)
        hits, index = await self.backend.search(features, k, group, labelled)
        return {"hits": hits, "index": index, **self._ending(judged)}

    async def embed(self, content: bytes) -> dict[str, Any]:
        features, judged = await self.see(content)
        return {"embedding": [float(v) for v in features], **self._ending(judged)}

    def _ending(self, judged: Judgement) -> dict[str, Any]:
        service = self.service
        domain = in_domain(judged.distance, judged.typicality, service.limit)
        return {"in_domain": domain, "model": service.model}

    async def answer(self, request: Request, one: Callable[[bytes], Awaitable[dict[str, Any]]]) -> Response:
        """The answer to a request with one image, or the list of answers to one with several.

        Raises:
            Fail: no image, or the only one cannot be read; or the time is over.
        """
        try:
            async with asyncio.timeout(self.service.timeout_s):
                images = await images_of(request)
                if len(images) == 1:
                    return JSONResponse(await one(images[0]))
                tasks = [asyncio.create_task(_or_error(one, image)) for image in images]
                try:
                    return JSONResponse({"results": await asyncio.gather(*tasks)})
                finally:
                    for task in tasks:
                        task.cancel()
        except TimeoutError:
            raise Fail(504, "timeout", f"no answer within {self.service.timeout_s:g} seconds") from None


async def _or_error(one: Callable[[bytes], Awaitable[dict[str, Any]]], image: bytes) -> dict[str, Any]:
    try:
        return await one(image)
    except Fail as error:
        if error.status != 400:
            raise
        return error.body()


async def images_of(request: Request) -> list[bytes]:
    """The images of a request: its multipart fields `image`, or its raw body.

    Raises:
        Fail: there is none, or the form is malformed.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "multipart/form-data":
        body = await request.body()
        if not body:
            raise Fail(400, "no_image", "the body is empty; send the image as it, or as a multipart field `image`")
        return [body]
    parser = MultiPartParser(
        request.headers, request.stream(), max_files=MOST_IMAGES, max_fields=16, max_part_size=1 << 16
    )
    parser.spool_max_size = 1 << 31  # the body is in memory already: nothing of it goes to a disk
    try:
        form = await parser.parse()
        files = [await part.read() for part in form.getlist("image") if isinstance(part, UploadFile)]
        await form.close()
    except (MultiPartException, HTTPException, ValueError) as error:
        detail = getattr(error, "detail", None) or getattr(error, "message", None) or "malformed"
        raise Fail(400, "bad_request", f"the multipart form cannot be read: {detail}"[:200]) from error
    if not files:
        raise Fail(400, "no_image", "the form has no file field `image`")
    return files


def create_app(service: Service, backend: Backend, *, keyed: bool = False) -> FastAPI:
    """The application: /v1/classify, /v1/search, /v1/embed, /v1/model, /healthz, /readyz and the page.

    Args:
        keyed: whether the door before it asks for a key, which the OpenAPI document then says.
    """
    app = FastAPI(
        title="Rayograph",
        description="Classification of medical images and search for similar ones. Research use, not a medical device.",
        version="1",
        docs_url=None,  # they fetch scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,  # the redirect would name whatever host the request did
    )
    desk = Desk(service, backend)
    key = [KEY] if keyed else []

    @app.post("/v1/classify", response_model=Classified | Many, dependencies=key, **_described("classify"))
    async def classify(request: Request) -> Response:
        """What is this? Calibrated probabilities of the classes."""
        return await desk.answer(request, desk.classify)

    @app.post("/v1/search", response_model=Found | Many, dependencies=key, **_described("search"))
    async def search(
        request: Request, k: Neighbours = 10, not_group: Excluded = None, labelled: Labelled = False
    ) -> Response:
        """Show known images like it."""
        return await desk.answer(request, lambda image: desk.search(image, k, not_group, labelled))

    @app.post("/v1/embed", response_model=Embedded | Many, dependencies=key, **_described("embed"))
    async def embed(request: Request) -> Response:
        """The feature vector of an image."""
        return await desk.answer(request, desk.embed)

    @app.get("/v1/model", response_model=Answer, responses={401: ERRORS[401]}, dependencies=key)
    async def model() -> dict[str, Any]:
        """What is served: model, index and limits."""
        shown = {"classes": list(service.classes), "metrics": service.metrics, "image_size": _size(service)}
        limits = {"max_body_bytes": service.body_bytes, "max_pixels": desk.path.max_pixels}
        return {"model": service.model | shown, "index": service.index, "limits": limits}

    @app.get("/healthz", response_model=Answer)
    async def healthz() -> dict[str, str]:
        """This process answers."""
        return {"status": "ok"}

    @app.get("/readyz", response_model=Answer, responses={503: ERRORS[503]})
    async def readyz() -> dict[str, str]:
        """Every part answers."""
        try:
            async with asyncio.timeout(5):
                await backend.ready()
        except (TimeoutError, Unanswered, Busy):
            raise Fail(503, "not_ready", "a part of the server does not answer yet", retry_after=1) from None
        return {"status": "ready"}

    _add_page(app)
    _add_errors(app)
    return app


def _size(service: Service) -> str:
    return f"{service.image_path['height']}x{service.image_path['width']}"


def _add_page(app: FastAPI) -> None:
    files = {p.name: p for p in PAGE.iterdir() if p.is_file()} if PAGE.is_dir() else {}
    headers = {"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return await part("index.html")

    @app.get("/page/{name}", include_in_schema=False)
    async def part(name: str) -> Response:
        if name not in files:
            raise Fail(404, "not_found", "no such file")
        return FileResponse(files[name], headers=headers)


def _add_errors(app: FastAPI) -> None:
    def said(status: int, code: str, message: str, headers: dict[str, str] | None = None) -> Response:
        return JSONResponse({"error": {"code": code, "message": message}}, status, headers)

    @app.exception_handler(Fail)
    async def fail(request: Request, error: Fail) -> Response:
        return said(error.status, error.code, error.message, error.headers)

    @app.exception_handler(Busy)
    async def busy(request: Request, error: Busy) -> Response:
        return said(429, "busy", "too many requests at once; come back in a second", {"Retry-After": "1"})

    @app.exception_handler(Unanswered)
    async def unanswered(request: Request, error: Unanswered) -> Response:
        message = "a part of the server is starting again; come back in a second"
        return said(503, "starting", message, {"Retry-After": "1"})

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:])
        return said(422, "bad_parameter", f"{where}: {first['msg']}"[:200])

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        code = {404: "not_found", 405: "not_allowed"}.get(error.status_code, "bad_request")
        return said(error.status_code, code, str(error.detail)[:200], dict(error.headers or {}))

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:
        return said(500, "internal", "something went wrong here; the server's log says what")
