"""The parts of a message's content on the wire: texts and images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar, Literal

from headrace.api import fields
from headrace.api.fields import Body, Peers
from headrace.api.images import Fetched, read_image
from headrace.core.errors import InvalidRequest, Unsupported
from headrace.core.media import Content, Image, Pictures


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


def to_content(
    wire: Sequence[ContentPart], role: str, place: str, pictures: Pictures, fetched: Fetched
) -> Content:
    """Return the content of a message with this role; its texts are joined if it has no images.

    Raises:
        InvalidRequest: an image is damaged or beyond a bound.
        Unsupported: a part is neither text nor an image, or the role has no images.
    """
    parts = [
        _part(part, f"{place}.content[{number}]", pictures, fetched)
        for number, part in enumerate(wire)
    ]
    for number, part in enumerate(parts):
        if isinstance(part, Image) and role not in ("user", "tool"):
            raise Unsupported(
                f"Only turns of the user and of tools have images, not of {role}.",
                param=f"{place}.content[{number}]",
            )
    texts = [part for part in parts if isinstance(part, str)]
    return "".join(texts) if len(texts) == len(parts) else tuple(parts)


def _part(part: ContentPart, place: str, pictures: Pictures, fetched: Fetched) -> str | Image:
    if part.type in ("text", "refusal"):
        return part.text or part.refusal or ""
    if part.type != "image_url":
        raise Unsupported(f"{place}: {part.type} is not supported here.", param=place)
    if part.image_url is None:
        raise InvalidRequest(f"{place}.image_url is missing.", param=place)
    return read_image(_url(part.image_url), place, pictures, fetched)


def _url(image: ImageUrl | str) -> str:
    return image if isinstance(image, str) else image.url
