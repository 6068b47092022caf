"""Sources: every form of SOURCE becomes the same kind of rows, and nothing found in one is ever executed."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest

from cluster.errors import UsageError
from tests.hostile import NON_UTF8, encoded, picture
from training import phantom
from training.sources import Listing, list_source

PNG = encoded(picture(8, 8), "PNG")


def write(root: Path, *names: str) -> Path:
    """`root` with an image at every name; its bytes end in the name, so that a wrong file is noticed."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(PNG + os.fsencode(name))
    return root


def labels(listing: Listing) -> dict[str, str]:
    return dict(zip(listing.rows["path"].to_pylist(), listing.rows["label"].to_pylist(), strict=True))


def column(listing: Listing, name: str) -> list[Any]:
    return list(listing.rows[name].to_pylist())


def contents(listing: Listing) -> list[bytes]:
    """What the reader gives for each row, in order."""
    found = [
        listing.reader.read(key, frame)
        for key, frame in zip(column(listing, "key"), column(listing, "frame"), strict=True)
    ]
    assert all(isinstance(data, bytes) for data in found)
    return [bytes(data) for data in found]


class Bomb:
    """Unpickling it leaves a file behind."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return (Path.write_text, (self.canary, "executed"))


def refused(source: Path | str) -> str:
    with pytest.raises(UsageError) as caught:
        list_source(str(source))
    text = str(caught.value)
    assert "\n" not in text
    return text


# Folders


def test_sub_folders_are_classes_and_what_they_hold_is_sorted(tmp_path: Path) -> None:
    root = write(tmp_path, "b/2.png", "a/1.jpg", "a/deep/er/3.JPEG", "b/1.tif")
    assert labels(list_source(str(root))) == {
        "a/1.jpg": "a",
        "a/deep/er/3.JPEG": "a/deep/er",
        "b/1.tif": "b",
        "b/2.png": "b",
    }


def test_a_flat_folder_is_unlabelled(tmp_path: Path) -> None:
    listing = list_source(str(write(tmp_path, "1.png", "2.png")))
    assert labels(listing) == {"1.png": "", "2.png": ""}
    assert column(listing, "group") == column(listing, "case") == ["", ""]
    assert column(listing, "frame") == [0, 0]


@pytest.mark.parametrize("name", ["unlabelled", "unlabeled", "Unlabelled"])
def test_the_unlabelled_folder_is_no_class_nor_are_the_folders_in_it(name: str, tmp_path: Path) -> None:
    root = write(tmp_path, "cat/1.png", f"{name}/2.png", f"{name}/scanner b/3.png")
    assert labels(list_source(str(root))) == {
        "cat/1.png": "cat",
        f"{name}/2.png": "",
        f"{name}/scanner b/3.png": "",
    }


def test_other_files_are_counted_and_hidden_ones_are_not_looked_at(tmp_path: Path) -> None:
    root = write(tmp_path, "a/1.png", "a/notes.txt", "a/labels.csv", ".git/2.png", "a/.3.png")
    listing = list_source(str(root))
    assert labels(listing) == {"a/1.png": "a"}
    assert listing.ignored == 2


def test_the_reader_fetches_each_row_s_own_bytes(tmp_path: Path) -> None:
    names = ["100% sure %2F %s.png", " two  spaces .png", "a b/c%20d.png", "ä/é.png"]
    listing = list_source(str(write(tmp_path, *names)))
    assert set(column(listing, "path")) == set(names)
    assert contents(listing) == [PNG + name.encode() for name in column(listing, "path")]


@pytest.mark.skipif(os.name == "nt" or os.uname().sysname == "Darwin", reason="not on this system: such names")
def test_names_that_are_not_utf8_are_read_and_shown_as_escapes(tmp_path: Path) -> None:
    write(tmp_path / NON_UTF8.removesuffix(".png"), NON_UTF8, "plain.png")
    listing = list_source(str(tmp_path))
    assert contents(listing) == [PNG + os.fsencode(NON_UTF8), PNG + b"plain.png"]
    assert column(listing, "path") == ["caf\\xe9 \\xff/caf\\xe9 \\xff.png", "caf\\xe9 \\xff/plain.png"]
    assert column(listing, "label") == ["caf\\xe9 \\xff"] * 2
    assert len(set(listing.image_ids())) == 2


def test_image_ids_depend_on_the_place_in_the_source_and_not_on_where_the_source_is(tmp_path: Path) -> None:
    one, other = write(tmp_path / "here", "a/1.png", "a/2.png"), write(tmp_path / "there", "a/2.png", "b/1.png")
    first, second = list_source(str(one)).image_ids(), list_source(str(other)).image_ids()
    assert first[1] == second[0]
    assert len({*first, *second}) == 3


@pytest.mark.parametrize("name", ["nothing", "nothing.npz", "nothing.csv", "nothing.parquet"])
def test_a_source_that_is_not_there_is_named(name: str, tmp_path: Path) -> None:
    text = refused(tmp_path / name)
    assert str(tmp_path / name) in text and "no such" in text


def test_a_folder_without_images_and_a_file_of_another_kind_are_refused(tmp_path: Path) -> None:
    assert "no image in this folder" in refused(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    assert "no image in this folder" in refused(tmp_path)
    assert "not a folder, .csv, .parquet or .npz" in refused(tmp_path / "notes.txt")


def test_a_file_uri_is_the_folder_it_names(tmp_path: Path) -> None:
    root = write(tmp_path / "my data 100%", "a/1 %20.png", "b/2.png")
    uri = "file://" + str(root).replace("%", "%25").replace(" ", "%20")
    listing, plain = list_source(uri), list_source(str(root))
    assert listing.rows.equals(plain.rows)
    assert contents(listing) == contents(plain) == [PNG + b"a/1 %20.png", PNG + b"b/2.png"]
    (root / "index.csv").write_text("path,label\nb/2.png,x\n")
    assert labels(list_source(uri)) == labels(list_source(f"{uri}/index.csv")) == {"b/2.png": "x"}
    assert contents(list_source(f"{uri}/index.csv")) == [PNG + b"b/2.png"]


def test_an_npz_at_a_file_uri_is_read(tmp_path: Path) -> None:
    path = save_npz(tmp_path / "a b.npz", train_images=np.zeros((2, 4, 4), np.uint8))
    listing = list_source(f"file://{tmp_path}/a%20b.npz")
    assert listing.rows.equals(list_source(str(path)).rows)
    assert np.asarray(listing.reader.read(b"train_images", 1)).shape == (4, 4)


def remote(name: str, **files: bytes) -> str:
    """A folder of pyarrow's in-memory file system, which is no local path; returns its URI."""
    from cluster import storage

    memory: Any = storage.at("mock:///")
    assert isinstance(memory.files, pafs.FileSystem)
    for file, data in files.items():
        path = f"{name}/{file.replace('__', '/')}.png"
        memory.files.create_dir(path.rpartition("/")[0])
        with memory.files.open_output_stream(path) as stream:
            stream.write(data)
    return f"mock:///{name}"


def test_a_folder_of_another_file_system_is_listed_and_read() -> None:
    uri = remote("box", a__1=b"one", b__box1=b"two", box__3=b"three")
    listing = list_source(uri)
    assert labels(listing) == {"a/1.png": "a", "b/box1.png": "b", "box/3.png": "box"}
    assert contents(listing) == [b"one", b"two", b"three"]


def test_a_name_that_no_file_system_takes_is_an_os_error_and_ends_no_job(tmp_path: Path) -> None:
    (tmp_path / "index.csv").write_bytes(b"path\nno\0thing.png\ncaf\xe9.png\n")
    local = list_source(str(tmp_path))
    away = list_source(remote("names", a=b"x"))
    for key in column(local, "key"):
        for listing in (local, away):
            with pytest.raises(OSError):
                listing.reader.read(key, 0)


# Indexes


def write_index(root: Path, text: str, name: str = "index.csv") -> Path:
    (root / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    return root / name


def test_an_index_names_the_rows_and_keeps_its_other_columns(tmp_path: Path) -> None:
    write(tmp_path, "x/1.png", "x/2.png", "y/not listed.png")
    index = write_index(
        tmp_path,
        "\ufeffpath, label ,group,case,age,key\n"
        'x/2.png, a / b |c ,p1,left,"61, about",secret\n\n'
        "x/1.png,,p2,right,,\n"
        "gone.png,a,p3,,7,\n",
    )
    for source in (tmp_path, index):
        listing = list_source(str(source))
        assert labels(listing) == {"x/2.png": "a/b|c", "x/1.png": "", "gone.png": "a"}
        assert column(listing, "group") == ["p1", "p2", "p3"]
        assert column(listing, "case") == ["left", "right", ""]
        assert column(listing, "age") == ["61, about", "", "7"]
        assert column(listing, "key") == [b"x/2.png", b"x/1.png", b"gone.png"]
        assert listing.reader.read(b"x/1.png", 0) == PNG + b"x/1.png"
        with pytest.raises(FileNotFoundError):
            listing.reader.read(b"gone.png", 0)


def test_a_tab_separated_index_is_read(tmp_path: Path) -> None:
    index = write_index(tmp_path, "path\tlabel\na, b.png\tcat\n", "index.tsv")
    assert labels(list_source(str(index))) == {"a, b.png": "cat"}


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "no column 'path' (found: none)"),
        ("file,label\na.png,x\n", "no column 'path' (found: file, label)"),
        ("paths,label\na.png,x\n", "Did you mean 'paths'?"),
        ("path,label,path\na.png,x,b.png\n", "twice"),
        ("path,label, label\na.png,x,y\n", "twice"),
        ("path,label\na.png,x\nb.png\n", "index.csv:3: 1 fields where the header has 2"),
        ("path,label\na.png,x,y\n", "index.csv:2: 3 fields where the header has 2"),
        ("path,label\n", "has no rows"),
        ('path,label\n"' + "a" * 200_000 + '",x\n', "not CSV"),
    ],
)
def test_an_index_that_is_none_is_refused_with_its_line(text: str, part: str, tmp_path: Path) -> None:
    assert part in refused(write_index(tmp_path, text))


def test_an_index_in_latin_1_is_read_and_its_words_shown_as_escapes(tmp_path: Path) -> None:
    write_index(tmp_path, "path,label,group,ort\ncaf\udce9.png,l\udce9sion,Andr\udce9,K\udcf6ln\n")
    listing = list_source(str(tmp_path))
    assert labels(listing) == {"caf\\xe9.png": "l\\xe9sion"}
    assert column(listing, "key") == [b"caf\xe9.png"]
    assert (column(listing, "group"), column(listing, "ort")) == (["Andr\\xe9"], ["K\\xf6ln"])


def test_a_parquet_manifest_says_the_same_as_its_csv(tmp_path: Path) -> None:
    table = pa.table(
        {
            "path": pa.array(["x/1.png", "x/2.png"]).dictionary_encode(),
            "label": ["a /b", None],
            "group": pa.array([17, 18], pa.int64()),
            "age": [6.5, None],
        }
    )
    pq.write_table(table, tmp_path / "m.parquet")
    write_index(tmp_path, "path,label,group,age\nx/1.png,a /b,17,6.5\nx/2.png,,18,\n")
    one, other = list_source(str(tmp_path / "m.parquet")), list_source(str(tmp_path / "index.csv"))
    assert one.rows.equals(other.rows)
    assert one.reader == other.reader


def test_binary_paths_of_a_parquet_manifest_are_their_bytes(tmp_path: Path) -> None:
    pq.write_table(pa.table({"path": pa.array([b"a.png", b"caf\xe9.png"])}), tmp_path / "m.parquet")
    listing = list_source(str(tmp_path / "m.parquet"))
    assert column(listing, "key") == [b"a.png", b"caf\xe9.png"]


def test_a_poisoned_parquet_manifest_is_data_and_never_code(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    poison = pickle.dumps(Bomb(canary))
    nested = pa.array(
        [{"payload": poison, "list": [poison]}], pa.struct([("payload", pa.binary()), ("list", pa.list_(pa.binary()))])
    )
    table = pa.table({"path": ["a.png"], "payload": pa.array([poison], pa.binary()), "nested": nested})
    extension = {b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": poison}
    schema = table.schema.set(1, table.schema.field(1).with_metadata(extension)).with_metadata({b"pandas": poison})
    pq.write_table(table.cast(schema), tmp_path / "m.parquet")
    listing = list_source(str(tmp_path / "m.parquet"))
    assert column(listing, "key") == [b"a.png"]
    assert "nested" not in listing.rows.column_names
    assert not canary.exists()
    pickle.loads(poison)
    assert canary.exists()  # the canary sings where something is unpickled


def test_a_file_that_only_says_parquet_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.parquet").write_bytes(b"PAR1 nothing here PAR1")
    assert "not a readable Parquet manifest" in refused(tmp_path / "m.parquet")


def test_text_of_a_parquet_manifest_that_is_none_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"path": pa.array([b"caf\xe9.png"]).view(pa.string())}), tmp_path / "m.parquet")
    assert "not a readable Parquet manifest" in refused(tmp_path / "m.parquet")


# .npz


def save_npz(path: Path, **arrays: np.ndarray) -> Path:
    np.savez(path, allow_pickle=True, **arrays)
    return path


def test_an_npz_in_medmnist_form_gives_rows_labels_and_splits(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    train, val = rng.integers(0, 256, (3, 5, 6), dtype=np.uint8), rng.integers(0, 256, (2, 5, 6), dtype=np.uint8)
    path = save_npz(
        tmp_path / "some.npz",
        train_images=train,
        train_labels=np.asarray([[2], [0], [1]], np.uint8),
        val_images=val,
        val_labels=np.asarray([1, 1]),
        test_images=val[:1],
    )
    listing = list_source(str(path))
    assert column(listing, "label") == ["", "2", "0", "1", "1", "1"]
    assert column(listing, "split") == ["test", "train", "train", "train", "val", "val"]
    assert column(listing, "frame") == [0, 0, 1, 2, 0, 1]
    assert len(set(listing.image_ids())) == 6
    assert np.array_equal(listing.reader.read(b"train_images", 2), train[2])
    assert np.array_equal(listing.reader.read(b"val_images", 0), val[0])


def test_several_labels_of_an_npz_row_are_joined(tmp_path: Path) -> None:
    matrix = np.asarray([[0, 1, 1, 0], [0, 0, 0, 0], [1, 0, 0, 1]])
    path = save_npz(tmp_path / "m.npz", train_images=np.zeros((3, 4, 4, 3), np.uint8), train_labels=matrix)
    assert column(list_source(str(path)), "label") == ["1|2", "", "0|3"]


@pytest.mark.parametrize(
    ("arrays", "part"),
    [
        ({"x": np.zeros(3)}, "no array named *_images"),
        ({"train_images": np.zeros((0, 4, 4))}, "no array named *_images"),
        ({"train_images": np.zeros((3, 4, 4)), "train_labels": np.zeros(2)}, "3 images but 2 labels"),
        ({"train_images": np.zeros((2, 4, 4)), "train_labels": np.asarray(["cat", "dog"])}, "whole numbers"),
        ({"train_images": np.zeros((1, 4, 4)), "train_labels": np.asarray([np.nan])}, "whole numbers"),
        ({"train_images": np.float64(3)}, "train_images"),
        ({"train_images": np.zeros((1, 4, 4)), "train_labels": np.float64(3)}, "train_labels"),
    ],
)
def test_an_npz_of_another_form_is_refused(arrays: dict[str, Any], part: str, tmp_path: Path) -> None:
    assert part in refused(save_npz(tmp_path / "x.npz", **arrays))


def test_pickled_arrays_are_refused_and_not_executed(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    objects = np.empty(1, dtype=object)
    objects[0] = Bomb(canary)
    save_npz(tmp_path / "objects.npz", train_images=np.zeros((1, 4, 4)), train_labels=objects)
    (tmp_path / "pickle.npz").write_bytes(pickle.dumps(Bomb(canary)))
    with zipfile.ZipFile(tmp_path / "inner.npz", "w") as archive:
        archive.writestr("train_images.npy", pickle.dumps(Bomb(canary)))
    for name in ("objects", "pickle"):
        assert "not a readable .npz of plain arrays" in refused(tmp_path / f"{name}.npz")
    refused(tmp_path / "inner.npz")
    assert not canary.exists()


def test_damaged_and_foreign_npz_files_are_refused(tmp_path: Path) -> None:
    whole = save_npz(tmp_path / "whole.npz", train_images=np.zeros((9, 32, 32), np.uint8)).read_bytes()
    single = io.BytesIO()
    np.save(single, np.zeros(3))
    for name, data in {"cut": whole[:-200], "text": b"hello", "empty": b"", "single": single.getvalue()}.items():
        (tmp_path / f"{name}.npz").write_bytes(data)
        assert "not a readable .npz" in refused(tmp_path / f"{name}.npz")


# Generated


def test_phantoms_are_rows_of_the_generator() -> None:
    listing = list_source("phantom:20", seed=3, size=32)
    expected = phantom.rows(20, 3)
    assert column(listing, "path") == [row.path for row in expected]
    assert column(listing, "label") == [row.label for row in expected]
    assert column(listing, "group") == [row.group for row in expected]
    assert column(listing, "truth") == [row.truth for row in expected]
    assert np.array_equal(listing.reader.read(column(listing, "key")[7], 0), phantom.render(7, 20, 3, 32))


@pytest.mark.parametrize("count", ["", "0", "-3", "many", "1.5", "²"])
def test_a_count_of_phantoms_that_is_none_is_refused(count: str) -> None:
    assert "give a count" in refused(f"phantom:{count}")


def test_an_index_that_names_one_path_twice_is_refused(tmp_path: Path) -> None:
    index = tmp_path / "index.csv"
    index.write_text("path,label\na.png,x\nb.png,y\na.png,y\n")
    with pytest.raises(UsageError, match=r"'a\.png' stands in it twice"):
        list_source(str(index))
