"""INDEX on disk: whole or refused, whatever happened to its files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from safetensors.numpy import save_file

from cluster import storage
from cluster.errors import DataError, RayographError, UsageError
from serving import snapshot as snapshots
from tests.runs import ROOT
from tests.s3 import Store

MODEL = {"name": "run", "path": "/gone", "sha256": "ab" * 32}
MANIFEST: dict[str, Any] = {"model": MODEL, "kind": "flat", "vectors": 6}


def write_files(folder: Path, count: int = 6, seed: int = 0) -> list[Path]:
    """vectors.safetensors and rows.arrow of `count` images; every second has a label, every third is of group g."""
    folder.mkdir(parents=True, exist_ok=True)
    vectors = np.random.default_rng(seed).normal(size=(count, 4)).astype(np.float32)
    save_file({"vectors": vectors}, folder / snapshots.VECTORS)
    texts = {name: [f"{name}-{seed}-{i}" for i in range(count)] for name in ("image_id", "sha256", "case")}
    texts["label"] = ["" if i % 2 else "a/b" for i in range(count)]
    texts["group"] = ["g" if i % 3 == 0 else f"group-{i}" for i in range(count)]
    rows = pa.table(texts | {"thumbnail": pa.array([b"\xff\xd8"] * count, pa.binary())})
    with pa.OSFile(str(folder / snapshots.ROWS), "wb") as sink, pa.ipc.new_file(sink, rows.schema) as writer:
        writer.write_table(rows)
    return [folder / snapshots.VECTORS, folder / snapshots.ROWS]


@pytest.fixture
def index(tmp_path: Path) -> Path:
    """An INDEX with one snapshot."""
    snapshots.publish(tmp_path / "index", write_files(tmp_path / "one"), MANIFEST)
    return tmp_path / "index"


def test_what_was_published_is_read(index: Path) -> None:
    snapshot = snapshots.current(index)
    assert snapshot.name == "000001"
    assert snapshot.model_sha256 == MODEL["sha256"]
    assert snapshot.vectors.shape == (6, 4)
    assert snapshot.rows["image_id"].to_pylist() == [f"image_id-0-{i}" for i in range(6)]
    assert snapshot.labelled.tolist() == [True, False] * 3
    assert snapshot.group_of("sha256-0-3") == "g" and snapshot.group_of("other") is None
    assert (index / "CURRENT").read_text() == "000001\n"


def test_the_second_snapshot_takes_the_pointer_and_leaves_the_first(index: Path, tmp_path: Path) -> None:
    assert snapshots.publish(index, write_files(tmp_path / "two", seed=1), MANIFEST) == "000002"
    assert snapshots.current(index).rows["image_id"][0].as_py() == "image_id-1-0"
    assert snapshots.read(index / "snapshots" / "000001").rows["image_id"][0].as_py() == "image_id-0-0"


# Killed on the way

POINTS = {
    "while files are linked": "snapshots._link",
    "before the manifest is written": "storage.write_json",
    "before the folder is renamed": "storage.publish_folder",
    "before the pointer is swapped": "storage.write_text",
}


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("first", [True, False])
def test_killed_before_the_pointer_is_swapped_the_index_is_what_it_was(
    index: Path, tmp_path: Path, point: str, first: bool
) -> None:
    target = tmp_path / "empty" if first else index
    files = [str(p) for p in write_files(tmp_path / "two", seed=1)]
    code = (
        "import os, sys\nfrom pathlib import Path\n"
        "from cluster import storage\nfrom serving import snapshot as snapshots\n"
        f"{POINTS[point]} = lambda *a, **k: os._exit(9)\n"
        f"snapshots.publish(Path({str(target)!r}), [Path(p) for p in {files!r}], {MANIFEST!r})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False)
    assert done.returncode == 9
    if first:
        with pytest.raises(UsageError, match="not an INDEX"):
            snapshots.current(target)
    else:
        assert snapshots.current(index).rows["image_id"][0].as_py() == "image_id-0-0"
    name = snapshots.publish(target, map(Path, files), MANIFEST)
    assert snapshots.current(target).name == name
    assert snapshots.current(target).rows["image_id"][0].as_py() == "image_id-1-0"
    assert not list((target / "snapshots").glob(".*"))


# Damaged


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    replace(file, bytes(content))


def replace(file: Path, content: bytes) -> None:
    """Not written in place: the file is a link to what the gallery keeps."""
    file.unlink()
    file.write_bytes(content)


def swap(folder: Path) -> None:
    one, two = folder / snapshots.VECTORS, folder / snapshots.ROWS
    one.rename(folder / "x")
    two.rename(one)
    (folder / "x").rename(two)


def in_manifest(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        manifest = json.loads((folder / "manifest.json").read_text())
        (folder / "manifest.json").write_text(json.dumps(manifest | changes))

    return change


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a bit of the vectors": (lambda f: flip(f / snapshots.VECTORS), "vectors.safetensors: missing or changed"),
    "a bit of the rows": (lambda f: flip(f / snapshots.ROWS), "rows.arrow: missing or changed"),
    "cut-off rows": (lambda f: replace(f / snapshots.ROWS, b"ARROW1"), "rows.arrow: missing or changed"),
    "empty vectors": (lambda f: replace(f / snapshots.VECTORS, b""), "vectors.safetensors: missing or changed"),
    "swapped files": (swap, "missing or changed"),
    "a missing file": (lambda f: (f / snapshots.ROWS).unlink(), "rows.arrow: missing or changed"),
    "a missing manifest": (lambda f: (f / "manifest.json").unlink(), "missing or incomplete"),
    "a cut-off manifest": (lambda f: (f / "manifest.json").write_text('{"format": 1,'), "manifest.json: damaged"),
    "a manifest that is a list": (lambda f: (f / "manifest.json").write_text("[]"), "manifest.json: damaged"),
    "a manifest without hashes": (in_manifest(sha256=3), "manifest.json: damaged"),
    "a manifest of no files": (in_manifest(sha256={}), "names no vectors or rows"),
    "a manifest with an odd format": (in_manifest(format="one"), "manifest.json: damaged"),
    "a manifest of another count": (in_manifest(vectors=7), "disagree"),
    "a manifest without a model": (in_manifest(model=None), "damaged"),
    "a newer format": (in_manifest(format=2), "format 2 is newer than this Rayograph's; upgrade"),
    "a way out in the manifest": (in_manifest(sha256={"../../../etc/passwd": "00"}), "passwd: missing or changed"),
    "a missing snapshot": (lambda f: f.rename(f.with_name("aside")), "missing or incomplete"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_snapshot_is_one_clear_line(index: Path, name: str) -> None:
    damage, message = DAMAGE[name]
    damage(index / "snapshots" / "000001")
    with pytest.raises(RayographError, match=message) as caught:
        snapshots.current(index)
    assert len(str(caught.value).splitlines()) == 1
    assert isinstance(caught.value, DataError) or name == "a newer format"


@pytest.mark.parametrize("text", ["", "../one", "000001/../../x", "latest", "1", "\0", "0000011", "٠٠٠٠٠١"])
def test_a_damaged_pointer_is_not_followed(index: Path, text: str) -> None:
    (index / "CURRENT").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match="CURRENT: damaged; build the index again"):
        snapshots.current(index)


def test_what_is_no_index_is_said(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"not an INDEX .*rayograph index build"):
        snapshots.current(tmp_path)


def test_random_bit_flips_are_never_read(index: Path) -> None:
    """FAISS itself loads most of them without a word."""
    folder = index / "snapshots" / "000001"
    rng = np.random.default_rng(0)
    for name in (snapshots.VECTORS, snapshots.ROWS):
        good = (folder / name).read_bytes()
        for _ in range(20):
            bad = bytearray(good)
            bad[rng.integers(len(bad))] ^= 1 << int(rng.integers(8))
            replace(folder / name, bytes(bad))
            with pytest.raises(DataError, match="missing or changed"):
                snapshots.current(index)
        replace(folder / name, good)
    assert snapshots.current(index).name == "000001"


def test_another_model_is_refused_by_name(index: Path) -> None:
    snapshot = snapshots.current(index)
    snapshots.same_model(snapshot, MODEL["sha256"], "run")
    with pytest.raises(UsageError, match=r"other is not the model of this index: it was built under run .*abababab"):
        snapshots.same_model(snapshot, "cd" * 32, "other")


def test_a_full_disk_leaves_the_old_snapshot(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "link", full)
    monkeypatch.setattr("shutil.copyfile", full)
    with pytest.raises(RayographError, match="the disk is full"):
        snapshots.publish(index, write_files(tmp_path / "two", seed=1), MANIFEST)
    assert snapshots.current(index).name == "000001"


def test_an_index_on_an_object_store_is_fetched_once_and_checked(index: Path, s3: Store) -> None:
    uri = f"{s3.bucket}/index"
    storage.upload(index, uri)
    first = snapshots.current(uri)
    assert first.name == "000001"
    assert np.array_equal(first.vectors, snapshots.current(index).vectors)
    s3.seen.clear()
    assert snapshots.current(uri).folder == first.folder
    assert not [path for _, path, _ in s3.seen if path.endswith(snapshots.VECTORS)]


def test_a_remote_index_that_was_changed_is_refused_until_it_is_mended(index: Path, s3: Store) -> None:
    uri = f"{s3.bucket}/index"
    storage.upload(index, uri)
    rows = f"{uri}/snapshots/000001/{snapshots.ROWS}"
    content = storage.read_bytes(rows)
    storage.write_bytes(rows, content[:-1] + b"x")
    with pytest.raises(DataError, match="missing or changed since the index was built"):
        snapshots.current(uri)
    storage.write_bytes(rows, content)
    assert snapshots.current(uri).rows.num_rows == 6


def test_what_is_no_index_in_a_store_is_refused(s3: Store) -> None:
    with pytest.raises(UsageError, match="not an INDEX"):
        snapshots.current(f"{s3.bucket}/none")
