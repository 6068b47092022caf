"""The `recipe` part of `make results`: what beats fine-tuned ImageNet weights at equal training.

Both arms train the same networks from the same weights, in the same folds and batches; the recipe judges each image in
all its views (`--tta`), which costs nothing in training and 2 or 8 passes for an answer. The arm of one view is the
study's own row of README, or with `RAYOGRAPH_RECIPE_REPEATS=3` a run of its own.
"""

from __future__ import annotations

import os
from pathlib import Path

from tests.benchmarks.paired import gain, interval, told, verdict
from tests.benchmarks.results import CACHE, STUDIES, asked, ingested, run, summary, transfers

REPEATS = os.environ.get("RAYOGRAPH_RECIPE_REPEATS", "1")
METRICS = ("balanced_accuracy", "kappa", "auroc")
VIEWS = {"cervix": "turns", "oct": "flip"}
"""What a picture of each set may be turned into without becoming another finding."""


def recipe() -> str:
    """A table of both arms, and of what the recipe gains, as Markdown."""
    heads = " | ".join(METRICS)
    rows = [f"| set | judged in | {heads} |", "|---" * (2 + len(METRICS)) + "|"]
    gains = [f"| set | gain of | {heads} |", "|---" * (2 + len(METRICS)) + "|"]
    for name, tta in asked(VIEWS).items():
        ingested(name)
        plain, views = _judged(name, "none"), _judged(name, tta)
        for title, out in (("one view", plain), (f"--tta {tta}", views)):
            found = summary(out)["metrics"]
            cells = [interval(found[metric]["value"], found[metric]["ci95"]) for metric in METRICS]
            rows.append(f"| {STUDIES[name].title} | {title} | {' | '.join(cells)} |")
        cells = [f"{told(one)}: {verdict(one)}" for one in (gain(views, plain, metric) for metric in METRICS)]
        gains.append(f"| {STUDIES[name].title} | --tta {tta} | {' | '.join(cells)} |")
        print("\n".join([*rows, "", *gains]), flush=True)
    return "\n".join([*rows, "", *gains])


def _judged(name: str, tta: str) -> Path:
    """The study's fine-tuning of ImageNet weights, judged so."""
    ((out, command),) = [(o, c) for label, task, o, c in transfers(name) if (label, task) == ("ImageNet", "finetune")]
    if tta != "none" or REPEATS != "1":
        changed = CACHE / f"{name}-recipe-{'plain' if tta == 'none' else tta}-x{REPEATS}"
        command = [str(changed) if word == str(out) else word for word in command]
        out = changed
        command += ["--tta", tta, "--repeats", REPEATS]
    run(command)
    return out
