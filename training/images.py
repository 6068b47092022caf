"""One picture, one path: encoded bytes or a raw array become the stored pixel array here and nowhere else.

Ingest, training, evaluation, index building and serving all call `decode`; what a model does to the stored array
afterwards (crops, normalisation) does not live here. Plain Pillow and numpy.
"""

from __future__ import annotations

import contextlib
import ctypes
import ctypes.util
import functools
import io
import logging
import math
import re
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.Jpeg2KImagePlugin import Jpeg2KImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.PpmImagePlugin import PpmImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from cluster.errors import UsageError, nearest

Pixels = NDArray[np.uint8]
Fit = Literal["letterbox", "squash", "crop"]
Box = tuple[float, float, float, float]

AUTO_PERCENTILES = (0.5, 99.5)
DRAFT_MARGIN = 1.25
"""A JPEG is decoded at 1/2, 1/4 or 1/8 while that leaves this many times the stored size, so that the last step is
always an antialiased reduction: 47 to 57 dB against the full decode, where a margin of 1.5 gains 3 to 7 dB for half
of the speed."""
REDUCING_GAP = 3.0
"""Pillow's own figure from which box reduction before the resize is "indistinguishable from fair resampling"."""

# The allow-list, by magic number. A JPEG class instead of Pillow's MPO: the first picture of an MPO is its JPEG.
READERS: dict[str, tuple[re.Pattern[bytes], type[ImageFile.ImageFile]]] = {
    "JPEG": (re.compile(rb"\xff\xd8\xff"), JpegImageFile),
    "PNG": (re.compile(rb"\x89PNG\r\n\x1a\n"), PngImageFile),
    "TIFF": (re.compile(rb"II[*+]\0|MM\0[*+]"), TiffImageFile),
    "BMP": (re.compile(rb"BM"), BmpImageFile),
    "GIF": (re.compile(rb"GIF8[79]a"), GifImageFile),
    "WEBP": (re.compile(rb"RIFF.{4}WEBP", re.DOTALL), WebPImageFile),
    "PPM": (re.compile(rb"P[1-6f][\s#]"), PpmImageFile),
    "JPEG 2000": (re.compile(rb"\xff\x4f\xff\x51|\0\0\0\x0cjP  \r\n\x87\n"), Jpeg2KImageFile),
}
STRANGERS: dict[str, re.Pattern[bytes]] = {
    "HTML": re.compile(rb"\s*<(!doctype\s+html|html|head|body|script)\b", re.IGNORECASE),
    "XML or SVG": re.compile(rb"\s*<(\?xml|svg)\b", re.IGNORECASE),
    "PDF": re.compile(rb"%PDF-"),
    "PostScript": re.compile(rb"%!PS"),
    "DICOM": re.compile(rb".{128}DICM", re.DOTALL),
    "ZIP": re.compile(rb"PK\x03\x04"),
    "gzip": re.compile(rb"\x1f\x8b"),
    "only null bytes": re.compile(rb"\0+\Z"),
    "text": re.compile(rb"[\t\n\r\x20-\x7e\x80-\xff]+\Z"),
}


class Turn(NamedTuple):
    """Undoes an EXIF orientation, in Pillow's word and as swapped axes and flips that follow."""

    method: Image.Transpose
    swap: bool
    flip_rows: bool
    flip_columns: bool


TURNS = {
    2: Turn(Image.Transpose.FLIP_LEFT_RIGHT, False, False, True),
    3: Turn(Image.Transpose.ROTATE_180, False, True, True),
    4: Turn(Image.Transpose.FLIP_TOP_BOTTOM, False, True, False),
    5: Turn(Image.Transpose.TRANSPOSE, True, False, False),
    6: Turn(Image.Transpose.ROTATE_270, True, False, True),
    7: Turn(Image.Transpose.TRANSVERSE, True, True, True),
    8: Turn(Image.Transpose.ROTATE_90, True, True, False),
}


class UnreadableImage(Exception):  # noqa: N818 - named after what was found, like the `reason` it fills
    """`reason` is one short line without paths, such as `truncated` or `not an image (HTML)`."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class ImagePath:
    """The ingest half of the image path, kept in `dataset.json` and `model.json`.

    `height` and `width` are the stored size in pixels; `window` is `auto` or `LOW:HIGH` in raw grey values (8-bit
    images are windowed only by an explicit one); `max_pixels` is read from the header, before anything is decoded.

    Raises:
        UsageError: a size below 1, an unknown fit, or a window that is not LOW:HIGH with LOW < HIGH.
    """

    height: int
    width: int
    fit: Fit = "letterbox"
    window: str = "auto"
    max_pixels: int = 100_000_000

    def __post_init__(self) -> None:
        if self.height < 1 or self.width < 1:
            raise UsageError(f"stored size {self.height}x{self.width}: each side must be at least 1 pixel")
        if self.fit not in get_args(Fit):
            raise UsageError(f"--fit {self.fit}: must be one of {', '.join(get_args(Fit))}")
        if self.max_pixels < 1:
            raise UsageError(f"--max-pixels {self.max_pixels}: must be positive")
        _ = self.limits

    @property
    def limits(self) -> tuple[float, float] | None:
        """The raw grey values that become black and white; None for `auto`."""
        if self.window == "auto":
            return None
        try:
            low, high = (float(part) for part in self.window.split(":"))
        except ValueError:
            low, high = math.nan, math.nan
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise UsageError(f"--window {self.window}: give auto, or LOW:HIGH with LOW < HIGH, such as -160:240")
        return low, high

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ImagePath:
        """The inverse of `as_dict`.

        Raises:
            UsageError: an unknown key, a missing size, or a value that is refused.
        """
        known = [f.name for f in fields(cls)]
        for key in values:
            if key not in known:
                raise UsageError(f"image path: unknown key {key!r}.{nearest(key, known)}")
        for key in ("height", "width"):
            if key not in values:
                raise UsageError(f"image path: {key} is missing")
        return cls(**values)


@dataclass(frozen=True)
class Decoded:
    """Stored pixels, uint8 [height, width, 1 (grey) or 3 (RGB)], and the size in pixels the source had upright."""

    pixels: Pixels
    source_height: int
    source_width: int


def decode(data: bytes, path: ImagePath) -> Pixels:
    """The stored pixels of an encoded image: uint8 [height, width, 1 (grey) or 3 (RGB)]; see `decode_bytes`."""
    return decode_bytes(data, path).pixels


def from_array(pixels: NDArray[Any], path: ImagePath) -> Pixels:
    """The stored pixels of a raw array: uint8 [height, width, 1 (grey) or 3 (RGB)]; see `decode_array`."""
    return decode_array(pixels, path).pixels


def decode_bytes(data: bytes, path: ImagePath) -> Decoded:
    """What an encoded image becomes.

    EXIF rotation is applied, alpha composited over black, and an RGB image whose channels are equal everywhere is
    grey. Grey images of more than 8 bits are windowed at full depth; Pillow reads colour of 16 bits per channel (and
    16-bit grey with alpha) by its upper 8. Embedded colour profiles are ignored. A JPEG of at least twice
    `DRAFT_MARGIN` times the stored size is decoded at reduced scale.

    Raises:
        UnreadableImage: whatever is wrong with the bytes, more than one frame (an MPO counts as its first), or more
            pixels than allowed. Nothing else is raised, and nothing is written to stderr.
    """
    _hush_pillow()
    name = "image"
    try:
        name, reader = _recognise(data)
        if name == "PNG":
            _check_png(data)
        if name == "TIFF":
            _hush_libtiff()
        with reader(io.BytesIO(data)) as image:
            _check_header(image, name, path)
            width, height = image.size
            turn, area = _load(image, path)
            upright, area = _turned(_eight_bit(image, path), area, turn)
            if turn and turn.swap:
                width, height = height, width
            return Decoded(_stored(upright, path, area), height, width)
    except UnreadableImage:
        raise
    except Exception as error:  # Pillow raises some twenty types on damaged files
        raise UnreadableImage(_reason(error, name)) from error


def decode_array(pixels: NDArray[Any], path: ImagePath) -> Decoded:
    """What a raw array becomes: the same as a lossless file of its values.

    `pixels` is [H, W], [H, W, 1] or [H, W, 3] of booleans, integers or floats. Anything but uint8 (and booleans: black
    and white) is windowed, all channels alike; values that are not numbers become black.

    Raises:
        UnreadableImage: another shape or type, too many pixels, or no finite value.
    """
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    if pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[2] != 3) or pixels.size == 0:
        raise UnreadableImage(f"array of shape {'x'.join(map(str, pixels.shape))} is not an image")
    if pixels.dtype.kind not in "buif":
        raise UnreadableImage(f"array of {pixels.dtype} is not an image")
    height, width = pixels.shape[:2]
    _check_size(width, height, path)
    if pixels.dtype.kind == "b":
        pixels = pixels.astype(np.uint8) * np.uint8(255)
    try:
        return Decoded(_stored(Image.fromarray(_windowed(pixels, path.limits)), path), height, width)
    except MemoryError as error:
        raise UnreadableImage(_reason(error, "array")) from error


def content(pixels: Pixels, source_height: int, source_width: int, path: ImagePath) -> Pixels:
    """The part of stored pixels [height, width, C] that is picture and not letterbox padding (a view)."""
    return _content(pixels, *_Fit(source_width, source_height, path).size)


def to_channels(pixels: Pixels, channels: int) -> Pixels:
    """uint8 [..., 1 or 3] with `channels` (1 or 3) of them: grey is repeated, colour becomes its ITU-R 601 luma.

    The luma is Pillow's (16-bit fixed point, rounded), so that grey -> colour -> grey is the identity.
    """
    if channels not in (1, 3):
        raise ValueError(f"channels must be 1 or 3, not {channels}")
    if pixels.shape[-1] == channels:
        return pixels
    if channels == 3:
        return np.repeat(pixels, 3, axis=-1)
    red, green, blue = (pixels[..., c : c + 1].astype(np.uint32) for c in range(3))
    luma: Pixels = ((19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16).astype(np.uint8)
    return luma


def grey64(pixels: Pixels) -> Pixels:
    """uint8 [64, 64]: the grey thumbnail by which copies are compared, of pixels [H, W, 1 or 3], aspect ignored."""
    grey = Image.fromarray(np.ascontiguousarray(to_channels(pixels, 1)[:, :, 0]))
    return np.array(grey.resize((64, 64), Image.Resampling.BICUBIC))


# What the bytes are


def _recognise(data: bytes) -> tuple[str, type[ImageFile.ImageFile]]:
    if not data:
        raise UnreadableImage("zero bytes")
    # Not Image.open: it measures against a process-wide limit, by a warning, and tries formats nobody asked for.
    for name, (magic, reader) in READERS.items():
        if magic.match(data):
            return name, reader
    head = data[:1024]
    for name, magic in STRANGERS.items():
        if magic.match(head):
            raise UnreadableImage(f"not an image ({name})")
    raise UnreadableImage("not an image (unknown format)")


def _check_png(data: bytes) -> None:
    """Pillow skips the checksums of pixel data and a missing end; a flipped bit in a medical image must not pass."""
    view, start = memoryview(data), 8
    while start + 12 <= len(view):
        size, kind = int.from_bytes(view[start : start + 4]), bytes(view[start + 4 : start + 8])
        end = start + 12 + size
        if end > len(view):
            break
        if kind == b"IDAT" and zlib.crc32(view[start + 4 : end - 4]) != int.from_bytes(view[end - 4 : end]):
            raise UnreadableImage("damaged PNG: bad checksum of the pixel data")
        if kind == b"IEND":
            return
        start = end
    raise UnreadableImage("truncated")


def _check_header(image: ImageFile.ImageFile, name: str, path: ImagePath) -> None:
    _check_size(image.width, image.height, path)
    frames = getattr(image, "n_frames", 1)
    if frames > 1:
        raise UnreadableImage(f"{'multi-page' if name == 'TIFF' else 'animated'}: {frames} frames, only one is read")


def _check_size(width: int, height: int, path: ImagePath) -> None:
    if width < 1 or height < 1:
        raise UnreadableImage(f"{width}x{height} has no pixels")
    if width * height > path.max_pixels:
        raise UnreadableImage(f"{width}x{height} exceeds {path.max_pixels:,} pixels")


def _reason(error: Exception, name: str) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError):
        return f"too little memory for this {name}"
    if "truncated" in text.lower():
        return "truncated"
    if isinstance(error, Image.DecompressionBombError):
        return f"{name} exceeds {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels"
    # Pillow quotes bytes, numbers and object addresses of the file: no two damaged files would share a reason
    vague = "driver" in text or isinstance(error, KeyError) or not re.fullmatch(r"[^</\\'\"]*[a-z]{3}[^</\\'\"]*", text)
    return f"damaged {name}" if vague else f"damaged {name}: {text[:80]}"


_HUSHED = ("ignore", None, Warning, re.compile(r"PIL\."), 0)


def _hush_pillow() -> None:
    """What Pillow thinks of a file is the reason of its quarantine, or nothing; it does not belong on stderr.

    An entry in the filter list, set once, because `warnings.catch_warnings` around each decode races between threads.
    """
    if _HUSHED not in warnings.filters:
        warnings.filterwarnings("ignore", module=r"PIL\.")
        logging.getLogger("PIL").addHandler(logging.NullHandler())


@functools.cache
def _hush_libtiff() -> None:
    """libtiff prints errors itself, and Pillow has no switch for that. Best effort: wheels of Windows link it in."""
    package = Path(Image.__file__).parent
    found = [*package.parent.glob("pillow.libs/libtiff*"), *package.glob(".dylibs/libtiff*")]
    for library in map(str, found) if found else filter(None, [ctypes.util.find_library("tiff")]):
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(library).TIFFSetErrorHandler(None)


# From the file to 8-bit pixels


def _load(image: ImageFile.ImageFile, path: ImagePath) -> tuple[Turn | None, Box]:
    """Decodes in place; the turn that is still to be made, and the part of the decoded area that is picture."""
    if not isinstance(image, JpegImageFile):
        image.load()
        return _orientation(image), (0, 0, *image.size)
    turn = _orientation(image)
    width, height = image.size
    fit = _Fit(height, width, path) if turn and turn.swap else _Fit(width, height, path)
    scales = (fit.scale_y, fit.scale_x) if turn and turn.swap else (fit.scale_x, fit.scale_y)
    need = (math.ceil(width * scales[0] * DRAFT_MARGIN), math.ceil(height * scales[1] * DRAFT_MARGIN))
    draft = image.draft(None, need)
    image.load()
    # 1/8 of 2500 rows is 312.5 of 313 decoded ones: without the box the picture would shift by half a pixel.
    return turn, draft[1] if draft else (0, 0, *image.size)


def _orientation(image: Image.Image) -> Turn | None:
    try:
        return TURNS.get(image.getexif().get(0x0112, 1))
    except Exception:  # damaged EXIF leaves a perfectly good picture
        return None


def _turned(image: Image.Image, area: Box, turn: Turn | None) -> tuple[Image.Image, Box]:
    """Upright, with the picture's area, which begins at the top left before the turn."""
    if turn is None:
        return image, area
    upright = image.transpose(turn.method)
    width, height = (area[3], area[2]) if turn.swap else (area[2], area[3])
    left = upright.width - width if turn.flip_columns else 0
    top = upright.height - height if turn.flip_rows else 0
    return upright, (left, top, left + width, top + height)


def _eight_bit(image: Image.Image, path: ImagePath) -> Image.Image:
    """The picture in mode L or RGB, or in La or RGBa, whose colours are those over black."""
    if image.mode.startswith("I") or image.mode == "F":
        grey = _windowed(np.asarray(image), path.limits)
        white_is_zero = isinstance(image, TiffImageFile) and image.tag_v2.get(262) == 0  # Pillow inverts only 8 bits
        return Image.fromarray(255 - grey if white_is_zero else grey)
    if image.mode in ("La", "RGBa"):
        return image
    mode = "L" if image.mode in ("1", "L", "LA") else "RGB"
    alpha = image.has_transparency_data
    target = mode + "A" * alpha
    if image.mode != target:
        image = image.convert(target)
    if path.limits is not None:
        table = _curve(np.arange(256.0), *path.limits).tolist()
        image = image.point(table * len(mode) + list(range(256)) * alpha)
    return image.convert(mode + "a") if alpha else image


# Grey values


def _windowed(pixels: NDArray[Any], limits: tuple[float, float] | None) -> Pixels:
    """uint8 of the same shape: `limits` (auto: percentiles; untouched if 8 bits) become 0 and 255, linear between."""
    if pixels.dtype == np.uint8 and limits is None:
        return np.ascontiguousarray(pixels)
    if pixels.dtype.kind in "iu":
        low, high = int(pixels.min()), int(pixels.max())
        if high - low < 65536:
            return _windowed_by_table(pixels, low, high, limits)
    return _windowed_floats(pixels.astype(np.float64), limits)


def _windowed_by_table(pixels: NDArray[Any], low: int, high: int, limits: tuple[float, float] | None) -> Pixels:
    """Integers of at most 16 bits of range: a histogram gives the percentiles, a table the grey values."""
    flat = np.ascontiguousarray(pixels).reshape(-1)
    if limits is None:
        counts = np.zeros(high - low + 1, np.int64)
        for part in _parts(flat.size):
            counts += np.bincount(flat[part].astype(np.int64) - low, minlength=counts.size)
        dark, bright = (low + _percentile(counts, q) for q in AUTO_PERCENTILES)
        limits = _or_range(dark, bright, low, high)
    table = _curve(np.arange(low, high + 1, dtype=np.float64), *limits)
    grey = np.empty(flat.size, np.uint8)
    for part in _parts(flat.size):
        np.take(table, flat[part].astype(np.int64) - low, out=grey[part], mode="clip")
    return grey.reshape(pixels.shape)


def _windowed_floats(pixels: NDArray[np.float64], limits: tuple[float, float] | None) -> Pixels:
    if limits is None:
        finite = pixels[np.isfinite(pixels)]
        if finite.size == 0:
            raise UnreadableImage("no finite grey value")
        low, high = np.percentile(finite, AUTO_PERCENTILES)
        limits = _or_range(float(low), float(high), float(finite.min()), float(finite.max()))
    return _curve(pixels, *limits)


def _parts(size: int, step: int = 1 << 20) -> Iterator[slice]:
    """numpy widens indices to 8 bytes: by parts, that is 8 MB and not four times the picture."""
    return (slice(start, start + step) for start in range(0, size, step))


def _percentile(counts: NDArray[np.int64], q: float) -> float:
    """The percentile of a histogram's bin numbers, interpolated as `numpy.percentile` does."""
    position = q / 100 * (int(counts.sum()) - 1)
    ranks = np.array([math.floor(position), math.ceil(position)])
    below, above = np.searchsorted(np.cumsum(counts), ranks, side="right")
    return float(below + (above - below) * (position - ranks[0]))


def _or_range(low: float, high: float, lowest: float, highest: float) -> tuple[float, float]:
    """The percentiles, or the whole range of an image that is one value almost everywhere."""
    return (low, high) if low < high else (lowest, highest)


def _curve(values: NDArray[np.float64], low: float, high: float) -> Pixels:
    with np.errstate(all="ignore"):
        scaled = (values - low) / (high - low) * 255 if high > low else np.zeros_like(values)
        return np.nan_to_num(np.rint(np.clip(scaled, 0, 255))).astype(np.uint8)


# Geometry


class _Fit:
    """How an upright picture of `width` x `height` is scaled into the stored size: to `size`, from the middle `box`."""

    def __init__(self, width: float, height: float, path: ImagePath) -> None:
        x, y = path.width / width, path.height / height
        if path.fit == "letterbox":
            x = y = min(x, y)
        elif path.fit == "crop":
            x = y = max(x, y)
        self.scale_x, self.scale_y = x, y
        self.size = (_side(width * x, path.width), _side(height * y, path.height))
        cut_x = max(0.0, width - path.width / x) / 2 if path.fit == "crop" else 0.0
        cut_y = max(0.0, height - path.height / y) / 2 if path.fit == "crop" else 0.0
        self.box: Box = (cut_x, cut_y, width - cut_x, height - cut_y)


def _side(length: float, room: int) -> int:
    return max(1, min(room, round(length)))


def _stored(image: Image.Image, path: ImagePath, area: Box | None = None) -> Pixels:
    """The `area` of an upright picture scaled, stripped of alpha and of equal channels, padded to the stored size."""
    left, top, right, bottom = area or (0, 0, *image.size)
    fit = _Fit(right - left, bottom - top, path)
    box = (left + fit.box[0], top + fit.box[1], left + fit.box[2], top + fit.box[3])
    if image.size != fit.size or box != (0, 0, *image.size):
        image = image.resize(fit.size, Image.Resampling.BICUBIC, box, REDUCING_GAP)
    pixels = np.asarray(image)
    pixels = pixels[:, :, None] if pixels.ndim == 2 else pixels
    # equal channels stay equal under resizing, so the small picture tells
    pixels = pixels[:, :, :1] if pixels.shape[2] == 2 or _is_grey(pixels) else pixels[:, :, :3]
    height, width = pixels.shape[:2]
    stored = np.zeros((path.height, path.width, pixels.shape[2]), np.uint8)
    _content(stored, width, height)[:] = pixels
    return stored


def _content(stored: Pixels, width: int, height: int) -> Pixels:
    top, left = (stored.shape[0] - height) // 2, (stored.shape[1] - width) // 2
    return stored[top : top + height, left : left + width]


def _is_grey(pixels: Pixels) -> bool:
    if pixels.shape[2] < 3:
        return bool(pixels.shape[2] == 1)
    red, green, blue = pixels[:, :, 0], pixels[:, :, 1], pixels[:, :, 2]
    return bool(np.array_equal(red, green) and np.array_equal(green, blue))
