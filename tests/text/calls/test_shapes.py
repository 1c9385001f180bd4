"""Issue 13: what a schema asks of all arguments together, in calls that are not JSON."""

from __future__ import annotations

import random
from typing import Any

import jsonschema_rs
import pytest
from tests.text.calls.enforce import Tool, accepts, answer
from tests.text.calls.parse import calls_in, split
from tests.text.calls.writers import WRITERS

from headrace.core.errors import Unsupported
from headrace.text.calls.constrain import constraint_for
from headrace.text.calls.families import FAMILIES
from headrace.text.calls.shapes import reading_of

_KEYS = {
    "a": {"type": "string", "maxLength": 2},
    "b": {"type": "integer", "minimum": 0, "maximum": 9},
    "c": {"type": "boolean"},
}
_A, _B = {"required": ["a"]}, {"required": ["b"]}
WHOLE: list[dict[str, Any]] = [
    {"minProperties": 1},
    {"minProperties": 2, "maxProperties": 2},
    {"maxProperties": 1},
    {"maxProperties": 1, "required": ["b"]},
    {"maxProperties": 0},
    {"anyOf": [_A, _B]},
    {"oneOf": [_A, _B, {"required": ["c"]}]},
    {"not": {"required": ["a", "b"]}},
    {"dependentRequired": {"a": ["b"], "c": ["a"]}},
    {"dependentSchemas": {"a": {"properties": {"c": False}}}},
    {"allOf": [_A, {"properties": {"b": {"const": 3}}, "required": ["b"]}]},
    {"required": ["d"], "additionalProperties": {"type": "boolean"}},
    {"anyOf": [{"properties": {"d": {"type": "string", "maxLength": 2}}, "required": ["d"]}, _B]},
    {"$ref": "#/$defs/all", "$defs": {"all": {"minProperties": 1, "required": ["c"]}}},
    {
        "oneOf": [
            {"properties": {"k": {"const": 1}, "v": {"type": "null"}}, "required": ["k", "v"]},
            {
                "properties": {"k": {"const": 2}, "v": {"type": "string", "maxLength": 3}},
                "required": ["k", "v"],
            },
        ]
    },
]
NOTATIONS = [name for name in WRITERS if FAMILIES[name].style in ("tagged", "python", "gemma")]


@pytest.mark.parametrize("family", NOTATIONS)
@pytest.mark.parametrize("number", range(len(WHOLE)))
def test_keywords_of_the_arguments_themselves(family: str, number: int) -> None:
    """Issue 13: what a schema asks of all arguments was only checked at the end: a 500."""
    schema = {"type": "object", "properties": _KEYS} | WHOLE[number]
    form, dice = FAMILIES[family], random.Random(number)
    grammar = constraint_for(form, [Tool("f", schema)], "required", parallel=False)
    read: dict[str, dict[str, Any] | None] = {"f": dict(reading_of("f", schema))}
    for _ in range(3):
        ((_, arguments),) = calls_in(split(form, [answer(grammar, dice)], tools=read, exact=True))
        jsonschema_rs.validate(schema, arguments)


@pytest.mark.parametrize("family", NOTATIONS)
@pytest.mark.parametrize(
    ("more", "path"),
    [
        ({"not": {"properties": {"a": {"const": "x"}}}}, "/not"),
        ({"propertyNames": {"maxLength": 3}}, "/propertyNames"),
        ({"patternProperties": {"^a": {"minLength": 1}}}, "/patternProperties"),
        ({"if": _A, "then": _B}, "/if"),
        ({"allOf": [{"const": {"a": "x"}}]}, "/allOf/0/const"),
        ({"oneOf": [{"properties": _KEYS}, {"minProperties": 2}]}, "/oneOf/1"),
        ({"allOf": [{"anyOf": [_A, _B, {"required": ["c"]}]}] * 5}, ""),
        ({"minProperties": 4}, ""),
        ({"required": ["d"], "additionalProperties": False}, ""),
        ({"minProperties": "2"}, "/minProperties"),
        ({"allOf": [{"required": [1]}]}, "/allOf/0/required"),
        ({"not": {"required": 1}}, "/not/required"),
        ({"properties": 5}, "/properties"),
        ({"type": 5}, "/type"),
        ({"dependentRequired": {"a": 5}}, "/dependentRequired/a"),
        ({"$ref": "#"}, "/\\$ref"),
    ],
)
def test_what_cannot_be_enforced_is_refused(family: str, more: Any, path: str) -> None:
    """Issue 13: by its path, and not by an answer that fails."""
    tool = Tool("f", {"type": "object", "properties": _KEYS} | more)
    with pytest.raises(Unsupported, match=f"^The tool f: {path}.* JSON schema") as error:
        constraint_for(FAMILIES[family], [tool], "required")
    assert error.value.param == "tools"
    loose = Tool("f", tool.parameters, strict=False)
    assert constraint_for(FAMILIES[family], [loose], "auto")


def test_fewer_keys_than_asked_for() -> None:
    """Issue 13: the numbers of keys, and none that is not declared."""
    schema = {"type": "object", "properties": _KEYS, "minProperties": 2, "maxProperties": 2}
    grammar = constraint_for(FAMILIES["llama4"], [Tool("f", schema)], "required", parallel=False)
    assert accepts(grammar, '[f(a="x", c=True)]')
    assert accepts(grammar, "[f(b=1, c=True)]")
    for text in ("[f()]", "[f(b=1)]", '[f(a="x", b=1, c=True)]', "[f(b=1, d=1)]"):
        assert not accepts(grammar, text)
