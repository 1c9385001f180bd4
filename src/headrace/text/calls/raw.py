"""Parts of the schema of arguments, and what it says of plain text, as a terminal."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, cast

from headrace.text.calls.values import resolved
from headrace.text.grammar import as_terminal

ANY_TEXT = "/(.|\\n)*/"
NOTES = frozenset({"type", "description", "title", "default", "examples"})
"""Keywords that restrict nothing, beside the type."""
_MAX_DEPTH = 8
_ANCHORED = re.compile(r"\\.|\[(?:\\.|[^\]])*\]|([()|])", re.DOTALL)

Schema = Mapping[str, Any]


def plain_text(root: Schema, key: str, kind: str, *, typed: bool) -> str:
    """Return the terminal of an argument that is written as plain text; empty if it is JSON.

    It is read by `kind`, as `values.kind_of` has it. With `typed` its type is written too, so that
    null is no text.
    """
    part = part_of(root, key)
    if kind not in ("string", "nullable"):
        return "" if restricts(part) else ANY_TEXT
    text = raw_text(root, part)
    return "" if kind == "nullable" and typed and text != ANY_TEXT else text


def raw_text(root: Schema, schema: Schema, depth: int = 0) -> str:
    """Return the terminal of the text of a string or null, as it is outside of JSON.

    `schema` is a part of `root`. What does not restrict a string is left out.
    """
    parts = [*_restrictions(root, schema, depth)]
    return f"({' & '.join(parts)})" if parts else ANY_TEXT


def _restrictions(root: Schema, schema: Schema, depth: int) -> Iterator[str]:
    if depth > _MAX_DEPTH:
        return
    options = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if options is not None:
        texts = ("null" if option is None else option for option in options)
        yield f"({' | '.join(_quoted(text) for text in texts if isinstance(text, str))})"
    for name in ("anyOf", "oneOf"):
        texts = [raw_text(root, part, depth + 1) for part in schema.get(name, ())]
        if texts and ANY_TEXT not in texts:
            yield f"({' | '.join(texts)})"
    for part in schema.get("allOf", ()):
        yield raw_text(root, part, depth + 1)
    if isinstance(schema.get("$ref"), str):
        part = resolved(root, schema["$ref"])
        yield raw_text(root, cast("Schema", part if isinstance(part, dict) else {}), depth + 1)
    own = _of_strings(schema)
    if schema.get("type") == "null":
        yield _quoted("null")
    elif own and "null" in _types(schema):
        yield f"({_quoted('null')} | ({' & '.join(own)}))"
    else:
        yield from own


def _types(schema: Schema) -> list[Any]:
    kind = schema.get("type")
    return cast("list[Any]", kind) if isinstance(kind, list) else [kind]


def _of_strings(schema: Schema) -> list[str]:
    least, most = schema.get("minLength", 0), schema.get("maxLength")
    parts: list[str] = []
    if least or most is not None:
        parts.append(f"/(.|\\n){{{int(least)},{'' if most is None else int(most)}}}/")
    if isinstance(schema.get("pattern"), str):
        parts.append(as_terminal(_whole(schema["pattern"])))
    return parts


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _whole(pattern: str) -> str:
    """Return a regex of whole texts for one that is searched in them."""
    return "|".join(map(_alternative, _alternatives(pattern)))


def _alternative(regex: str) -> str:
    begins, ends = regex.startswith("^"), regex.endswith("$") and not regex.endswith("\\$")
    inner = regex[1 if begins else 0 : -1 if ends else None]
    return ("" if begins else "(.|\n)*") + f"(?:{inner})" + ("" if ends else "(.|\n)*")


def _alternatives(pattern: str) -> list[str]:
    """Split a regex at the bars that are outside of groups and classes."""
    pieces, start, depth = list[str](), 0, 0
    for match in _ANCHORED.finditer(pattern):
        depth += {"(": 1, ")": -1}.get(match[1], 0)
        if match[1] == "|" and not depth:
            pieces.append(pattern[start : match.start()])
            start = match.end()
    return [*pieces, pattern[start:]]


def keywords(schema: Schema) -> set[str]:
    """Return what restricts the values of a schema, beside their type."""
    return {*schema} - NOTES - {"$defs", "definitions"}


def restricts(schema: Schema) -> bool:
    """Whether a schema does not accept any value."""
    return bool(keywords(schema)) or "type" in schema


def below(root: Schema, schema: object) -> Schema:
    """Return a part of a schema with the definitions of the whole."""
    part: dict[str, Any] = dict(schema) if isinstance(schema, dict) else {}  # pyright: ignore[reportUnknownArgumentType]
    shared = {name: root[name] for name in ("$defs", "definitions") if name in root}
    return shared | part


def part_of(schema: Schema, key: str) -> Schema:
    """Return the schema of an argument, with the definitions of the whole."""
    return below(schema, schema["properties"][key])


def variants_of(schema: Schema) -> list[Schema]:
    """Return the schemas of which one has to accept a value, if there are only those."""
    kinds, names = schema.get("type"), keywords(schema)
    if isinstance(kinds, list):
        return [{**schema, "type": kind} for kind in cast("list[Any]", kinds)]
    if names in ({"anyOf"}, {"oneOf"}) and kinds is None:
        return [below(schema, part) for part in schema[names.pop()]]
    return []
