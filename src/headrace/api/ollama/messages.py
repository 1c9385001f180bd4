"""Ollama's conversations, and their translation to the core."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import Meta

from headrace.api import fields, limits
from headrace.api.fields import Body, Peers
from headrace.api.messages import CallId, ToolName
from headrace.core.errors import InvalidRequest
from headrace.core.events import ToolCall
from headrace.core.request import Message


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
    """One turn. A tool's turn answers the last call of `tool_name` that has no answer yet."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = None
    thinking: str | None = None
    tool_calls: Annotated[list[WireCall], Meta(max_length=limits.MAX_TOOLS)] | None = None
    tool_name: str | None = None
    tool_call_id: CallId | None = None
    name: str | None = None

    peers: ClassVar[Peers] = fields.OLLAMA_MESSAGE


Messages = Annotated[list[ChatMessage], Meta(max_length=limits.MAX_MESSAGES)]


def to_messages(wire: Sequence[ChatMessage]) -> tuple[Message, ...]:
    """Return the turns of a conversation, with an id for each call.

    Raises:
        InvalidRequest: a tool answers a call that was not made, or twice.
    """
    turns: list[Message] = []
    waiting: list[ToolCall] = []
    for index, message in enumerate(wire):
        if message.role == "tool":
            turns.append(_answer(message, index, waiting))
            continue
        calls = tuple(_call(call, f"call_{index}_{n}") for n, call in enumerate(_calls(message)))
        if message.role == "assistant":
            waiting = list(calls)
        turns.append(
            Message(
                message.role,
                message.content or "",
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


def _answer(message: ChatMessage, index: int, waiting: list[ToolCall]) -> Message:
    """Return a tool's turn, and take the call that it answers from those that wait."""
    name = message.tool_name or message.name
    for call in waiting:
        given = message.tool_call_id
        if call.id == given if given else name in {None, call.name}:
            waiting.remove(call)
            return Message("tool", message.content or "", call.name, tool_call_id=call.id)
    place = f"messages[{index}]"
    raise InvalidRequest(f"{place}: no call before it waits for this answer.", param=place)
