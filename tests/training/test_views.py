"""Views of methods: one view is drawn as ever, small crops lie where they say, all by key alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from training.augment import MODALITIES
from training.transform import Augmentation, Input, evaluation_view, sample_draws, training_view
from training.views import Views, draw_views, render

LARGE, SMALL = Input(32, 32, 3, (0.0,) * 3, (1.0,) * 3), Input(16, 16, 3, (0.0,) * 3, (1.0,) * 3)
POSITIONS = np.asarray([5, 2, 9])
AUGMENTATION = Augmentation(0.4, turns=True)
GROUPS = (Views(LARGE, 2), Views(SMALL, 3, (0.05, 0.4)))


def pixels(count: int = 3, size: int = 64) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def test_one_view_is_drawn_and_rendered_as_for_a_masked_autoencoder_before_there_were_groups() -> None:
    draws, noise = draw_views((Views(LARGE),), AUGMENTATION, 7, "seed", 3, positions=POSITIONS)
    known, known_noise = sample_draws(AUGMENTATION, 7, "seed", 3, positions=POSITIONS)
    np.testing.assert_array_equal(draws[0], known)
    np.testing.assert_array_equal(noise, known_noise)
    (view,) = render(pixels(), (Views(LARGE),), draws)
    assert torch.equal(view, training_view(pixels(), LARGE, known))


def test_a_sample_s_views_depend_on_its_key_and_position_alone() -> None:
    draws, noise = draw_views(GROUPS, AUGMENTATION, 2, "seed", 0, positions=POSITIONS)
    assert [part.shape for part in draws] == [(6, 8), (9, 8)]
    for at, position in enumerate(POSITIONS):
        alone, own = draw_views(GROUPS, AUGMENTATION, 2, "seed", 0, positions=np.asarray([position]))
        for group, part in zip(draws, alone, strict=True):
            np.testing.assert_array_equal(group[at::3], part)
        np.testing.assert_array_equal(noise[at], own[0])
    assert len(np.unique(np.concatenate(draws), axis=0)) == 15


def test_small_crops_have_their_area_and_lie_anywhere_within_the_image() -> None:
    (_, draws), _ = draw_views(GROUPS, Augmentation(0.9), 0, 0, positions=np.arange(400))
    height, width, y, x = draws[:, :4].T
    area = height * width
    assert area.min() >= 0.05 - 1e-9 and area.max() <= 0.4 + 1e-9
    assert area.min() < 0.06 and area.max() > 0.38
    for centre, side in ((y, height), (x, width)):
        assert (np.abs(centre) + side <= 1 + 1e-9).all()
        assert np.abs(centre).max() > 0.6 and abs(centre.mean()) < 0.06


def test_a_method_that_turns_images_itself_has_them_upright() -> None:
    (upright,), _ = draw_views((Views(LARGE, upright=True),), AUGMENTATION, 0, 0, positions=np.arange(50))
    (turned,), _ = draw_views((Views(LARGE),), AUGMENTATION, 0, 0, positions=np.arange(50))
    assert set(upright[:, 5]) == {0.0} and set(turned[:, 5]) == {0.0, 1.0, 2.0, 3.0}
    np.testing.assert_array_equal(np.delete(upright, 5, axis=1), np.delete(turned, 5, axis=1))


def test_the_same_view_for_another_input_shows_the_same_part() -> None:
    groups = (Views(LARGE), Views(Input(64, 64, 1, (0.2,), (0.5,)), again=True))
    draws, _ = draw_views(groups, Augmentation(0.3), 0, 0, positions=POSITIONS)
    np.testing.assert_array_equal(draws[0], draws[1])
    smooth = pixels(size=8).repeat(8, 1).repeat(8, 2)
    one, other = render(smooth, groups, draws)
    assert one.shape == (3, 3, 32, 32) and other.shape == (3, 1, 64, 64)
    grey = torch.nn.functional.avg_pool2d(other * 0.5 + 0.2, 2)[:, 0]
    weights = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    assert float(((one * weights).sum(1) - grey).abs().mean()) < 0.06


def test_views_of_a_group_stand_one_after_the_other() -> None:
    draws, _ = draw_views(GROUPS, Augmentation(0.4), 0, 0, positions=POSITIONS)
    large, small = render(pixels(), GROUPS, draws)
    assert large.shape == (6, 3, 32, 32) and small.shape == (9, 3, 16, 16)
    assert torch.equal(large[4], training_view(pixels()[1:2], LARGE, draws[0][4:5])[0])


def test_a_small_crop_keeps_the_detail_that_a_whole_image_of_its_size_has_lost() -> None:
    stripes = np.zeros((1, 128, 128, 3), dtype=np.uint8)
    stripes[:, :, ::4], stripes[:, :, 1::4] = 255, 255
    groups = (Views(SMALL, 1, (0.015, 0.016)),)
    draws, _ = draw_views(groups, Augmentation(0.5), 0, 0, positions=np.arange(1))
    (crop,) = render(stripes, groups, draws)
    assert float(crop.std()) > 0.3
    assert float(evaluation_view(stripes, SMALL).std()) < 0.1


def test_what_a_preset_adds_comes_with_every_view_and_moves_no_other_number() -> None:
    preset = MODALITIES["oct"].augmentation
    draws, noise = draw_views(GROUPS, preset, 2, "seed", 0, positions=POSITIONS)
    plain, plain_noise = draw_views(
        GROUPS, replace(preset, tilt=0, gamma=0, noise=0), 2, "seed", 0, positions=POSITIONS
    )
    np.testing.assert_array_equal(noise, plain_noise)
    for changed, known in zip(draws, plain, strict=True):
        np.testing.assert_array_equal(changed[:, :8], known)
    assert len(np.unique(np.concatenate(draws)[:, 8:], axis=0)) == 15
    alone, _ = draw_views(GROUPS, preset, 2, "seed", 0, positions=POSITIONS[1:2])
    for part, own in zip(draws, alone, strict=True):
        np.testing.assert_array_equal(part[1::3], own)
    (one,), _ = draw_views(GROUPS[:1], preset, 2, "seed", 0, positions=POSITIONS)
    np.testing.assert_array_equal(one[:3], sample_draws(preset, 2, "seed", 0, positions=POSITIONS)[0])


@pytest.mark.parametrize("noise", [0, 3])
def test_noise_follows_the_draws_of_all_views(noise: int) -> None:
    _, found = draw_views(GROUPS, AUGMENTATION, noise, 0, positions=POSITIONS)
    assert found.shape == (3, noise) and found.dtype == np.float32
