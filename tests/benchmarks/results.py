"""`make results`: every accuracy of README, as the commands a user would type. Resumable: finished runs are kept.

Runs and their caches live in $RAYOGRAPH_RESULTS (default ~/.cache/rayograph/results); the real images are looked for in
../shared/data beside the checkout, or in $RAYOGRAPH_DATA.
"""

from __future__ import annotations

import csv
import json
import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from training.domain import look_of
from training.images import decode, to_channels

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("RAYOGRAPH_DATA", ROOT.parent / "shared" / "data"))
CACHE = Path(os.environ.get("RAYOGRAPH_RESULTS", Path.home() / ".cache" / "rayograph" / "results"))
EPOCHS = "8"
METRICS = ("accuracy", "kappa", "balanced_accuracy", "auroc", "ece")


@dataclass(frozen=True)
class Study:
    """One data set: how it is ingested, pretrained on and transferred to."""

    title: str
    index: str
    ingest: tuple[str, ...]
    pretrain: tuple[str, ...]
    transfer: tuple[str, ...]
    vit: tuple[str, ...]
    imagenet: tuple[str, ...]
    """Further flags of transfers, for each network: each has an input size of its own."""
    finetune: tuple[str, ...]
    """Further flags of fine-tuning."""
    yardsticks: tuple[tuple[str, str, str, str], ...]
    """(name, accuracy, kappa, balanced accuracy) measured once, elsewhere, on the same copies."""

    def features(self, label: str) -> tuple[str, ...]:
        """Flags of the network that `label` names."""
        return self.imagenet if label == "ImageNet" else self.vit


STUDIES = {
    "cervix": Study(
        "Pap smear cells (Herlev, 7 classes, by slide; pretrained on Herlev + CRIC)",
        "cervix/index.csv",
        ("--image-size", "128"),
        ("--preset", "tiny", "--epochs", "100", "--workers", "2"),
        ("--turns",),
        (),
        (),
        ("--label-fraction", "0.25", "1.0"),
        (
            ("ImageNet, frozen, SVM, 224 px", "0.535", "0.442", "0.561"),
            ("ImageNet, fine-tuned, 128 px", "0.586", "0.506", "0.636"),
        ),
    ),
    "oct": Study(
        "Retina OCT (healthy / npdr / pdr, by patient; pretrained on all OCT)",
        "retina/index.csv",
        ("--image-size", "64x160"),
        ("--preset", "tiny", "--image-size", "48x120", "--epochs", "100", "--workers", "2", "--where", "modality=oct"),
        ("--where", "modality=oct"),
        ("--image-size", "48x120"),
        ("--image-size", "64x160"),
        (),
        (
            ("ImageNet, frozen, SVM, 224 px", "0.745", "0.422", "0.487"),
            ("ImageNet, fine-tuned, 128 px", "0.793", "0.589", "0.660"),
        ),
    ),
}
BUDGETS = ("0.1", "0.25", "0.5", "1.0")
INITS = ("SSL", "ImageNet", "none")
TASKS = (("linear", ("--label-fraction", *BUDGETS)), ("svm", ()), ("finetune", ("--epochs", EPOCHS)))


def run(arguments: list[str]) -> float:
    """One command of the command line; a finished one answers at once. Returns seconds."""
    print(f"$ rayograph {shlex.join(arguments)}", flush=True)
    began = time.monotonic()
    subprocess.run([sys.executable, "-m", "cluster.cli", *arguments], check=True, cwd=ROOT)
    return time.monotonic() - began


def asked(named: dict[str, Any]) -> dict[str, Any]:
    """Those that the command line names; all, where it names none."""
    return {name: value for name, value in named.items() if name in sys.argv} or named


def transfers(name: str) -> list[tuple[str, str, Path, list[str]]]:
    """(initial weights, task, folder, command) of each transfer of a study, the cheap ones first."""
    study, found = STUDIES[name], []
    for task, flags in TASKS:
        for label in INITS:
            if label == "none" and task == "svm":
                continue
            init = {"SSL": str(CACHE / f"{name}-mae"), "ImageNet": "imagenet", "none": "none"}[label]
            out = CACHE / f"{name}-{task}-{label.lower()}"
            command = ["transfer", "--data", str(CACHE / name), "--out", str(out), "--init", init, "--task", task]
            more = study.finetune if task == "finetune" else ()
            found.append((label, task, out, [*command, *flags, *more, *study.transfer, *study.features(label)]))
    return found


def ingested(name: str) -> Path:
    """The DATASET of a study."""
    study, out = STUDIES[name], CACHE / name
    run(["ingest", str(DATA / study.index), "--out", str(out), *study.ingest])
    return out


def pretrained(name: str) -> Path:
    """The RUN of `pretrain` of a study, whose DATASET stands."""
    out = CACHE / f"{name}-mae"
    run(["pretrain", "--data", str(CACHE / name), "--out", str(out), *STUDIES[name].pretrain])
    return out


def compute(name: str) -> None:
    ingested(name)
    pretrained(name)
    for _, _, _, command in transfers(name):
        run(command)


CHEST = ("--split", "image")
"""The chest CT set names no patients: it can be judged by image only, and that leaks."""


def chest(label: str) -> tuple[str, str, Path, list[str]]:
    """As an entry of `transfers`: a linear probe on the chest CT set."""
    out, init = CACHE / f"chest_ct-linear-{label.lower()}", {"ImageNet": "imagenet", "none": "none"}[label]
    command = ["transfer", "--data", str(CACHE / "chest_ct"), "--out", str(out), "--init", init, "--task", "linear"]
    return label, "linear", out, [*command, *CHEST, "--label-fraction", *BUDGETS]


def compute_chest() -> None:
    run(["ingest", str(DATA / "chest_ct/index.csv"), "--out", str(CACHE / "chest_ct"), "--image-size", "128"])
    for label in ("ImageNet", "none"):
        run(chest(label)[3])


def budgets() -> str:
    """The same with fewer labelled groups, and the price of a leak, as Markdown, with what is finished so far."""
    head = " | ".join(f"{float(b):.0%}" for b in BUDGETS)
    lines, prices = [f"| set | first weights | task | {head} |", "|---" * (3 + len(BUDGETS)) + "|"], []
    rows = [(name, *row) for name in STUDIES for row in transfers(name)]
    rows += [("chest_ct", *chest(label)) for label in ("ImageNet", "none")]
    for label, method in (("SSL, 72 px", "mae"), ("none, 72 px", "none")):
        rows.append(("chest_ct", label, "linear", CACHE / f"chest_ct-pretext-{method}-linear", ["--label-fraction"]))
    for name, label, task, folder, command in rows:
        if "--label-fraction" not in command or not (folder / "summary.json").exists():
            continue
        values = summary(folder)
        cells = []
        for share in BUDGETS:
            found = values["budgets"].get(f"{float(share):g}", {}).get("metrics", {}).get("balanced_accuracy")
            cells.append(f"{found['value']:.3f} [{found['ci95'][0]:.2f}, {found['ci95'][1]:.2f}]" if found else "")
        lines.append(f"| {name} | {label} | {task} | " + " | ".join(cells) + " |")
        price = values.get("leak_price")
        if price:
            low, high = price["ci95"]
            prices.append(
                f"| {name} | {label} | {task} | {price['by_image']:.3f} | {price['by_group']:.3f} | "
                f"{price['difference']:.3f} [{low:.2f}, {high:.2f}] |"
            )
    told = ["", "| set | first weights | task | by image | by group | the leak |", "|---|---|---|---|---|---|"]
    return "\n".join([*lines, *told, *prices])


STRANGERS = (
    ("other Pap smears (CRIC)", "cervix/index.csv", "source", "cric"),
    ("retina, OCT", "retina/index.csv", "modality", "oct"),
    ("retina, fundus photographs", "retina/index.csv", "modality", "fundus"),
    ("chest CT", "chest_ct/index.csv", "", ""),
)
"""Sets that a model of the Herlev cells should call unlike: (name, index, column, value)."""
ASKED = 300


def unlike() -> str:
    """How well `in_domain` of a linear probe on the Herlev cells tells other sets, as Markdown.

    Its own kind are the Herlev cells, each judged without its own slide.
    """
    from sklearn.metrics import roc_auc_score

    from training.artifact import load_model

    out = CACHE / "cervix-unlike"
    run(["transfer", "--data", str(CACHE / "cervix"), "--out", str(out), "--init", "imagenet", "--task", "linear"])
    model = load_model(out)
    domain = model.domain
    assert domain is not None
    own = domain.judge_distances(domain.distances, domain.look_distances)
    known = np.sort(domain.distances)
    lines = ["| asked about | AUROC | called unlike | by features alone |", "|---|---|---|---|"]
    lines.append(f"| Herlev cells, each without its slide ({len(own)}) | | {(own < domain.limit).mean():.1%} | |")
    for name, index, column, value in STRANGERS:
        pixels = _pictures(model, DATA / index, column, value)
        typical, distance = domain.judge(model.embed(pixels), look_of(pixels))
        alone = distance > np.quantile(known, 1 - domain.limit)
        odd = [0] * len(own) + [1] * len(typical)
        auroc = roc_auc_score(odd, -np.concatenate([own, typical]))
        lines.append(
            f"| {name} ({len(typical)}) | {auroc:.3f} | {(typical < domain.limit).mean():.1%} | {alone.mean():.1%} |"
        )
    return "\n".join(lines)


def _pictures(model: Any, index: Path, column: str, value: str) -> np.ndarray:
    """Stored pixels of at most ASKED images, evenly spread over those whose `column` is `value`."""
    with index.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if not column or row[column] == value]
    card, chosen = model.card, rows[:: max(1, len(rows) // ASKED)][:ASKED]
    decoded = [decode((index.parent / row["path"]).read_bytes(), card.image_path) for row in chosen]
    return np.stack([to_channels(pixels, card.input.channels) for pixels in decoded])


def svm() -> str:
    """SVMs on deep and radiomic features, see `tests.benchmarks.deep_and_radiomic`."""
    from tests.benchmarks import deep_and_radiomic

    return deep_and_radiomic.svm()


def retrieval() -> str:
    """Recall@k of trained embeddings, see `tests.benchmarks.metric`."""
    from tests.benchmarks import metric

    return metric.retrieval(CACHE, STUDIES, run)


def distances() -> str:
    """What class centres save against pairs, see `tests.benchmarks.metric`."""
    from tests.benchmarks import metric

    return metric.distances(DATA / "cervix")


def double() -> str:
    """Transfer in two steps, see `tests.benchmarks.double`."""
    from tests.benchmarks import double

    return double.double()


def pretext() -> str:
    """Methods of pretraining at equal training time, see `tests.benchmarks.pretext`."""
    from tests.benchmarks import pretext

    return pretext.pretext()


def hierarchy() -> str:
    """Structures of the class tree on frozen features, see `tests.benchmarks.hierarchy`."""
    from tests.benchmarks import hierarchy

    return hierarchy.hierarchy()


def hierarchy_networks() -> str:
    """The same with whole networks."""
    from tests.benchmarks import hierarchy

    return hierarchy.hierarchy_networks()


def recipe() -> str:
    """What beats fine-tuned ImageNet weights, see `tests.benchmarks.recipe`."""
    from tests.benchmarks import recipe

    return recipe.recipe()


def summary(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "summary.json").read_text()))


def table(name: str) -> str:
    """The study as Markdown, with what is finished so far."""
    study = STUDIES[name]
    lines = [f"**{study.title}**", "", "| first weights | task | " + " | ".join(METRICS) + " |", "|---" * 7 + "|"]
    for label, task, folder, _ in transfers(name):
        if not (folder / "summary.json").exists():
            continue
        values = summary(folder)
        cells = []
        for metric in METRICS:
            found = values["metrics"][metric]
            low, high = found["ci95"]
            cells.append(f"{found['value']:.3f} [{low:.2f}, {high:.2f}]")
        lines.append(f"| {label} | {task} | " + " | ".join(cells) + " |")
    for title, accuracy, kappa, balanced in study.yardsticks:
        lines.append(f"| *yardstick: {title}* | | {accuracy} | {kappa} | {balanced} | | |")
    pretrained = CACHE / f"{name}-mae"
    if (pretrained / "summary.json").exists():
        values = summary(pretrained)
        lines += [
            "",
            f"Pretraining: {values['epochs']} epochs, {values['samples_seen']:,} images, "
            f"{values['images_per_second']:.0f} images/s, loss {values['final_loss']:.3f}.",
        ]
    return "\n".join(lines)


def main() -> int:
    if not DATA.is_dir():
        print(f"{DATA}: no such folder; set RAYOGRAPH_DATA to the folder of the real images", file=sys.stderr)
        return 2
    CACHE.mkdir(parents=True, exist_ok=True)
    for part in (unlike, svm, retrieval, distances, double, pretext, hierarchy, hierarchy_networks, recipe):
        if part.__name__ in sys.argv:
            print("\n" + part())
            return 0
    wanted = [a for a in sys.argv[1:] if a in STUDIES] or list(STUDIES)
    if "--table" not in sys.argv:
        for name in wanted:
            compute(name)
        if wanted == list(STUDIES):
            compute_chest()
    for name in wanted:
        print("\n" + table(name))
    print("\n" + budgets())
    if "--table" not in sys.argv and wanted == list(STUDIES):
        print("\n" + unlike())
    return 0


if __name__ == "__main__":
    sys.exit(main())
