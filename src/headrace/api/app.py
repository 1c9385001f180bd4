"""The HTTP surface over any Backend."""

from __future__ import annotations

from collections.abc import Callable

from fastapi import FastAPI, Request, Response
from starlette import routing
from starlette.exceptions import HTTPException

from headrace.api import problems
from headrace.api.chat import chat_completions
from headrace.api.completions import completions
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
) -> FastAPI:
    """Build the ASGI application. `ready` tells whether requests would be answered now.

    Without `ready`, it is when every model of the backend is. The backend is not closed here.
    """
    service = Service(backend, settings, ready)
    app = FastAPI(title="Headrace", docs_url="/docs", redoc_url=None, redirect_slashes=False)
    for route in ROUTES:
        endpoint = Endpoint(route, service)
        app.router.routes.append(
            routing.Route(route.path, endpoint, methods=[route.method], include_in_schema=False)
        )
    app.add_exception_handler(HTTPException, _routing_problem)
    app.add_middleware(Gate, settings=settings)
    schema = document(ROUTES, settings)
    app.openapi = lambda: schema
    return app


async def _routing_problem(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    problem = problems.routing(error, request.method, request.url.path)
    headers = {name.decode(): value.decode() for name, value in problem.headers}
    return Response(problem.body(), problem.status, headers, "application/json")
