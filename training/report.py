"""`report.html`: sections of text, tables and figures as one self-contained, accessible page; knows no metric."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

MEDIA_TYPES = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg"}


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    kind: ClassVar[str] = "text"
    paragraph: str


@dataclass(frozen=True)
class Blank:
    """A cell that is left to be filled by hand, shown so that nobody takes it for an answer."""

    text: str


Cell = str | Blank


@dataclass(frozen=True)
class Table:
    """Rows of cells as they are to be read; the first cell of a row is its heading."""

    kind: ClassVar[str] = "table"
    headers: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.headers):
                raise ValueError(f"table {self.caption!r}: {len(row)} cells under {len(self.headers)} headers: {row}")


@dataclass(frozen=True)
class Points:
    """A list of short paragraphs, none before another."""

    kind: ClassVar[str] = "points"
    points: Sequence[str]


@dataclass(frozen=True)
class Figure:
    """A PNG or JPEG file; `alt` says what it shows to those who cannot see it, `caption` stands below it.

    `contains_data` marks pictures that show images of the data set, which a shared report leaves out.
    """

    kind: ClassVar[str] = "figure"
    path: Path
    alt: str
    caption: str
    contains_data: bool = False

    def __post_init__(self) -> None:
        if self.path.suffix.lower() not in MEDIA_TYPES:
            raise ValueError(f"figure {self.path}: must be one of {', '.join(MEDIA_TYPES)}")

    @property
    def uri(self) -> str:
        """The file's content as a data URI."""
        content = base64.b64encode(self.path.read_bytes()).decode("ascii")
        return f"data:{MEDIA_TYPES[self.path.suffix.lower()]};base64,{content}"


@dataclass(frozen=True)
class Code:
    """Text to be copied, line breaks kept."""

    kind: ClassVar[str] = "code"
    text: str


@dataclass(frozen=True)
class Warning:
    """A paragraph that must not be overlooked."""

    kind: ClassVar[str] = "warning"
    text: str


Block = Text | Points | Table | Figure | Code | Warning


@dataclass(frozen=True)
class Section:
    heading: str
    blocks: Sequence[Block]


def write_report(path: Path, *, title: str, sections: Sequence[Section], images: bool = True) -> None:
    """Writes one HTML file that needs no other: styles inside, pictures as data URIs, no script, nothing fetched.

    `images=False` leaves figures with `contains_data` out unread and says so in their place; their captions stay,
    so captions must not name patients. Everything is escaped: labels and file names cannot inject markup.
    """
    loader = PackageLoader("training", package_path="")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["breakable"] = breakable
    page = environment.get_template("report.html.j2").render(title=title, sections=sections, images=images)
    path.write_text(page, encoding="utf-8")


def breakable(text: str) -> Markup:
    """The text as HTML that may be broken after / and _, so that long names of classes do not widen a table."""
    return Markup(re.sub("([/_])", r"\1<wbr>", str(escape(text))))


def with_interval(value: float | None, ci: Sequence[float | None]) -> str:
    """`"0.586 [0.55, 0.62]"`; an undefined value is an en dash, an undefined interval is left away."""
    if value is None:
        return "–"
    low, high = ci
    return f"{value:.3f}" if low is None or high is None else f"{value:.3f} [{low:.2f}, {high:.2f}]"
