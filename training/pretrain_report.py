"""`report.html` of a pretraining run: what was trained on what, whether it learns, how fast, and how to use it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cluster import storage
from training import figures, report
from training.artifact import ModelCard
from training.configs import PretrainConfig
from training.methods import METHODS
from training.probe import alarm, probes_in

TABLE_ROWS = 12
"""Probes shown in the table, at most: the first, the last, and some between."""
SCORE_WORDS = {"knn_balanced_accuracy": "nearest neighbours", "linear_balanced_accuracy": "linear classifier"}

Row = dict[str, Any]


@dataclass(frozen=True)
class Facts:
    """What the report says of a finished run and `metrics.jsonl` does not."""

    config: PretrainConfig
    card: ModelCard
    images: int
    workers: int
    device: str
    precision: str
    seconds: float
    """Of training, over all starts where that is known."""
    probed: str = ""
    """`ProbeData.sentence`; empty where the run made no probes."""
    flops_per_image: float | None = None
    """See `training.speed`."""
    peak_gflops: float | None = None
    """Of matrix products, on all that the workers use together; see `training.speed`."""
    receipt: str = ""
    """`Verdict.sentence`, where receipts were kept and checked."""
    pictures: bool = True
    """Whether the report shows images of the data."""


@dataclass(frozen=True)
class Speed:
    """Over all steps of a run; shares in 0..1."""

    images_per_second: float
    """Median over steps, of all workers together."""
    wait_share: float
    """Of the time of the steps, that rank 0 waited for data."""
    gflops: float | None
    peak_share: float | None


def speed_of(rows: Sequence[Row], flops_per_image: float | None = None, peak_gflops: float | None = None) -> Speed:
    """How fast the steps among the rows of `metrics.jsonl` were."""
    steps = _steps(rows)
    rate, waits = (np.asarray([row[name] for row in steps]) for name in ("images_per_second", "data_wait_s"))
    seconds = np.diff([row["samples"] for row in steps], prepend=0) / rate
    median = float(np.median(rate))
    gflops = median * flops_per_image / 1e9 if flops_per_image else None
    share = gflops / peak_gflops if gflops and peak_gflops else None
    return Speed(median, float(waits.sum() / seconds.sum()), gflops, share)


def write_pretrain_report(run: Path, facts: Facts, rows: Sequence[Row]) -> None:
    """`run` holds report.html, for a reader who does not program, and figures/loss.png and figures/probes.png.

    Args:
        run: its model is there; figures/reconstructions.png is shown where it is.
        rows: of `metrics.jsonl`, with at least one step.
    """
    folder = run / "figures"
    folder.mkdir(exist_ok=True)
    _draw(folder, rows)
    sections = [
        report.Section("What was trained", _what(facts, rows)),
        report.Section("How it learnt", _learning(folder, facts, rows)),
        report.Section("What it can tell apart", _probing(folder, facts, rows)),
        report.Section("Speed and restarts", _running(facts, rows)),
        report.Section("The encoder and where it comes from", _model(run, facts)),
    ]
    report.write_report(
        run / "report.html", title=f"Pretraining: {run.resolve().name}", sections=sections, images=facts.pictures
    )


def _steps(rows: Sequence[Row]) -> list[Row]:
    """One row per step, in order."""
    found = {row["step"]: row for row in rows if "step" in row and "loss" in row}
    return [found[step] for step in sorted(found)]


def _starts(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row.get("event") == "start"]


def _draw(folder: Path, rows: Sequence[Row]) -> None:
    steps, found = _steps(rows), probes_in(rows)
    x, loss, epochs = ([row[name] for row in steps] for name in ("step", "loss", "epoch"))
    marks = [row["from_step"] for row in _starts(rows)[1:]]
    figures.training_loss(x, loss, epochs, folder / "loss.png", marks)
    if found:
        known = [name for name in SCORE_WORDS if any(name in row for row in found)]
        scores = {SCORE_WORDS[name]: [row.get(name, np.nan) for row in found] for name in known}
        chance = next((row["chance"] for row in found if "chance" in row), None)
        at, rank = ([row[name] for row in found] for name in ("probed_step", "effective_rank"))
        figures.probes(at, scores, chance, rank, folder / "probes.png")


# The sections


def _what(facts: Facts, rows: Sequence[Row]) -> list[report.Block]:
    config, network = facts.config, facts.card.architecture
    task = METHODS[config.method].words(config).task
    steps = _steps(rows)
    blocks: list[report.Block] = [
        report.Text(
            "An encoder, a network that turns an image into a list of numbers that describe it, was trained on "
            f"{facts.images:,} images without using any label: {task}. It saw all images {config.epochs:,} times, in "
            f"{len(steps):,} steps of {config.batch_size:,} images, at {network.height} x {network.width} pixels."
        ),
        report.Text(
            "It knows no diagnosis yet. That takes labelled images: rayograph transfer starts from this encoder, "
            "judges the result on patients held back, and leaves a report of its own."
        ),
    ]
    if facts.receipt:
        blocks.append(report.Text(f"What it was shown, checked image by image. {facts.receipt}"))
    found = probes_in(rows)
    text = alarm(found[-1]) if found else None
    return [report.Warning(f"{text[0].upper()}{text[1:]}."), *blocks] if text else blocks


def _learning(folder: Path, facts: Facts, rows: Sequence[Row]) -> list[report.Block]:
    steps = _steps(rows)
    first, last = (np.mean([r["loss"] for r in steps if r["epoch"] == steps[at]["epoch"]]) for at in (0, -1))
    words = METHODS[facts.config.method].words(facts.config)
    blocks: list[report.Block] = [
        report.Text(
            f"{words.loss}. Its mean was {first:.3f} in the first epoch and {last:.3f} in the last{words.unit}."
        ),
        report.Figure(
            folder / "loss.png",
            f"Loss over {len(steps):,} steps, from {first:.3f} to {last:.3f}",
            "Loss over training.",
        ),
    ]
    if (folder / "reconstructions.png").exists():
        blocks.append(
            report.Figure(
                folder / "reconstructions.png",
                "Three rows of images: the original, what the network was shown, and what it made of it",
                "Images of the training data: the original, what the network was shown, and how it filled in the rest. "
                + (
                    "Each square's own brightness and contrast were put back, since it learns only the pattern within."
                    if facts.config.norm_pix
                    else "Squares that it was shown are the original's."
                ),
                contains_data=True,
            )
        )
    return blocks


def _probing(folder: Path, facts: Facts, rows: Sequence[Row]) -> list[report.Block]:
    found = probes_in(rows)
    if not found:
        return [report.Text("No probe was made during this run, so nothing is known of what its features tell apart.")]
    scored = [row for row in found if "chance" in row]
    blocks: list[report.Block] = [
        report.Text(
            f"While it trained, the encoder was measured {_count(len(found), 'time')}, without teaching it anything. "
            f"{facts.probed}"
        )
    ]
    if scored:
        best = ", ".join(
            f"{words} went from {scored[0][name]:.2f} to {scored[-1][name]:.2f}" for name, words in SCORE_WORDS.items()
        )
        blocks.append(
            report.Text(
                f"Share of images named right, averaged over the classes, by two simple readers of its features: "
                f"{best}; guessing would give {scored[-1]['chance']:.2f}."
            )
        )
    last = found[-1]
    blocks += [
        report.Figure(
            folder / "probes.png",
            f"Scores and effective rank over steps; the last effective rank is {last['effective_rank']:.1f}",
            "Above: how well simple readers of the features name held-back images. Below: how many directions the "
            f"features use, of {last['feature_dimension']} (effective rank); near 1 means that all images look the "
            "same to the encoder."
            if scored
            else f"How many directions the features use, of {last['feature_dimension']} (effective rank); near 1 means "
            "that all images look the same to the encoder.",
        ),
        _probe_table(found, bool(scored)),
    ]
    return blocks


def _probe_table(found: list[Row], scored: bool) -> report.Table:
    shown = [found[at] for at in sorted(set(np.linspace(0, len(found) - 1, min(TABLE_ROWS, len(found))).astype(int)))]
    headers = ["step", *([*SCORE_WORDS.values(), "guessing"] if scored else []), "effective rank"]
    names = [*SCORE_WORDS, "chance"] if scored else []
    cells = [
        [
            f"{row['probed_step']:,}",
            *(f"{row[name]:.3f}" if name in row else "–" for name in names),
            f"{row['effective_rank']:.1f}",
        ]
        for row in shown
    ]
    caption = "Probes" if len(shown) == len(found) else f"Probes ({len(shown)} of {len(found)})"
    return report.Table(headers, cells, f"{caption}; scores are balanced accuracies" if scored else caption)


def _running(facts: Facts, rows: Sequence[Row]) -> list[report.Block]:
    speed = speed_of(rows, facts.flops_per_image, facts.peak_gflops)
    cells = [
        ["images per second", f"{speed.images_per_second:,.0f}", "median over steps, all workers together"],
        ["time spent training", _duration(facts.seconds), f"{_count(facts.workers, 'worker')} on {facts.device}"],
        ["share of it waiting for data", f"{speed.wait_share:.1%}", "near 0 is best: reading keeps ahead of training"],
    ]
    if facts.flops_per_image and speed.gflops is not None:
        cells.append(
            [
                "arithmetic per image",
                f"{facts.flops_per_image / 1e9:.2f} GFLOP",
                "forward and backward, counted by torch",
            ]
        )
        cells.append(["arithmetic per second", f"{speed.gflops:,.0f} GFLOP/s", f"in {facts.precision}"])
    if facts.peak_gflops and speed.peak_share is not None:
        cells.append(
            [
                "share of the possible",
                f"{speed.peak_share:.0%}",
                f"of {facts.peak_gflops:,.0f} GFLOP/s, which plain matrix products reached here",
            ]
        )
    blocks: list[report.Block] = [report.Table(["", "value", "meaning"], cells, "Speed of training")]
    events = [row for row in rows if "event" in row]
    starts = _starts(rows)
    if len(starts) <= 1:
        blocks.append(report.Text("The run was never interrupted."))
    else:
        blocks.append(
            report.Text(
                f"The run was started again {_count(len(starts) - 1, 'time')}, each time from "
                "its last checkpoint. Order of images, batches and learning rate are those of an uninterrupted run."
            )
        )
    if len(events) > 1:
        blocks.append(_event_table(events))
    return blocks


def _event_table(events: Sequence[Row]) -> report.Table:
    cells = []
    for row in events:
        step = row.get("from_step", row.get("step", row.get("at_step")))
        more = {k: v for k, v in row.items() if k not in {"event", "from_step", "step", "at_step", "workers", "pid"}}
        cells.append(
            [
                str(row["event"]).replace("_", " "),
                "–" if step is None else f"{step:,}",
                str(row.get("workers", "–")),
                ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in more.items()) or "–",
            ]
        )
    return report.Table(["event", "after step", "workers", "more"], cells, "Starts and interruptions")


def _model(run: Path, facts: Facts) -> list[report.Block]:
    card, config = facts.card, facts.config
    initial = card.lineage.get("initial", {})
    digest = initial.get("sha256", "")
    network = card.architecture
    written = run / "model" / "model.json"
    hashes = storage.read_json(written)["sha256"] if written.is_file() else {}
    cells = [
        ["network", f"{network.name}, {network.height} x {network.width}, {_count(network.channels, 'channel')}"],
        ["trained on", f"dataset version {card.lineage.get('dataset', '?')}, {facts.images:,} images"],
        ["images chosen by", ", ".join(config.where) or "none left out"],
        ["first weights", f"{config.init}" + (f" (sha256 {digest})" if digest else "")],
        ["method", f"{config.method}, seed {config.seed}, peak --lr {config.lr:g} at a batch of 256"],
        ["weights (sha256)", hashes.get("model.safetensors", "–")],
        ["versions", ", ".join(f"{name} {version}" for name, version in card.as_dict()["versions"].items())],
    ]
    return [
        report.Text("From labelled images to a judged classifier, where RUN is the folder of this report:"),
        report.Code("rayograph transfer --data DATASET --init RUN --out RESULT"),
        report.Text("Or in a program of your own; the keys are timm's:"),
        report.Code(network.snippet("model/model.safetensors")),
        report.Table(["", "what it is"], cells, "Lineage"),
    ]


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
