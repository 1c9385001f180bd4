"""The limits of a client's JSON schema, which hold before anything is made of it."""

from __future__ import annotations

import functools
import json
import math
import time
import tracemalloc
from typing import Any

import msgspec
import pytest

from headrace.core import schema
from headrace.core.constraint import Constraint
from headrace.core.errors import InvalidRequest

INTEGER = {"type": "integer"}


def nested(levels: int, make: Any, inside: Any = INTEGER) -> dict[str, Any]:
    return functools.reduce(lambda below, _: make(below), range(levels), inside)


def arrays(count: int, levels: int) -> dict[str, Any]:
    return nested(levels, lambda below: {"type": "array", "items": below, "minItems": count})


def doubling(levels: int, make: Any) -> dict[str, Any]:
    """References of which each names the one before it twice."""
    definitions = {"d0": INTEGER} | {
        f"d{level}": make({"$ref": f"#/$defs/d{level - 1}"}) for level in range(1, levels)
    }
    return {"$defs": definitions, "$ref": f"#/$defs/d{levels - 1}"}


def pair(below: Any) -> dict[str, Any]:
    required = ["a", "b"]
    return {"type": "object", "properties": dict.fromkeys(required, below), "required": required}


def chain(levels: int) -> dict[str, Any]:
    definitions = {f"d{level}": {"$ref": f"#/$defs/d{level + 1}"} for level in range(levels)}
    return {"$defs": definitions | {f"d{levels}": INTEGER}, "$ref": "#/$defs/d0"}


def inside(**keywords: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {"a/b": {"type": "array", "items": keywords}}}


BILLION = 1_000_000_000
HOSTILE: dict[str, tuple[Any, str]] = {
    "issue": ({"type": "array", "minItems": BILLION}, "/minItems"),
    "max items": ({"type": "array", "maxItems": BILLION}, "/maxItems"),
    "float items": ({"type": "array", "minItems": 1e9}, "/minItems"),
    "just too many": ({"minItems": schema.MAX_COUNT + 1}, "/minItems"),
    "tuple": ({"prefixItems": [INTEGER], "minItems": BILLION}, "/minItems"),
    "contains": ({"contains": INTEGER, "minContains": BILLION}, "/minContains"),
    "max contains": ({"contains": INTEGER, "maxContains": BILLION}, "/maxContains"),
    "properties": ({"type": "object", "minProperties": BILLION}, "/minProperties"),
    "max properties": ({"type": "object", "maxProperties": BILLION}, "/maxProperties"),
    "length": ({"type": "string", "minLength": BILLION}, "/minLength"),
    "max length": ({"type": "string", "maxLength": BILLION}, "/maxLength"),
    "no type": ({"maxLength": BILLION}, "/maxLength"),
    "in a property": (inside(minItems=BILLION), "/properties/a~1b/items/minItems"),
    "in any of": ({"anyOf": [INTEGER, {"minItems": BILLION}]}, "/anyOf/1/minItems"),
    "in one of": ({"oneOf": [{"maxLength": BILLION}]}, "/oneOf/0/maxLength"),
    "in all of": ({"allOf": [{"maxItems": BILLION}]}, "/allOf/0/maxItems"),
    "in a definition": ({"$defs": {"x": {"minItems": BILLION}}}, "/$defs/x/minItems"),
    "in definitions": ({"definitions": {"x": {"minItems": BILLION}}}, "/definitions/x/minItems"),
    "in additional": (
        {"additionalProperties": {"maxLength": BILLION}}, "/additionalProperties/maxLength",
    ),
    "in a pattern's": (
        {"patternProperties": {"^a": {"minItems": BILLION}}}, "/patternProperties/^a/minItems",
    ),
    "in not": ({"not": {"minItems": BILLION}}, "/not/minItems"),
    "in then": ({"if": True, "then": {"minItems": BILLION}}, "/then/minItems"),
    "in prefix items": ({"prefixItems": [{"minItems": BILLION}]}, "/prefixItems/0/minItems"),
    "items as list": ({"items": [{"minItems": BILLION}]}, "/items/0/minItems"),
    "nested 100^4": (arrays(100, 4), "no answer of less than"),
    "nested 4096^2": (arrays(4096, 2), "no answer of less than"),
    "nested 2^30": (arrays(2, 30), "no answer of less than"),
    "long and many": (
        {"type": "array", "minItems": 4000, "items": {"type": "string", "minLength": 60_000}},
        "no answer of less than",
    ),
    "many by name": (
        {
            "type": "object",
            "minProperties": 4000,
            "additionalProperties": {"type": "array", "items": INTEGER, "minItems": 4000},
        },
        "no answer of less than",
    ),
    "doubling": (doubling(31, pair), "no answer of less than"),
    "doubling all of": (doubling(31, lambda ref: {"allOf": [ref, ref]}), "to one value"),
    "doubling any of": (doubling(31, lambda ref: {"anyOf": [ref, ref]}), "alternatives"),
    "doubling beside": (doubling(40, lambda ref: {**ref, "allOf": [ref]}), "to one value"),
    "4^8": ({"allOf": [{"anyOf": [INTEGER] * 4}] * 8}, "alternatives"),
    "2^11": ({"allOf": [{"oneOf": [INTEGER] * 2}] * 11}, "alternatives"),
    "any of 2000": ({"anyOf": [{"const": number} for number in range(2000)]}, "alternatives"),
    "optional 600": (
        {"properties": {f"p{number}": INTEGER for number in range(600)}}, "can come next",
    ),
    "any of optional 200": (
        {"anyOf": [{"properties": {f"p{n}": True, "q": True, "r": True}} for n in range(200)]},
        "can come next",
    ),
    "any of arrays 400": (
        {"anyOf": [{"type": "array", "items": {"const": n}} for n in range(400)]}, "can come next",
    ),
    "any of names 500": ({"anyOf": [{"required": [f"a{n}"]} for n in range(500)]}, "can come next"),
    "names of three": (
        {"allOf": [{"anyOf": [{"required": [f"a{k}{n}"]} for n in range(10)]} for k in range(3)]},
        "can come next",
    ),
    "any of arrays or null": (
        {"anyOf": [{"type": ["array", "null"], "items": {"const": n}} for n in range(400)]},
        "can come next",
    ),
    "chain": (chain(500), "levels deep"),
    "depth": (nested(100, lambda below: {"items": below}), "levels deep"),
    "depth 5000": (nested(5000, lambda below: {"items": below}), "levels deep"),
    "deep const": ({"const": nested(100, lambda below: [below])}, "levels deep"),
    "deep enum": ({"enum": [nested(5000, lambda below: {"a": below})]}, "levels deep"),
    "values": ({"examples": [0] * 30_000}, "more than 10000 values"),
    "properties 30000": (
        {"properties": {f"p{number}": True for number in range(30_000)}}, "more than 10000 values",
    ),
    "required 30000": ({"required": [f"p{n}" for n in range(30_000)]}, "more than 10000 values"),
    "bytes": ({"enum": ["x" * 8000] * 20}, "bytes"),
    "enum": ({"enum": list(range(5000))}, "/enum"),
    "literal": ({"const": "x" * 9000}, "/const"),
    "enum's literal": ({"enum": ["a", "x" * 100_000]}, "/enum/1"),
    "name": ({"properties": {"x" * 9000: True}}, "/properties"),
    "description": ({"description": "x" * 1_000_000}, "/description"),
    "pattern": ({"pattern": "a" * 2000}, "/pattern"),
    "repetition": ({"pattern": "^a{1000000000}$"}, "/pattern"),
    "open repetition": ({"pattern": "^a{1000000000,}$"}, "/pattern"),
    "huge repetition": ({"pattern": "a{1,%s}" % ("9" * 500)}, "/pattern"),
    "product": ({"pattern": "^(a{1000}){1000}$"}, "/pattern"),
    "product of three": ({"pattern": "((a{20}){20}){20}"}, "/pattern"),
    "many repetitions": ({"pattern": "a{999}" * 20}, "/pattern"),
    "class": ({"pattern": r"[\]{}a]{5000}"}, "/pattern"),
    "in alternatives": ({"pattern": "(x|(?:y{90}){90})"}, "/pattern"),
    "property's pattern": (
        {"patternProperties": {"^(a{99}){99}$": True}}, "/patternProperties/^(a{99}){99}$",
    ),
    "multiple": (
        {"type": "integer", "multipleOf": 999999937, "minimum": 0, "maximum": 10**15},
        "/multipleOf",
    ),
    "number": ({"type": "integer", "minimum": 10**300}, "/minimum"),
    "negative": ({"type": "integer", "maximum": -(10**300)}, "/maximum"),
    "float": ({"type": "number", "exclusiveMaximum": 1e300}, "/exclusiveMaximum"),
    "const number": ({"const": 10**400}, "/const"),
    "infinite": ({"maximum": math.inf}, "/maximum"),
    "elsewhere": ({"$ref": "http://127.0.0.1:1/x"}, "/$ref"),
    "file": ({"properties": {"a": {"$ref": "file:///etc/passwd"}}}, "/properties/a/$ref"),
    "relative": ({"$ref": "other.json#/a"}, "/$ref"),
    "anchor": ({"$defs": {"a": {"$anchor": "x"}}, "$ref": "#x"}, "/$ref"),
    "missing": ({"$ref": "#/$defs/missing"}, "/$ref"),
    "not a schema": ({"$ref": "#/title", "title": "x"}, "/$ref"),
    "dynamic": ({"$dynamicRef": "#a"}, "/$dynamicRef"),
    "recursive": ({"items": {"$recursiveRef": "#"}}, "/items/$recursiveRef"),
    "text for a schema": ({"properties": {"a": "string"}}, "/properties/a"),
    "ours": ({"x-guidance": {"lenient": True}, "not": {}}, "/x-guidance"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_schema_beyond_the_limits_is_refused_at_once(name: str) -> None:
    """Issue 11.5: with its path, in milliseconds, and with hardly any memory."""
    given, where = HOSTILE[name]
    tracemalloc.start()
    began = time.process_time()
    with pytest.raises(InvalidRequest) as caught:
        Constraint(json_schema=given)
    took_s = time.process_time() - began
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert where in caught.value.message
    assert caught.value.param == "response_format"
    assert len(caught.value.message) < 400
    # tracemalloc makes it some ten times slower.
    assert took_s < 3.0
    assert peak < 16 << 20


ORDINARY = {
    "any": {},
    "recursive": {"type": "array", "items": {"$ref": "#"}},
    "mutual": {
        "$defs": {
            "a": {"properties": {"b": {"$ref": "#/$defs/b"}}},
            "b": {"properties": {"a": {"$ref": "#/$defs/a"}}},
        },
        "$ref": "#/$defs/a",
    },
    "names of keywords": {"properties": {"minItems": INTEGER, "$ref": INTEGER, "pattern": INTEGER}},
    "data like keywords": {"const": {"minItems": BILLION, "$ref": "http://x"}},
    "escaped": {"$defs": {"a/b~c": INTEGER}, "$ref": "#/$defs/a~1b~0c"},
    "shared": {"$defs": {"a": INTEGER}, "prefixItems": [{"$ref": "#/$defs/a"}] * 500},
    "deep": nested(30, lambda below: {"items": below}),
    "enum": {"enum": [f"value {number}" for number in range(4000)]},
    "at the limits": {
        "minItems": schema.MAX_COUNT,
        "maxLength": schema.MAX_LENGTH,
        "pattern": "^(a{60}){60}$",
        "maximum": 2**64 - 1,
    },
    "any of objects": {"anyOf": [{"type": "object", "required": [f"a{n}"]} for n in range(900)]},
    "braces": {"pattern": r"^\{a\}\p{L}{3}[{]9999[}]$"},
    "many properties": {
        "properties": {f"p{number}": INTEGER for number in range(3000)},
        "required": [f"p{number}" for number in range(2600)],
    },
}


@pytest.mark.parametrize("name", ORDINARY)
def test_ordinary_schemas_are_within_the_limits(name: str) -> None:
    """Issue 11.5: the limits are far from what people write."""
    constraint = Constraint(json_schema=ORDINARY[name])
    encoded = msgspec.json.encode(constraint)
    assert msgspec.json.decode(encoded, type=Constraint) == constraint


@pytest.mark.parametrize("value", [{1: 2}, {"a": {1: 2}}, {"a": object()}])
def test_what_is_no_json_is_refused(value: Any) -> None:
    """From Python a schema may be anything."""
    with pytest.raises(InvalidRequest):
        Constraint(json_schema=value)


def test_a_schema_inside_of_itself_is_refused() -> None:
    circle: dict[str, Any] = {}
    circle["items"] = circle
    with pytest.raises(InvalidRequest, match="levels deep"):
        Constraint(json_schema=circle)


def test_checking_is_linear() -> None:
    """Issue 11.5: twice the schema takes some twice the time, never four times."""

    def seconds(given: dict[str, Any]) -> float:
        began = time.process_time()
        Constraint(json_schema=given)
        return time.process_time() - began

    def made(count: int) -> dict[str, Any]:
        names = [f"p{number}" for number in range(count)]
        given = {"properties": {n: inside(pattern="a{9}b") for n in names}, "required": names}
        assert len(json.dumps(given)) < schema.MAX_BYTES
        return given

    # In turns, as the machine may be slower for a while.
    short, long = made(600), made(1200)
    low, high = map(min, zip(*[(seconds(short), seconds(long)) for _ in range(5)], strict=True))
    assert high < 3 * low + 0.005
