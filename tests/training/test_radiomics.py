"""Radiomics: texture as scikit-image and a hand count have it, known shapes, and numbers for every image."""

from __future__ import annotations

from math import comb, log

import numpy as np
import pytest
from skimage.draw import disk, polygon
from skimage.feature import graycomatrix, graycoprops

from training.radiomics import (
    ANGLES,
    COLUMNS,
    DISTANCES,
    LEVELS,
    field_of,
    object_of,
    radial_gradient,
    radiomics,
    sum_and_difference_variance,
    texture,
)

SIDE = 96


def named(pixels: np.ndarray, masks: np.ndarray | None = None) -> list[dict[str, float]]:
    return [dict(zip(COLUMNS, row.tolist(), strict=True)) for row in radiomics(pixels, masks)]


def of_one(grey: np.ndarray, mask: np.ndarray | None = None) -> dict[str, float]:
    return named(grey[None, ..., None], None if mask is None else mask[None])[0]


def noise(seed: int = 0, shape: tuple[int, int] = (SIDE, SIDE)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 20, shape).astype(np.uint8)


def drawn(rows: np.ndarray, columns: np.ndarray, light: int = 160) -> np.ndarray:
    """A light shape on a dark ground, both a little uneven."""
    grey = 30 + noise()
    grey[rows, columns] = light + noise(1)[rows, columns]
    return grey


def round_one(radius: float = 24) -> np.ndarray:
    return drawn(*disk((47.5, 47.5), radius))


def star(points: int = 9, inner: float = 12, outer: float = 40) -> np.ndarray:
    turn = np.arange(2 * points) * np.pi / points
    radius = np.where(np.arange(2 * points) % 2 == 0, outer, inner)
    return drawn(*polygon(47.5 + radius * np.sin(turn), 47.5 + radius * np.cos(turn)))


# Texture


def test_texture_of_a_whole_image_is_what_scikit_image_says() -> None:
    grey = np.random.default_rng(3).integers(0, 256, (40, 50)).astype(np.uint8)
    found = texture(grey, np.ones(grey.shape, dtype=bool)).reshape(7, len(DISTANCES))
    pairs = graycomatrix(grey // 8, DISTANCES, ANGLES, levels=LEVELS, symmetric=True, normed=True)
    scale = {"energy": 1, "entropy": 2 * log(LEVELS), "contrast": 31**2, "correlation": 1, "homogeneity": 1}
    for row, (name, unit) in zip(found, scale.items(), strict=False):
        np.testing.assert_allclose(row, graycoprops(pairs, name).mean(axis=1) / unit, rtol=1e-12)


def test_texture_counts_only_pairs_that_lie_wholly_in_the_mask() -> None:
    """By a loop over all pixels, at distance 1 to the right, of a ragged mask."""
    rng = np.random.default_rng(4)
    grey, mask = rng.integers(0, 256, (9, 11)).astype(np.uint8), rng.random((9, 11)) < 0.6
    counts = np.zeros((LEVELS, LEVELS, 1, 4))
    steps = [(0, 1), (1, 1), (1, 0), (1, -1)]
    for at, (down, right) in enumerate(steps):
        for row in range(9):
            for column in range(11):
                r, c = row + down, column + right
                if 0 <= r < 9 and 0 <= c < 11 and mask[row, column] and mask[r, c]:
                    a, b = grey[row, column] // 8, grey[r, c] // 8
                    counts[a, b, 0, at] += 1
                    counts[b, a, 0, at] += 1
    found = texture(grey, mask).reshape(7, len(DISTANCES))[:, 0]
    for value, name, unit in ((found[0], "energy", 1), (found[2], "contrast", 31**2), (found[4], "homogeneity", 1)):
        assert value == pytest.approx(graycoprops(counts, name).mean() / unit)


def test_a_small_matrix_by_hand() -> None:
    """Levels 0 and 2 side by side, two pairs, symmetric, and one pair of 0 with 0: six entries in all."""
    pairs = np.zeros((4, 4, 1, 1))
    pairs[0, 2] = pairs[2, 0] = 2
    pairs[0, 0] = 2
    sums, differences = sum_and_difference_variance(pairs)
    # both the sum and the difference are 2 with probability 2/3 and 0 with 1/3
    assert sums[0, 0] == pytest.approx(4 * 2 / 9) and differences[0, 0] == pytest.approx(4 * 2 / 9)
    checkers = np.zeros((6, 6), dtype=np.uint8)
    checkers[::2, 1::2] = checkers[1::2, ::2] = 80  # levels 0 and 10: each step is one of 10, each diagonal of none
    found = dict(zip(COLUMNS[-21:], texture(checkers, np.ones((6, 6), dtype=bool)), strict=True))
    assert found["texture_contrast_1"] == pytest.approx((100 + 0 + 100 + 0) / 4 / 31**2)
    assert found["texture_homogeneity_1"] == pytest.approx((1 / 101 + 1 + 1 / 101 + 1) / 4)
    assert found["texture_difference_variance_1"] == 0
    assert found["texture_correlation_1"] == pytest.approx(0)


# Shape and margin


def test_a_disc_is_round_and_measured() -> None:
    found = of_one(round_one(24))
    assert found["shape_area"] == pytest.approx(np.pi * 24**2 / SIDE**2, rel=0.02)
    assert found["shape_diameter"] == pytest.approx(48 / (SIDE * 2**0.5), rel=0.03)
    assert found["shape_width"] == pytest.approx(found["shape_diameter"], rel=0.03)
    assert found["shape_compactness"] == pytest.approx(1, abs=0.06)
    assert found["shape_irregularity"] < 0.03 and found["shape_eccentricity"] < 0.1
    assert found["margin_contrast"] == pytest.approx(130 / 255, abs=0.02)


def test_a_bar_is_long() -> None:
    found = of_one(drawn(*polygon([40, 40, 55, 55], [10, 85, 85, 10])))
    assert found["shape_eccentricity"] > 0.95 and found["shape_compactness"] < 0.65
    assert found["shape_width"] < 0.3 * found["shape_diameter"]


def test_a_star_s_gradients_point_less_to_its_centre_than_a_disc_s() -> None:
    disc, spiked = of_one(round_one()), of_one(star())
    assert disc["margin_spiculation_mean"] > 0.8 and disc["margin_spiculation_width"] < 0.12
    assert spiked["margin_spiculation_mean"] < 0.7
    assert spiked["shape_irregularity"] > 5 * disc["shape_irregularity"]
    assert spiked["shape_compactness"] < 0.6 * disc["shape_compactness"]


def test_light_on_dark_and_dark_on_light_have_the_same_margin() -> None:
    one, other = of_one(star()), of_one(255 - star())
    for name in ("shape_area", "margin_sharpness", "margin_spiculation_mean", "margin_spiculation_width"):
        assert one[name] == pytest.approx(other[name], abs=1e-4)
    assert one["margin_contrast"] == pytest.approx(-other["margin_contrast"], abs=1e-6)


def test_the_width_of_a_radial_gradient_histogram_is_that_of_its_peak() -> None:
    """Binomial weights over nine bins, and all directions alike."""
    bins, degrees = 36, np.pi / 18
    angles = np.repeat(np.arange(-4, 5), [comb(8, k) for k in range(9)]) * degrees
    radius = np.stack([np.zeros(len(angles)), np.ones(len(angles))])
    mean, width = radial_gradient(np.stack([np.sin(angles), np.cos(angles)]), radius)
    assert mean == pytest.approx(np.cos(angles).mean())
    crossing = 1 + (56 - 35) / (56 - 28)  # the bins hold 70, 56, 28, …: half of 70 lies between the first and second
    assert width == pytest.approx(2 * crossing / bins)
    everywhere = (np.arange(bins) - 18) * degrees
    mean, width = radial_gradient(np.stack([np.sin(everywhere), np.cos(everywhere)]), np.tile([[0.0], [1.0]], bins))
    assert mean == pytest.approx(0, abs=1e-9) and width == 1
    assert radial_gradient(np.zeros((2, 5)), np.ones((2, 5))) == (0.0, 1.0)


def test_quarter_turns_change_nothing() -> None:
    """Of an image and its mask, and of an image whose object must be found."""
    grey = star(7)
    grey[:, 60:] //= 2
    mask = grey > 70
    for given in (None, mask):
        plain = np.asarray(list(of_one(grey, given).values()))
        for quarter in (1, 2, 3):
            turned = of_one(np.rot90(grey, quarter), None if given is None else np.rot90(given, quarter))
            np.testing.assert_allclose(list(turned.values()), plain, atol=2e-5)


# Objects


def test_the_object_is_the_largest_part_and_has_no_holes() -> None:
    grey = round_one(20)
    grey[44:52, 44:52] = 30  # a hole
    grey[4:12, 4:12] = 200  # a speck
    expected = np.zeros((SIDE, SIDE), dtype=bool)
    expected[disk((47.5, 47.5), 20)] = True
    assert np.array_equal(object_of(grey), expected)
    assert np.array_equal(object_of(255 - grey), expected)  # what touches the border less, dark or light


def test_padding_of_one_colour_is_no_part_of_the_picture() -> None:
    grey = round_one()
    for colour in (0, 128, 255):
        padded = np.full((SIDE, 160), colour, dtype=np.uint8)
        padded[:, 32:128] = grey
        assert field_of(padded) == (slice(0, SIDE), slice(32, 128))
        found, plain = of_one(padded), of_one(grey)
        for name in ("margin_contrast", "intensity_mean", "shape_compactness", "texture_entropy_2"):
            assert found[name] == pytest.approx(plain[name], abs=1e-6)


def test_a_given_mask_is_the_object() -> None:
    grey, mask = round_one(), np.zeros((SIDE, SIDE), dtype=bool)
    mask[10:30, 10:40] = True
    found = of_one(grey, mask)
    assert found["shape_area"] == pytest.approx(600 / SIDE**2)
    assert found["intensity_mean"] == pytest.approx(grey[mask].mean() / 255)
    with pytest.raises(ValueError, match="empty"):
        of_one(grey, np.zeros_like(mask))


def test_colour_counts_as_its_luma_and_repeated_grey_as_grey() -> None:
    grey = round_one()[None, ..., None]
    assert np.array_equal(radiomics(np.repeat(grey, 3, axis=-1)), radiomics(grey))
    coloured = np.concatenate([grey, grey // 2, 255 - grey], axis=-1)
    assert not np.allclose(radiomics(coloured), radiomics(grey))


DEGENERATE = {
    "black": np.zeros((32, 32), dtype=np.uint8),
    "white": np.full((32, 48), 255, dtype=np.uint8),
    "one pixel": np.pad(np.full((1, 1), 255, dtype=np.uint8), 15),
    "one line": np.pad(np.full((1, 20), 90, dtype=np.uint8), 6),
    "two halves": np.repeat([[0, 255]], 16, axis=1).repeat(32, axis=0).astype(np.uint8),
    "a ramp": np.tile(np.arange(0, 256, 8, dtype=np.uint8), (32, 1)),
    "two levels": (np.indices((32, 32)).sum(axis=0) % 2).astype(np.uint8),
    "noise": np.random.default_rng(0).integers(0, 256, (8, 8)).astype(np.uint8),
}


@pytest.mark.parametrize("name", DEGENERATE)
@pytest.mark.filterwarnings("error")
def test_every_image_has_finite_numbers_of_about_one(name: str) -> None:
    found = np.asarray(list(of_one(DEGENERATE[name]).values()))
    assert np.isfinite(found).all() and np.abs(found).max() <= 4


def test_no_images_have_no_rows_and_every_column_has_a_name_of_its_own() -> None:
    assert radiomics(np.zeros((0, 8, 8, 1), dtype=np.uint8)).shape == (0, len(COLUMNS))
    assert len(set(COLUMNS)) == len(COLUMNS)
