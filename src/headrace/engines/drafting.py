"""Drafts of an engine that computes them itself: n-grams of the text, and whether they pay."""

from __future__ import annotations

import logging
from array import array
from collections.abc import Callable, Sequence

log = logging.getLogger("headrace.engine")

_SIZES = (4, 3)
_WIDTH = 4
_FIRST = 4
# Steps with drafts until they are judged, and how often one is left out to compare with.
_JUDGED, _COMPARED = 24, 16
_PAUSE, _LONGEST_PAUSE = 256, 8192
_NEW_SHARE, _OUTLIER = 0.2, 3.0


class Ngrams:
    """Drafts what followed the last tokens of a text when they were in it before.

    A draft has at most `most` tokens, and fewer after drafts that were wrong.
    """

    def __init__(self, token_ids: Sequence[int], most: int) -> None:
        self._text = bytearray(array("I", token_ids).tobytes())
        self._most = most
        self._length = min(_FIRST, most)

    def __len__(self) -> int:
        """Return the number of tokens of the text."""
        return len(self._text) // _WIDTH

    def extend(self, token_ids: Sequence[int]) -> None:
        """Append tokens to the text."""
        self._text += array("I", token_ids).tobytes()

    def draft(self, limit: int) -> list[int]:
        """Return the next tokens that are likely, at most `limit`; none without a match."""
        count = min(limit, self._length)
        begin = self._match() if count > 0 else None
        if begin is None:
            return []
        following = array("I", bytes(self._text[begin : begin + count * _WIDTH]))
        # What ends at the end of the text is taken to go on as it repeats itself.
        return [following[at % len(following)] for at in range(count)]

    def learn(self, drafted: int, accepted: int) -> None:
        """Adapt the length of the next drafts to how much of one was right."""
        grown = 2 * self._length if accepted == drafted else accepted + 1
        self._length = max(1, min(self._most, grown))

    def _match(self) -> int | None:
        """Return where in the bytes the text goes on after the latest equal n-gram."""
        text = self._text
        for size in (size for size in _SIZES if size < len(self)):
            pattern = bytes(text[-size * _WIDTH :])
            end = len(text) - _WIDTH
            while (at := text.rfind(pattern, 0, end)) >= 0:
                if at % _WIDTH == 0:
                    return at + len(pattern)
                end = at + len(pattern) - 1
        return None


class Gain:
    """Switches drafts off for a while where they lose, by the times of an engine's steps.

    A step without drafts takes as long as the last ones of as many requests; one with drafts pays
    if it takes less time for its tokens. Where they lose they are tried again after a pause, which
    is longer each time. `changed` is called with whether tokens are drafted, and how many times as
    fast the last steps were as without.
    """

    def __init__(self, changed: Callable[[bool, float], None]) -> None:
        self.is_on = True
        self._changed = changed
        self._plain: dict[int, float] = {}
        self._since: dict[int, int] = {}
        self._would = self._took = 0.0
        self._steps = self._left = 0
        self._pause = _PAUSE

    def allows(self, requests: int) -> bool:
        """Whether the next step, of so many requests, may have drafts."""
        return self.is_on and self._since.get(requests, _COMPARED) < _COMPARED

    def note(self, requests: int, tokens: int, drafted: int, seconds: float) -> None:
        """Note a step of so many requests that made so many tokens, and none of a prompt."""
        if not drafted:
            before = self._plain.get(requests, seconds)
            new = min(seconds, _OUTLIER * before)
            self._plain[requests] = before + _NEW_SHARE * (new - before)
            self._since[requests] = 0
        elif requests in self._plain:
            self._judge(requests, tokens, seconds)
        if not self.is_on:
            self._left -= 1
            if self._left <= 0:
                self._switch(on=True)

    def _judge(self, requests: int, tokens: int, seconds: float) -> None:
        plain = self._plain[requests]
        self._since[requests] += 1
        self._would += plain * tokens / requests
        self._took += min(seconds, _OUTLIER * plain * (1 + tokens / requests))
        self._steps += 1
        if self._steps < _JUDGED or not self.is_on:
            return
        if self._would < self._took:
            self._switch(on=False)
        else:
            self._pause = _PAUSE
            # The last steps count more than those before.
            self._steps, self._would, self._took = _JUDGED // 2, self._would / 2, self._took / 2

    def _switch(self, *, on: bool) -> None:
        gain = self._would / self._took if self._took else 1.0
        self.is_on = on
        if not on:
            self._left, self._pause = self._pause, min(2 * self._pause, _LONGEST_PAUSE)
        self._steps, self._would, self._took = 0, 0.0, 0.0
        self._changed(on, gain)


def log_gain(model: str, is_on: bool, gain: float) -> None:
    """Log that the drafts of a model are switched, and what was measured before."""
    name = "headrace.engine.drafts_tried" if is_on else "headrace.engine.drafts_lose"
    log.info(name, extra={"data": {"model": model, "gain": round(gain, 2)}})
