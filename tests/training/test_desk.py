"""The desk without Ray: what stands in the metrics, who may write them, and when a run is given up."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster import parts
from cluster.errors import RayographError
from tests.runs import wait_until
from tests.s3 import Store
from training import desk, launch
from training.desk import IDLE_STARTS, METRICS, Desk, Place, born, read_metrics
from training.launch import DATA_PATIENCE, START_PATIENCE_S, Team, stuck


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Desk]:
    with_run = Desk()
    assert with_run.open(str(tmp_path), str(tmp_path), 0)
    yield with_run
    with_run.close()


def row(step: int, **more: Any) -> dict[str, Any]:
    plotted = dict.fromkeys(desk.PLOTTED, 1.0)
    return {"step": step, "samples": step * 8, **plotted, **more}


def start(run: Desk, step: int = 0, workers: int = 2) -> dict[str, Any]:
    return run.begin({"from_step": step, "workers": workers, "device": "cpu", "pid": 1, "host": "h"})


def steps(folder: Path) -> list[int]:
    return [r["step"] for r in read_metrics((folder / METRICS).read_text()) if "step" in r]


def test_rows_are_there_for_a_reader_as_soon_as_they_are_written(run: Desk, tmp_path: Path) -> None:
    group = start(run)["group"]
    run.write(group, [row(1), row(2)])
    assert steps(tmp_path) == [1, 2]
    seen = run.look()
    assert (seen["step"], seen["samples"], seen["loss"], seen["world"]) == (2, 16, 1.0, 2)


def test_a_start_drops_the_rows_after_its_step_and_what_a_kill_cut_off(run: Desk, tmp_path: Path) -> None:
    group = start(run)["group"]
    run.write(group, [row(n) for n in range(1, 6)])
    run.note([{"probed_step": 2, "knn": 0.5}, {"probed_step": 4, "knn": 0.6}])
    with (tmp_path / METRICS).open("a") as file:
        file.write('{"step": 6, "los')
    start(run, step=3)
    assert steps(tmp_path) == [1, 2, 3]
    rows = read_metrics((tmp_path / METRICS).read_text())
    assert [r["probed_step"] for r in rows if "probed_step" in r] == [2]
    assert [r["from_step"] for r in rows if r.get("event") == "start"] == [0, 3]


def test_a_rank_of_a_group_that_was_given_up_writes_nothing_and_is_told_to_stop(run: Desk, tmp_path: Path) -> None:
    old = start(run)["group"]
    run.write(old, [row(1)])
    new = start(run, step=1)["group"]
    assert run.write(old, [row(2)]) is True
    assert run.write(new, [row(2)]) is False
    assert steps(tmp_path) == [1, 2]


def test_the_word_to_end_reaches_the_ranks_with_the_answer_to_their_rows(run: Desk) -> None:
    group = start(run)["group"]
    assert run.write(group, [row(1)]) is False
    run.order("regroup")
    assert run.write(group, [row(2)]) is True
    group = start(run, step=2)["group"]
    assert run.write(group, [row(3)]) is False, "that group has ended"
    run.order("stop")
    assert run.write(group, [row(4)]) is True
    group = start(run, step=4)["group"]
    assert run.write(group, [row(5)]) is True, "for good"


def test_a_flush_waits_for_rows_that_are_on_their_way(run: Desk) -> None:
    group = start(run)["group"]
    flushed = threading.Event()

    def flush() -> None:
        run.flush(group, 2)
        flushed.set()

    thread = threading.Thread(target=flush)
    thread.start()
    run.write(group, [row(1)])
    assert not flushed.wait(0.3)
    run.write(group, [row(2)])
    assert flushed.wait(5)
    thread.join()


def test_rows_that_never_arrive_are_no_durable_rows(run: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(desk, "ARRIVAL_S", 0.1)
    group = start(run)["group"]
    run.write(group, [row(1)])
    with pytest.raises(RayographError, match="step 2 did not arrive"):
        run.flush(group, 2)


def test_a_second_writer_of_the_same_run_waits_in_vain(
    run: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(desk, "WRITER_PATIENCE_S", 0.2)
    assert not Desk().open(str(tmp_path), str(tmp_path), 0)
    run.close()
    assert Desk().open(str(tmp_path), str(tmp_path), 0)


def test_a_run_that_starts_again_and_again_without_a_new_step_is_given_up(run: Desk) -> None:
    group = start(run)["group"]
    run.write(group, [row(n) for n in range(1, 8)])
    answers = []
    for _ in range(IDLE_STARTS + 1):
        answers.append(start(run, step=4))
        run.write(answers[-1]["group"], [row(n) for n in range(5, 8)])  # never beyond 7
    assert [bool(a["refused"]) for a in answers] == [False] * IDLE_STARTS + [True]
    assert "did not get beyond step 7" in answers[-1]["refused"]
    assert run.look()["failure"] == {"kind": "RayographError", "message": answers[-1]["refused"]}


def test_a_run_that_gets_on_between_its_restarts_is_never_given_up(run: Desk) -> None:
    for step in range(4 * IDLE_STARTS):
        answer = start(run, step=step)
        assert not answer["refused"]
        run.write(answer["group"], [row(step + 1)])


def test_a_group_that_finds_no_checkpoint_where_there_was_one_changes_nothing(run: Desk, tmp_path: Path) -> None:
    """A host that does not see --out, or a disk that was swept: to begin anew would cut the metrics off."""
    group = start(run)["group"]
    run.write(group, [row(n) for n in range(1, 8)])
    run.saved(5)
    assert run.look()["saved"] == 5
    refused = run.begin({"from_step": 0, "workers": 2, "device": "cpu", "pid": 1, "host": "lonely"})["refused"]
    assert "lonely found no intact checkpoint" in refused and "step 5" in refused
    assert steps(tmp_path) == [1, 2, 3, 4, 5, 6, 7]
    assert run.look()["failure"] == {"kind": "RayographError", "message": refused}


def test_a_desk_that_takes_the_place_of_another_knows_what_was_saved(tmp_path: Path) -> None:
    for saved, refused in ((0, False), (3, True), (None, True)):
        (tmp_path / f"{saved}").mkdir()
        run = Desk()
        assert run.open(str(tmp_path / f"{saved}"), str(tmp_path), 9, saved)
        assert bool(start(run)["refused"]) == refused
        run.close()


def test_a_group_that_has_ended_publishes_no_checkpoint_and_fails_nobody(run: Desk) -> None:
    old = start(run)["group"]
    run.write(old, [row(1), row(2)])
    new = start(run)["group"]
    run.write(new, [row(1), row(2)])
    with pytest.raises(RayographError, match="has ended"):
        run.flush(old, 2)
    run.fail("RayographError", "its checkpoint", old)
    assert run.look()["failure"] is None
    run.flush(new, 2)
    run.fail("DataError", "a rank that comes up", 0)
    assert run.look()["failure"] == {"kind": "DataError", "message": "a rank that comes up"}


def test_a_disk_that_is_full_when_a_group_starts_is_told_in_one_line(
    run: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_rows: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch, pytest.raises(RayographError, match="the disk is full"):
        patch.setattr(run, "_write", full)
        start(run)


def test_a_disk_that_is_full_is_told_in_one_line_wherever_rows_meet_it(run: Desk, tmp_path: Path) -> None:
    group = start(run)["group"]
    run._file.close()
    run._file = open("/dev/full", "w", encoding="utf-8")  # noqa: PTH123, SIM115
    assert run.write(group, [row(1)]) is True
    told = f"{tmp_path / METRICS}: the disk is full; free some space and run the same command again"
    assert run.look()["failure"] == {"kind": "RayographError", "message": told}
    run._last = 1
    with pytest.raises(RayographError, match="the disk is full"):
        run.flush(group, 1)
    with contextlib.suppress(OSError):
        run._file.close()
    run._file = (tmp_path / METRICS).open("a")


def test_a_stopped_run_is_given_the_time_that_its_steps_and_its_checkpoint_take() -> None:
    step, save = seen(("step", 0.1), since_step=0.1), seen(("save", 0.1), ("step", 0.1), since_step=0.1)
    assert launch.patience_to_stop({}) == launch.patience_to_stop(step) == launch.STOP_PATIENCE_S
    assert launch.patience_to_stop(save) == launch.STOP_PATIENCE_S + launch.SAVE_PATIENCE_S
    assert launch.patience_to_stop(step | {"longest": 6.0}) == 12.0
    assert launch.patience_to_stop(step | {"longest": 600.0}) == launch.SAVE_PATIENCE_S


def test_a_rank_that_begins_to_save_says_so_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    from training import line

    sent: list[str] = []

    class Far:
        """A desk that is called from afar, and answers at once."""

        def __init__(self, *, keep: bool = False) -> None:
            self._keep = keep

        def __getattr__(self, name: str) -> Far:
            return Far(keep=name == "beat")

        def remote(self, *values: object) -> object:
            if self._keep:
                sent.append(str(values[3]))
            return "reference"

    class Context:
        def get_node_id(self) -> str:
            return "node"

    monkeypatch.setattr(line, "BEAT_S", 60.0)
    monkeypatch.setattr(ray.util, "list_named_actors", lambda: ["desk-1"])
    monkeypatch.setattr(ray, "get_actor", lambda name: Far())
    monkeypatch.setattr(ray, "get_runtime_context", Context)
    monkeypatch.setattr(ray, "wait", lambda references, **_: (references, []))
    one = line.Line("desk", 0)
    one.now("step", 1)
    one.now("save")
    wait_until(lambda: sent == ["save"], 5, "a beat long before the next one is due")
    one.close()


def test_after_a_deliberate_error_no_group_starts_again(run: Desk) -> None:
    start(run)
    run.fail("DataError", "the loss is nan")
    run.fail("RayographError", "a consequence")
    assert start(run)["refused"] == "the loss is nan"
    assert run.look()["failure"] == {"kind": "DataError", "message": "the loss is nan"}


def test_on_a_store_what_was_flushed_is_there_and_what_a_later_start_dropped_is_not(s3: Store, tmp_path: Path) -> None:
    uri = f"{s3.bucket}/run"
    first = Desk()
    first.open(str(tmp_path / "a"), uri, 0)
    group = start(first)["group"]
    first.write(group, [row(n) for n in (1, 2, 3)])
    assert published(uri) == []
    first.flush(group, 3)
    assert published(uri) == [1, 2, 3]
    with s3.refusing(lambda method, path: 403 if method == "PUT" else 0):
        first.write(group, [row(4)])
        with pytest.raises(RayographError):
            first.flush(group, 4)
    second = Desk()
    second.open(str(tmp_path / "b"), uri, 2)
    group = start(second, step=2)["group"]
    second.write(group, [row(3), row(4), row(5)])
    second.flush(group, 5)
    first.close()  # one that was given up, but still lived: its rows of step 4 come too late to count
    assert published(uri) == [1, 2, 3, 4, 5]
    second.close()


def published(uri: str) -> list[int]:
    return [r["step"] for r in read_metrics(parts.read(f"{uri}/{METRICS}.parts")) if "step" in r]


# Ranks that hang


def seen(*pulses: tuple[str, float], since_step: float, longest: float = 0.1, steps: int = 9) -> dict[str, Any]:
    """What the desk tells of ranks in these phases, heard of so many seconds ago."""
    place = Place("node", 1, "0")
    ranks = {rank: (place, phase, 9, ago) for rank, (phase, ago) in enumerate(pulses)}
    return {"group": 1, "since_step": since_step, "longest": longest, "pulses": ranks, "step": 9, "steps": steps}


def test_a_rank_that_fell_silent_is_the_one_that_hangs() -> None:
    assert stuck(seen(("step", 0.5), ("step", 70), since_step=70), 60) == [1]
    assert stuck(seen(("step", 0.5), ("step", 50), since_step=50), 60) == []


def test_where_all_live_and_none_gets_on_all_are_replaced() -> None:
    assert stuck(seen(("step", 0.5), ("save", 0.5), since_step=70), 60) == [0, 1]


def test_waiting_for_data_or_starting_is_not_hanging_for_a_long_time() -> None:
    assert stuck(seen(("step", 0.5), ("data", 0.5), since_step=70), 60) == []
    assert stuck(seen(("step", 0.5), ("data", 0.5), since_step=60 * DATA_PATIENCE + 1), 60) == [0, 1]
    assert stuck(seen(("start", 0.5), ("start", 100), since_step=200, steps=0), 60) == []
    assert stuck(seen(("start", 0.5), ("start", 550), since_step=START_PATIENCE_S + 1, steps=0), 60) == [1]
    assert stuck(seen(("step", 0.5), ("start", 70), since_step=70, steps=1), 60) == [1], "it was stopped right after"


def test_patience_grows_with_the_longest_step_seen() -> None:
    assert stuck(seen(("step", 0.5), ("step", 80), since_step=90, longest=40), 60) == []


def test_ranks_that_come_up_are_not_taken_for_those_of_the_group_that_ended(run: Desk) -> None:
    place = Place("node", 1, "0")
    group = start(run)["group"]
    run.write(group, [row(1), row(2)])
    for rank in (0, 1):
        run.beat(group, rank, place, "step", 2)
    assert run.look()["steps"] == 2
    run.beat(0, 0, place, "start", 0)
    seen = run.look()
    assert (seen["steps"], list(seen["pulses"])) == (0, [0]), "the next group has not made a step yet"
    new = start(run, step=2)["group"]
    run.beat(0, 1, place, "start", 0)  # it has not heard of its group yet
    assert (run.look()["steps"], list(run.look()["pulses"])) == (0, [1])
    run.beat(new, 0, place, "step", 3)
    run.beat(new, 1, place, "step", 3)
    run.write(new, [row(3)])
    run.beat(group, 1, place, "step", 2)  # of the group that ended
    assert run.look()["steps"] == 1 and {p[2] for p in run.look()["pulses"].values()} == {3}


def test_a_process_is_killed_and_another_one_with_its_number_is_not() -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        process.send_signal(signal.SIGSTOP)
        assert not launch._kill(Place("node", process.pid, "1"))
        assert process.poll() is None
        assert launch._kill(Place("node", process.pid, born(process.pid)))
        assert process.wait(10) == -signal.SIGKILL
        assert not launch._kill(Place("node", process.pid, "1"))
    finally:
        process.kill()


def test_birth_tells_processes_apart() -> None:
    assert born(os.getpid()) and born(os.getpid()) != born(1)
    assert born(2**22 + 1) == ""


# Room for ranks


def test_ranks_fit_where_a_node_has_all_that_one_takes() -> None:
    team = Team(1, 4, "cpu", "trainer")
    assert team.elastic and not Team(2, 2, "cpu").elastic
    assert team.room([{"CPU": 8.0}, {"CPU": 2.0, "trainer": 1.0}, {"CPU": 1.0, "trainer": 2.0}]) == 2
    assert team.room([{"CPU": 64.0, "trainer": 64.0}]) == 4
    assert Team(1, 9, "cuda").room([{"CPU": 64.0}, {"CPU": 1.0, "GPU": 8.0}]) == 8


def test_ranks_on_cpus_leave_one_that_can_read() -> None:
    team, two = Team(1, 8, "cpu"), [{"CPU": 2.0}, {"CPU": 2.0}]
    assert team.room(two) == 3 and Team(1, 2, "cpu").room(two) == 2
    reads = Team(1, 8, "cpu", reading="data")
    assert reads.room([{"CPU": 2.0}, {"CPU": 2.0, "data": 1.0}]) == 1, "two might fill the one that reads"
    assert Team(1, 8, "cpu", "trainer", "data").room([{"CPU": 2.0, "trainer": 2.0}, {"CPU": 2.0, "data": 1.0}]) == 2
    assert Team(1, 8, "cpu", "all", "all").room([{"CPU": 3.0, "all": 2.0}]) == 2, "it may hold no more"
    assert reads.room(two) == 4, "fewer would not be read for either"
    assert Team(1, 8, "cuda").room([{"CPU": 2.0, "GPU": 2.0}]) == 2, "they take no CPU"


def test_ray_train_alone_decides_where_the_reading_has_nodes_of_its_own() -> None:
    trainers, readers = {"CPU": 2.0, "trainer": 2.0}, {"CPU": 1.0, "data": 1.0}
    assert Team(1, 8, "cpu").crowds([{"CPU": 2.0}, {"CPU": 2.0}])
    assert not Team(1, 8, "cpu", "trainer").crowds([trainers, readers])
    assert Team(1, 8, "cpu", "trainer").crowds([trainers, trainers])
    assert not Team(1, 8, "cpu", "trainer", "data").crowds([trainers, readers])
    assert Team(1, 8, "cpu", "trainer", "data").crowds([trainers, {"CPU": 9.0}])
    assert not Team(2, 2, "cpu").crowds([trainers]) and not Team(1, 8, "cuda").crowds([trainers])


def test_rows_survive_a_line_that_is_no_json() -> None:
    good = json.dumps(row(1))
    assert [r["step"] for r in read_metrics(f"{good}\nnonsense\n{json.dumps(row(2))}\n")] == [1, 2]


@pytest.fixture
def going(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """The nodes that Ray says are being taken away."""
    from ray._private.state import state

    nodes: dict[str, int] = {}
    monkeypatch.setattr(state, "get_draining_nodes", lambda: nodes)
    monkeypatch.setattr(launch, "HOSTS_S", 0.0)
    return nodes


def test_a_host_that_is_about_to_go_is_told_once_to_a_group_that_has_a_rank_on_it(
    going: dict[str, int], capsys: pytest.CaptureFixture[str]
) -> None:
    hosts, now = launch._Hosts(Team(2, 2, "cpu")), seen(("step", 0.1), since_step=0.1) | {"group": 1, "world": 2}
    assert not hosts.changed(now)
    going["another"] = 0
    assert not hosts.changed(now)
    going["node"] = 0
    assert hosts.changed(now)
    assert "about to be taken away" in capsys.readouterr().err
    assert not hosts.changed(now), "it has been told"
    going.clear()
    assert hosts.going == {"node", "another"}, "they may be gone, and still count for Ray Train"
    going["node"] = 0
    assert hosts.changed(now | {"group": 2}), "the next group has a rank there again"


def test_a_team_is_as_small_as_the_nodes_want_it() -> None:
    a, b = {"CPU": 2.0}, {"CPU": 2.0}
    assert Team(1, 8, "cpu").within([a, b]) == Team(1, 3, "cpu")
    assert Team(1, 8, "cpu").within([a]) == Team(1, 1, "cpu")
    assert Team(1, 8, "cpu").within([]) == Team(1, 1, "cpu"), "it waits for the least"
    assert Team(3, 3, "cpu").within([a]) == Team(3, 3, "cpu"), "it waits for another node"


def test_ranks_that_wait_for_what_nothing_can_read_make_room_for_fewer(
    going: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    nodes = [{"NodeID": n, "Alive": True, "Resources": {"CPU": 1.0}} for n in "abc"]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    waits = seen(("data", 0.1), ("step", 0.1), since_step=launch.STARVED_S + 1) | {"group": 1, "world": 2}
    hosts = launch._Hosts(Team(1, 4, "cpu"))
    assert not hosts.starved(waits), "two train and one reads"
    nodes[2]["Alive"] = False
    assert hosts.starved(waits)
    assert not hosts.starved(waits | {"since_step": 1.0}) and not hosts.starved(waits | {"world": 1})
    assert not hosts.starved(waits | seen(("step", 0.1), ("save", 0.1), since_step=99.0))
    nodes[2]["Alive"] = True
    hosts.going.add("c")
    assert hosts.starved(waits), "it gets nothing new to do"
    for team in (Team(2, 4, "cpu"), Team(2, 2, "cpu"), Team(1, 4, "cuda"), Team(1, 4, "cpu", reading="none")):
        assert not launch._Hosts(team).starved(waits), "fewer are not wanted, or they take no CPU"


def test_nodes_that_are_gone_or_going_do_not_stay(going: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    nodes = [{"NodeID": n, "Alive": n != "dead", "Resources": {"CPU": c}} for c, n in enumerate(("a", "b", "dead"))]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    hosts = launch._Hosts(Team(1, 8, "cpu"))
    assert hosts.staying() == [{"CPU": 0}, {"CPU": 1}]
    going["a"] = 0
    hosts.changed(seen(("step", 0.1), since_step=0.1) | {"world": 8})
    assert hosts.staying() == [{"CPU": 1}]


def test_the_growth_of_a_cluster_is_tried_once(going: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    nodes = [{"NodeID": "a", "Alive": True, "Resources": {"CPU": 1.0}}]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    monkeypatch.setattr(launch, "SETTLED_S", 0.2)
    hosts = launch._Hosts(Team(1, 2, "cpu"))
    alone = {"group": 1, "world": 1, "pulses": {}}
    assert not hosts.changed(alone)
    nodes.append({"NodeID": "b", "Alive": False, "Resources": {"CPU": 1.0}})
    assert not hosts.changed(alone)
    nodes[1]["Alive"], going["b"] = True, 0
    time.sleep(0.25)
    assert not hosts.changed(alone), "it is being taken away"
    nodes.append({"NodeID": "c", "Alive": True, "Resources": {"CPU": 2.0}})
    assert not hosts.changed(alone), "Ray Train does not know of it yet"
    time.sleep(0.25)
    assert hosts.changed(alone)
    assert not hosts.changed(alone | {"group": 2}), "Ray did not take it up: asking again would only restart the run"
    assert not hosts.changed(alone | {"group": 3, "world": 2})


def test_before_the_desk_was_heard_nothing_hangs_and_no_host_has_changed() -> None:
    hosts = launch._Hosts(Team(1, 2, "cpu"))
    launch._Watchdog(1.0).look({}, hosts.starved)
    assert not hosts.changed({})
