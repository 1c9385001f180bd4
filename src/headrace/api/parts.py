"""The parts of a message's content on the wire: texts and images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar, Literal

from headrace.api import fields
from headrace.api.fields import Body, Peers
from headrace.api.images import ImageReader
from headrace.core.errors import InvalidRequest, Unsupported
from headrace.core.media import Content, Image, content_of


class ImageUrl(Body, frozen=True):
    """The URL of a picture: `data:image/png;base64,...`, or of a host that is allowed."""

    url: str
    detail: Literal["auto", "low", "high"] | None = None


class ContentPart(Body, frozen=True):
    """A part of a message: text, or a picture. A refusal is text that a model has written.

    Parts of the other types are refused by name.
    """

    type: Literal["text", "refusal", "image_url", "input_audio", "video_url", "file"]
    text: str | None = None
    refusal: str | None = None
    image_url: ImageUrl | str | None = None

    peers: ClassVar[Peers] = fields.PART


def image_urls(wire: Sequence[ContentPart], place: str) -> Iterator[tuple[str, str]]:
    """Yield the URL of each image, with its place."""
    for number, part in enumerate(wire):
        if part.type == "image_url" and part.image_url is not None:
            yield _url(part.image_url), f"{place}.content[{number}]"


def check_role(role: str, place: str) -> None:
    """Check that turns of a role have images.

    Raises:
        Unsupported: they have none.
    """
    if role not in ("user", "tool"):
        message = f"Only turns of the user and of tools have images, not of {role}."
        raise Unsupported(message, param=place)


def to_content(wire: Sequence[ContentPart], role: str, place: str, reader: ImageReader) -> Content:
    """Return the content of a message with this role; its texts are joined if it has no images.

    Raises:
        InvalidRequest: an image is damaged or beyond a bound.
        Unsupported: a part is neither text nor an image, or the role has no images.
    """
    places = ((part, f"{place}.content[{number}]") for number, part in enumerate(wire))
    return content_of([_part(part, role, where, reader) for part, where in places])


def _part(part: ContentPart, role: str, place: str, reader: ImageReader) -> str | Image:
    if part.type in ("text", "refusal"):
        return part.text or part.refusal or ""
    if part.type != "image_url":
        raise Unsupported(f"{place}: {part.type} is not supported here.", param=place)
    if part.image_url is None:
        raise InvalidRequest(f"{place}.image_url is missing.", param=place)
    check_role(role, place)
    return reader.read(_url(part.image_url), place)


def _url(image: ImageUrl | str) -> str:
    return image if isinstance(image, str) else image.url
