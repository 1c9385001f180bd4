"""The parts of an answer, and the sink that collects them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from headrace.text.calls.cursor import NotACallError


class Reading(msgspec.Struct, frozen=True, kw_only=True):
    """How the text of an answer is read.

    Without `calls`, what looks like a call is text; with `apart` it is text after the beginning of
    content too, and with `only` if its tool is not a known one. The calls of an `exact` answer are
    those of a grammar: they have nothing that models get wrong.
    """

    calls: bool
    apart: bool = False
    only: bool = False
    exact: bool = False


class Thought(msgspec.Struct, frozen=True):
    """Text of the thinking."""

    text: str


class Content(msgspec.Struct, frozen=True):
    """Text of the answer."""

    text: str


class CallStart(msgspec.Struct, frozen=True):
    """A call begins. `index` counts the calls of the answer; `id` is that which the model wrote."""

    index: int
    name: str
    id: str | None = None


class CallArguments(msgspec.Struct, frozen=True):
    """A piece of the JSON text of a call's arguments."""

    index: int
    text: str


class CallEnd(msgspec.Struct, frozen=True):
    """The arguments of a call are complete."""

    index: int


class Cut(msgspec.Struct, frozen=True):
    """A call that has begun cannot be completed: the text ended or is no longer a call.

    `text` is all that the model wrote of the call. No `CallEnd` follows.
    """

    index: int
    text: str


Part = Thought | Content | CallStart | CallArguments | CallEnd | Cut


class Sink:
    """Collects parts; adjacent texts of one kind become one part.

    `open` is whether a call has begun and not ended.
    """

    __slots__ = ("_arguments", "_index", "_kind", "_parts", "_texts", "open")

    def __init__(self) -> None:
        self.open = False
        self._index = -1
        self._parts: list[Part] = []
        self._arguments: list[str] = []
        self._texts: list[str] = []
        self._kind: Callable[[str], Part] = Content

    def take(self) -> list[Part]:
        """Return the parts since the last time."""
        self._release()
        parts, self._parts = self._parts, []
        return parts

    def content(self, text: str) -> None:
        """Add text of the answer."""
        self._add(Content, text)

    def thought(self, text: str) -> None:
        """Add text of the thinking."""
        self._add(Thought, text)

    def start(self, name: str, identity: str | None = None) -> None:
        """Begin the next call."""
        self._release()
        self._index += 1
        self._arguments = []
        self.open = True
        self._parts.append(CallStart(self._index, name, identity))

    def arguments(self, text: str) -> None:
        """Add to the arguments of the open call."""
        self._add(self._argument, text)

    def end(self) -> None:
        """Complete the open call.

        Raises:
            NotACallError: its arguments are no object of JSON.
        """
        self._release()
        try:
            msgspec.json.decode("".join(self._arguments), type=dict[str, Any])
        except (ValueError, RecursionError):
            raise NotACallError from None
        self.open = False
        self._parts.append(CallEnd(self._index))

    def cut(self, text: str) -> None:
        """Give up the open call, of which the model wrote `text`."""
        self._release()
        self.open = False
        self._parts.append(Cut(self._index, text))

    def _argument(self, text: str) -> CallArguments:
        return CallArguments(self._index, text)

    def _add(self, kind: Callable[[str], Part], text: str) -> None:
        if kind != self._kind:
            self._release()
            self._kind = kind
        if text:
            self._texts.append(text)

    def _release(self) -> None:
        if self._texts:
            text, self._texts = "".join(self._texts), []
            self._parts.append(self._kind(text))
            if self.open:
                self._arguments.append(text)
