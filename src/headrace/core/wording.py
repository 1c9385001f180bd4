"""The messages of the decoders in words for people: `expected a number, got a string`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import msgspec
from msgspec import inspect

from headrace.core.errors import InvalidRequest

_PLACE = re.compile(r"(?P<problem>.*?)(?: - at (?P<key>`key` in )?`\$\.?(?P<path>.*)`)?", re.DOTALL)
_FIELD = re.compile(r"Object (?P<how>missing required|contains unknown) field `(?P<name>.*)`")
_TYPE = re.compile(r"Expected `(?P<expected>[^`]+)`, got `(?P<got>[^`]+)`")
_LENGTH = re.compile(r"Expected `(?P<kind>\w+)` of length (?P<sign>[<>=]+) (?P<bound>\d+)")
_BOUND = re.compile(r"Expected `(?P<kind>\w+)` (?P<sign>[<>=]+) (?P<bound>\S+)")
_PATTERN = re.compile(r"Expected `str` matching regex '(?P<pattern>.*)'", re.DOTALL)
_VALUE = re.compile(r"Invalid (?:enum )?value (?P<value>.+)", re.DOTALL)
_STEP = re.compile(r"[^.\[\]]+|\[\d+\]|\[\.\.\.\]")

_KINDS = {
    "float": "a number",
    "int": "an integer",
    "str": "a string",
    "bool": "true or false",
    "array": "an array",
    "object": "an object",
    "null": "null",
}
_GOT = _KINDS | {"bool": "a boolean"}
_SIGNS = {">=": "of at least", "<=": "of at most", ">": "above", "<": "below", "==": "of"}
_PARTS = {"str": "characters", "array": "items", "object": "entries"}
_MAX_VALUE = 40


_OF_PYDANTIC = (
    (r"Value error, ", ""),
    (r"Input should be a valid (integer|number|boolean), unable to .*", r"Input should be a \1"),
    (r"Input should be (a )?(valid )?", r"must be \1"),
    (r"(String|List|Tuple|Dictionary) should have", "must have"),
    (r"must be a (boolean|bool)$", "must be true or false"),
    (r"must be a (?=[aeiou])", "must be an "),
    (r"greater than or equal to", "at least"),
    (r"less than or equal to", "at most"),
    (r"greater than", "above"),
    (r"less than", "below"),
)


def fault_of(message: str) -> str:
    """Return a message of pydantic as this program writes its own: `must be at least 1`."""
    for pattern, words in _OF_PYDANTIC:
        message = re.sub(pattern, words, message)
    return message


def refusal(error: msgspec.ValidationError, kind: Any, prefix: str = "") -> InvalidRequest:
    """Return the error for data that is not of the type `kind`; its `param` is the place.

    `prefix` is the place of the data itself.
    """
    match = _PLACE.fullmatch(str(error))
    assert match is not None
    problem, path = match["problem"], match["path"] or ""
    if field := _FIELD.fullmatch(problem):
        path = f"{path}.{field['name']}".lstrip(".")
        missing = field["how"].startswith("missing")
        words = "This field is required" if missing else "This field is unknown"
    else:
        words = _words(problem, _at(described(kind), path))
        words += " as a key" if match["key"] else ""
    place = f"{prefix}{'' if path.startswith('[') or not prefix or not path else '.'}{path}"
    return InvalidRequest(
        f"{place}: {words}." if place else f"{words[0].upper()}{words[1:]}.", param=place or None
    )


def names_unknown_field(error: msgspec.ValidationError) -> bool:
    """Whether the decoder met a field that the type does not have."""
    return str(error).startswith("Object contains unknown field")


def struct_of(kind: inspect.Type, data: Any = None) -> inspect.StructType | None:
    """Return the struct that a type is or may be; of several, the one with the tag of `data`."""
    structs = [part for part in parts_of(kind) if isinstance(part, inspect.StructType)]
    if len(structs) > 1 and isinstance(data, dict):
        tagged = [part for part in structs if data.get(part.tag_field) == part.tag]  # pyright: ignore[reportUnknownMemberType]
        return tagged[0] if tagged else None
    return structs[0] if structs else None


def parts_of(kind: inspect.Type) -> tuple[inspect.Type, ...]:
    """Return the members of a union; of any other type itself."""
    while isinstance(kind, inspect.Metadata):
        kind = kind.type
    if isinstance(kind, inspect.UnionType):
        return tuple(part for member in kind.types for part in parts_of(member))
    return (kind,)


@lru_cache(maxsize=1024)
def described(kind: Any) -> inspect.Type:
    """Return what msgspec knows about a type; it takes milliseconds to find out."""
    return inspect.type_info(kind)


@lru_cache(maxsize=1024)
def fields_of(struct: type[msgspec.Struct]) -> dict[str, inspect.Type]:
    """Return the type of each field of a struct, by its name in JSON."""
    info = described(struct)
    assert isinstance(info, inspect.StructType)
    return {field.encode_name: field.type for field in info.fields}


def _words(problem: str, kind: inspect.Type | None) -> str:
    if match := _TYPE.fullmatch(problem):
        return f"expected {_either(match['expected'])}, got {_GOT.get(match['got'], match['got'])}"
    if match := _LENGTH.fullmatch(problem):
        bound = f"{_SIGNS[match['sign']]} {match['bound']} {_PARTS.get(match['kind'], 'items')}"
        bound = bound.removesuffix("s") if match["bound"] == "1" else bound
        return f"expected {_KINDS.get(match['kind'], match['kind'])} {bound}"
    if match := _BOUND.fullmatch(problem):
        bound = f"{_SIGNS[match['sign']]} {match['bound']}"
        return f"expected {_KINDS.get(match['kind'], match['kind'])} {bound}"
    if match := _PATTERN.fullmatch(problem):
        return f"expected a string that matches {match['pattern']}"
    if match := _VALUE.fullmatch(problem):
        value = match["value"]
        shown = value if len(value) <= _MAX_VALUE else f"{value[:_MAX_VALUE]}…"
        accepted = ", ".join(map(str, _literals(kind)))
        return f"expected one of {accepted}; got {shown}" if accepted else f"unexpected {shown}"
    plain = problem.replace("`", "")
    return plain[:1].lower() + plain[1:]


def _either(expected: str) -> str:
    kinds = expected.split(" | ")
    # null is as if the field were absent.
    named = [kind for kind in kinds if kind != "null"] or kinds
    return " or ".join(_KINDS.get(kind, kind) for kind in named)


def _literals(kind: inspect.Type | None) -> Iterator[str | int]:
    for part in parts_of(kind) if kind else ():
        if isinstance(part, inspect.LiteralType):
            yield from (value for value in part.values if value is not None)
        elif isinstance(part, inspect.StructType) and part.tag is not None:
            yield part.tag


def _at(kind: inspect.Type, path: str) -> inspect.Type | None:
    """Return the type at a place as the decoder writes it: `messages[0].role`."""
    for step in _STEP.findall(path):
        inner = next(filter(None, (_inside(part, step) for part in parts_of(kind))), None)
        if inner is None:
            return None
        kind = inner
    return kind


def _inside(kind: inspect.Type, step: str) -> inspect.Type | None:
    if isinstance(kind, inspect.StructType):
        return fields_of(kind.cls).get(step)
    if isinstance(kind, inspect.ListType | inspect.VarTupleType) and step.startswith("["):
        return kind.item_type
    if isinstance(kind, inspect.DictType) and step == "[...]":
        return kind.value_type
    return None
