"""From the bytes of tokens to text, without half characters."""

from __future__ import annotations

import codecs

_new_decoder = codecs.getincrementaldecoder("utf-8")


class Utf8Decoder:
    """Turns bytes that may end inside a character into whole characters.

    Bytes that can never become UTF-8 are U+FFFD, as they are in the text read at once.
    """

    __slots__ = ("_decoder", "feed")

    def __init__(self) -> None:
        self._decoder = _new_decoder("replace")
        # Bound once: this is called for each token.
        self.feed = self._decoder.decode

    def flush(self) -> str:
        """End the text: a character that was never completed is dropped."""
        self._decoder.reset()
        return ""
