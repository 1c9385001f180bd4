"""Schemas as compilers can enforce them, above all bounds of numbers for readers of floats.

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

from headrace.core.schema import Path, Schema, children, number
from headrace.text import patterns

INTEGERS = ("integer", ["integer"], ["integer", "null"], ["null", "integer"])
"""The types of schemas of which each number is an integer; their bounds are exact."""
EXACT = 2**53 - 1
"""The largest integer that all readers of JSON read exactly."""

_DIGITS = 15
_TINY = 1e-290
_MULTIPLES = 10**12
_INWARDS = {"minimum": 1, "maximum": -1}
_EXCLUSIVE = {"minimum": "exclusiveMinimum", "maximum": "exclusiveMaximum"}
_ROUNDED = {
    "minimum": Context(prec=_DIGITS, rounding=ROUND_CEILING),
    "maximum": Context(prec=_DIGITS, rounding=ROUND_FLOOR),
}


def as_compiled(schema: Schema) -> dict[str, Any]:
    """Return the schema in a form which the texts that a compiler allows keep to.

    Its bounds of numbers hold for decimals and floats, and its patterns are those of `patterns`.
    """
    copy = json.loads(json.dumps(schema))
    pending: list[Any] = [copy]
    while pending:
        part = pending.pop()
        if isinstance(part, dict):
            node = cast("dict[str, Any]", part)
            pending += [child for _, child in children(node)]
            if node.keys().isdisjoint(("enum", "const")):
                _bound(node)
            if isinstance(pattern := node.get("pattern"), str):
                node["pattern"] = patterns.as_compiled(pattern)
            if isinstance(given := node.get("patternProperties"), dict):
                named = cast("dict[str, Any]", given).items()
                node["patternProperties"] = {patterns.as_compiled(k): v for k, v in named}
            if not isinstance(node.get("items"), list):
                # It means nothing then, but compilers would leave `prefixItems` out.
                node.pop("additionalItems", None)
    return copy


def inexact(schema: Schema) -> Iterator[tuple[Path, float]]:
    """Yield the numbers in `const` and `enum` that are beyond `EXACT`, each with its path."""
    pending: list[tuple[Path, Any]] = [((word,), schema.get(word)) for word in ("const", "enum")]
    while pending:
        path, value = pending.pop()
        if isinstance(value, dict):
            members = cast("dict[str, Any]", value).items()
            pending += [((*path, name), member) for name, member in members]
        elif isinstance(value, list):
            entries = enumerate(cast("list[Any]", value))
            pending += [((*path, str(place)), entry) for place, entry in entries]
        elif isinstance(value, int | float) and abs(value) > EXACT:
            yield path, value


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
    if not factor or isinstance(factor, int):
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
    if 0 < abs(bound) < _TINY:
        # The nearest float is too far away to be counted in digits.
        return 0 if bound * _INWARDS[word] < 0 else _INWARDS[word] * _TINY
    # At 0 there are as many decimals as the range has at its other end.
    scale = exact or Decimal(repr(max(min(largest, 1) or 1, _TINY)))
    step = Decimal((0, (1,), scale.adjusted() - _DIGITS + 1))
    return _plain(_ROUNDED[word].create_decimal(exact + _INWARDS[word] * step))


def _plain(bound: Decimal) -> float:
    return int(bound) if bound == bound.to_integral_value() else float(bound)
