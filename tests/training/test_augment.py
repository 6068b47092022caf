"""Presets of random changes: what they may never do, for every one of them, and what they are called."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch

from cluster.errors import UsageError
from tests.hostile import picture
from training.augment import MODALITIES, augmentation_of, described
from training.configs import Modality, PretrainConfig, TransferConfig
from training.sheets import contact_sheet, sheet_section
from training.transform import VIEW, Augmentation, Input, evaluation_view, sample_draws, training_view

every_modality = pytest.mark.parametrize("name", sorted(MODALITIES))
COLOUR = Input(24, 32, 3, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))
GREY = Input(24, 32, 1, (0.3,), (0.2,))


def stored(count: int, channels: int = 3) -> np.ndarray:
    return np.stack([picture(30, 40, seed) for seed in range(count)])[..., :channels]


def drawn(name: str, count: int = 200) -> np.ndarray:
    return sample_draws(MODALITIES[name].augmentation, 0, "key", positions=np.arange(count))[0]


def test_the_flag_names_every_preset_and_auto() -> None:
    assert set(get_args(Modality)) == {"auto", *MODALITIES}


@every_modality
def test_a_preset_says_why_and_labels_crop_no_more_than_their_absence(name: str) -> None:
    preset = MODALITIES[name]
    assert preset.name and preset.reason.endswith(".")
    assert 0.5 <= preset.unlabelled_crop <= preset.augmentation.min_crop <= 1
    words = described(preset.augmentation)
    assert ("mirroring" in words, "quarter turns" in words) == (preset.augmentation.flip, preset.augmentation.turns)


def test_what_would_turn_one_finding_into_another_is_in_no_preset() -> None:
    safe = {name: preset.augmentation for name, preset in MODALITIES.items()}
    assert {name for name, a in safe.items() if not a.flip} == {"none", "xray", "ct"}, "sides that have a meaning"
    assert {name for name, a in safe.items() if a.turns} == {"derm", "cytology"}, "pictures without an upright"
    assert {name for name, a in safe.items() if a.stain} == {"cytology"}, "hue is a finding of fundus and derm"
    assert max(a.tilt for a in safe.values()) <= 15
    for name in ("ct", "cytology", "ultrasound"):
        assert safe[name].aspect == 1, "shape is a finding"
    for name in ("oct", "fundus", "derm"):
        assert not safe[name].blur, "findings of a few pixels"


@every_modality
def test_draws_stay_within_their_strengths_and_reach_for_them(name: str) -> None:
    a, looks = MODALITIES[name].augmentation, drawn(name)[:, VIEW:]
    if not a.looks:
        assert looks.shape[1] == 0
        return
    limits = np.array([np.radians(a.tilt), a.saturation, a.blur, a.noise])
    found = np.abs(looks[:, [0, 4, 5, 6]] - [0, 1, 0, 0]).max(axis=0)
    assert (found <= limits + 1e-12).all() and (found >= 0.9 * limits).all()
    assert np.abs(np.log(looks[:, 1:4])).max() <= a.gamma + a.stain + 1e-12
    assert (looks[:, 1] == looks[:, 2]).all() == (a.stain == 0)
    assert (np.abs(drawn(name)[:, 6] - 1) <= a.jitter).all()


@every_modality
def test_no_preset_moves_a_number_of_another_draw(name: str) -> None:
    """Masks and crops of a run are the same ones whatever is switched on."""
    positions = np.arange(20)
    plain, noise = sample_draws(Augmentation(0.5), 7, "key", positions=positions)
    changed = Augmentation(**{**vars(MODALITIES[name].augmentation), "min_crop": 0.5, "aspect": 4 / 3})
    draws, other = sample_draws(changed, 7, "key", positions=positions)
    assert np.array_equal(noise, other) and np.array_equal(draws[:, :4], plain[:, :4])
    alone = [sample_draws(changed, 7, "key", positions=np.asarray([at]))[0][0] for at in positions]
    assert np.array_equal(draws, np.stack(alone))


@every_modality
@pytest.mark.parametrize("wanted", [COLOUR, GREY])
def test_views_are_images_and_none_depends_on_the_others_of_its_batch(name: str, wanted: Input) -> None:
    pixels, draws = stored(5, wanted.channels), drawn(name, 5)
    together = training_view(pixels, wanted, draws)
    assert together.shape == (5, wanted.channels, 24, 32) and together.dtype == torch.float32
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (wanted.mean, wanted.std))
    values = together * std + mean
    assert values.min() >= -1e-5 and values.max() <= 1 + 1e-5
    for at in range(5):
        assert torch.allclose(training_view(pixels[[at]], wanted, draws[[at]])[0], together[at], atol=1e-5)


def test_without_augmentation_a_view_is_the_evaluation_view() -> None:
    pixels = np.stack([picture(24, 32, seed) for seed in range(2)])
    assert torch.allclose(training_view(pixels, COLOUR, drawn("none", 2)), evaluation_view(pixels, COLOUR), atol=1e-4)


# The flag


def pretraining(**options: Any) -> PretrainConfig:
    return PretrainConfig("d", out="o", **options)


def transferring(**options: Any) -> TransferConfig:
    return TransferConfig("d", out="o", **options)


def test_without_a_modality_the_flags_decide() -> None:
    assert augmentation_of(pretraining()) == Augmentation(0.4)
    assert augmentation_of(pretraining(min_crop=0.7, flip=False)) == Augmentation(0.7, flip=False)
    assert augmentation_of(transferring(turns=True)) == Augmentation(0.6, turns=True, jitter=0.1)


def test_a_modality_decides_for_both_verbs() -> None:
    preset = MODALITIES["oct"]
    assert augmentation_of(transferring(modality="oct")) == preset.augmentation
    found = augmentation_of(pretraining(modality="oct"))
    assert (found.min_crop, found.tilt) == (preset.unlabelled_crop, preset.augmentation.tilt)


@pytest.mark.parametrize("given", [{"min_crop": 0.5}, {"flip": False}, {"turns": True}, {"jitter": 0.0}])
def test_a_flag_that_the_modality_decides_is_refused_beside_it(given: dict[str, Any]) -> None:
    flag = next(iter(given)).replace("_", "-")
    with pytest.raises(UsageError, match=f"--{flag} .*: --modality xray decides it; leave one of the two out"):
        transferring(modality="xray", **given)
    if {"min_crop", "flip"} & set(given):
        with pytest.raises(UsageError, match="--modality none decides it"):
            pretraining(modality="none", **given)


# The contact sheet


def test_a_contact_sheet_shows_each_image_as_it_is_and_then_its_views() -> None:
    pixels = np.stack([picture(24, 32, seed) for seed in range(2)])
    sheet = contact_sheet(pixels, COLOUR, [MODALITIES["none"].augmentation, MODALITIES["derm"].augmentation], columns=3)
    assert sheet.shape == (4 * 24, 4 * 32, 3) and sheet.dtype == np.uint8
    for row in range(4):
        line = sheet[row * 24 : row * 24 + 24]
        same = [np.abs(line[:, at * 32 : at * 32 + 32].astype(int) - pixels[row % 2]).max() <= 1 for at in range(4)]
        assert same == ([True] * 4 if row < 2 else [True, False, False, False])


@pytest.mark.parametrize(("wanted", "modality"), [(COLOUR, "auto"), (GREY, "xray")])
def test_the_section_of_a_report_shows_the_views_and_says_what_was_changed(
    wanted: Input, modality: Any, tmp_path: Path
) -> None:
    section = sheet_section(tmp_path / "figures", stored(6), wanted, transferring(modality=modality))
    text, figure = section.blocks
    assert described(augmentation_of(transferring(modality=modality))) in text.paragraph  # type: ignore[union-attr]
    assert (modality == "xray") == ("situs inversus" in text.paragraph)  # type: ignore[union-attr]
    assert figure.path.exists() and figure.contains_data  # type: ignore[union-attr]
