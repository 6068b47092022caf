"""The endpoints hold what their OpenAPI document says: Schemathesis asks what it allows, and what it does not."""

from __future__ import annotations

import hashlib
from typing import Any

import schemathesis
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from serving.app import create_app
from serving.door import Door, Limits
from tests.asgi import Fake, service
from tests.hostile import encoded, picture

IMAGES = [encoded(picture(16, 16, seed=seed), kind) for seed, kind in enumerate(("PNG", "JPEG", "BMP", "WEBP"))]

# that a file is an image is more than a schema can say: without these, most of what it allows is refused
for kind in ("application/octet-stream", "image/png", "image/jpeg", "image/tiff", "image/bmp", "image/webp"):
    schemathesis.openapi.media_type(kind, st.sampled_from(IMAGES))

KEY = "a-key-of-the-tests"
LIMITS = Limits(body_bytes=1 << 20, seconds=20, requests=8)
free = Door(create_app(service(), Fake()), LIMITS)
keyed = Door(create_app(service(), Fake(), keyed=True), LIMITS, (hashlib.sha256(KEY.encode()).digest(),))
document, document_of_keyed = (schemathesis.openapi.from_asgi("/openapi.json", served) for served in (free, keyed))


@document.parametrize()
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_every_answer_is_one_that_the_document_announces(case: schemathesis.Case[Any]) -> None:
    case.call_and_validate()
    assert (free.held, free.inside) == (0, 0)


@document_of_keyed.parametrize()
@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_where_the_document_asks_for_a_key_no_answer_comes_without_one(case: schemathesis.Case[Any]) -> None:
    case.call_and_validate(headers={"Authorization": f"Bearer {KEY}"})
    assert (keyed.held, keyed.inside) == (0, 0)
