"""An `--out` on an object store: leased, resumed on another host, lost to another writer."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster import lease, storage
from cluster.errors import LockedError, RayographError, UsageError
from cluster.lease import Lease, Pace
from cluster.outdir import OutDir
from cluster.outfile import OutFile, claim_file
from tests.s3 import Store

ROOT = Path(__file__).parents[2]
QUICK = Pace(beat=0.2, stale=1.2, settle=0.05)
HOLDER = """
import signal, sys
from cluster.lease import Pace
from cluster.outdir import OutDir
out = OutDir.open(sys.argv[1], verb="v", config={}, identity={}, raisable={}, overwrite=False,
    pace=Pace(0.2, 1.2, 0.05))
(out.path / "part").write_text("of a killed process")
out.push()
print("held", flush=True)
signal.pause()
"""
NextHost = Callable[[], None]


@pytest.fixture
def run(s3: Store) -> str:
    """Where a RUN will be."""
    return f"{s3.bucket}/runs/one"


@pytest.fixture
def next_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> NextHost:
    """From now on this is another host: its scratch is empty, and it knows no process of the one before."""
    count = iter(range(100))

    def change() -> None:
        number = next(count)
        monkeypatch.setenv("RAYOGRAPH_SCRATCH", str(tmp_path / f"host-{number}"))
        monkeypatch.setattr(lease, "_machine", lambda: f"host {number}")

    change()
    return change


def open_out(uri: str, *, overwrite: bool = False, lazy: list[str] | None = None, **changes: Any) -> OutDir:
    config = {"data": "images", "epochs": 10, "lr": 1e-5, "out": uri} | changes
    identity = {name: config[name] for name in ("data", "lr")}
    return OutDir.open(
        uri,
        verb="pretrain",
        config=config,
        identity=identity,
        raisable={"epochs": config["epochs"]},
        overwrite=overwrite,
        lazy=lazy or [],
        pace=QUICK,
    )


def claim(uri: str, *, overwrite: bool = False, **changes: Any) -> OutFile:
    return claim_file(uri, verb="predict", identity={"model": "m"} | changes, overwrite=overwrite, pace=QUICK)


def hold(uri: str) -> subprocess.Popen[str]:
    """Another process that holds the `--out` `uri` and keeps it."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, uri], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def take_over(uri: str, name: str = ".lock", beat: float | None = None) -> None:
    """Somebody else's lease stands in `uri`."""
    other = {"holder": "other", "host": "elsewhere", "machine": "elsewhere", "pid": 7, "beat": beat or time.time()}
    storage.write_json(storage.join(uri, name), other)


def files_in(s3: Store) -> dict[str, bytes]:
    """What is in the bucket, without the marks of folders that deletions leave."""
    return {name: content for name, content in s3.keys().items() if not name.endswith("/")}


def uploads(s3: Store) -> list[str]:
    """Files of the RUN in the order of their arrival, without the lease."""
    names = [path.rpartition("/one/")[2] for method, path, _ in s3.seen if method == "PUT"]
    return [name for name in names if name not in {"", ".lock"}]


def finish_one(uri: str, **changes: Any) -> None:
    with open_out(uri, **changes) as out:
        (out.path / "model").mkdir(exist_ok=True)
        (out.path / "model" / "weights").write_text("w")
        out.finish({"steps": 3})


# New, resumed, done


def test_the_config_is_in_the_store_as_soon_as_it_is_claimed(run: str) -> None:
    with open_out(run) as out:
        assert (out.state, out.uri) == ("new", run)
        assert out.path.is_dir()
        stored = yaml.safe_load(storage.read_bytes(f"{run}/config.yaml"))
        assert stored["verb"] == "pretrain"
        assert storage.list_names(run) == [".lock", "config.yaml", "run.log"]


def test_a_finished_run_is_done_on_any_host(run: str, next_host: NextHost, capsys: pytest.CaptureFixture[str]) -> None:
    finish_one(run)
    assert storage.list_names(run) == ["config.yaml", "model", "run.log", "summary.json"]
    next_host()
    with open_out(run) as out:
        assert out.state == "done"
        assert out.summary() == {"steps": 3}
        assert not (out.path / "model").exists(), "nothing is fetched that nobody needs"
    assert f"already done: {run}" in capsys.readouterr().out


def test_an_error_leaves_in_the_store_what_was_done_and_another_host_goes_on(run: str, next_host: NextHost) -> None:
    with pytest.raises(RuntimeError, match="stop"), open_out(run) as out:
        (out.path / "folds").mkdir()
        (out.path / "folds" / "1").write_text("one")
        (out.path / ".half").write_text("hidden")
        raise RuntimeError("stop")
    assert storage.list_names(run) == ["config.yaml", "folds", "run.log"]
    next_host()
    with open_out(run) as out:
        assert out.state == "resume"
        assert (out.path / "folds" / "1").read_text() == "one"
        (out.path / "folds" / "1").unlink()
        out.finish({})
    files = [name.removeprefix(f"{run}/") for name in storage.list_files(run)]
    assert files == ["config.yaml", "run.log", "summary.json"], "what is gone here is gone there"


def test_the_summary_goes_up_after_all_else(run: str, s3: Store) -> None:
    s3.seen.clear()
    finish_one(run)
    puts = uploads(s3)
    assert puts[-2:] == ["model/weights", "summary.json"]


def test_only_what_changed_is_uploaded_again(run: str, s3: Store) -> None:
    with open_out(run) as out:
        (out.path / "a").write_text("a")
        (out.path / "b").write_text("b")
        out.push()
        s3.seen.clear()
        (out.path / "b").write_text("bb")
        out.push()
        assert uploads(s3) == ["b"]


def test_what_is_lazy_stays_in_the_store(run: str, next_host: NextHost) -> None:
    with open_out(run) as out:
        storage.write_text(storage.join(out.uri, "shards", "part-1"), "large")
    next_host()
    with open_out(run, lazy=["shards"]) as out:
        assert out.state == "resume"
        assert not (out.path / "shards").exists()
        out.finish({})
    assert storage.read_bytes(f"{run}/shards/part-1") == b"large"


def test_raised_epochs_take_the_summary_away_first(run: str, next_host: NextHost) -> None:
    finish_one(run)
    next_host()
    with open_out(run, epochs=20) as out:
        assert out.state == "resume"
        assert "summary.json" not in storage.list_names(run)
        assert (out.path / "model" / "weights").read_text() == "w"
    with pytest.raises(UsageError, match="epochs may grow but not shrink"):
        open_out(run)


def test_another_config_is_refused_and_nothing_changes(run: str, s3: Store) -> None:
    finish_one(run)
    before = files_in(s3)
    with pytest.raises(UsageError, match=f"--out {run}: lr differs .* use --overwrite or another --out"):
        open_out(run, lr=1.0)
    assert files_in(s3) == before


def test_overwriting_takes_the_manifest_away_first(run: str, s3: Store) -> None:
    finish_one(run)
    removed: list[str] = []

    def watch(method: str, path: str) -> int:
        removed.append(path) if method == "DELETE" else None
        return 0

    with s3.refusing(watch), open_out(run, overwrite=True, lr=1.0) as out:
        assert out.state == "new"
        assert storage.list_names(run) == [".lock", "config.yaml", "run.log"]
    assert removed[0].endswith("summary.json")


def test_an_overwriting_that_was_cut_off_goes_on(run: str) -> None:
    finish_one(run)
    storage.write_text(f"{run}/config.yaml", "verb: erase\nformat: 1\nerased: true\n")
    storage.remove(f"{run}/summary.json")
    with open_out(run, lr=1.0) as out:
        assert out.state == "new"
        assert "model" not in storage.list_names(run)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_others_is_left_alone(run: str, s3: Store, overwrite: bool) -> None:
    storage.write_text(f"{run}/holiday.jpg", "picture")
    with pytest.raises(UsageError, match="something that is not a result of rayograph"):
        open_out(run, overwrite=overwrite)
    assert storage.list_names(run) == ["holiday.jpg"]


def test_a_bucket_and_a_file_are_no_folders(run: str, s3: Store) -> None:
    with pytest.raises(UsageError, match="name a folder in it"):
        open_out(s3.bucket)
    storage.write_text(run, "text")
    with pytest.raises(UsageError, match="is a file, but a folder is needed"):
        open_out(run)


def test_a_usage_error_before_anything_was_written_leaves_nothing(run: str, s3: Store) -> None:
    with pytest.raises(UsageError, match="no such data"), open_out(run):
        raise UsageError("no such data")
    assert not storage.exists(run)


def test_credentials_in_any_field_are_refused_before_they_are_written(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="credentials in a URI"):
        OutDir.open(
            str(tmp_path / "run"),
            verb="v",
            config={"data": "s3://AKIA:SECRET@bucket/x"},
            identity={},
            raisable={},
            overwrite=False,
        )
    assert not (tmp_path / "run").exists()


# The lease


def test_a_second_writer_is_refused_while_the_first_one_lives(run: str, next_host: NextHost) -> None:
    with open_out(run):
        next_host()
        with pytest.raises(LockedError, match=f"{run}: another process is writing it .pid {os.getpid()} on "):
            open_out(run)
        time.sleep(2 * QUICK.stale)  # the lease is renewed
        with pytest.raises(LockedError):
            open_out(run)
    with open_out(run) as out:
        assert out.state == "resume"


def test_a_dead_process_of_this_host_is_followed_at_once(run: str) -> None:
    process = hold(run)
    with pytest.raises(LockedError, match=f"pid {process.pid} on {socket.gethostname()}"):
        OutDir.open(run, verb="v", config={}, identity={}, raisable={}, overwrite=False, pace=Pace(stale=100))
    process.kill()
    process.wait()
    began = time.monotonic()
    with OutDir.open(
        run, verb="v", config={}, identity={}, raisable={}, overwrite=False, pace=Pace(100, 100, 0)
    ) as out:
        assert time.monotonic() - began < 5
        assert (out.path / "part").read_text() == "of a killed process"


def test_a_dead_process_of_another_host_is_followed_when_its_lease_is_stale(run: str, next_host: NextHost) -> None:
    process = hold(run)
    process.kill()
    process.wait()
    next_host()
    with pytest.raises(LockedError, match="if it was killed on another machine, try again in"):
        OutDir.open(run, verb="v", config={}, identity={}, raisable={}, overwrite=False, pace=Pace(stale=100))
    time.sleep(QUICK.stale)
    with OutDir.open(run, verb="v", config={}, identity={}, raisable={}, overwrite=False, pace=QUICK) as out:
        assert out.state == "resume"
        assert (out.path / "part").read_text() == "of a killed process"


@pytest.mark.parametrize("minutes", [-10, 10])
def test_a_live_holder_whose_clock_is_wrong_keeps_its_lease(s3: Store, minutes: int) -> None:
    ended = threading.Event()

    def live() -> None:
        while not ended.is_set():
            take_over(s3.bucket, beat=time.time() + 60 * minutes)
            ended.wait(QUICK.beat)

    holder = threading.Thread(target=live)
    holder.start()
    try:
        time.sleep(2 * QUICK.beat)
        with pytest.raises(LockedError, match="pid 7 on elsewhere"):
            Lease(f"{s3.bucket}/.lock", "it", QUICK)
    finally:
        ended.set()
        holder.join()
    Lease(f"{s3.bucket}/.lock", "it", QUICK).discard()  # now it is dead


def test_who_lost_the_lease_stops_at_its_next_publication(run: str, s3: Store) -> None:
    with pytest.raises(LockedError, match=r"another process has taken over .pid 7 on elsewhere"), open_out(run) as out:
        take_over(run)
        (out.path / "late").write_text("late")
        out.push()
    assert "late" not in storage.list_names(run)
    assert json.loads(storage.read_bytes(f"{run}/.lock"))["holder"] == "other", "the lease of the other is left alone"


def test_a_lost_lease_ends_a_block_that_would_have_ended_well(run: str) -> None:
    with pytest.raises(LockedError, match="taken over"), open_out(run) as out:
        take_over(run)
        out.finish({"steps": 1})
    assert "summary.json" not in storage.list_names(run)


def test_a_lost_lease_does_not_hide_why_the_work_ended(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError, match="the real reason"), open_out(run):
        take_over(run)
        raise RuntimeError("the real reason")
    assert "warning: the last of it is not in the store" in "".join(capsys.readouterr())


def test_of_two_who_ask_at_once_one_has_it(s3: Store) -> None:
    """Both see no lease, then both write: the later one reads its own back."""
    uri = f"{s3.bucket}/.lock"

    def interfere(method: str, path: str) -> int:
        if method == "PUT" and not written:
            written.append(path)
        elif method == "HEAD" and written and len(written) == 1:
            written.append(path)
            take_over_in(s3)
        return 0

    written: list[str] = []
    with s3.refusing(interfere), pytest.raises(LockedError, match="pid 7 on elsewhere"):
        Lease(uri, "it", QUICK)


def take_over_in(s3: Store) -> None:
    with s3.refusing(lambda *_: 0):
        take_over(s3.bucket)


@pytest.mark.parametrize("meanwhile", ["nobody", "taken", "taken and ended"])
def test_after_a_store_was_out_of_reach_for_too_long_its_object_tells_whose_the_lease_is(
    meanwhile: str, s3: Store
) -> None:
    held = Lease(f"{s3.bucket}/.lock", "it", QUICK)
    held._ended.set()  # no sign of life comes between the lines below
    held._thread.join()
    with s3.refusing(lambda *_: 403):
        time.sleep(2 * QUICK.stale)
        held.refuse_if_taken()  # nobody is known to have it
        with pytest.raises(RayographError):
            held.check()
        with s3.refusing(lambda *_: 0):
            if meanwhile != "nobody":
                take_over(s3.bucket)
            if meanwhile == "taken and ended":
                storage.remove(f"{s3.bucket}/.lock")
            if meanwhile == "nobody":
                held.check()
                held.check()
            else:
                with pytest.raises(LockedError, match=r"it: (another process has taken over|its lease was gone)"):
                    held.check()
                with pytest.raises(LockedError, match="this run stops"):
                    held.refuse_if_taken()
    held.discard()


def test_a_lease_that_was_taken_over_is_known_without_asking_the_store(s3: Store) -> None:
    held = Lease(f"{s3.bucket}/.lock", "it", QUICK)
    held.refuse_if_taken()
    take_over(s3.bucket)
    time.sleep(3 * QUICK.beat)
    with s3.refusing(lambda *_: 403), pytest.raises(LockedError, match="another process has taken over"):
        held.refuse_if_taken()
    held.discard()
    assert storage.exists(f"{s3.bucket}/.lock"), "it is the other's"


# Single files


def test_a_single_file_is_published_whole_and_known_again(s3: Store, next_host: NextHost) -> None:
    uri = f"{s3.bucket}/a/answers.parquet"
    with claim(uri) as out:
        assert out.state == "new"
        out.tmp.write_text("rows")
        out.finish({"images": 1})
    assert storage.list_names(f"{s3.bucket}/a") == ["answers.parquet", "answers.parquet.json"]
    next_host()
    with claim(uri) as out:
        assert (out.state, out.summary()) == ("done", {"images": 1})
    with pytest.raises(UsageError, match=f"--out {uri}: model differs"):
        claim(uri, model="another")
    with claim(uri, model="another", overwrite=True) as out:
        out.tmp.write_text("others")
        out.finish({"images": 2})
    assert storage.read_bytes(uri) == b"others"


def test_a_single_file_that_was_not_finished_is_not_there(s3: Store) -> None:
    with pytest.raises(RuntimeError), claim(f"{s3.bucket}/x") as out:
        out.tmp.write_text("half")
        raise RuntimeError
    assert files_in(s3) == {}
    assert not out.tmp.exists()


def test_a_single_file_has_one_writer(s3: Store) -> None:
    with claim(f"{s3.bucket}/x"), pytest.raises(LockedError, match=r"s3://.*/x: another process is writing it"):
        claim(f"{s3.bucket}/x")


def test_who_lost_the_lease_of_a_single_file_does_not_publish_it(s3: Store) -> None:
    with pytest.raises(LockedError, match="taken over"), claim(f"{s3.bucket}/x") as out:
        take_over(s3.bucket, ".x.lock")
        out.tmp.write_text("late")
        out.finish({})
    assert not storage.exists(f"{s3.bucket}/x")
