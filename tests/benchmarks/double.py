"""Double transfer (Alzubaidi et al., Cancers 13:1590, 2021) on our data: does scratch < single < double hold?

Scratch, single (images of CRIC without labels, or ImageNet's -> Herlev) and double (the same -> CRIC with its labels ->
Herlev) are the points of one chain of `--stages`; each has the same folds, so that gains are paired. No image of the
target is in a stage. Budgets are equal on the target: every arm has its epochs there, and scratch has nothing else, so
that what the stages cost is not counted. The metric is balanced accuracy, where the paper has F1. `double imagenet 1.0`
runs that chain and that share of the labels only; `--small` is a run of minutes that proves nothing.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.benchmarks.paired import METRIC, interval, told, verdict
from tests.benchmarks.results import CACHE, DATA, asked, run, summary

CLAIM = "F1 86.0 from scratch, 96.3 transfer, 99.3 double transfer (foot ulcers; skin 89.1 -> 98.5)"
ARMS = ("scratch", "single", "double")


@dataclass(frozen=True)
class Chain:
    """A network and how it gets the weights of the single transfer."""

    title: str
    pretext: dict[str, Any] | None
    """Settings of `pretrain` on the middle set; None: it starts from ImageNet weights."""


CHAINS = {
    "vit": Chain("ViT-tiny, masked autoencoder", {"method": "mae", "preset": "tiny"}),
    "parallel_resnet_tiny": Chain(
        "parallel_resnet_tiny, rotations",
        {"method": "rotation", "model": "parallel_resnet_tiny"},
    ),
    "imagenet": Chain("EfficientNet-Lite0, ImageNet weights", None),
}


@dataclass(frozen=True)
class Effort:
    """How long each part trains."""

    folder: str = "double"
    pretext: int = 40
    middle: int = 6
    repeats: int = 3
    folds: int = 3
    budgets: dict[str, int] = field(default_factory=lambda: {"0.1": 30, "1.0": 8})
    """Share of the labels -> epochs: a tenth of the images makes a tenth of the steps."""
    size: str = "72"
    """Of the images, in pixels."""


SMALL = Effort("double-small", 1, 1, 1, 2, {"0.1": 2}, "48")


def double() -> str:
    """A row per claim, and what each arm reached, as Markdown."""
    effort = SMALL if "--small" in sys.argv else Effort()
    folder = CACHE / effort.folder
    folder.mkdir(parents=True, exist_ok=True)
    middle, target = folder / "cric", folder / "herlev"
    run(["ingest", str(DATA / "cervix/index_cric.csv"), "--out", str(middle), "--image-size", "128"])
    run(["ingest", str(DATA / "cervix/index.csv"), "--out", str(target), "--image-size", "128"])
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for share, epochs in asked(effort.budgets).items():
        for name, chain in asked(CHAINS).items():
            plan = written(folder / f"{name}.yaml", chain, middle, effort)
            out = folder / f"{name}-{share}"
            command = ["transfer", "--data", str(target), "--out", str(out), "--stages", str(plan), "--turns"]
            command += ["--epochs", str(epochs), "--folds", str(effort.folds), "--repeats", str(effort.repeats)]
            run([*command, "--label-fraction", share])
            found[chain.title, share] = summary(out)
            print(tables(found), flush=True)
    return tables(found)


def written(file: Path, chain: Chain, middle: Path, effort: Effort) -> Path:
    """The chain's file: JSON is YAML."""
    common = {"data": str(middle), "workers": "2"}
    single = {"name": "single", "verb": "pretrain", "epochs": effort.pretext, "probe": False}
    double = {"name": "double", "verb": "transfer", "epochs": effort.middle, "split": "holdout", "turns": True}
    if chain.pretext is None:
        stages = [common | double | {"init": "imagenet", "image_size": effort.size}]
    else:
        stages = [common | single | {"image_size": effort.size} | chain.pretext, common | double]
    file.write_text(json.dumps({"stages": stages}, indent=1))
    return file


def tables(found: dict[tuple[str, str], dict[str, Any]]) -> str:
    """Both tables of summaries by (network, share of the labels)."""
    head = [f"| network, {METRIC.replace('_', ' ')} | labels | " + " | ".join(ARMS) + " |", "|---|---|---|---|---|"]
    claims = [
        "",
        "| paper's claim | our data | gain of balanced accuracy [95 % interval] | verdict |",
        "|---|---|---|---|",
    ]
    for (title, share), values in found.items():
        points = values["stages"]
        cells = [interval(point["metrics"][METRIC]["value"], point["metrics"][METRIC]["ci95"]) for point in points]
        head.append(f"| {title} | {float(share):.0%} | " + " | ".join(cells) + " |")
        gains = {
            "scratch < single": points[1]["gain"][METRIC],
            "single < double": points[2]["gain"][METRIC],
            "scratch < double": values["chain_gain"][METRIC],
        }
        for claim, gain in gains.items():
            where = f"Herlev, {float(share):.0%} of the labels, {title}"
            claims.append(f"| {claim}: {CLAIM} | {where} | {told(gain)} | {verdict(gain)} |")
    return "\n".join([*head, *claims])
