"""Several inputs per case, such as OCT and fundus of an eye: which rows are of which, and what belongs together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cluster.errors import UsageError, nearest

EYE = ("eye", "laterality", "side")
"""Columns that, with the group, name a case where no row has one."""


@dataclass(frozen=True, eq=False)
class Inputs:
    """The input and the case of each of N rows; without names all are of one input, each a case of its own."""

    names: tuple[str, ...]
    of_row: np.ndarray
    """int64 [N]: number of the row's input; -1 where it is none of them."""
    case_of_row: np.ndarray
    """int64 [N]"""

    @property
    def count(self) -> int:
        return max(1, len(self.names))

    def cases(self, rows: np.ndarray) -> np.ndarray:
        """The cases that rows [R] belong to, ascending."""
        return np.unique(self.case_of_row[rows])

    def means(self, number: int, rows: np.ndarray, values: np.ndarray) -> np.ndarray:
        """The means [U, W] over each case of rows [R] of the values [R', W] of those rows that are of the input
        `number`; NaN where a case has none."""
        own = rows[self.of_row[rows] == number]
        cases = self.cases(rows)
        at = np.searchsorted(cases, self.case_of_row[own])
        sums = np.zeros((len(cases), values.shape[1]))
        np.add.at(sums, at, values)
        count = np.bincount(at, minlength=len(cases))[:, None]
        return np.where(count > 0, sums / np.maximum(count, 1), np.nan)


def one_input(rows: int) -> Inputs:
    return Inputs((), np.zeros(rows, dtype=np.int64), np.arange(rows))


def inputs_of(table: pa.Table, names: Sequence[str], column: str | None = None, *, some: bool = False) -> Inputs:
    """The inputs of a selection's rows: `column`, or the one that has all `names` among its values, tells them.

    A case is the column `case` where rows have one, else group and eye (a column `eye`, `laterality` or `side`), else
    the group.

    Args:
        some: the column given may lack some of the names, as images to judge may; those that train have all.

    Raises:
        UsageError: no column, or several, have all names, or the one given has not.
    """
    if not names:
        return one_input(table.num_rows)
    values = _texts(table, column_of(table, names, column, some=some))
    of_row = np.asarray([names.index(value) if value in names else -1 for value in values], dtype=np.int64)
    keys = case_names(table)
    number = {key: at for at, key in enumerate(dict.fromkeys(keys))}
    return Inputs(tuple(names), of_row, np.asarray([number[key] for key in keys], dtype=np.int64))


def joined(table: pa.Table, names: Sequence[str], column: str | None = None, *, some: bool = False) -> pa.Table:
    """The rows of these inputs, all rows without names, with the cases in the column `case` by which they are joined;
    `some` and errors as `inputs_of`."""
    if not names:
        return table
    found = inputs_of(table, names, column, some=some)
    cases = pa.array([name if "\x00" not in name else "" for name in case_names(table)], pa.string())
    at = table.column_names.index("case")
    return table.set_column(at, "case", cases).filter(pa.array(found.of_row >= 0))


def case_names(table: pa.Table) -> list[str]:
    """Of each row the name of its case, as `inputs_of` joins; a row without case and group is one of its own."""
    groups = [text or f"\x00row {row}" for row, text in enumerate(_texts(table, "group"))]
    cases = _texts(table, "case")
    eye = next((name for name in EYE if name in table.column_names), None)
    eyes = _texts(table, eye) if eye else [""] * len(groups)
    joined = [f"{group} {own}".rstrip() for group, own in zip(groups, eyes, strict=True)]
    return [case or other for case, other in zip(cases, joined, strict=True)]


def column_of(table: pa.Table, names: Sequence[str], column: str | None, *, some: bool = False) -> str:
    """The column that tells inputs of these names; `some` and errors as `inputs_of`."""
    said = f"--inputs {' '.join(names)}"
    if column is not None:
        if column not in table.column_names:
            raise UsageError(f"--input-column {column}: no such column.{nearest(column, table.column_names)}")
        known = set(_texts(table, column))
        if known.isdisjoint(names):
            raise UsageError(f"{said}: no image has any of them in the column {column!r}")
        missing = [] if some else [name for name in names if name not in known]
        if missing:
            hint = nearest(missing[0], sorted(known - {""}))
            raise UsageError(f"{said}: no image has {missing[0]!r} in the column {column!r}.{hint}")
        return column
    found = [name for name in table.column_names if set(names) <= set(_texts(table, name))]
    if not found:
        raise UsageError(f"{said}: no column has all of these values; name inputs as a column such as `modality` does")
    if len(found) > 1:
        raise UsageError(f"{said}: the columns {', '.join(found)} all have these values; name one by --input-column")
    return str(found[0])


def _texts(table: pa.Table, column: str) -> list[str]:
    if not (pa.types.is_string(table[column].type) or pa.types.is_large_string(table[column].type)):
        try:
            return [text or "" for text in pc.cast(table[column], pa.string()).to_pylist()]
        except pa.ArrowNotImplementedError:  # lists and the like name no input
            return [""] * int(table.num_rows)
    return [text or "" for text in table[column].to_pylist()]
