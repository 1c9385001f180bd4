"""What openapi.json forbids is refused: numbers that are just out of their range."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jsonschema_rs
import pytest
from tests.api.fakes import FakeAdmin, FakeBackend, client

from headrace.api.app import ADMIN_ROUTES, ROUTES
from headrace.api.limits import ApiSettings
from headrace.api.openapi import document

DOCUMENT = document((*ROUTES, *ADMIN_ROUTES), ApiSettings())
SCHEMAS = DOCUMENT["components"]["schemas"]
GIVEN: dict[str, Any] = {
    "messages": [{"role": "user", "content": "Hello"}],
    "prompt": "Hello",
    "input": "Hello",
    "input_prefix": "Hello",
    "query": "Hello",
    "documents": ["Hello"],
    "text_1": "Hello",
    "text_2": "Hello",
    "content": "Hello",
    "tokens": [1],
    "max_tokens": 4,
    "model": "m",
}
"""What a request needs, by its name."""


class Bounded(NamedTuple):
    """A field with a range, and a value outside of it."""

    path: str
    schema: str
    field: tuple[str, ...]
    value: float


def numbers(schema: dict[str, Any]) -> Iterator[float]:
    """Yield values that are just outside of a range."""
    for part in (schema, *schema.get("anyOf", ())):
        step = 1 if part.get("type") == "integer" else 0.01
        for name, sign in (("minimum", -1), ("maximum", 1)):
            if (bound := part.get(name)) is not None:
                yield bound + sign * max(step, math.ulp(bound) if step < 1 else step)
        for name in ("exclusiveMinimum", "exclusiveMaximum"):
            if (bound := part.get(name)) is not None:
                yield bound


def named(schema: dict[str, Any]) -> str | None:
    """Return the name of the object that a field has."""
    refs = [part["$ref"] for part in (schema, *schema.get("anyOf", ())) if "$ref" in part]
    return refs[0].rpartition("/")[2] if len(refs) == 1 else None


def fields(schema: dict[str, Any], place: tuple[str, ...] = ()) -> Iterator[Any]:
    """Yield each field and its schema, also those of objects in fields."""
    for name, field in schema.get("properties", {}).items():
        yield (*place, name), field
        inner = named(field)
        if inner and len(place) < 2 and "required" not in SCHEMAS[inner]:
            yield from fields(SCHEMAS[inner], (*place, name))


def nested(field: tuple[str, ...], value: Any) -> dict[str, Any]:
    for name in reversed(field):
        value = {name: value}
    return value


def validator(schema: str) -> jsonschema_rs.Validator:
    whole = {"$ref": f"#/components/schemas/{schema}", "components": {"schemas": SCHEMAS}}
    return jsonschema_rs.validator_for(whole)


def bounded() -> Iterator[Bounded]:
    for path, methods in DOCUMENT["paths"].items():
        body = methods.get("post", {}).get("requestBody", {}).get("content", {})
        schema = named(body.get("application/json", {}).get("schema", {}))
        if not schema or "{" in path or path.startswith("/admin"):
            continue
        check = validator(schema)
        for field, described in fields(SCHEMAS[schema]):
            for value in numbers(described):
                if not check.is_valid(GIVEN | nested(field, value)):
                    yield Bounded(path, schema, field, value)


PATHS: dict[str, list[Bounded]] = {}
for _each in bounded():
    PATHS.setdefault(_each.path, []).append(_each)


@pytest.mark.parametrize("path", PATHS)
async def test_numbers_out_of_range_are_refused(path: str) -> None:
    """Issue 14, must show 4: on every route, in each field that has a range, also in objects."""
    accepted = list[tuple[str, float]]()
    async with client(FakeBackend(), admin=FakeAdmin()) as http:
        for each in PATHS[path]:
            names = SCHEMAS[each.schema]["properties"]
            body = {name: value for name, value in GIVEN.items() if name in names}
            answer = await http.post(path, json=body | nested(each.field, each.value))
            assert answer.status_code < 500, answer.text
            if answer.status_code == 200:
                accepted.append((".".join(each.field), each.value))
            else:
                assert answer.status_code == 400, (each, answer.text)
    assert not accepted


def test_that_all_routes_that_generate_are_tried() -> None:
    assert {"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"} <= {*PATHS}
    assert {"/api/chat", "/api/generate", "/completion", "/infill"} <= {*PATHS}
    tried = {each.field[0] for each in PATHS["/v1/completions"]}
    assert {"max_tokens", "temperature", "top_p", "top_k", "n", "seed", "logprobs"} <= tried
