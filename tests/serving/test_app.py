"""The HTTP interface over a backend that answers without a model: shapes, errors, and what is computed how often."""

from __future__ import annotations

import asyncio
import gc
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serving import app as module
from serving.app import EXAMPLES, KEPT, Busy, Desk, Fail, Unanswered, create_app
from tests.asgi import CARD_SHA, CLASSES, SECRET, SHA, Fake, Reply, ask, form, service
from tests.hostile import encoded, picture, write_hostile

PNG = encoded(picture(), "PNG")
OTHER = encoded(picture(seed=1), "PNG")
VERBS = ("classify", "search", "embed")
EDGE = "multipart/form-data; boundary=edge"


def asked(path: str, body: Any = PNG, backend: Fake | None = None, **more: Any) -> Reply:
    changes = more.pop("changes", {})
    backend = backend or Fake()
    served = service(**({"classes": ()} | changes if not backend.classes else changes))
    return asyncio.run(ask(create_app(served, backend), path, body, **more))


def posted(path: str, *files: bytes, **more: Any) -> Reply:
    body, headers = form(*((f"{at}.png", content) for at, content in enumerate(files)))
    return asked(path, body, headers=headers, **more)


# Answers


@pytest.mark.parametrize("send", [asked, posted])
def test_classify_answers_leaves_tree_domain_and_model(send: Callable[..., Reply]) -> None:
    reply = send("/v1/classify", PNG)
    assert reply.status == 200, reply.body
    answer = reply.json()
    assert set(answer) == {"classes", "several", "tree", "in_domain", "model"} and answer["several"] is False
    assert answer["model"] == {"name": "run", "sha256": SHA, "card_sha256": CARD_SHA}
    assert {c["label"] for c in answer["classes"]} == set(CLASSES)
    assert all(set(c) == {"label", "probability"} for c in answer["classes"])
    shares = [c["probability"] for c in answer["classes"]]
    assert shares == sorted(shares, reverse=True) and sum(shares) == pytest.approx(1)
    by_label = {c["label"]: c["probability"] for c in answer["classes"]}
    _check_sums(answer["tree"], by_label)
    assert answer["tree"]["label"] == "" and answer["tree"]["probability"] == pytest.approx(1)
    assert set(answer["in_domain"]) == {"answer", "typicality", "distance", "limit", "message"}


def test_of_several_labels_each_has_its_own_probability_and_a_branch_that_of_its_likeliest() -> None:
    answer = asked("/v1/classify", changes={"several": True}).json()
    assert answer["several"] is True
    shares = [c["probability"] for c in answer["classes"]]
    assert answer["tree"]["probability"] == max(shares) < sum(shares)
    by_label = {c["label"]: c["probability"] for c in answer["classes"]}

    def check(node: dict[str, Any]) -> None:
        below = [
            p for label, p in by_label.items() if f"{label}/".startswith(f"{node['label']}/" if node["label"] else "")
        ]
        assert node["probability"] == max(below)
        for child in node["children"]:
            check(child)

    check(answer["tree"])


def _check_sums(node: dict[str, Any], leaves: dict[str, float]) -> None:
    assert set(node) == {"label", "probability", "children"}
    if not node["children"]:
        assert node["probability"] == pytest.approx(leaves[node["label"]])
        return
    assert node["probability"] == pytest.approx(sum(child["probability"] for child in node["children"]))
    for child in node["children"]:
        assert child["label"].startswith(f"{node['label']}/" if node["label"] else "")
        _check_sums(child, leaves)


def test_search_answers_hits_index_domain_and_model() -> None:
    reply = asked("/v1/search")
    answer = reply.json()
    assert set(answer) == {"hits", "index", "in_domain", "model"}
    assert len(answer["hits"]) == 3
    assert all(set(hit) == {"id", "score", "label", "group", "thumbnail"} for hit in answer["hits"])


def test_embed_answers_the_features_domain_and_model() -> None:
    answer = asked("/v1/embed").json()
    assert set(answer) == {"embedding", "in_domain", "model"}
    assert len(answer["embedding"]) == 3 and all(isinstance(v, float) for v in answer["embedding"])


def test_the_raw_body_and_the_form_give_the_same_whatever_the_content_type() -> None:
    raw = asked("/v1/classify", headers={"Content-Type": "image/png"}).json()
    assert raw == asked("/v1/classify").json() == posted("/v1/classify", PNG).json()
    assert raw == asked("/v1/classify", headers={"Content-Type": "application/x-www-form-urlencoded"}).json()


def test_an_image_unlike_the_training_set_is_said_to_be() -> None:
    white = encoded(np.full((24, 32, 3), 255, dtype=np.uint8), "PNG")
    black = encoded(np.zeros((24, 32, 3), dtype=np.uint8), "PNG")
    unlike, like = (asked("/v1/classify", image).json()["in_domain"] for image in (white, black))
    assert unlike["answer"] is False and "do not trust" in unlike["message"]
    assert like["answer"] is True and like["limit"] == 0.1


@pytest.mark.parametrize("verb", VERBS)
def test_of_several_images_a_bad_one_spoils_no_other(verb: str) -> None:
    reply = posted(f"/v1/{verb}", PNG, b"no image at all", OTHER)
    assert reply.status == 200
    first, second, third = reply.json()["results"]
    assert first == posted(f"/v1/{verb}", PNG).json()
    assert third == posted(f"/v1/{verb}", OTHER).json()
    assert set(second) == {"error"} and second["error"]["code"] == "unreadable_image"


def test_more_images_than_allowed_are_refused() -> None:
    assert len(posted("/v1/embed", *[PNG] * 64).json()["results"]) == 64
    reply = posted("/v1/embed", *[PNG] * 65)
    assert (reply.status, reply.error) == (
        400,
        "bad_request",
    ) and "Maximum number of files is 64" in reply.body.decode()


# Parameters of search


@pytest.mark.parametrize("k", ["0", "-1", "1001", "1000000000", "NaN", "inf", "ten", "", "1.5", "9" * 400])
def test_a_k_that_is_none_is_refused_in_words(k: str) -> None:
    reply = asked("/v1/search", query=f"k={k}")
    assert (reply.status, reply.error) == (422, "bad_parameter")
    assert reply.json()["error"]["message"].startswith("k: Input should be")


def test_the_parameters_of_search_reach_the_index() -> None:
    backend = Fake()
    asked("/v1/search", backend=backend)
    reply = asked("/v1/search", backend=backend, query="k=2&not_group=slide%2017%00%F0%9F%A9%BB&labelled=true")
    assert backend.searched == [(10, None, False), (2, "slide 17\0🩻", True)]
    assert len(reply.json()["hits"]) == 2


def test_a_group_of_any_length_is_not_taken() -> None:
    assert asked("/v1/search", query="not_group=" + "g" * 501).error == "bad_parameter"


# What is no image


@pytest.mark.parametrize("verb", VERBS)
def test_a_request_without_an_image_says_so(verb: str) -> None:
    assert asked(f"/v1/{verb}", b"").error == "no_image"
    assert posted(f"/v1/{verb}").error == "no_image"
    body, headers = form(("a.png", PNG), field_name="picture")
    reply = asked(f"/v1/{verb}", body, headers=headers)
    assert (reply.status, reply.error) == (400, "no_image")


def test_an_image_field_that_is_text_is_no_image() -> None:
    body = b'--edge\r\nContent-Disposition: form-data; name="image"\r\n\r\nhttp://127.0.0.1/secret.png\r\n--edge--\r\n'
    reply = asked("/v1/classify", body, headers={"Content-Type": EDGE})
    assert (reply.status, reply.error) == (400, "no_image")


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b"--edge\r\n", "multipart/form-data"),
        (b"--edge\r\n", "multipart/form-data; boundary="),
        (b"", EDGE),
        (b"garbage", EDGE),
        (b"--edge\r\nContent-Disposition", EDGE),
        (b"--edge\r\n\r\nx\r\n--edge--", EDGE),
        (b'--edge\r\nContent-Disposition: form-data; name="a"\r\n\r\n' + b"x" * 70_000, EDGE),
        (b"--edge\r\nContent-Disposition: form-data\r\n\r\nx\r\n--edge--\r\n", EDGE),
        (b"--edge\r\n" + b"A: b\r\n" * 5000, EDGE),
        (b"--edge\r\n" + b"A" * 100_000 + b": b\r\n\r\n", EDGE),
        (form(("a.png", PNG))[0][:-20], EDGE),
        (form(("a.png", PNG))[0], "multipart/form-data; boundary=" + "e" * 5000),
        (form(("a.png", b"x"))[0], "multipart/form-data; boundary=edge; charset=klingon"),
        (form(*[("a", b"")] * 30, field_name="other")[0] * 9, EDGE),
    ],
)  # fmt: skip
def test_a_malformed_form_is_a_bad_request(body: bytes, kind: str) -> None:
    reply = asked("/v1/classify", body, headers={"Content-Type": kind})
    assert reply.status == 400, reply.body
    assert reply.error in {"bad_request", "no_image", "unreadable_image"}


def test_random_forms_are_never_an_error_of_ours() -> None:
    rng = np.random.default_rng(0)
    whole, headers = form(("a.png", PNG[:200]), ("b.png", b"x"))
    served = create_app(service(), Fake())
    for _ in range(200):
        body = bytearray(whole)
        for at in rng.integers(0, len(body), 4):
            body[at] = rng.integers(256)
        cut = bytes(body[: rng.integers(len(body) + 1)])
        reply = asyncio.run(ask(served, "/v1/embed", cut, headers=headers))
        assert reply.status in {200, 400}, bytes(body)


def test_hostile_files_are_refused_with_their_reason_and_odd_ones_answered(tmp_path: Path) -> None:
    served = create_app(service(), Fake())
    expected = write_hostile(tmp_path)
    for name, reason in expected.items():
        content = (tmp_path / name).read_bytes()
        reply = asyncio.run(ask(served, "/v1/classify", content))
        if reason is None:
            assert reply.status == 200, (name, reply.body)
        elif content:
            assert (reply.status, reply.error) == (400, "unreadable_image"), name
            assert reason in reply.json()["error"]["message"], name


@pytest.mark.parametrize(
    "content", [b"\x80\x04\x95pickle", b"PK\x03\x04npz", b"\x93NUMPY", b"http://x/y.png", b"[" * 9999]
)
def test_what_is_no_image_is_never_opened_as_something_else(content: bytes) -> None:
    assert asked("/v1/classify", content).error == "unreadable_image"


# What the server cannot


def test_an_encoder_has_features_and_neighbours_but_no_classes() -> None:
    backend = Fake(classes=())
    reply = asked("/v1/classify", backend=backend)
    assert (reply.status, reply.error) == (409, "no_classes")
    assert backend.embedded == 0
    assert asked("/v1/embed", backend=backend).json()["in_domain"]["answer"] is None
    assert asked("/v1/search", backend=backend).status == 200


def test_without_an_index_there_is_no_search() -> None:
    backend = Fake()
    reply = asked("/v1/search", backend=backend, changes={"index": None})
    assert (reply.status, reply.error, backend.embedded) == (409, "no_index", 0)


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize(
    ("fault", "status", "code", "again"), [(Busy(SECRET), 429, "busy", "1"), (Unanswered(SECRET), 503, "starting", "1")]
)
def test_a_backend_that_is_full_or_lost_says_come_back(
    verb: str, count: int, fault: Exception, status: int, code: str, again: str
) -> None:
    images = [encoded(picture(seed=seed), "PNG") for seed in range(count)]
    reply = posted(f"/v1/{verb}", *images, backend=Fake(fault=fault))
    assert (reply.status, reply.error, reply.headers["retry-after"]) == (status, code, again)


@pytest.mark.parametrize(
    "fault", [RuntimeError(SECRET), KeyError(SECRET), AssertionError(SECRET), RecursionError(SECRET)]
)
def test_an_unexpected_error_tells_nothing(fault: Exception) -> None:
    sent = Reply()

    async def go() -> None:
        nonlocal sent
        served = create_app(service(), Fake(fault=fault))

        async def quiet(scope: Any, receive: Any, send: Any) -> None:
            with pytest.raises(type(fault)):  # it goes on to the server, which logs it
                await served(scope, receive, send)

        sent = await ask(quiet, "/v1/classify", PNG)

    asyncio.run(go())
    assert (sent.status, sent.error) == (500, "internal")


def test_a_backend_that_hangs_is_given_up() -> None:
    async def go() -> Reply:
        return await ask(create_app(service(timeout_s=0.2), Fake(hold=asyncio.Event())), "/v1/classify", PNG)

    reply = asyncio.run(go())
    assert (reply.status, reply.error) == (504, "timeout")


def test_ready_says_whether_every_part_answers() -> None:
    assert asked("/readyz", method="GET").json() == {"status": "ready"}
    for fault in (Busy(), Unanswered()):
        reply = asked("/readyz", method="GET", backend=Fake(fault=fault))
        assert (reply.status, reply.error, reply.headers["retry-after"]) == (503, "not_ready", "1")
    assert asked("/healthz", method="GET", backend=Fake(fault=Busy())).json() == {"status": "ok"}


# Computed once


def test_an_image_is_encoded_once_for_all_who_ask_about_it_also_at_once() -> None:
    backend = Fake()

    async def go() -> None:
        served = create_app(service(), backend)
        backend.hold = asyncio.Event()
        asyncio.get_running_loop().call_later(0.1, backend.hold.set)
        together = await asyncio.gather(*(ask(served, f"/v1/{verb}", PNG) for verb in VERBS * 3))
        after = await ask(served, "/v1/classify", PNG)
        assert {reply.status for reply in [*together, after]} == {200}
        assert backend.embedded == 1
        await ask(served, "/v1/classify", OTHER)
        assert backend.embedded == 2

    asyncio.run(go())


def test_a_failed_computation_is_not_kept() -> None:
    backend = Fake(fault=Unanswered())

    async def go() -> None:
        served = create_app(service(), backend)
        assert (await ask(served, "/v1/classify", PNG)).status == 503
        backend.fault = None
        assert (await ask(served, "/v1/classify", PNG)).status == 200

    asyncio.run(go())


def test_images_are_not_kept_whatever_became_of_them() -> None:
    """Features are; a list of unreadable images of 32 MB each would fill the memory."""

    async def go() -> None:
        backend = Fake()
        desk = Desk(service(), backend)
        good, bad, hung = (bytes(bytearray(content)) for content in (PNG, b"no image", OTHER))
        before = [sys.getrefcount(content) for content in (good, bad, hung)]
        await desk.see(good)
        with pytest.raises(Fail):
            await desk.see(bad)
        backend.hold = asyncio.Event()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(desk.see(hung), 0.1)
        await asyncio.sleep(0.01)
        assert len(desk.kept) == 1 and not desk.under_way
        gc.collect()
        assert [sys.getrefcount(content) for content in (good, bad, hung)] == before

    asyncio.run(go())


def test_one_who_leaves_does_not_spoil_it_for_another() -> None:
    async def go() -> None:
        backend = Fake(hold=asyncio.Event())
        desk = Desk(service(), backend)
        leaving, staying = (asyncio.create_task(desk.see(PNG)) for _ in range(2))
        await asyncio.sleep(0.05)
        leaving.cancel()
        await asyncio.sleep(0.01)
        assert backend.hold is not None
        backend.hold.set()
        assert (await staying)[0].shape == (3,)
        assert backend.embedded == 1

    asyncio.run(go())


def test_features_are_kept_up_to_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    assert KEPT >= 64
    monkeypatch.setattr(module, "KEPT", 2)
    backend = Fake()

    async def go() -> None:
        desk = Desk(service(), backend)
        images = [encoded(picture(8, 8, seed=seed), "PNG") for seed in range(3)]
        for image in (images[0], images[1], images[0], images[2], images[0]):
            await desk.see(image)
        assert len(desk.kept) == 2 and backend.embedded == 3, "the one asked for most lately is kept"

    asyncio.run(go())


# Page and document


def test_the_page_has_its_files_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "page").mkdir()
    (tmp_path / "page" / "index.html").write_text("<p>page</p>")
    (tmp_path / "page" / "app.js").write_text("1")
    (tmp_path / "secret").write_text("secret")
    monkeypatch.setattr(module, "PAGE", tmp_path / "page")
    front = asked("/", method="GET")
    assert (front.status, front.body) == (200, b"<p>page</p>")
    assert front.headers["content-type"].startswith("text/html")
    assert asked("/page/app.js", method="GET").headers["content-type"].startswith("text/javascript")
    policy = front.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "script-src 'self';" in policy and "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    assert front.headers["x-content-type-options"] == "nosniff"
    for path in (
        "/page/..%2fsecret",
        "/page/../secret",
        "/page/%2e%2e/secret",
        "/page//etc/passwd",
        "/page/",
        "/secret",
    ):
        reply = asked(path, method="GET")
        assert (reply.status, reply.error) == (404, "not_found"), path


def test_a_server_without_the_page_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PAGE", tmp_path / "none")
    assert asked("/", method="GET").error == "not_found"


def test_other_paths_and_methods_are_errors_of_the_same_form() -> None:
    assert (asked("/v2/classify").status, asked("/v2/classify").error) == (404, "not_found")
    reply = asked("/v1/classify", method="GET")
    assert (reply.status, reply.error, reply.headers["allow"]) == (405, "not_allowed", "POST")
    assert asked("/v1/classify/").status == 404
    assert asked("/docs", method="GET").status == 404


def test_the_model_is_described() -> None:
    answer = asked("/v1/model", method="GET").json()
    assert answer["model"]["name"] == "run" and answer["model"]["classes"] == list(CLASSES)
    assert answer["limits"]["max_body_bytes"] == 1 << 20


def test_the_document_has_examples_and_every_status() -> None:
    document = asked("/openapi.json", method="GET").json()
    for verb in VERBS:
        operation = document["paths"][f"/v1/{verb}"]["post"]
        assert {"200", "400", "401", "408", "413", "422", "429", "503", "504"} <= set(operation["responses"])
        example = operation["responses"]["200"]["content"]["application/json"]["example"]
        assert set(example) == set(EXAMPLES[verb]) == set(asked(f"/v1/{verb}").json())
        assert {"multipart/form-data", "application/octet-stream"} <= set(operation["requestBody"]["content"])
        assert operation["summary"] and operation["description"]
    assert json.dumps(document).count("HTTPValidationError") == 0


def test_the_document_asks_for_a_key_exactly_where_the_server_has_keys() -> None:
    plain, keyed = (create_app(service(), Fake(), keyed=keyed).openapi() for keyed in (False, True))
    scheme = keyed["components"]["securitySchemes"]["HTTPBearer"]
    assert (scheme["type"], scheme["scheme"]) == ("http", "bearer")
    assert "securitySchemes" not in plain["components"]
    for path, method in [("/v1/model", "get"), *((f"/v1/{verb}", "post") for verb in VERBS)]:
        assert keyed["paths"][path][method]["security"] == [{"HTTPBearer": []}]
        assert "security" not in plain["paths"][path][method]
    assert "security" not in keyed["paths"]["/healthz"]["get"]
