"""From stored pixels to a network's input: the evaluation view by hand, and random views that are what they claim."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage

from tests.hostile import picture
from training.transform import Augmentation, Input, evaluation_view, sample_draws, to_tensor, training_view

COLOUR = Input(24, 24, 3, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))
GREY = Input(24, 24, 1, (0.3,), (0.2,))
WHOLE = [1.0, 1.0, 0.0, 0.0, 1.0, 0.0, 1.0, 0.0]
"""The draw that changes nothing: height, width, y, x, flip, turn, gain, shift."""


def stored(count: int = 2, height: int = 24, width: int = 24) -> np.ndarray:
    return np.stack([picture(height, width, seed) for seed in range(count)])


def draw(**changes: float) -> list[float]:
    names = ["height", "width", "y", "x", "flip", "turn", "gain", "shift"]
    values = dict(zip(names, WHOLE, strict=True)) | changes
    return [values[name] for name in names]


def view(pixels: np.ndarray, wanted: Input, **changes: float) -> np.ndarray:
    return np.asarray(training_view(pixels, wanted, np.asarray([draw(**changes)] * len(pixels))))


def normalised(pixels: np.ndarray, wanted: Input) -> np.ndarray:
    """float64 [B, C, H, W] by the definition."""
    values = (pixels.astype(np.float64) / 255 - np.asarray(wanted.mean)) / np.asarray(wanted.std)
    return np.asarray(values.transpose(0, 3, 1, 2))


def test_the_evaluation_view_of_the_right_size_only_normalises() -> None:
    assert np.allclose(evaluation_view(stored(), COLOUR), normalised(stored(), COLOUR), atol=1e-5)


@pytest.mark.parametrize(("height", "width"), [(48, 48), (40, 64), (16, 20), (24, 40)])
def test_the_evaluation_view_of_another_size_is_pillow_s_antialiased_bicubic(height: int, width: int) -> None:
    pixels = stored(2, height, width)
    found = evaluation_view(pixels, Input(24, 24, 3, (0.0,) * 3, (1.0,) * 3)).numpy()
    by_pillow = np.stack([np.asarray(Image.fromarray(p).resize((24, 24), Image.Resampling.BICUBIC)) for p in pixels])
    off = np.abs(found * 255 - by_pillow.transpose(0, 3, 1, 2))
    assert off.max() < 3 and off.mean() < 0.5
    assert found.min() >= 0 and found.max() <= 1


def test_a_non_square_input_is_height_by_width() -> None:
    wanted = Input(16, 32, 3, (0.5,) * 3, (0.5,) * 3)
    assert evaluation_view(stored(), wanted).shape == (2, 3, 16, 32)
    assert view(stored(), wanted).shape == (2, 3, 16, 32)


def test_grey_is_repeated_and_colour_is_weighed_by_luma() -> None:
    colour, grey = stored(), stored()[..., :1]
    three = to_tensor(grey, 3).numpy()
    assert np.allclose(three, np.repeat(grey.transpose(0, 3, 1, 2) / 255, 3, axis=1), atol=1e-6)
    one = to_tensor(colour, 1).numpy()[:, 0]
    assert np.allclose(one, (colour / 255) @ np.asarray([0.299, 0.587, 0.114]), atol=0.51 / 255)  # rounded to a grey
    assert evaluation_view(colour, GREY).shape == view(colour, GREY).shape == (2, 1, 24, 24)
    assert evaluation_view(grey, COLOUR).shape == view(grey, COLOUR).shape == (2, 3, 24, 24)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_input_is_neither_changed_nor_aliased_and_may_be_read_only(channels: int) -> None:
    pixels = stored()[..., :channels].copy()
    before = pixels.copy()
    pixels.flags.writeable = False
    for wanted in (COLOUR, GREY):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            views = [
                evaluation_view(pixels, wanted),
                training_view(pixels, wanted, np.asarray([draw(gain=1.5, shift=0.3)] * 2)),
                training_view(pixels, wanted, np.asarray([WHOLE] * 2)),
            ]
        for made in views:
            made.add_(100)
    assert np.array_equal(pixels, before)


@pytest.mark.parametrize(("height", "width"), [(24, 24), (30, 34)])
def test_the_draw_that_changes_nothing_gives_about_the_evaluation_view(height: int, width: int) -> None:
    pixels = stored(2, height, width)
    off = np.abs(view(pixels, COLOUR) - evaluation_view(pixels, COLOUR).numpy())
    if (height, width) == (24, 24):
        assert off.max() < 1e-4
    assert off.mean() < 0.05


def test_mirroring_is_numpy_s() -> None:
    expected = normalised(stored()[:, :, ::-1], COLOUR)
    assert np.allclose(view(stored(), COLOUR, flip=-1), expected, atol=1e-3)


@pytest.mark.parametrize("turn", [0, 1, 2, 3])
@pytest.mark.parametrize("flip", [1, -1])
def test_quarter_turns_are_numpy_s_and_mirroring_comes_after(turn: int, flip: int) -> None:
    turned = np.rot90(stored(), turn, axes=(1, 2))[:, :, ::flip]
    assert np.allclose(view(stored(), COLOUR, turn=turn, flip=flip), normalised(turned, COLOUR), atol=1e-3)


def test_a_crop_is_the_part_of_the_image_that_its_draw_names() -> None:
    pixels = stored(1, 48, 48)
    wanted = Input(24, 24, 3, (0.0,) * 3, (1.0,) * 3)
    # the lower left quarter: centre (y, x) = (+0.5, -0.5); 48 px are reduced to 36 first, the quarter is 18 of them
    found = view(pixels, wanted, height=0.5, width=0.5, y=0.5, x=-0.5)
    by_pillow = Image.fromarray(pixels[0, 24:, :24]).resize((24, 24), Image.Resampling.BILINEAR)
    assert np.abs(found[0].transpose(1, 2, 0) * 255 - np.asarray(by_pillow)).mean() < 4
    other = Image.fromarray(pixels[0, :24, 24:]).resize((24, 24), Image.Resampling.BILINEAR)
    assert np.abs(found[0].transpose(1, 2, 0) * 255 - np.asarray(other)).mean() > 15


def test_gain_and_shift_change_contrast_and_brightness() -> None:
    wanted = Input(24, 24, 3, (0.0,) * 3, (1.0,) * 3)
    values = stored().transpose(0, 3, 1, 2) / 255
    mean = values.mean(axis=(1, 2, 3), keepdims=True)
    expected = np.clip((values - mean) * 1.2 + mean - 0.05, 0, 1)
    assert np.allclose(view(stored(), wanted, gain=1.2, shift=-0.1), expected, atol=1e-4)


def test_a_view_does_not_depend_on_the_other_images_of_its_batch() -> None:
    pixels = stored(5)
    augmentation = Augmentation(0.4, flip=True, turns=True, jitter=0.3)
    draws, _ = sample_draws(augmentation, 0, "key", positions=np.arange(5))
    together = training_view(pixels, COLOUR, draws)
    for at in range(5):
        assert torch.allclose(training_view(pixels[[at]], COLOUR, draws[[at]])[0], together[at], atol=1e-6)


def test_restoring_undoes_normalising() -> None:
    assert np.array_equal(COLOUR.restore(evaluation_view(stored(), COLOUR)), stored())


def test_an_input_survives_its_dictionary() -> None:
    assert Input.from_dict(COLOUR.as_dict()) == COLOUR


Shares = st.floats(0.05, 1.0)


@settings(max_examples=200, deadline=None)
@given(Shares, st.integers(0, 2**32))
def test_a_crop_lies_inside_and_keeps_at_least_the_share_asked_for(min_crop: float, seed: int) -> None:
    height, width, y, x, *_ = Augmentation(min_crop).draw(np.random.default_rng(seed))
    assert 0 < height <= 1 and 0 < width <= 1
    assert height * width >= min_crop * (1 - 1e-9)
    assert abs(y) + height <= 1 + 1e-9 and abs(x) + width <= 1 + 1e-9


def test_what_is_switched_off_is_never_drawn_and_moves_no_other_number() -> None:
    def drawn(**options: float) -> np.ndarray:
        augmentation = Augmentation(0.4, **({"flip": False} | options))  # type: ignore[arg-type]
        return np.stack([augmentation.draw(np.random.default_rng(seed)) for seed in range(200)])

    plain = drawn()
    assert (plain[:, 4:] == [1, 0, 1, 0]).all()
    for options, columns in (({"flip": True}, [4]), ({"turns": True}, [5]), ({"jitter": 0.2}, [6, 7])):
        changed = drawn(**options)
        same = [at for at in range(8) if at not in columns]
        assert np.array_equal(changed[:, same], plain[:, same])
        assert (changed[:, columns] != plain[:, columns]).any()
    everything = drawn(flip=True, turns=True, jitter=0.2)
    assert set(everything[:, 4]) == {-1.0, 1.0} and set(everything[:, 5]) == {0.0, 1.0, 2.0, 3.0}
    assert np.abs(everything[:, 6] - 1).max() <= 0.2 and np.abs(everything[:, 7]).max() <= 0.2
    assert 70 < (everything[:, 4] == -1).sum() < 130


def test_draws_are_keyed_by_position_alone() -> None:
    augmentation = Augmentation(0.4)
    order = np.asarray([7, 3, 900, 0])
    draws, noise = sample_draws(augmentation, 6, 1, 2, positions=order)
    assert (draws.shape, noise.shape) == ((4, 8), (4, 6)) and noise.dtype == np.float32
    for at, position in enumerate(order):
        one, one_noise = sample_draws(augmentation, 6, 1, 2, positions=np.asarray([position]))
        assert np.array_equal(one[0], draws[at]) and np.array_equal(one_noise[0], noise[at])
    for other in ((1, 3), (2, 2)):
        elsewhere, other_noise = sample_draws(augmentation, 6, *other, positions=order)
        assert not np.isclose(elsewhere[:, 0], draws[:, 0]).any() and not np.isclose(other_noise, noise).any()


# Looks: what presets add


def looked(pixels: np.ndarray, **changes: float) -> np.ndarray:
    """Values in 0..1, [B, 3, H, W], of the size of the image, under a look that changes nothing but what is named."""
    names = ["tilt", "red", "green", "blue", "saturation", "blur", "noise", "row", "column"]
    look = dict(zip(names, [0.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 3.0, 250.0], strict=True)) | changes
    wanted = Input(pixels.shape[1], pixels.shape[2], 3, (0.0,) * 3, (1.0,) * 3)
    draws = np.asarray([[*WHOLE, *(look[name] for name in names)]] * len(pixels))
    return np.asarray(training_view(pixels, wanted, draws))


def values(pixels: np.ndarray) -> np.ndarray:
    return np.asarray(pixels.transpose(0, 3, 1, 2) / 255)


def test_a_look_that_changes_nothing_leaves_the_view_as_it_is_bit_for_bit() -> None:
    pixels, draws = stored(4), sample_draws(Augmentation(0.4, turns=True, jitter=0.2), 0, 5, positions=np.arange(4))[0]
    nothing = np.tile([0.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 3.0, 250.0], (4, 1))
    assert torch.equal(training_view(pixels, COLOUR, np.hstack([draws, nothing])), training_view(pixels, COLOUR, draws))


@pytest.mark.parametrize("degrees", [10, -25])
def test_a_tilt_is_a_rotation_in_pixels_whatever_the_shape(degrees: float) -> None:
    pixels = stored(1, 40, 64)
    found = looked(pixels, tilt=np.radians(degrees))[0]
    by_scipy = ndimage.rotate(values(pixels)[0], degrees, axes=(2, 1), reshape=False, order=1, mode="nearest")
    assert np.abs(found - by_scipy).mean() < 0.005
    other_way = ndimage.rotate(values(pixels)[0], -degrees, axes=(2, 1), reshape=False, order=1, mode="nearest")
    assert np.abs(found - other_way).mean() > 0.05


def test_exponents_are_of_each_channel_and_leave_black_and_white() -> None:
    pixels = stored()
    pixels[:, 0], pixels[:, 1] = 0, 255
    found = looked(pixels, red=1.2, green=0.8, blue=1.0)
    assert np.allclose(found, values(pixels) ** np.reshape([1.2, 0.8, 1.0], (1, 3, 1, 1)), atol=1e-4)
    assert np.allclose(found[:, :, 0], 0, atol=1e-3) and np.allclose(found[:, :, 1], 1, atol=1e-3)


def test_saturation_moves_colours_from_their_grey() -> None:
    grey = values(stored()).mean(axis=1, keepdims=True)
    expected = np.clip(grey + 1.3 * (values(stored()) - grey), 0, 1)
    assert np.allclose(looked(stored(), saturation=1.3), expected, atol=1e-4)


def test_blur_is_a_share_of_the_mean_of_the_neighbours_and_below_0_sharpens() -> None:
    near = ndimage.uniform_filter(values(stored()), (0, 0, 3, 3))
    for share in (0.4, -0.4):
        expected = np.clip(values(stored()) + share * (near - values(stored())), 0, 1)
        inside = (..., slice(1, -1), slice(1, -1))
        assert np.allclose(looked(stored(), blur=share)[inside], expected[inside], atol=1e-4)


def test_noise_has_its_strength_and_another_grain_at_another_place() -> None:
    pixels = np.full((1, 96, 96, 3), 128, np.uint8)
    one, other = (looked(pixels, noise=0.05, row=row) - 128 / 255 for row in (3.0, 140.0))
    assert one.std() == pytest.approx(0.05, rel=0.05) and abs(one.mean()) < 0.002
    assert abs(np.corrcoef(one[0, 0].ravel(), other[0, 0].ravel())[0, 1]) < 0.05


PINNED = [
    (
        Augmentation(0.4),
        [0.8455723857445413, 0.6489135110492262, -0.11673358727537637, 0.10906816580665463, -1.0, 0.0, 1.0, 0.0],
        [0.28954368829727173, 0.5789654850959778, 0.046107590198516846],
        [-1.566449, 1.201408, 1.30154],
    ),
    (
        Augmentation(0.6, True, True, 0.1),
        [
            0.9544708836275189,
            0.7324849566174343,
            -0.034415976088615435,
            0.08310594689821595,
            -1.0,
            1.0,
            1.0168200266043534,
            0.04837035225895823,
        ],
        [0.28954368829727173, 0.5789654850959778, 0.046107590198516846],
        [1.811816, -0.378131, -0.530008],
    ),
]
"""(augmentation, draws and noise of position 900, a pixel of its view): of before there were looks. A run that goes on
after an upgrade must go on with the same crops and masks."""


@pytest.mark.parametrize(("augmentation", "expected", "expected_noise", "pixel"), PINNED)
def test_plain_draws_and_views_are_those_of_before_there_were_presets(
    augmentation: Augmentation, expected: list[float], expected_noise: list[float], pixel: list[float]
) -> None:
    draws, noise = sample_draws(augmentation, 3, 1, 2, positions=np.array([0, 900]))
    assert draws[1].tolist() == expected and noise[1].tolist() == expected_noise
    pixels = np.stack([picture(48, 40, seed) for seed in range(2)])
    assert training_view(pixels, COLOUR, draws)[1, :, 5, 7].tolist() == pytest.approx(pixel, abs=1e-5)


def test_no_position_draws_nothing() -> None:
    draws, noise = sample_draws(Augmentation(0.4), 6, 0, positions=np.empty(0, np.int64))
    assert (draws.shape, noise.shape) == ((0, 8), (0, 6))
