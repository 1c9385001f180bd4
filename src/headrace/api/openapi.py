"""openapi.json, made of the structs that decode and encode."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import msgspec

from headrace.api.endpoint import Route
from headrace.api.problems import ErrorBody
from headrace.api.settings import ApiSettings
from headrace.api.translate import LISTS

_REF = "#/components/schemas/{name}"
_PATH = re.compile(r"\{(\w+)(?::path)?\}")
_TOKEN = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}
_KEY = {"type": "http", "scheme": "bearer", "description": "Needed when the server has keys."}


def document(routes: Sequence[Route], settings: ApiSettings) -> dict[str, Any]:
    """Return the OpenAPI document of these routes, under these settings."""
    kinds = {kind for route in routes for kind in (route.request, route.answer, route.chunk)}
    named = sorted((kind for kind in kinds if kind), key=lambda kind: kind.__name__)
    _, components = msgspec.json.schema_components([*named, ErrorBody], ref_template=_REF)
    _tighten(components, settings)
    paths: dict[str, Any] = {}
    for route in routes:
        path = _PATH.sub(r"{\1}", route.path)
        paths.setdefault(path, {})[route.method.lower()] = _operation(route)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Headrace", "version": "1"},
        "paths": paths,
        "components": {"schemas": components, "securitySchemes": {"key": _KEY}},
        "security": [{"key": []}] if settings.has_keys else [],
    }


def _operation(route: Route) -> dict[str, Any]:
    operation_id = _PATH.sub("id", route.path).strip("/").replace("/", "_")
    summary = (route.handler.__doc__ or "").partition("\n")[0]
    content = _json(route.answer) if route.answer else {}
    content |= {kind: {} for kind in route.texts}
    if route.chunk is not None:
        item = _chunk(route.chunk) if route.answer else _event(route.chunk)
        content["text/event-stream"] = {"itemSchema": item}
    answered = {"description": "The answer.", "content": content}
    operation: dict[str, Any] = {
        "operationId": operation_id,
        "summary": summary,
        "responses": {"200": answered, **_failures(route)},
    }
    if route.request is not None:
        operation["requestBody"] = {"required": True, "content": _json(route.request)}
    places = [*((name, "path") for name in _PATH.findall(route.path))]
    places += [(name, "query") for name in route.query]
    if places:
        operation["parameters"] = [_parameter(name, place) for name, place in places]
    return operation


def _parameter(name: str, place: str) -> dict[str, Any]:
    schema = {"type": "string", "minLength": 1, "maxLength": 512}
    return {"name": name, "in": place, "required": True, "schema": schema}


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


def _failures(route: Route) -> dict[str, Any]:
    error = _json(ErrorBody)
    failures = {
        "4XX": {"description": "Refused; `error.code` says why.", "content": error},
        "5XX": {"description": "Failed, or no room now (see `retry-after`).", "content": error},
    }
    if route.unready and route.answer:
        failures["503"] = {"description": "Not ready.", "content": _json(route.answer)}
    return failures


def _json(kind: type[msgspec.Struct]) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": _REF.format(name=kind.__name__)}}}


def _tighten(components: dict[str, Any], settings: ApiSettings) -> None:
    """Say what the types cannot: the limits of the settings, keys that are numbers, prompts."""
    for schema in components.values():
        for name, limit in LISTS.items():
            for option in schema.get("properties", {}).get(name, {}).get("anyOf", ()):
                kind = option.get("type")
                if kind in {"array", "object"}:
                    size = "maxItems" if kind == "array" else "maxProperties"
                    option[size] = getattr(settings, limit)
                if kind == "object":
                    option["propertyNames"] = {"pattern": "^(0|[1-9][0-9]{0,8})$"}
    messages = components["ChatRequest"]["properties"]["messages"]
    messages |= {"minItems": 1, "maxItems": settings.max_messages}
    documents = components["RankRequest"]["properties"]["documents"]
    documents |= {"minItems": 1, "maxItems": settings.max_documents}
    prompt, given = _inputs(settings.max_prompts), _inputs(settings.max_inputs, minLength=1)
    components["CompletionRequest"]["properties"]["prompt"] = prompt
    components["EmbeddingRequest"]["properties"]["input"] = given


def _inputs(most: int, **limits: int) -> dict[str, Any]:
    """Describe a text, a list of texts, token ids, or a list of lists of them."""
    text = {"type": "string", **limits}
    tokens = {"type": "array", "items": _TOKEN, "minItems": 1}
    several = {"type": "array", "minItems": 1, "maxItems": most}
    return {"anyOf": [text, tokens, {**several, "items": text}, {**several, "items": tokens}]}
