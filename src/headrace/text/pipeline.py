"""The way of one choice from the engine's bytes to the text that is shown."""

from __future__ import annotations

from collections.abc import Sequence

from headrace.text.detokenize import Utf8Decoder
from headrace.text.stops import StopMatcher


class TextPipeline:
    """Whole characters, up to the first stop string.

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
        """Return the new text; empty while all of it is held back."""
        return self._matcher.feed(self._decode(data))

    def flush(self) -> str:
        """End the text and return what was held back."""
        return self._matcher.feed(self._decoder.flush()) + self._matcher.flush()
