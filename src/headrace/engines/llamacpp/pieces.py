"""Cuts long texts where the tokens on both sides do not depend on each other.

Two loops of llama.cpp take time with the square of a text's length: the search for markers (control
and user-defined tokens such as `<|im_start|>`), and SentencePiece's tokens for single bytes. In
pieces of a few thousand characters neither takes long, and the tokens are the same. Between two of
them a text whose request has gone can be given up.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from itertools import groupby, pairwise
from pathlib import Path

from headrace.models.gguf import read_vocabulary

SIZE = 8192
"""Characters; a piece is a little longer, and longer still where no place for a cut comes."""
SENTINEL = "\x01"
"""Written before a piece that would otherwise begin as the beginning of a text does."""

_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4
_MARKERS = {_UNKNOWN, _CONTROL, _USER_DEFINED}
_MAX_MARKER = 128
_SPACE = "\u2581"
# BPE makes tokens of the words alone: one ends before a space with a letter on each side of it.
_BETWEEN_WORDS = re.compile("(?<=[A-Za-z])(?= [A-Za-z])")
_ACROSS_WORDS = re.compile("[A-Za-z]\u0120[A-Za-z]")


class Pieces:
    """The places for cuts, by the vocabulary of a GGUF. Reading it blocks.

    `tokenizer` is the kind of it that the file names. After `longest` characters without a place
    none is looked for.
    """

    def __init__(self, path: Path, tokenizer: str, longest: int) -> None:
        tokens, types = read_vocabulary(path)
        texts = [token.decode(errors="replace") for token in tokens]
        markers = {text for text, kind in zip(texts, types, strict=False) if kind in _MARKERS}
        self._longest = longest
        self._has_words = tokenizer == "gpt2" and not any(map(_ACROSS_WORDS.search, texts))
        self._markers = re.compile(_any_of(m for m in markers if 0 < len(m) <= _MAX_MARKER))
        # Within words and across them: two characters of no common token are never merged.
        merges_all = tokenizer == "llama"
        self._pairs = {pair for text in texts for pair in pairwise(text)} if merges_all else None
        if self._pairs is not None and any(SENTINEL in text for text in texts):
            self._pairs = None

    def cut(self, text: str) -> Iterator[str]:
        """Yield the pieces of a text, in order.

        A piece that begins with SENTINEL continues the text before it; any other begins with a
        marker, or is the first.
        """
        begin, prefix = 0, ""
        for end, is_marker in self._places(text):
            yield prefix + text[begin:end]
            begin, prefix = end, "" if is_marker else SENTINEL
        yield prefix + text[begin:]

    def _places(self, text: str) -> Iterator[tuple[int, bool]]:
        """Yield the places of cuts, and whether a marker begins there."""
        last = 0
        for marker in self._markers.finditer(text):
            for place in self._within(text, last, marker.start()):
                last = place
                yield place, False
            if marker.start() - last >= SIZE and not _may_strip(text, marker):
                last = marker.start()
                yield last, True
        yield from ((place, False) for place in self._within(text, last, len(text)))

    def _within(self, text: str, last: int, end: int) -> Iterator[int]:
        """Yield places for cuts between `last` and `end`, in text without markers."""
        while end - last >= 2 * SIZE:
            place = self._place(text, last + SIZE, min(end, last + self._longest))
            if place is None:
                return
            yield (last := place)

    def _place(self, text: str, start: int, end: int) -> int | None:
        if self._has_words:
            match = _BETWEEN_WORDS.search(text, start, end)
            return None if match is None else match.start()
        if self._pairs is None:
            return None
        return next(filter(lambda at: self._is_free(text, at), range(start, end)), None)

    def _is_free(self, text: str, at: int) -> bool:
        pair = text[at - 1 : at + 1].replace(" ", _SPACE)
        return self._pairs is not None and (pair[0], pair[1]) not in self._pairs


def _any_of(words: Iterable[str]) -> str:
    """Return a pattern for the longest of the words, as a tree: there can be thousands of them."""
    branches: list[str] = []
    for _, group in groupby(sorted(words), key=lambda word: word[0]):
        same = list(group)
        prefix = os.path.commonprefix(same)  # noqa: RUF071
        longer = _any_of(word[len(prefix) :] for word in same if word != prefix)
        is_optional = "?" if prefix in same else ""
        branches.append(re.escape(prefix) + (f"(?:{longer}){is_optional}" if len(same) > 1 else ""))
    return "|".join(branches) or "(?!)"


def _may_strip(text: str, marker: re.Match[str]) -> bool:
    # In some models a mask takes the white space before it.
    return "mask" in marker[0].lower() and text[marker.start() - 1].isspace()
