"""The model card of a pretrained encoder: short, true, and never markup."""

from __future__ import annotations

import yaml

from training.artifact import ModelCard
from training.encoder import Architecture
from training.encoder_card import encoder_card
from training.images import ImagePath
from training.transform import Input

CARD = ModelCard(
    Architecture("test_vit", 32, 32, 3, 16),
    ImagePath(40, 40),
    Input(32, 32, 3, (0.5,) * 3, (0.25,) * 3),
    lineage={
        "verb": "pretrain", "method": "mae", "dataset": "cafe", "images": 1200, "initial": {"init": "/secret/first"},
    },
)  # fmt: skip


def test_a_card_of_an_encoder_says_what_it_was_shown_how_it_was_probed_and_no_place() -> None:
    text = encoder_card(CARD, name="pool", data="scans", scores={"knn_balanced_accuracy": 0.4567})
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front)["pipeline_tag"] == "image-feature-extraction"
    for words in ("not a medical device", "1,200 images of the data set scans, version `cafe`, by method `mae`"):
        assert words in body
    assert "nearest neighbours on its features: 0.457" in body and "linear classifier on its features" not in body
    assert CARD.architecture.snippet("model.safetensors", 0) in body
    assert "First weights: first" in body and "/secret" not in text


def test_without_a_probe_it_says_that_it_was_not_judged_and_names_stay_text() -> None:
    text = encoder_card(CARD, name="a: b\n---\n# x", data="<b>*d*", scores={})
    assert "It was not judged" in text and "\n# x" not in text.split("\n---\n", 1)[1]
    assert yaml.safe_load(text.split("---\n", 2)[1])["model_name"] == "a: b --- # x"
    assert "\\<b\\>\\*d\\*" in text
