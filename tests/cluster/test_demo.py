"""The demo: its commands are ones the command line takes, and its verdict claims no more than it saw."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster import cli, demo
from cluster.demo import Answer, DemoConfig, Step, Tools
from cluster.errors import RayographError, UsageError
from tests.runs import Pretrained, flags, pretrain_config


def summaries(before: list[float | None], after: list[float | None]) -> dict[str, Any]:
    """Summaries of the steps, with balanced accuracies as value, low, high."""
    metrics = [{"balanced_accuracy": {"value": v, "ci95": [low, high]}} for v, low, high in (before, after)]
    return {
        "dataset": {"images": 600, "seconds": 12.34567},
        "pretrain": {"epochs": 3},
        "scratch": {"metrics": metrics[0]},
        "transfer": {"metrics": metrics[1]},
        "search": {"trials": 4},
        "imagenet": {"metrics": metrics[1]},
        "index": {"vectors": 293},
    }


@pytest.mark.parametrize("data", [None, "a folder"])
def test_every_command_is_one_that_the_command_line_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some where" / "search").mkdir(parents=True)
    (tmp_path / "some where" / "search" / "best.yaml").write_text("lr: 0.002\nimage_size: 96\n")
    seen: list[Any] = []
    for name, verb in list(cli.VERBS.items()):

        def record(config: Any) -> None:
            seen.append(config)

        record.__annotations__["config"] = verb.config
        if name not in ("demo", "doctor"):
            monkeypatch.setitem(cli.VERBS, name, cli.Verb(record, verb.config))
    chain = demo.steps(DemoConfig(data=data, out="some where", overwrite=True))
    for step in chain.values():
        program, *arguments = shlex.split(step.text)
        assert program == "rayograph"
        cli.build_app().meta(arguments)
    cli.build_app().meta(list(demo.serve_command(chain, "--port", "0")))
    served = seen.pop()
    assert (served.model, served.index) == (str(chain["imagenet"].out), str(chain["index"].out))
    assert [config.out for config in seen] == [str(step.out) for step in chain.values()]
    assert (seen[5].lr, seen[5].image_size, seen[5].epochs) == (0.002, demo.IMAGENET_SIZE, demo.FINETUNE_EPOCHS)
    assert all(config.overwrite for config in seen)
    assert (seen[0].source, seen[3].init) == (data or f"phantom:{demo.PHANTOMS}", str(chain["pretrain"].out))


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ([0.5, 0.45, 0.55], [0.7, 0.6, 0.8], ["gained 0.200", "0.500 [0.450, 0.550]"]),
        ([0.7, 0.6, 0.8], [0.5, 0.45, 0.55], ["lost 0.200"]),
        ([0.5, 0.4, 0.6], [0.55, 0.45, 0.65], ["gained 0.050", "may be chance"]),
        ([None, None, None], [0.5, 0.4, 0.6], ["Undecided"]),
    ],
)
def test_the_verdict_claims_no_more_than_the_intervals_allow(
    before: list[float | None], after: list[float | None], words: list[str]
) -> None:
    text = demo.verdict(summaries(before, after))
    assert all(word in text for word in words)
    assert ("chance" in text) == any("chance" in word for word in words)


def answers(chain: dict[str, Step], questions: list[tuple[str, Path]]) -> list[Answer]:
    """What a service might say: the first picture is known, the last one like nothing."""
    hit = {"id": "a", "score": 0.5, "label": "healthy", "group": "g", "thumbnail": ""}
    return [
        Answer(
            name,
            file,
            {"classes": [{"label": "healthy", "probability": 0.75}], "in_domain": {"answer": name == questions[0][0]}},
            {"hits": [hit]},
        )
        for name, file in questions
    ]


def tools(drawn: list[Path]) -> Tools:
    """The demo's tools, with pictures of one pixel."""

    def questions(dataset: str, out: Path) -> list[tuple[str, Path]]:
        out.mkdir()
        return [("a cell", out / "cell.png"), ("a flower", out / "flower.png")]

    def draw(question: Path, hits: list[dict[str, Any]], path: Path) -> None:
        assert hits[0]["label"] == "healthy"
        path.write_bytes(b"picture")
        drawn.append(path)

    def curves(series: dict[str, list[float]], path: Path) -> None:
        path.write_bytes(repr(series).encode())

    return Tools(cli._write_report, questions, draw, curves)


def test_a_finished_chain_leaves_report_and_summary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = summaries([0.5, 0.45, 0.55], [0.7, 0.6, 0.8])

    def run(step: Step, meanwhile: object = None) -> None:
        step.out.mkdir(parents=True)
        (step.out / "summary.json").write_text(json.dumps(made[step.out.name]))

    monkeypatch.setattr(demo, "_run", run)
    monkeypatch.setattr(demo, "ask", answers)
    drawn: list[Path] = []
    summary = demo.demo(DemoConfig(out=str(tmp_path)), tools(drawn))
    assert summary["images"] == 600
    assert len(drawn) == 2
    assert [asked["in_domain"] for asked in summary["asked"]] == [True, False]  # type: ignore[attr-defined]
    page = (tmp_path / "report.html").read_text().replace("<wbr>", "")
    assert "gained 0.200" in page
    assert "+0.200" in page
    assert f"rayograph ingest phantom:{demo.PHANTOMS} --out {tmp_path}/dataset" in page
    assert "healthy (75%)" in page and "nothing like this was in training" in page
    said = capsys.readouterr().out
    assert "$ rayograph ingest" in said
    assert f"open the page:  rayograph serve --model {tmp_path}/imagenet --index {tmp_path}/index" in said
    assert json.loads((tmp_path / "summary.json").read_text())["images"] == 600


def test_a_step_that_fails_stops_the_chain_with_its_exit_code(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RayographError, match="stopped at: rayograph ingest") as caught:
        demo.demo(DemoConfig(data=str(tmp_path / "gone"), out=str(tmp_path / "demo")), tools([]))
    assert caught.value.exit_code == 2
    assert "gone" in capfd.readouterr().err


def test_nothing_of_training_is_imported() -> None:
    code = "import sys, cluster.demo; sys.exit('training' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def killed_chain(out: Path, killed: list[float]) -> dict[str, Step]:
    """Two finished pretrainings, of which the second one was started twice."""
    chain = {name: Step((name,), out / name) for name in ("pretrain", "killed")}
    for name, losses in (("pretrain", [3.0, 2.0, 1.0]), ("killed", killed)):
        rows = [{"event": "start", "from_step": 0, "pid": 1}]
        rows += [{"step": at, "loss": loss} for at, loss in enumerate(losses, 1)]
        rows += [{"event": "start", "from_step": 2, "pid": 1}] if name == "killed" else []
        chain[name].out.mkdir()
        (chain[name].out / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (chain["killed"].out / "summary.json").write_text(json.dumps({"receipt": {"sentence": "Proven: all."}}))
    return chain


@pytest.mark.parametrize(
    ("killed", "said"), [([3.0, 2.0, 1.0], "equal to the last bit"), ([3.0, 2.0, 1.1], "The two curves differ")]
)
def test_the_part_on_the_murder_tells_what_the_curves_and_the_receipt_say(
    killed: list[float], said: str, tmp_path: Path
) -> None:
    drawn: list[Path] = []
    part = demo.killed_part(killed_chain(tmp_path, killed), tmp_path, tools(drawn))
    assert said in part.paragraphs[0] and "checkpoint of step 2" in part.paragraphs[0]
    assert part.paragraphs[1] == "Proven: all."
    assert repr(killed) in part.figures[0][0].read_text()


def test_the_murderer_kills_one_worker_once_and_only_in_the_middle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    dead: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "kill", lambda pid, how: dead.append((pid, how)))
    look = demo._murderer(Step(("pretrain",), tmp_path), after=2)
    look()
    rows = [{"event": "start", "from_step": 0, "pid": 77}, {"step": 1, "loss": 1.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    look()
    assert dead == []
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 2, "loss": 1.0}) + "\n")
    look()
    look()
    assert dead == [(77, signal.SIGKILL)]
    assert "kill -9 77" in capsys.readouterr().out


def test_a_run_that_nobody_killed_is_not_said_to_have_been(tmp_path: Path) -> None:
    chain = killed_chain(tmp_path, [3.0, 2.0, 1.0])
    file = chain["killed"].out / "metrics.jsonl"
    file.write_text("".join(line for line in file.read_text().splitlines(True) if '"from_step": 2' not in line))
    part = demo.killed_part(chain, tmp_path, tools([]))
    assert "before one of its workers could be killed" in part.paragraphs[0] and "kill -9" not in part.paragraphs[0]


def test_on_a_cluster_nobody_is_killed_by_a_number_of_another_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    with pytest.raises(UsageError, match="unset it"):
        demo.demo(DemoConfig(out=str(tmp_path / "demo"), kill=True), tools([]))
    assert not (tmp_path / "demo").exists()


@pytest.mark.chaos  # minutes; that killed workers leave one curve, the kill matrix shows to CI
@pytest.mark.ray
def test_a_worker_that_is_really_killed_leaves_one_line_of_two_curves_and_a_proof(
    pretrained: Pretrained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    config = pretrain_config(Path(pretrained.config.data), tmp_path / "killed")
    command = (*flags(config), "--receipt", str(tmp_path / "receipt"), "--no-probe")
    chain = {"pretrain": Step(("pretrain",), pretrained.run), "killed": Step(command, tmp_path / "killed")}
    steps = demo._steps_of(chain["pretrain"])
    demo._run(chain["killed"], demo._murderer(chain["killed"], steps // 2))
    part = demo.killed_part(chain, tmp_path, replace(tools([]), draw_curves=cli._draw_curves))
    assert "  kill -9 " in capfd.readouterr().out
    told, proof = part.paragraphs
    again = re.search(r"was killed \(kill -9\)\. It went on by itself from its checkpoint of step (\d+)", told)
    assert again and 0 < int(again[1]) < steps
    assert f"The losses of all {steps} steps are equal to the last bit." in told
    assert proof.startswith(f"Proven: 200 images, each shown once in each of {config.epochs} epochs, in the planned")
    assert part.figures[0][0].read_bytes().startswith(b"\x89PNG")
