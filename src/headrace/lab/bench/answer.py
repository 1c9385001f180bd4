"""One request as the client sees it: the events of its stream, and its figures."""

from __future__ import annotations

import itertools
import time
from array import array
from collections.abc import Iterator
from typing import Any

import msgspec

from headrace.core.metrics import Usage
from headrace.engines.remote import parse_error
from headrace.lab.http import Headers
from headrace.text import chunks
from headrace.text.chunks import is_end, usage_of
from headrace.text.sse import EventReader

_LONGEST_EVENT = 16 << 20
_LONGEST_EXCERPT = 200


class Row(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One request. Times are in milliseconds; `at_s` is its start, in seconds from the load's.

    `fault` is empty if it succeeded. It starts when it was sent, and in an open loop when it was
    due; `late_ms` is the time between the two. `inter_token_ms` is (last text - first text) /
    (tokens - 1), `gaps_ms` are the times from one chunk with text to the next. `completion_tokens`
    counts chunks if the server reports no `usage`. `metrics` are the figures of a Headrace service.
    """

    at_s: float
    total_ms: float
    late_ms: float = 0.0
    fault: str = ""
    detail: str = ""
    ttft_ms: float | None = None
    inter_token_ms: float | None = None
    gaps_ms: list[float] = []
    prompt_tokens: int | None = None
    cached_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    completion_tokens: int = 0
    usage: bool = False
    wanted_tokens: int = 0
    finish_reason: str | None = None
    metrics: dict[str, Any] = {}


class Answer:
    """Receives a streamed answer in pieces, and returns its row."""

    def __init__(self, began: float, wanted_tokens: int, due: float | None = None) -> None:
        self.status = 0
        self._due = began if due is None else due
        self._late = began - self._due
        self._wanted = wanted_tokens
        self._events = EventReader(_LONGEST_EVENT)
        self._texts = array("d")
        self._usage: Usage | None = None
        self._metrics: dict[str, Any] = {}
        self._finish_reason: str | None = None
        self._whole = False
        self._fault = ("", "")
        self._refusal = b""

    def head(self, status: int, headers: Headers) -> None:
        """Receive the status."""
        self.status = status

    def body(self, data: bytes, at: float) -> None:
        """Receive a piece of the body, read at the time `at`."""
        if self.status != 200:
            self._refusal += data[: 1 << 16]
            return
        self._take(self._events.feed(data), at)

    def fail(self, kind: str, detail: str) -> None:
        """Record a failure; only the first one counts."""
        self._fault = self._fault if self._fault[0] else (kind, detail)

    def row(self, zero: float) -> Row:
        """Return the figures of the ended request; `zero` is the start of the load."""
        over = time.perf_counter()
        self._take(self._events.rest(), over)
        kind, detail = self._verdict()
        texts, usage = self._texts, self._usage
        tokens = len(texts) if usage is None else usage.completion_tokens
        spaced = len(texts) > 1 and tokens > 1
        return Row(
            at_s=self._due - zero,
            total_ms=(over - self._due) * 1e3,
            late_ms=self._late * 1e3,
            fault=kind,
            detail=" ".join(detail.split())[:_LONGEST_EXCERPT],
            ttft_ms=(texts[0] - self._due) * 1e3 if texts else None,
            inter_token_ms=(texts[-1] - texts[0]) * 1e3 / (tokens - 1) if spaced else None,
            gaps_ms=[(later - before) * 1e3 for before, later in itertools.pairwise(texts)],
            prompt_tokens=usage.prompt_tokens if usage else None,
            cached_tokens=usage.cached_tokens if usage else 0,
            drafted_tokens=usage.drafted_tokens if usage else 0,
            accepted_tokens=usage.accepted_tokens if usage else 0,
            completion_tokens=tokens,
            usage=usage is not None,
            wanted_tokens=self._wanted,
            finish_reason=self._finish_reason,
            metrics=self._metrics,
        )

    def _verdict(self) -> tuple[str, str]:
        if self._fault[0]:
            return self._fault
        if self.status != 200:
            return f"http {self.status}", message_of(self._refusal)
        if not self._whole and self._finish_reason is None:
            return "truncated", "the stream ended without a finish_reason or [DONE]"
        return "", ""

    def _take(self, events: Iterator[bytes], at: float) -> None:
        try:
            for event in events:
                self._event(event, at)
        except ValueError as error:
            self.fail("malformed", str(error))

    def _event(self, data: bytes, at: float) -> None:
        if is_end(data):
            self._whole = True
            return
        chunk = chunks.read(data)
        if chunk.error:
            self.fail("error in the stream", message_of(data))
        for choice in chunk.choices or ():
            if choice.content or choice.thinking:
                self._texts.append(at)
            self._finish_reason = choice.finish_reason or self._finish_reason
            self._usage = usage_of(choice.usage) or self._usage
        self._usage = usage_of(chunk.usage) or self._usage
        self._metrics = chunk.metrics or self._metrics


def message_of(body: bytes) -> str:
    """Return the message of an error response, or its text."""
    try:
        message = parse_error(chunks.loads(body)).message
    except chunks.Malformed:
        message = body[:_LONGEST_EXCERPT].decode(errors="replace")
    return str(message or "")
