"""The parts of a message's content on the wire: texts, images and sounds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar, Literal

from headrace.api import fields
from headrace.api.fields import Body, Peers
from headrace.api.images import ImageReader
from headrace.core.errors import InvalidRequest, Unsupported
from headrace.core.media import Content, Part, content_of

_MEDIA = frozenset({"image_url", "input_audio", "audio_url"})


class ImageUrl(Body, frozen=True):
    """The URL of a picture: `data:image/png;base64,...`, or of a host that is allowed."""

    url: str
    detail: Literal["auto", "low", "high"] | None = None


class AudioData(Body, frozen=True):
    """A sound in base64. Its format is read from its bytes, whatever `format` says."""

    data: str
    format: str | None = None


class AudioUrl(Body, frozen=True):
    """The URL of a sound, as that of a picture: vLLM's form."""

    url: str


class ContentPart(Body, frozen=True):
    """A part of a message: text, a picture or a sound. A refusal is text that a model has written.

    Parts of the other types are refused by name.
    """

    type: Literal["text", "refusal", "image_url", "input_audio", "audio_url", "video_url", "file"]
    text: str | None = None
    refusal: str | None = None
    image_url: ImageUrl | str | None = None
    input_audio: AudioData | None = None
    audio_url: AudioUrl | str | None = None

    peers: ClassVar[Peers] = fields.PART


def image_urls(wire: Sequence[ContentPart], place: str) -> Iterator[tuple[str, str]]:
    """Yield the URL of each image and sound, with its place."""
    for number, part in enumerate(wire):
        if (url := _url(part)) is not None:
            yield url, f"{place}.content[{number}]"


def check_role(role: str, place: str) -> None:
    """Check that turns of a role have images and sounds.

    Raises:
        Unsupported: they have none.
    """
    if role not in ("user", "tool"):
        message = f"Only turns of the user and of tools have images and audio, not of {role}."
        raise Unsupported(message, param=place)


def to_content(wire: Sequence[ContentPart], role: str, place: str, reader: ImageReader) -> Content:
    """Return the content of a message with this role; its texts are joined if it has nothing else.

    Raises:
        InvalidRequest: an image or a sound is damaged or beyond a bound.
        Unsupported: a part is of another type, or the role has texts alone.
    """
    places = ((part, f"{place}.content[{number}]") for number, part in enumerate(wire))
    return content_of([_part(part, role, where, reader) for part, where in places])


def data_url(data: str) -> str:
    """Return base64 as a URL that `ImageReader` reads."""
    return f"data:;base64,{data}"


def _part(part: ContentPart, role: str, place: str, reader: ImageReader) -> Part:
    if part.type in ("text", "refusal"):
        return part.text or part.refusal or ""
    if part.type not in _MEDIA:
        raise Unsupported(f"{place}: {part.type} is not supported here.", param=place)
    if (url := _url(part)) is None:
        raise InvalidRequest(f"{place}.{part.type} is missing.", param=place)
    check_role(role, place)
    return reader.read(url, place) if part.type == "image_url" else reader.read_audio(url, place)


def _url(part: ContentPart) -> str | None:
    if part.type == "input_audio":
        return None if part.input_audio is None else data_url(part.input_audio.data)
    given = {"image_url": part.image_url, "audio_url": part.audio_url}.get(part.type)
    return given if given is None or isinstance(given, str) else given.url
