"""Answers of /v1/messages, whole and as the events of a stream."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import msgspec

from headrace.api.problems import ANTHROPIC, Problem
from headrace.api.stream import EVENTS, comment, encode
from headrace.core.events import (
    Delta,
    Finish,
    FinishReason,
    GenerateResult,
    Progress,
    PromptTokens,
    ToolCallDelta,
)
from headrace.core.metrics import InferenceMetrics, Usage

StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use", "refusal"]

_REASONS: dict[FinishReason, StopReason] = {
    "length": "max_tokens",
    "tool_calls": "tool_use",
    "content_filter": "refusal",
}
# Clients send it back with the thinking; it says nothing.
_SIGNATURE = "headrace"
_PING = b'event: ping\ndata: {"type":"ping"}\n\n'


class TextBlock(msgspec.Struct, frozen=True, tag_field="type", tag="text"):
    """Text of the model."""

    text: str


class ThinkingBlock(msgspec.Struct, frozen=True, tag_field="type", tag="thinking"):
    """Thinking of the model; the signature has no meaning."""

    thinking: str
    signature: str


class ToolUseBlock(msgspec.Struct, frozen=True, tag_field="type", tag="tool_use"):
    """A call of a tool."""

    id: str
    name: str
    input: dict[str, Any]


AnswerBlock = TextBlock | ThinkingBlock | ToolUseBlock


class OutputTokens(msgspec.Struct, frozen=True):
    """The tokens of thinking, which are part of the output's."""

    thinking_tokens: int


class MessageUsage(msgspec.Struct, frozen=True, kw_only=True):
    """The tokens of a message; those of the input without those from a cache.

    There are details where the model has thought.
    """

    input_tokens: int
    cache_read_input_tokens: int = 0
    cache_creation_input_tokens: int = 0
    output_tokens: int
    output_tokens_details: OutputTokens | msgspec.UnsetType = msgspec.UNSET


class MessageBody(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="message"):
    """A message of the model."""

    id: str
    role: Literal["assistant"] = "assistant"
    model: str
    content: list[AnswerBlock]
    stop_reason: StopReason | None = None
    stop_sequence: str | None = None
    usage: MessageUsage
    metrics: InferenceMetrics | None = None


class MessageEvent(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An event of a stream; which of the fields it has depends on its type."""

    type: str
    message: MessageBody | None = None
    index: int | None = None
    content_block: AnswerBlock | None = None
    delta: dict[str, Any] | None = None
    usage: MessageUsage | None = None
    metrics: InferenceMetrics | None = None


class MessageHead(NamedTuple):
    """What is known of a message at its beginning.

    `stops` are the stop sequences of the request; the model can have others.
    """

    id: str
    model: str
    stops: Sequence[str]


def whole(head: MessageHead, result: GenerateResult) -> MessageBody:
    """Return the message of a collected stream."""
    choice = result.choices[0]
    blocks: list[AnswerBlock] = []
    if choice.reasoning:
        blocks.append(ThinkingBlock(choice.reasoning, _SIGNATURE))
    if choice.text or not (choice.tool_calls or blocks):
        blocks.append(TextBlock(choice.text))
    blocks += [ToolUseBlock(c.id, c.name, _object(c.arguments)) for c in choice.tool_calls]
    reason, sequence = _stopped(choice.finish_reason, choice.stop, head.stops)
    return MessageBody(
        id=head.id,
        model=head.model,
        content=blocks,
        stop_reason=reason,
        stop_sequence=sequence,
        usage=_usage(result.usage),
        metrics=result.metrics,
    )


class MessageEncoder:
    """Writes the events of a message. Only the text of a delta is encoded; the rest once."""

    start = EVENTS

    def __init__(self, head: MessageHead) -> None:
        self._head = head
        self._block = ""
        self._index = -1
        self._delta_head = b""

    def waiting(self, progress: Progress | None) -> bytes:
        """Return a comment and a ping."""
        return comment(progress) + _PING

    def opening(self, progress: Progress | None) -> bytes:
        """Return the beginning of a message, with the number of the prompt's tokens."""
        known = progress is not None and progress.stage == "prefill"
        tokens = progress.total if progress is not None and known else 0
        message = MessageBody(
            id=self._head.id,
            model=self._head.model,
            content=[],
            usage=MessageUsage(input_tokens=tokens, output_tokens=0),
        )
        return _event("message_start", message=message)

    def delta(self, delta: Delta) -> bytes:
        """Return the events of an addition; empty if it has no text that is sent."""
        data = b""
        if delta.reasoning:
            if self._block != "thinking":
                data = self._begin(ThinkingBlock("", ""), "thinking", "thinking")
            data += self._added(delta.reasoning)
        if not delta.text:
            return data
        if self._block != "text":
            data += self._begin(TextBlock(""), "text", "text")
        return data + self._added(delta.text)

    def rare(self, event: ToolCallDelta | PromptTokens) -> bytes:
        """Return the events of an addition to a call."""
        if isinstance(event, PromptTokens):
            return b""
        return self._call(event)

    def _call(self, delta: ToolCallDelta) -> bytes:
        data = b""
        if delta.name:
            block = ToolUseBlock(delta.id, delta.name, {})
            data = self._begin(block, "input_json", "partial_json")
        return data + (self._added(delta.arguments) if delta.arguments else b"")

    def finish(self, finish: Finish) -> bytes:
        """Return the end of the last block and of the message."""
        data = b"" if self._index >= 0 else self._begin(TextBlock(""), "text", "text")
        data += self._end()
        stop = finish.stops[0] if finish.stops else None
        reason, sequence = _stopped(finish.finish_reason, stop, self._head.stops)
        delta = {"stop_reason": reason, "stop_sequence": sequence}
        usage = _usage(finish.usage)
        data += _event("message_delta", delta=delta, usage=usage, metrics=finish.metrics)
        return data + _event("message_stop")

    def failure(self, problem: Problem, request_id: str) -> bytes:
        """Return the error as an event."""
        return b"event: error\ndata: %b\n\n" % ANTHROPIC.write(problem, request_id)

    def _begin(self, block: AnswerBlock, kind: str, field: str) -> bytes:
        data = self._end()
        self._block = kind
        self._index += 1
        head = {"type": "content_block_delta", "index": self._index}
        delta = encode({"type": f"{kind}_delta"})[:-1] + b',"%b":' % field.encode()
        start = b"event: content_block_delta\ndata: " + encode(head)[:-1]
        self._delta_head = start + b',"delta":' + delta
        return data + _event("content_block_start", index=self._index, content_block=block)

    def _end(self) -> bytes:
        if self._index < 0:
            return b""
        signature = b""
        if self._block == "thinking":
            delta = {"type": "signature_delta", "signature": _SIGNATURE}
            signature = _event("content_block_delta", index=self._index, delta=delta)
        return signature + _event("content_block_stop", index=self._index)

    def _added(self, text: str) -> bytes:
        return self._delta_head + encode(text) + b"}}\n\n"


def _event(kind: str, **fields: Any) -> bytes:
    event = MessageEvent(type=kind, **fields)
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), encode(event))


def _stopped(
    reason: FinishReason, stop: str | None, stops: Sequence[str]
) -> tuple[StopReason, str | None]:
    if stop in stops and reason == "stop":
        return "stop_sequence", stop
    return _REASONS.get(reason, "end_turn"), None


def _usage(usage: Usage) -> MessageUsage:
    return MessageUsage(
        input_tokens=usage.prompt_tokens - usage.cached_tokens,
        cache_read_input_tokens=usage.cached_tokens,
        output_tokens=usage.completion_tokens,
        output_tokens_details=OutputTokens(usage.reasoning_tokens)
        if usage.reasoning_tokens
        else msgspec.UNSET,
    )


def _object(arguments: str) -> dict[str, Any]:
    try:
        return msgspec.json.decode(arguments, type=dict[str, Any])
    except (msgspec.MsgspecError, RecursionError):
        return {}
