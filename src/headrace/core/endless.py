"""Parts of a JSON schema that no finite answer has, as they contain themselves in any case."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

from headrace.core.schema import Path, Schema, children, resolved

_DEFINITIONS = ("$defs", "definitions")
_APPLIED = ("allOf", "anyOf", "oneOf", "not", "if", "then", "else", "dependentSchemas")
_VALUES = ("properties", "patternProperties", "additionalProperties", "items", "prefixItems")


def endless(root: Schema) -> Path | None:
    """Return the path of a value that never ends once it has begun; None if there is none.

    It may be optional: a model can begin it. Of `anyOf`, one that ends is enough.

    Raises:
        InvalidRequest: a reference leads nowhere.
    """
    parts = _reachable(root)
    needs = {key: [*_needs(root, part)] for key, (_, part) in parts.items()}
    left = dict.fromkeys(reversed(parts))
    # Until no further part is known to end.
    while ended := [key for key in left if all(_ends(group, left) for group in needs[key])]:
        for key in ended:
            del left[key]
    if id(root) in left:
        return ()
    for path, part in parts.values():
        for below, child in children(part):
            if below[0] in _VALUES and id(child) in left:
                return (*path, *below)
    return None


def circular(root: Schema) -> Path | None:
    """Return the path of a schema that applies itself to the same value; None if there is none.

    Validators can follow that without an end.

    Raises:
        InvalidRequest: a reference leads nowhere.
    """
    parts = _reachable(root)
    left = {key: {*_applied(root, part)} for key, (_, part) in parts.items()}
    # Until no further part is known to lead to an end.
    while ended := {key for key, applied in left.items() if applied.isdisjoint(left)}:
        left = {key: applied for key, applied in left.items() if key not in ended}
    return parts[next(iter(left))][0] if left else None


def _applied(root: Schema, schema: Schema) -> Iterator[int]:
    """Yield the ids of the subschemas that apply to the same value as their schema."""
    yield from (id(part) for path, part in children(schema) if path[0] in _APPLIED)
    if isinstance(reference := schema.get("$ref"), str):
        yield id(resolved(root, reference, ("$ref",))[1])


def _ends(group: Sequence[Any], left: Mapping[int, None]) -> bool:
    return any(id(part) not in left for part in group)


def _reachable(root: Schema) -> dict[int, tuple[Path, Schema]]:
    """Return the subschemas that an answer can have, by id, with their paths."""
    parts: dict[int, tuple[Path, Schema]] = {}
    pending: list[tuple[Path, Any]] = [((), root)]
    while pending:
        path, part = pending.pop()
        if not isinstance(part, Mapping) or id(cast("object", part)) in parts:
            continue
        schema = cast("Schema", part)
        parts[id(schema)] = (path, schema)
        pending += [
            ((*path, *below), child)
            for below, child in children(schema)
            if below[0] not in _DEFINITIONS
        ]
        if isinstance(reference := schema.get("$ref"), str):
            pending.append(resolved(root, reference, (*path, "$ref")))
    return parts


def _needs(root: Schema, schema: Schema) -> Iterator[Sequence[Any]]:
    """Yield groups of subschemas: of each, one has to end for the schema to end."""
    below = dict(children(schema))
    if isinstance(reference := schema.get("$ref"), str):
        yield [resolved(root, reference, ("$ref",))[1]]
    yield from ([part] for path, part in below.items() if path[0] == "allOf")
    for keyword in ("anyOf", "oneOf"):
        if choices := [part for path, part in below.items() if path[0] == keyword]:
            yield choices
    names, least = schema.get("required"), schema.get("minItems")
    if schema.get("type") == "object" and isinstance(names, list):
        keys = [("properties", str(name)) for name in cast("list[Any]", names)]
        yield from ([below[key]] for key in keys if key in below)
    if schema.get("type") == "array" and isinstance(least, int):
        first = [part for path, part in below.items() if path[0] == "prefixItems"]
        yield from ([part] for part in first[:least])
        if least > len(first):
            yield [below.get(("items",))]
