"""Decoding: whatever the bytes are, one stored picture or one reason."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from cluster.errors import UsageError
from tests.hostile import compressed, encoded, picture, png, write_hostile
from training.images import (
    ImagePath,
    UnreadableImage,
    content,
    decode,
    decode_array,
    decode_bytes,
    from_array,
    grey64,
    to_channels,
)

SMALL = ImagePath(32, 32)


def exact(pixels: np.ndarray, **options: Any) -> ImagePath:
    """The path that keeps an image's own size, so that nothing is resampled."""
    return ImagePath(pixels.shape[0], pixels.shape[1], **options)


def difference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    assert a.shape == b.shape
    return np.asarray(np.abs(a.astype(int) - b.astype(int)))


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / max(1e-9, np.mean(difference(a, b).astype(float) ** 2))))


# Hostile files


def test_every_hostile_file_becomes_a_picture_or_its_reason(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    expected = write_hostile(tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for name, part in expected.items():
            data = (tmp_path / name).read_bytes()
            if part is None:
                pixels = decode(data, SMALL)
                assert pixels.shape in ((32, 32, 1), (32, 32, 3)), name
                assert pixels.dtype == np.uint8 and pixels.std() > 10, name
                continue
            with pytest.raises(UnreadableImage) as found:
                decode(data, SMALL)
            assert part in found.value.reason, name
    assert not caught
    assert capfd.readouterr() == ("", "")


def test_every_reason_is_one_short_line(tmp_path: Path) -> None:
    for name, part in write_hostile(tmp_path).items():
        if part is not None:
            with pytest.raises(UnreadableImage) as found:
                decode((tmp_path / name).read_bytes(), SMALL)
            assert len(found.value.reason) < 120 and "\n" not in found.value.reason, name
            assert str(found.value) == found.value.reason


def test_the_hostile_set_has_a_name_that_is_not_utf8(tmp_path: Path) -> None:
    names = write_hostile(tmp_path)
    assert set(os.listdir(tmp_path)) == set(names)  # noqa: PTH208 - as bytes come back
    if sys.platform == "linux":
        assert any("\udce9" in name for name in names)


def test_a_huge_picture_is_refused_from_its_header(tmp_path: Path) -> None:
    write_hostile(tmp_path)
    data = (tmp_path / "bomb.png").read_bytes()
    assert len(data) < 200_000
    started = time.perf_counter()
    with pytest.raises(UnreadableImage):
        decode(data, SMALL)
    assert time.perf_counter() - started < 0.5


def test_the_pixel_limit_is_the_path_s_own_and_not_pillow_s() -> None:
    rows = png(14_000, 14_000, compressed(bytes(1751) for _ in range(14_000)), depth=1)  # 196 Mpx: Pillow raises
    assert Image.MAX_IMAGE_PIXELS is not None and 2 * Image.MAX_IMAGE_PIXELS < 14_000**2
    assert not decode(rows, ImagePath(16, 16, max_pixels=200_000_000)).any()
    with pytest.raises(UnreadableImage, match="14000x14000 exceeds 195,999,999 pixels"):
        decode(rows, ImagePath(16, 16, max_pixels=195_999_999))
    with pytest.raises(UnreadableImage, match="64x48 exceeds 3,071 pixels"):
        decode(encoded(picture(), "PNG"), ImagePath(16, 16, max_pixels=64 * 48 - 1))


def test_warnings_as_errors_do_not_quarantine_a_good_picture() -> None:
    code = (
        "import sys; from training.images import *; from tests.hostile import *\n"
        "exif = b'Exif\\0\\0II*\\0\\x08\\0\\0\\0\\x01\\0\\x12\\x01\\x03\\0\\xff\\xff\\0\\0'\n"
        "print(decode(encoded(picture(), 'JPEG', exif=exif), ImagePath(32, 32)).shape)"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=root, capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.stderr) == ("(32, 32, 3)\n", "")


def test_threads_decode_the_same_as_one() -> None:
    files = [encoded(picture(seed=s), "JPEG") for s in range(8)]
    alone = [decode(f, SMALL) for f in files]
    together: list[Any] = [None] * 8

    def work(at: int) -> None:
        for _ in range(20):
            together[at] = decode(files[at], SMALL)

    threads = [threading.Thread(target=work, args=(at,)) for at in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(a, b) for a, b in zip(alone, together, strict=True))


@settings(max_examples=150, deadline=None)
@given(
    st.binary(max_size=400), st.sampled_from([b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"II*\0", b"GIF89a", b"BM"])
)
def test_random_bytes_are_unreadable_and_nothing_worse(data: bytes, magic: bytes) -> None:
    with pytest.raises(UnreadableImage):
        decode(magic + data, SMALL)


OPTIONS: dict[str, dict[str, Any]] = {
    "JPEG": {"quality": 80},
    "PNG": {},
    "GIF": {},
    "WEBP": {},
    "BMP": {},
    "TIFF": {"compression": "tiff_lzw"},
    "JPEG2000": {},
    "PPM": {},
}
WHOLE = {kind: encoded(picture(), kind, **options) for kind, options in OPTIONS.items()}


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_files_raise_nothing_but_unreadable_and_stay_silent(
    data: st.DataObject, capfd: pytest.CaptureFixture[str]
) -> None:
    whole = WHOLE[data.draw(st.sampled_from(sorted(WHOLE)))]
    broken = bytearray(whole)
    for at, value in data.draw(st.lists(st.tuples(st.integers(0, len(whole) - 1), st.integers(0, 255)), max_size=8)):
        broken[at if at % 2 else at % 200] = value  # headers are short, and where it hurts
    del broken[data.draw(st.integers(1, len(whole))) :]
    try:
        assert decode(bytes(broken), SMALL).shape[:2] == (32, 32)
    except UnreadableImage as error:
        assert error.reason
    assert capfd.readouterr() == ("", "")


@pytest.mark.skipif(sys.platform == "win32", reason="Pillow's wheels for Windows link libtiff in")
@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate", "jpeg", "group4"])
def test_libtiff_does_not_print_either(compression: str, capfd: pytest.CaptureFixture[str]) -> None:
    image = Image.fromarray(picture()).convert("1" if compression == "group4" else "RGB")
    whole = encoded(image, "TIFF", compression=compression)
    for at in range(8, len(whole), max(1, len(whole) // 100)):
        broken = whole[:at] + b"\xa5\x5a" + whole[at + 2 :]
        with contextlib.suppress(UnreadableImage):
            decode(broken, SMALL)
    assert capfd.readouterr() == ("", "")


# Modes


def test_a_png_and_its_array_become_the_same() -> None:
    rng = np.random.default_rng(3)
    arrays = [
        picture(100, 70),
        picture()[:, :, 0],
        rng.integers(0, 65536, (50, 60)).astype(np.uint16),
        rng.integers(300, 4000, (90, 61)).astype(np.uint16),
    ]
    for path in (SMALL, ImagePath(40, 24, "crop"), ImagePath(20, 50, "squash"), ImagePath(32, 32, window="100:1000")):
        for array in arrays:
            assert np.array_equal(decode(encoded(array, "PNG"), path), from_array(array, path))


def test_sixteen_bits_are_windowed_between_their_percentiles() -> None:
    rng = np.random.default_rng(0)
    for array in (
        rng.normal(1000, 200, (64, 80)).clip(0).astype(np.uint16),
        rng.normal(-300, 400, (64, 80)).astype(np.int16),
        rng.normal(0, 1, (64, 80)).astype(np.float32),
        rng.integers(-(2**31), 2**31 - 1, (64, 80)).astype(np.int32),
    ):
        low, high = np.percentile(array.astype(np.float64), (0.5, 99.5))
        by_hand = np.rint(np.clip((array.astype(np.float64) - low) / (high - low), 0, 1) * 255)
        assert np.array_equal(from_array(array, exact(array))[:, :, 0], by_hand)
        assert (by_hand == 0).sum() >= 20 and (by_hand == 255).sum() >= 20


def test_every_container_of_sixteen_bits_gives_the_same_grey_values() -> None:
    deep = np.random.default_rng(1).integers(0, 4096, (40, 50)).astype(np.uint16)
    expected = from_array(deep, exact(deep))
    big_endian = Image.frombytes("I;16B", (50, 40), deep.astype(">u2").tobytes())
    for data in (
        encoded(deep, "PNG"),
        encoded(deep, "TIFF"),
        encoded(deep, "TIFF", compression="tiff_lzw"),
        encoded(big_endian, "TIFF"),
        encoded(deep.astype(np.float32), "TIFF"),
        encoded(deep.astype(np.int32), "TIFF"),
        encoded(deep, "JPEG2000"),
    ):
        assert np.array_equal(decode(data, exact(deep)), expected)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_tiff_whose_white_is_zero_looks_the_same_at_any_depth(dtype: Any) -> None:
    grey = picture()[:, :, 0]
    tags = ImageFileDirectory_v2()
    tags[262] = 0
    # Pillow's writer inverts 8 bits, and its reader inverts them back; 16 bits it leaves alone both times
    stored = grey if dtype == np.uint8 else 65535 - grey.astype(np.uint16) * 257
    data = encoded(stored, "TIFF", tiffinfo=tags)
    with Image.open(io.BytesIO(data)) as image:
        assert image.tag_v2[262] == 0  # type: ignore[attr-defined]
    window = "auto" if dtype == np.uint8 else "0:65535"
    assert np.array_equal(decode(data, exact(grey, window=window))[:, :, 0], grey)


def test_an_explicit_window_maps_its_limits_to_black_and_white() -> None:
    array = np.array([[-2000, -160, 40, 240, 3000]], np.int16).repeat(8, axis=0)
    assert from_array(array, exact(array, window="-160:240"))[0, :, 0].tolist() == [0, 0, 128, 255, 255]
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    expected = np.rint(np.clip((grey - 50.0) / 100, 0, 1) * 255)
    for dtype in (np.uint8, np.uint16, np.float64):
        assert np.array_equal(from_array(grey.astype(dtype), exact(grey, window="50:150"))[:, :, 0], expected)
    assert np.array_equal(decode(encoded(grey, "PNG"), exact(grey, window="50:150"))[:, :, 0], expected)


def test_eight_bits_are_left_alone() -> None:
    faint = np.random.default_rng(0).integers(100, 110, (20, 20)).astype(np.uint8)
    assert np.array_equal(decode(encoded(faint, "PNG"), exact(faint))[:, :, 0], faint)


@pytest.mark.parametrize("dtype", [np.uint16, np.int16, np.int32, np.float32, np.float64])
def test_a_constant_image_is_black_and_an_almost_constant_one_keeps_its_spot(dtype: Any) -> None:
    flat = np.full((40, 40), 700, dtype)
    assert not from_array(flat, exact(flat)).any()
    flat[3, 5] = 900
    spot = from_array(flat, exact(flat))[:, :, 0]
    assert spot[3, 5] == 255 and spot.sum() == 255


def test_values_that_are_no_numbers_are_black() -> None:
    array = np.linspace(0, 1, 400).reshape(20, 20)
    array[0, :3] = np.nan, -np.inf, np.inf
    assert from_array(array, exact(array))[0, :3, 0].tolist() == [0, 0, 255]
    with pytest.raises(UnreadableImage, match="no finite"):
        from_array(np.full((4, 4), np.nan), SMALL)
    assert from_array(np.array([[-1e308, 1e308]] * 9), ImagePath(9, 2)).shape == (9, 2, 1)


@pytest.mark.parametrize("shape", [(), (5,), (0, 4), (4, 4, 2), (4, 4, 4), (2, 4, 4, 3)])
def test_an_array_of_another_shape_is_unreadable(shape: tuple[int, ...]) -> None:
    with pytest.raises(UnreadableImage, match="is not an image"):
        from_array(np.zeros(shape, np.uint8), SMALL)


def test_arrays_of_other_types_and_sizes_are_unreadable() -> None:
    with pytest.raises(UnreadableImage, match="complex"):
        from_array(np.zeros((4, 4), complex), SMALL)
    with pytest.raises(UnreadableImage, match="exceeds 15 pixels"):
        from_array(np.zeros((4, 4), np.uint8), ImagePath(4, 4, max_pixels=15))


def test_booleans_are_black_and_white() -> None:
    mask = np.eye(8, dtype=bool)
    assert np.array_equal(from_array(mask, exact(mask))[:, :, 0], np.eye(8) * 255)


def test_alpha_is_composited_over_black() -> None:
    colour = picture().astype(np.uint16)
    alpha = np.linspace(0, 255, colour.shape[0] * colour.shape[1]).reshape(colour.shape[:2]).astype(np.uint8)
    rgba = np.dstack([colour.astype(np.uint8), alpha])
    over_black = np.rint(colour * alpha[:, :, None] / 255)
    for data in (encoded(rgba, "PNG"), encoded(rgba, "TIFF")):
        assert difference(decode(data, exact(rgba)), over_black).max() <= 1
    la = np.dstack([rgba[:, :, 1], alpha])
    pixels = decode(encoded(Image.fromarray(la, "LA"), "PNG"), exact(la))
    assert pixels.shape[2] == 1 and difference(pixels, over_black[:, :, 1:2]).max() <= 1


def test_what_is_transparent_does_not_bleed_into_its_neighbours() -> None:
    rgba = np.zeros((64, 64, 4), np.uint8)
    rgba[:, :32] = 255, 0, 0, 0  # an invisible red half
    rgba[:, 32:] = 0, 100, 0, 255
    assert decode(encoded(rgba, "PNG"), ImagePath(16, 16))[:, :, 0].max() == 0


def test_a_transparent_palette_entry_is_black() -> None:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 200, 10, 60, 9, 99, 199])
    image.putpixel((0, 0), 2)
    pixels = decode(encoded(image, "PNG", transparency=bytes([255, 255, 0])), ImagePath(4, 4))
    assert pixels[0, 0].tolist() == [0, 0, 0] and pixels[1, 1].tolist() == [200, 10, 60]


def test_colour_that_is_grey_everywhere_has_one_channel() -> None:
    grey = picture()[:, :, :1]
    three = grey.repeat(3, axis=2)
    for data in (
        encoded(three, "PNG"),
        encoded(three, "JPEG"),
        encoded(np.dstack([three, np.full_like(grey, 255)]), "PNG"),
        encoded(Image.fromarray(grey[:, :, 0]).convert("P"), "PNG"),
    ):
        assert decode(data, SMALL).shape == (32, 32, 1)
    assert from_array(three, SMALL).shape == (32, 32, 1)
    three[5, 5, 2] ^= 255
    assert decode(encoded(three, "PNG"), exact(three)).shape[2] == 3


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "LAB", "P", "1", "RGBX"])
def test_other_modes_look_as_pillow_shows_them(mode: str) -> None:
    image = Image.fromarray(picture())
    image = image.quantize(64) if mode == "P" else image.convert(mode) if mode != "LAB" else _lab(image)
    data = encoded(image, "TIFF")
    with Image.open(io.BytesIO(data)) as again:
        shown = np.asarray(again.convert("RGB"))
    assert np.array_equal(to_channels(decode(data, exact(shown)), 3), shown)


def _lab(image: Image.Image) -> Image.Image:
    return Image.merge("LAB", image.split())


# EXIF, geometry, reduced decoding


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_exif_rotation_equals_rotation_by_hand(kind: str, turn: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = turn
    options: dict[str, Any] = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(picture(), kind, exif=exif, **options)
    with Image.open(io.BytesIO(data)) as image:
        upright = np.asarray(ImageOps.exif_transpose(image))
    decoded = decode_bytes(data, exact(upright))
    assert np.array_equal(decoded.pixels, upright)
    assert (decoded.source_height, decoded.source_width) == upright.shape[:2]
    for path in (ImagePath(45, 44), ImagePath(40, 43, "crop"), ImagePath(44, 39, "squash")):  # too large for a draft
        assert np.array_equal(decode(data, path), from_array(upright, path))


def test_letterbox_is_centred_black_and_keeps_the_aspect() -> None:
    white = np.full((100, 50), 255, np.uint8)
    for path, box in (
        (ImagePath(40, 40), (0, 40, 10, 30)),
        (ImagePath(40, 100), (0, 40, 40, 60)),
        (ImagePath(64, 16), (16, 48, 0, 16)),
        (ImagePath(41, 41), (0, 41, 10, 30)),  # 20.5 columns, rounded to even
    ):
        top, bottom, left, right = box
        expected = np.zeros((path.height, path.width), np.uint8)
        expected[top:bottom, left:right] = 255
        pixels = from_array(white, path)
        assert np.array_equal(pixels[:, :, 0], expected)
        assert np.array_equal(content(pixels, 100, 50, path), pixels[top:bottom, left:right])


def test_squash_and_crop_fill_the_stored_size() -> None:
    halves = np.zeros((60, 120), np.uint8)
    halves[:, :30] = halves[:, 90:] = 255
    squashed = from_array(halves, ImagePath(32, 32, "squash"))[:, :, 0]
    assert squashed[:, :6].min() == 255 and squashed[:, 10:22].max() == 0
    assert from_array(halves, ImagePath(32, 32, "crop"))[:, 2:30].max() == 0
    for path in (ImagePath(20, 30, "squash"), ImagePath(20, 30, "crop")):
        pixels = from_array(halves, path)
        assert content(pixels, 60, 120, path).shape == pixels.shape == (20, 30, 1)


@pytest.mark.parametrize("shape", [(1, 1), (1, 5000), (5000, 1), (3, 2)])
@pytest.mark.parametrize("fit", ["letterbox", "squash", "crop"])
def test_extreme_shapes_fit_too(shape: tuple[int, int], fit: Any) -> None:
    white = np.full(shape, 255, np.uint8)
    for data in (encoded(white, "PNG"), encoded(white, "JPEG")):
        assert decode(data, ImagePath(24, 33, fit)).max() == 255


def test_small_pictures_are_enlarged_and_fitting_ones_untouched() -> None:
    assert decode(encoded(picture(7, 7), "PNG"), SMALL).shape == (32, 32, 3)
    array = picture(32, 32)
    assert np.array_equal(decode(encoded(array, "PNG"), SMALL), array)


LARGE = picture(1250, 1001)


def full_decode(data: bytes, path: ImagePath) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        upright = ImageOps.exif_transpose(image)
        return from_array(np.asarray(upright), path)


@pytest.mark.parametrize("fit", ["letterbox", "squash", "crop"])
@pytest.mark.parametrize("size", [(112, 112), (60, 200), (96, 64)])
@pytest.mark.parametrize("turn", [1, 3, 6, 8])
def test_reduced_decoding_is_close_to_the_full_one(fit: Any, size: tuple[int, int], turn: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = turn
    noisy = np.clip(LARGE + np.random.default_rng(0).normal(0, 20, LARGE.shape), 0, 255).astype(np.uint8)
    data = encoded(noisy, "JPEG", quality=90, exif=exif)
    path = ImagePath(*size, fit)
    assert psnr(decode(data, path), full_decode(data, path)) > 38
    assert np.array_equal(decode(data, path), decode(data, path))


def test_reduced_decoding_does_not_shift_the_picture() -> None:
    data = encoded(LARGE, "JPEG", quality=95)  # 1250 / 8 is not whole
    path = ImagePath(112, 112)
    reduced, full = decode(data, path).astype(float), full_decode(data, path).astype(float)
    gradient = np.gradient(full, axis=0)
    shift = ((reduced - full) * gradient).sum() / (gradient**2).sum()
    assert abs(shift) < 0.02  # pixels


def test_reduced_decoding_is_faster() -> None:
    data = encoded(picture(2500, 2000), "JPEG", quality=90)
    path = ImagePath(224, 224)

    def seconds(run: Any) -> float:
        started = time.perf_counter()
        run(data, path)
        return time.perf_counter() - started

    ratios = [seconds(full_decode) / seconds(decode) for _ in range(5)]
    assert max(ratios) > 3


# Channels, thumbnails, the path itself


def test_luma_is_pillow_s_and_grey_survives_the_round_trip() -> None:
    array = np.random.default_rng(0).integers(0, 256, (50, 60, 3)).astype(np.uint8)
    assert np.array_equal(to_channels(array, 1)[:, :, 0], np.asarray(Image.fromarray(array).convert("L")))
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16, 1)
    assert np.array_equal(to_channels(to_channels(grey, 3), 1), grey)
    assert to_channels(array, 3) is array
    with pytest.raises(ValueError, match="must be 1 or 3"):
        to_channels(array, 2)


def test_thumbnails_of_copies_correlate_and_of_other_pictures_do_not() -> None:
    rng = np.random.default_rng(5)
    blocks = [rng.integers(0, 256, (12, 12, 3)).astype(np.uint8) for _ in range(2)]
    first, second = (np.asarray(Image.fromarray(b).resize((300, 300), Image.Resampling.BICUBIC)) for b in blocks)
    path = ImagePath(128, 128)
    original = decode(encoded(first, "PNG"), path)
    copy = decode(encoded(Image.fromarray(first).resize((200, 200)), "JPEG", quality=70), path)
    other = decode(encoded(second, "PNG"), path)
    thumbs = [grey64(p).ravel().astype(float) for p in (original, copy, other)]
    assert np.corrcoef(thumbs)[0, 1] > 0.998 > np.corrcoef(thumbs)[0, 2]
    assert grey64(original).shape == (64, 64) and grey64(original).dtype == np.uint8


def test_arrays_come_back_writable_and_contiguous() -> None:
    for pixels in (decode(encoded(picture(), "JPEG"), SMALL), from_array(picture(), exact(picture()))):
        assert pixels.flags.writeable and pixels.flags.c_contiguous and pixels.flags.owndata


def test_the_path_survives_its_dictionary_and_refuses_strangers() -> None:
    path = ImagePath(64, 144, "crop", "-160:240", 5_000)
    assert ImagePath.from_dict(path.as_dict()) == path
    with pytest.raises(UsageError, match=r"'heigth'.*Did you mean 'height'"):
        ImagePath.from_dict({"heigth": 3, "width": 4})
    with pytest.raises(UsageError, match="width is missing"):
        ImagePath.from_dict({"height": 3})


@pytest.mark.parametrize("window", ["", "5", "9:3", "3:3", "a:b", "1:2:3", "nan:4", "0:inf"])
def test_a_window_that_is_none_is_refused(window: str) -> None:
    with pytest.raises(UsageError, match="LOW:HIGH"):
        ImagePath(8, 8, window=window)


def test_a_size_or_fit_that_is_none_is_refused() -> None:
    for wrong in ({"height": 0}, {"width": -1}, {"fit": "stretch"}, {"max_pixels": 0}):
        with pytest.raises(UsageError):
            ImagePath.from_dict({"height": 8, "width": 8} | wrong)


def test_decode_array_knows_the_size_of_the_source() -> None:
    decoded = decode_array(np.zeros((70, 30), np.uint16), SMALL)
    assert (decoded.source_height, decoded.source_width) == (70, 30)


@pytest.mark.real
def test_real_pictures_decode_as_pillow_decodes_them() -> None:
    folder = Path(__file__).parents[3] / "shared" / "data"
    files = sorted(folder.glob("**/*.jpg"))[::400]
    if not files:
        pytest.skip("no real images beside the checkout")
    for file in files:
        data = file.read_bytes()
        path = ImagePath(96, 96)
        assert psnr(to_channels(decode(data, path), 3), to_channels(full_decode(data, path), 3)) > 40
