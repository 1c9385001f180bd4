"""Answers of /v1/responses, whole and as the events of a stream."""

from __future__ import annotations

import base64
import time
from collections.abc import Collection
from typing import Any, Literal, NamedTuple

from msgspec.structs import replace

from headrace.api.custom_tools import FreeText, free_text
from headrace.api.logprobs import TokenBody, token_bodies
from headrace.api.problems import Problem
from headrace.api.responses_body import (
    CustomCallItem,
    FunctionCallItem,
    IncompleteDetails,
    MessageItem,
    OutputItem,
    OutputText,
    ReasoningItem,
    ReasoningText,
    ResponseBody,
    ResponseError,
    ResponseEvent,
    Status,
    usage_of,
)
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
from headrace.core.metrics import InferenceMetrics

_SEALED = "headrace:"


class _Kind(NamedTuple):
    """A kind of item: the beginning of its ids and events, the field with its whole text."""

    prefix: str
    event: str
    field: str
    has_part: bool = False


_KINDS = {
    "reasoning": _Kind("rs_", "response.reasoning_text", "text", has_part=True),
    "message": _Kind("msg_", "response.output_text", "text", has_part=True),
    "function_call": _Kind("fc_", "response.function_call_arguments", "arguments"),
    "custom_tool_call": _Kind("ctc_", "response.custom_tool_call_input", "input"),
}


class Settings(NamedTuple):
    """How items are written: the tools that take free text, and whether thinking is sealed."""

    custom: Collection[str] = ()
    seals: bool = False


class _Item:
    """An item whose text is being collected."""

    def __init__(self, kind: str, request_id: str, index: int, call_id: str, name: str) -> None:
        self.kind = kind
        self.facts = _KINDS[kind]
        self.id = f"{self.facts.prefix}{request_id}{index:02x}"
        self.index = index
        self.texts: list[str] = []
        self.logprobs: list[TokenBody] = []
        self.free_text = FreeText() if kind == "custom_tool_call" else None
        self._call_id = call_id
        self._name = name

    @property
    def text(self) -> str:
        return "".join(self.texts)

    def place(self) -> dict[str, Any]:
        """Return the fields that say in an event where it belongs."""
        place = {"item_id": self.id, "output_index": self.index}
        return place | ({"content_index": 0} if self.facts.has_part else {})

    def done(self) -> dict[str, Any]:
        """Return the fields of the event that ends the text."""
        fields: dict[str, Any] = {self.facts.field: self.text}
        if self.kind == "function_call":
            fields["name"] = self._name
        return fields | ({"logprobs": self.logprobs} if self.kind == "message" else {})

    def part(self) -> OutputText | ReasoningText:
        """Return the one part of its content."""
        if self.kind == "reasoning":
            return ReasoningText(self.text)
        return OutputText(text=self.text, logprobs=self.logprobs)

    def body(self, status: Status, *, seals: bool) -> OutputItem:
        """Return the item; one in progress has no content yet."""
        begun, part = status != "in_progress", self.part()
        if isinstance(part, ReasoningText):
            sealed = seal(part.text) if seals and begun else None
            content = [part] if begun else []
            return ReasoningItem(
                id=self.id, content=content, encrypted_content=sealed, status=status
            )
        if self.kind == "message":
            return MessageItem(id=self.id, content=[part] if begun else [], status=status)
        head = {"id": self.id, "call_id": self._call_id, "name": self._name}
        if self.kind == "custom_tool_call":
            return CustomCallItem(**head, input=self.text, status=status)
        return FunctionCallItem(**head, arguments=self.text, status=status)


def seal(thinking: str) -> str:
    """Return thinking as a text that clients send back as it is; it is not secret."""
    return _SEALED + base64.b64encode(thinking.encode()).decode()


def unseal(content: str) -> str:
    """Return the thinking of `seal`; empty for the content of another server."""
    try:
        return base64.b64decode(content.removeprefix(_SEALED), validate=True).decode()
    except ValueError:
        return ""


def ended(
    head: ResponseBody, reason: FinishReason, output: list[OutputItem], metrics: InferenceMetrics
) -> ResponseBody:
    """Return a response that has ended."""
    reasons: dict[str, Literal["max_output_tokens", "content_filter"]] = {
        "length": "max_output_tokens",
        "content_filter": "content_filter",
    }
    cut = reasons.get(reason)
    return replace(
        head,
        status="incomplete" if cut else "completed",
        completed_at=None if cut else int(time.time()),
        incomplete_details=IncompleteDetails(cut) if cut else None,
        output=output,
        usage=usage_of(metrics.usage),
        metrics=metrics,
    )


def whole(
    head: ResponseBody, result: GenerateResult, request_id: str, settings: Settings
) -> ResponseBody:
    """Return the response of a collected stream."""
    choice, items = result.choices[0], list[_Item]()

    def begin(kind: str, text: str, call_id: str = "", name: str = "") -> _Item:
        items.append(_Item(kind, request_id, len(items), call_id, name))
        items[-1].texts.append(text)
        return items[-1]

    if choice.reasoning:
        begin("reasoning", choice.reasoning)
    if choice.text or not (choice.reasoning or choice.tool_calls):
        begin("message", choice.text).logprobs += token_bodies(choice.logprobs)
    for call in choice.tool_calls:
        if call.name in settings.custom:
            begin("custom_tool_call", free_text(call.arguments), call.id, call.name)
        else:
            begin("function_call", call.arguments, call.id, call.name)
    status = _status(choice.finish_reason)
    bodies = [
        item.body(status if item is items[-1] else "completed", seals=settings.seals)
        for item in items
    ]
    return ended(head, choice.finish_reason, bodies, result.metrics)


class ResponseEncoder:
    """Writes the events of a response. Only the text of a delta is encoded; the rest once."""

    start = EVENTS

    def __init__(self, head: ResponseBody, request_id: str, settings: Settings) -> None:
        self._head = head
        self._request_id = request_id
        self._settings = settings
        self._number = 0
        self._output: list[OutputItem] = []
        self._item: _Item | None = None
        self._delta_head = b""
        self._held: list[TokenBody] = []

    def waiting(self, progress: Progress | None) -> bytes:
        """Return a comment."""
        return comment(progress)

    def opening(self, progress: Progress | None) -> bytes:
        """Return the events of a response that has begun."""
        del progress
        kinds = ("response.created", "response.in_progress")
        return b"".join(self._event(kind, response=self._head) for kind in kinds)

    def delta(self, delta: Delta) -> bytes:
        """Return the events of an addition; empty if it has no text."""
        data = b""
        if delta.reasoning:
            self._held = []
            data = self._within("reasoning") + self._added(delta.reasoning)
        elif delta.logprobs:
            self._held += token_bodies(delta.logprobs)
        if not delta.text:
            return data
        if self._item is None or self._item.kind != "message":
            data += self._within("message")
        return data + self._added(delta.text)

    def rare(self, event: ToolCallDelta | PromptTokens) -> bytes:
        """Return the events of an addition to a call."""
        if isinstance(event, PromptTokens):
            return b""
        return self._call(event)

    def _call(self, delta: ToolCallDelta) -> bytes:
        data = b""
        if delta.name:
            custom = delta.name in self._settings.custom
            kind = "custom_tool_call" if custom else "function_call"
            data = self._begin(kind, delta.id, delta.name)
        item, text = self._item, delta.arguments
        if item is not None and item.free_text is not None:
            text = item.free_text.feed(text)
        return data + (self._added(text) if text else b"")

    def finish(self, finish: Finish) -> bytes:
        """Return the rest of the last item, and the whole response."""
        data, reason = b"", finish.finish_reason
        if self._item is None and not self._output:
            data = self._begin("message")
        data += self._end(_status(reason))
        response = ended(self._head, reason, self._output, finish.metrics)
        return data + self._event(f"response.{response.status}", response=response)

    def failure(self, problem: Problem, request_id: str) -> bytes:
        """Return the rest of the last item, and the response with its error."""
        del request_id
        data = self._end("incomplete") if self._number else self.opening(None)
        error = ResponseError(_code(problem), problem.message, problem.param, problem.code)
        response = replace(
            self._head, status="failed", error=error, output=self._output, metrics=problem.metrics
        )
        return data + self._event("response.failed", response=response)

    def _within(self, kind: str) -> bytes:
        same = self._item is not None and self._item.kind == kind
        return b"" if same else self._begin(kind)

    def _begin(self, kind: str, call_id: str = "", name: str = "") -> bytes:
        data = self._end("completed")
        item = self._item = _Item(kind, self._request_id, len(self._output), call_id, name)
        place, body = item.place(), item.body("in_progress", seals=False)
        data += self._event("response.output_item.added", output_index=item.index, item=body)
        if item.facts.has_part:
            data += self._event("response.content_part.added", **place, part=item.part())
        event = f"{item.facts.event}.delta"
        fields: dict[str, Any] = {
            "type": event,
            **place,
            **({"logprobs": []} if kind == "message" else {}),
        }
        head = b"event: %b\ndata: %b" % (event.encode(), encode(fields)[:-1])
        self._delta_head = head + b',"sequence_number":'
        return data

    def _end(self, status: Status) -> bytes:
        item, self._item = self._item, None
        if item is None:
            return b""
        data = b""
        if item.free_text is not None and (rest := item.free_text.flush()):
            self._item = item
            data = self._added(rest)
            self._item = None
        place = item.place()
        data += self._event(f"{item.facts.event}.done", **place, **item.done())
        if item.facts.has_part:
            data += self._event("response.content_part.done", **place, part=item.part())
        body = item.body(status, seals=self._settings.seals)
        self._output.append(body)
        return data + self._event("response.output_item.done", output_index=item.index, item=body)

    def _added(self, text: str) -> bytes:
        item = self._item
        assert item is not None
        item.texts.append(text)
        if self._held and item.kind == "message":
            logprobs, self._held = self._held, []
            item.logprobs += logprobs
            event = f"{item.facts.event}.delta"
            return self._event(event, **item.place(), delta=text, logprobs=logprobs)
        number = self._number
        self._number += 1
        return self._delta_head + b'%d,"delta":%b}\n\n' % (number, encode(text))

    def _event(self, kind: str, **fields: Any) -> bytes:
        event = ResponseEvent(type=kind, sequence_number=self._number, **fields)
        self._number += 1
        return b"event: %b\ndata: %b\n\n" % (kind.encode(), encode(event))


def _status(reason: FinishReason) -> Status:
    return "incomplete" if reason in {"length", "content_filter"} else "completed"


def _code(problem: Problem) -> str:
    """Return the code of a failed response: one of few, which clients act on."""
    if problem.code == "context_length_exceeded":
        return problem.code
    if problem.status < 500:
        return "rate_limit_exceeded" if problem.status == 429 else "invalid_prompt"
    return "server_error"
