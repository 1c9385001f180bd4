"""The grammar of a constraint, in the language of llguidance."""

from __future__ import annotations

import json
from typing import Any, cast

from headrace.core.constraint import Constraint
from headrace.core.schema import Path, Schema, children, refusal
from headrace.text import formats

# With free white space a small model can repeat it up to the limit.
_SPACING = {
    "x-guidance": {
        "whitespace_flexible": False,
        "item_separator": ", ",
        "key_separator": ": ",
    }
}


def grammar(constraint: Constraint) -> str:
    """Return the grammar of a constraint, for every engine that takes llguidance's.

    Raises:
        InvalidRequest: the schema has a format that cannot be enforced; names its path.
    """
    if constraint.lark:
        return constraint.lark
    return schema_grammar(without_formats(constraint.json_schema))


def schema_grammar(schema: Schema) -> str:
    """Return the grammar of a schema as it is."""
    # The last of equal keys counts: what the schema itself says is not heard.
    return "%llguidance {}\nstart: %json " + json.dumps({**schema, **_SPACING})


def without_formats(schema: Schema, *, strict: bool = True) -> dict[str, Any]:
    """Return the schema with patterns and ranges in place of `format`.

    Without `strict`, formats that are not known are kept.

    Raises:
        InvalidRequest: with `strict`, a format is not known.
    """
    copy = json.loads(json.dumps(schema))
    pending: list[tuple[Path, Any]] = [((), copy)]
    while pending:
        path, node = pending.pop()
        if isinstance(node, dict):
            part = cast("dict[str, Any]", node)
            pending += [((*path, *below), child) for below, child in children(part)]
            _replace(path, part, strict=strict)
    return copy


def _replace(path: Path, schema: dict[str, Any], *, strict: bool) -> None:
    name = schema.get("format")
    if not isinstance(name, str):
        return
    pattern, addition = formats.PATTERNS.get(name), formats.RANGES.get(name)
    if pattern is not None:
        addition = {"pattern": f"^(?:{pattern})$"}
    elif addition is None:
        if strict and name not in formats.UNRESTRICTED:
            raise refusal((*path, "format"), f"is {name[:64]!r}, which cannot be enforced")
        return
    del schema["format"]
    if schema.keys().isdisjoint(addition):
        schema |= addition
    else:
        schema.setdefault("allOf", []).append(addition)
