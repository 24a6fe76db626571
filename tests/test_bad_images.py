"""One file to pixels: what can be read is converted and said, what cannot is refused with a message that helps."""

import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from intaglio.data.pixels import UnreadableImage, read_image, read_images


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """A smooth colourful picture without symmetry."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that promises width x height pixels in some 50 bytes."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = b"IDAT" + zlib.compress(b"\0")
    chunks = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in (header, data)]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


UNREADABLE = {
    "empty": (b"", "is empty (0 bytes): copy it again or remove it"),
    "text": (b"this is not a picture", "is not an image of a known format: convert it to one of JPEG, PNG"),
    "script": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99 99\n", "is not an image of a known format"),
    "truncated jpeg": (encoded(photo(200, 150), "JPEG")[:-900], "is truncated or damaged"),
    "truncated png": (encoded(photo(200, 150), "PNG")[:-900], "is truncated or damaged"),
    "bomb": (png_header(12_000, 9_000), "is 12000x9000 px, more than 100 megapixels: it may be a decompression bomb"),
    "great bomb": (png_header(60_000, 60_000), "is larger than 100 megapixels: it may be a decompression bomb"),
    "one pixel": (encoded(photo(1, 1), "PNG"), "is 1x1 px: a side below 8 px shows nothing; remove it"),
    "thread": (encoded(photo(7, 300), "PNG"), "is 7x300 px: a side below 8 px"),
    "not finite": (encoded(Image.fromarray(np.full((9, 9), np.nan, np.float32)), "TIFF"), "values that are not finite"),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_unreadable_files_are_named_with_what_to_do(kind, tmp_path):
    content, message = UNREADABLE[kind]
    path = tmp_path / "picture.jpg"
    path.write_bytes(content)
    with pytest.raises(UnreadableImage) as caught:
        read_image(path, 32)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)


def test_what_is_no_file_is_not_waited_for(tmp_path):
    with pytest.raises(UnreadableImage, match="does not exist: correct the name"):
        read_image(tmp_path / "absent.png", 32)
    with pytest.raises(UnreadableImage, match="is not a regular file"):
        read_image(tmp_path, 32)


RAMP = np.linspace(0, 65535, 64 * 64).reshape(64, 64)
GREY = np.rint(RAMP / 257).astype(np.uint8)
SEE_THROUGH = Image.fromarray(np.dstack([np.zeros((64, 64, 3), np.uint8), GREY]))
MODES = {
    "grey": (encoded(Image.fromarray(GREY), "PNG"), GREY, ["grey converted"]),
    "grey jpeg": (encoded(Image.fromarray(GREY), "JPEG", quality=100), GREY, ["grey converted"]),
    "16-bit png": (encoded(Image.fromarray(RAMP.astype(np.uint16)), "PNG"), GREY, ["16-bit scaled to 8"]),
    "16-bit tiff": (encoded(Image.fromarray(RAMP.astype(np.uint16)), "TIFF"), GREY, ["16-bit scaled to 8"]),
    "32-bit tiff": (
        encoded(Image.fromarray((RAMP * 100).astype(np.int32)), "TIFF"),
        GREY,
        ["32-bit scaled by its range: 0 to 6.5535e+06"],
    ),
    "float tiff": (
        encoded(Image.fromarray((RAMP / 65535).astype(np.float32)), "TIFF"),
        GREY,
        ["32-bit scaled by its range: 0 to 1"],
    ),
    "palette": (encoded(photo(64, 64).quantize(16), "PNG"), photo(64, 64).quantize(16), ["palette converted"]),
    "transparent": (encoded(SEE_THROUGH, "PNG"), 255 - GREY, ["transparency over white"]),
    "opaque alpha": (encoded(photo(64, 64).convert("RGBA"), "PNG"), photo(64, 64), []),
    "clear palette": (
        encoded(Image.fromarray(np.zeros((64, 64), np.uint8)).convert("P"), "PNG", transparency=0),
        np.full((64, 64), 255, np.uint8),
        ["palette converted", "transparency over white"],
    ),
    "cmyk": (encoded(photo(64, 64).convert("CMYK"), "JPEG", quality=100), photo(64, 64), ["CMYK converted"]),
    "bits": (encoded(Image.fromarray(GREY > 99), "PNG"), np.uint8(255) * (GREY > 99), ["grey converted"]),
    "animated gif": (
        encoded(photo(64, 64), "GIF", save_all=True, append_images=[photo(64, 64, seed=9)]),
        photo(64, 64).quantize(256),
        ["first frame of an animation", "palette converted"],
    ),
    "pages": (
        encoded(photo(64, 64), "TIFF", save_all=True, append_images=[photo(64, 64, seed=9)]),
        photo(64, 64),
        ["first page of several"],
    ),
    "webp": (encoded(photo(64, 64), "WEBP", lossless=True), photo(64, 64), []),
    "upscaled": (encoded(photo(64, 64).resize((32, 32)), "PNG"), photo(64, 64), ["upscaled: from 32x32 px"]),
}


@pytest.mark.parametrize("kind", MODES)
def test_every_kind_of_pixels_comes_out_right_and_is_noted(kind, tmp_path):
    content, expected, notes = MODES[kind]
    path = tmp_path / "picture"
    path.write_bytes(content)
    pixels, said = read_image(path, 64)
    image = expected if isinstance(expected, Image.Image) else Image.fromarray(expected)
    truth = np.asarray(image.convert("RGB"), dtype=int)
    assert pixels.shape == (64, 64, 3)
    assert pixels.dtype == np.uint8
    assert said == notes
    assert np.abs(pixels - truth).mean() < 3


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_honoured(orientation, tmp_path):
    stored, exif = photo(96, 64), Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "turned.jpg", exif=exif, quality=100)
    with Image.open(tmp_path / "turned.jpg") as turned:
        ImageOps.exif_transpose(turned).save(tmp_path / "upright.png")
    pixels, notes = read_image(tmp_path / "turned.jpg", 48)
    assert np.abs(pixels.astype(int) - read_image(tmp_path / "upright.png", 48)[0]).max() <= 3
    assert notes == (["EXIF rotation applied"] if orientation > 1 else [])


def test_the_whole_image_is_kept_on_the_colour_of_its_border(tmp_path):
    wide = np.full((40, 160, 3), (10, 200, 90), np.uint8)
    wide[10:30, 20:140] = 255
    Image.fromarray(wide).save(tmp_path / "wide.png")
    pixels, _ = read_image(tmp_path / "wide.png", 64)
    assert (pixels[:24] == (10, 200, 90)).all()
    assert (pixels[40:] == (10, 200, 90)).all()
    assert (pixels[32, 16:48] == 255).all()


def test_a_huge_jpeg_is_read_small_and_looks_the_same(tmp_path):
    photo(4000, 3000).save(tmp_path / "huge.jpg", quality=95)
    photo(4000, 3000).save(tmp_path / "huge.png", compress_level=1)
    small, whole = (read_image(tmp_path / name, 64)[0].astype(int) for name in ("huge.jpg", "huge.png"))
    assert np.abs(small - whole).mean() < 1.5


def test_what_the_decoder_warns_of_becomes_a_note_on_its_own_image(tmp_path):
    good = encoded(photo(64, 64), "JPEG")
    broken_exif = b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01\x03\0\x01\0\0\0"
    (tmp_path / "broken.jpg").write_bytes(
        good[:2] + b"\xff\xe1" + struct.pack(">H", len(broken_exif) + 2) + broken_exif + good[2:]
    )
    (tmp_path / "good.jpg").write_bytes(good)
    filters = list(warnings.filters)
    paths = [tmp_path / "good.jpg", tmp_path / "broken.jpg"] * 20
    results = list(read_images(paths, 32))
    assert all(notes == [] for _, notes in results[::2])
    assert all("EXIF" in " ".join(notes) for _, notes in results[1::2])
    assert warnings.filters == filters


def test_threads_give_results_in_order_and_errors_in_place(tmp_path):
    for k in range(40):
        photo(64, 64, seed=k).save(tmp_path / f"{k}.png")
    (tmp_path / "7.png").write_bytes(b"")
    paths = [tmp_path / f"{k}.png" for k in range(40)]
    results = list(read_images(paths, 16, workers=3))
    assert isinstance(results[7], UnreadableImage)
    for k in set(range(40)) - {7}:
        np.testing.assert_array_equal(results[k][0], read_image(paths[k], 16)[0])


@pytest.mark.parametrize("form", ["JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP"])
def test_damaged_bytes_never_raise_anything_else(form, tmp_path):
    content, rng, path = encoded(photo(60, 40), form), np.random.default_rng(0), Path(tmp_path / "damaged")
    for _ in range(60):
        damaged = bytearray(content)
        for at in rng.integers(0, len(damaged), rng.integers(1, 12)):
            damaged[at] = rng.integers(256)
        path.write_bytes(bytes(damaged[: rng.integers(1, len(damaged) + 1)]))
        [result] = read_images([path], 16, workers=1)
        assert isinstance(result, UnreadableImage) or result[0].shape == (16, 16, 3)
