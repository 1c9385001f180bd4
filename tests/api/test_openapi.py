"""openapi.json is true to what the server does."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.specs.openapi.checks import positive_data_acceptance
from tests.api.fakes import FakeAdmin, FakeBackend, client
from tests.operations import check, each

from headrace.api import limits
from headrace.api.app import ADMIN_ROUTES, ROUTES, create_app
from headrace.api.chat import ChatRequest
from headrace.api.exchange import Route
from headrace.api.limits import ApiSettings
from headrace.api.openapi import document as describe

APP = create_app(FakeBackend(), ApiSettings(allowed_hosts=("*",)), admin=FakeAdmin())
SCHEMA = schemathesis.openapi.from_asgi("/openapi.json", APP)
LIMITS = settings(
    max_examples=12,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    derandomize=True,
    database=None,
)


async def document(**fields: Any) -> dict[str, Any]:
    async with client(**fields) as http:
        return (await http.get("/openapi.json")).json()


@pytest.mark.parametrize(
    ("admin", "routes"), [(None, ROUTES), (FakeAdmin(), (*ROUTES, *ADMIN_ROUTES))]
)
async def test_it_lists_every_route(admin: FakeAdmin | None, routes: tuple[Route, ...]) -> None:
    """A: each route with its structs, and nothing else."""
    paths = (await document(admin=admin))["paths"]
    expected = {(route.path.replace(":path", ""), route.method.lower()) for route in routes}
    assert {(path, method) for path in paths for method in paths[path]} == expected
    operations = [operation for methods in paths.values() for operation in methods.values()]
    assert len({one["operationId"] for one in operations}) == len(routes)
    assert all(one["summary"] for one in operations)


async def test_the_admin_routes_are_described() -> None:
    """A: their parameters, the fields they take, and the events they tell."""
    spec = await document(admin=FakeAdmin())
    paths, schemas = spec["paths"], spec["components"]["schemas"]
    assert paths["/admin/plan"]["get"]["parameters"][0]["in"] == "query"
    assert paths["/admin/models/{name}"]["get"]["parameters"][0]["name"] == "name"
    assert schemas["PinRequest"]["additionalProperties"] is False
    assert schemas["PinRequest"]["required"] == ["model"]
    told = paths["/admin/events"]["get"]["responses"]["200"]["content"]
    assert list(told) == ["text/event-stream"]
    data = told["text/event-stream"]["itemSchema"]["properties"]["data"]
    assert data["contentSchema"] == {"$ref": "#/components/schemas/PoolEvent"}


async def test_it_names_every_field_and_limit() -> None:
    """A: schemas come from the structs that decode, and so do limits."""
    spec = await document()
    schemas = spec["components"]["schemas"]
    properties = schemas["ChatRequest"]["properties"]
    assert set(properties) == set(ChatRequest.__struct_fields__)
    assert properties["messages"]["maxItems"] == limits.MAX_MESSAGES
    assert {"maximum": 2, "minimum": 0}.items() <= properties["temperature"]["anyOf"][0].items()
    prompt = schemas["CompletionRequest"]["properties"]["prompt"]["anyOf"]
    most = limits.MAX_PROMPTS
    assert [one.get("maxItems") for one in prompt] == [None, None, most, most]
    names = msgspec.json.encode(spec).decode().split("#/components/schemas/")[1:]
    assert {name.split('"')[0] for name in names} <= set(schemas)


async def test_keys_are_told() -> None:
    """A: with keys, the document says that one is needed."""
    keys = ("sha256:" + "0" * 64,)
    for limited in (ApiSettings(api_keys=keys), ApiSettings(admin_keys=keys)):
        assert describe(ROUTES, limited)["security"] == [{"key": []}]
    assert (await document())["security"] == []


@each(ROUTES)
def test_fuzz(route: Route) -> None:
    """A: whatever the document allows is answered as it says; nothing is a 5xx."""

    def test(case: schemathesis.Case) -> None:
        # Some fields exclude or need one another, which the document does not say.
        case.call_and_validate(excluded_checks=[positive_data_acceptance])

    check(SCHEMA, route, LIMITS, test)
