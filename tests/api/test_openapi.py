"""openapi.json is true to what the server does."""

from __future__ import annotations

from typing import Any

import msgspec
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.specs.openapi.checks import positive_data_acceptance
from tests.api.fakes import FakeBackend, client

from headrace.api.app import ROUTES, create_app
from headrace.api.openapi import document as describe
from headrace.api.settings import ApiSettings
from headrace.api.wire_chat import ChatRequest

APP = create_app(FakeBackend(), ApiSettings(allowed_hosts=("*",)))
schema = schemathesis.openapi.from_asgi("/openapi.json", APP)


async def document(**fields: Any) -> dict[str, Any]:
    async with client(**fields) as http:
        return (await http.get("/openapi.json")).json()


async def test_it_lists_every_route() -> None:
    """A: each route with its structs, and nothing else."""
    paths = (await document())["paths"]
    expected = {(route.path.replace(":path", ""), route.method.lower()) for route in ROUTES}
    assert {(path, method) for path in paths for method in paths[path]} == expected
    operations = [operation for methods in paths.values() for operation in methods.values()]
    assert len({one["operationId"] for one in operations}) == len(ROUTES)
    assert all(one["summary"] for one in operations)


async def test_it_names_every_field_and_limit() -> None:
    """A: schemas come from the structs that decode, limits from the settings."""
    spec = await document(max_messages=7, max_prompts=5, key_hashes=())
    schemas = spec["components"]["schemas"]
    properties = schemas["ChatRequest"]["properties"]
    assert set(properties) == set(ChatRequest.__struct_fields__)
    assert properties["messages"]["maxItems"] == 7
    assert {"maximum": 2, "minimum": 0}.items() <= properties["temperature"]["anyOf"][0].items()
    prompt = schemas["CompletionRequest"]["properties"]["prompt"]["anyOf"]
    assert [one.get("maxItems") for one in prompt] == [None, None, 5, 5]
    names = msgspec.json.encode(spec).decode().split("#/components/schemas/")[1:]
    assert {name.split('"')[0] for name in names} <= set(schemas)


async def test_keys_are_told() -> None:
    """A: with keys, the document says that one is needed."""
    guarded = describe(ROUTES, ApiSettings(key_hashes=("0" * 64,)))
    assert guarded["security"] == [{"key": []}]
    assert (await document())["security"] == []


async def test_the_page_needs_nobody_else() -> None:
    """A: /docs shows each route and type, without scripts or foreign addresses."""
    async with client() as http:
        page = (await http.get("/docs")).text
    assert all(f"<code>{route.path.replace(':path', '')}</code>" in page for route in ROUTES)
    assert 'id="ChatRequest"' in page
    assert "<script" not in page
    assert "://" not in page


@schema.parametrize()
@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    derandomize=True,
    database=None,
)
def test_fuzz(case: schemathesis.Case) -> None:
    """A: whatever the document allows is answered as it says; nothing is a 5xx."""
    # What the document allows may still be refused: some fields exclude or need one another.
    case.call_and_validate(excluded_checks=[positive_data_acceptance])
