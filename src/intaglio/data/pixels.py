"""One image file to a square of pixels, safely.

The whole picture is kept: scaled by LANCZOS to fit, padded to a square with the median colour of its border. What had
to be converted is said in notes; what cannot be read is an ``UnreadableImage``, never a replacement.
"""

import threading
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.Image import Transpose

# EPS, PDF and the like are left out on purpose: reading them starts an interpreter.
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "JPEG2000", "AVIF")
SUFFIXES = {".jpg", ".jpeg", ".png", ".gif", ".webp", ".tif", ".tiff", ".bmp", ".ppm", ".pgm", ".pbm", ".jp2", ".avif"}
MAX_PIXELS = 100_000_000
MIN_SIDE = 8
# Part of every cache key: raise it when the same file would give other pixels.
VERSION = 1

_ORIENTATION = 0x0112
_TURNS = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}
_current = threading.local()


class UnreadableImage(ValueError):
    """A file that gives no picture; the message says which, what is wrong with it and what to do."""

    def __init__(self, path: Path, wrong: str, advice: str) -> None:
        super().__init__(f"{path} {wrong}: {advice}")


def read_image(path: Path | str, size: int) -> tuple[np.ndarray, list[str]]:
    """Read one file as uint8 (size, size, 3), RGB, with notes on what was converted.

    A note is a reason, or ``reason: detail``: ``palette converted``, ``upscaled: from 40x30 px``.

    Raises:
        UnreadableImage: empty, truncated, not an image, above 100 megapixels, or a side below 8 pixels.
    """
    with _warnings_as_notes():
        return _read(Path(path), size)


def read_images(
    paths: Sequence[Path], size: int, workers: int = 2
) -> Iterator[tuple[np.ndarray, list[str]] | UnreadableImage]:
    """``read_image`` for many files on ``workers`` threads, in order; an unreadable file yields its error."""

    def attempt(path: Path) -> tuple[np.ndarray, list[str]] | UnreadableImage:
        try:
            return _read(path, size)
        except UnreadableImage as error:
            return error

    # The filters of `warnings` belong to the process, so they are set once around all threads.
    with _warnings_as_notes(), ThreadPoolExecutor(workers) as pool:
        for start in range(0, len(paths), 256):
            yield from list(pool.map(attempt, paths[start : start + 256]))


@contextmanager
def _warnings_as_notes() -> Iterator[None]:
    """While open, what Pillow warns of becomes a note of the image being read on that thread."""
    with warnings.catch_warnings():
        shown = warnings.showwarning

        def note(message, category, filename, lineno, file=None, line=None):  # type: ignore[no-untyped-def]
            if (notes := getattr(_current, "notes", None)) is not None:
                notes.append(f"warning while decoding: {message}")
            else:
                shown(message, category, filename, lineno, file, line)

        warnings.simplefilter("always")
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # MAX_PIXELS decides
        warnings.showwarning = note
        yield


def _read(path: Path, size: int) -> tuple[np.ndarray, list[str]]:
    notes: list[str] = []
    _current.notes = notes
    try:
        _check_file(path)
        with Image.open(path, formats=FORMATS) as image:
            _check_size(path, *image.size)
            return _decode(path, image, size, notes), list(dict.fromkeys(notes))
    except UnreadableImage:
        raise
    except UnidentifiedImageError as error:
        raise UnreadableImage(path, "is not an image of a known format", _CONVERT) from error
    except Image.DecompressionBombError as error:
        raise UnreadableImage(path, f"is larger than {MAX_PIXELS // 10**6} megapixels", _SHRINK) from error
    except PermissionError as error:
        raise UnreadableImage(path, "cannot be opened (permission denied)", "make it readable or remove it") from error
    except Exception as error:  # decoders raise nearly every type on damaged bytes
        raise UnreadableImage(path, f"is truncated or damaged ({error})", "copy it again or remove it") from error
    finally:
        _current.notes = None


_CONVERT = f"convert it to one of {', '.join(FORMATS)}, or remove it"
_SHRINK = "it may be a decompression bomb; scale it down or remove it"


def _check_file(path: Path) -> None:
    if not path.is_file():
        wrong = "is not a regular file" if path.exists() else "does not exist"
        raise UnreadableImage(path, wrong, "correct the name or remove the entry")
    if path.stat().st_size == 0:
        raise UnreadableImage(path, "is empty (0 bytes)", "copy it again or remove it")


def _check_size(path: Path, width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise UnreadableImage(path, f"is {width}x{height} px, more than {MAX_PIXELS // 10**6} megapixels", _SHRINK)
    if min(width, height) < MIN_SIDE:
        raise UnreadableImage(path, f"is {width}x{height} px", f"a side below {MIN_SIDE} px shows nothing; remove it")


def _decode(path: Path, image: Image.Image, size: int, notes: list[str]) -> np.ndarray:
    """An open, unread image → uint8 (size, size, 3)."""
    if getattr(image, "is_animated", False) and image.format != "MPO":  # an MPO's other frames are previews
        notes.append("first page of several" if image.format == "TIFF" else "first frame of an animation")
    scale = size / max(image.size)
    fitted = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    if scale > 1:
        notes.append(f"upscaled: from {image.width}x{image.height} px")
    if ";16" in str(getattr(image, "tile", "")):
        notes.append("16-bit scaled to 8")
    turn = _turn(image, notes)
    # Lets libjpeg decode straight to 1/2, 1/4 or 1/8, still twice as fine as needed.
    image.draft(None, (2 * fitted[0], 2 * fitted[1]))
    rgb = _to_rgb(path, image, notes).resize(fitted, Image.Resampling.LANCZOS, reducing_gap=3.0)
    return _pad(np.asarray(rgb if turn is None else rgb.transpose(turn)), size)


def _turn(image: Image.Image, notes: list[str]) -> Transpose | None:
    try:
        turn = _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    except Exception as error:  # a damaged tag block does not spoil the picture
        notes.append(f"EXIF unreadable, rotation unknown: {error}")
        return None
    if turn is not None:
        notes.append("EXIF rotation applied")
    return turn


def _to_rgb(path: Path, image: Image.Image, notes: list[str]) -> Image.Image:
    if image.mode[0] in "IF":
        return _deep_to_rgb(path, image, notes)
    if image.mode in ("P", "PA"):
        notes.append("palette converted")
    elif image.mode in ("1", "L", "LA", "La"):
        notes.append("grey converted")
    elif not image.mode.startswith("RGB"):
        notes.append(f"{image.mode} converted")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        if np.asarray(rgba.getchannel("A")).min() < 255:
            notes.append("transparency over white")
            rgba = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
        image = rgba
    return image.convert("RGB")


def _deep_to_rgb(path: Path, image: Image.Image, notes: list[str]) -> Image.Image:
    """Grey of 16 or 32 bits or floats, which Pillow's own conversion would clip at 255."""
    values = np.asarray(image).astype(np.float32)  # (H, W)
    if image.mode.startswith("I;16") or image.format in ("PNG", "PPM"):
        notes.append("16-bit scaled to 8")
        grey = values * np.float32(1 / 257)
    else:
        low, high = float(values.min()), float(values.max())
        if not np.isfinite(high - low):
            raise UnreadableImage(path, "holds values that are not finite", "clean and convert it to 16-bit grey")
        notes.append(f"32-bit scaled by its range: {low:g} to {high:g}")
        grey = (values - low) * np.float32(255 / max(high - low, 1e-12))
    if (clear := image.info.get("transparency")) is not None:
        notes.append("transparency over white")
        grey[values == clear] = 255
    return Image.fromarray(np.rint(grey).astype(np.uint8)).convert("RGB")


def _pad(pixels: np.ndarray, size: int) -> np.ndarray:
    """(h, w, 3) → (size, size, 3), centred on the median colour of its own border."""
    height, width = pixels.shape[:2]
    if height == width == size:
        return pixels
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    square = np.empty((size, size, 3), np.uint8)
    square[:] = np.median(border, axis=0).round().astype(np.uint8)
    top, left = (size - height) // 2, (size - width) // 2
    square[top : top + height, left : left + width] = pixels
    return square
