"""Files that break image readers, and good files that only look odd: what each must become is known beforehand."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

NON_UTF8 = os.fsdecode(b"caf\xe9 \xff.png")


def write_hostile(folder: Path) -> dict[str, str | None]:
    """`folder` holds the hostile set; returns file name -> part of the expected reason, or None if it must decode.

    Names with non-UTF-8 bytes are surrogate-escaped, as `os.listdir` returns them; where the file system refuses
    them, they are left out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    expected: dict[str, str | None] = {}
    for name, (data, reason) in {**_broken(), **_odd()}.items():
        try:
            (folder / name).write_bytes(data)
        except OSError:
            if name != NON_UTF8:
                raise
            continue
        expected[name] = reason
    return expected


def picture(height: int = 48, width: int = 64, seed: int = 0) -> np.ndarray:
    """uint8 [height, width, 3]: smooth, coloured, without any symmetry that a wrong rotation could hide behind."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / width * a + y / height * b) for a, b in rng.uniform(1, 7, (3, 2))]
    return np.stack([127 + 100 * w for w in waves], axis=-1).astype(np.uint8)


def encoded(pixels: np.ndarray | Image.Image, kind: str, **options: object) -> bytes:
    """An image file's bytes; `kind` and `options` as in `PIL.Image.Image.save`."""
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def png(width: int, height: int, idat: bytes, *, depth: int = 8, colour: int = 0) -> bytes:
    """A PNG put together by hand around compressed rows; its header may lie."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", idat) + _chunk(b"IEND", b"")


def compressed(parts: Iterable[bytes]) -> bytes:
    """zlib stream of `parts`, without ever holding them together."""
    packer = zlib.compressobj(9)
    return b"".join([packer.compress(part) for part in parts]) + packer.flush()


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _broken() -> dict[str, tuple[bytes, str | None]]:
    good_jpeg, good_png = encoded(picture(), "JPEG", quality=90), encoded(picture(), "PNG")
    bomb = png(30_000, 30_000, compressed(bytes(3751) for _ in range(30_000)), depth=1)
    frames = [Image.fromarray(picture(seed=s)) for s in range(12)]
    at = good_png.index(b"IDAT") + 4
    size = int.from_bytes(good_png[at - 8 : at - 4])
    bad_crc, bad_bit = bytearray(good_png), bytearray(good_png)
    bad_crc[at + size] ^= 0xFF
    bad_bit[at + size // 2] ^= 0x10
    return {
        "bomb.png": (bomb, "30000x30000 exceeds 100,000,000 pixels"),
        "download.jpg": (b"<!DOCTYPE html>\n<html><body>404 Not Found</body></html>", "not an image (HTML)"),
        "empty.png": (b"", "zero bytes"),
        "null.png": (bytes(4096), "not an image (only null bytes)"),
        "notes.png": (b"patient moved, repeat tomorrow\n", "not an image (text)"),
        "report.jpg": (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", "not an image (PDF)"),
        "noise.png": (b"\x00\x07\x9c\x01" * 64, "not an image (unknown format)"),
        "truncated.jpg": (good_jpeg[: len(good_jpeg) // 2], "truncated"),
        "truncated.png": (good_png[: len(good_png) // 2], "truncated"),
        "header_only.png": (good_png[:8], "truncated"),
        "header_only.jpg": (good_jpeg[:3], "damaged JPEG"),
        "bad_crc.png": (bytes(bad_crc), "checksum"),
        "bad_bit.png": (bytes(bad_bit), "checksum"),
        "no_pixels.png": (png(0, 5, compressed([bytes(5)])), "damaged PNG"),
        "animated.gif": (_frames(frames, "GIF"), "animated: 12 frames"),
        "animated.png": (_frames(frames, "PNG"), "animated: 12 frames"),
        "animated.webp": (_frames(frames, "WEBP"), "animated: 12 frames"),
        "pages.tif": (_frames(frames[:3], "TIFF"), "multi-page: 3 frames"),
    }


def _odd() -> dict[str, tuple[bytes, str | None]]:
    colour = Image.fromarray(picture())
    grey = colour.convert("L")
    deep = (np.asarray(grey).astype(np.uint16) * 16 + 7).astype(np.uint16)
    palette = colour.quantize(16)
    turned = Image.Exif()
    turned[0x0112] = 6
    good = encoded(colour, "PNG")
    files = {
        "cmyk.jpg": encoded(colour.convert("CMYK"), "JPEG"),
        "one_bit.png": encoded(grey.convert("1"), "PNG"),
        "sixteen_bit.png": encoded(deep, "PNG"),
        "sixteen_bit.tif": encoded(deep, "TIFF", compression="tiff_lzw"),
        "float.tif": encoded(deep.astype(np.float32) / 9, "TIFF"),
        "palette_alpha.png": encoded(palette, "PNG", transparency=3),
        "palette.gif": encoded(palette, "GIF"),
        "grey_alpha.png": encoded(grey.convert("LA"), "PNG"),
        "colour_alpha.webp": encoded(colour.convert("RGBA"), "WEBP", lossless=True),
        "turned.jpg": encoded(colour, "JPEG", exif=turned),
        "bad_exif.jpg": encoded(colour, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff"),
        "several.mpo": _frames([colour, colour], "MPO"),
        "wavelet.jp2": encoded(colour, "JPEG2000"),
        "plain.ppm": encoded(colour, "PPM"),
        "plain.bmp": encoded(colour, "BMP"),
        "really_a_png.jpg": good,
        "no_extension": good,
        "100% sure %2F %s.png": good,
        " two  spaces .png": good,
        NON_UTF8: good,
    }
    return {name: (data, None) for name, data in files.items()}


def _frames(frames: list[Image.Image], kind: str) -> bytes:
    return encoded(frames[0], kind, save_all=True, append_images=frames[1:])
