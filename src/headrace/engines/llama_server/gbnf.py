"""Constraints in llama.cpp's own grammars, for builds without llguidance.

Those keep to a choice and to most JSON schemas; a regex and a grammar need llguidance. Of a schema
llama.cpp drops in silence what it cannot convert: one is refused unless all of it is enforced.
"""

from __future__ import annotations

from collections.abc import Set
from typing import Any, cast

from headrace.core.constraint import Constraint, TextForm
from headrace.core.schema import Path, Schema, children, refusal

FORMS: tuple[TextForm, ...] = ("choice",)

_NOTES = frozenset(
    {"title", "description", "default", "examples", "$schema", "$defs", "definitions"}
)
_ALONE = ("$ref", "anyOf", "enum", "const")
"""Beside these, and `type`, llama.cpp reads nothing else."""
_OF_TYPE = {
    "object": frozenset({"properties", "required", "additionalProperties"}),
    "array": frozenset({"items", "minItems", "maxItems"}),
    "string": frozenset({"minLength", "maxLength"}),
    "integer": frozenset({"minimum", "maximum"}),
    **dict.fromkeys(("number", "boolean", "null"), frozenset[str]()),
}

_ESCAPED = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t"}


def in_gbnf(constraint: Constraint) -> dict[str, Any]:
    """Return the fields of a request's body that enforce a constraint.

    Raises:
        InvalidRequest: a part of the schema would not be enforced; names its path.
    """
    if constraint.choice:
        texts = " | ".join(map(_literal, constraint.choice))
        return {"grammar": f"root ::= {texts}\n"}
    pending: list[tuple[Path, Any]] = [((), constraint.json_schema)]
    while pending:
        path, node = pending.pop()
        if isinstance(node, dict):
            part = cast("Schema", node)
            if unknown := sorted(part.keys() - _enforced(part)):
                problem = "needs a build of llama.cpp with llguidance"
                raise refusal((*path, unknown[0]), problem)
            pending += [((*path, *below), child) for below, child in children(part)]
    return {"json_schema": constraint.json_schema}


def _enforced(schema: Schema) -> Set[str]:
    """Return the keywords that are enforced in a schema that has these others."""
    alone = next(filter(schema.__contains__, _ALONE), None)
    if alone is not None:
        return _NOTES | {alone, "type"}
    kind = schema.get("type")
    known = _OF_TYPE.get(kind, frozenset[str]()) if isinstance(kind, str) else frozenset[str]()
    if kind == "array" and "items" not in schema:
        known = frozenset[str]()
    if not {*schema.get("required", ())} <= {*schema.get("properties", ())}:
        known -= {"required"}
    return _NOTES | {"type"} | known


def _literal(text: str) -> str:
    return f'"{"".join(map(_character, text))}"'


def _character(sign: str) -> str:
    if sign in _ESCAPED:
        return _ESCAPED[sign]
    return sign if sign.isprintable() else f"\\U{ord(sign):08X}"
