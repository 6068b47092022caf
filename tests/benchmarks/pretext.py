"""The `pretext` part of `make results`: mae, sssd, distill and dino for about the same time, judged alike.

Equal budget means equal training time of the same network on the same images: an epoch of `dino` or `distill`, which
see whole images and several crops, costs several of `mae`. The claim is that of SSSD-COVID (paper 4): distilling the
decoder's latents into the encoder adds to a masked autoencoder.
"""

from __future__ import annotations

from pathlib import Path

from tests.benchmarks.paired import METRIC, gain, interval, told, verdict
from tests.benchmarks.results import BUDGETS, CACHE, DATA, asked, run, summary

EPOCHS = {"mae": 24, "sssd": 22, "distill": 6, "dino": 4}
"""Such that each trains about as long as the others on two cores."""
FLAGS: dict[str, tuple[str, ...]] = {"distill": ("--teacher", "imagenet"), "dino": ("--lr", "5e-4")}
SIZE = ("--image-size", "72")
SETS = {
    "cervix": ("Herlev cells, by slide", "cervix/index.csv", ("--modality", "cytology"), ("--turns",)),
    "chest_ct": ("chest CT, by image (leaky)", "chest_ct/index.csv", (), ("--split", "image")),
}
"""(title, index, flags of pretrain, flags of transfer)"""
LABELS, REPEATS = "0.25", "3"
TASKS: dict[str, tuple[str, ...]] = {
    "knn": (),
    "linear": ("--label-fraction", *BUDGETS),
    "finetune": ("--label-fraction", LABELS, "--epochs", "12", "--folds", "3"),
}
CLAIMS = {
    ("sssd", "mae"): "the paper's: sssd adds to mae",
    ("distill", "mae"): "none: distill adds to mae",
    ("dino", "mae"): "none: dino adds to mae",
    ("mae", "none"): "none: mae adds to random weights",
}
PUBLISHED = "SSSD-COVID on the same chest CT images, split by image: accuracy 0.978 (ours leaks as theirs does)"


def pretext() -> str:
    """A table per set and a row per claim, as Markdown."""
    lines, claims = [], ["| claim | our data | gain [95 % interval] | verdict |", "|---|---|---|---|"]
    for name, (title, index, pretraining, flags) in asked(SETS).items():
        data = CACHE / name
        run(["ingest", str(DATA / index), "--out", str(data), "--image-size", "128"])
        inits = {"none": "none"}
        for method, epochs in EPOCHS.items():
            out = CACHE / f"{name}-pretext-{method}"
            command = ["pretrain", "--data", str(data), "--out", str(out), "--method", method, "--preset", "tiny"]
            command += ["--epochs", str(epochs), "--workers", "2", "--no-probe", *SIZE, *pretraining]
            run([*command, *FLAGS.get(method, ())])
            inits[method] = str(out)
        heads = [f"{task}, {METRIC}" for task in ("kNN", "linear", "linear at 25 %", "fine-tuned at 25 %")]
        lines += [f"**{title}**", "", f"| first weights | minutes | {' | '.join(heads)} | linear, accuracy |"]
        lines.append("|---" * 7 + "|")
        for label, init in inits.items():
            lines.append(_row(label, init, {task: _judged(name, label, init, task, flags) for task in TASKS}))
        lines.append("")
        for task in TASKS:
            for (one, other), claim in CLAIMS.items():
                found = gain(_out(name, one, task), _out(name, other, task))
                claims.append(f"| {claim} | {title}, {task} | {told(found)} | {verdict(found)} |")
    return "\n".join([*lines, *claims, "", PUBLISHED])


def _out(name: str, label: str, task: str) -> Path:
    return CACHE / f"{name}-pretext-{label}-{task}"


def _judged(name: str, label: str, init: str, task: str, flags: tuple[str, ...]) -> Path:
    out = _out(name, label, task)
    command = ["transfer", "--data", str(CACHE / name), "--out", str(out), "--init", init, "--task", task]
    command += ["--repeats", REPEATS, "--preset", "tiny", *SIZE]
    run([*command, *TASKS[task], *(flag for flag in flags if task == "finetune" or flag != "--turns")])
    return out


def _row(label: str, init: str, outs: dict[str, Path]) -> str:
    minutes = "" if label == "none" else f"{summary(Path(init))['seconds'] / 60:.1f}"
    linear = summary(outs["linear"])
    quarter = linear["budgets"][LABELS]["metrics"]
    found = [summary(outs["knn"])["metrics"], linear["metrics"], quarter, summary(outs["finetune"])["metrics"]]
    cells = [interval(m[METRIC]["value"], m[METRIC]["ci95"]) for m in found]
    accuracy = linear["metrics"]["accuracy"]
    cells.append(interval(accuracy["value"], accuracy["ci95"]))
    return f"| {label} | {minutes} | {' | '.join(cells)} |"
