"""The configs of `index` and `serve`: flags, YAML keys and Python API in one place, as in `training.configs`."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Annotated, Literal

from cyclopts import Parameter

from cluster.settings import Config

Device = Literal["auto", "cpu", "cuda", "mps"]


@Parameter(name="*")
@dataclass(frozen=True)
class IndexBuildConfig(Config):
    _: KW_ONLY
    model: str
    "A RUN, or its model folder."
    data: str
    "A DATASET, or any SOURCE that ingest takes."
    out: str
    "Where the INDEX goes."
    kind: Literal["auto", "flat", "hnsw"] = "auto"
    "flat is exact; hnsw approximate and fast; auto is flat until its measured time is too long for the load."
    queries_per_second: float = 50.0
    "Load that auto plans for: exact search may take half a core of it."
    where: tuple[str, ...] = ()
    "Keep only rows whose COLUMN=VALUE."
    labelled: bool = False
    "Keep only images with a label."
    device: Device = "auto"
    "Where the model runs."
    overwrite: bool = False
    "Throw away what is at --out."

    def __post_init__(self) -> None:
        self._require("queries_per_second", self.queries_per_second > 0, "must be positive")


@Parameter(name="*")
@dataclass(frozen=True)
class IndexSearchConfig(Config):
    image: Annotated[str, Parameter(name="image")]
    "The image file to find neighbours of."
    _: KW_ONLY
    index: str
    "An INDEX."
    model: str | None = None
    "The RUN that the index was built under; default: where it was then."
    k: int = 10
    "Neighbours shown."
    not_same_group: bool = False
    "Leave out images of the query's own group (patient, slide), known from its bytes or given by --group."
    group: str = ""
    "Group of the query, where its bytes are not in the index."
    labelled: bool = False
    "Find only labelled images."
    json: bool = False
    "Print JSON in place of a table."

    def __post_init__(self) -> None:
        self._require("k", 1 <= self.k <= MOST_HITS, f"must lie between 1 and {MOST_HITS:,}")


@Parameter(name="*")
@dataclass(frozen=True)
class IndexCheckConfig(Config):
    _: KW_ONLY
    index: str
    "An INDEX."
    min_recall: float = 0.9
    "Fail below this recall of the ten nearest."


@Parameter(name="*")
@dataclass(frozen=True)
class ServeConfig(Config):
    _: KW_ONLY
    model: str
    "A RUN, or its model folder."
    index: str | None = None
    "An INDEX built under that model; without it there is no search."
    host: str = "127.0.0.1"
    "Address to listen on; beyond loopback an --api-keys file is required."
    port: int = 8000
    "Port to listen on."
    api_keys: str | None = None
    "File with one key per line; requests must then carry `Authorization: Bearer KEY`."
    replicas: int = 1
    "Copies of the encoder, each with its share of the cores or a GPU."
    batch_size: int = 16
    "Most images in one forward pass."
    max_queue: int = 128
    "Requests answered at once or waiting; more get 429 and Retry-After."
    max_body_mb: int = 32
    "Largest request body."
    timeout_s: float = 30.0
    "Longest answer, and longest upload."
    device: Device = "auto"
    "Where the model runs."

    def __post_init__(self) -> None:
        self._require("port", 0 <= self.port <= 65535, "must lie between 0 and 65535")
        self._require("replicas", self.replicas >= 1, "must be at least 1")
        self._require("batch_size", self.batch_size >= 1, "must be at least 1")
        self._require("max_queue", self.max_queue >= 1, "must be at least 1")
        self._require("max_body_mb", 1 <= self.max_body_mb <= 1024, "must lie between 1 and 1024")
        self._require("timeout_s", self.timeout_s > 0, "must be positive")


MOST_HITS = 1000
"""Most neighbours of one search."""
