"""The schema of arguments as alternatives, of which a grammar writes the keys and values.

JSON keeps to a schema by llguidance's own compiler. In other notations the keys are written by
rules of ours, which know `properties`, `required` and the number of keys, so that everything else
of an object is expressed by these, or refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any, cast

import msgspec

from headrace.core.errors import Unsupported
from headrace.text.calls.raw import NOTES, below
from headrace.text.calls.values import kind_of, resolved

_MOST = 16
_MAX_DEPTH = 8
_OWN: Mapping[str, Any] = {
    "properties": dict[str, dict[str, Any] | bool],
    "required": list[str],
    "additionalProperties": dict[str, Any] | bool,
    "minProperties": int,
    "maxProperties": int,
}
_REFUSED = ("enum", "const", "if", "patternProperties", "propertyNames", "$dynamicRef")
# Two schemas without these, and without common keywords, are one with the keywords of both.
_APART = NOTES | {"enum", "const", "pattern", "minLength", "maxLength", "minimum", "maximum"}
_STRUCTURED = {"type": ["object", "string"]}

Schema = Mapping[str, Any]


class _Part:
    """A part of a schema, with the whole and its path there."""

    def __init__(self, root: Schema, value: object, path: str = "", depth: int = 0) -> None:
        self.root, self.value, self.path, self.depth = root, value, path, depth

    def below(self, *names: str | int) -> _Part:
        value: Any = self.value
        for name in names:
            value = value[name]
        path = "".join(f"/{name}" for name in names)
        return _Part(self.root, value, self.path + path, self.depth + 1)

    def refused(self) -> Unsupported:
        problem = "cannot be enforced in the form in which this model writes calls"
        return Unsupported(f"{self.path or '/'} in the JSON schema {problem}.")

    def mapping(self) -> dict[str, Any]:
        if not isinstance(self.value, dict):
            raise self.refused()
        return cast("dict[str, Any]", self.value)

    def parts(self) -> list[_Part]:
        if not isinstance(self.value, list):
            raise self.refused()
        return [self.below(index) for index in range(len(cast("list[Any]", self.value)))]


def shapes_of(tool: str, schema: Schema) -> list[Schema]:
    """Return the alternatives of a tool's arguments: keys, which of them are required, how many.

    Raises:
        Unsupported: a keyword cannot be expressed so, or there are too many; names its path.
    """
    whole = _Part(schema, schema)
    try:
        written = [shape for split in _split(whole) if (shape := _closed(split)) is not None]
        if not written:
            raise Unsupported("The JSON schema allows no arguments that this model can write.")
    except Unsupported as error:
        raise Unsupported(f"The tool {tool}: {error.message}", param="tools") from None
    return [below(schema, shape) for shape in written]


def reading_of(tool: str, schema: Schema) -> Schema:
    """Return the schema by which the values of all alternatives are read.

    Raises:
        Unsupported: as `shapes_of`.
    """
    shapes = shapes_of(tool, schema)
    parts: dict[str, Any] = {}
    for shape in shapes:
        for key, part in shape["properties"].items():
            same = kind_of(shape, key) == kind_of(below(schema, {"properties": parts}), key)
            parts[key] = part if key not in parts or same else _STRUCTURED
    return below(schema, {"type": "object", "properties": parts})


def _split(part: _Part) -> list[Schema]:
    if isinstance(part.value, bool):
        return [{}] if part.value else []
    node = part.mapping()
    if part.depth > _MAX_DEPTH:
        raise part.refused()
    kinds = node.get("type", "object")
    if not isinstance(kinds, str | list):
        raise part.below("type").refused()
    if kinds != "object" and "object" not in kinds:
        return []
    shapes = [_own(part)]
    for more in _alternatives(part):
        shapes = [both for left in shapes for right in more if (both := _both(left, right))]
        if len(shapes) > _MOST:
            raise part.refused()
    return shapes


def _own(part: _Part) -> Schema:
    node = part.mapping()
    for name, kind in _OWN.items():
        if name in node:
            try:
                msgspec.convert(node[name], kind)
            except msgspec.ValidationError:
                raise part.below(name).refused() from None
    return {name: node[name] for name in _OWN if name in node}


def _alternatives(part: _Part) -> Iterator[list[Schema]]:
    """Yield the alternatives of each keyword that is not an object's own."""
    node = part.mapping()
    for name in _REFUSED:
        if name in node:
            raise part.below(name).refused()
    if "$ref" in node:
        target = resolved(part.root, str(node["$ref"]))
        yield _split(_Part(part.root, target, part.path + "/$ref", part.depth + 1))
    for branch in part.below("allOf").parts() if "allOf" in node else ():
        yield _split(branch)
    if "anyOf" in node:
        yield [shape for branch in part.below("anyOf").parts() for shape in _split(branch)]
    if "oneOf" in node:
        yield _exactly_one(part.below("oneOf"))
    if "not" in node:
        yield _without(part.below("not"))
    for name in ("dependentRequired", "dependentSchemas", "dependencies"):
        for key in part.below(name).mapping() if name in node else ():
            yield _dependent(part.below(name, key), key)


def _dependent(part: _Part, key: str) -> list[Schema]:
    present: Schema = {"required": [key]}
    listed = isinstance(part.value, list)
    then = [_own(_Part(part.root, {"required": part.value}, part.path))] if listed else _split(part)
    with_key = [both for shape in then if (both := _both(present, shape))]
    return [_lacking(key), *with_key]


def _lacking(key: str) -> Schema:
    return {"properties": {key: False}}


def _without(part: _Part) -> list[Schema]:
    """Return what a schema does not accept, which only asks for keys."""
    node = part.value
    if not isinstance(node, dict) or {*cast("Schema", node)} - NOTES != {"required"}:
        raise part.refused()
    return [_lacking(key) for key in _own(part)["required"]]


def _exactly_one(part: _Part) -> list[Schema]:
    branches = part.parts()
    split = [_split(branch) for branch in branches]
    if all(
        _differ(left, right)
        for first, second in combinations(split, 2)
        for left in first
        for right in second
    ):
        return [shape for shapes in split for shape in shapes]
    shapes: list[Schema] = []
    for index, mine in enumerate(split):
        for other in (*branches[:index], *branches[index + 1 :]):
            absent = _without(other)
            mine = [both for left in mine for right in absent if (both := _both(left, right))]
            if len(mine) > _MOST:
                raise part.refused()
        shapes += mine
    return shapes


def _differ(left: Schema, right: Schema) -> bool:
    """Whether a key that both require has values of which the other takes none."""
    keys = {*left.get("required", ())} & {*right.get("required", ())}
    return any(_value(_get(left, key), _get(right, key)) is False for key in keys)


def _get(shape: Schema, key: str) -> Any:
    return shape.get("properties", {}).get(key, shape.get("additionalProperties", True))


def _both(left: Schema, right: Schema) -> Schema | None:
    """Return the schema of what two schemas of objects accept; None if they contradict."""
    keys = dict.fromkeys((*left.get("properties", ()), *right.get("properties", ())))
    least = max(left.get("minProperties", 0), right.get("minProperties", 0))
    most = [shape["maxProperties"] for shape in (left, right) if "maxProperties" in shape]
    rest = _value(left.get("additionalProperties", True), right.get("additionalProperties", True))
    return {
        "properties": {key: _value(_get(left, key), _get(right, key)) for key in keys},
        "required": [*dict.fromkeys((*left.get("required", ()), *right.get("required", ())))],
        "additionalProperties": rest,
        "minProperties": least,
        **({"maxProperties": min(most)} if most else {}),
    }


def _value(left: Any, right: Any) -> Any:
    """Return the schema of what two schemas accept; False if they contradict plainly."""
    if left is False or right is False:
        return False
    if left in (True, {}) or left == right:
        return right
    if right in (True, {}):
        return left
    listed = [_listed(side) for side in (left, right)]
    if listed[0] is not None and listed[1] is not None:
        common = [value for value in listed[0] if value in listed[1]]
        rest = {**left, **right}
        rest.pop("const", None)
        plain = {*left, *right} <= NOTES | {"enum", "const"}
        if not common or plain:
            return {**rest, "enum": common} if common else False
    notes = {*left, *right} & (NOTES - {"type"})
    clash = any(left[name] != right[name] for name in {*left} & {*right} - notes)
    if clash or not {*left, *right} <= _APART or {"enum", "const"} <= {*left, *right}:
        return {"allOf": [left, right]}
    return {**left, **right}


def _listed(schema: Schema) -> Sequence[Any] | None:
    return [schema["const"]] if "const" in schema else schema.get("enum")


def _closed(shape: Schema) -> Schema | None:
    """Return an alternative with all its keys; None if it accepts nothing that can be written."""
    required = shape.get("required", ())
    parts: dict[str, Any] = {**shape.get("properties", {})}
    parts |= {key: _get(shape, key) for key in required if key not in parts}
    if any(parts[key] is False for key in required):
        return None
    anything: Schema = {}
    parts = {
        key: anything if part is True else part for key, part in parts.items() if part is not False
    }
    least, most = shape.get("minProperties", 0), shape.get("maxProperties", len(parts))
    if max(least, len({*required})) > min(most, len(parts)):
        return None
    return {**shape, "type": "object", "properties": parts, "required": [*required]}
