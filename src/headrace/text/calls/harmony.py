"""The messages of harmony: each has a channel and perhaps a recipient."""

from __future__ import annotations

import re

from headrace.text.calls.cursor import Cursor, Emit, Markers, Need, NotACallError
from headrace.text.calls.parts import Sink
from headrace.text.calls.trim import Trimmer

_START, _CHANNEL, _MESSAGE = "<|start|>", "<|channel|>", "<|message|>"
_ENDS = ("<|end|>", "<|call|>", "<|return|>")
_HEADER_END = Markers([_MESSAGE, *_ENDS])
_RECIPIENT = re.compile(r"to=([^\s<]+)")
_CHANNEL_NAME = re.compile(r"<\|channel\|>\s*(\w+)")
_MAX_HEADER = 512


class Harmony:
    """Parses an answer: analysis is thinking, a message to a function a call, the rest content.

    `names` are the functions that may be called; None is any.
    """

    def __init__(
        self,
        cursor: Cursor,
        sink: Sink,
        trimmer: Trimmer,
        *,
        calls: bool,
        names: frozenset[str] | None = None,
    ) -> None:
        self._cursor = cursor
        self._sink = sink
        self._trimmer = trimmer
        self._calls = calls
        self._names = names
        self.body = Markers([_START, _CHANNEL, *_ENDS])
        self.thought = Markers([_START, _CHANNEL, *_ENDS])

    def run(self, *, thinking_open: bool) -> Need[None]:
        """Parse to the end."""
        cursor = self._cursor
        if thinking_open:
            yield from self._thinking()
        while not cursor.ended or not cursor.exhausted:
            yield from cursor.accept(*_ENDS)
            if (yield from cursor.ahead(_START, _CHANNEL, _MESSAGE, "to=")):
                yield from self._message()
            else:
                yield from self._text(self._sink.content)

    def _text(self, emit: Emit) -> Need[None]:
        yield from self._cursor.find(self.body, emit)

    def _thinking(self) -> Need[None]:
        self._trimmer.begin()
        yield from self._cursor.spaces()
        marker = yield from self._cursor.find(self.thought, self._trimmer.feed)
        self._trimmer.finish(whole=not marker)

    def _message(self) -> Need[None]:
        cursor = self._cursor
        cursor.record()
        try:
            header = yield from self._header()
        except NotACallError:
            self._sink.content(cursor.recorded())
            return
        channel = _CHANNEL_NAME.search(header)
        recipient = _RECIPIENT.search(header)
        name = recipient[1].removeprefix("functions.") if recipient and self._calls else ""
        calls = bool(name) and (self._names is None or name in self._names)
        thinks = bool(channel) and channel[1] == "analysis"
        if calls and (yield from cursor.ahead("{", *_ENDS)):
            yield from self._call(name)
        elif thinks:
            cursor.recorded()
            yield from self._thinking()
        else:
            cursor.recorded()
            yield from self._text(self._sink.content)

    def _header(self) -> Need[str]:
        """Consume the header of a message with its end."""
        first = yield from self._cursor.accept(_START, _CHANNEL, _MESSAGE, "to=")
        if first == _MESSAGE:
            return ""
        text, marker = yield from self._cursor.until(_HEADER_END, _MAX_HEADER)
        if marker != _MESSAGE:
            raise NotACallError
        return first + text

    def _call(self, name: str) -> Need[None]:
        cursor, sink = self._cursor, self._sink
        yield from cursor.spaces()
        sink.start(name)
        try:
            if (yield from cursor.ahead("{")):
                yield from cursor.json(sink.arguments)
            else:
                sink.arguments("{}")
            sink.end()
        except NotACallError:
            cursor.rest()
            sink.cut(cursor.recorded())
            return
        cursor.recorded()
        yield from cursor.accept(*_ENDS)
