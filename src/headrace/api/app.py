"""The HTTP surface over any Backend: the table of its routes, and the application of a service."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.exceptions import ExceptionMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute
from starlette.routing import Route as Path
from starlette.types import ASGIApp, Receive, Scope, Send

from headrace.api import adapters, pages, problems, records
from headrace.api import admin as manage
from headrace.api import keys as keys_admin
from headrace.api import overview as current
from headrace.api.anthropic import (
    MessageTokens,
    count_tokens,
    create_message,
)
from headrace.api.anthropic_answer import MessageBody, MessageEvent
from headrace.api.anthropic_request import CountTokensRequest, MessagesRequest
from headrace.api.batch.keeper import Batches
from headrace.api.batch.routes import BatchRoutes
from headrace.api.batch.store import Store
from headrace.api.bodies import ClientGone
from headrace.api.chat import ChatChunk, ChatCompletion, ChatRequest, chat_completions
from headrace.api.completions import (
    Completion,
    CompletionChunk,
    CompletionRequest,
    completions,
)
from headrace.api.dbgpt import dbgpt_routes
from headrace.api.dbgpt.cluster import Cluster
from headrace.api.edge import METRICS_PATH, Edge, check_admin
from headrace.api.embeddings import EmbeddingList, EmbeddingRequest, embeddings
from headrace.api.exchange import Exchange, Route, Service
from headrace.api.limits import ApiSettings
from headrace.api.llama_server import LLAMA_ROUTES
from headrace.api.metered import Metered
from headrace.api.ollama import OLLAMA_ADMIN_ROUTES, OLLAMA_ROUTES
from headrace.api.openapi import document
from headrace.api.rerank import (
    RankedText,
    Ranking,
    RankRequest,
    Relevance,
    RelevanceRequest,
    relevance,
    rerank,
)
from headrace.api.responses import InputTokens, input_tokens, responses
from headrace.api.responses_body import ResponseBody, ResponseEvent
from headrace.api.responses_request import ResponsesRequest
from headrace.api.score import ScoreBody, ScoreList, score
from headrace.api.status import (
    Health,
    ModelCard,
    ModelList,
    list_models,
    live,
    metrics,
    ready,
    show_model,
)
from headrace.api.tokens import (
    DetokenizeRequest,
    Text,
    TokenizeRequest,
    Tokens,
    detokenize,
    tokenize,
)
from headrace.core.backend import Admin, Backend, ClusterAdmin
from headrace.core.errors import ConfigError, InvalidRequest
from headrace.core.keys import Key, KeyChange, KeyStore, NewKey
from headrace.core.library import LibraryFilter
from headrace.core.record import Activity, History, Monitor, RequestRecord
from headrace.core.status import ModelStatus, NodeStatus, Plan, PoolEvent, PoolStatus, Reloaded

_HOME = Route("GET", "/", pages.home, None, texts=("text/html", "text/plain"))
_LIVE = Route("GET", "/health/live", live, Health)
ROUTES = (
    Route("GET", "/v1/models", list_models, ModelList),
    Route("GET", "/v1/models/{model_id:path}", show_model, ModelCard),
    Route("POST", "/v1/chat/completions", chat_completions, ChatCompletion, ChatRequest, ChatChunk),
    Route("POST", "/v1/completions", completions, Completion, CompletionRequest, CompletionChunk),
    Route(
        "POST",
        "/v1/responses",
        responses,
        ResponseBody,
        ResponsesRequest,
        ResponseEvent,
        named=True,
    ),
    Route("POST", "/v1/responses/input_tokens", input_tokens, InputTokens, ResponsesRequest),
    Route(
        "POST",
        "/v1/messages",
        create_message,
        MessageBody,
        MessagesRequest,
        MessageEvent,
        named=True,
    ),
    Route("POST", "/v1/messages/count_tokens", count_tokens, MessageTokens, CountTokensRequest),
    Route("POST", "/v1/embeddings", embeddings, EmbeddingList, EmbeddingRequest),
    Route("POST", "/embeddings", embeddings, EmbeddingList, EmbeddingRequest),
    *(
        Route("POST", path, rerank, Ranking | list[RankedText], RankRequest)
        for path in ("/v1/rerank", "/v2/rerank", "/rerank", "/v1/reranking", "/reranking")
    ),
    Route("POST", "/v1/beta/relevance", relevance, Relevance, RelevanceRequest),
    Route("POST", "/v1/score", score, ScoreList, ScoreBody),
    Route("POST", "/score", score, ScoreList, ScoreBody),
    _HOME,
    *OLLAMA_ROUTES,
    *LLAMA_ROUTES,
    Route("POST", "/tokenize", tokenize, Tokens, TokenizeRequest),
    Route("POST", "/detokenize", detokenize, Text, DetokenizeRequest),
    _LIVE,
    Route("GET", "/health/ready", ready, Health, unready=True),
    Route("GET", "/health", ready, Health, unready=True),
)

_admin = partial(Route, admin=True)
ADMIN_ROUTES = (
    _admin("GET", "/admin/models", manage.show_all, PoolStatus),
    _admin("POST", "/admin/models/load", manage.load, ModelStatus, manage.LoadRequest),
    _admin("POST", "/admin/models/unload", manage.unload, ModelStatus, manage.ModelRequest),
    _admin("POST", "/admin/models/restart", manage.restart, ModelStatus, manage.ModelRequest),
    _admin("POST", "/admin/models/pin", manage.pin, ModelStatus, manage.PinRequest),
    _admin("POST", "/admin/models/update", manage.update, ModelStatus, manage.UpdateRequest),
    _admin("GET", "/admin/models/{name:path}/adapters", adapters.show, adapters.AdapterList),
    _admin(
        "POST",
        "/admin/models/{name:path}/adapters",
        adapters.add,
        ModelStatus,
        adapters.AdapterRequest,
    ),
    _admin(
        "DELETE",
        "/admin/models/{name:path}/adapters/{adapter:path}",
        adapters.remove,
        ModelStatus,
    ),
    _admin("GET", "/admin/models/{name:path}", manage.show_one, ModelStatus),
    _admin("GET", "/admin/plan", manage.plan, Plan, query=manage.ModelRequest),
    _admin("GET", "/admin/store", manage.stored, manage.StoredModels),
    _admin("GET", "/admin/measurements", manage.measurements, manage.Measurements),
    _admin("GET", "/admin/library", manage.library, manage.Library, query=LibraryFilter),
    _admin("POST", "/admin/reload", manage.reload, Reloaded),
    _admin("GET", "/admin/events", manage.events, None, chunk=PoolEvent),
    _admin("GET", "/admin/activity", manage.activity, Activity),
    _admin("GET", "/admin/overview", current.overview, current.Overview),
    _admin("GET", "/admin/history", current.history, History),
    _admin("GET", "/admin/traces", records.traces, records.TraceList, query=records.TraceQuery),
    _admin("GET", "/admin/traces/{id}", records.trace, RequestRecord),
    _admin("GET", "/admin/usage", records.usage, records.UsageReport, query=records.UsageQuery),
    _admin("POST", "/models/load", manage.load_as_llama_server, manage.Success, manage.LoadRequest),
    _admin(
        "POST", "/models/unload", manage.unload_as_llama_server, manage.Success, manage.ModelRequest
    ),
    *(
        _admin("POST", f"/v1/{action}_lora_adapter", handler, None, body, texts=("text/plain",))
        for action, handler, body in (
            ("load", adapters.load_as_vllm, adapters.LoadLoraRequest),
            ("unload", adapters.unload_as_vllm, adapters.UnloadLoraRequest),
        )
    ),
    *OLLAMA_ADMIN_ROUTES,
)

KEY_ROUTES = (
    _admin("GET", "/admin/keys", keys_admin.show_all, keys_admin.KeyList),
    _admin("POST", "/admin/keys", keys_admin.create, keys_admin.CreatedKey, NewKey),
    _admin("POST", "/admin/keys/{id}", keys_admin.change, Key, KeyChange),
    _admin("DELETE", "/admin/keys/{id}", keys_admin.revoke, Key),
)

CLUSTER_ROUTES = (
    _admin("POST", "/admin/nodes/drain", manage.drain, NodeStatus, manage.DrainRequest),
)

_PAGES = (
    Route("GET", "/docs", pages.docs, None),
    Route("GET", "/console/{name}", pages.file, None),
)
_METRICS = Route(
    "GET", METRICS_PATH, metrics, None, texts=("text/plain", "application/openmetrics-text")
)


class Application(Starlette):
    """The ASGI application of one service; `batches` are those that it keeps, if it does."""

    batches: Batches | None = None

    def __init__(
        self, service: Service, routes: Sequence[Route], more: Sequence[BaseRoute] = ()
    ) -> None:
        served = [
            Path(route.path, _Endpoint(route, service), methods=[route.method]) for route in routes
        ]
        super().__init__(
            routes=[*served, *more],
            exception_handlers={HTTPException: _routing_problem},
        )
        self.router.redirect_slashes = False
        self._service = service

    def build_middleware_stack(self) -> ASGIApp:
        """Return the Edge around the routes (called by Starlette).

        Starlette's own outermost layer is left out: the Edge answers every error, and each layer
        that wraps `send` costs every event of a stream a coroutine.
        """
        routes = ExceptionMiddleware(self.router, self.exception_handlers)
        return Edge(routes, self._service)

    def replace_settings(self, settings: ApiSettings) -> None:
        """Use other settings for later requests; those that have begun keep theirs."""
        self._service.settings = settings

    def dbgpt_worker(self, cluster: Cluster, settings: ApiSettings) -> Application:
        """Return an application of the routes for a DB-GPT cluster, with settings of its own."""
        return Application(
            replace(self._service, settings=settings), (*dbgpt_routes(cluster), _LIVE)
        )

    def metrics_alone(self) -> Application:
        """Return an application of /metrics and /health/live, of the same service and settings."""
        return Application(self._service, (_METRICS, _LIVE))


class FrontApplication:
    """The ASGI application of a process that has connections and no models.

    It answers what a Backend answers, and what is refused before it is read; all other requests go
    to `rest`. Where keys are in a database, which the other process has, those for models do too.
    """

    def __init__(self, service: Service, rest: ASGIApp) -> None:
        routes = [route for route in ROUTES if route.request is not None]
        self._paths = frozenset(route.path for route in routes)
        self._service = service
        self._own = Application(service, routes)
        self._rest = rest
        self.replace_settings = self._own.replace_settings

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Serve a request."""
        is_own = scope["method"] == "POST" and scope["path"] in self._paths
        is_own = is_own and not self._service.settings.needs_key
        app = self._own if is_own or "headrace.refused" in scope else self._rest
        return app(scope, receive, send)


def create_app(  # noqa: PLR0913 - one for each part of a service
    backend: Backend,
    settings: ApiSettings,
    *,
    ready: Callable[[], bool] | None = None,
    admin: Admin | None = None,
    observer: Monitor | None = None,
    metrics: bool = True,
    batches: Store | str | None = None,
    keys: KeyStore | None = None,
) -> Application:
    """Build the ASGI application; the backend is not closed here.

    `ready` returns whether requests would be served now. Without it, the service is ready if all
    models are; with `admin`, by which models can be managed, if one is or can be loaded. `observer`
    records every request and answers at /metrics, unless `metrics` is false. `batches` are the
    files and batches, which run while `Application.batches.run()` does, or the reason why there are
    none. `keys` are those of a database, with their limits.
    """
    routes = (*ROUTES, *ADMIN_ROUTES) if admin else ROUTES
    if keys is not None:
        backend, routes = Metered(backend, keys), (*routes, *KEY_ROUTES)
    if isinstance(admin, ClusterAdmin):
        routes = (*routes, *CLUSTER_ROUTES)
    if observer is not None and metrics:
        routes = (*routes, _METRICS)
    describe = admin.describe if admin is not None else None
    unload = admin.unload if admin is not None else None
    called = observer.called if observer is not None else None
    service = Service(
        *(backend, settings, ready, admin, observer, describe, unload, called), keys=keys
    )
    keeper = Batches(batches, service) if isinstance(batches, Store) else None
    if batches is not None:
        routes = (*routes, *BatchRoutes(keeper, "" if keeper else str(batches)).routes())
    described = Path("/openapi.json", _description(routes, service))
    app = Application(service, (*routes, *_PAGES), [described])
    app.batches = keeper
    return app


class _Endpoint:
    """A route as an ASGI application: runs the handler, and reports its exceptions."""

    def __init__(self, route: Route, service: Service) -> None:
        self.path = route.path
        self._route = route
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange: Exchange = scope["headrace"]
        try:
            if self._route.admin:
                check_admin(scope, exchange.settings, is_admin=exchange.call.is_admin)
            await self._route.handler(self._service, exchange)
        except ClientGone:
            exchange.call.outcome = "cancelled"
        except Exception as error:
            # Any exception becomes a response, unless the headers have been sent.
            if exchange.call.status:
                raise
            if self._route.admin and isinstance(error, ConfigError):
                # The wrong setting is in the request, or in a file that it wants to be read.
                error = InvalidRequest(error.message, param=error.param)
            await exchange.fail(error)


def _description(routes: Sequence[Route], service: Service) -> Callable[[Request], Any]:
    @lru_cache(maxsize=1)
    def rendered(settings: ApiSettings) -> bytes:
        return msgspec.json.encode(document(routes, settings))

    async def openapi(request: Request) -> Response:
        return Response(rendered(service.settings), media_type="application/json")

    return openapi


async def _routing_problem(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    problem = problems.routing(error, request.method, request.url.path)
    headers = {name.decode(): value.decode() for name, value in problem.headers}
    exchange: Exchange = request.scope["headrace"]
    body = exchange.dialect.write(problem, exchange.call.id)
    return Response(body, problem.status, headers, "application/json")
