"""Descriptions of settings and options: type, choices, bounds, and whether they can change (W3)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, cast

import msgspec

from headrace.core.model import SETTINGS, ModelSpec
from headrace.core.values import masked

_REFERENCE = "#/$defs/"


class Parameter(msgspec.Struct, frozen=True, kw_only=True):
    """A setting of a model, or an option of its engine.

    `type` is in the terms of JSON (`integer`, `number or string`). `choices` are the only values,
    if there are any. The bounds are inclusive unless they are `above` or `below`. `live` is whether
    a change is applied to a running worker; others need a restart. A secret `value` is masked.
    """

    name: str
    kind: Literal["setting", "option"]
    type: str
    default: Any = None
    value: Any = None
    choices: tuple[Any, ...] = ()
    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None
    below: float | None = None
    live: bool = False
    help: str = ""


def settings(spec: ModelSpec) -> Iterator[Parameter]:
    """Yield the settings of a model, with its values."""
    schema = msgspec.json.schema(ModelSpec)
    for described in _of_schema(schema, "setting", msgspec.structs.asdict(spec)):
        if (setting := SETTINGS.get(described.name)) is not None and described.name != "options":
            yield msgspec.structs.replace(
                described,
                minimum=setting.ge,
                above=setting.gt,
                maximum=setting.le,
                live=setting.live,
                help=setting.help,
            )


def options(schema: Mapping[str, Any], values: Mapping[str, Any]) -> Iterator[Parameter]:
    """Yield the options of an engine by the JSON schema of its Options, with given values."""
    return _of_schema(schema, "option", values)


def _of_schema(
    schema: Mapping[str, Any], kind: Literal["setting", "option"], values: Mapping[str, Any]
) -> Iterator[Parameter]:
    definitions: Mapping[str, Any] = schema.get("$defs", {})
    root = _resolved(schema, definitions)
    for name, field in cast("dict[str, Any]", root.get("properties", {})).items():
        parts = [
            part
            for part in (_resolved(part, definitions) for part in field.get("anyOf", [field]))
            if part.get("type") != "null"
        ]
        yield Parameter(
            name=name,
            kind=kind,
            type=" or ".join(dict.fromkeys(map(_type, parts))),
            default=masked(name, field.get("default")),
            value=masked(name, values.get(name, field.get("default"))),
            choices=tuple(choice for part in parts for choice in _choices(part)),
            minimum=_bound(parts, "minimum"),
            maximum=_bound(parts, "maximum"),
            above=_bound(parts, "exclusiveMinimum"),
            below=_bound(parts, "exclusiveMaximum"),
            help=field.get("description", ""),
        )


def _resolved(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> Mapping[str, Any]:
    reference = schema.get("$ref")
    return schema if reference is None else definitions[reference.removeprefix(_REFERENCE)]


def _choices(part: Mapping[str, Any]) -> tuple[Any, ...]:
    choices = part.get("enum", [part["const"]] if "const" in part else [])
    return tuple(choice for choice in choices if choice is not None)


def _type(part: Mapping[str, Any]) -> str:
    if "type" in part:
        return str(part["type"])
    choices = _choices(part)
    return "string" if choices and isinstance(choices[0], str) else "integer" if choices else "any"


def _bound(parts: list[Mapping[str, Any]], name: str) -> float | None:
    return next((part[name] for part in parts if name in part), None)
