"""How fast a worker begins answers, which bounds how many of one client begin at a time."""

from __future__ import annotations

import math
from collections.abc import Callable

_AHEAD_S = 1.0
_MEMORY_S = 2.0


class Pace:
    """The rate of a worker at its prompts, in estimated tokens per second.

    Only time counts in which there are prompts, and the last seconds count most.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._tokens = self._seconds = 0.0
        self._since = 0.0

    @property
    def ahead(self) -> float:
        """How many tokens keep the worker busy for a second; 0 if unknown."""
        return self._tokens / self._seconds * _AHEAD_S if self._seconds else 0.0

    def resume(self) -> None:
        """Note that there is a prompt after a time without any."""
        self._since = self._clock()

    def begun(self, cost: float) -> None:
        """Note the first token of a request."""
        now = self._clock()
        passed, self._since = now - self._since, now
        kept = math.exp(-passed / _MEMORY_S)
        self._tokens = self._tokens * kept + cost
        self._seconds = self._seconds * kept + passed
