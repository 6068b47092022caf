"""Listing, reading and publishing, locally and behind a `pyarrow.fs` file system."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
from pyarrow.fs import LocalFileSystem, SubTreeFileSystem

from cluster import storage
from cluster.errors import RayographError, UsageError
from cluster.remote import RemoteStorage

ODD_NAMES = [b"plain.png", b"a b.png", b"100%.png", b"%41.png", "é.png".encode(), b"latin-\xe9.png", b"sub/x#y?.png"]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def odd_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    for name in ODD_NAMES:
        Path(os.fsdecode(os.fsencode(folder) + b"/" + name)).write_bytes(name)
    return folder


def remote_of(folder: Path) -> RemoteStorage:
    """An object store's double: `folder` is its one bucket, called by its own name as S3 does."""
    files = SubTreeFileSystem(str(folder.parent), LocalFileSystem())
    return RemoteStorage(files, "s3://bucket", folder.name, "?region=x")


def test_a_local_listing_holds_every_name_in_byte_order_and_each_can_be_read(odd_folder: Path) -> None:
    found = storage.list_files(str(odd_folder))
    names = [os.fsencode(path)[len(os.fsencode(odd_folder)) + 1 :] for path in found]
    assert names == sorted(ODD_NAMES)
    assert [storage.read_bytes(path) for path in found] == names


def test_a_flat_listing_leaves_sub_folders_out(odd_folder: Path) -> None:
    assert len(storage.list_files(odd_folder, recursive=False)) == len(ODD_NAMES) - 1


def test_a_file_lists_as_itself(odd_folder: Path) -> None:
    assert storage.list_files(odd_folder / "plain.png") == [str(odd_folder / "plain.png")]


def test_a_file_uri_is_local_and_is_decoded(odd_folder: Path) -> None:
    uri = f"file://{odd_folder}/a%20b.png"
    assert storage.is_local(uri)
    assert storage.read_bytes(uri) == b"a b.png"


@pytest.mark.parametrize("uri", ["s3://bucket/key", "gs://bucket", "abfs://box@account/x"])
def test_object_stores_are_not_local(uri: str) -> None:
    assert not storage.is_local(uri)


@pytest.mark.parametrize("uri", ["phantom:600", "medmnist:bloodmnist", "some/folder", "c:file"])
def test_names_without_a_scheme_and_slashes_are_local(uri: str) -> None:
    assert storage.is_local(uri)


def test_a_missing_folder_is_a_usage_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="gone: no such file or folder"):
        storage.list_files(tmp_path / "gone")
    with pytest.raises(UsageError, match="gone: no such file or folder"):
        storage.filesystem(tmp_path / "gone")


def test_an_unknown_scheme_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="nowhere://a: cannot be opened"):
        storage.filesystem("nowhere://a/b")


def test_a_remote_listing_gives_uris_that_can_be_read_back(odd_folder: Path) -> None:
    Path(os.fsdecode(os.fsencode(odd_folder) + b"/latin-\xe9.png")).unlink()
    remote = remote_of(odd_folder)
    found = remote.list_files("s3://bucket/?region=x")
    expected = sorted(name for name in ODD_NAMES if b"latin" not in name)
    assert sorted(remote.read_bytes(uri) for uri in found) == expected
    assert all(uri.startswith("s3://bucket/") and uri.endswith("?region=x") for uri in found)


def test_a_remote_folder_is_published_manifest_last(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "shards").mkdir(parents=True)
    for name in (storage.MANIFEST, "a.txt", "shards/z.txt"):
        (source / name).write_text(name)
    (tmp_path / "store").mkdir()
    uploaded = []

    class Watched(RemoteStorage):
        def _upload(self, source: Path, path: str) -> None:
            uploaded.append(path)
            super()._upload(source, path)

    files = SubTreeFileSystem(str(tmp_path), LocalFileSystem())
    Watched(files, "s3://bucket", "store").publish_folder(source, "s3://bucket/result", storage.MANIFEST)
    assert uploaded == [f"store/result/{name}" for name in ("shards/z.txt", "a.txt", "summary.json")]
    assert (tmp_path / "store/result/shards/z.txt").read_text() == "shards/z.txt"
    assert not source.exists()


def test_a_published_file_replaces_the_old_one_and_leaves_no_temporary(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("old")
    storage.write_text(tmp_path / "a.json", "new")
    assert (tmp_path / "a.json").read_text() == "new"
    assert names(tmp_path) == ["a.json"]


def test_a_published_folder_replaces_a_full_one_and_leaves_nothing_else(tmp_path: Path) -> None:
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.txt").touch()
    storage.publish_folder(tmp_path / "new", tmp_path / "old")
    assert names(tmp_path) == ["old"]
    assert names(tmp_path / "old") == ["new.txt"]


def test_a_folder_that_cannot_be_published_leaves_the_old_one_in_place(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "old.txt").touch()
    with pytest.raises(RayographError):
        storage.publish_folder(tmp_path / "missing", tmp_path / "old")
    assert names(tmp_path) == ["old"]
    assert names(tmp_path / "old") == ["old.txt"]


def test_a_failed_write_leaves_no_temporary_and_names_the_target(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(RayographError, match="taken: "):
        storage.write_text(tmp_path / "taken", "text")
    assert names(tmp_path) == ["taken"]


@pytest.mark.parametrize(
    ("number", "words"), [(errno.ENOSPC, "disk is full"), (errno.EACCES, "permission denied"), (errno.EIO, "error")]
)
def test_an_operating_system_error_becomes_one_line_with_the_path(number: int, words: str) -> None:
    with pytest.raises(RayographError) as caught, storage.explained("some/path"):
        raise OSError(number, os.strerror(number))
    assert str(caught.value).startswith("some/path: ")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_real_full_device_is_reported_as_full() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("not on this system: no /dev/full")
    with pytest.raises(RayographError, match=r"/dev/full: the disk is full"), storage.explained("/dev/full"):
        Path("/dev/full").write_bytes(b"x")


def test_json_is_strict_and_takes_numpy_numbers_and_paths(tmp_path: Path) -> None:
    values = {"n": np.int64(3), "x": np.float32(0.5), "bad": float("nan"), "p": tmp_path, "t": (1, 2), "b": True}
    storage.write_json(tmp_path / "a.json", values)
    expected = {"n": 3, "x": 0.5, "bad": None, "p": str(tmp_path), "t": [1, 2], "b": True}
    assert json.loads((tmp_path / "a.json").read_text()) == expected
    assert storage.read_json(tmp_path / "a.json") == expected


def test_cut_off_json_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"a": [1, 2')
    with pytest.raises(RayographError, match=r"a\.json: not valid JSON"):
        storage.read_json(tmp_path / "a.json")


def test_the_sha256_of_a_file_is_that_of_its_bytes(tmp_path: Path) -> None:
    content = bytes(range(256)) * 5000
    (tmp_path / "a.bin").write_bytes(content)
    assert storage.sha256_file(tmp_path / "a.bin") == hashlib.sha256(content).hexdigest()


def test_removing_a_link_leaves_what_it_points_to(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "kept")
    storage.remove(tmp_path / "link")
    storage.remove(tmp_path / "absent")
    assert names(tmp_path) == ["kept"]


def test_odd_names_print_on_one_line_of_valid_text() -> None:
    text = storage.printable(os.fsdecode(b"a\n\xff.png"))
    assert text.encode("utf-8").isascii()
    assert "\n" not in text
