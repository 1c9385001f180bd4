"""Checks of the numbers of a schema, which a compiler has to enforce to the last digit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from decimal import ROUND_FLOOR, Context, Decimal
from typing import Any, cast

from headrace.core.schema import BOUNDS, Path, Schema, children, number
from headrace.text.grammar import schema_grammar
from headrace.text.numbers import EXACT, INTEGERS
from headrace.worker.matchers import Compile, Matcher

INEXACT = "which cannot be enforced exactly"
_UPPER = ("maximum", "exclusiveMaximum")
# To these compilers move bounds that are beyond them.
_ENDS = (2**63 - 1, -(2**63))
# A multiple without a bound is written with so many digits, and tokens have up to three.
_LARGEST = 10**15
_TOKENS = tuple(f"{token:03}".encode() for token in range(1000))
_MANY = "takes too much to enforce with these bounds; smaller ones, or a smaller multipleOf, do not"
_EXACTLY = Context(prec=40, rounding=ROUND_FLOOR)


class Refused(Exception):
    """What is wrong with a schema or an answer, and at which path of the schema."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(reason)
        self.path = path
        self.reason = reason


def check_bounds(path: Path, schema: Schema, new_matcher: Compile) -> None:
    """Check that numbers outside of large bounds are refused, as compilers round those.

    Raises:
        Refused: one is not.
    """
    bounds = {word: value for word in BOUNDS if (value := number(schema, word)) is not None}
    kind = "integer" if schema.get("type") in INTEGERS else "number"
    factor = number(schema, "multipleOf")
    for word, bound in bounds.items():
        if abs(bound) <= EXACT:
            continue
        outside = [end for end in _ENDS if (end > bound if word in _UPPER else end < bound)]
        matcher = new_matcher(schema_grammar({**bounds, "type": kind}))
        is_allowed = any(
            matcher.accepts(str(value).encode()) for value in (int(bound) + BOUNDS[word], *outside)
        )
        if is_allowed or isinstance(factor, float):
            raise Refused((*path, word), f"is {bound}, {INEXACT}")


def check_multiples(schema: Schema, new_matcher: Compile) -> None:
    """Write a long number for each `multipleOf`, as an engine does whose tokens are three digits.

    For each token that can follow, a compiler works out what may come after it. It gives up at a
    number of such states, which depends on the factor, on the bounds, and on all that came before.

    Raises:
        Refused: it gives up.
    """
    parts: dict[str, tuple[Path, Schema]] = {}
    for path, part in _with_factor(schema):
        parts.setdefault(repr(sorted(part.items())), (path, part))
    if not parts:
        return
    numbers = [part for _, part in parts.values()]
    array = {"type": "array", "prefixItems": numbers, "minItems": len(numbers), "items": False}
    matcher = new_matcher(schema_grammar(array))
    before = b"["
    for path, part in parts.values():
        if not _is_written(matcher, before, _text(part)):
            raise Refused((*path, "multipleOf"), _MANY)
        before = b","


def _with_factor(schema: Schema) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield what schemas with `multipleOf` say of numbers, each with its path."""
    pending: list[tuple[Path, Any]] = [((), schema)]
    while pending:
        path, part = pending.pop()
        if not isinstance(part, Mapping):
            continue
        node = cast("Schema", part)
        pending += [((*path, *place), child) for place, child in children(node)]
        words = {word: number(node, word) for word in ("multipleOf", *BOUNDS)}
        if words["multipleOf"]:
            kind = "integer" if node.get("type") in INTEGERS else "number"
            given = {word: value for word, value in words.items() if value is not None}
            yield path, {"type": kind, **given}


def _text(part: Schema) -> bytes:
    """Return the multiple with the most digits that the bounds allow, or nearly so."""
    factor = abs(Decimal(repr(part["multipleOf"])))
    ends = [Decimal(repr(part[word])) for word in BOUNDS if word in part]
    bounded = any(word in part for word in _UPPER) and len(ends) > 1
    end = max(ends, key=abs) if bounded else _LARGEST * min(factor, Decimal(1))
    count = (abs(end) / factor).to_integral_value(ROUND_FLOOR)
    if any(abs(count * factor) == abs(other) for other in ends):
        count = max(count - 1, Decimal(0))
    value = _EXACTLY.multiply(count, factor).normalize(_EXACTLY)
    return f"{'-' if end < 0 else ''}{value:f}".encode()


def _is_written(matcher: Matcher, before: bytes, text: bytes) -> bool:
    """Write a number, trying all tokens of three digits at each place; whether that succeeds."""
    first = len(before) + text.startswith(b"-")
    for place, byte in enumerate(before + text):
        if matcher.error:
            return False
        if not matcher.following() >> byte & 1:
            # It is not allowed by itself; other checks say why.
            return not matcher.error
        if place >= first and (place - first) % 3 == 0:
            for token in _TOKENS:
                matcher.accepts(token)
        if matcher.error:
            return False
        matcher.take(byte)
    return not matcher.error
