"""`rayograph serve` as a whole: what it answers, what it bears, and how it comes back when a part of it is killed."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from cluster.errors import UsageError
from serving import index
from serving.configs import IndexBuildConfig, IndexSearchConfig, ServeConfig
from serving.serve import served
from tests.hostile import encoded, picture
from tests.runs import ROOT, START_S, Process, rayograph, wait_until
from tests.test_transfer_chain import config as transfer_config
from training.artifact import card_sha256, read_card
from training.configs import InferenceConfig
from training.dataset import Dataset
from training.gallery import gallery
from training.inference import predict
from training.transfer import transfer

pytestmark = [pytest.mark.ray, pytest.mark.slow]

BODY_MB, TIMEOUT_S = 4, 8
GROWTH = 200 * 1024**2
"""Bytes by which hostile requests may make the process grow that reads them."""


@dataclass(frozen=True)
class Parts:
    """A model, an index under it, and some of its images as files."""

    model: Path
    index: Path
    images: Path


@dataclass(frozen=True)
class Running:
    """A `rayograph serve` process."""

    process: Process
    port: int

    def post(self, path: str, content: bytes, **headers: str) -> Any:
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data=content, headers=headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def ready(self) -> bool:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{self.port}/readyz", timeout=5):
            return True
        return False

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=30)

    def pid_of(self, part: str) -> int | None:
        """The process of a deployment's replica."""
        for pid in self.process.family():
            with contextlib.suppress(OSError):
                if f"ServeReplica:rayograph:{part}".encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                    return pid
        return None


@pytest.fixture(scope="module")
def parts(phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Parts:
    folder = tmp_path_factory.mktemp("serve")
    model, built, images = folder / "run", folder / "index", folder / "images"
    transfer(transfer_config(phantoms, model, init="none", model="test_vit", image_size="32", task="linear"))
    index.build(IndexBuildConfig(model=str(model), data=str(phantoms), out=str(built)), gallery=gallery)
    dataset = Dataset.open(phantoms)
    images.mkdir()
    for at, pixels in enumerate(dataset.pixels(dataset.select().take(range(0, 200, 33)))):
        (images / f"{at}.png").write_bytes(encoded(pixels[..., 0] if pixels.shape[-1] == 1 else pixels, "PNG"))
    return Parts(model, built, images)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextlib.contextmanager
def serving(parts: Parts, *more: str) -> Iterator[Running]:
    port = free_port()
    command = ["serve", "--model", str(parts.model), "--index", str(parts.index), "--port", str(port)]
    with rayograph(*command, "--max-body-mb", str(BODY_MB), "--timeout-s", str(TIMEOUT_S), *more) as process:
        running = Running(process, port)
        process.until(running.ready, "the service answers")
        yield running


@pytest.fixture(scope="module")
def running(parts: Parts) -> Iterator[Running]:
    with serving(parts) as found:
        yield found


# What it answers


def test_classes_over_http_are_those_of_predict(running: Running, parts: Parts, tmp_path: Path) -> None:
    predict(InferenceConfig(str(parts.images), model=str(parts.model), out=str(tmp_path / "out.parquet")))
    classes = read_card(parts.model)[0].classes
    for row in pq.read_table(tmp_path / "out.parquet").to_pylist():
        answer = running.post("/v1/classify", (parts.images / row["path"]).read_bytes())
        found = {c["label"]: c["probability"] for c in answer["classes"]}
        assert found == pytest.approx({name: row[name] for name in classes}, abs=1e-5)
        assert answer["classes"][0]["label"] == row["label"]
        assert answer["model"]["card_sha256"] == card_sha256(parts.model)


def test_hits_over_http_are_those_of_index_search(running: Running, parts: Parts) -> None:
    for image in sorted(parts.images.iterdir())[:3]:
        found = running.post("/v1/search?k=7&labelled=true", image.read_bytes())
        wanted = index.search(IndexSearchConfig(str(image), index=str(parts.index), k=7, labelled=True))["hits"]
        assert [hit["score"] for hit in found["hits"]] == pytest.approx([hit["score"] for hit in wanted], abs=1e-5)
        assert {hit["id"] for hit in found["hits"]} == {hit["id"] for hit in wanted}
        assert all(hit["thumbnail"].startswith("data:image/jpeg;base64,/9j/") for hit in found["hits"])
        assert found["index"]["vectors"] == 200
    group = found["hits"][0]["group"]
    others = running.post(f"/v1/search?k=1000&not_group={group}", image.read_bytes())["hits"]
    assert others and group not in {hit["group"] for hit in others}


def test_an_image_unlike_the_training_set_is_said_to_be(running: Running, parts: Parts) -> None:
    known = running.post("/v1/classify", (parts.images / "0.png").read_bytes())["in_domain"]
    assert known["answer"] is True and known["typicality"] > known["limit"] == 0.01
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    unlike = running.post("/v1/classify", encoded(noise, "PNG"))["in_domain"]
    assert unlike["answer"] is False, unlike
    assert unlike["typicality"] < 0.01


# How it is put together


def test_only_this_machine_can_reach_it(running: Running) -> None:
    assert listening(running.port) == {"0100007F"}


def listening(port: int) -> set[str]:
    """The local addresses, in the kernel's hexadecimal form, on which something listens at `port`."""
    lines = [
        line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]
    ]
    pairs = [line[1].split(":") for line in lines if line[3] == "0A"]
    return {address for address, number in pairs if int(number, 16) == port}


def test_torch_and_faiss_are_in_no_process_together_and_neither_reads_requests(running: Running) -> None:
    loaded = {}
    for part in ("Encoder", "Classifier", "Neighbours", "Ingress"):
        maps = Path(f"/proc/{running.pid_of(part)}/maps").read_text()
        loaded[part] = {name for name in ("libtorch", "faiss") if name in maps}
    assert loaded == {"Encoder": {"libtorch"}, "Classifier": {"libtorch"}, "Neighbours": {"faiss"}, "Ingress": set()}


# What it bears


def memory(pid: int | None) -> tuple[int, int]:
    """(bytes in memory now, most ever)."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    found = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith(("VmRSS", "VmHWM"))}
    return found["VmRSS"], found["VmHWM"]


def sent(link: socket.socket, piece: bytes, most: int) -> int:
    """Bytes that the server took before it hung up."""
    total = 0
    with contextlib.suppress(OSError):
        while total < most:
            link.sendall(piece)
            total += len(piece)
    return total


def status(link: socket.socket) -> int:
    """The status of the answer; 0 where the connection was cut."""
    with contextlib.suppress(OSError):
        line = link.makefile("rb").readline(1000)
        return int(line.split()[1]) if line else 0
    return 0


HEAD = b"POST /v1/classify HTTP/1.1\r\nHost: x\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"


def test_hostile_requests_cost_little_and_stop_nobody(running: Running, parts: Parts) -> None:
    image = (parts.images / "0.png").read_bytes()
    wanted = running.post("/v1/classify", image)
    ingress = running.pid_of("Ingress")
    before, _ = memory(ingress)

    with running.connect() as link:  # declared and never sent
        link.sendall(HEAD + b"Content-Length: 1000000000\r\n\r\n")
        assert status(link) == 413
    with running.connect() as link:  # endless
        link.sendall(CHUNKED)
        assert sent(link, b"10000\r\n" + b"x" * 0x10000 + b"\r\n", 1 << 28) < 32 << 20
        assert status(link) in {413, 0}
    with running.connect() as link:  # an endless head
        link.sendall(HEAD)
        assert sent(link, b"X: " + b"a" * 65_000 + b"\r\n", 1 << 28) < 16 << 20
        assert status(link) in {400, 0}
    with running.connect() as link:  # an endless end
        link.sendall(CHUNKED + b"1\r\nx\r\n0\r\n")
        assert sent(link, b"X: " + b"a" * 65_000 + b"\r\n", 1 << 28) < 16 << 20
        assert status(link) in {400, 0}
    with running.connect() as link:
        link.sendall(CHUNKED + b"6\r\nsixby\n\r\n" * 100_000 + b"0\r\n\r\n")
        assert status(link) == 400
    for nonsense in (b"\x16\x03\x01\x02\x00", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"GET\r\n\r\n", b"\0" * 4096):
        with running.connect() as link:
            link.sendall(nonsense)
            assert status(link) in {400, 0}
    with running.connect() as link:
        upgrade = (
            b"Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: eA==\r\n"
        )
        link.sendall(b"GET /v1/classify HTTP/1.1\r\nHost: x\r\n" + upgrade + b"\r\n")
        assert status(link) in {400, 405, 403}
    for content in (b"\x80\x04pickle", b"PK\x03\x04", b"http://127.0.0.1/x.png", b"x" * (BODY_MB << 20)):
        with pytest.raises(urllib.error.HTTPError) as caught:
            running.post("/v1/classify", content)
        assert caught.value.code == 400
    for _ in range(30):  # gone in the middle
        with running.connect() as link:
            link.sendall(HEAD + b"Content-Length: 1000000\r\n\r\n" + b"x" * 500_000)

    now, most = memory(ingress)
    assert max(now, most) - before < GROWTH, (before, now, most)
    assert running.pid_of("Ingress") == ingress
    assert running.post("/v1/classify", image) == wanted


def test_200_slow_clients_do_not_keep_others_waiting_and_are_ended(running: Running, parts: Parts) -> None:
    image = encoded(picture(seed=9), "PNG")
    ingress = running.pid_of("Ingress")
    before, _ = memory(ingress)
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(running.connect()) for _ in range(200)]
        for at, link in enumerate(slow):
            link.sendall(HEAD + (b"Content-Length: 100000\r\n\r\nx" if at % 2 else b"X-Slow: y"))
        began = time.monotonic()
        for at in range(5):
            assert running.post("/v1/classify", image + bytes([at]))["classes"]
        assert time.monotonic() - began < TIMEOUT_S
        assert {status(link) for link in slow[1::2]} <= {408}
        assert {status(link) for link in slow[::2]} <= {408, 0}
    assert memory(ingress)[0] - before < GROWTH


def test_clients_that_leave_while_they_are_answered_spoil_nothing_for_the_next(running: Running, parts: Parts) -> None:
    image = (parts.images / "1.png").read_bytes()
    for wave in range(3):
        for at in range(40):
            body = image + bytes([wave, at])  # all differ: none is answered from what is kept
            with running.connect() as link:
                link.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        together = [running.connect() for _ in range(20)]
        for at, link in enumerate(together):
            body = image + bytes([wave, 100 + at])
            link.sendall(HEAD + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        assert [status(link) for link in together] == [200] * 20
        for link in together:
            link.close()


# Killed


def under_load(running: Running, parts: Parts, victim: str, seconds: float) -> dict[str, Any]:
    """What eight clients that try again saw while the process of that part was killed."""
    url = f"http://127.0.0.1:{running.port}/v1/classify"
    command = [sys.executable, "-m", "tests.benchmarks.load", url, str(parts.images / "0.png"), "8", str(seconds)]
    load = subprocess.Popen([*command, "--retry"], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    start = time.monotonic()
    wait_until(lambda: time.monotonic() > start + 6, 60, "the clients are at work")
    pid = running.pid_of(victim)
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    found: dict[str, Any] = json.loads(load.communicate(timeout=seconds + 120)[0])
    wait_until(lambda: running.pid_of(victim) not in {None, pid} and running.ready(), START_S, f"{victim} is back")
    return found


def test_a_killed_encoder_loses_no_request_of_clients_that_try_again(running: Running, parts: Parts) -> None:
    found = under_load(running, parts, "Encoder", 14)
    assert found["lost"] == 0, found
    assert found["failed"] <= 2 * 8, found
    assert found["requests"] > 8, found


def test_a_killed_ingress_loses_no_request_of_clients_that_try_again(running: Running, parts: Parts) -> None:
    found = under_load(running, parts, "Ingress", 14)
    assert found["lost"] == 0, found
    assert found["slowest_recovery_s"] < 15, found


# Keys, and the end


def test_beyond_loopback_a_key_is_needed_and_ctrl_c_ends_every_process(parts: Parts, tmp_path: Path) -> None:
    key = "0123456789abcdef-key"
    keys = tmp_path / "keys"
    keys.write_text(f"# of the clinic\n{key}\n")
    keys.chmod(0o600)
    image = (parts.images / "0.png").read_bytes()
    with serving(parts, "--host", "0.0.0.0", "--api-keys", str(keys)) as running:
        for headers in ({}, {"Authorization": "Bearer wrong"}):
            with pytest.raises(urllib.error.HTTPError) as caught:
                running.post("/v1/classify", image, **headers)
            assert caught.value.code == 401
        assert running.post("/v1/classify", image, Authorization=f"Bearer {key}")["classes"]
        with urllib.request.urlopen(f"http://127.0.0.1:{running.port}/openapi.json", timeout=30) as answer:
            assert json.load(answer)["paths"]["/v1/classify"]["post"]["security"] == [{"HTTPBearer": []}]
        assert key not in running.process.said()
        began = time.monotonic()
        running.process.signal(signal.SIGINT)
        assert running.process.wait(60) == 130
        wait_until(lambda: not running.process.family(), 30, "every process has ended")
        assert time.monotonic() - began < 20
        assert running.process.said().strip().splitlines()[-1] == "rayograph: stopped"


# What is refused before anything starts


def refused(match: str, parts: Parts, **changes: Any) -> None:
    config = ServeConfig(**{"model": str(parts.model), "index": str(parts.index), "port": 0, **changes})
    with pytest.raises(UsageError, match=match) as caught, served(config):
        pass
    assert len(str(caught.value).splitlines()) <= 2


def test_what_cannot_be_served_is_refused_in_a_line(parts: Parts, tmp_path: Path) -> None:
    refused("give --api-keys FILE", parts, host="0.0.0.0")
    refused("give --api-keys FILE", parts, host="")
    keys = tmp_path / "keys"
    refused("no such file", parts, api_keys=str(keys))
    for text, match in (("\n# none\n", "holds no key"), ("short\n", "shorter than 16"), ("a" * 16, "chmod 600")):
        keys.write_text(text)
        keys.chmod(0o644)
        refused(match, parts, api_keys=str(keys))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        refused("cannot listen there", parts, port=taken.getsockname()[1])
    refused("cannot listen there", parts, host="203.0.113.7", api_keys=str(good_keys(keys)))
    refused("not a RUN", parts, model=str(tmp_path))
    refused("not an INDEX", parts, index=str(tmp_path))


def good_keys(file: Path) -> Path:
    file.write_text("a" * 32)
    file.chmod(0o600)
    return file


def test_an_index_of_another_model_is_refused(parts: Parts, tmp_path: Path) -> None:
    shutil.copytree(parts.index, tmp_path / "index")
    manifest = next((tmp_path / "index" / "snapshots").glob("*/manifest.json"))
    values = json.loads(manifest.read_text())
    values["model"]["sha256"] = "ab" * 32
    manifest.write_text(json.dumps(values))
    refused("is not the model of this index", parts, index=str(tmp_path / "index"))
