"""Object stores: what is published appears whole, errors are one line, and credentials stay out of URIs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from cluster import remote, storage
from cluster.errors import RayographError, UsageError
from tests.s3 import Store

ROOT = Path(__file__).parents[2]
PUBLISHER = """
import sys
from pathlib import Path
from cluster import storage
storage.publish_folder(Path(sys.argv[1]), sys.argv[2])
"""


@pytest.fixture
def result(tmp_path: Path) -> Path:
    """A finished folder."""
    return make_result(tmp_path / "result", "first")


def make_result(folder: Path, text: str) -> Path:
    for number in range(6):
        file = folder / f"shards/part-{number}"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text * 1000)
    (folder / "model.json").write_text("{}")
    (folder / "empty").touch()
    (folder / storage.MANIFEST).write_text(text)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def stored(uri: str) -> dict[str, bytes]:
    return {name.removeprefix(f"{uri}/"): storage.read_bytes(name) for name in storage.list_files(uri)}


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer attempts, for what fails for good."""
    monkeypatch.setattr(remote, "ATTEMPTS", 2)
    remote._opened.cache_clear()


# Files and folders


def test_a_file_is_written_read_listed_and_removed(s3: Store) -> None:
    uri = storage.join(s3.bucket, "a b", "100%.json")
    storage.write_json(uri, {"x": 1})
    assert storage.read_json(uri) == {"x": 1}
    assert storage.exists(uri)
    assert storage.exists(f"{s3.bucket}/a b")
    assert storage.list_names(f"{s3.bucket}/a%20b") == ["100%.json"]
    assert storage.list_files(s3.bucket) == [uri]
    storage.remove(uri)
    assert not storage.exists(uri)
    assert storage.list_names(f"{s3.bucket}/nothing") == []


def test_a_small_file_is_one_request_and_so_there_at_once(s3: Store) -> None:
    storage.write_bytes(f"{s3.bucket}/x", b"x" * 100_000)
    assert [method for method, _, _ in s3.seen] == ["PUT"]


def test_names_are_joined_and_parted_as_paths_are_whatever_the_query() -> None:
    uri = "s3://bucket/a/?region=x"
    assert storage.join(uri, "b c", "d") == "s3://bucket/a/b%20c/d?region=x"
    assert storage.sibling(uri, "e") == "s3://bucket/e?region=x"
    assert storage.name_of(uri) == "a"
    assert storage.located(uri) == uri


def test_a_whole_bucket_has_nothing_beside_it() -> None:
    with pytest.raises(UsageError, match="name a folder in it"):
        storage.sibling("s3://bucket/?region=x", "x")


def test_a_folder_goes_up_and_comes_down_as_it_was(s3: Store, result: Path, tmp_path: Path) -> None:
    before = contents(result)
    uri = f"{s3.bucket}/kept"
    storage.upload(result, uri)
    assert stored(uri) == before == contents(result)
    storage.fetch(uri, tmp_path / "down" / "copy")
    assert contents(tmp_path / "down" / "copy") == before
    storage.fetch(uri, tmp_path / "down" / "part", skip=["shards"])
    assert set(contents(tmp_path / "down" / "part")) == {name for name in before if "/" not in name}


def test_local_folders_are_copied_by_the_same_functions(result: Path, tmp_path: Path) -> None:
    before = contents(result)
    storage.upload(result, tmp_path / "up")
    storage.fetch(f"file://{tmp_path}/up", tmp_path / "down", skip=["shards"])
    assert contents(tmp_path / "up") == before
    assert set(contents(tmp_path / "down")) == {name for name in before if "/" not in name}
    assert sorted(os.listdir(tmp_path)) == ["down", "result", "up"]  # noqa: PTH208


def test_a_fetch_that_fails_leaves_nothing(s3: Store, result: Path, tmp_path: Path, impatient: None) -> None:
    storage.upload(result, f"{s3.bucket}/kept")
    refuse = s3.refusing(lambda method, path: 403 if method == "GET" and path.endswith("part-3") else 0)
    with refuse, pytest.raises(RayographError, match="access refused"):
        storage.fetch(f"{s3.bucket}/kept", tmp_path / "down" / "copy")
    assert list((tmp_path / "down").iterdir()) == []


def test_a_key_that_leads_out_of_its_folder_is_not_fetched(tmp_path: Path) -> None:
    with pytest.raises(RayographError, match="leads out"):
        remote._inside(tmp_path, "a/../../b")


def test_a_large_file_survives_the_way(s3: Store, tmp_path: Path) -> None:
    content = os.urandom(40_000_000)
    (tmp_path / "large").write_bytes(content)
    storage.publish_file(tmp_path / "large", f"{s3.bucket}/large")
    assert not (tmp_path / "large").exists()
    storage.fetch(f"{s3.bucket}/large", tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == content


# Whole or not at all


def test_what_names_others_is_uploaded_after_them(tmp_path: Path) -> None:
    root = tmp_path
    names = ["CURRENT", "summary.json", "model/model.json", "model/w", "snapshots/1/manifest.json", "snapshots/1/rows"]
    order = [
        [str(file.relative_to(root)) for file in group]
        for group in remote.in_order(map(root.joinpath, names), root, "summary.json")
    ]
    assert order == [
        ["snapshots/1/rows"],
        ["snapshots/1/manifest.json"],
        ["model/w"],
        ["model/model.json"],
        ["CURRENT"],
        ["summary.json"],
    ]


def test_who_looks_during_a_publication_never_sees_a_manifest_without_its_files(s3: Store, tmp_path: Path) -> None:
    uri, seen = f"{s3.bucket}/run", []

    def look(method: str, path: str) -> int:
        seen.append({name.removeprefix("run/"): content for name, content in s3.keys().items() if name != "run/"})
        return 0

    with s3.refusing(look):  # before every single request
        for text in ("first", "again"):
            storage.publish_folder(make_result(tmp_path / text, text), uri)
        storage.remove(uri)
    whole = [state for state in seen if storage.MANIFEST in state]
    parts = [state for state in seen if state and storage.MANIFEST not in state]
    assert whole
    assert parts
    for state in whole:
        assert len(state) == 9
        assert all(state[f"shards/part-{number}"] == 1000 * state[storage.MANIFEST] for number in range(6))
    assert not storage.exists(uri)


def test_a_publisher_that_is_killed_midway_leaves_no_manifest(s3: Store, result: Path) -> None:
    uri, arrived = f"{s3.bucket}/run", threading.Event()

    def hold(method: str, path: str) -> int:
        if method == "PUT" and path.endswith("model.json"):
            arrived.set()
            time.sleep(0.5)
        return 0

    with s3.refusing(hold):
        process = subprocess.Popen([sys.executable, "-c", PUBLISHER, str(result), uri], cwd=ROOT)
        assert arrived.wait(60)
        process.send_signal(signal.SIGKILL)
        process.wait()
        time.sleep(0.6)
    left = storage.list_names(uri)
    assert "shards" in left
    assert storage.MANIFEST not in left
    storage.publish_folder(result, uri)  # the same again
    assert storage.MANIFEST in storage.list_names(uri)


# What goes wrong


def one_line(caught: pytest.ExceptionInfo[RayographError]) -> str:
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 400
    return text


def test_a_store_that_asks_for_patience_gets_it(s3: Store) -> None:
    asked: list[str] = []

    def refuse(method: str, path: str) -> int:
        asked.append(method)
        return 503 if len(asked) <= 2 else 0

    with s3.refusing(refuse):
        storage.write_text(f"{s3.bucket}/x", "text")
    assert asked == ["PUT"] * 3
    asked.clear()
    with s3.refusing(refuse):
        assert storage.read_bytes(f"{s3.bucket}/x") == b"text"


@pytest.mark.parametrize("status", [500, 503])
def test_a_store_that_keeps_failing_is_given_up(s3: Store, status: int, impatient: None) -> None:
    began = time.monotonic()
    with s3.refusing(lambda *_: status), pytest.raises(RayographError) as caught:
        storage.write_text(f"{s3.bucket}/x", "text")
    assert "the store kept failing; run the same command again later" in one_line(caught)
    assert time.monotonic() - began < 20


@pytest.mark.parametrize("act", [storage.read_bytes, storage.list_files, lambda uri: storage.write_text(uri, "text")])
def test_wrong_credentials_are_named(s3: Store, act: object, monkeypatch: pytest.MonkeyPatch) -> None:
    assert callable(act)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAWRONG")
    with pytest.raises(RayographError) as caught:
        act(f"{s3.bucket}/x")
    assert "access refused with the credentials that are set; check AWS_ACCESS_KEY_ID" in one_line(caught)


def test_missing_credentials_are_asked_for(s3: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(RayographError) as caught:
        storage.read_bytes(f"{s3.bucket}/x")
    assert "no credentials are set; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in one_line(caught)


@pytest.mark.parametrize("act", [storage.list_names, storage.exists, lambda uri: storage.write_text(uri, "text")])
def test_a_missing_bucket_is_called_so(s3: Store, act: object) -> None:
    assert callable(act)
    with pytest.raises(UsageError) as caught:
        act("s3://there-is-none/x")
    assert "no such bucket; create it, or mend the name" in one_line(caught)


def test_a_missing_file_is_called_so(s3: Store) -> None:
    for act in (storage.read_bytes, storage.list_files, storage.filesystem):
        with pytest.raises(UsageError, match="no such file or folder"):
            act(f"{s3.bucket}/none")


def test_a_server_that_is_not_there_is_given_up_in_time(
    s3: Store, impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    began = time.monotonic()
    with pytest.raises(RayographError) as caught:
        storage.read_bytes(f"{s3.bucket}/x")
    assert "cannot be reached; check the network, and AWS_ENDPOINT_URL" in one_line(caught)
    assert time.monotonic() - began < 20


def test_an_unknown_scheme_and_an_unknown_option_are_refused(s3: Store) -> None:
    with pytest.raises(UsageError, match="nowhere://a: cannot be opened"):
        storage.read_bytes("nowhere://a/b")
    with pytest.raises(UsageError, match="no option 'colour'; there are endpoint_override, region, scheme"):
        storage.read_bytes("s3://a/b?colour=red")
    with pytest.raises(UsageError, match="names no bucket"):
        storage.read_bytes("s3:///x")


@pytest.mark.parametrize(
    "uri",
    [
        "s3://AKIA:SECRET@bucket/x",
        "s3://AKIA:SE/CRET@bucket/x",
        "s3://bucket/x?access_key=AKIA&secret_key=SECRET",
        "gs://user:SECRET@bucket/x",
        "abfs://box@account/x?account_key=SECRET",
    ],
)
def test_credentials_in_a_uri_are_refused_and_not_repeated(uri: str) -> None:
    with pytest.raises(UsageError) as caught:
        storage.read_bytes(uri)
    text = one_line(caught)
    assert "credentials in a URI would be kept in config.yaml" in text
    assert "CRET" not in text.replace("SECRET_ACCESS_KEY", "")


# Where a store is


def test_the_place_of_the_server_may_stand_in_the_uri(s3: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.write_text(f"{s3.bucket}/x", "text")
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    host = s3.endpoint.removeprefix("http://")
    uri = f"{s3.bucket}/x?endpoint_override={host}&scheme=http"
    assert storage.read_bytes(uri) == b"text"
    assert storage.list_files(f"{s3.bucket}?endpoint_override={host}&scheme=http") == [uri]


def test_the_variable_of_the_service_wins_over_the_general_one(s3: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", s3.endpoint)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    storage.write_text(f"{s3.bucket}/x", "text")
    assert storage.read_bytes(f"{s3.bucket}/x") == b"text"


def test_a_region_that_cannot_be_looked_up_does_not_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(remote, "REGION_S", 0.05)
    monkeypatch.setattr("pyarrow.fs.resolve_s3_region", lambda bucket: time.sleep(1))
    began = time.monotonic()
    with pytest.raises(UsageError) as caught:
        storage.read_bytes("s3://somewhere-on-earth/x")
    assert "set AWS_REGION, or AWS_ENDPOINT_URL" in one_line(caught)
    assert time.monotonic() - began < 0.9


def test_google_s_store_is_known_and_asks_for_its_key_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from pyarrow.fs import GcsFileSystem

    monkeypatch.setattr(remote, "PATIENCE_S", 1)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)
    monkeypatch.setenv("GCE_METADATA_HOST", "127.0.0.1:9")
    remote._opened.cache_clear()
    store = remote.at("gs://bucket/folder/x")
    assert isinstance(store.files, GcsFileSystem)
    assert store.path("gs://bucket/folder/x") == "bucket/folder/x"
    with pytest.raises(RayographError) as caught:
        storage.read_bytes("gs://bucket/folder/x")
    assert "no credentials are set; set GOOGLE_APPLICATION_CREDENTIALS" in one_line(caught)
    remote._opened.cache_clear()
