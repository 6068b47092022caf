"""The verb `serve`: the deployments come up under Ray Serve, and stay until they are stopped."""

from __future__ import annotations

import hashlib
import ipaddress
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster import storage
from cluster.errors import ResourceError, UsageError
from cluster.progress import say
from cluster.session import Resources, cores, in_cluster, session
from serving.configs import ServeConfig
from serving.snapshot import current, same_model
from training.artifact import card_sha256, load_model, located_model, run_name

SHORTEST_KEY = 16
LOOK_S = 5.0
"""Seconds between looks at whether the service still stands."""
APPLICATION = "rayograph"


@dataclass(frozen=True)
class Running:
    """A service that answers at `url`."""

    url: str


def serve(config: ServeConfig) -> int:
    """Answers until Ctrl-C or SIGTERM.

    Raises:
        UsageError: no such model or index, they do not belong together, the address cannot be had, or no key file
            where one is needed.
    """
    with served(config) as running:
        say(f"serving {config.model} at {running.url}  (open it in a browser; Ctrl-C stops)")
        while True:
            time.sleep(LOOK_S)
            _still_there()


@contextmanager
def served(config: ServeConfig) -> Iterator[Running]:
    """The service runs inside the block; errors as `serve`."""
    keys = key_hashes(config.api_keys)
    if not keys and not is_loopback(config.host):
        raise UsageError(
            f"--host {config.host}: whoever reaches this address could ask; give --api-keys FILE (one key per line), "
            "or serve on 127.0.0.1"
        )
    service = _service(config)
    port = _try_address(config.host, config.port)
    say(f"starting to serve {config.model} …")
    _prepare_environment()
    import ray

    joined = ray.is_initialized() or in_cluster()
    with session(cpus=cores() + 2) as found:
        from serving.deployments import Listen
        from serving.door import Limits

        limits = Limits(service.body_bytes, config.timeout_s, config.max_queue)
        _start_serve()
        try:
            yield _start(config, service, Listen(config.host, port, limits, keys), found)
        finally:
            if joined:  # else Serve ends with the session, and quietly
                _stop()


def key_hashes(path: str | None) -> tuple[bytes, ...]:
    """SHA-256 of the keys in a file, one per line; blank lines and lines that start with # do not count.

    Raises:
        UsageError: no such file, it is readable by others, or holds no key or a short one.
    """
    if path is None:
        return ()
    file = Path(path)
    lines = storage.read_bytes(path).decode("utf-8", "replace").splitlines()
    keys = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not keys:
        raise UsageError(f"--api-keys {path}: holds no key; one per line, such as the output of: openssl rand -hex 32")
    if any(len(key) < SHORTEST_KEY for key in keys):
        raise UsageError(
            f"--api-keys {path}: a key is shorter than {SHORTEST_KEY} characters; try openssl rand -hex 32"
        )
    if file.stat().st_mode & 0o077:
        raise UsageError(f"--api-keys {path}: others can read this file; run: chmod 600 {path}")
    return tuple(hashlib.sha256(key.encode()).digest() for key in keys)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _try_address(host: str, port: int) -> int:
    """The port, or a free one for 0: the ingress takes it again when it has to start anew."""
    from serving.deployments import bound

    try:
        with bound(host, port) as found:
            return int(found.getsockname()[1])
    except OSError as error:
        raise UsageError(f"--host {host} --port {port}: cannot listen there ({error.strerror or error})") from error


def _service(config: ServeConfig) -> Any:
    """What is served, after model and index were read whole and found to belong together."""
    from serving.app import Service

    model = load_model(config.model)
    if model.card.inputs:
        kinds = ", ".join(model.card.inputs)
        raise UsageError(
            f"{config.model}: judges cases of {kinds} together; a request is of one image, so it is not served"
        )
    index = None
    if config.index is not None:
        snapshot = current(config.index)
        same_model(snapshot, model.sha256, config.model)
        index = {"snapshot": snapshot.name}
    card = model.card
    return Service(
        name=run_name(config.model),
        sha256=model.sha256,
        card_sha256=card_sha256(config.model),
        classes=card.classes,
        image_path=card.image_path.as_dict(),
        channels=card.input.channels,
        metrics=card.metrics,
        limit=model.domain.limit if model.domain else 0.0,
        index=index,
        body_bytes=config.max_body_mb * 2**20,
        timeout_s=config.timeout_s,
        several=card.activation == "sigmoid",
    )


def _prepare_environment() -> None:
    """What Ray's processes inherit; the user's own values win.

    OpenMP threads that spin for long after their work would take the cores from the process that reads requests; ones
    that sleep at once are woken at every layer, which made a call three times as long. So they spin for well under a
    millisecond.
    """
    defaults = {
        "GOMP_SPINCOUNT": "200000",
        "KMP_BLOCKTIME": "1",
        # an image's pixels are to travel with the call, not by the object store
        "RAY_max_direct_call_object_size": str(2**20),
        "RAY_worker_niceness": "0",
        "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1000",
        "RAY_SERVE_LOG_TO_STDERR": "0",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def _start_serve() -> None:
    """Serve is up, without an HTTP proxy of its own.

    Raises:
        ResourceError: the cluster runs such a service already.
    """
    from ray import serve as ray_serve
    from ray.serve.schema import LoggingConfig

    ray_serve.start(proxy_location="Disabled", logging_config=LoggingConfig(log_level="WARNING"))
    if APPLICATION in ray_serve.status().applications:
        raise ResourceError("this Ray cluster runs a `rayograph serve` already; stop that one, or serve elsewhere")


def _this_node() -> str:
    """The resource that only this machine has: the ingress listens where it was asked to."""
    import ray

    mine = ray.get_runtime_context().get_node_id()
    return next(f"node:{node['NodeManagerAddress']}" for node in ray.nodes() if node["NodeID"] == mine)


def _start(config: ServeConfig, service: Any, listen: Any, found: Resources) -> Running:
    from ray import serve as ray_serve

    from serving.deployments import Classifier, Encoder, Ingress, Neighbours
    from training.device import device_in

    device = device_in(config.device, found)
    run = located_model(config.model)
    gpu = 1 if device == "cuda" else 0
    if gpu and found.gpus < config.replicas:
        raise ResourceError(f"--replicas {config.replicas}: {found.gpus} GPUs are here; ask for at most that many")
    shared: dict[str, Any] = {
        "max_queued_requests": config.max_queue,
        "graceful_shutdown_timeout_s": 2,
        "health_check_period_s": 5,
    }
    small: dict[str, Any] = {
        **shared,
        "max_ongoing_requests": 2 * config.max_queue,
        "ray_actor_options": {"num_cpus": 0},
    }
    classifier = ray_serve.deployment(**small)(Classifier).bind(run)
    encoder = ray_serve.deployment(
        **shared,
        num_replicas=config.replicas,
        max_ongoing_requests=4 * config.batch_size,
        ray_actor_options={"num_cpus": 0.1, "num_gpus": gpu},
    )(Encoder).bind(run, device, max(1, cores() // config.replicas), config.batch_size, classifier)
    index = ray_serve.deployment(**small)(Neighbours).bind(storage.located(config.index)) if config.index else None
    here: dict[str, Any] = {**small, "ray_actor_options": {"num_cpus": 0, "resources": {_this_node(): 0.001}}}
    ingress = ray_serve.deployment(**here)(Ingress).bind(service, listen, encoder, index)
    handle = ray_serve.run(ingress, name=APPLICATION, route_prefix=None, logging_config=None)
    host, port = handle.address.remote().result(timeout_s=60)
    shown = f"[{host}]" if ":" in host else host
    return Running(f"http://{shown}:{port}")


def _still_there() -> None:
    """Raises ResourceError where the application cannot come up again."""
    from ray import serve as ray_serve

    state = ray_serve.status().applications.get(APPLICATION)
    if state is None:
        raise ResourceError("the service is gone: somebody else ended it")
    if state.status == "DEPLOY_FAILED":
        raise ResourceError(f"the service cannot go on: {' '.join(state.message.split())[:300]}")


def _stop() -> None:
    """Nothing of ours is left; Serve itself ends too, unless others use it."""
    from ray import serve as ray_serve

    with suppress(Exception):
        if set(ray_serve.status().applications) <= {APPLICATION}:
            ray_serve.shutdown()
        else:
            ray_serve.delete(APPLICATION)
