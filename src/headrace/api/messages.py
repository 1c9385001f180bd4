"""The messages of a chat as clients send them, over HTTP and in Python."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

from msgspec import Meta

from headrace.api import fields, limits
from headrace.api.fields import Body, Peers
from headrace.core.request import Message, Role


class TextPart(Body, frozen=True):
    """A part of a message; only text is supported."""

    type: Literal["text"]
    text: str

    peers: ClassVar[Peers] = fields.PART


class ChatMessage(Body, frozen=True):
    """One turn of a conversation."""

    role: Role
    content: str | list[TextPart]
    name: str | None = None

    peers: ClassVar[Peers] = fields.MESSAGE


Messages = Annotated[list[ChatMessage], Meta(min_length=1, max_length=limits.MAX_MESSAGES)]


def to_messages(wire: Sequence[ChatMessage]) -> tuple[Message, ...]:
    """Return the turns of a conversation, each with its parts joined to one text."""
    return tuple(Message(message.role, _content(message), message.name) for message in wire)


def _content(message: ChatMessage) -> str:
    if isinstance(message.content, str):
        return message.content
    return "".join(part.text for part in message.content)
