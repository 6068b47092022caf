"""The report of `evaluate`, and the section that says in plain words which of several models is ahead."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from training import figures, report
from training.compare import LESS, Adjusted, Comparison, Difference
from training.configs import Unit
from training.judgement import Judged
from training.metrics import meaningful, title_of
from training.results import LABEL_SET_WORDS, WORDS, result_section

HEADLINE = "balanced_accuracy"
"""The metric that the sentence on top speaks of."""
LEVEL = 0.05


@dataclass(frozen=True, eq=False)
class Rival:
    """A model that another one was compared with: its own metrics on the same rows, and the comparison."""

    metrics: Mapping[str, Any]
    comparison: Comparison


def verdict(ours: str, theirs: str, difference: Adjusted, comparisons: int) -> str:
    """Who is ahead on `HEADLINE` and by how much, claiming no more than interval and corrected p-value allow."""
    value, (low, high), p_holm = difference["difference"], difference["ci95"], difference["p_holm"]
    what = HEADLINE.replace("_", " ")
    if value is None or low is None or high is None or p_holm is None:
        return f"{ours} against {theirs}: too few groups to compare their {what}."
    p = f"p {p_words(difference['p'])}"
    if comparisons > 1:
        p += f", {p_words(p_holm)} corrected for {comparisons} comparisons"
    if value == 0:
        return f"{ours} and {theirs} are level on {what}: {_signed(value, [low, high])}, {p}."
    leader, other = (ours, theirs) if value > 0 else (theirs, ours)
    ends = [low, high] if value > 0 else [-high, -low]
    said = f"{leader} is ahead of {other} on {what} by {_signed(abs(value), ends)}"
    if low <= 0 <= high:
        return f"{said}. The 95 % interval holds 0, so the difference may be chance ({p})."
    if p_holm >= LEVEL:
        return f"{said}. The 95 % interval excludes 0, but several models were compared: it may be chance ({p})."
    return f"{said}. The 95 % interval excludes 0, so it is more than chance ({p})."


def p_words(p: float | None) -> str:
    return "–" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def draw_differences(path: Path, rivals: Mapping[str, Rival]) -> None:
    """A forest plot of the differences of every metric stands at `path`."""

    def ends(one: Difference) -> tuple[float, float, float]:
        low, high = one["ci95"]
        return tuple(np.nan if v is None else v for v in (one["difference"], low, high))  # type: ignore[return-value]

    series = {
        f"against {name}": {_axis(metric): ends(d) for metric, d in meaningful(rival.comparison["metrics"]).items()}
        for name, rival in rivals.items()
    }
    path.parent.mkdir(exist_ok=True)
    figures.forest(series, path, "difference, with 95 % interval")


def comparison_section(
    name: str,
    own: Mapping[str, Any],
    rivals: Mapping[str, Rival],
    *,
    images: int,
    groups: int,
    repeats: int = 1,
    unit: Unit = "image",
    figure: Path,
) -> report.Section:
    """Model `name`, whose metrics are `own`, against its rivals by name, for a reader who does not program.

    `images` counts what was judged once: images, or the units that they were pooled into.
    """
    words = LABEL_SET_WORDS if "hamming" in own else WORDS
    said = [verdict(name, other, r.comparison["metrics"][HEADLINE], len(rivals)) for other, r in rivals.items()]
    blocks: list[report.Block] = [report.Text(sentence) for sentence in said]
    blocks.append(
        report.Text(
            f"All models judged the same {images:,} {unit}s of {groups:,} groups (patients, slides)"
            + (f", {repeats} times in other folds; figures are means of these. " if repeats > 1 else ". ")
            + f"Balanced accuracy is the {words[HEADLINE]}. Below, differences are {name} less the other model. Their "
            "intervals and p-values come from one bootstrap over groups that all models share, so a group that is hard "
            "for all does not blur the difference. The fits are held fixed: this says what other patients would "
            "change, not what another training run would."
        )
    )
    blocks.append(
        report.Figure(
            figure,
            f"Differences of every metric between {name} and the models it is compared with, with intervals",
            f"To the right of 0, {name} has the larger value, which is better, but where less is.",
        )
    )
    blocks += [_differences_table(name, own, other, rival, len(rivals)) for other, rival in rivals.items()]
    blocks.append(_mcnemar_table(name, rivals, unit))
    if any(rival.comparison["delong"] for rival in rivals.values()):
        blocks.append(_delong_table(name, rivals))
    return report.Section("Comparison", blocks)


def write_evaluation_report(
    out: Path,
    judged: Judged,
    *,
    before: Sequence[report.Section],
    comparison: report.Section | None,
    after: Sequence[report.Section],
    caption: str,
    images: bool,
) -> None:
    """report.html of an evaluation: protocol and data, the comparison if there is one, results, the rest."""
    results = result_section(out, judged, caption, learning=False)
    sections = [*before, *([comparison] if comparison else []), results, *after]
    report.write_report(out / "report.html", title=f"Evaluation: {out.name}", sections=sections, images=images)


def _axis(metric: str) -> str:
    return f"{title_of(metric)} (less is better)" if metric in LESS else title_of(metric)


def _signed(value: float | None, ci95: Sequence[float | None]) -> str:
    if value is None:
        return "–"
    low, high = ci95
    return f"{value:+.3f}" if low is None or high is None else f"{value:+.3f} [{low:+.3f}, {high:+.3f}]"


def _corrected(comparisons: int) -> list[str]:
    return ["p corrected"] if comparisons > 1 else []


def _differences_table(name: str, own: Mapping[str, Any], other: str, rival: Rival, comparisons: int) -> report.Table:
    rows = [
        [
            title_of(metric),
            report.with_interval(own[metric]["value"], own[metric]["ci95"]),
            report.with_interval(rival.metrics[metric]["value"], rival.metrics[metric]["ci95"]),
            _signed(d["difference"], d["ci95"]),
            p_words(d["p"]),
            *([p_words(d["p_holm"])] if comparisons > 1 else []),
        ]
        for metric, d in meaningful(rival.comparison["metrics"]).items()
    ]
    headers = ["metric", name, other, "difference [95 % interval]", "p", *_corrected(comparisons)]
    caption = f"{name} against {other}"
    if comparisons > 1:
        caption += f"; corrected by Bonferroni–Holm for {comparisons} comparisons of each metric"
    return report.Table(headers, rows, caption)


def _mcnemar_table(name: str, rivals: Mapping[str, Rival], unit: Unit) -> report.Table:
    rows = []
    for other, rival in rivals.items():
        m = rival.comparison["mcnemar"]
        rows.append([other, f"{m['only_ours']:,.4g}", f"{m['only_theirs']:,.4g}", p_words(m["p_group"])])
        rows[-1] += [p_words(m["p_holm"])] if len(rivals) > 1 else []
        rows[-1].append(f"{p_words(m['p'])} ({m['method']})")
    headers = ["against", f"only {name} right", "only the other right", "p, by group", *_corrected(len(rivals))]
    return report.Table(
        [*headers, "p, McNemar"],
        rows,
        f"{unit.capitalize()}s that only one model names right. McNemar's test takes {unit}s as independent, "
        "which those of one patient are not; p by group swaps the models within whole groups, and is the one to "
        "report.",
    )


def _delong_table(name: str, rivals: Mapping[str, Rival]) -> report.Table:
    rows = []
    for other, rival in rivals.items():
        found = rival.comparison["delong"]
        if found is None:
            continue
        areas = ["–" if area is None else f"{area:.3f}" for area in (found["auroc"], found["against"])]
        rows.append([other, *areas, _signed(found["difference"], found["ci95"]), p_words(found["p"])])
        rows[-1] += [p_words(found["p_holm"])] if len(rivals) > 1 else []
    headers = ["against", f"area, {name}", "area, the other", "difference [95 % interval]", "p"]
    return report.Table(
        [*headers, *_corrected(len(rivals))],
        rows,
        "Areas under the ROC curve by DeLong's test, clustered by group (Obuchowski); mean over folds.",
    )
