"""Decoding of pictures by Pillow, in the process of a model."""

from __future__ import annotations

import importlib.util
import io
import struct
import zlib
from typing import Any

from headrace.core.errors import InvalidRequest, Unsupported
from headrace.core.install import install_command
from headrace.core.media import image_header

_DEFAULT_MARKER = "<image>"
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
_ORIENTATION = 0x0112
_EXIF_WITHIN = 64 << 10
# Values of EXIF, and what Pillow has to do with the image: its numbers of `Transpose`.
_TURNS = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}
_DAMAGED = (OSError, SyntaxError, ValueError, EOFError, LookupError, struct.error, zlib.error)


def decoded(data: bytes) -> Any:
    """Return a picture as a PIL image in RGB, upright; of an animation its first frame. Blocking.

    Raises:
        InvalidRequest: it cannot be decoded.
        Unsupported: Pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError:
        command = install_command("images")
        kind = image_header(data)[0]
        raise Unsupported(f"Images in {kind} need Pillow: {command}", param="messages") from None
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            image.load()  # here, so that damage is an error: asking for the EXIF may read it all
            turn = _TURNS.get(_orientation(image))
            shown = image if turn is None else image.transpose(Image.Transpose(turn))
            if shown.mode.startswith("I"):  # 16 bits, which Pillow would cut off at 255
                shown = shown.convert("I").point(lambda value: value / 256).convert("L")
            return shown.convert("RGB")
    except (*_DAMAGED, Image.DecompressionBombError) as error:
        reason = type(error).__name__
        raise InvalidRequest(
            "An image cannot be decoded.", param="messages", detail=f"{reason}: {error}"
        ) from error


def is_turned(data: bytes) -> bool:
    """Whether a JPEG is shown turned or mirrored; False where Pillow is not installed."""
    if b"Exif\0\0" not in data[:_EXIF_WITHIN] or not is_installed():
        return False
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
            return _orientation(image) in _TURNS
    except (*_DAMAGED, Image.DecompressionBombError):
        return False


def _orientation(image: Any) -> int:
    """Return how a camera was held, as EXIF has it; a damaged EXIF says nothing."""
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except _DAMAGED:
        return 1


def image_marker(processor: Any, template: str | None) -> str:
    """Return the text that a processor of transformers replaces by an image; empty if none.

    It has several markers; the one in the text is that which the chat template writes.
    """
    names = ("image_token", "boi_token", "fake_image_token")
    known = (getattr(processor, name, None) for name in names)
    markers = [str(marker) for marker in known if isinstance(marker, str) and marker]
    if not markers:
        return ""
    written = (marker for marker in (*markers, _DEFAULT_MARKER) if marker in (template or ""))
    return next(written, markers[0])


def is_installed() -> bool:
    """Whether Pillow is installed."""
    return importlib.util.find_spec("PIL") is not None


def as_png(data: bytes) -> bytes:
    """Return a picture as a PNG. Blocking.

    Raises:
        InvalidRequest, Unsupported: as `decoded`.
    """
    out = io.BytesIO()
    decoded(data).save(out, "PNG", compress_level=1)
    return out.getvalue()
