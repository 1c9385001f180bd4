"""Follows a JSON value through text that comes in pieces, to its last character."""

from __future__ import annotations

import json
import re
from enum import IntEnum

MAX_DEPTH = 128
_PLAIN = re.compile(r'[^"\\\x00-\x1f]*')
_ESCAPES = frozenset('"\\/bfnrtu')
_SPACES = re.compile(r"[ \t\r\n]*")
_SCALAR = re.compile(r"[-+.0-9A-Za-z]*")


class _State(IntEnum):
    VALUE = 0
    AFTER = 1
    KEY = 2
    COLON = 3
    SCALAR = 4
    STRING = 5
    ESCAPE = 6
    COMPLETE = 7
    BROKEN = 8


class JsonScanner:
    """Finds the end of one object, list or string.

    Numbers and words are not checked and a comma may come before a closing bracket: they do not
    move the end. A value nested deeper than `MAX_DEPTH` is broken. What models forget to escape in
    strings is no fault: `repaired` returns the text with it escaped.
    """

    __slots__ = ("_faults", "_key", "_stack", "_state")

    def __init__(self) -> None:
        self._faults: list[tuple[int, str]] = []
        self._stack: list[str] = []
        self._state = _State.VALUE
        self._key = False

    @property
    def complete(self) -> bool:
        """Whether the value has ended."""
        return self._state is _State.COMPLETE

    @property
    def broken(self) -> bool:
        """Whether the text is not JSON."""
        return self._state is _State.BROKEN

    @property
    def in_string(self) -> bool:
        """Whether the text so far ends within a string."""
        return self._state in (_State.STRING, _State.ESCAPE)

    def feed(self, text: str, start: int, end: int) -> int:
        """Follow `text[start:end]`; return where the value ends or is broken, else `end`."""
        at, self._faults = start, []
        while at < end and self._state < _State.COMPLETE:
            if self._state is _State.STRING:
                at = self._string(text, at, end)
            elif self._state is _State.ESCAPE:
                self._state = _State.STRING
                if text[at] not in _ESCAPES:
                    # The backslash before it is one itself.
                    escaped = json.dumps(text[at])[1:-1] if text[at] < " " else text[at]
                    self._faults.append((at, "\\" + escaped))
                at += 1
            elif self._state is _State.SCALAR:
                at = _end(_SCALAR, text, at, end)
                self._state = _State.SCALAR if at == end else _State.AFTER
            else:
                at = self._structure(text, _end(_SPACES, text, at, end), end)
        return at

    def repaired(self, text: str, start: int, end: int) -> str:
        """Return what was followed last, with backslashes and control characters escaped."""
        if not self._faults:
            return text[start:end]
        pieces: list[str] = []
        for at, escaped in self._faults:
            pieces += [text[start:at], escaped]
            start = at + 1
        return "".join(pieces) + text[start:end]

    def _string(self, text: str, at: int, end: int) -> int:
        at = _end(_PLAIN, text, at, end)
        if at == end:
            return at
        if text[at] == "\\":
            self._state = _State.ESCAPE
        elif text[at] != '"':
            self._faults.append((at, json.dumps(text[at])[1:-1]))
        elif self._key:
            self._state = _State.COLON
        else:
            self._after()
        return at + 1

    def _structure(self, text: str, at: int, end: int) -> int:
        if at == end:
            return at
        character, state = text[at], self._state
        if character == '"' and state in (_State.VALUE, _State.KEY):
            self._key = state is _State.KEY
            self._state = _State.STRING
        elif character in "}]":
            self._close(character)
        elif state is _State.VALUE and character in "{[":
            self._open(character)
        elif state is _State.VALUE and self._stack and _SCALAR.fullmatch(character):
            self._state = _State.SCALAR
        elif state is _State.COLON and character == ":":
            self._state = _State.VALUE
        elif state is _State.AFTER and character == ",":
            self._state = _State.KEY if self._stack[-1] == "}" else _State.VALUE
        else:
            self._state = _State.BROKEN
        return at if self._state is _State.BROKEN else at + 1

    def _open(self, character: str) -> None:
        self._stack.append("}" if character == "{" else "]")
        self._state = _State.KEY if character == "{" else _State.VALUE
        if len(self._stack) > MAX_DEPTH:
            self._state = _State.BROKEN

    def _close(self, character: str) -> None:
        closes = self._state in (_State.AFTER, _State.KEY)
        closes = closes or (self._state is _State.VALUE and character == "]")
        if not closes or not self._stack or self._stack[-1] != character:
            self._state = _State.BROKEN
            return
        self._stack.pop()
        self._after()

    def _after(self) -> None:
        self._state = _State.AFTER if self._stack else _State.COMPLETE


def _end(pattern: re.Pattern[str], text: str, at: int, end: int) -> int:
    match = pattern.match(text, at, end)
    return match.end() if match else at
