"""The HTTP surface over any Backend."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import BaseRoute
from starlette.routing import Route as Path

from headrace.api import problems
from headrace.api.chat import chat_completions
from headrace.api.completions import completions
from headrace.api.docs import page
from headrace.api.endpoint import Endpoint, Route
from headrace.api.exchange import Service
from headrace.api.gate import Gate
from headrace.api.health import live, ready
from headrace.api.models import list_models, show_model
from headrace.api.openapi import document
from headrace.api.settings import ApiSettings
from headrace.api.tokens import detokenize, tokenize
from headrace.api.wire_chat import ChatChunk, ChatCompletion, ChatRequest
from headrace.api.wire_completions import Completion, CompletionChunk, CompletionRequest
from headrace.api.wire_models import Health, ModelCard, ModelList
from headrace.api.wire_tokens import DetokenizeRequest, Text, TokenizeRequest, Tokens
from headrace.core.backend import Backend

ROUTES = (
    Route("GET", "/v1/models", list_models, ModelList),
    Route("GET", "/v1/models/{model_id:path}", show_model, ModelCard),
    Route("POST", "/v1/chat/completions", chat_completions, ChatCompletion, ChatRequest, ChatChunk),
    Route("POST", "/v1/completions", completions, Completion, CompletionRequest, CompletionChunk),
    Route("POST", "/tokenize", tokenize, Tokens, TokenizeRequest),
    Route("POST", "/detokenize", detokenize, Text, DetokenizeRequest),
    Route("GET", "/health/live", live, Health),
    Route("GET", "/health/ready", ready, Health, unready=True),
    Route("GET", "/health", ready, Health, unready=True),
)


def create_app(
    backend: Backend, settings: ApiSettings, *, ready: Callable[[], bool] | None = None
) -> Starlette:
    """Build the ASGI application. `ready` tells whether requests would be answered now.

    Without `ready`, it is when every model of the backend is. The backend is not closed here.
    """
    service = Service(backend, settings, ready)
    served: list[BaseRoute] = [
        Path(route.path, Endpoint(route, service), methods=[route.method]) for route in ROUTES
    ]
    app = Starlette(
        routes=[*served, *_descriptions(settings)],
        exception_handlers={HTTPException: _routing_problem},
        middleware=[Middleware(Gate, settings=settings)],
    )
    app.router.redirect_slashes = False
    return app


def _descriptions(settings: ApiSettings) -> list[BaseRoute]:
    schema = document(ROUTES, settings)
    as_json, as_page = msgspec.json.encode(schema), page(schema)

    async def openapi(request: Request) -> Response:
        return Response(as_json, media_type="application/json")

    async def docs(request: Request) -> Response:
        return HTMLResponse(as_page)

    return [Path("/openapi.json", openapi), Path("/docs", docs)]


async def _routing_problem(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    problem = problems.routing(error, request.method, request.url.path)
    headers = {name.decode(): value.decode() for name, value in problem.headers}
    return Response(problem.body(), problem.status, headers, "application/json")
