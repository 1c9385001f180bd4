"""Leaves out the white space at the end of a text that is sent as it comes."""

from __future__ import annotations

from headrace.text.calls.cursor import Emit

_MAX_HELD = 64


class Trimmer:
    """Holds back white space until more text comes; of a long run, the last characters only."""

    __slots__ = ("_begun", "_emit", "held", "is_open")

    def __init__(self, emit: Emit) -> None:
        self.held: str = ""
        self.is_open = False
        self._emit: Emit = emit
        self._begun = False

    @property
    def passes(self) -> bool:
        """Whether text that does not end with white space can go on as it is."""
        return self._begun and not self.held

    @property
    def at_line_start(self) -> bool:
        """Whether a line begins here."""
        return self.held.endswith("\n") or not (self._begun or self.held)

    def begin(self) -> None:
        """Begin a text."""
        self.is_open = True

    def feed(self, text: str) -> None:
        """Add text."""
        text = self.held + text
        kept = len(text.rstrip())
        kept = max(kept, len(text) - _MAX_HELD)
        self.held = text[kept:]
        if kept:
            self._begun = True
            self._emit(text[:kept])

    def finish(self, *, whole: bool) -> None:
        """End the text; with `whole` the white space belongs to it."""
        if whole:
            self._emit(self.held)
        self.held = ""
        self._begun = self.is_open = False
