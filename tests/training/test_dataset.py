"""A DATASET on disk: what was put in comes out, in the order asked for, and every row is accounted for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster import storage
from cluster.errors import DataError, UsageError
from tests.hostile import encoded
from tests.s3 import Store
from training.configs import IngestConfig
from training.dataset import (
    FORMAT,
    RESERVED,
    ROW_GROUP,
    Dataset,
    Selection,
    filter_rows,
    label_of,
    leaves,
    several_labels,
    truth_of,
)
from training.images import ImagePath, to_channels
from training.ingest import PART_ROWS, PartWriter, _write, resolve_data
from training.sources import list_source

SIDE = 8


def write_dataset(source: Path, out: Path, **options: Any) -> Dataset:
    """What `ingest` does, one part after the other and without Ray."""
    config = IngestConfig(str(source), out=str(out), image_size=str(SIDE), **options)
    path = ImagePath(SIDE, SIDE, config.fit, config.window, config.max_pixels)
    listing = list_source(config.source)
    rows = listing.rows.select(["key", "frame"]).append_column("image_id", pa.array(listing.image_ids()))
    rows = rows.append_column("at", pa.array(np.arange(rows.num_rows)))
    writer = PartWriter(listing.reader, path, str(out / "shards"))
    with config.open_out("ingest") as held:
        (out / "shards").mkdir()
        parts = [writer(rows.slice(at, PART_ROWS)) for at in range(0, rows.num_rows, PART_ROWS)]
        _write(config, path, listing, pa.concat_tables(parts), held)
    return Dataset.open(out)


def noise(count: int, *shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


@pytest.fixture(scope="module")
def grey(tmp_path_factory: pytest.TempPathFactory) -> tuple[Dataset, np.ndarray]:
    """700 grey pictures in two shards, and their pixels."""
    folder = tmp_path_factory.mktemp("grey")
    images = noise(700, SIDE, SIDE)
    labels = np.arange(700) % 3
    np.savez(folder / "some.npz", train_images=images, train_labels=labels)
    return write_dataset(folder / "some.npz", folder / "data"), images[..., None]


def test_pixels_come_back_as_they_were_in_the_order_of_the_selection(grey: tuple[Dataset, np.ndarray]) -> None:
    dataset, images = grey
    everything = dataset.select()
    assert (len(everything), dataset.channels) == (700, 1)
    assert np.array_equal(dataset.pixels(everything), images)
    order = np.random.default_rng(1).permutation(700)[:90]
    chosen = everything.take(order)
    assert np.array_equal(dataset.pixels(chosen), images[order])
    assert chosen.column("frame") == order.tolist()
    assert dataset.pixels(everything.take([5, 5, 0])).tolist() == images[[5, 5, 0]].tolist()
    assert dataset.pixels(everything.take([])).shape == (0, SIDE, SIDE, 1)


def test_row_groups_name_every_row_of_a_selection_once(grey: tuple[Dataset, np.ndarray]) -> None:
    dataset, images = grey
    chosen = dataset.select().take(np.random.default_rng(2).permutation(700)[::2])
    shard, row = chosen.column("shard"), chosen.column("row")
    seen = np.concatenate([places for _, _, _, places in chosen.row_groups])
    assert sorted(seen.tolist()) == list(range(350))
    names = [(name, number) for name, number, _, _ in chosen.row_groups]
    assert names == sorted(set(names))
    for name, number, rows, places in chosen.row_groups:
        assert [(shard[p], row[p]) for p in places] == [(name, number * ROW_GROUP + r) for r in rows]
        assert sorted(rows.tolist()) == rows.tolist()
        assert np.array_equal(dataset.read_row_group(name, number, rows), images[chosen.column("frame")][places])


def test_the_plan_covers_the_selection_and_knows_the_dataset_s_version(grey: tuple[Dataset, np.ndarray]) -> None:
    dataset, _ = grey
    chosen = dataset.select(["label=1"])
    plan = dataset.plan(chosen, batch_size=16, seed=5)
    assert plan.total == len(chosen) == 233
    assert (plan.batch_size, plan.seed, plan.version) == (16, 5, dataset.version)


def test_mean_and_deviation_are_those_of_all_pixels(grey: tuple[Dataset, np.ndarray]) -> None:
    dataset, images = grey
    assert dataset.info["mean"] == pytest.approx([(images / 255).mean()])
    assert dataset.info["std"] == pytest.approx([(images / 255).std()])


def test_shards_hold_small_fixed_row_groups(grey: tuple[Dataset, np.ndarray]) -> None:
    dataset, _ = grey
    files = sorted((storage.local_path(dataset.uri) / "shards").iterdir())
    assert [f.name for f in files] == ["part-000000.parquet", "part-000001.parquet"]
    for file, total in zip(files, (512, 188), strict=True):
        meta = pq.ParquetFile(file).metadata
        sizes = [meta.row_group(i).num_rows for i in range(meta.num_row_groups)]
        assert sum(sizes) == total and set(sizes[:-1]) <= {ROW_GROUP} and sizes[-1] <= ROW_GROUP


def test_grey_and_colour_pictures_share_a_dataset_of_three_channels(tmp_path: Path) -> None:
    colour, plain = noise(3, SIDE, SIDE, 3, seed=1), noise(3, SIDE, SIDE, seed=2)
    for at in range(3):
        (tmp_path / "in" / "a").mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / "a" / f"{at}-colour.png").write_bytes(encoded(colour[at], "PNG"))
        (tmp_path / "in" / "a" / f"{at}-grey.png").write_bytes(encoded(plain[at], "PNG"))
    dataset = write_dataset(tmp_path / "in", tmp_path / "three")
    expected = [image for pair in zip(colour, np.repeat(plain[..., None], 3, 3), strict=True) for image in pair]
    assert np.array_equal(dataset.pixels(dataset.select()), np.stack(expected))
    values = np.stack(expected) / 255
    assert dataset.info["mean"] == pytest.approx(values.mean(axis=(0, 1, 2)).tolist())
    assert dataset.info["std"] == pytest.approx(values.std(axis=(0, 1, 2)).tolist())
    one = write_dataset(tmp_path / "in", tmp_path / "one", channels="1")
    assert np.array_equal(one.pixels(one.select()), np.stack([to_channels(i, 1) for i in expected]))


def test_every_row_of_the_source_is_a_row_of_the_manifest(tmp_path: Path) -> None:
    pictures = noise(4, SIDE, SIDE, seed=3)
    for name, data in {
        "a/1.png": encoded(pictures[0], "PNG"),
        "a/2.png": encoded(pictures[1], "PNG"),
        "b/same.png": encoded(pictures[0], "PNG"),  # of another class: both lose their label
        "b/3.png": encoded(pictures[2], "PNG"),
        "unlabelled/2 again.png": encoded(pictures[1], "PNG"),
        "b/broken.png": b"\x89PNG nothing",
    }.items():
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(data)
    with pytest.raises(DataError, match=r"1 of 6 images cannot be read.*b/broken.png"):
        write_dataset(tmp_path / "in", tmp_path / "stopped")
    dataset = write_dataset(tmp_path / "in", tmp_path / "out", max_quarantined=0.5)
    rows = {row["path"]: row for row in dataset.manifest.to_pylist()}
    assert {path: (row["status"], row["label"]) for path, row in rows.items()} == {
        "a/1.png": ("ok", ""),
        "a/2.png": ("ok", "a"),
        "b/3.png": ("ok", "b"),
        "b/broken.png": ("quarantined", "b"),
        "b/same.png": ("duplicate", ""),
        "unlabelled/2 again.png": ("duplicate", "a"),
    }
    assert rows["a/1.png"]["group"] == rows["b/same.png"]["group"] != rows["b/3.png"]["group"]
    assert rows["b/same.png"]["reason"] == "same bytes as a/1.png"
    assert dataset.info["conflicting_copies"] == [["a/1.png", "b/same.png"]]
    counts = dataset.info["counts"]
    assert (counts["images"], counts["ok"], counts["duplicate"], counts["quarantined"]) == (6, 3, 2, 1)
    assert dataset.select(labelled=True).column("path") == ["a/2.png", "b/3.png"]
    assert np.array_equal(dataset.pixels(dataset.select())[..., 0], pictures[:3])


def test_the_version_is_a_function_of_the_content_and_of_nothing_else(tmp_path: Path) -> None:
    def version(name: str, images: np.ndarray, labels: list[int], **options: Any) -> str:
        (tmp_path / name).mkdir()
        np.savez(tmp_path / name / "x.npz", train_images=images, train_labels=np.asarray(labels))
        return write_dataset(tmp_path / name / "x.npz", tmp_path / name / "out", **options).version

    images = noise(6, SIDE, SIDE)
    first = version("one", images, [0, 1, 0, 1, 0, 1])
    assert version("again", images, [0, 1, 0, 1, 0, 1]) == first
    others = [
        version("other labels", images, [0, 1, 0, 1, 0, 0]),
        version("other pixels", noise(6, SIDE, SIDE, seed=9), [0, 1, 0, 1, 0, 1]),
        version("other path", images, [0, 1, 0, 1, 0, 1], fit="squash"),
    ]
    assert len({first, *others}) == 4


def test_a_newer_format_is_refused_and_the_current_one_is_not(grey: tuple[Dataset, np.ndarray], tmp_path: Path) -> None:
    info = grey[0].info
    storage.write_json(tmp_path / "dataset.json", info)
    assert Dataset.open(tmp_path).version == info["version"]
    storage.write_json(tmp_path / "dataset.json", info | {"format": FORMAT + 1})
    with pytest.raises(UsageError, match=f"dataset format {FORMAT + 1} is newer than this Rayograph's {FORMAT}"):
        Dataset.open(tmp_path)


def test_a_folder_that_is_no_dataset_is_refused_with_the_way_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="rayograph ingest"):
        Dataset.open(tmp_path)
    with pytest.raises(UsageError, match="not a DATASET"):
        Dataset.open(tmp_path / "nothing")


def test_conditions_keep_the_rows_for_which_all_hold() -> None:
    table = pa.table({"split": ["train", "val", "train", ""], "age": [6, 7, 7, 6], "n": [0, 1, 2, 3]})

    def kept(*where: str) -> list[int]:
        return list(filter_rows(table, where)["n"].to_pylist())

    assert kept() == [0, 1, 2, 3]
    assert kept("split=train") == [0, 2]
    assert kept("split=train", "age=7") == [2]
    assert kept("split=") == [3]
    assert kept("split=a=b") == []


def test_a_condition_that_is_none_is_refused_with_the_nearest_column() -> None:
    table = pa.table({"split": ["train"]})
    with pytest.raises(UsageError, match="give COLUMN=VALUE"):
        filter_rows(table, ["split"])
    with pytest.raises(UsageError, match=r"no column 'spilt'\. Did you mean 'split'\?"):
        filter_rows(table, ["spilt=train"])


def test_a_selection_without_rows_is_refused(grey: tuple[Dataset, np.ndarray]) -> None:
    with pytest.raises(UsageError, match="no image is left by --where label=7"):
        grey[0].select(["label=7"])


def test_leaves_are_the_sorted_labels() -> None:
    assert leaves(["b/x", "a", "b/y", "a"]) == ["a", "b/x", "b/y"]
    assert leaves(["b", "bc/d"]) == ["b", "bc/d"]  # a prefix, but no parent


@pytest.mark.parametrize(
    ("labels", "part"),
    [
        (["a|b", "a"], "'a|b' names several classes, but one for each image"),
        (["a", "a"], "at least two classes; found a"),
        ([], "at least two classes; found none"),
        (["a", "a/b"], "class 'a' is also the parent of 'a/b'"),
        (["x", "a/b", "a/b/c"], "class 'a/b' is also the parent of 'a/b/c'"),
        *[(["ordinary", name], "rename the class") for name in sorted(RESERVED)],
    ],
)
def test_labels_that_make_no_task_are_refused(labels: list[str], part: str) -> None:
    with pytest.raises(UsageError, match=part.replace("|", r"\|")):
        leaves(labels)


def test_classes_stand_in_the_order_that_was_asked_for() -> None:
    assert leaves(["npdr", "healthy", "pdr"], ["healthy", "npdr", "pdr"]) == ["healthy", "npdr", "pdr"]
    assert leaves(["npdr", "healthy", "pdr"], ["pdr", "healthy", "npdr"]) == ["pdr", "healthy", "npdr"]


@pytest.mark.parametrize(
    ("order", "part"),
    [
        (["healthy", "pdr"], "--order healthy pdr: lacks npdr; give every class"),
        (["healthy", "npdr", "pdr", "moon"], "names moon, no class; give every class"),
        (["healthy", "ndpr", "pdr"], "lacks npdr and names ndpr, no class"),
    ],
)
def test_an_order_of_other_classes_says_what_is_missing_or_too_much(order: list[str], part: str) -> None:
    with pytest.raises(UsageError) as caught:
        leaves(["npdr", "healthy", "pdr"], order)
    assert part in str(caught.value) and "\n" not in str(caught.value)


def test_label_sets_are_of_the_union_of_their_classes() -> None:
    labels = ["b/x|a", "a", "b/y"]
    classes = leaves(labels, several=True)
    assert classes == ["a", "b/x", "b/y"]
    truth = truth_of(labels, classes, several=True)
    assert truth.tolist() == [[True, True, False], [True, False, False], [False, False, True]]
    assert [label_of(own, classes) for own in truth] == ["a|b/x", "a", "b/y"]
    assert label_of(np.zeros(3, bool), classes) == ""
    assert several_labels(labels) and not several_labels(["a", "b"])


def test_class_numbers_are_places_among_the_classes() -> None:
    truth = truth_of(["b", "a", "b"], ["b", "a"], several=False)
    assert truth.tolist() == [0, 1, 0] and [label_of(t, ["b", "a"]) for t in truth] == ["b", "a", "b"]


@pytest.mark.parametrize(
    ("labels", "part"),
    [
        (["a|b", "a|c"], "class 'a' is on every labelled image"),
        (["a|a/b", "c"], "class 'a' is also the parent of 'a/b'"),
        (["a|fold", "b"], "rename the class"),
    ],
)
def test_label_sets_that_make_no_task_are_refused(labels: list[str], part: str) -> None:
    with pytest.raises(UsageError, match=part):
        leaves(labels, several=True)


def test_an_empty_selection_has_no_row_groups() -> None:
    assert Selection(pa.table({"shard": pa.array([], pa.string()), "row": pa.array([], pa.int64())})).row_groups == []


def ranges_of(store: Store, name: str) -> list[int]:
    """Bytes of each answer that carried a part of the shard `name`."""
    return [size for method, path, size in store.seen if method == "GET" and path.endswith(name)]


def test_a_remote_dataset_gives_the_same_pixels_and_reads_each_byte_of_its_shards_once(
    grey: tuple[Dataset, np.ndarray], s3: Store
) -> None:
    local, images = grey
    storage.write_json(Path(local.uri) / storage.MANIFEST, {})
    storage.upload(Path(local.uri), f"{s3.bucket}/data")
    remote = Dataset.open(f"{s3.bucket}/data")
    assert remote.version == local.version
    everything = remote.select()
    assert np.array_equal(remote.pixels(everything), images)
    s3.seen.clear()
    order = np.random.default_rng(0).permutation(len(everything.row_groups))
    for number in order:  # one after the other, as a feed reads them: footers are known by now
        shard, row_group, rows, places = everything.row_groups[number]
        assert np.array_equal(remote.read_row_group(shard, row_group, rows), images[places])
    for name in ("part-000000.parquet", "part-000001.parquet"):
        groups = pq.ParquetFile(Path(local.uri) / "shards" / name).num_row_groups
        sizes = ranges_of(s3, name)
        assert len(sizes) == groups, "one request for a row group"
        assert max(sizes) < 3 / groups * (Path(local.uri) / "shards" / name).stat().st_size, "a range, not the file"
        assert sum(sizes) <= (Path(local.uri) / "shards" / name).stat().st_size
    assert not [path for method, path, _ in s3.seen if method == "HEAD"]


def test_a_remote_dataset_counts_when_it_is_finished(grey: tuple[Dataset, np.ndarray], s3: Store) -> None:
    folder = Path(grey[0].uri)
    storage.upload(folder, f"{s3.bucket}/data", only=["dataset.json", "manifest.parquet"])
    with pytest.raises(UsageError, match="not a DATASET"):
        Dataset.open(f"{s3.bucket}/data")
    storage.write_json(f"{s3.bucket}/data/summary.json", {})
    assert len(Dataset.open(f"{s3.bucket}/data").select()) == 700


def test_a_dataset_may_be_named_by_a_file_uri(grey: tuple[Dataset, np.ndarray]) -> None:
    opened = resolve_data(f"file://{Path(grey[0].uri)}", out="unused")
    assert opened.uri == str(Path(grey[0].uri))
    assert opened.version == grey[0].version
