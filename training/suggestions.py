"""Suggestions as people get them: two lists as CSV, two contact sheets, and a report that says how to read them."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from training import report
from training.dataset import Selection
from training.figures import contact_sheet

SHEET_IMAGES = 60
"""Pictures on a contact sheet, at most; the list has them all."""
TO_LABEL, LOOK_AGAIN = "to_label", "look_again"
KNOWN = ("image_id", "path", "frame", "group", "case")
ALIKE = ("images_alike",)
GUESS = ("top_class", "probability", "second_class", "second_probability", "uncertainty")
DOUBT = ("label", "looks_like", "probability_of_label", "probability_of_looks_like", "judged_by")


@dataclass(frozen=True)
class Suggestion:
    """One image on a list."""

    row: int
    """Of the selection."""
    reason: str
    caption: str
    """What stands below its picture: no path and no group, for sheets are passed on."""
    values: tuple[str | float, ...] = ()
    """The columns that only this list has."""


@dataclass(frozen=True)
class Sheet:
    """One list: its name and own columns, its images in order, and the pixels of those that are drawn."""

    name: str
    columns: tuple[str, ...]
    suggestions: Sequence[Suggestion]
    pixels: np.ndarray


@dataclass(frozen=True)
class Told:
    """What the report says beside the pictures."""

    model: str
    labelled: int
    unlabelled: int
    groups: int
    """Groups that hold an image without a label."""
    how: str
    """How images to label were chosen, in plain words."""
    judged: str
    """What labels were judged by, in plain words; why none were, where none were."""


def write_list(folder: Path, selection: Selection, sheet: Sheet) -> None:
    """NAME.csv and, where it has any image, NAME.png stand in `folder`.

    Whoever labels fills in the empty last column of to_label.csv.
    """
    known = {name: selection.column(name) for name in KNOWN}
    open_end = ("label",) if sheet.name == TO_LABEL else ()
    with (folder / f"{sheet.name}.csv").open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(["rank", *KNOWN, "reason", *sheet.columns, *open_end])
        for rank, one in enumerate(sheet.suggestions, start=1):
            place = [known[name][one.row] for name in KNOWN]
            values = [f"{v:.4f}" if isinstance(v, float) else v for v in one.values]
            writer.writerow([rank, *place, one.reason, *values, *("" for _ in open_end)])
    if sheet.suggestions:
        captions = [f"{rank}. {one.caption}" for rank, one in enumerate(sheet.suggestions, start=1)]
        contact_sheet(list(sheet.pixels), captions[: len(sheet.pixels)], folder / f"{sheet.name}.png")


def write_suggestions_report(folder: Path, to_label: Sheet, look_again: Sheet, told: Told, *, images: bool) -> None:
    """report.html of `suggest`, for a reader who does not program."""
    sections = [
        report.Section("What was asked", [report.Text(_asked(told))]),
        report.Section("Worth labelling next", _to_label(folder, to_label, told)),
        report.Section("Labels that look wrong", _look_again(folder, look_again, told)),
    ]
    title = f"What to label next: {told.model}"
    report.write_report(folder / "report.html", title=title, sections=sections, images=images)


def _asked(told: Told) -> str:
    return (
        f"{told.unlabelled:,} images without a label ({told.groups:,} groups, such as patients or slides) and "
        f"{told.labelled:,} with one were looked at through the model {told.model}. Two lists came of it: images worth "
        "a label, and labels that look wrong to it."
    )


def _to_label(folder: Path, sheet: Sheet, told: Told) -> list[report.Block]:
    if not sheet.suggestions:
        return [report.Text(told.how)]
    blocks: list[report.Block] = [report.Text(told.how), report.Text(_listed(sheet))]
    if sheet.columns != ALIKE:
        counts = Counter(str(one.values[1]) for one in sheet.suggestions)
        rows = [[name, f"{count:,}"] for name, count in counts.most_common()]
        blocks.append(report.Table(["the model's first guess", "images"], rows, "What is suggested"))
    caption = "Below each: its rank, and what the model makes of it. Label what is there, not what the model guesses."
    return [*blocks, _picture(folder, sheet, "Contact sheet of images to label", caption)]


def _look_again(folder: Path, sheet: Sheet, told: Told) -> list[report.Block]:
    if not sheet.suggestions:
        return [report.Text(told.judged)]
    pairs = Counter((str(one.values[0]), str(one.values[1])) for one in sheet.suggestions)
    rows = [[given or "(copies disagree)", like or "–", f"{count:,}"] for (given, like), count in pairs.most_common(20)]
    return [
        report.Text(told.judged),
        report.Warning(
            "Looks wrong, not is wrong: images that are hard or rare look wrong too. Decide by the image, best by "
            "someone who does not see the given label; correct only what you are sure of, never by this list alone."
        ),
        report.Text(_listed(sheet)),
        report.Table(["given label", "looks like", "images"], rows, "What is confused with what"),
        _picture(
            folder, sheet, "Contact sheet of labels that look wrong", "The label as given, and what it looks like."
        ),
    ]


def _listed(sheet: Sheet) -> str:
    count = len(sheet.suggestions)
    drawn = f"; the first {len(sheet.pixels):,} are drawn" if count > len(sheet.pixels) else ""
    return (
        f"{sheet.name}.csv names {'the image' if count == 1 else f'all {count:,} images'} with path and group{drawn}."
    )


def _picture(folder: Path, sheet: Sheet, alt: str, caption: str) -> report.Figure:
    return report.Figure(folder / f"{sheet.name}.png", alt, caption, contains_data=True)
