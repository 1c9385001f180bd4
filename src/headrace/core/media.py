"""Pictures and sounds in messages: what headers say of pictures, and the bounds of a request.

Nothing is decoded here: that is left to the process of the model.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar

import msgspec

from headrace.core.audio import MAX_AUDIO_SECONDS, AudioFormat, read_sound
from headrace.core.errors import InvalidRequest

MAX_IMAGES = 16
"""Pictures and sounds of a request."""
MAX_IMAGE_BYTES = 20 << 20
"""Of all pictures and sounds of a request."""
MAX_IMAGE_PIXELS = 50_000_000
"""Of a picture, by its header."""
MAX_PIXELS = 100_000_000
"""Of all pictures of a request."""

_MAX_SEGMENTS = 8192
_PIXELS_PER_TOKEN = 784
_LEAST_TOKENS, _MOST_TOKENS = 64, 4096
# Most encoders of audio compute pieces of 30 s, of at most 25 tokens a second.
_PIECE_S, _TOKENS_OF_PIECE = 30, 750

ImageFormat = Literal["png", "jpeg", "webp", "gif"]


class Image(msgspec.Struct, frozen=True, tag_field="type", tag="image"):
    """A picture in a message. `digest` is the SHA-256 of its bytes, which the request has once.

    `size` is in bytes, `width` and `height` are pixels by its header. `place` is where the request
    of the client has it first, for errors.
    """

    digest: str
    format: ImageFormat
    size: int
    width: int
    height: int
    place: str = ""

    @property
    def tokens(self) -> int:
        """An estimate of its tokens: only the engine knows them."""
        by_size = self.width * self.height // _PIXELS_PER_TOKEN
        return min(_MOST_TOKENS, max(_LEAST_TOKENS, by_size))


class Audio(msgspec.Struct, frozen=True, tag_field="type", tag="audio"):
    """A sound in a message, as `Image` is a picture; `seconds` are the most that it may have."""

    digest: str
    format: AudioFormat
    size: int
    seconds: float
    place: str = ""

    @property
    def tokens(self) -> int:
        """The most that it may have with usual models: only the engine knows its tokens."""
        return math.ceil(self.seconds / _PIECE_S) * _TOKENS_OF_PIECE


Media = Image | Audio
M = TypeVar("M", Image, Audio)
T = TypeVar("T")
Part = str | Image | Audio
Content = str | tuple[Part, ...]
"""A text, or texts, pictures and sounds in their order."""


def text_of(content: Content, marker: str = "") -> str:
    """Return the text of a content, with `marker` for each picture and sound."""
    if isinstance(content, str):
        return content
    return "".join(part if isinstance(part, str) else marker for part in content)


def as_base64(part: Media, media: Mapping[str, bytes]) -> str:
    """Return the data of a picture or a sound, of which `media` has the bytes."""
    return base64.b64encode(media[part.digest]).decode()


def openai_part(part: Part, media: Mapping[str, bytes]) -> dict[str, Any]:
    """Return a part in the form of OpenAI's API; `media` has the bytes of pictures and sounds."""
    if isinstance(part, str):
        return {"type": "text", "text": part}
    data = as_base64(part, media)
    if isinstance(part, Audio):
        return {"type": "input_audio", "input_audio": {"data": data, "format": part.format}}
    return {"type": "image_url", "image_url": {"url": f"data:image/{part.format};base64,{data}"}}


def content_of(parts: Sequence[Part]) -> Content:
    """Return parts as a content: texts are joined where there is nothing else."""
    texts = [part for part in parts if isinstance(part, str)]
    return "".join(texts) if len(texts) == len(parts) else tuple(parts)


def known_as(content: Content) -> str:
    """Return a content as one text, with the digest of each picture and sound."""
    if isinstance(content, str):
        return content
    return "".join(part if isinstance(part, str) else part.digest for part in content)


def media_of(content: Content) -> Iterator[Media]:
    """Yield the pictures and sounds of a content."""
    if not isinstance(content, str):
        yield from (part for part in content if not isinstance(part, str))


def joined(first: Content, second: Content) -> Content:
    """Return two contents as one, with an empty line in between."""
    if isinstance(first, str) and isinstance(second, str):
        return f"{first}\n\n{second}"
    return (*_parts(first), "\n\n", *_parts(second))


def _parts(content: Content) -> tuple[Part, ...]:
    return (content,) if isinstance(content, str) else content


class Pictures:
    """Pictures and sounds of a request that is being read; `data` has their bytes by digest.

    `by_url` is what the reader keeps, so that a URL is read once.
    """

    def __init__(self) -> None:
        self.data: dict[str, bytes] = {}
        self.by_url: dict[str, Media] = {}
        self._count = self._bytes = self._pixels = 0
        self._seconds = 0.0

    def room(self, place: str) -> int:
        """Return how many bytes the next one may have.

        Raises:
            InvalidRequest: there are too many.
        """
        if self._count >= MAX_IMAGES:
            message = f"At most {MAX_IMAGES} images and sounds are accepted."
            raise InvalidRequest(message, param=place)
        return MAX_IMAGE_BYTES - self._bytes

    def add(self, data: bytes, place: str) -> Image:
        """Add a picture and return what stands for it; `place` is its name in errors.

        Raises:
            InvalidRequest: it is no picture, or beyond a bound.
        """
        kind, width, height = self._read(image_header, data, place)
        return self._added(Image(_digest(data), kind, len(data), width, height, place), data)

    def add_audio(self, data: bytes, place: str) -> Audio:
        """Add a sound and return what stands for it; `place` is its name in errors.

        Raises:
            InvalidRequest: it is no sound, or beyond a bound.
        """
        sound = self._read(read_sound, data, place)
        audio = Audio(_digest(data), sound.format, len(data), round(sound.seconds, 3), place)
        return self._added(audio, data)

    def _read(self, read: Callable[[bytes], T], data: bytes, place: str) -> T:
        if len(data) > self.room(place):
            raise too_many_bytes(place)
        try:
            return read(data)
        except ValueError as error:
            raise InvalidRequest(f"{place}: {error}.", param=place) from None

    def _added(self, part: M, data: bytes) -> M:
        self.again(part, part.place)
        self._bytes += len(data)
        self.data.setdefault(part.digest, data)
        return part

    def again(self, part: Media, place: str) -> None:
        """Count a picture or a sound, which may be one that was added before.

        Raises:
            InvalidRequest: there are too many, too many pixels, or too many seconds.
        """
        self.room(place)
        self._count += 1
        if isinstance(part, Image):
            self._count_pixels(part, place)
            return
        self._seconds += part.seconds
        if self._seconds > MAX_AUDIO_SECONDS:
            message = f"{place}: all sounds together are longer than {MAX_AUDIO_SECONDS} s."
            raise InvalidRequest(message, param=place)

    def _count_pixels(self, image: Image, place: str) -> None:
        pixels = image.width * image.height
        self._pixels += pixels
        if pixels > MAX_IMAGE_PIXELS:
            size = f"{image.width} x {image.height} are"
        elif self._pixels > MAX_PIXELS:
            size = "all images together have"
        else:
            return
        most = MAX_IMAGE_PIXELS if pixels > MAX_IMAGE_PIXELS else MAX_PIXELS
        raise InvalidRequest(f"{place}: {size} more than {most:,} pixels.", param=place)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def too_many_bytes(place: str) -> InvalidRequest:
    """Return the error for pictures and sounds of more than `MAX_IMAGE_BYTES`."""
    message = f"{place}: all images and sounds have more than {MAX_IMAGE_BYTES} bytes."
    return InvalidRequest(message, param=place)


def image_header(data: bytes) -> tuple[ImageFormat, int, int]:
    """Return format, width and height of a picture, by its first bytes.

    Raises:
        ValueError: it is none of the known formats, or its header is damaged.
    """
    try:
        if data.startswith(b"\x89PNG\r\n\x1a\n"):
            kind, width, height = "png", *_png(data)
        elif data.startswith(b"\xff\xd8\xff"):
            kind, width, height = "jpeg", *_jpeg(data)
        elif data.startswith((b"GIF87a", b"GIF89a")):
            kind, width, height = "gif", *_gif(data)
        elif data.startswith(b"RIFF") and data[8:12] == b"WEBP":
            kind, width, height = "webp", *_webp(data)
        else:
            raise ValueError("not an image in PNG, JPEG, WebP or GIF")
    except IndexError:
        raise ValueError("the image ends within its header") from None
    if not (width and height):
        raise ValueError("the image has no size in its header")
    return kind, width, height


def _big(data: bytes, start: int, size: int) -> int:
    return int.from_bytes(_piece(data, start, size), "big")


def _little(data: bytes, start: int, size: int) -> int:
    return int.from_bytes(_piece(data, start, size), "little")


def _piece(data: bytes, start: int, size: int) -> bytes:
    if start + size > len(data):
        raise IndexError
    return data[start : start + size]


def _png(data: bytes) -> tuple[int, int]:
    if _piece(data, 12, 4) != b"IHDR":
        raise ValueError("the PNG does not begin with its header")
    return _big(data, 16, 4), _big(data, 20, 4)


_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_ALONE = frozenset({0x01, *range(0xD0, 0xD8)})


def _jpeg(data: bytes) -> tuple[int, int]:
    place = 2
    for _ in range(_MAX_SEGMENTS):
        if data[place] != 0xFF:
            break
        marker = data[place + 1]
        if marker in _FRAMES:
            return _big(data, place + 7, 2), _big(data, place + 5, 2)
        if marker == 0xFF:
            place += 1
        elif marker in _ALONE:
            place += 2
        else:
            length = _big(data, place + 2, 2)
            if length < 2:
                break
            place += 2 + length
    raise ValueError("the JPEG has no frame header")


def _gif(data: bytes) -> tuple[int, int]:
    # A frame may be larger than the screen that the header has.
    width, height = _little(data, 6, 2), _little(data, 8, 2)
    place, steps = 13 + _colours(data[10]), iter(range(_MAX_SEGMENTS))
    for _ in steps:
        if data[place] == 0x2C:
            right = _little(data, place + 1, 2) + _little(data, place + 5, 2)
            bottom = _little(data, place + 3, 2) + _little(data, place + 7, 2)
            return max(width, right), max(height, bottom)
        if data[place] != 0x21:
            break
        place += 2
        for _ in steps:
            size = data[place]
            place += 1 + size
            if not size:
                break
    raise ValueError("the GIF has no frame")


def _colours(flags: int) -> int:
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


def _webp(data: bytes) -> tuple[int, int]:
    kind = _piece(data, 12, 4)
    if kind == b"VP8X":
        return _little(data, 24, 3) + 1, _little(data, 27, 3) + 1
    if kind == b"VP8 ":
        if _piece(data, 23, 3) != b"\x9d\x01\x2a":
            raise ValueError("the WebP has no frame header")
        return _little(data, 26, 2) & 0x3FFF, _little(data, 28, 2) & 0x3FFF
    if kind == b"VP8L" and data[20] == 0x2F:
        bits = _little(data, 21, 4)
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    raise ValueError("the WebP has no frame header")
