"""Bounds of numbers, as the compilers of schemas can enforce them for readers of floats.

A grammar compares decimals, and a reader of the answer floats: 0.99999999999999999999 is below 1,
and is read as 1. Compilers also round what has more digits than `_DIGITS`. So the grammar has the
nearest bound inside that has so few, and that belongs to the range. A multiple of a fraction has
bounds in any case, within which floats show that it is one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal
from typing import Any, cast

from headrace.core.schema import Schema, children, number

INTEGERS = ("integer", ["integer"], ["integer", "null"], ["null", "integer"])
"""The types of schemas of which each number is an integer; their bounds are exact."""
EXACT = 2**53 - 1
"""The largest integer that all readers of JSON read exactly."""

_DIGITS = 15
_MULTIPLES = 10**12
_INWARDS = {"minimum": 1, "maximum": -1}
_EXCLUSIVE = {"minimum": "exclusiveMinimum", "maximum": "exclusiveMaximum"}
_ROUNDED = {
    "minimum": Context(prec=_DIGITS, rounding=ROUND_CEILING),
    "maximum": Context(prec=_DIGITS, rounding=ROUND_FLOOR),
}


def as_compiled(schema: Schema) -> dict[str, Any]:
    """Return the schema with bounds of numbers that texts keep to as decimals and as floats."""
    copy = json.loads(json.dumps(schema))
    pending: list[Any] = [copy]
    while pending:
        part = pending.pop()
        if isinstance(part, dict):
            node = cast("dict[str, Any]", part)
            pending += [child for _, child in children(node)]
            if node.keys().isdisjoint(("enum", "const")):
                _bound(node)
    return copy


def _bound(schema: dict[str, Any]) -> None:
    _bound_multiples(schema)
    if schema.get("type") in INTEGERS:
        return
    given = [abs(value) for word in _INWARDS for value in _given(schema, word)]
    for word, inwards in _INWARDS.items():
        bounds: list[float] = []
        if (bound := number(schema, word)) is not None:
            bounds.append(_inside(bound, word))
        if (bound := number(schema, _EXCLUSIVE[word])) is not None:
            del schema[_EXCLUSIVE[word]]
            bounds.append(_beyond(bound, word, max(given)))
        if bounds:
            schema[word] = inwards * max(inwards * bound for bound in bounds)


def _given(schema: Schema, word: str) -> Iterator[float]:
    for keyword in (word, _EXCLUSIVE[word]):
        if (bound := number(schema, keyword)) is not None:
            yield bound


def _bound_multiples(schema: dict[str, Any]) -> None:
    factor = number(schema, "multipleOf")
    if not factor or (factor == int(factor) and schema.get("type") in INTEGERS):
        return
    given = [abs(bound) for word in _INWARDS for bound in _given(schema, word)]
    most = int(min(max(abs(factor) * _MULTIPLES, *(2 * bound for bound in given), 0), EXACT))
    for word, inwards in _INWARDS.items():
        if most > max(given, default=0) and not [*_given(schema, word)]:
            schema[word] = -inwards * most


def _inside(bound: float, word: str) -> float:
    """Return a bound that is part of the range, with few digits."""
    if bound == int(bound) and abs(bound) <= EXACT:
        return bound
    return _plain(_ROUNDED[word].create_decimal(Decimal(repr(bound))))


def _beyond(bound: float, word: str, largest: float) -> float:
    """Return the nearest bound of few digits within one that is not part of the range."""
    exact = Decimal(repr(bound))
    # At 0 there are as many decimals as the range has at its other end.
    scale = exact or Decimal(repr(min(largest, 1) or 1))
    step = Decimal((0, (1,), scale.adjusted() - _DIGITS + 1))
    return _plain(_ROUNDED[word].create_decimal(exact + _INWARDS[word] * step))


def _plain(bound: Decimal) -> float:
    return int(bound) if bound == bound.to_integral_value() else float(bound)
