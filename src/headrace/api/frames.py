"""Chunks of both generating routes. Only the text of a delta is encoded; the rest is made once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec

from headrace.api.wire_common import usage_body
from headrace.core.events import Delta, Finish

_encode = msgspec.json.Encoder().encode


def encode(value: Any) -> bytes:
    """Return JSON without anything that a reader of lines may take for the end of one.

    JSON lets U+0085, U+2028 and U+2029 stand as they are.
    """
    data = _encode(value)
    if data.isascii():
        return data
    data = data.replace(b"\xc2\x85", b"\\u0085").replace(b"\xe2\x80\xa8", b"\\u2028")
    return data.replace(b"\xe2\x80\xa9", b"\\u2029")


@dataclass(frozen=True)
class Form:
    """How a route writes a choice: `role` opens it, `text` and `after` stand around the text.

    `empty` is there when a choice has ended. `logprobs` returns what is to be encoded.
    """

    object: str
    role: bytes
    text: bytes
    reasoning: bytes
    after: bytes
    empty: bytes
    logprobs: Callable[[Delta], Any]


class Frames:
    """Writes one stream: `data: {head,"choices":[{"index":0, text ,"finish_reason":null}]}`."""

    def __init__(self, head: dict[str, Any], form: Form, choices: int, *, usage: bool) -> None:
        fields = {**head, "object": form.object}
        self._head = b"data: " + encode(fields)[:-1] + b',"choices":['
        self._form = form
        self._choices = choices
        self._usage = usage
        self._end = b'],"usage":null}\n\n' if usage else b"]}\n\n"
        self._close = b',"finish_reason":null}' + self._end
        self._plain = form.after + b',"logprobs":null' + self._close
        self._text = [self._before(index) + form.text for index in range(choices)]

    def opening(self) -> bytes:
        """Return a chunk with the role for each choice, where the route has one."""
        if not self._form.role:
            return b""
        tail = self._form.role + b',"logprobs":null' + self._close
        return b"".join(self._before(index) + tail for index in range(self._choices))

    def delta(self, delta: Delta) -> bytes:
        """Return the chunk of a delta; none where it carries tokens alone."""
        if delta.logprobs or delta.reasoning:
            return self._rare(delta)
        if not delta.text:
            return b""
        return self._text[delta.index] + encode(delta.text) + self._plain

    def finish(self, finish: Finish) -> bytes:
        """Return the reason of each choice, then the usage where it was asked for."""
        chunks = [self._ended(index, reason) for index, reason in enumerate(finish.finish_reasons)]
        last: dict[str, Any] = {"metrics": finish.metrics}
        if self._usage:
            chunks = [chunk + self._end for chunk in chunks]
            last = {"usage": usage_body(finish.usage), **last}
            chunks.append(self._head + b"]," + encode(last)[1:] + b"\n\n")
        else:
            chunks[:-1] = [chunk + self._end for chunk in chunks[:-1]]
            chunks[-1] += b"]," + encode(last)[1:] + b"\n\n"
        return b"".join(chunks)

    def _rare(self, delta: Delta) -> bytes:
        form, before, chunk = self._form, self._before(delta.index), b""
        if delta.reasoning:
            chunk = before + form.reasoning + encode(delta.reasoning) + self._plain
        if delta.logprobs:
            logprobs = form.after + b',"logprobs":' + encode(form.logprobs(delta))
            chunk += before + form.text + encode(delta.text) + logprobs + self._close
        elif delta.text:
            chunk += before + form.text + encode(delta.text) + self._plain
        return chunk

    def _before(self, index: int) -> bytes:
        return self._head + b'{"index":%d,' % index

    def _ended(self, index: int, reason: str) -> bytes:
        end = b',"logprobs":null,"finish_reason":"' + reason.encode() + b'"}'
        return self._before(index) + self._form.empty + end
