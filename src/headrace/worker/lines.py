"""Ends an answer by its lines, as editors want it."""

from __future__ import annotations

import time
from collections.abc import Callable

from headrace.core.gap import LineLimits


class LineLimiter:
    """Releases the text of an answer up to where its lines end it.

    A line break and the white space after it are held back until the line has text.
    """

    def __init__(self, limits: LineLimits, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits = limits
        self._clock = clock
        self._begun: float | None = None
        self._held = ""
        self._has_ended = self._has_break = False

    @property
    def is_over(self) -> bool:
        """Whether the answer has ended."""
        after_ms, begun = self._limits.after_ms, self._begun
        if not self._has_ended and self._has_break and after_ms and begun is not None:
            self._has_ended = (self._clock() - begun) * 1000 > after_ms
        return self._has_ended

    def feed(self, text: str) -> str:
        """Return the text that can be sent."""
        if self._has_ended:
            return ""
        if self._begun is None:
            self._begun = self._clock()
        self._has_break = self._has_break or "\n" in text
        if not self._limits.indent:
            return text
        return self._indented(text)

    def flush(self) -> str:
        """Return the white space that was held back."""
        held, self._held = self._held, ""
        return "" if self._has_ended else held

    def _indented(self, text: str) -> str:
        first, *lines = (self._held + text).split("\n")
        released, self._held = [first], ""
        for line in lines:
            body = line.lstrip(" \t")
            if not body:
                self._held += f"\n{line}"
                continue
            if len(line) - len(body) < self._limits.indent:
                self._has_ended = True
                self._held = ""
                break
            released.append(f"{self._held}\n{line}")
            self._held = ""
        return "".join(released)
