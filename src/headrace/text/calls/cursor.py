"""Reads text that comes in pieces, as if it were all there.

The methods that need text are generators: they yield while what they look at is not there yet. What
they consume does not depend on how the text is cut.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Sequence
from functools import lru_cache
from typing import TypeVar

from headrace.text.calls.scan import JsonScanner

T = TypeVar("T")
Need = Generator[None, None, T]
Emit = Callable[[str], None]

# White space between markers, where it has to be held back to see what follows.
_FRAME = re.compile(r"\s{0,64}")
_SPACES = re.compile(r"\s*")
MAX_HEAD = 16 * 1024


class NotACallError(Exception):
    """The text is not, or no longer, that of a call."""


class Markers:
    """Literals that are searched together. None contains another, except at its beginning."""

    __slots__ = ("_literals", "firsts", "longest", "pattern")

    def __init__(self, literals: Sequence[str]) -> None:
        self._literals = sorted(set(literals) - {""}, key=len, reverse=True)
        self.firsts = "".join(sorted({literal[0] for literal in self._literals}))
        self.longest = len(self._literals[0]) if self._literals else 0
        self.pattern = re.compile("|".join(map(re.escape, self._literals)) or "(?!)")

    def grows(self, text: str) -> bool:
        """Whether `text` is the beginning of a literal and not all of it."""
        return any(
            len(literal) > len(text) and literal.startswith(text) for literal in self._literals
        )


markers_of = lru_cache(256)(Markers)


class Cursor:
    """A position in the text. `ended` is set when no more will come.

    `searching` is what `find` waits for.
    """

    __slots__ = ("_kept", "_mark", "_position", "_text", "ended", "searching")

    def __init__(self) -> None:
        self.ended = False
        self.searching: Markers | None = None
        self._text = ""
        self._position = 0
        self._mark = -1
        self._kept: list[str] = []

    @property
    def exhausted(self) -> bool:
        """Whether all text has been consumed."""
        return self._position == len(self._text)

    def push(self, text: str) -> None:
        """Add text at the end."""
        if self._mark >= 0:
            self._kept.append(self._text[self._mark : self._position])
            self._mark = 0
        self._text = self._text[self._position :] + text
        self._position = 0

    def record(self) -> None:
        """Keep what is consumed from here on."""
        self._mark = self._position
        self._kept = []

    def recorded(self) -> str:
        """Return what was consumed since `record`, and keep no more."""
        text = "".join(self._kept) + self._text[self._mark : self._position]
        self._mark = -1
        self._kept = []
        return text

    def find(self, markers: Markers, emit: Emit) -> Need[str]:
        """Emit the text before the first marker and return it, not consumed; "" at the end."""
        while True:
            match = markers.pattern.search(self._text, self._position)
            if match and not self.ended and match.end() == len(self._text):
                match = None if markers.grows(match[0]) else match
            stop = match.start() if match else self._hold(markers)
            if stop > self._position:
                start, self._position = self._position, stop
                emit(self._text[start:stop])
            if match:
                return match[0]
            if self.ended:
                return ""
            self.searching = markers
            yield
            self.searching = None

    def _hold(self, markers: Markers) -> int:
        """Return where a suffix begins that may become a marker."""
        text, size = self._text, len(self._text)
        if not self.ended:
            for at in range(max(self._position, size - markers.longest), size):
                if text[at] in markers.firsts and markers.grows(text[at:]):
                    return at
        return size

    def ahead(self, *literals: str, after: int = 0) -> Need[str]:
        """Return which literal comes next, after white space; "" if none. Nothing is consumed.

        `after` characters, which are there, are passed over first.
        """
        match, _ = yield from self._next(literals, after)
        return match

    def accept(self, *literals: str) -> Need[str]:
        """Consume white space and the literal that comes next; "" and nothing if none does."""
        match, size = yield from self._next(literals, 0)
        self._position += size
        return match

    def expect(self, *literals: str) -> Need[str]:
        """Consume white space and one of the literals.

        Raises:
            NotACallError: none of them comes next.
        """
        match = yield from self.accept(*literals)
        if not match:
            raise NotACallError
        return match

    def _next(self, literals: tuple[str, ...], after: int) -> Need[tuple[str, int]]:
        markers = markers_of(literals)
        while True:
            start = self._position + after
            spaces = _FRAME.match(self._text, start)
            at = spaces.end() if spaces else start
            rest = self._text[at : at + markers.longest]
            if self.ended or not markers.grows(rest):
                break
            yield
        match = markers.pattern.match(self._text, at)
        return (match[0], match.end() - self._position) if match else ("", 0)

    def starts(self, literal: str) -> Need[bool]:
        """Whether the literal comes next, with nothing before it. Nothing is consumed."""
        size = len(literal)
        while True:
            rest = self._text[self._position : self._position + size]
            if rest == literal or self.ended or not literal.startswith(rest):
                return rest == literal
            yield

    def ends(self, after: int = 0) -> Need[bool]:
        """Whether the text ends here, after `after` characters and white space."""
        while True:
            spaces = _FRAME.match(self._text, self._position + after)
            if spaces and spaces.end() < len(self._text):
                return False
            if self.ended:
                return True
            yield

    def run(self, characters: re.Pattern[str], limit: int) -> Need[str]:
        """Consume the characters of a class; the pattern matches any number of them.

        Raises:
            NotACallError: there are more than `limit`.
        """
        while True:
            match = characters.match(self._text, self._position, self._position + limit + 1)
            end = match.end() if match else self._position
            if end - self._position > limit:
                raise NotACallError
            if end < len(self._text) or self.ended:
                start, self._position = self._position, end
                return self._text[start:end]
            yield

    def until(self, markers: Markers, limit: int) -> Need[tuple[str, str]]:
        """Consume a marker that ends within `limit` characters; return the text before it, and it.

        Raises:
            NotACallError: there is none; nothing is consumed.
        """
        while True:
            start = self._position
            match = markers.pattern.search(self._text, start, start + limit)
            if match:
                self._position = match.end()
                return self._text[start : match.start()], match[0]
            if self.ended or len(self._text) - start >= limit:
                raise NotACallError
            yield

    def spaces(self) -> Need[None]:
        """Consume all white space."""
        while True:
            match = _SPACES.match(self._text, self._position)
            self._position = match.end() if match else self._position
            if self.ended or self._position < len(self._text):
                return
            yield

    def rest(self) -> None:
        """Consume what is there, if no more will come."""
        if self.ended:
            self._position = len(self._text)

    def skip(self, size: int) -> str:
        """Consume characters that are there."""
        start = self._position
        self._position += size
        return self._text[start : self._position]

    def take(self, size: int) -> Need[str]:
        """Consume `size` characters.

        Raises:
            NotACallError: the text ends before.
        """
        while len(self._text) - self._position < size:
            if self.ended:
                raise NotACallError
            yield
        return self.skip(size)

    def json(self, emit: Emit, limit: int | None = None) -> Need[None]:
        """Consume an object, list or string of JSON and emit it as it comes, its strings repaired.

        Raises:
            NotACallError: it is broken, does not end, or is longer than `limit`.
        """
        scanner = JsonScanner()
        left = limit if limit is not None else 1 << 62
        while not scanner.complete:
            end = min(len(self._text), self._position + left)
            start = self._position
            self._position = scanner.feed(self._text, start, end)
            left -= self._position - start
            if self._position > start:
                emit(scanner.repaired(self._text, start, self._position))
            if scanner.broken or (not scanner.complete and (self.ended or not left)):
                raise NotACallError
            if not scanner.complete:
                yield
