"""The page at `/`, in a real browser against a stub of the HTTP API: what a user sees, hears, types and drops.

`python tests/serving/test_page.py FOLDER` writes pictures of the page, for looking at.
"""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import sys
import threading
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email import message_from_bytes
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright

PAGE = Path(__file__).parents[2] / "serving" / "page"
TYPES = {".html": "text/html; charset=utf-8", ".js": "text/javascript", ".css": "text/css"}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data: blob:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
CLASSES = {
    "abnormal/carcinoma_in_situ": 0.61,
    "abnormal/severe_dysplastic": 0.2,
    "abnormal/light_dysplastic": 0.02,
    "normal/columnar": 0.166,
    "normal/superficial": 0.004,
}
pytestmark = [pytest.mark.slow, pytest.mark.browser]


# The stub


@dataclass
class Answer:
    """One answer of the stub; it waits for `held`, where there is one."""

    body: Any
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    held: threading.Event | None = None


@dataclass
class Stub:
    """Answers per path, of which the last repeats; and what was asked."""

    answers: dict[str, list[Answer]]
    key: str = ""
    origin: str = ""
    pictures: list[tuple[str, str | None, bytes]] = field(default_factory=list)
    """(path, file name, content) of every picture received."""

    def next(self, path: str, authorization: str) -> Answer:
        if self.key and authorization != f"Bearer {self.key}":
            return failure(401, "key_required", "a key is needed")
        queue = self.answers.get(path, [failure(404, "not_found", "no such path")])
        return queue.pop(0) if len(queue) > 1 else queue[0]


def failure(status: int, code: str, message: str, **headers: str) -> Answer:
    return Answer({"error": {"code": code, "message": message}}, status, headers)


def model(**changes: Any) -> Answer:
    described = {
        "name": "cervix-run",
        "sha256": "ab" * 32,
        "card_sha256": "cd" * 32,
        "classes": list(CLASSES),
        "image_size": "128x128",
        "metrics": {"balanced_accuracy": 0.5312, "ece": 0.04},
    }
    index = {"vectors": 917, "kind": "flat", "recall_at_10": 1.0, "snapshot": "000001-ab"}
    limits = {"max_body_bytes": 200_000, "max_pixels": 1_000_000}
    return Answer({"model": described, "index": index, "limits": limits} | changes)


def classified(
    answer: bool | None = True, classes: dict[str, float] = CLASSES, several: bool = False, **options: Any
) -> Answer:
    message = {True: "", False: "Farther from the training set than 99 of 100 known pictures.", None: ""}[answer]
    body = {
        "classes": [{"label": k, "probability": v} for k, v in sorted(classes.items(), key=lambda item: -item[1])],
        "several": several,
        "tree": tree(classes),
        "in_domain": {"answer": answer, "typicality": 0.42, "distance": 0.12, "limit": 0.01, "message": message},
        "model": {"name": "cervix-run", "sha256": "ab" * 32, "card_sha256": "cd" * 32},
    }
    return Answer(body, **options)


def tree(classes: dict[str, float], prefix: str = "") -> dict[str, Any]:
    below = {k: v for k, v in classes.items() if k.startswith(f"{prefix}/" if prefix else "") and k != prefix}
    depth = prefix.count("/") + 1 if prefix else 0
    names = dict.fromkeys("/".join(label.split("/")[: depth + 1]) for label in below)
    total = sum(below.values()) if below else classes[prefix]
    return {"label": prefix, "probability": total, "children": [tree(classes, name) for name in names]}


def found(thumbnails: list[bytes] | None = None, labels: tuple[str, ...] = tuple(CLASSES)) -> Answer:
    pictures = thumbnails or [png(seed) for seed in range(10)]
    hits = [
        {
            "id": f"{at:016x}",
            "score": 0.97 - 0.03 * at,
            "label": labels[at * at % len(labels)] if at != 7 else "",
            "group": f"patient-{at // 2}",
            "thumbnail": "data:image/png;base64," + base64.b64encode(content).decode(),
        }
        for at, content in enumerate(pictures)
    ]
    return Answer({"hits": hits, "index": {}, "in_domain": {"answer": None}, "model": {}})


def png(seed: int = 0, size: int = 24) -> bytes:
    out = io.BytesIO()
    values = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(values).resize((size, size), Image.Resampling.BICUBIC).save(out, "PNG")
    return out.getvalue()


class Handler(BaseHTTPRequestHandler):
    stub: Stub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if self.path.startswith("/v1/"):
            self._answer()
            return
        name = "index.html" if self.path == "/" else self.path.removeprefix("/page/")
        file = PAGE / name
        if not re.fullmatch(r"[a-z]+\.(html|js|css)", name) or not file.is_file():
            self._send(404, "text/plain", b"")
            return
        self._send(200, TYPES[file.suffix], file.read_bytes(), {"Content-Security-Policy": POLICY})

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        header = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode()
        parts = message_from_bytes(header + content).get_payload()
        assert isinstance(parts, list) and len(parts) == 1
        part = parts[0]
        assert isinstance(part, Message) and part.get_param("name", header="content-disposition") == "image"
        picture = part.get_payload(decode=True)
        assert isinstance(picture, bytes)
        self.stub.pictures.append((self.path, part.get_filename(), picture))
        self._answer()

    def _answer(self) -> None:
        answer = self.stub.next(self.path, self.headers.get("Authorization", ""))
        if answer.held is not None:
            assert answer.held.wait(30)
        body = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
        self._send(answer.status, "application/json", body, answer.headers)

    def _send(self, status: int, kind: str, body: bytes, headers: dict[str, str] | None = None) -> None:
        try:
            self.send_response(status)
            for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **(headers or {})}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(body)
        except (BrokenPipeError, ConnectionResetError):
            pass  # the page did not want it any more

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def served() -> Iterator[Stub]:
    stub = Stub({"/v1/model": [model()], "/v1/classify": [classified()], "/v1/search?k=10&labelled=true": [found()]})
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"stub": stub}))
    stub.origin = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield stub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def stub() -> Iterator[Stub]:
    with served() as found:
        yield found


# The browser


def chromium() -> str:
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if path := shutil.which(name):
            return path
    pytest.skip("no browser: install Chromium (Debian: apt install chromium)")


@contextmanager
def launched() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium())
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with launched() as found:
        yield found


@pytest.fixture
def page(browser: Browser, stub: Stub) -> Generator[Page]:
    """A fresh page; whatever a test does with it, no request left the origin, and nothing broke the policy."""
    context = browser.new_context()
    context.set_default_timeout(15_000)
    context.grant_permissions(["clipboard-read", "clipboard-write"], origin=stub.origin)
    requests: list[str] = []
    faults: list[str] = []
    context.on("request", lambda request: requests.append(request.url))
    opened = context.new_page()
    opened.on("pageerror", lambda error: faults.append(str(error)))
    opened.on("console", lambda said: faults.append(said.text) if "Failed to load" not in said.text else None)
    yield opened
    context.close()
    assert [url for url in requests if not url.startswith((stub.origin, "data:", f"blob:{stub.origin}"))] == []
    assert faults == []


def visit(page: Page, stub: Stub) -> Page:
    page.goto(stub.origin)
    expect(page.locator("#model-line")).to_contain_text("cervix-run")
    return page


def choose(page: Page, content: bytes | None = None, name: str = "cell.png", kind: str = "image/png") -> None:
    payload = {"name": name, "mimeType": kind, "buffer": png() if content is None else content}
    page.get_by_label("Choose a picture").set_input_files(payload)  # type: ignore[arg-type]


DONE = "Done: likeliest class carcinoma in situ, 61 percent."


def test_a_chosen_picture_is_answered_with_tree_bars_and_cases(page: Page, stub: Stub) -> None:
    choose(visit(page, stub))
    expect(page.get_by_role("status")).to_have_text(DONE)
    expect(page.locator("#answer")).to_contain_text("Likeliest: abnormal › carcinoma in situ, 61%")
    rows = page.locator(".class").all_inner_texts()
    assert [" ".join(row.split()) for row in rows] == [
        "abnormal 83%",
        "carcinoma in situ 61%",
        "severe dysplastic 20%",
        "light dysplastic 2%",
        "normal 17%",
        "columnar 17%",
        "superficial <1%",
    ]
    wide = [page.locator(".fill").nth(at).bounding_box() for at in range(2)]
    assert wide[0] and wide[1] and wide[0]["width"] / wide[1]["width"] == pytest.approx(0.83 / 0.61, rel=0.02)
    assert page.locator("#hits li").count() == 10
    expect(page.locator("#hits li").first).to_contain_text("similarity 0.97")
    expect(page.locator("#cases-summary")).to_contain_text(
        "Of the 10 nearest cases: severe dysplastic 4, superficial 3, carc"
    )
    assert page.locator("#hits img").evaluate_all("all => all.every(i => i.complete && i.naturalWidth > 0)")
    expect(page.get_by_alt_text("Preview of cell.png")).to_be_visible()
    expect(page.get_by_role("alert").filter(has_text="Nothing like this")).to_have_count(0)


def test_both_questions_get_the_same_bytes_and_no_file_name(page: Page, stub: Stub) -> None:
    choose(visit(page, stub), name="Jane_Doe_1970.png")
    expect(page.get_by_role("status")).to_have_text(DONE)
    assert {(path, name) for path, name, _ in stub.pictures} == {
        ("/v1/classify", "image"),
        ("/v1/search?k=10&labelled=true", "image"),
    }
    assert {content for _, _, content in stub.pictures} == {png()}


def test_a_picture_unlike_the_training_raises_a_clear_alert_and_mutes_the_bars(page: Page, stub: Stub) -> None:
    stub.answers["/v1/classify"] = [classified(False), classified(True)]
    choose(visit(page, stub))
    alert = page.get_by_role("alert").filter(has_text="Nothing like this was in training")
    expect(alert).to_be_visible()
    expect(alert).to_contain_text("Farther from the training set")
    expect(page.get_by_role("status")).to_contain_text("nothing like this was in training")
    expect(page.locator("#result")).to_have_class("muted")
    above, bars = alert.bounding_box(), page.locator(".tree").bounding_box()
    assert above and bars and above["y"] + above["height"] <= bars["y"]
    choose(page, png(1), name="other.png")
    expect(page.get_by_role("status")).to_have_text(DONE)
    expect(alert).to_have_count(0)
    expect(page.locator("#result")).not_to_have_class("muted")


def test_a_model_that_cannot_tell_says_so(page: Page, stub: Stub) -> None:
    stub.answers["/v1/classify"] = [classified(None)]
    choose(visit(page, stub))
    expect(page.locator("#domain")).to_contain_text("cannot tell whether pictures like this one")


def test_a_key_is_asked_for_kept_for_the_tab_and_not_shown(page: Page, stub: Stub) -> None:
    stub.key = "s3cret"
    page.goto(stub.origin)
    field = page.get_by_label("Key", exact=True)
    expect(field).to_be_focused()
    assert field.get_attribute("type") == "password"
    page.keyboard.type("wrong")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert").filter(has_text="not accepted")).to_be_visible()
    expect(field).to_be_focused()
    page.keyboard.type("s3cret")
    page.keyboard.press("Enter")
    expect(page.locator("#model-line")).to_contain_text("cervix-run")
    expect(field).to_be_hidden()
    expect(page.get_by_label("Choose a picture")).to_be_focused()
    choose(page)
    expect(page.get_by_role("status")).to_have_text(DONE)
    page.reload()
    expect(page.locator("#model-line")).to_contain_text("cervix-run")
    assert page.evaluate("[Object.values(sessionStorage), localStorage.length, document.cookie]") == [["s3cret"], 0, ""]


def test_a_key_that_expires_meanwhile_is_asked_for_once_and_the_picture_goes_on(page: Page, stub: Stub) -> None:
    visit(page, stub)
    stub.key = "new"
    choose(page)
    page.get_by_label("Key", exact=True).fill("new")
    page.get_by_role("button", name="Use this key").click()
    expect(page.get_by_role("status")).to_have_text(DONE)
    expect(page.locator("#hits li")).to_have_count(10)


@pytest.mark.parametrize("told", [True, False])
def test_without_an_index_the_page_shows_no_cases(page: Page, stub: Stub, told: bool) -> None:
    stub.answers["/v1/search?k=10&labelled=true"] = [failure(409, "no_index", "served without an index")]
    if told:
        stub.answers["/v1/model"] = [model(index=None)]
    choose(visit(page, stub))
    expect(page.get_by_role("status")).to_have_text(DONE)
    expect(page.locator("#cases")).to_be_hidden()
    expect(page.get_by_text("served without an index")).to_be_hidden()
    assert any(path.startswith("/v1/search") for path, *_ in stub.pictures) != told


def test_an_encoder_answers_with_cases_alone(page: Page, stub: Stub) -> None:
    info = model()
    info.body["model"]["classes"] = []
    stub.answers["/v1/model"] = [info]
    choose(visit(page, stub))
    expect(page.get_by_role("status")).to_have_text("Done: 10 nearest cases.")
    assert {path for path, *_ in stub.pictures} == {"/v1/search?k=10&labelled=true"}


@pytest.mark.parametrize(
    ("answer", "words", "again"),
    [
        (failure(400, "unreadable_image", "not an image (PDF)"), "not an image (PDF)", False),
        (failure(503, "overloaded", "the model is starting"), "the model is starting", True),
        (Answer(b"<h1>Bad gateway</h1>", 502), "no proper answer (status 502)", True),
        (Answer(b"{}", 200), "could not show the answer", False),
    ],
)
def test_an_error_is_one_clear_line(page: Page, stub: Stub, answer: Answer, words: str, again: bool) -> None:
    stub.answers["/v1/classify"] = [answer, classified()]
    visit(page, stub)
    if words == "could not show the answer":
        page.evaluate("console.error = () => {}")  # the page tells the developer, too
    choose(page)
    expect(page.get_by_role("alert").filter(has_text=words)).to_be_visible()
    expect(page.locator("#result")).to_be_hidden()
    button = page.get_by_role("button", name="Try again")
    if not again:
        expect(button).to_be_hidden()
        return
    button.click()
    expect(page.get_by_role("status")).to_have_text(DONE)
    expect(page.get_by_role("alert").filter(has_text=words)).to_have_count(0)


def test_a_server_that_is_gone_is_reported_and_asked_again(page: Page, stub: Stub) -> None:
    visit(page, stub)
    page.context.set_offline(True)
    choose(page)
    expect(page.get_by_role("alert").filter(has_text="cannot be reached")).to_be_visible()
    page.context.set_offline(False)
    page.get_by_role("button", name="Try again").click()
    expect(page.get_by_role("status")).to_have_text(DONE)


def test_a_busy_server_is_asked_again_when_it_said_and_only_three_times(page: Page, stub: Stub) -> None:
    busy = failure(429, "busy", "too many requests", Retry_After="1")
    stub.answers["/v1/classify"] = [busy, classified()]
    choose(visit(page, stub))
    expect(page.get_by_role("status")).to_have_text("The server is busy; trying again in 1 second (1 of 3)…")
    expect(page.get_by_role("status")).to_have_text(DONE)
    stub.pictures.clear()
    stub.answers["/v1/classify"] = [failure(429, "busy", "too many requests", Retry_After="0")]
    choose(page, png(1), name="other.png")
    expect(page.get_by_role("alert").filter(has_text="too many requests")).to_be_visible()
    assert sum(path == "/v1/classify" for path, *_ in stub.pictures) == 4


def test_an_older_picture_s_answer_never_replaces_a_newer_one_s(page: Page, stub: Stub) -> None:
    held = threading.Event()
    late = classified(classes={"late": 0.9, "other": 0.1}, held=held)
    stub.answers["/v1/classify"] = [late, classified()]
    visit(page, stub)
    with page.expect_request("**/v1/classify"):
        choose(page)
    choose(page, png(1), name="newer.png")
    expect(page.get_by_role("status")).to_have_text(DONE)
    held.set()
    page.evaluate("fetch('v1/model').then(r => r.json())")  # a full round trip after the late answer was let go
    expect(page.get_by_role("status")).to_have_text(DONE)
    expect(page.get_by_alt_text("Preview of newer.png")).to_be_visible()
    assert "late" not in page.locator("#answer").inner_text()


def test_files_beyond_the_limits_are_refused_before_they_are_sent(page: Page, stub: Stub) -> None:
    visit(page, stub)
    wide = io.BytesIO()
    Image.new("L", (1001, 1001)).save(wide, "PNG")
    for content, words in (
        (b"", "This file is empty."),
        (bytes(300_000), "This file has 0.3 MB; the server takes at most 0.2 MB."),
        (wide.getvalue(), "1001 × 1001 = 1 million pixels"),
    ):
        choose(page, content, name=f"{len(content)}.png")
        expect(page.get_by_role("alert").filter(has_text=words)).to_be_visible()
    assert stub.pictures == []


def test_what_the_browser_cannot_show_is_still_asked(page: Page, stub: Stub) -> None:
    choose(visit(page, stub), b"II*\0 a TIFF", name="scan.tif", kind="image/tiff")
    expect(page.get_by_role("status")).to_have_text(DONE)
    expect(page.get_by_text("No preview: this browser cannot show")).to_be_visible()
    expect(page.locator("#preview")).to_be_hidden()
    assert stub.pictures[0][2] == b"II*\0 a TIFF"


def test_markup_in_names_and_labels_is_inert(page: Page, stub: Stub) -> None:
    evil = "<img src=x onerror=window.pwned=1>"
    info, hits = model(), found(labels=(evil,))
    info.body["model"] |= {"name": f"cervix-run {evil}", "classes": [evil], "metrics": {evil: 1}}
    hits.body["hits"][0] |= {"thumbnail": "https://example.org/spy.png", "group": evil, "id": evil}
    hits.body["hits"][1] |= {"thumbnail": "data:text/html;base64,PGI+"}
    stub.answers = {
        "/v1/model": [info],
        "/v1/classify": [classified(False, {evil: 0.9, "b": 0.1})],
        "/v1/search?k=10&labelled=true": [hits],
    }
    stub.answers["/v1/classify"][0].body["in_domain"]["message"] = evil
    choose(visit(page, stub), name=f"{evil}.png")
    expect(page.get_by_role("status")).to_contain_text("90 percent")
    expect(page.locator("#hits li")).to_have_count(10)
    assert page.evaluate("window.pwned") is None
    assert page.locator("img[src=x], img[src^=http], [onerror]").count() == 0
    expect(page.locator("#domain")).to_contain_text(evil)
    expect(page.locator("#hits li").first).to_contain_text("no picture")


def test_the_keyboard_alone_suffices(page: Page, stub: Stub) -> None:
    page.on("filechooser", lambda _: None)  # from now on choosers are ours: asked at the key, it could come too late
    visit(page, stub)
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the picture")).to_be_focused()
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    expect(page.get_by_label("Choose a picture")).to_be_focused()
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Enter")
    chooser.value.set_files({"name": "cell.png", "mimeType": "image/png", "buffer": png()})
    expect(page.get_by_role("status")).to_have_text(DONE)
    page.keyboard.press("Tab")
    expect(page.get_by_text("Classes it knows")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("#classes li")).to_have_count(5)


def test_a_picture_is_pasted_from_anywhere(page: Page, stub: Stub) -> None:
    visit(page, stub)
    page.evaluate(
        """async (bytes) => {
          const blob = new Blob([new Uint8Array(bytes)], { type: "image/png" });
          await navigator.clipboard.write([new ClipboardItem({ "image/png": blob })]);
        }""",
        list(png()),
    )
    page.keyboard.press("Control+V")
    expect(page.get_by_role("status")).to_have_text(DONE)
    assert page.evaluate("document.getElementById('file').files.length") == 1
    page.evaluate("navigator.clipboard.writeText('words')")
    page.keyboard.press("Control+V")
    expect(page.get_by_role("status")).to_have_text("The clipboard holds no picture.")


def test_a_picture_is_dropped_anywhere(page: Page, stub: Stub) -> None:
    visit(page, stub)
    carried = page.evaluate_handle(
        """(bytes) => {
          const carried = new DataTransfer();
          carried.items.add(new File([new Uint8Array(bytes)], "dropped.png", { type: "image/png" }));
          return carried;
        }""",
        list(png()),
    )
    page.dispatch_event("footer", "dragover", {"dataTransfer": carried})
    expect(page.locator("#drop")).to_have_class("over")
    page.dispatch_event("footer", "drop", {"dataTransfer": carried})
    expect(page.get_by_role("status")).to_have_text(DONE)
    expect(page.locator("#drop")).not_to_have_class("over")
    expect(page.get_by_alt_text("Preview of dropped.png")).to_be_visible()


FAULTS = """() => {
  const faults = [], shown = (e) => e.checkVisibility({ visibilityProperty: true });
  const all = (selector) => [...document.querySelectorAll(selector)];
  for (const e of all("input, button, summary")) {
    const name = e.labels?.length ? e.labels[0].textContent : e.textContent;
    if (!name.trim()) faults.push(`no name: ${e.outerHTML}`);
    const box = e.getBoundingClientRect();
    if (shown(e) && box.height < 24) faults.push(`small target: ${e.outerHTML}`);
  }
  for (const e of all("img")) if (shown(e) && !e.alt) faults.push(`no alt: ${e.outerHTML}`);
  for (const e of all("[aria-describedby], [aria-labelledby], label[for], a[href^='#']")) {
    const ids = ["aria-describedby", "aria-labelledby", "for", "href"].map((a) => e.getAttribute(a) ?? "");
    for (const id of ids.join(" ").replaceAll("#", "").split(" ").filter(Boolean)) {
      if (!document.getElementById(id)) faults.push(`no such id: ${id}`);
    }
  }
  const ids = all("[id]").map((e) => e.id);
  if (new Set(ids).size !== ids.length) faults.push("an id twice");
  if (all("h1").length !== 1 || all("main").length !== 1 || !document.documentElement.lang) faults.push("outline");
  const levels = all("h1, h2, h3, h4").filter(shown).map((e) => Number(e.tagName[1]));
  levels.forEach((level, i) => { if (level > (levels[i - 1] ?? 0) + 1) faults.push(`skipped: h${level}`); });
  const parse = (c) => c.match(/[\\d.]+/g).map(Number);
  const light = (c) => parse(c).slice(0, 3).map((v) => v / 255)
    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (e) => {
    for (; e; e = e.parentElement) {
      const colour = getComputedStyle(e).backgroundColor;
      if ((parse(colour)[3] ?? 1) > 0) return colour;
    }
    return "rgb(255, 255, 255)";
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const e = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !shown(e) || e.closest("noscript, .skip")) continue;
    const [a, b] = [light(getComputedStyle(e).color), light(behind(e))].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < 4.5) faults.push(`contrast ${ratio.toFixed(2)}: ${e.outerHTML.slice(0, 80)}`);
  }
  return faults;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_names_outline_and_contrast_hold_in_every_state(page: Page, stub: Stub, scheme: Any) -> None:
    page.emulate_media(color_scheme=scheme)
    stub.answers["/v1/classify"] = [classified(True), classified(False), classified(None), failure(400, "x", "broken")]
    visit(page, stub)
    assert page.evaluate(FAULTS) == []
    for at, words in enumerate(("Done: ", "Done, but", "Done: ")):
        choose(page, png(at), name=f"{at}.png")
        expect(page.get_by_role("status")).to_contain_text(words)
        assert page.evaluate(FAULTS) == []
    choose(page, png(9), name="9.png")
    expect(page.get_by_text("broken")).to_be_visible()
    stub.key = "k"
    page.reload()
    expect(page.get_by_label("Key", exact=True)).to_be_visible()
    assert page.evaluate(FAULTS) == []


@pytest.mark.parametrize("width", [320, 360, 1280])
def test_nothing_scrolls_sideways(page: Page, stub: Stub, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 740})
    long = "a_tissue_with_a_name_of_" + "x" * 60
    stub.answers["/v1/classify"] = [classified(False, {**CLASSES, f"abnormal/{long}": 0.001})]
    choose(visit(page, stub), name=f"{long}{long}.png")
    expect(page.get_by_role("status")).to_contain_text("Done")
    expect(page.locator("#hits li")).to_have_count(10)
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_many_classes_fold_away_behind_the_likeliest(page: Page, stub: Stub) -> None:
    stub.answers["/v1/classify"] = [classified(classes={f"class_{at}": 0.5 ** (at + 1) for at in range(30)})]
    choose(visit(page, stub))
    expect(page.locator("#answer summary")).to_have_text("18 more, together <1%")
    expect(page.get_by_text("class 29", exact=True).first).to_be_hidden()


def test_of_several_labels_the_page_says_that_each_is_judged_by_itself_and_adds_nothing_up(
    page: Page, stub: Stub
) -> None:
    stub.answers["/v1/classify"] = [
        classified(classes={f"class_{at}": 0.9 - 0.02 * at for at in range(30)}, several=True)
    ]
    choose(visit(page, stub))
    expect(page.locator("#answer summary")).to_have_text("18 more, each at most 66%")
    expect(page.locator("#answer .explained")).to_contain_text("Each class is judged by itself")
    stub.answers["/v1/classify"] = [classified()]
    choose(visit(page, stub))
    expect(page.locator("#answer .explained")).not_to_contain_text("judged by itself")


def test_motion_stops_where_it_is_unwanted_and_print_leaves_the_form_out(page: Page, stub: Stub) -> None:
    held = threading.Event()
    stub.answers["/v1/classify"] = [classified(held=held)]
    page.emulate_media(reduced_motion="reduce")
    choose(visit(page, stub))
    expect(page.get_by_role("status")).to_have_text("Reading image…")
    assert page.evaluate("getComputedStyle(document.getElementById('status'), '::before').animationName") == "none"
    held.set()
    expect(page.get_by_role("status")).to_have_text(DONE)
    page.emulate_media(media="print")
    expect(page.locator("#picker")).to_be_hidden()
    expect(page.locator(".tree")).to_be_visible()
    expect(page.locator(".notice")).to_contain_text("Research use only; not a medical device.")


def test_the_files_hold_no_inline_code_and_no_foreign_address() -> None:
    for file in PAGE.iterdir():
        text = file.read_text(encoding="utf-8")
        assert "//" not in text.replace("\n//", "") or not re.search(r"https?://", text)
        if file.suffix == ".html":
            assert not re.search(r"<style|\son\w+=|\sstyle=|<script(?![^>]*\ssrc=)", text)
        if file.suffix == ".js":
            assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", text)


# For looking at


def write_pictures(folder: Path) -> None:
    """PNG files in `folder` show the page light, dark, on a phone and with its alerts."""
    folder.mkdir(parents=True, exist_ok=True)
    cells = sorted((Path(__file__).parents[3] / "shared" / "data" / "cervix" / "herlev").glob("*.jpg"))[::70]
    picture = cells[0].read_bytes() if cells else png(size=200)
    thumbnails = [_small(cell) for cell in cells[:10]] or None
    looks: list[tuple[str, Any, int, Answer]] = [
        ("start", "light", 1100, classified()),
        ("light", "light", 1100, classified()),
        ("dark", "dark", 1100, classified()),
        ("phone", "light", 360, classified()),
        ("phone-dark", "dark", 360, classified(False)),
        ("alert", "light", 1100, classified(False)),
        ("unknown", "light", 1100, classified(None)),
        ("error", "light", 1100, failure(503, "overloaded", "The model is starting; try again in a minute.")),
    ]
    with served() as stub, launched() as browser:
        stub.answers["/v1/search?k=10&labelled=true"] = [found(thumbnails)]
        for name, scheme, width, answer in looks:
            stub.answers["/v1/classify"] = [answer]
            page = browser.new_page(color_scheme=scheme, viewport={"width": width, "height": 800})
            visit(page, stub)
            if name != "start":
                choose(page, picture, name=cells[0].name if cells else "cell.png")
                expect(page.locator("#hits li")).to_have_count(10)
                expect(page.locator("#status:not(.busy)")).to_be_attached()
            page.screenshot(path=folder / f"{name}.png", full_page=True)
            page.close()
        stub.key = "k"
        page = browser.new_page(viewport={"width": 1100, "height": 800})
        page.goto(stub.origin)
        expect(page.get_by_label("Key", exact=True)).to_be_visible()
        page.screenshot(path=folder / "key.png", full_page=True)


def _small(file: Path) -> bytes:
    out = io.BytesIO()
    with Image.open(file) as image:
        image.convert("RGB").resize((96, 96)).save(out, "PNG")
    return out.getvalue()


if __name__ == "__main__":
    write_pictures(Path(sys.argv[1]))
