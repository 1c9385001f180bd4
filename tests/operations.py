"""The operations of openapi.json as parameters of tests; schemathesis makes their requests.

schemathesis' own `parametrize` gives all of a test's items one name, of which pytest-xdist runs
one, and makes the requests of tests that are left out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import schemathesis
from hypothesis import given
from schemathesis import Case, GenerationMode
from schemathesis.schemas import BaseSchema

from headrace.api.exchange import Route
from headrace.api.limits import ApiSettings
from headrace.api.openapi import document

Parametrize = Callable[[Callable[..., Any]], Callable[..., Any]]


def described(routes: tuple[Route, ...]) -> BaseSchema:
    return schemathesis.openapi.from_dict(document(routes, ApiSettings()))


def each(routes: tuple[Route, ...]) -> Parametrize:
    """Run a test once for each route."""
    names = [f"{route.method} {route.path}" for route in routes]
    return pytest.mark.parametrize("route", routes, ids=names)


def takes_something(schema: BaseSchema, route: Route) -> bool:
    """Whether requests have parameters or a body: otherwise none can be wrong."""
    operation = schema[route.path.replace(":path", "")][route.method]
    return any(True for _ in operation.iter_parameters()) or any(True for _ in operation.body)


def check(
    schema: BaseSchema,
    route: Route,
    how: Callable[[Callable[..., None]], Callable[..., None]],
    test: Callable[[Case], None],
    mode: GenerationMode = GenerationMode.POSITIVE,
) -> None:
    """Try requests to a route.

    Args:
        how: Settings of hypothesis.
        mode: Whether the requests are what the schema allows.
    """
    operation = schema[route.path.replace(":path", "")][route.method]
    how(given(case=operation.as_strategy(mode))(lambda case: test(case)))()
