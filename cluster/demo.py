"""The whole chain, small, as the very commands a user would type, each run as a process of its own.

Imports nothing of what it runs; what needs images or reports comes in as `Tools` from the command line.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

from cyclopts import Parameter

from cluster import storage
from cluster.errors import RayographError, UsageError

PHANTOMS = 600
PRETRAIN_EPOCHS = 15
FINETUNE_EPOCHS = 4
SEARCH_TRIALS, SEARCH_EPOCHS = 3, 2
SEARCH_SIZE, IMAGENET_SIZE = "96", "128"
"""The search looks at smaller images, to take minutes; what it found is then fitted at the weights' usual size."""
FOLDS = 3
KILL_CHECKPOINT_S = "10"
"""Short, for a run of a few minutes; the default is a minute."""
HITS = 5
WORKERS = 2
START_S = 180.0
"""How long the service may take to come up."""
GRACE_S = 30.0
"""How long a step may take to end by itself after it was asked to stop."""

METRICS = ("balanced_accuracy", "auroc", "kappa", "ece")


@dataclass(frozen=True)
class Part:
    """A part of the report: paragraphs, one table, and pictures with what they show."""

    heading: str
    paragraphs: tuple[str, ...] = ()
    headers: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    figures: tuple[tuple[Path, str], ...] = ()


@dataclass(frozen=True)
class Tools:
    """What the demo needs of packages that it may not know."""

    write_report: Callable[[Path, str, list[Part]], None]
    """Writes a report to a path, under a title."""
    questions: Callable[[str, Path], list[tuple[str, Path]]]
    """Names and files of pictures to ask about, from a DATASET, written to a folder."""
    draw_answer: Callable[[Path, list[dict[str, Any]], Path], None]
    """Draws a picture with its hits to a path."""
    draw_curves: Callable[[dict[str, list[float]], Path], None]
    """Draws lines by name to a path."""


@dataclass(frozen=True)
class Answer:
    """What the service said of one picture."""

    name: str
    file: Path
    classified: dict[str, Any]
    found: dict[str, Any]

    @property
    def likeliest(self) -> str:
        first = self.classified["classes"][0]
        return f"{first['label']} ({first['probability']:.0%})"

    @property
    def verdict(self) -> str:
        known = self.classified["in_domain"]["answer"]
        return {True: "like the training set", False: "nothing like this was in training", None: "cannot tell"}[known]


@Parameter(name="*")
@dataclass(frozen=True)
class DemoConfig:
    _: KW_ONLY
    data: str | None = None
    "A labelled SOURCE to use in place of generated phantoms."
    out: str = "demo"
    "Where dataset, runs and report go."
    kill: bool = False
    "Also pretrain once more while one of the workers is murdered, and show what that changes."
    overwrite: bool = False
    "Do every step anew."


@dataclass(frozen=True)
class Step:
    """One command of the chain and the folder it fills."""

    arguments: tuple[str, ...]
    out: Path

    @property
    def text(self) -> str:
        return shlex.join(("rayograph", *self.arguments))

    def pictures(self) -> list[Path]:
        return sorted(self.out.glob("figures/*.png"))


def demo(config: DemoConfig, tools: Tools) -> dict[str, object]:
    """`report.html` and `summary.json` stand in `--out`, computed by the steps; finished steps are not run again.

    Raises:
        UsageError: `kill` on a cluster.
        RayographError: a step failed; it has said why, and the error carries its exit code.
    """
    if config.kill and "RAY_ADDRESS" in os.environ:
        raise UsageError("--kill: kills a process of this machine, and RAY_ADDRESS names a cluster; unset it")
    out = storage.local_path(config.out)
    with storage.explained(out):
        out.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    chain = steps(config)
    for name, step in chain.items():
        print(f"$ {step.text}", flush=True)
        _run(step, _murderer(step, _steps_of(chain["pretrain"]) // 2) if name == "killed" else None)
    summaries = {name: storage.read_json(step.out / "summary.json") for name, step in chain.items()}
    answers = ask(chain, tools.questions(str(chain["dataset"].out), out / "questions"))
    compared = compare(summaries, chain)
    survived = [killed_part(chain, out, tools)] if config.kill else []
    parts = [*compared[:-1], served_part(answers, out, tools), *survived, compared[-1]]  # the figures come last
    tools.write_report(out / "report.html", "Rayograph demo: from images to endpoints", parts)
    seconds = time.monotonic() - start
    summary = _summary(summaries, answers) | {"seconds": round(seconds, 1)}
    storage.write_json(out / "summary.json", summary)
    print(f"\n{verdict(summaries)}\nreport: {storage.printable(out / 'report.html')}  ({seconds / 60:.1f} minutes)")
    print(f"open the page:  {shlex.join(('rayograph', *serve_command(chain)))}")
    return summary


def steps(config: DemoConfig) -> dict[str, Step]:
    """The commands in order: one dataset, one pretraining, the same probe without it and from it, a small search for
    the settings of fine-tuned ImageNet weights, their cross-validation, and the index of labelled images under them.

    A linear probe asks what a network already knows, in seconds; the fine-tuned weights are a yardstick, and served.
    """
    out = Path(config.out)
    dataset, pretrained = out / "dataset", out / "pretrain"
    probe = ("--task", "linear", "--folds", str(FOLDS))
    search, imagenet = out / "search", out / "imagenet"
    trials = ("--trials", str(SEARCH_TRIALS), "--epochs", str(SEARCH_EPOCHS), "--image-size", SEARCH_SIZE)
    size = ("--image-size", IMAGENET_SIZE)
    finetune = ("--config", str(search / "best.yaml"), *size, "--folds", str(FOLDS), "--epochs", str(FINETUNE_EPOCHS))
    commands: dict[str, tuple[str, ...]] = {
        "dataset": ("ingest", config.data or f"phantom:{PHANTOMS}"),
        "pretrain": ("pretrain", str(dataset), "--epochs", str(PRETRAIN_EPOCHS), "--workers", str(WORKERS)),
        "scratch": ("transfer", str(dataset), "--init", "none", *probe),
        "transfer": ("transfer", str(dataset), "--init", str(pretrained), *probe),
        "search": ("tune", "--study", "transfer", "--data", str(dataset), *trials),
        "imagenet": ("transfer", str(dataset), *finetune),
        "index": ("index", "build", "--model", str(imagenet), "--data", str(dataset), "--labelled"),
    }
    if config.kill:
        killed = ("--epochs", str(PRETRAIN_EPOCHS), "--workers", str(WORKERS), "--receipt", str(out / "receipt"))
        commands["killed"] = ("pretrain", str(dataset), *killed, "--checkpoint-s", KILL_CHECKPOINT_S, "--no-probe")
    extra = ("--overwrite",) if config.overwrite else ()
    return {name: Step((*words, "--out", str(out / name), *extra), out / name) for name, words in commands.items()}


def _steps_of(pretrained: Step) -> int:
    return int(storage.read_json(pretrained.out / "summary.json")["steps"])


def _murderer(step: Step, after: int) -> Callable[[], None]:
    """To be called while a pretraining runs: `after` that many steps one of its workers is killed, once."""
    done = threading.Event()

    def look() -> None:
        rows = _metrics(step.out)
        losses = [row["step"] for row in rows if "step" in row]
        starts = [row for row in rows if row.get("event") == "start"]
        if done.is_set() or not starts or not losses or losses[-1] < after:
            return
        done.set()
        if len(starts) == 1:  # else it was done before this command was given again
            os.kill(starts[0]["pid"], signal.SIGKILL)
            print(f"  kill -9 {starts[0]['pid']}: worker 0 of {WORKERS}, after step {losses[-1]}", flush=True)

    return look


def _metrics(run: Path) -> list[dict[str, Any]]:
    """The whole rows of a run's `metrics.jsonl` so far."""
    file = run / "metrics.jsonl"
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def killed_part(chain: dict[str, Step], out: Path, tools: Tools) -> Part:
    """The report's part on the run whose worker was killed, beside the one that was left alone."""
    alone, killed = (_metrics(chain[name].out) for name in ("pretrain", "killed"))
    summary = storage.read_json(chain["killed"].out / "summary.json")
    curves = {
        "left alone": [r["loss"] for r in alone if "step" in r],
        "killed": [r["loss"] for r in killed if "step" in r],
    }
    same = curves["left alone"] == curves["killed"]
    picture = out / "killed.png"
    tools.draw_curves(curves, picture)
    starts = [row["from_step"] for row in killed if row.get("event") == "start"]
    verdict = (
        f"The losses of all {len(curves['killed'])} steps are equal to the last bit."
        if same
        else "The two curves differ, which they should not: please report it."
    )
    happened = (
        f"in its middle one of its {WORKERS} workers was killed (kill -9). It went on by itself from its checkpoint of "
        f"step {starts[-1]}"
        if len(starts) > 1
        else "it was at its end before one of its workers could be killed"
    )
    told = (f"The same pretraining was run again, and {happened}. {verdict}", summary["receipt"]["sentence"])
    print(f"\n{verdict} {summary['receipt']['sentence']}")
    return Part("A worker was killed", told, figures=((picture, "Loss by step: both runs, one line."),))


def serve_command(chain: dict[str, Step], *extra: str) -> tuple[str, ...]:
    """The command that serves what the chain made."""
    return ("serve", "--model", str(chain["imagenet"].out), "--index", str(chain["index"].out), *extra)


def ask(chain: dict[str, Step], questions: list[tuple[str, Path]]) -> list[Answer]:
    """What the service answers to each picture, at both endpoints; it is started for that, and stopped.

    Raises:
        RayographError: it did not come up, or refused a picture.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = serve_command(chain, "--port", str(port))
    print(f"$ {shlex.join(('rayograph', *command))}", flush=True)
    process = subprocess.Popen([sys.executable, "-m", "cluster.cli", *command])
    try:
        _wait_ready(process, f"http://127.0.0.1:{port}")
        return [
            Answer(
                name,
                file,
                _post(f"http://127.0.0.1:{port}/v1/classify", file),
                _post(f"http://127.0.0.1:{port}/v1/search?k={HITS}", file),
            )
            for name, file in questions
        ]
    finally:
        _stop(process, signal.SIGINT)


def _wait_ready(process: subprocess.Popen[bytes], url: str) -> None:
    until = time.monotonic() + START_S
    while True:
        if process.poll() is not None:
            raise RayographError("the demo stopped at: rayograph serve")
        if time.monotonic() > until:
            raise RayographError(f"the service did not come up within {START_S:g} seconds")
        try:
            with urllib.request.urlopen(f"{url}/readyz", timeout=10):
                return
        except OSError:
            time.sleep(0.3)


def _post(url: str, file: Path) -> dict[str, Any]:
    request = urllib.request.Request(url, file.read_bytes(), {"Content-Type": "application/octet-stream"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return dict(json.loads(answer.read()))
    except urllib.error.HTTPError as error:
        raise RayographError(
            f"{file}: the service refused it: {error.read().decode(errors='replace')[:300]}"
        ) from error


def served_part(answers: list[Answer], out: Path, tools: Tools) -> Part:
    """The report's part on what the endpoints said."""
    rows, figures = [], []
    for answer in answers:
        nearest = answer.found["hits"][0]
        rows.append(
            (
                answer.name,
                answer.likeliest,
                answer.verdict,
                f"{nearest['label'] or 'no label'} ({nearest['score']:.2f})",
            )
        )
        picture = out / "questions" / f"{answer.file.stem}-answer.png"
        tools.draw_answer(answer.file, answer.found["hits"], picture)
        figures.append(
            (picture, f"{answer.name}: {answer.likeliest}; {answer.verdict}. Right of it its nearest cases.")
        )
    note = (
        "The fine-tuned model and the index of labelled images were served, and asked over HTTP. The last picture is "
        "one that a model of such images should refuse."
    )
    headers = ("picture", "likeliest class", "in domain", "nearest case (similarity)")
    return Part("What the endpoints say", (note,), headers, tuple(rows), tuple(figures))


def compare(summaries: dict[str, Any], chain: dict[str, Step]) -> list[Part]:
    """The report's parts: the comparison first, then the command and result of each step, then their pictures."""
    note = (
        "Both are linear probes of frozen features, on the same images, folds and seed; the last is a yardstick, "
        "ImageNet weights that were fine-tuned. Intervals are 95 %." + _chance(summaries)
    )
    headers = ("metric", "random weights", "pretrained here", "difference", "ImageNet, fine-tuned")
    commands = tuple((name, step.text, _facts(summaries[name])) for name, step in chain.items())
    pictures = [(file, f"{name}: {file.stem}") for name, step in chain.items() for file in step.pictures()]
    return [
        Part("Does pretraining help?", (verdict(summaries), note), headers, _metric_rows(summaries)),
        Part("The steps", ("Each step's own report lies in its folder.",), ("step", "command", "result"), commands),
        Part("Figures", figures=tuple(pictures)),
    ]


def verdict(summaries: dict[str, Any]) -> str:
    """One sentence on what pretraining changed, that claims no more than the intervals allow."""
    before, after = (summaries[name]["metrics"]["balanced_accuracy"] for name in ("scratch", "transfer"))
    if not (_is_complete(before) and _is_complete(after)):
        return f"Undecided: balanced accuracy is {_interval(before)} without and {_interval(after)} with pretraining."
    change = after["value"] - before["value"]
    word = "gained" if change >= 0 else "lost"
    apart = after["ci95"][0] > before["ci95"][1] or after["ci95"][1] < before["ci95"][0]
    doubt = "" if apart else "; the intervals overlap, so at this size that may be chance"
    return (
        f"Pretraining {word} {abs(change):.3f} balanced accuracy in a linear probe: {_interval(before)} with random "
        f"weights, {_interval(after)} with the pretrained ones{doubt}."
    )


def _chance(summaries: dict[str, Any]) -> str:
    classes = summaries["scratch"].get("classes", [])
    return f" Guessing would reach a balanced accuracy of {1 / len(classes):.2f}." if classes else ""


def _is_complete(metric: dict[str, Any]) -> bool:
    return None not in (metric["value"], *metric["ci95"])


def _metric_rows(summaries: dict[str, Any]) -> tuple[tuple[str, ...], ...]:
    before, after, yardstick = (summaries[name]["metrics"] for name in ("scratch", "transfer", "imagenet"))
    shared = [name for name in METRICS if name in before and name in after and name in yardstick]
    return tuple(
        (
            _words(name),
            _interval(before[name]),
            _interval(after[name]),
            _change(before[name], after[name]),
            _interval(yardstick[name]),
        )
        for name in shared
    )


def _change(before: dict[str, Any], after: dict[str, Any]) -> str:
    if before["value"] is None or after["value"] is None:
        return "undefined"
    return f"{after['value'] - before['value']:+.3f}"


def _interval(metric: dict[str, Any]) -> str:
    if metric["value"] is None:
        return "undefined"
    low, high = metric["ci95"]
    span = "" if low is None or high is None else f" [{low:.3f}, {high:.3f}]"
    return f"{metric['value']:.3f}{span}"


def _facts(summary: dict[str, Any]) -> str:
    known = ("images", "ok", "groups", "epochs", "final_loss", "images_per_second", "trials", "vectors", "seconds")
    return ", ".join(f"{_words(name)} {_number(summary[name])}" for name in known if name in summary)


def _words(key: str) -> str:
    """The key of a summary as a reader of the report would say it."""
    return {"auroc": "AUROC", "ece": "calibration error (ECE)"}.get(key, key.replace("_per_", "/").replace("_", " "))


def _number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _summary(summaries: dict[str, Any], answers: list[Answer]) -> dict[str, object]:
    names = {"scratch": "scratch", "transfer": "pretrained", "imagenet": "imagenet"}
    metrics = {f"{new}_balanced_accuracy": summaries[old]["metrics"]["balanced_accuracy"] for old, new in names.items()}
    asked = [
        {"picture": a.name, "likeliest": a.likeliest, "in_domain": a.classified["in_domain"]["answer"]} for a in answers
    ]
    return {"metrics": metrics, "images": summaries["dataset"].get("images"), "asked": asked}


def _run(step: Step, meanwhile: Callable[[], None] | None = None) -> None:
    """The step's command ran to its end. A signal to this process is passed on and waited for, never outrun."""
    process = subprocess.Popen([sys.executable, "-m", "cluster.cli", *step.arguments])
    try:
        while meanwhile and process.poll() is None:
            meanwhile()
            time.sleep(0.1)
        code = process.wait()
    except BaseException as error:
        _stop(process, signal.SIGINT if isinstance(error, KeyboardInterrupt) else signal.SIGTERM)
        raise
    if code:
        failed = RayographError(f"the demo stopped at: {step.text}")
        failed.exit_code = code if code > 0 else 1
        raise failed


def _stop(process: subprocess.Popen[bytes], kind: signal.Signals) -> None:
    process.send_signal(kind)
    try:
        process.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
