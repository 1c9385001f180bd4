"""From the bytes of an engine's tokens to the text that is sent."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from headrace.text.stops import StopMatcher

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
        """Return the new text, in which no stop string is looked for."""
        return self._decode(data)

    def flush(self) -> str:
        """End the text and return what was held back."""
        return self._matcher.feed(self._decoder.flush()) + self._matcher.flush()
