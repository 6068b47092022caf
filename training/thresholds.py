"""Decision thresholds: what is found and what is missed when a class is called at a stated probability.

A threshold is chosen on predictions of a fold's training side and judged on the fold's test rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import numpy as np
from numpy.typing import ArrayLike, NDArray

from training.bootstrap import Floats, Metric, Units, number, ratio
from training.calibration import IN_FOLDS, Fold, rows_by_fold
from training.report import Block, Table, Text, with_interval

GOALS: dict[str, float | None] = {"sensitivity 0.90": 0.90, "sensitivity 0.95": 0.95, "Youden": None}
"""Name -> the sensitivity that a threshold must reach; None: the largest sum of sensitivity and specificity."""
RATES = ("sensitivity", "specificity", "ppv", "npv")

Scores = tuple[ArrayLike, ArrayLike]
"""Truth [I], or of label sets bool [I,K], and probabilities [I,K]."""


class Judgement(TypedDict):
    """One class and goal of `thresholds` in `summary.json`; `at_prevalence` is by prevalence as text."""

    threshold_per_fold: list[float | None]
    sensitivity: Metric
    specificity: Metric
    ppv: Metric
    npv: Metric
    at_prevalence: dict[str, dict[str, Metric]]


def choose(scores: ArrayLike, positive: ArrayLike, sensitivity: float | None) -> float | None:
    """The threshold t of "called where score >= t" on scores [I]; None where one of the two sides has no row.

    With a `sensitivity`, the largest t that finds at least that share of the positives. Without, the one with the
    largest sensitivity + specificity - 1 (Youden, "Index for rating diagnostic tests", 1950), of equals the largest.
    Candidates are the scores themselves.
    """
    s, p = np.asarray(scores, dtype=np.float64), np.asarray(positive, dtype=bool)
    if not p.any() or p.all():
        return None
    found = np.sort(s[p])
    if sensitivity is not None:
        wanted = int(np.ceil(sensitivity * len(found) - 1e-9))
        return float(found[len(found) - max(wanted, 1)])
    candidates, rest = np.unique(s)[::-1], np.sort(s[~p])
    finds = 1 - np.searchsorted(found, candidates) / len(found)
    spares = np.searchsorted(rest, candidates) / len(rest)
    return float(candidates[int(np.argmax(np.round(finds + spares, 12)))])


def judge(
    classes: Sequence[str],
    truth: ArrayLike,
    probabilities: ArrayLike,
    fold: ArrayLike,
    repeat: ArrayLike,
    inner: Mapping[Fold, Scores],
    units: Units,
    prevalence: Sequence[float] = (),
) -> dict[str, dict[str, Judgement]]:
    """`{class: {goal: Judgement}}` of each class against the rest, on truth [M] and probabilities [M,K]; of label sets,
    whose truth is bool [M,K], of each label by itself.

    `inner` holds, for each fold, predictions of its training side on the same scale. A fold whose inner rows lack
    the class, or hold nothing else, has no threshold and its rows are not judged.
    """
    t, p = np.asarray(truth), np.asarray(probabilities, dtype=np.float64)
    folds = rows_by_fold(fold, repeat)
    result: dict[str, dict[str, Judgement]] = {}
    for c, name in enumerate(classes):
        result[name] = {}
        for goal, sensitivity in GOALS.items():
            chosen: list[float | None] = []
            called, judged = np.zeros(len(t), dtype=bool), np.zeros(len(t), dtype=bool)
            for one, rows in folds.items():
                inner_truth, scores = (np.asarray(a) for a in inner[one])
                threshold = choose(scores[:, c], _has(inner_truth, c), sensitivity)
                chosen.append(threshold)
                if threshold is not None:
                    called[rows], judged[rows] = p[rows, c] >= threshold, True
            result[name][goal] = _judge(chosen, _has(t, c), called, judged, units, prevalence)
    return result


def _has(truth: NDArray[Any], c: int) -> NDArray[np.bool_]:
    """Which rows [M] are of a class, or have a label."""
    return truth[:, c].astype(bool) if truth.ndim == 2 else truth == c


def predictive_values(sensitivity: ArrayLike, specificity: ArrayLike, prevalence: float) -> tuple[Floats, Floats]:
    """Positive and negative predictive value at a prevalence, by Bayes' theorem; NaN where nothing is called so."""
    found, spared = np.asarray(sensitivity, dtype=np.float64), np.asarray(specificity, dtype=np.float64)
    positive = ratio(found * prevalence, found * prevalence + (1 - spared) * (1 - prevalence))
    negative = ratio(spared * (1 - prevalence), spared * (1 - prevalence) + (1 - found) * prevalence)
    return positive, negative


def _judge(
    chosen: list[float | None],
    positive: NDArray[np.bool_],
    called: NDArray[np.bool_],
    judged: NDArray[np.bool_],
    units: Units,
    prevalence: Sequence[float],
) -> Judgement:
    cells = np.column_stack([called & positive, ~called & ~positive, called & positive, ~called & ~positive])
    of = np.column_stack([positive, ~positive, called, ~called])
    sensitivity, specificity, ppv, npv = units.rates(cells & judged[:, None], of & judged[:, None])
    return Judgement(
        threshold_per_fold=chosen,
        sensitivity=sensitivity,
        specificity=specificity,
        ppv=ppv,
        npv=npv,
        at_prevalence={
            f"{share:g}": _at(share, positive & judged, called, judged, units, sensitivity, specificity)
            for share in prevalence
        },
    )


def _at(
    share: float,
    positive: NDArray[np.bool_],
    called: NDArray[np.bool_],
    judged: NDArray[np.bool_],
    units: Units,
    sensitivity: Metric,
    specificity: Metric,
) -> dict[str, Metric]:
    rest = judged & ~positive
    columns = np.column_stack([called & positive, positive, ~called & rest, rest])

    def both(sums: Floats) -> Floats:
        found, spared = ratio(sums[..., 0], sums[..., 1]), ratio(sums[..., 2], sums[..., 3])
        return np.stack(predictive_values(found, spared, share), axis=-1)

    ppv, npv = units.draw(columns, both).metrics()
    if {sensitivity["value"], specificity["value"]} & {0.0, 1.0}:
        # resamples that are all alike have no width: both rates at the ends of their own intervals, which is wider
        low, high = (predictive_values(_end(sensitivity, at), _end(specificity, at), share) for at in (0, 1))
        ppv["ci95"], npv["ci95"] = ([number(float(one[of])) for one in (low, high)] for of in (0, 1))
    return {"ppv": ppv, "npv": npv}


def _end(metric: Metric, at: int) -> float:
    end = metric["ci95"][at]
    return float("nan") if end is None else end


def blocks(
    results: Mapping[str, Mapping[str, Judgement]], chosen: str = IN_FOLDS, *, several: bool = False
) -> list[Block]:
    """Words and tables of thresholds, a row for each class and goal; `chosen` says where they come from, `several` that
    they are of label sets."""
    rows, at_prevalence = [], []
    shares = list(next(iter(next(iter(results.values())).values()))["at_prevalence"])
    for name, goals in results.items():
        for goal, judged in goals.items():
            found: Any = judged
            rows.append([name, goal, _range(judged["threshold_per_fold"]), *(_shown(found[rate]) for rate in RATES)])
            values = (_shown(judged["at_prevalence"][s][v]) for s in shares for v in ("ppv", "npv"))
            at_prevalence.append([name, goal, *values])
    found_blocks: list[Block] = [
        Text(
            f"{'Each label by itself' if several else 'Each class against all others'}: an image is called when its "
            f"probability reaches the threshold. Thresholds were chosen {chosen}, for a wanted sensitivity or for the "
            "largest sum of sensitivity and specificity (Youden), and judged on the images that are reported here; so "
            "the sensitivity reached may differ from the one wanted."
        ),
        Table(
            ["class", "chosen for", "threshold", "sensitivity", "specificity", "PPV", "NPV"],
            rows,
            "Thresholds (median and range over folds); predictive values at the share that the class has in this data",
        ),
    ]
    if any(t is None for goals in results.values() for j in goals.values() for t in j["threshold_per_fold"]):
        found_blocks.append(
            Text("Folds whose training part had no image of a class to choose a threshold on are not judged for it.")
        )
    if shares:
        heads = [f"{value} at {float(s):.3g}" for s in shares for value in ("PPV", "NPV")]
        found_blocks.append(
            Table(
                ["class", "chosen for", *heads],
                at_prevalence,
                "Predictive values at stated prevalences, by Bayes' theorem from sensitivity and specificity",
            )
        )
    else:
        found_blocks.append(
            Text(
                "PPV and NPV hold only where the classes are as common as in this data, which was often collected to "
                "have many cases; ask for those of your own patients with --prevalence."
            )
        )
    return found_blocks


def _range(thresholds: Sequence[float | None]) -> str:
    known = [t for t in thresholds if t is not None]
    if not known:
        return "–"
    middle = f"{np.median(known):.3f}"
    return middle if len(known) == 1 else f"{middle} ({min(known):.3f} to {max(known):.3f})"


def _shown(metric: Metric) -> str:
    return with_interval(metric["value"], metric["ci95"])
