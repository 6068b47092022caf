"""Figures: files that open, show what they were given, and leave matplotlib's global state alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import ArrayLike
from PIL import Image

from training import figures


def opened(path: Path) -> np.ndarray:
    """Pixels [H,W,3] of a PNG that is not blank."""
    with Image.open(path) as image:
        assert image.format == "PNG"
        pixels = np.asarray(image.convert("RGB"))
    assert pixels.std() > 1
    return pixels


def holds_colour(pixels: np.ndarray, colour: tuple[int, int, int], share: float) -> bool:
    return bool((np.abs(pixels.astype(int) - colour).max(-1) < 8).mean() > share)


def test_a_confusion_matrix_shades_by_the_share_of_its_row(tmp_path: Path) -> None:
    names = ["normal/superficiel", "abnormal/carcinoma_in_situ", "x"]
    figures.confusion_matrix([[1000, 0, 0], [0, 3, 0], [0, 0, 0]], names, tmp_path / "a.png")
    darkest = opened(tmp_path / "a.png")
    figures.confusion_matrix([[1, 0, 0], [0, 5000, 0], [0, 0, 0]], names, tmp_path / "b.png")
    opened(tmp_path / "b.png")
    assert holds_colour(darkest, (8, 48, 107), share=0.05)  # two full rows, however few images one has


def test_a_confusion_matrix_refuses_names_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be 3 x 3"):
        figures.confusion_matrix([[1, 0], [0, 1]], ["a", "b", "c"], tmp_path / "a.png")


def test_a_reliability_diagram_is_drawn_with_empty_bins(tmp_path: Path) -> None:
    gap = np.nan
    figures.reliability_diagram([gap, 0.5, 0.9], [gap, 0.4, 1.0], [0, 12, 3], 0.08, tmp_path / "a.png")
    opened(tmp_path / "a.png")
    figures.reliability_diagram([gap, gap], [gap, gap], [0, 0], None, tmp_path / "b.png")
    opened(tmp_path / "b.png")


@pytest.mark.parametrize("log_y", [False, True])
def test_each_curve_has_its_colour(log_y: bool, tmp_path: Path) -> None:
    x = np.arange(1, 50)
    gap = np.where(x == 7, np.nan, 2 / x)
    series: dict[str, tuple[ArrayLike, ArrayLike]] = {
        "training": (x, 1 / x),
        "validation": (x, gap),
        "one point": ([3], [0.5]),
    }
    figures.curves(series, tmp_path / "a.png", "step", "loss", log_y=log_y)
    pixels = opened(tmp_path / "a.png")
    assert holds_colour(pixels, (0x00, 0x72, 0xB2), share=0.0005)
    assert holds_colour(pixels, (0xD5, 0x5E, 0x00), share=0.0005)


def test_the_loss_is_shown_by_step_by_epoch_and_with_restarts(tmp_path: Path) -> None:
    steps = np.arange(1, 101)
    epochs = (steps - 1) // 10
    figures.training_loss(steps, 1 / steps, epochs, tmp_path / "a.png", marks=[40])
    pixels = opened(tmp_path / "a.png")
    assert holds_colour(pixels, (0x00, 0x72, 0xB2), share=0.001)
    figures.training_loss([1], [0.5], [0], tmp_path / "b.png")
    opened(tmp_path / "b.png")


def test_probes_show_scores_chance_and_rank_and_the_rank_alone_without_scores(tmp_path: Path) -> None:
    scores: dict[str, ArrayLike] = {"nearest neighbours": [0.3, 0.5, 0.6], "linear classifier": [0.35, np.nan, 0.7]}
    figures.probes([0, 50, 100], scores, 0.25, [9.0, 20.0, 30.0], tmp_path / "a.png")
    both = opened(tmp_path / "a.png")
    for colour in ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00), (0x00, 0x9E, 0x73)):
        assert holds_colour(both, colour, share=0.0002)
    figures.probes([50], {}, None, [0.0], tmp_path / "b.png")
    alone = opened(tmp_path / "b.png")
    assert alone.shape[0] < both.shape[0] and not holds_colour(alone, (0x00, 0x72, 0xB2), share=0.0001)


def test_a_forest_plot_shows_each_series_and_leaves_undefined_rows_empty(tmp_path: Path) -> None:
    gap = (np.nan, np.nan, np.nan)
    one = {"accuracy": (0.1, 0.02, 0.18), "kappa": (-0.2, -0.3, -0.1), "auroc": gap}
    figures.forest({"against $x_{": one}, tmp_path / "a.png", "difference")
    alone = opened(tmp_path / "a.png")
    assert holds_colour(alone, (0x00, 0x72, 0xB2), share=0.001)
    figures.forest({"a": one, "b": dict.fromkeys(one, (0.1, 0.0, 0.2))}, tmp_path / "b.png", "difference")
    both = opened(tmp_path / "b.png")
    assert both.shape[0] > alone.shape[0] and holds_colour(both, (0xD5, 0x5E, 0x00), share=0.001)
    figures.forest({"nothing": {"auroc": gap}}, tmp_path / "c.png", "difference")
    opened(tmp_path / "c.png")


@pytest.mark.parametrize(("shape", "k"), [((32, 32, 3), 4), ((24, 60, 1), 1), ((60, 24, 3), 2)])
def test_reconstructions_show_three_rows_of_pictures(shape: tuple[int, int, int], k: int, tmp_path: Path) -> None:
    black, dark, light = (np.full((k, *shape), level, dtype=np.uint8) for level in (0, 120, 200))
    figures.reconstructions(black, dark, light, tmp_path / "a.png")
    pixels = opened(tmp_path / "a.png")
    centre_column = pixels[:, int(pixels.shape[1] * 0.95) - 10, 0]
    shown = [int(v) for i, v in enumerate(centre_column) if i == 0 or v != centre_column[i - 1]]
    assert [v for v in shown if v in (0, 120, 200)] == [0, 120, 200]


def test_a_contact_sheet_takes_pictures_of_any_shape_and_captions_with_dollars(tmp_path: Path) -> None:
    red = np.zeros((20, 40, 3), dtype=np.uint8)
    red[..., 0] = 255
    images = [red, np.full((40, 20), 99, dtype=np.uint8), np.full((30, 30, 1), 180, dtype=np.uint8)]
    figures.contact_sheet(
        images, ["$x_{ costs $5", "true abnormal/carcinoma_in_situ", ""], tmp_path / "a.png", columns=2
    )
    pixels = opened(tmp_path / "a.png")
    for colour in ((255, 0, 0), (99, 99, 99), (180, 180, 180)):
        assert holds_colour(pixels, colour, share=0.02)


def test_pairs_stand_side_by_side_whatever_their_shapes_and_names(tmp_path: Path) -> None:
    wide, tall = np.full((20, 60), 90, np.uint8), np.zeros((50, 30, 3), np.uint8)
    tall[..., 0] = 230
    words = ("a/very/long/path/of/a/file_with_$dollars$.png\ngroup: x", "b")
    figures.pairs([(wide, tall)] * 3, ["a quarter turn; 1.0", "$x$", "c"], [words] * 3, tmp_path / "a.png")
    assert holds_colour(opened(tmp_path / "a.png"), (230, 0, 0), 0.02)
    with pytest.raises(ValueError, match="at least one pair"):
        figures.pairs([], [], [], tmp_path / "b.png")


def test_a_contact_sheet_needs_a_caption_for_each_picture(tmp_path: Path) -> None:
    picture = np.zeros((8, 8, 3), dtype=np.uint8)
    with pytest.raises(ValueError, match="shorter"):
        figures.contact_sheet([picture, picture], ["one"], tmp_path / "a.png")
    with pytest.raises(ValueError, match="at least one"):
        figures.contact_sheet([], [], tmp_path / "a.png")


def test_long_class_names_break_after_their_levels_and_lose_nothing() -> None:
    assert figures._wrapped("normal/columnar") == "normal/columnar"
    assert figures._wrapped("abnormal/carcinoma_in_situ") == "abnormal/\ncarcinoma_in_situ"
    name = "tissue/a_very_long_name-of-some-class_that_goes_on"
    assert figures._wrapped(name).replace("\n", "") == name
    assert max(map(len, figures._wrapped(name).split("\n"))) <= figures.LABEL_WIDTH


def test_the_same_figure_is_the_same_file(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        figures.curves({"loss": ([1, 2, 3], [3, 2, 1])}, tmp_path / name, "step", "loss")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_figures_never_touch_pyplot() -> None:
    assert "pyplot" not in Path(figures.__file__).read_text(encoding="utf-8")


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("count", "width"), [(1, 30), (4, 30), (4, 60)])
def test_overlays_show_the_map_beside_the_picture_or_the_pictures_alone(
    tmp_path: Path, count: int, width: int, channels: int
) -> None:
    images = np.full((count, 20, width, channels), 128, dtype=np.uint8)
    maps = np.zeros((count, 20, width), dtype=np.float32)
    maps[:, :, width // 2 :] = 1
    names = ["1   0.93\ntruth: a/$b\nsaid: c"] * count
    figures.overlays(images, maps, names, tmp_path / "a.png")
    figures.overlays(images, None, names, tmp_path / "b.png")
    # viridis at its ends, half mixed with grey 128
    yellow, violet = (tuple((np.asarray(end) + 128) // 2) for end in ((253, 231, 37), (68, 1, 84)))
    for colour in (yellow, violet):
        assert holds_colour(opened(tmp_path / "a.png"), colour, share=0.05)
        assert not holds_colour(opened(tmp_path / "b.png"), colour, share=0.001)


def test_intervals_mark_the_level_of_guessing(tmp_path: Path) -> None:
    rows = [("accuracy", 0.7, 0.6, 0.8, 0.5), ("kappa", -0.1, -0.2, 0.1, None), ("odd", 0.5, None, None, 0.1)]
    figures.intervals(rows, tmp_path / "a.png")
    figures.intervals([(*row[:4], None) for row in rows], tmp_path / "b.png")
    assert holds_colour(opened(tmp_path / "a.png"), (213, 94, 0), share=0.0002)
    assert not holds_colour(opened(tmp_path / "b.png"), (213, 94, 0), share=0.0002)
