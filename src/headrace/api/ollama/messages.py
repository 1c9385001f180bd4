"""Ollama's conversations, and their translation to the core."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import Meta

from headrace.api import fields, limits
from headrace.api.fields import Body, Peers
from headrace.api.images import ImageReader
from headrace.api.messages import CallId, ToolName
from headrace.core.errors import InvalidRequest
from headrace.core.events import ToolCall
from headrace.core.media import MAX_IMAGES, Content
from headrace.core.request import Message

Images = Annotated[list[str], Meta(max_length=MAX_IMAGES)]


class CalledFunction(Body, frozen=True, kw_only=True):
    """The function of a call; its arguments are an object, not a text."""

    name: ToolName
    arguments: dict[str, Any] | None = None

    peers: ClassVar[Peers] = fields.OLLAMA_FUNCTION


class WireCall(Body, frozen=True, kw_only=True):
    """A call in an assistant's turn; most clients give no id."""

    function: CalledFunction
    id: CallId | None = None

    peers: ClassVar[Peers] = fields.OLLAMA_CALL


class ChatMessage(Body, frozen=True, kw_only=True):
    """One turn. A tool's turn answers the last call of `tool_name` that has no answer yet.

    `images` are in base64.
    """

    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = None
    images: Images | None = None
    thinking: str | None = None
    tool_calls: Annotated[list[WireCall], Meta(max_length=limits.MAX_TOOLS)] | None = None
    tool_name: str | None = None
    tool_call_id: CallId | None = None
    name: str | None = None

    peers: ClassVar[Peers] = fields.OLLAMA_MESSAGE


Messages = Annotated[list[ChatMessage], Meta(max_length=limits.MAX_MESSAGES)]


def to_content(text: str, images: Images | None, place: str, reader: ImageReader) -> Content:
    """Return a text with the images after it.

    Raises:
        InvalidRequest: an image is damaged or beyond a bound.
    """
    if not images:
        return text
    urls = enumerate(f"data:;base64,{image}" for image in images)
    seen = (reader.read(url, f"{place}images[{n}]") for n, url in urls)
    return (text, *seen)


def to_messages(wire: Sequence[ChatMessage], reader: ImageReader) -> tuple[Message, ...]:
    """Return the turns of a conversation, with an id for each call.

    Raises:
        InvalidRequest: an image is damaged, or not in a turn of the user or a tool.
    """
    turns: list[Message] = []
    waiting: list[ToolCall] = []
    for index, message in enumerate(wire):
        if message.role == "tool":
            turns.append(_answer(message, index, waiting, reader))
            continue
        place = f"messages[{index}]"
        if message.images and message.role != "user":
            raise InvalidRequest(f"{place}: images go with the user.", param=f"{place}.images")
        calls = tuple(_call(call, f"call_{index}_{n}") for n, call in enumerate(_calls(message)))
        if message.role == "assistant":
            waiting = list(calls)
        turns.append(
            Message(
                message.role,
                to_content(message.content or "", message.images, f"{place}.", reader),
                tool_calls=calls,
                reasoning=message.thinking or "",
            )
        )
    return tuple(turns)


def _calls(message: ChatMessage) -> Sequence[WireCall]:
    return (message.tool_calls or ()) if message.role == "assistant" else ()


def _call(call: WireCall, id: str) -> ToolCall:
    arguments = msgspec.json.encode(call.function.arguments or {}).decode()
    return ToolCall(call.id or id, call.function.name, arguments)


def _answer(
    message: ChatMessage, index: int, waiting: list[ToolCall], reader: ImageReader
) -> Message:
    """Return a tool's turn, and take the call that it answers from those that wait.

    Clients that shorten a conversation may cut off the call, but not what the tool has returned.
    """
    name, given = message.tool_name or message.name, message.tool_call_id
    answered = (
        call for call in waiting if (call.id == given if given else name in {None, call.name})
    )
    call = next(answered, None)
    if call is not None:
        waiting.remove(call)
        name, given = call.name, call.id
    content = to_content(message.content or "", message.images, f"messages[{index}].", reader)
    return Message("tool", content, name, tool_call_id=given or f"call_{index}")
