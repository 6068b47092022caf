"""The same metrics by the values of a column (`--by sex,site,age`), and the gap between the best and the worst."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypedDict

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cluster.errors import UsageError, nearest
from training import metrics, multilabel
from training.bootstrap import Metric, Units, mean_defined, ratio
from training.probabilities import HALF
from training.report import Block, Table, Text, with_interval

SHOWN = ("accuracy", "balanced_accuracy", "f1_macro", "auroc", "ece")
GAP = "balanced_accuracy"
FEWEST_GROUPS = 5
"""Values with fewer groups are shown, but marked and left out of the gap."""
LARGEST = 10
"""A column of numbers with more distinct values than this is cut at its quartiles."""
MISSING = "not given"


class Part(TypedDict):
    """One value's entry of `subgroups[column]` in `summary.json`; `marks` say why it is not to be compared."""

    images: int
    groups: int
    marks: list[str]
    metrics: dict[str, Metric]


class Gap(TypedDict):
    """The best and the worst value of a column by balanced accuracy, and by how much they differ."""

    best: str
    worst: str
    balanced_accuracy: Metric


class ByColumn(TypedDict):
    """One column's entry of `subgroups` in `summary.json`."""

    parts: dict[str, Part]
    gap: Gap | None


class Rows(NamedTuple):
    """Judged predictions, [M] and [M,K]; the truth of label sets is bool [M,K]; `image` [M] tells images apart where
    repeats judge one again."""

    truth: NDArray[Any]
    probabilities: NDArray[np.float64]
    image: ArrayLike
    group: ArrayLike
    fold: ArrayLike
    repeat: ArrayLike


def columns_of(by: Sequence[str], known: Sequence[str]) -> list[str]:
    """The columns that `--by` names, separated by commas or blanks, each once.

    Raises:
        UsageError: one is not among the known columns.
    """
    names = list(dict.fromkeys(name for text in by for name in text.split(",") if name))
    for name in names:
        if name not in known:
            raise UsageError(f"--by {name}: no column {name!r}.{nearest(name, list(known))}")
    return names


def banded(values: Sequence[Any]) -> tuple[list[str], list[str]]:
    """Each value [M] as text, and the distinct ones in the order to show them, missing ones (None, "") last.

    Numbers (also as text) with more than `LARGEST` distinct values become quartile bands such as "45 to 60"; a band
    holds its upper end. Quartiles are those of the rows, and equal ones merge.
    """
    numbers = [_number(value) for value in values]
    given = [n for n, value in zip(numbers, values, strict=True) if not _missing(value)]
    if all(n is not None for n in given) and len(set(given)) > LARGEST:
        known = np.asarray(given, dtype=np.float64)
        edges = np.unique(np.quantile(known, [0.25, 0.5, 0.75], method="inverted_cdf"))
        edges = edges[edges < known.max()]
        low, high = [known.min(), *edges], [*edges, known.max()]
        names = [_band(a, b, first=at == 0) for at, (a, b) in enumerate(zip(low, high, strict=True))]
        texts = [
            MISSING if _missing(value) else names[int(np.searchsorted(edges, _number(value) or 0.0))]
            for value in values
        ]
    else:
        texts = [MISSING if _missing(value) else str(value) for value in values]
        ordered = all(n is not None for n in given)
        names = sorted(set(texts) - {MISSING}, key=lambda t: (float(t), t) if ordered else (0.0, t))
    return texts, names + [MISSING] * (MISSING in texts)


def by_column(rows: Rows, values: Sequence[Any], *, resamples: int = 1000, seed: int = 0) -> ByColumn:
    """Metrics of the rows of each value of a column [M], and the gap between the best and the worst.

    Values with fewer than `FEWEST_GROUPS` groups, or without a row of every class (of label sets: one with and one
    without each label), are marked and not compared. The gap's interval is that of the difference between
    these two, from the same resamples of groups.
    """
    texts, names = banded(values)
    which, classes = np.asarray(texts), _told_apart(rows.truth)
    summarise = multilabel.summarise if rows.truth.ndim == 2 else metrics.summarise
    parts = {}
    for name in names:
        keep = which == name
        group = np.asarray(rows.group, dtype=str)[keep]
        marks = ["few groups"] if len(set(group)) < FEWEST_GROUPS else []
        marks += ["lacks a class"] if _told_apart(rows.truth[keep]) != classes else []
        found = summarise(
            rows.truth[keep],
            rows.probabilities[keep],
            group=group,
            fold=np.asarray(rows.fold)[keep],
            repeat=np.asarray(rows.repeat)[keep],
            resamples=resamples,
            seed=seed,
        )
        images = len(np.unique(np.asarray(rows.image)[keep]))
        shown = {metric: found[metric] for metric in SHOWN}
        parts[name] = Part(images=images, groups=len(set(group)), marks=marks, metrics=shown)
    return ByColumn(parts=parts, gap=_gap(rows, which, parts, resamples, seed))


def _gap(rows: Rows, which: NDArray[np.str_], parts: Mapping[str, Part], resamples: int, seed: int) -> Gap | None:
    values = {name: part["metrics"][GAP]["value"] for name, part in parts.items() if not part["marks"]}
    known = {name: value for name, value in values.items() if value is not None}
    if len(known) < 2:
        return None
    best, worst = max(known, key=lambda n: known[n]), min(known, key=lambda n: known[n])
    right, of = _cells(rows)
    columns = [one * (which == name)[:, None] for name in (best, worst) for one in (right, of)]
    units = Units.of(rows.group, rows.fold, rows.repeat, resamples=resamples, seed=seed)

    def difference(sums: NDArray[np.float64]) -> NDArray[np.float64]:
        a, of_a, b, of_b = np.split(sums, 4, axis=-1)
        return np.stack([_mean_recall(a, of_a) - _mean_recall(b, of_b)], axis=-1)

    (metric,) = units.draw(np.hstack(columns).astype(np.float64), difference).metrics()
    return Gap(best=best, worst=worst, balanced_accuracy=metric)


def _told_apart(truth: NDArray[Any]) -> set[int]:
    """The classes that some row is of; of label sets the labels that some rows have and others lack."""
    if truth.ndim == 1:
        return set(truth.tolist())
    return set(np.flatnonzero(truth.any(axis=0) & ~truth.all(axis=0)).tolist())


def _cells(rows: Rows) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """[M,Q] each: rows that are right, and all, by class; of label sets by label, what has it before what lacks it.
    The mean of their ratios is the balanced accuracy."""
    if rows.truth.ndim == 2:
        of = np.hstack([rows.truth, ~rows.truth])
        said = rows.probabilities >= HALF
        return of & np.hstack([said, ~said]), of
    of = np.eye(rows.probabilities.shape[1], dtype=bool)[rows.truth]
    return of & (rows.probabilities.argmax(axis=1) == rows.truth)[:, None], of


def _mean_recall(right: NDArray[np.float64], of: NDArray[np.float64]) -> NDArray[np.float64]:
    return mean_defined(ratio(right, of), axis=-1)


def blocks(results: Mapping[str, ByColumn]) -> list[Block]:
    """Words and a table for each column."""
    found: list[Block] = [
        Text(
            "The same predictions, split by what is known about the images. Small groups scatter: look at the "
            "intervals before the values. What has too few groups or lacks an image of a class is marked, and not "
            f"compared (fewer than {FEWEST_GROUPS} groups are too few)."
        )
    ]
    for column, table in results.items():
        rows = [
            [
                _marked(name, part),
                f"{part['images']:,}",
                f"{part['groups']:,}",
                *(with_interval(part["metrics"][m]["value"], part["metrics"][m]["ci95"]) for m in SHOWN),
            ]
            for name, part in table["parts"].items()
        ]
        found.append(Table([column, "images", "groups", *map(metrics.title_of, SHOWN)], rows, f"By {column}"))
        found.append(Text(_sentence(column, table["gap"])))
    return found


def in_words(results: Mapping[str, ByColumn]) -> str:
    """The same in a few sentences; nothing where no column was asked for."""
    return " ".join(
        f"{_values(column, table['parts'])} {_sentence(column, table['gap'])}" for column, table in results.items()
    )


def _values(column: str, parts: Mapping[str, Part]) -> str:
    if len(parts) > LARGEST:
        return f"Balanced accuracy was judged for each of {len(parts)} values of {column}, see Subgroups."
    named = {_marked(name, part): part["metrics"][GAP] for name, part in parts.items()}
    shown = "; ".join(f"{name} {with_interval(m['value'], m['ci95'])}" for name, m in named.items())
    return f"Balanced accuracy by {column}: {shown}."


def _marked(name: str, part: Part) -> str:
    return f"{name} ({', '.join(part['marks'])})" if part["marks"] else name


def _sentence(column: str, gap: Gap | None) -> str:
    if gap is None:
        return f"By {column} no two values have enough groups and all classes, so none are compared."
    value = gap["balanced_accuracy"]
    return (
        f"Between the best value of {column} ({gap['best']}) and the worst ({gap['worst']}) balanced accuracy "
        f"differs by {with_interval(value['value'], value['ci95'])}. The two were picked for being furthest apart, "
        "so some difference is expected even where there is none."
    )


def _band(low: float, high: float, *, first: bool) -> str:
    if first:
        return f"{low:g} to {high:g}" if low < high else f"{low:g}"
    return f"above {low:g} to {high:g}"


def _missing(value: Any) -> bool:
    return value is None or value == "" or (isinstance(value, float) and np.isnan(value))


def _number(value: Any) -> float | None:
    """A finite number, also one written as text."""
    if isinstance(value, bool):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if np.isfinite(number) else None
