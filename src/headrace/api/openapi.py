"""/openapi.json, generated from the structs of the routes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec

from headrace.api.exchange import Route, marked
from headrace.api.fields import bodies
from headrace.api.limits import ApiSettings
from headrace.api.problems import ErrorBody, dialect_of

Schemas = Mapping[Any, dict[str, Any]]
"""The schemas of types."""

_REF = "#/components/schemas/{name}"
_PATH = re.compile(r"\{(\w+)(?::path)?\}")
_KEY = {"type": "http", "scheme": "bearer", "description": "Needed when the server has keys."}


def document(routes: Sequence[Route], settings: ApiSettings) -> dict[str, Any]:
    """Return the OpenAPI document of these routes, under these settings."""
    kinds = {kind for route in routes for kind in (route.request, route.answer, route.chunk)}
    kinds |= {dialect_of(route.path).error for route in routes}
    named = sorted((kind for kind in kinds if kind), key=str)
    schemas, components = msgspec.json.schema_components(named, ref_template=_REF)
    written = dict(zip(named, schemas, strict=True))
    for kind in named:
        # Schemas that msgspec cannot derive from the types.
        if not isinstance(kind, type):
            continue
        components[kind.__name__].get("properties", {}).update(marked(kind, "schema"))
    if settings.unknown_fields != "refuse":
        for kind in bodies():
            components.get(kind.__name__, {}).pop("additionalProperties", None)
    paths: dict[str, Any] = {}
    for route in routes:
        path = _PATH.sub(r"{\1}", route.path)
        operation, method = _operation(route, written), route.method.lower()
        if path in paths:
            operation["operationId"] = f"{method}_{operation['operationId']}"
        paths.setdefault(path, {})[method] = operation
    return {
        "openapi": "3.1.0",
        "info": {"title": "Headrace", "version": "1"},
        "paths": paths,
        "components": {"schemas": components, "securitySchemes": {"key": _KEY}},
        "security": [{"key": []}] if settings.has_keys else [],
    }


def _operation(route: Route, written: Schemas) -> dict[str, Any]:
    operation_id = _PATH.sub("id", route.path).strip("/").replace("/", "_") or "root"
    summary = (route.handler.__doc__ or "").partition("\n")[0]
    content = _json(written[route.answer]) if route.answer else {}
    content |= {kind: {} for kind in route.texts}
    if route.chunk is not None and route.lines:
        content["application/x-ndjson"] = {
            "itemSchema": {"$ref": _REF.format(name=route.chunk.__name__)}
        }
    elif route.chunk is not None:
        has_names = route.named or route.answer is None
        item = _event(route.chunk) if has_names else _chunk(route.chunk)
        content["text/event-stream"] = {"itemSchema": item}
    success = {"description": "The answer.", "content": content}
    operation: dict[str, Any] = {
        "operationId": operation_id,
        "summary": summary,
        "responses": {"200": success, **_failures(route, written)},
    }
    if route.request is not None:
        content = _json(written[route.request])
        content = {"multipart/form-data": content["application/json"]} if route.form else content
        operation["requestBody"] = {"required": True, "content": content}
    if parameters := [*_parameters(route)]:
        operation["parameters"] = parameters
    return operation


def _parameters(route: Route) -> Iterator[dict[str, Any]]:
    text = {"type": "string", "minLength": 1, "maxLength": 512}
    for name in _PATH.findall(route.path):
        yield {"name": name, "in": "path", "required": True, "schema": text}
    for name in route.optional:
        yield {"name": name, "in": "query", "required": False, "schema": text}
    if route.query is None:
        return
    _, schemas = msgspec.json.schema_components([route.query])
    described = schemas[route.query.__name__]
    for name, schema in described["properties"].items():
        is_required = name in described.get("required", ())
        yield {"name": name, "in": "query", "required": is_required, "schema": schema}


def _event(kind: type[msgspec.Struct]) -> dict[str, Any]:
    content = {"$ref": _REF.format(name=kind.__name__)}
    data = {"type": "string", "contentMediaType": "application/json", "contentSchema": content}
    properties = {"event": {"type": "string"}, "data": data}
    return {"type": "object", "properties": properties, "required": ["event", "data"]}


def _chunk(chunk: type[msgspec.Struct]) -> dict[str, Any]:
    kinds = [{"$ref": _REF.format(name=kind.__name__)} for kind in (chunk, ErrorBody)]
    chunks = {
        "type": "string",
        "contentMediaType": "application/json",
        "contentSchema": {"anyOf": kinds},
    }
    data = {"anyOf": [chunks, {"const": "[DONE]"}]}
    return {"type": "object", "properties": {"data": data}, "required": ["data"]}


def _failures(route: Route, written: Schemas) -> dict[str, Any]:
    error = _json(written[dialect_of(route.path).error])
    failures = {
        "4XX": {"description": "Refused; the error says why.", "content": error},
        "5XX": {"description": "Failed, or no capacity now (see `retry-after`).", "content": error},
    }
    if route.unready and route.answer:
        failures["503"] = {"description": "Not ready.", "content": _json(written[route.answer])}
    return failures


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}
