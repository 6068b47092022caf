"""How much do labels help? The figures of one protocol under several shares of the training groups."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from training import figures, report
from training.metrics import title_of

SHOWN = ("balanced_accuracy", "auroc", "kappa")


def budget_section(folder: Path, budgets: Mapping[str, Mapping[str, Any]]) -> report.Section | None:
    """The section of a report, with budget.png drawn into `folder`; None where there is a single share.

    `budgets` is that of `summary.json`: share -> train_images, train_groups, metrics.
    """
    if len(budgets) < 2:
        return None
    shares = sorted(budgets, key=float)
    groups = [float(budgets[share]["train_groups"]) for share in shares]
    series = {}
    for name in SHOWN:
        found = [budgets[share]["metrics"].get(name) for share in shares]
        if all(metric is not None and metric["value"] is not None for metric in found):
            series[title_of(name)] = ([m["value"] for m in found], [m["ci95"] for m in found])
    figures.with_bands(groups, series, folder / "budget.png", "groups trained on (per fit)", "value")
    rows = [
        [
            f"{float(share):.0%}",
            f"{budgets[share]['train_groups']:.0f}",
            f"{budgets[share]['train_images']:.0f}",
            *(
                report.with_interval(m["value"], m["ci95"])
                for m in (budgets[share]["metrics"][n] for n in SHOWN if title_of(n) in series)
            ),
        ]
        for share in shares
    ]
    first, last = (budgets[share]["metrics"]["balanced_accuracy"]["value"] for share in (shares[0], shares[-1]))
    return report.Section(
        "How much labels help",
        [
            report.Text(
                "The same fits with fewer labelled groups to train on, judged on the same images: from "
                f"{float(shares[0]):.0%} to {float(shares[-1]):.0%} of the groups, balanced accuracy goes from "
                f"{first:.3f} to {last:.3f}. A smaller share lies within a larger one; whole groups only."
            ),
            report.Table(["share", "groups", "images", *series], rows, "Shares of the training groups"),
            report.Figure(
                folder / "budget.png",
                "Metrics over the number of groups trained on, with intervals",
                "Where the curve still rises, more labels would help.",
            ),
        ],
    )
