"""Paper 1 on real images: does a child learn better when it starts from its parent? `hierarchy`, `hierarchy_networks`.

Each comparison is of the same folds and images, or eyes, by a bootstrap over groups (slides, patients). What differs
from the paper is said in `training.tasks.stacking`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.benchmarks.paired import METRIC, gain, interval, told, verdict
from tests.benchmarks.results import CACHE, DATA, ingested, pretrained, run, summary
from training.gains import gain_between
from training.predictions import UNITS

STRUCTURES = ("flat", "independent", "transferred", "joint", "flat x2")
"""`x2`: with twice the epochs, about the steps that the nodes of a tree of two levels take together."""
STACKS = ("none", "forest")
SHARES = ("0.25", "1.0")
REPEATS = os.environ.get("RAYOGRAPH_HIERARCHY_REPEATS", "3")
METRICS = ("balanced_accuracy", "kappa", "accuracy", "hierarchical_f1")
CLAIM = "An et al. 2021: transferred beats flat by 9.7 % (points or relative: not known) on small training sets"
PAIRS = (
    ("transferred", "flat", CLAIM),
    ("transferred", "independent", "its approach 3 over 2: what the weights of the parent add (our reading)"),
    ("transferred", "flat x2", "the same against a flat one that trains as long as all nodes together"),
    ("independent", "flat", "its approach 2 over 1: what the hierarchy alone adds (our reading)"),
)
CLAIMS = ["| paper's claim | our data | which less which | gain [95 % interval] | verdict |", "|---" * 5 + "|"]


def hierarchy() -> str:
    """Small networks on frozen features: every structure, with and without a meta-learner, and several inputs."""
    ingested("cervix")
    inits = {"SSL": str(pretrained("cervix")), "ImageNet": "imagenet"}
    lines, claims = [_head(("weights", "groups", "structure", "stack"))], [*CLAIMS]
    for label, init in inits.items():
        for share in SHARES:
            for stack in STACKS:
                outs = {}
                for structure in STRUCTURES:
                    outs[structure] = _cervix("features", init, label, structure, stack, share)
                    titles = (label, f"{float(share):.0%}", structure, stack)
                    lines.append(_row(titles, outs[structure]))
                where = f"cervix, {label}, {float(share):.0%} of groups, stack {stack}"
                claims += [_claim(claim, where, outs, *pair) for *pair, claim in PAIRS]
    return "\n".join([*lines, "", *claims, "", *_retina()])


def hierarchy_networks() -> str:
    """Fine-tuned networks at 25 % of the groups: hours on two cores."""
    ingested("cervix")
    lines, outs = [_head(("weights", "groups", "structure", "stack"))], {}
    for structure in ("flat", "transferred", "flat x2"):
        outs[structure] = _cervix("network", "imagenet", "ImageNet", structure, "none", "0.25")
        lines.append(_row(("ImageNet, fine-tuned", "25%", structure, "none"), outs[structure]))
    where = "cervix, fine-tuned, 25 % of groups"
    claims = [_claim(CLAIM, where, outs, "transferred", rival) for rival in ("flat", "flat x2")]
    return "\n".join([*lines, "", *CLAIMS, *claims])


def _cervix(learner: str, init: str, label: str, structure: str, stack: str, share: str) -> Path:
    structure, _, longer = structure.partition(" x")
    name = f"{structure}{f'-longer-{longer}' if longer else ''}"
    out = CACHE / f"cervix-hierarchy-{learner}-{label.lower()}-{name}-{stack}-{share}-x{REPEATS}"
    command = ["transfer", "--data", str(CACHE / "cervix"), "--out", str(out), "--init", init, "--turns"]
    command += ["--task", "hierarchical", "--learner", learner, "--structure", structure, "--stack", stack]
    command += ["--label-fraction", share, "--repeats", REPEATS]
    epochs = (8 if learner == "network" else 20) * int(longer or 1)
    run([*command, "--epochs", str(epochs)])
    return out


def _retina() -> list[str]:
    data = CACHE / "retina"
    run(["ingest", str(DATA / "retina/index.csv"), "--out", str(data), "--image-size", "128"])
    lines = ["Retina, by eye (cases that have an image of the inputs):", "", _head(("inputs", "structure", "stack"))]
    claims = ["", *CLAIMS]
    for inputs, stack in ((("oct",), "none"), (("fundus",), "none"), (("oct", "fundus"), "forest")):
        outs = {}
        for structure in ("flat", "transferred"):
            out = CACHE / f"retina-hierarchy-{structure}-{'-'.join(inputs)}-x{REPEATS}"
            command = ["transfer", "--data", str(data), "--out", str(out), "--task", "hierarchical"]
            command += ["--learner", "features", "--structure", structure, "--stack", stack, "--repeats", REPEATS]
            run([*command, "--inputs", *inputs, "--input-column", "modality", "--unit", "case"])
            lines.append(_row((" + ".join(inputs), structure, stack), out))
            outs[structure] = out
        where = f"retina, {' + '.join(inputs)}, stack {stack}, by eye"
        claims.append(_claim(CLAIM, where, outs, "transferred", "flat"))
    return [*lines, *claims]


def _head(columns: tuple[str, ...]) -> str:
    names = [*columns, *METRICS]
    return f"| {' | '.join(names)} |\n" + "|---" * len(names) + "|"


def _row(titles: tuple[str, ...], out: Path) -> str:
    found = [summary(out)["metrics"][name] for name in METRICS]
    return f"| {' | '.join([*titles, *(interval(m['value'], m['ci95']) for m in found)])} |"


def _claim(claim: str, where: str, outs: dict[str, Path], ours: str, theirs: str) -> str:
    """A line that says whether the claim held: its paired interval excludes 0. Of cases where the RUNs judge cases."""
    one, other = outs[ours], outs[theirs]
    if (one / UNITS).exists():
        found: Mapping[str, Any] = gain_between(other / UNITS, one / UNITS, summary(one)["classes"], seed=0)[METRIC]
    else:
        found = gain(one, other)
    return f"| {claim} | {where} | {ours} − {theirs} | {told(found)} | {verdict(found)} |"
