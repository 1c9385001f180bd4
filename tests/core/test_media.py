"""Headers of pictures, and the bounds of a request."""

from __future__ import annotations

import io
import struct
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as Pillow
from PIL import ImageOps
from tests.pictures_made import broken, png, png_of

from headrace.core.errors import InvalidRequest
from headrace.core.media import MAX_IMAGE_BYTES, Image, Pictures, image_header, joined, text_of
from headrace.engines.pictures import decoded, is_turned

GIF = b"GIF89a" + struct.pack("<HHBBB", 1, 1, 0, 0, 0)
FRAME = b"\x2c" + struct.pack("<HHHHB", 2, 0, 9, 7, 0)


def saved(kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    Pillow.new("RGB", (37, 23), (200, 10, 10)).save(out, kind, **options)
    return out.getvalue()


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (saved("PNG"), "png"),
        (saved("JPEG"), "jpeg"),
        (saved("JPEG", progressive=True, icc_profile=b"x" * 70000), "jpeg"),
        (saved("GIF"), "gif"),
        (saved("WEBP"), "webp"),
        (saved("WEBP", lossless=True), "webp"),
        (saved("WEBP", exif=b"Exif\0\0" + b"x" * 10), "webp"),
    ],
)
def test_sizes_by_the_header(data: bytes, kind: str) -> None:
    """Issue 13, pictures: as another library reads them."""
    assert image_header(data) == (kind, 37, 23)
    assert image_header(data[:-5]) == (kind, 37, 23)


def test_a_frame_beyond_the_screen_counts() -> None:
    assert image_header(GIF + FRAME) == ("gif", 11, 7)


@pytest.mark.parametrize(
    "data",
    [
        b"", b"text", b"BM" + b"0" * 50, b"<svg/>", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff",
        b"\xff\xd8\xff\xe0\0\0", b"\xff\xd8\xff\xd9", GIF, GIF + b"\x3b", b"RIFF\0\0\0\0WEBP",
        b"RIFF\0\0\0\0WEBPVP8 " + b"\0" * 30, png_of(0, 4, b""), png()[:20],
        b"RIFF\0\0\0\0WAVE" + b"\0" * 30,
    ],
)  # fmt: skip
def test_what_is_no_picture(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"image|JPEG|GIF|WebP|PNG"):
        image_header(data)


@given(st.sampled_from([b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF89a", b"RIFF....WEBPVP8X"]),
       st.binary(max_size=300))  # fmt: skip
def test_any_bytes_are_a_size_or_an_error(start: bytes, rest: bytes) -> None:
    try:
        _, width, height = image_header(start + rest)
    except ValueError:
        return
    assert width > 0
    assert height > 0


@pytest.mark.parametrize(
    "data",
    [
        b"\xff\xd8\xff" + b"\xe0\0\2\xff" * (5 << 20),
        b"\xff\xd8" + b"\xff" * (20 << 20),
        GIF + b"\x21\xfe" + b"\1x" * (10 << 20),
        GIF + b"\x21\xfe\0" * (6 << 20),
    ],
)
def test_a_header_without_an_end_takes_no_time(data: bytes) -> None:
    began = time.process_time()
    with pytest.raises(ValueError, match="no frame"):
        image_header(data)
    assert time.process_time() - began < 0.5


def test_bounds() -> None:
    """Issue 13, pictures: count, bytes and pixels, before anything is decoded."""
    pictures = Pictures()
    image = pictures.add(png(), "here")
    assert (image.width, image.height, image.format, image.size) == (64, 48, "png", len(png()))
    assert pictures.add(png(), "here") == image
    assert list(pictures.data) == [image.digest]
    for _ in range(14):
        pictures.add(png(), "here")
    wrong = [
        (pictures, png(), "At most 16 images"),
        (Pictures(), png() + bytes(MAX_IMAGE_BYTES), f"more than {MAX_IMAGE_BYTES} bytes"),
        (Pictures(), png_of(10_000, 5_001, b""), "10000 x 5001 are more than 50,000,000 pixels"),
        (Pictures(), png_of(2**32 - 1, 2**32 - 1, b""), "more than 50,000,000 pixels"),
        (Pictures(), b"GIF", "messages.0.: not an image"),
    ]
    for taken, data, message in wrong:
        with pytest.raises(InvalidRequest, match=message) as caught:
            taken.add(data, "messages[0]")
        assert caught.value.param == "messages[0]"


def test_all_pixels_together_are_bounded() -> None:
    pictures = Pictures()
    for seed in range(2):
        pictures.add(png_of(10_000, 5_000, bytes([seed])), "here")
    with pytest.raises(InvalidRequest, match="all images together have more than 100,000,000"):
        pictures.add(png_of(10_000, 5_000, b"x"), "here")


def test_contents() -> None:
    image = Image("d", "png", 1, 2, 3)
    assert text_of(("a", image, "b"), "*") == "a*b"
    assert joined("a", "b") == "a\n\nb"
    assert joined("a", (image, "b")) == ("a", "\n\n", image, "b")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_decoded_upright(orientation: int) -> None:
    """Issue 13, pictures: as a camera was held, by EXIF; a red corner tells."""
    image = Pillow.new("RGB", (24, 16))
    image.paste((255, 0, 0), (0, 0, 8, 8))
    exif = Pillow.Exif()
    exif[0x0112] = orientation
    out = io.BytesIO()
    image.save(out, "JPEG", exif=exif, quality=95)
    turned = ImageOps.exif_transpose(Pillow.open(out))
    shown = decoded(out.getvalue())
    assert (shown.size, shown.tobytes()) == (turned.size, turned.convert("RGB").tobytes())
    assert is_turned(out.getvalue()) == (orientation > 1)


def test_pictures_of_other_depths() -> None:
    """Issue 13, pictures: grey of 16 bits is scaled, CMYK converted, damaged EXIF ignored."""

    def sample(image: Pillow.Image, kind: str = "PNG", **options: object) -> tuple[int, ...]:
        out = io.BytesIO()
        image.save(out, kind, **options)
        return decoded(out.getvalue()).getpixel((1, 1))

    assert sample(Pillow.new("I;16", (4, 4), 0x8000)) == (128, 128, 128)
    assert sample(Pillow.new("I;16", (4, 4), 0xFFFF)) == (255, 255, 255)
    assert sample(Pillow.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG")[0] > 240
    assert sample(Pillow.new("L", (8, 8), 7), "JPEG", exif=b"Exif\0\0nonsense") == (7, 7, 7)


def test_damaged_pictures_are_not_decoded() -> None:
    """Issue 13.5: but for JPEG, of which there is a part."""
    refused = 0
    for data in broken():
        try:
            decoded(data)
        except InvalidRequest:
            refused += 1
    assert refused >= 40
