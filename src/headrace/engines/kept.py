"""What a form of an answer allows of a text, byte by byte."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from headrace.core.constraint import Constraint
from headrace.core.errors import GenerationFailed
from headrace.text.grammar import grammar

_SOONEST = b'"}])>, :0'
"""What ends a value, or goes on to its end."""
_LONGEST = 4096
_NEWLINE, _LINES = 10, 64


def kept(text: Sequence[int], constraint: Constraint) -> Iterator[int]:
    """Yield the bytes of a text while the form allows them, then the soonest end.

    The text begins at the line of which the form allows the most.

    Raises:
        GenerationFailed: the form was not compiled.
    """
    matcher = _matcher(constraint)
    lines = [0, *(place + 1 for place, byte in enumerate(text) if byte == _NEWLINE)][:_LINES]
    begins = max(lines, key=lambda place: matcher.validate_tokens([*text[place:]]))
    for byte in text[begins:]:
        if matcher.is_stopped() or not _allowed(matcher) >> byte & 1:
            break
        matcher.consume_token(byte)
        yield byte
    for step in range(_LONGEST):
        if matcher.is_stopped() or matcher.is_accepting():
            return
        allowed = _allowed(matcher)
        choices = [byte for byte in range(256) if allowed >> byte & 1]
        # One that is always the same could repeat itself without end.
        turn = choices[step % len(choices)]
        byte = next((soon for soon in _SOONEST if allowed >> soon & 1), turn)
        matcher.consume_token(byte)
        yield byte


def _allowed(matcher: Any) -> int:
    return int.from_bytes(matcher.compute_bitmask(), "little")


def _matcher(constraint: Constraint) -> Any:
    from llguidance import LLMatcher, LLTokenizer  # native, and rarely needed

    matcher = LLMatcher(LLTokenizer("byte"), grammar(constraint), log_level=0)
    if matcher.is_error():
        raise GenerationFailed("The grammar was not compiled.", detail=matcher.get_error())
    return matcher
