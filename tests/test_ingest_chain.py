"""`ingest` from a SOURCE to a DATASET: every row is accounted for, copies stay together, pixels stay what they are."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cluster.errors import DataError, UsageError
from cluster.session import Resources
from tests.hostile import NON_UTF8, encoded, picture, write_hostile
from tests.runs import rayograph
from training import phantom
from training.configs import IngestConfig
from training.dataset import Dataset
from training.images import decode, to_channels
from training.ingest import ingest

pytestmark = pytest.mark.ray


@pytest.fixture(autouse=True)
def _session(ray_session: Resources) -> None:
    """Every test here runs in the one Ray session."""


def config(source: Path | str, out: Path, **changes: Any) -> IngestConfig:
    return IngestConfig(str(source), out=str(out), **{"image_size": "32", "max_quarantined": 1.0, **changes})


def manifest(out: Path) -> list[dict[str, Any]]:
    return list(pq.read_table(out / "manifest.parquet").to_pylist())


def by_path(out: Path) -> dict[str, dict[str, Any]]:
    rows = manifest(out)
    found = {row["path"]: row for row in rows}
    assert len(found) == len(rows), "a path stands twice in the manifest"
    return found


def write_index(folder: Path, files: Mapping[str, bytes], rows: list[str], header: str = "path,label,group") -> Path:
    """`folder` with an index.csv; returns the folder."""
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    (folder / "index.csv").write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return folder


def scan(number: int) -> np.ndarray:
    """uint8 [96, 96]: a slice of another patient for every `number`."""
    firsts = {row.group: row.index for row in reversed(phantom.rows(200, 0))}
    return phantom.render(sorted(firsts.values())[number], 200, 0, 96)


def distinct(count: int) -> dict[str, bytes]:
    """PNG files that nobody could take for copies of each other."""
    return {f"{number}.png": encoded(scan(number), "PNG") for number in range(count)}


def shown(name: str) -> str:
    """A file name as the manifest spells it: bytes that are not UTF-8 become visible escapes."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def test_every_hostile_file_is_one_row_that_is_ok_or_has_its_reason(tmp_path: Path) -> None:
    expected = {n: r for n, r in write_hostile(tmp_path / "in").items() if n != "no_extension"}  # a folder lists images
    summary = ingest(config(tmp_path / "in", tmp_path / "out", max_merged_group=1.0))
    rows = by_path(tmp_path / "out")
    assert set(rows) == {shown(name) for name in expected}
    for name, reason in expected.items():
        row = rows[shown(name)]
        if reason is None:
            assert row["status"] in {"ok", "duplicate"}, name
        else:
            assert row["status"] == "quarantined", name
            assert reason in row["reason"], name
            assert (row["shard"], row["row"], row["group"]) == ("", -1, ""), name
    assert summary["images"] == len(expected) == summary["ok"] + summary["duplicate"] + summary["quarantined"]
    assert summary["quarantined"] == sum(reason is not None for reason in expected.values())
    # five names hold the bytes of one picture: one of them is kept
    same = {"really_a_png.jpg", "100% sure %2F %s.png", " two  spaces .png", NON_UTF8} & set(expected)
    assert sorted(rows[shown(n)]["status"] for n in same) == ["duplicate"] * (len(same) - 1) + ["ok"]


def test_a_second_run_is_already_done_and_touches_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_index(tmp_path / "in", distinct(4), [f"{n}.png,a,p{n}" for n in range(4)])
    first = ingest(config(source, tmp_path / "out"))
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*") if p.name not in {".lock", "out"}}
    capsys.readouterr()
    assert ingest(config(source, tmp_path / "out")) == first
    assert capsys.readouterr().out == f"already done: {tmp_path / 'out'}\n"
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_more_unreadable_images_than_allowed_stop_it_and_a_second_run_with_more_room_works(tmp_path: Path) -> None:
    files = distinct(6) | {"6.png": b"", "7.png": b"<html>"}
    source = write_index(tmp_path / "in", files, [f"{n}.png,a,p{n}" for n in range(8)])
    with pytest.raises(DataError, match="2 of 8 images cannot be read") as caught:
        ingest(config(source, tmp_path / "out", max_quarantined=0.05))
    assert len(str(caught.value).splitlines()) <= 2
    assert "6.png" in str(caught.value)
    assert not (tmp_path / "out" / "dataset.json").exists()
    with pytest.raises(UsageError, match="max_quarantined differs"):
        ingest(config(source, tmp_path / "out", max_quarantined=0.3))
    with pytest.raises(DataError, match="2 of 8"):  # the same command says the same, it does not trip over the first
        ingest(config(source, tmp_path / "out", max_quarantined=0.05))
    assert ingest(config(source, tmp_path / "out", max_quarantined=0.3, overwrite=True))["quarantined"] == 2


def test_a_source_without_one_readable_image_is_refused(tmp_path: Path) -> None:
    source = write_index(tmp_path / "in", {"a.png": b"", "b.png": b""}, ["a.png,x,1", "b.png,y,2"])
    with pytest.raises(DataError, match="no image could be read"):
        ingest(config(source, tmp_path / "out"))


def test_byte_identical_copies_weld_their_groups_and_conflicting_labels_are_dropped_and_listed(tmp_path: Path) -> None:
    files = distinct(6)
    files["again0.png"], files["again1.png"], files["again2.png"] = files["0.png"], files["1.png"], files["2.png"]
    rows = [
        *("0.png,healthy,ann", "again0.png,healthy,bob"),  # the same label, two patients
        *("1.png,healthy,cat", "again1.png,sick,dan"),  # they contradict each other
        *("2.png,,eve", "again2.png,sick,eve"),  # one of them knows
        *("3.png,healthy,bob", "4.png,sick,fay", "5.png,healthy,"),
    ]
    summary = ingest(config(write_index(tmp_path / "in", files, rows), tmp_path / "out"))
    found = by_path(tmp_path / "out")
    group = {path: row["group"] for path, row in found.items()}
    assert group["0.png"] == group["again0.png"] == group["3.png"] == "ann"  # 3.png is bob's, whom a copy made ann
    assert group["1.png"] == group["again1.png"] == "cat"
    assert group["4.png"] == "fay"
    assert group["5.png"] not in {"", "ann", "cat", "eve", "fay"}  # no group given: its own
    assert found["0.png"]["group_given"] == "ann" and found["again0.png"]["group_given"] == "bob"
    label = {path: row["label"] for path, row in found.items()}
    assert label == {
        **{"0.png": "healthy", "again0.png": "healthy", "1.png": "", "again1.png": "", "2.png": "sick"},
        **{"again2.png": "sick", "3.png": "healthy", "4.png": "sick", "5.png": "healthy"},
    }
    duplicates = {path for path, row in found.items() if row["status"] == "duplicate"}
    assert duplicates == {"again0.png", "again1.png", "again2.png"}
    assert Dataset.open(tmp_path / "out").info["conflicting_copies"] == [["1.png", "again1.png"]]
    assert (summary["ok"], summary["duplicate"], summary["groups"]) == (6, 3, 5)


def test_a_picture_encoded_again_welds_groups_and_different_pictures_do_not(tmp_path: Path) -> None:
    files = distinct(5)
    files["0.jpg"] = encoded(scan(0), "JPEG", quality=75)
    files["0small.png"] = encoded(Image.fromarray(scan(0)).resize((80, 80), Image.Resampling.LANCZOS), "PNG")
    rows = [f"{n}.png,a,p{n}" for n in range(5)] + ["0.jpg,a,q", "0small.png,a,r"]
    ingest(config(write_index(tmp_path / "in", files, rows), tmp_path / "out"))
    found = by_path(tmp_path / "out")
    assert {row["status"] for row in found.values()} == {"ok"}  # near copies are kept, together
    assert found["0.jpg"]["group"] == found["0small.png"]["group"] == found["0.png"]["group"] == "p0"
    assert [found[f"{n}.png"]["group"] for n in range(5)] == [f"p{n}" for n in range(5)]


def test_copies_that_would_weld_much_of_the_data_into_one_group_stop_it(tmp_path: Path) -> None:
    files = distinct(30) | {f"copy{n}.jpg": encoded(scan(0), "JPEG", quality=60 + n) for n in range(30)}
    source = write_index(tmp_path / "in", files, [f"{name},a,{name}" for name in files])
    with pytest.raises(DataError, match="copies join 31 groups into one of 31 of 60 images"):
        ingest(config(source, tmp_path / "out"))
    assert ingest(config(source, tmp_path / "out2", max_merged_group=0.6))["groups"] == 30


def test_the_report_shows_copies_across_patients_before_anything_is_trained(tmp_path: Path) -> None:
    files = distinct(8) | {"broken.png": b""}
    picture = Image.fromarray(scan(1))
    files["same.png"] = files["0.png"]
    files["turned.png"] = encoded(picture.transpose(Image.Transpose.ROTATE_90), "PNG")
    files["bright.jpg"] = encoded(Image.fromarray(scan(2)).point(lambda v: min(255, v * 1.2)), "JPEG", quality=90)
    files["again.jpg"] = encoded(scan(3), "JPEG", quality=80)
    given = {**{f"{n}.png": f"p{n}" for n in range(8)}, "same.png": "q0", "turned.png": "q1", "bright.jpg": "q2"}
    rows = [f"{name},a,{given.get(name, 'p3')}" for name in files if name != "turned.png"] + ["turned.png,b,q1"]
    source = write_index(tmp_path / "in", files, rows)
    summary = ingest(config(source, tmp_path / "out", image_size="128"))
    pairs = {
        frozenset((r["path_a"], r["path_b"])): r for r in pq.read_table(tmp_path / "out/copies.parquet").to_pylist()
    }
    copied = {pair: row for pair, row in pairs.items() if row["merged"]}
    assert {frozenset(p) for p in (("0.png", "same.png"), ("1.png", "turned.png"), ("2.png", "bright.jpg"))} | {
        frozenset(("3.png", "again.jpg"))
    } == set(copied)
    kinds = {next(iter(pair - set(distinct(8)))): row["kind"] for pair, row in copied.items()}
    assert kinds["same.png"] == "the same bytes" and kinds["again.jpg"] == "nearly the same"
    assert kinds["turned.png"] == "a quarter turn" and "brighter" in kinds["bright.jpg"]
    across = {next(iter(pair - set(distinct(8)))) for pair, row in copied.items() if row["across_groups"]}
    assert across == {"same.png", "turned.png", "bright.jpg"}
    found = by_path(tmp_path / "out")
    assert [found[n]["group"] for n in ("same.png", "turned.png", "bright.jpg")] == ["p0", "p1", "p2"]
    page = (tmp_path / "out/report.html").read_text()
    assert "3 of 4 pairs of copies are across groups" in page and "a quarter turn" in page
    assert "zero bytes" in page and "broken.png" in page and "disagree on their label: 1." in page
    assert page.count("data:image/png") >= 2
    # without pictures nothing names a file or a patient, and the data set is the same
    assert ingest(config(source, tmp_path / "bare", image_size="128", images=False))["groups"] == summary["groups"]
    bare = (tmp_path / "bare/report.html").read_text()
    assert "data:image" not in bare and "broken.png" not in bare and "zero bytes" in bare
    assert not (tmp_path / "bare/figures").exists()
    assert Dataset.open(tmp_path / "bare").version == Dataset.open(tmp_path / "out").version


def test_copies_that_stop_the_ingest_can_be_looked_at(tmp_path: Path) -> None:
    files = distinct(30) | {f"copy{n}.jpg": encoded(scan(0), "JPEG", quality=60 + n) for n in range(30)}
    source = write_index(tmp_path / "in", files, [f"{name},a,{name}" for name in files])
    with pytest.raises(DataError, match=r"report\.html"):
        ingest(config(source, tmp_path / "out"))
    assert "are across groups" in (tmp_path / "out" / "report.html").read_text()
    assert not (tmp_path / "out" / "dataset.json").exists()


@pytest.mark.parametrize("fit", ["letterbox", "squash", "crop"])
def test_shards_hold_exactly_what_decode_gives_also_for_other_shapes_and_sixteen_bits(tmp_path: Path, fit: str) -> None:
    rng = np.random.default_rng(3)
    deep = (rng.random((40, 40)) * 60000).astype(np.uint16)
    files = {
        **{f"{n}.png": encoded(picture(30 + 7 * n, 90 - 5 * n, seed=n), "PNG") for n in range(6)},
        "photo.jpg": encoded(picture(600, 400), "JPEG"),
        "deep.png": encoded(deep, "PNG"),
        "deep.tif": encoded(deep[:25], "TIFF"),
        "grey.png": encoded(Image.fromarray(picture()).convert("L"), "PNG"),
    }
    source = write_index(tmp_path / "in", files, [f"{name},a,{name}" for name in files])
    ingest(config(source, tmp_path / "out", image_size="24x40", fit=fit))
    dataset = Dataset.open(tmp_path / "out")
    assert (dataset.image_path.height, dataset.image_path.width, dataset.channels) == (24, 40, 3)
    selection = dataset.select()
    pixels = dataset.pixels(selection)
    assert pixels.shape == (len(files), 24, 40, 3)
    for path, stored in zip(selection.column("path"), pixels, strict=True):
        np.testing.assert_array_equal(stored, to_channels(decode(files[path], dataset.image_path), 3), err_msg=path)


def test_channels_and_moments_are_those_of_all_pixels(tmp_path: Path) -> None:
    files = {f"{n}.png": encoded(Image.fromarray(picture(32, 32, seed=n)).convert("L"), "PNG") for n in range(5)}
    ingest(config(write_index(tmp_path / "in", files, [f"{n},a,{n}" for n in files]), tmp_path / "out"))
    dataset = Dataset.open(tmp_path / "out")
    values = np.stack([np.asarray(Image.open(io.BytesIO(content))) for content in files.values()]) / 255
    assert dataset.channels == 1
    np.testing.assert_allclose(dataset.info["mean"], [values.mean()])
    np.testing.assert_allclose(dataset.info["std"], [values.std()])


def test_a_listed_file_that_is_missing_and_a_folder_are_quarantined_rows(tmp_path: Path) -> None:
    source = write_index(
        tmp_path / "in", distinct(3), ["0.png,a,1", "gone.png,a,2", "1.png,b,3", "sub,b,4", "2.png,a,5"]
    )
    (source / "sub").mkdir()
    ingest(config(source, tmp_path / "out"))
    found = by_path(tmp_path / "out")
    assert (found["gone.png"]["status"], found["gone.png"]["reason"]) == ("quarantined", "no such file")
    assert (found["sub"]["status"], found["sub"]["reason"]) == ("quarantined", "a folder, not a file")
    assert [found[f"{n}.png"]["status"] for n in range(3)] == ["ok"] * 3


def test_extra_columns_and_ids_are_kept_and_the_same_source_gives_the_same_version(tmp_path: Path) -> None:
    source = write_index(
        tmp_path / "in", distinct(3), [f"{n}.png,a,p{n},c{n},{n}0" for n in range(3)], "path,label,group,case,age"
    )
    ingest(config(source, tmp_path / "out"))
    ingest(config(source, tmp_path / "twin"))
    rows, twins = manifest(tmp_path / "out"), manifest(tmp_path / "twin")
    assert rows == twins
    assert [(row["case"], row["age"]) for row in rows] == [("c0", "00"), ("c1", "10"), ("c2", "20")]
    assert Dataset.open(tmp_path / "out").version == Dataset.open(tmp_path / "twin").version
    (source / "0.png").write_bytes(encoded(scan(20), "PNG"))
    ingest(config(source, tmp_path / "changed"))
    assert Dataset.open(tmp_path / "changed").version != Dataset.open(tmp_path / "out").version
    assert [row["image_id"] for row in manifest(tmp_path / "changed")] == [row["image_id"] for row in rows]


@pytest.mark.parametrize("spelling", ["relative", "index", "file URI", "npz"])
def test_a_source_is_found_however_it_is_spelt(tmp_path: Path, spelling: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's workers do not share the working directory of the command."""
    write_index(tmp_path / "my scans", distinct(3), [f"{n}.png,a,p{n}" for n in range(3)])
    np.savez(tmp_path / "few.npz", train_images=np.stack([scan(n) for n in range(3)]))
    monkeypatch.chdir(tmp_path)
    source = {
        "relative": "my scans",
        "index": "my scans/index.csv",
        "file URI": (tmp_path / "my scans").as_uri(),
        "npz": "few.npz",
    }[spelling]
    assert ingest(config(source, Path("out")))["ok"] == 3


def test_sub_folders_are_classes_and_unlabelled_is_none(tmp_path: Path) -> None:
    for at, (name, content) in enumerate(distinct(4).items()):
        folder = tmp_path / "in" / ("disease/cyst", "healthy", "Unlabelled", ".hidden")[at]
        folder.mkdir(parents=True)
        (folder / name).write_bytes(content)
    ingest(config(tmp_path / "in", tmp_path / "out"))
    labels = {path: row["label"] for path, row in by_path(tmp_path / "out").items()}
    assert labels == {"disease/cyst/0.png": "disease/cyst", "healthy/1.png": "healthy", "Unlabelled/2.png": ""}


def test_a_medmnist_file_has_a_row_per_image_and_its_pixels_untouched(tmp_path: Path, shared_data: Path) -> None:
    file = shared_data / "medmnist" / "breastmnist.npz"
    summary = ingest(config(file, tmp_path / "out", image_size="28", max_merged_group=1.0))
    with np.load(file) as arrays:
        counts = {split: len(arrays[f"{split}_images"]) for split in ("train", "val", "test")}
        images = {split: arrays[f"{split}_images"] for split in counts}
        labels = {split: arrays[f"{split}_labels"].ravel() for split in counts}
    assert summary["images"] == sum(counts.values()) == summary["ok"] + summary["duplicate"]
    rows = manifest(tmp_path / "out")
    assert {split: sum(row["split"] == split for row in rows) for split in counts} == counts
    dataset = Dataset.open(tmp_path / "out")
    selection = dataset.select()
    pixels = dataset.pixels(selection)
    conflicting = {path for pair in dataset.info["conflicting_copies"] for path in pair}
    for at, row in enumerate(selection.table.to_pylist()):
        np.testing.assert_array_equal(pixels[at, :, :, 0], images[row["split"]][row["frame"]])
        if not conflicting:
            assert row["label"] == str(labels[row["split"]][row["frame"]])


@pytest.mark.slow
def test_an_ingest_killed_with_kill_9_is_taken_up_by_the_same_command(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with rayograph("ingest", "phantom:2000", "--out", str(out), "--image-size", "32") as process:
        process.until(lambda: any(out.glob("shards/part-*")), "a first shard is written")
        process.kill_group()
    assert not (out / "summary.json").exists()
    with pytest.raises(UsageError, match="not a DATASET"):
        Dataset.open(out)
    summary = ingest(IngestConfig("phantom:2000", out=str(out), image_size="32"))
    assert (summary["images"], summary["ok"]) == (2000, 2000)
    listed = {row["shard"] for row in manifest(out)}
    assert {p.name for p in (out / "shards").iterdir()} == listed
