"""The HTTP surface over any Backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import BaseRoute
from starlette.routing import Route as Path

from headrace.api import admin as administration
from headrace.api import problems
from headrace.api.chat import chat_completions
from headrace.api.completions import completions
from headrace.api.docs import page
from headrace.api.embeddings import embeddings
from headrace.api.endpoint import Endpoint, Route
from headrace.api.exchange import Service
from headrace.api.gate import Gate
from headrace.api.health import live, ready
from headrace.api.metrics import METRICS
from headrace.api.models import list_models, show_model
from headrace.api.openapi import document
from headrace.api.rerank import rerank
from headrace.api.settings import ApiSettings
from headrace.api.tokens import detokenize, tokenize
from headrace.api.wire_chat import ChatChunk, ChatCompletion, ChatRequest
from headrace.api.wire_completions import Completion, CompletionChunk, CompletionRequest
from headrace.api.wire_embeddings import EmbeddingList, EmbeddingRequest
from headrace.api.wire_models import Health, ModelCard, ModelList
from headrace.api.wire_rerank import Ranking, RankRequest
from headrace.api.wire_tokens import DetokenizeRequest, Text, TokenizeRequest, Tokens
from headrace.core.backend import Admin, Backend
from headrace.core.record import Observer

_LIVE = Route("GET", "/health/live", live, Health)
ROUTES = (
    Route("GET", "/v1/models", list_models, ModelList),
    Route("GET", "/v1/models/{model_id:path}", show_model, ModelCard),
    Route("POST", "/v1/chat/completions", chat_completions, ChatCompletion, ChatRequest, ChatChunk),
    Route("POST", "/v1/completions", completions, Completion, CompletionRequest, CompletionChunk),
    Route("POST", "/v1/embeddings", embeddings, EmbeddingList, EmbeddingRequest),
    Route("POST", "/embeddings", embeddings, EmbeddingList, EmbeddingRequest),
    Route("POST", "/v1/rerank", rerank, Ranking, RankRequest),
    Route("POST", "/v2/rerank", rerank, Ranking, RankRequest),
    Route("POST", "/rerank", rerank, Ranking, RankRequest),
    Route("POST", "/tokenize", tokenize, Tokens, TokenizeRequest),
    Route("POST", "/detokenize", detokenize, Text, DetokenizeRequest),
    _LIVE,
    Route("GET", "/health/ready", ready, Health, unready=True),
    Route("GET", "/health", ready, Health, unready=True),
)


class Application(Starlette):
    """The ASGI application of one service."""

    def __init__(
        self, service: Service, routes: Sequence[Route], more: Sequence[BaseRoute] = ()
    ) -> None:
        served = [Path(one.path, Endpoint(one, service), methods=[one.method]) for one in routes]
        super().__init__(
            routes=[*served, *more],
            exception_handlers={HTTPException: _routing_problem},
            middleware=[Middleware(Gate, service=service)],
        )
        self.router.redirect_slashes = False
        self._service = service

    def replace_settings(self, settings: ApiSettings) -> None:
        """Serve what comes from now on by other settings; what has begun keeps its own."""
        self._service.settings = settings

    def metrics_alone(self) -> Application:
        """Return an application of /metrics and /health/live, of the same service and settings."""
        return Application(self._service, (METRICS, _LIVE))


def create_app(
    backend: Backend,
    settings: ApiSettings,
    *,
    ready: Callable[[], bool] | None = None,
    admin: Admin | None = None,
    observer: Observer | None = None,
    metrics: bool = True,
) -> Application:
    """Build the ASGI application. `ready` tells whether requests would be answered now.

    Without `ready`, it is when every model of the backend is, or with `admin` when one is or can
    be loaded. With `admin` models can be managed. The backend is not closed here. `observer` is
    told of every request and tells at /metrics, unless `metrics` is false.
    """
    routes = (*ROUTES, *administration.ROUTES) if admin else ROUTES
    if observer is not None and metrics:
        routes = (*routes, METRICS)
    service = Service(backend, settings, ready, admin, observer)
    return Application(service, routes, _descriptions(routes, service))


def _descriptions(routes: Sequence[Route], service: Service) -> list[BaseRoute]:
    @lru_cache(maxsize=1)
    def written(settings: ApiSettings) -> tuple[bytes, str]:
        schema = document(routes, settings)
        return msgspec.json.encode(schema), page(schema)

    async def openapi(request: Request) -> Response:
        return Response(written(service.settings)[0], media_type="application/json")

    async def docs(request: Request) -> Response:
        return HTMLResponse(written(service.settings)[1])

    return [Path("/openapi.json", openapi), Path("/docs", docs)]


async def _routing_problem(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    problem = problems.routing(error, request.method, request.url.path)
    headers = {name.decode(): value.decode() for name, value in problem.headers}
    return Response(problem.body(), problem.status, headers, "application/json")
