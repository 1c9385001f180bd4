"""Splits an answer into thinking, content and calls, as it comes."""

from __future__ import annotations

from collections.abc import Generator

from headrace.text.calls.cursor import Cursor, Markers, Need
from headrace.text.calls.format import Format
from headrace.text.calls.harmony import Harmony
from headrace.text.calls.objects import Tools
from headrace.text.calls.parts import Content, Part, Reading, Sink, Thought
from headrace.text.calls.styles import Calls
from headrace.text.calls.trim import Trimmer


class Splitter:
    """Parses one answer. The parts, joined, do not depend on how the text is cut.

    `tools` maps the name of each tool to the schema of its arguments. `thinking_open` is whether
    the prompt leaves the thinking open. A format without thinking and calls needs no splitter.

    What is held back: the beginning of a marker; the white space around markers; a call up to its
    name; in tags, a value that the schema does not declare a string.
    """

    __slots__ = (
        "_calls", "_content", "_cursor", "_fast", "_firsts", "_hidden", "_recipient", "_run",
        "_sink", "_start", "_think", "_thought", "_trimmer",
    )  # fmt: skip

    def __init__(
        self, form: Format, tools: Tools, reading: Reading, *, thinking_open: bool
    ) -> None:
        calls = reading.calls
        self._cursor = Cursor()
        self._sink = Sink()
        self._trimmer = Trimmer(self._sink.thought)
        self._think = (form.think_open.strip(), form.think_close.strip())
        self._hidden = form.hidden
        self._fast: type[Thought | Content] | None = None
        self._firsts = ""
        self._run: Generator[None, None, None]
        if form.style == "harmony":
            names = frozenset(tools) if reading.only else None
            harmony = Harmony(self._cursor, self._sink, self._trimmer, calls=calls, names=names)
            self._content, self._thought = harmony.body, harmony.thought
            self._run = harmony.run(thinking_open=thinking_open)
            return
        self._calls = Calls(form, tools, self._cursor, self._sink, reading=reading)
        self._recipient = form.style == "recipient"
        openers = self._calls.openers if calls or self._recipient else ()
        bare = (self._calls.bare,) if calls else ()
        self._start = (*self._think, *form.hidden, *openers, *bare)
        self._content = Markers([*(() if reading.apart else openers), *form.hidden])
        self._thought = Markers([self._think[1], *openers])
        self._run = self._answer(thinking_open=thinking_open)

    @property
    def is_thinking(self) -> bool:
        """Whether the text so far ends within thinking."""
        return self._trimmer.is_open

    def feed(self, text: str) -> list[Part]:
        """Return the parts that the text completes; adjacent ones of one kind belong together."""
        fast = self._fast
        if fast is not None and text:
            for first in self._firsts:
                if first in text:
                    break
            else:
                if fast is Content or not text[-1].isspace():
                    return [fast(text)]
        return self._advance(text)

    def flush(self) -> list[Part]:
        """End the answer: return what was held back, and a `Cut` for a call that has not ended."""
        self._cursor.ended = True
        return self._advance("")

    def _advance(self, text: str) -> list[Part]:
        cursor = self._cursor
        cursor.push(text)
        next(self._run, None)
        self._fast = None
        if cursor.exhausted and cursor.searching:
            if cursor.searching is self._content:
                self._fast = Content
            elif cursor.searching is self._thought and self._trimmer.passes:
                self._fast = Thought
            self._firsts = cursor.searching.firsts
        return self._sink.take()

    def _answer(self, *, thinking_open: bool) -> Need[None]:
        cursor, begins, after = self._cursor, True, thinking_open
        if thinking_open:
            yield from self._thinking(opened=True)
        elif self._recipient:
            begins = yield from self._calls.attempt(self._sink.content)
        while True:
            marker = (yield from cursor.ahead(*self._start)) if begins else ""
            if not marker:
                if begins and after and (yield from cursor.ends()):
                    return
                begins = False
                marker = yield from cursor.find(self._content, self._sink.content)
                if not marker:
                    return
            begins = yield from self._at(marker, begins=begins)
            after = after or begins

    def _at(self, marker: str, *, begins: bool) -> Need[bool]:
        """Parse what a marker begins; whether the text after it is a beginning again."""
        cursor = self._cursor
        if marker == self._think[0]:
            yield from cursor.accept(marker)
            yield from self._thinking(opened=False)
            return True
        if marker == self._think[1]:
            yield from cursor.accept(marker)
            yield from cursor.spaces()
            return True
        if marker in self._hidden:
            yield from cursor.accept(marker)
            return begins
        return (yield from self._calls.attempt(self._sink.content))

    def _thinking(self, *, opened: bool) -> Need[None]:
        cursor, trimmer = self._cursor, self._trimmer
        trimmer.begin()
        if opened:
            yield from cursor.accept(self._think[0])
        yield from cursor.spaces()
        while True:
            marker = yield from cursor.find(self._thought, trimmer.feed)
            if not marker or marker == self._think[1]:
                trimmer.finish(whole=not marker)
                cursor.skip(len(marker))
                yield from cursor.spaces()
                return
            if not trimmer.at_line_start:
                trimmer.feed(cursor.skip(len(marker)))
            elif (yield from self._calls.attempt(trimmer.feed)):
                trimmer.finish(whole=False)
                return
