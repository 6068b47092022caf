"""The report: one valid, accessible, self-contained page that shows what it was given and nothing else."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from training import report
from training.report import Block, Code, Figure, Section, Table, Text, write_report

VOID = {"meta", "img", "br", "wbr", "hr", "link", "input"}


class Page(HTMLParser):
    """Checks that tags close in order, and collects tags, attributes and text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.words = ""
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3)).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


def written(tmp_path: Path, *blocks: Block, images: bool = True) -> str:
    sections = [Section("Result", blocks), Section("Data", [Text("Nothing else.")])]
    write_report(tmp_path / "report.html", title="Transfer", sections=sections, images=images)
    return (tmp_path / "report.html").read_text(encoding="utf-8")


def test_every_kind_of_block_is_in_the_page(tmp_path: Path, picture: Path) -> None:
    table = Table(["metric", "value"], [["accuracy", "0.586 [0.55, 0.62]"]], "Out-of-fold metrics")
    html = written(
        tmp_path,
        Text("A paragraph."),
        report.Warning("The split leaks."),
        Code("import timm\n  indented"),
        table,
        Figure(picture, "A matrix", "Confusion matrix"),
    )
    page = Page(html)
    for words in (
        "A paragraph.",
        "The split leaks.",
        "import timm\n  indented",
        "0.586 [0.55, 0.62]",
        "Confusion matrix",
    ):
        assert words in page.words
    assert "Research use only; not a medical device" in page.words


def test_pictures_are_inside_byte_for_byte(tmp_path: Path, picture: Path) -> None:
    (source,) = [img["src"] for img in Page(written(tmp_path, Figure(picture, "A", "B"))).all("img")]
    assert base64.b64decode(source.removeprefix("data:image/png;base64,")) == picture.read_bytes()


def test_the_page_needs_no_other_file_and_runs_no_script(tmp_path: Path, picture: Path) -> None:
    html = written(tmp_path, Figure(picture, "A", "B"))
    page = Page(html)
    assert not page.all("script") and not page.all("link") and not page.all("iframe")
    assert not re.findall(r"https?://|@import|url\(|//[a-z]+\.", re.sub(r"base64,[^\"]*", "", html))
    assert all(a["href"].startswith("#") for a in page.all("a"))


def test_headings_tables_and_pictures_are_accessible(tmp_path: Path, picture: Path) -> None:
    page = Page(written(tmp_path, Table(["a", "b"], [["1", "2"]], "Numbers"), Figure(picture, "What it shows", "C")))
    assert page.all("html")[0]["lang"] == "en"
    assert [tag for tag, _ in page.tags if re.fullmatch(r"h\d", tag)] == ["h1", "h2", "h2"]
    assert len(page.all("caption")) == len(page.all("table")) == 1
    assert [th["scope"] for th in page.all("th")] == ["col", "col", "row"]
    assert [img["alt"] for img in page.all("img")] == ["What it shows"]
    identifiers = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(set(identifiers)) == len(identifiers)
    assert {a["href"][1:] for a in page.all("a")} <= set(identifiers)


def test_the_page_follows_the_readers_colour_scheme_and_prints(tmp_path: Path) -> None:
    html = written(tmp_path)
    assert "prefers-color-scheme: dark" in html and "@media print" in html


def test_markup_in_labels_stays_text(tmp_path: Path, picture: Path) -> None:
    evil = '"><script>alert(1)</script>{{ 7 * 7 }}'
    html = written(
        tmp_path,
        Text(evil),
        report.Warning(evil),
        Code(evil),
        Table([evil, evil], [[evil, evil]], evil),
        Figure(picture, evil, evil),
        Figure(picture, evil, evil, contains_data=True),
        images=False,
    )
    page = Page(html)
    assert not page.all("script")
    assert page.words.count(evil) == 10
    assert page.all("img")[0]["alt"] == evil


def test_pictures_of_the_data_are_left_out_unread_when_asked(tmp_path: Path, picture: Path) -> None:
    missing = Figure(tmp_path / "gone.png", "Nine patients", "Most confident mistakes", contains_data=True)
    html = written(tmp_path, missing, Figure(picture, "A matrix", "Confusion"), images=False)
    page = Page(html)
    assert [img["alt"] for img in page.all("img")] == ["A matrix"]
    assert "Figure left out, because it shows images of the data: Most confident mistakes" in page.words
    assert "Nine patients" not in html
    with pytest.raises(FileNotFoundError):
        written(tmp_path, missing, images=True)


def test_a_blank_cell_is_marked_and_its_words_are_escaped(tmp_path: Path) -> None:
    html = written(tmp_path, Table(["a", "b"], [["1", report.Blank("fill <me>")], ["2", "said"]], "Numbers"))
    page = Page(html)
    assert [span for span in page.all("span") if span.get("class") == "blank"] == [{"class": "blank"}]
    assert "fill <me>" in page.words


def test_points_are_a_list(tmp_path: Path) -> None:
    page = Page(written(tmp_path, report.Points(["One & all.", "<i>Two.</i>"])))
    assert "One & all." in page.words and "<i>Two.</i>" in page.words and not page.all("i")


def test_a_row_that_does_not_fit_its_headers_is_refused() -> None:
    with pytest.raises(ValueError, match="3 cells under 2 headers"):
        Table(["a", "b"], [["1", "2", "3"]], "Numbers")


def test_a_figure_of_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must be one of \.png"):
        Figure(Path("a.svg"), "A", "B")


def test_a_value_is_written_with_its_interval() -> None:
    assert report.with_interval(0.5861, [0.5512, 0.6199]) == "0.586 [0.55, 0.62]"
    assert report.with_interval(0.5861, [None, None]) == "0.586"
    assert report.with_interval(None, [None, None]) == "–"


def test_the_template_is_a_resource_of_the_package() -> None:
    assert resources.files("training").joinpath("report.html.j2").is_file()


def test_long_names_in_a_table_may_be_broken_and_are_not_changed(tmp_path: Path) -> None:
    html = written(tmp_path, Table(["class", "n"], [["abnormal/severe_dysplasia", "<2/3"]], "Classes"))
    assert "abnormal/<wbr>severe_<wbr>dysplasia" in html
    assert "abnormal/severe_dysplasia" in Page(html).words and "<2/3" in Page(html).words
