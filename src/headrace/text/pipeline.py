"""The bytes of an engine's tokens as text: whole characters, up to the first stop string."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from headrace.core.errors import InvalidRequest

_new_decoder = codecs.getincrementaldecoder("utf-8")


class Utf8Decoder:
    """Decodes bytes that may end inside a character into whole characters.

    Bytes that are not UTF-8 become U+FFFD, as when the text is decoded at once.
    """

    __slots__ = ("_decoder", "feed")

    def __init__(self) -> None:
        self._decoder = _new_decoder("replace")
        # Bound once: it is called for each token.
        self.feed = self._decoder.decode

    def flush(self) -> str:
        """End the text; an incomplete character is dropped."""
        self._decoder.reset()
        return ""


def _borders(stop: str) -> list[int]:
    """Return, for each prefix of `stop`, the length of its longest border (suffix and prefix)."""
    borders = [0] * len(stop)
    length = 0
    for index in range(1, len(stop)):
        while length and stop[index] != stop[length]:
            length = borders[length - 1]
        length += stop[index] == stop[length]
        borders[index] = length
    return borders


class _Search:
    """A search for one stop string (Knuth, Morris, Pratt) that continues across deltas.

    `start` is the position of the match in the text of all deltas. Until the match is complete it
    is that of the longest suffix which begins the stop string; the end of the text without one.
    """

    __slots__ = ("_borders", "_length", "complete", "start", "stop")

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.start = 0
        self.complete = False
        self._borders = _borders(stop)
        self._length = 0

    def feed(self, text: str, position: int) -> None:
        """Search `text`, whose first character is at `position`."""
        if self.complete:
            return
        stop, borders, length = self.stop, self._borders, self._length
        index, end = 0, len(text)
        while index < end and length < len(stop):
            if not length:
                index = text.find(stop[0], index)
                if index < 0:
                    index = end
                    break
            while length and text[index] != stop[length]:
                length = borders[length - 1]
            length += text[index] == stop[length]
            index += 1
        self._length = length
        self.complete = length == len(stop)
        self.start = position + index - length


def _start(search: _Search) -> int:
    return search.start


class StopMatcher:
    """Releases text up to the first stop string and holds back a suffix that may become one.

    The match that begins first wins; among those with one start, the first in `stops`. `matched`
    is None until that is decided.

    Raises:
        InvalidRequest: a stop string is empty.
    """

    __slots__ = ("_held", "_searches", "_seen", "matched")

    def __init__(self, stops: Sequence[str]) -> None:
        if "" in stops:
            raise InvalidRequest("A stop string is empty.", param="stop")
        self.matched: str | None = None
        self._searches = [_Search(stop) for stop in stops]
        self._held = ""
        self._seen = 0

    def feed(self, text: str) -> str:
        """Return the text that can be sent. After a match it is empty."""
        if not self._searches:
            return text
        if self.matched is not None:
            return ""
        for search in self._searches:
            search.feed(text, self._seen)
        self._seen += len(text)
        self._held += text
        # Of equal starts, min takes the first: a search that may still win delays a later match.
        return self._settle(min(self._searches, key=_start))

    def flush(self) -> str:
        """Return the text held back; a match that waited for an earlier one is settled now."""
        complete = [search for search in self._searches if search.complete]
        if complete and self.matched is None:
            return self._settle(min(complete, key=_start))
        released, self._held = self._held, ""
        return released

    def _settle(self, first: _Search) -> str:
        cut = len(self._held) - (self._seen - first.start)
        released = self._held[:cut]
        self._held = self._held[cut:]
        if first.complete:
            self.matched = first.stop
            self._held = ""
        return released


class TextPipeline:
    """Decodes one answer, up to its first stop string.

    Raises:
        InvalidRequest: a stop string is empty.
    """

    __slots__ = ("_decode", "_decoder", "_matcher")

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self._decoder = Utf8Decoder()
        self._decode = self._decoder.feed
        self._matcher = StopMatcher(stops)

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found; read it after `flush` too."""
        return self._matcher.matched is not None

    @property
    def matched(self) -> str | None:
        """The stop string that was found."""
        return self._matcher.matched

    def feed(self, data: bytes) -> str:
        """Return the new text; it is empty while all of it is held back."""
        return self._matcher.feed(self._decode(data))

    def feed_unstopped(self, data: bytes) -> str:
        """Return the new text without searching it for stop strings."""
        return self._decode(data)

    def flush(self) -> str:
        """End the text and return what was held back."""
        return self._matcher.feed(self._decoder.flush()) + self._matcher.flush()
