"""/admin: what is loaded, and how that is changed. Also what others call the same."""

from __future__ import annotations

from datetime import UTC, datetime
from functools import partial
from urllib.parse import parse_qs

import msgspec

from headrace.api.endpoint import Route
from headrace.api.exchange import Exchange, Service
from headrace.api.watch import send_events
from headrace.api.wire_admin import (
    LoadRequest,
    ModelRequest,
    PinRequest,
    RunningModel,
    RunningModels,
    Success,
    UpdateRequest,
)
from headrace.core.backend import Admin
from headrace.core.errors import InvalidRequest, UnknownModel, Unsupported
from headrace.core.record import Activity
from headrace.core.status import ModelStatus, Plan, PoolEvent, PoolStatus, Reloaded

_MODEL = msgspec.json.Decoder(ModelRequest)
_LOAD = msgspec.json.Decoder(LoadRequest)
_PIN = msgspec.json.Decoder(PinRequest)
_UPDATE = msgspec.json.Decoder(UpdateRequest)
_LONGEST_REFERENCE = 512


async def show_all(service: Service, exchange: Exchange) -> None:
    """Tell how all models and devices stand."""
    await _reply(exchange, _admin(service).status())


async def show_one(service: Service, exchange: Exchange) -> None:
    """Tell how one model stands."""
    name: str = exchange.scope["path_params"]["name"]
    for status in _admin(service).status().models:
        if name == status.id or name in status.aliases:
            await _reply(exchange, status)
            return
    raise UnknownModel("No model of this name is served here.")


# Whoever orders a change may leave: it is made all the same, and nobody reads the answer.


async def load(service: Service, exchange: Exchange) -> None:
    """Load a model and wait for it; one that is not served yet is added."""
    await _reply(exchange, await _load(service, exchange))


async def unload(service: Service, exchange: Exchange) -> None:
    """Unload a model and wait until its memory is back."""
    await _reply(exchange, await _unload(service, exchange))


async def restart(service: Service, exchange: Exchange) -> None:
    """Unload a model and load it again; also resets one that has failed."""
    wire = await exchange.read(_MODEL)
    await _reply(exchange, await _admin(service).restart(wire.model))


async def pin(service: Service, exchange: Exchange) -> None:
    """Keep a model loaded whatever else needs memory, or no longer."""
    wire = await exchange.read(_PIN)
    await _reply(exchange, await _admin(service).update(wire.model, {"pinned": wire.pinned}))


async def update(service: Service, exchange: Exchange) -> None:
    """Change settings of a model; no request fails for it."""
    wire = await exchange.read(_UPDATE)
    await _reply(exchange, await _admin(service).update(wire.model, wire.settings))


async def plan(service: Service, exchange: Exchange) -> None:
    """Tell what loading a model would need and do."""
    given = parse_qs(exchange.scope.get("query_string", b"").decode("latin-1")).get("model", [])
    if len(given) != 1 or len(given[0]) > _LONGEST_REFERENCE:
        raise InvalidRequest("Name one model: ?model=NAME.", param="model")
    await _reply(exchange, await exchange.unless_gone(_admin(service).plan(given[0])))


async def reload(service: Service, exchange: Exchange) -> None:
    """Read the configuration again and apply what has changed."""
    await _reply(exchange, await _admin(service).reload())


async def events(service: Service, exchange: Exchange) -> None:
    """Tell what happens to the models from now on, as server-sent events."""
    await exchange.unless_gone(send_events(exchange, _admin(service).events()))


async def activity(service: Service, exchange: Exchange) -> None:
    """Tell what runs now, and how each model has done during the last minute."""
    if service.observer is None:
        raise Unsupported("This service does not observe its requests.")
    await _reply(exchange, service.observer.activity())


async def load_as_llama_server(service: Service, exchange: Exchange) -> None:
    """Load a model, as llama-server does it."""
    await _load(service, exchange)
    await _reply(exchange, Success())


async def unload_as_llama_server(service: Service, exchange: Exchange) -> None:
    """Unload a model, as llama-server does it."""
    await _unload(service, exchange)
    await _reply(exchange, Success())


async def ps_as_ollama(service: Service, exchange: Exchange) -> None:
    """List what is loaded, as Ollama does it."""
    models = _admin(service).status().models
    running = [_running(one) for one in models if one.memory or one.state == "ready"]
    await _reply(exchange, RunningModels(running))


_route = partial(Route, admin=True)
ROUTES = (
    _route("GET", "/admin/models", show_all, PoolStatus),
    _route("POST", "/admin/models/load", load, ModelStatus, LoadRequest),
    _route("POST", "/admin/models/unload", unload, ModelStatus, ModelRequest),
    _route("POST", "/admin/models/restart", restart, ModelStatus, ModelRequest),
    _route("POST", "/admin/models/pin", pin, ModelStatus, PinRequest),
    _route("POST", "/admin/models/update", update, ModelStatus, UpdateRequest),
    _route("GET", "/admin/models/{name:path}", show_one, ModelStatus),
    _route("GET", "/admin/plan", plan, Plan, query=("model",)),
    _route("POST", "/admin/reload", reload, Reloaded),
    _route("GET", "/admin/events", events, None, chunk=PoolEvent),
    _route("GET", "/admin/activity", activity, Activity),
    _route("POST", "/models/load", load_as_llama_server, Success, LoadRequest),
    _route("POST", "/models/unload", unload_as_llama_server, Success, ModelRequest),
    _route("GET", "/api/ps", ps_as_ollama, RunningModels),
)


def _admin(service: Service) -> Admin:
    assert service.admin is not None
    return service.admin


async def _load(service: Service, exchange: Exchange) -> ModelStatus:
    wire = await exchange.read(_LOAD)
    return await _admin(service).load(wire.model, wire.settings)


async def _unload(service: Service, exchange: Exchange) -> ModelStatus:
    wire = await exchange.read(_MODEL)
    return await _admin(service).unload(wire.model)


async def _reply(exchange: Exchange, answer: msgspec.Struct) -> None:
    await exchange.reply(msgspec.json.encode(answer))


def _running(status: ModelStatus) -> RunningModel:
    size, until = sum(status.memory.values()), status.until
    return RunningModel(
        name=status.id,
        model=status.id,
        size=size,
        size_vram=size - status.memory.get("cpu", 0),
        expires_at=None if until is None else datetime.fromtimestamp(until, UTC).isoformat(),
        context_length=status.context_length,
    )
