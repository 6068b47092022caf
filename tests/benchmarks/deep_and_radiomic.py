"""The `svm` part of `make results`: SVMs on a frozen network's features, on radiomics, on both and on their fusion.

The claims are those of Huynh, Li & Giger (J Med Imaging 3(3), 2016) on 219 breast lesions: each kind of feature alone
reaches an AUC of 0.81, their ensemble 0.86.

What differs: AUC is of images, not of lesions; folds, intervals and DeLong's tests go by group. Holm's correction is
over the four comparisons of the fusion with another arm on one set; deep against radiomic, and the two sets, are
questions of their own.
"""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from tests.benchmarks.results import CACHE, DATA, asked, run, summary

SETS: dict[str, tuple[str, str, str, str, tuple[str, ...]]] = {
    "cervix": ("Pap smear cells, abnormal or normal, by slide", "cervix", "source", "herlev", ("--image-size", "128")),
    "oct": (
        "Retina OCT, retinopathy or healthy, by patient",
        "retina",
        "modality",
        "oct",
        ("--image-size", "64x160"),
    ),
}
"""(title, folder, column, its value, flags of ingest) of each binary set: labels are cut to the tree's top level."""
ARMS: dict[str, tuple[str, ...]] = {
    "deep": ("--features", "deep"),
    "layers": ("--features", "deep", "--layers", "all"),
    "radiomic": ("--features", "radiomic"),
    "both": ("--features", "both"),
    "fused": ("--features", "fused"),
}
INPUT = {"cervix": (), "oct": ("--image-size", "64x160")}
"""Of the network: its own size, or the shape of the images."""
REPEATS = "3"


def svm() -> str:
    """AUC of each arm with intervals by group, and the fusion against each alone by DeLong with Holm, as Markdown.

    `results svm oct` does it for that set only.
    """
    tables, claims = [], ["| the paper's claim | our data | |", "|---|---|---|"]
    for name, (title, *_) in asked(SETS).items():
        data, compared = _dataset(name), CACHE / f"svm-{name}-fused-against"
        folders = {arm: _transfer(name, data, arm) for arm in ARMS}
        rivals = [str(folder) for arm, folder in folders.items() if arm != "fused"]
        run(["evaluate", "--model", str(folders["fused"]), "--against", *rivals, "--out", str(compared)])
        found = summary(compared)["against"]
        deep = CACHE / f"svm-{name}-deep-against"
        run(["evaluate", "--model", rivals[0], "--against", str(folders["radiomic"]), "--out", str(deep)])
        (alone,) = summary(deep)["against"].values()
        tables.append(_table(title, folders, found))
        claims += _claims(title, found, alone["delong"], {arm: folder.name for arm, folder in folders.items()})
    return "\n\n".join([*tables, "\n".join(claims)])


def _dataset(name: str) -> Path:
    """The set with two classes, ingested once."""
    _, folder, column, value, flags = SETS[name]
    with (DATA / folder / "index.csv").open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row[column] == value and row["label"]]
    text = io.StringIO()
    out = csv.writer(text)
    out.writerow(["path", "label", "group"])
    out.writerows([DATA / folder / row["path"], row["label"].partition("/")[0], row["group"]] for row in rows)
    index = CACHE / f"svm-{name}-index" / "index.csv"
    index.parent.mkdir(parents=True, exist_ok=True)
    index.write_text(text.getvalue(), encoding="utf-8")
    run(["ingest", str(index), "--out", str(CACHE / f"svm-{name}"), *flags])
    return CACHE / f"svm-{name}"


def _transfer(name: str, data: Path, arm: str) -> Path:
    out = CACHE / f"svm-{name}-{arm}"
    command = ["transfer", "--data", str(data), "--out", str(out), "--init", "imagenet", "--task", "svm"]
    run([*command, "--repeats", REPEATS, *ARMS[arm], *INPUT[name]])
    return out


def _table(title: str, folders: dict[str, Path], against: dict[str, Any]) -> str:
    lines = [f"**{title}**", "", "| features | AUC | balanced accuracy | fused − this | p (DeLong) | p (Holm) |"]
    lines.append("|---" * 6 + "|")
    for arm, folder in folders.items():
        metrics = summary(folder)["metrics"]
        cells = [_interval(metrics[key]["value"], metrics[key]["ci95"]) for key in ("auroc", "balanced_accuracy")]
        if folder.name in against:
            test = against[folder.name]["delong"]
            cells += [_interval(test["difference"], test["ci95"]), f"{test['p']:.3f}", f"{test['p_holm']:.3f}"]
        lines.append(f"| {arm} | " + " | ".join([*cells, *[""] * (5 - len(cells))]) + " |")
    return "\n".join(lines)


def _claims(title: str, against: dict[str, Any], alone: dict[str, Any], names: dict[str, str]) -> list[str]:
    """A row per claim. Better means that Holm's p is below 0.05; that no difference is shown proves no equality."""
    tests = [against[names[arm]]["delong"] for arm in ("deep", "radiomic")]
    better = [test["difference"] > 0 and test["p_holm"] < 0.05 for test in tests]
    gains = ", ".join(f"{test['difference']:+.3f} (p {test['p_holm']:.3f})" for test in tests)
    level = "not told apart" if alone["p"] >= 0.05 else "did not hold"
    differs = f"deep − radiomic {_interval(alone['difference'], alone['ci95'])}, p {alone['p']:.3f}"
    return [
        f"| deep and radiomic features are level (AUC 0.81 each) | {title}: {differs} | {level} |",
        f"| their fusion beats either alone (0.86) | {title}: over deep, radiomic {gains} | {_held(all(better))} |",
    ]


def _held(held: bool) -> str:
    return "held" if held else "did not hold"


def _interval(value: float, ends: list[float]) -> str:
    return f"{value:.3f} [{ends[0]:.3f}, {ends[1]:.3f}]"
