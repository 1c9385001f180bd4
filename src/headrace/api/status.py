"""GET /v1/models, /health* and /metrics: which models are served, and in which state."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import Literal

import msgspec
from msgspec.structs import replace

from headrace.api.anthropic_models import ModelAbilities, abilities
from headrace.api.exchange import Call, Exchange, Service
from headrace.core.errors import HeadraceError, UnknownModel
from headrace.core.model import ModelInfo, State

_LOADABLE: frozenset[State] = frozenset({"ready", "created", "stopped"})


class ModelCard(msgspec.Struct, frozen=True, kw_only=True):
    """A model; requests name it by its `id` or an alias.

    `base` is the model that answers, if this is a name with a preset or an adapter of its own, and
    `adapter` whether it has one. `root` and `parent` are vLLM's fields: where the model or the
    adapter is from, of a file its name, and the model that the adapter changes.
    `slots` is how many requests it runs at a time, once that is known. `prompts` are the names that
    `prompt_name` takes, of models that make embeddings.
    `type`, `display_name`, `created_at`, `max_input_tokens` and `lifecycle` are Anthropic's fields;
    to a request with the header `anthropic-version`, `capabilities` are in its form too.
    """

    id: str
    object: Literal["model"] = "model"
    type: Literal["model"] = "model"
    display_name: str
    created: int
    created_at: str
    lifecycle: Literal["active"] = "active"
    max_input_tokens: int | None
    owned_by: str = "headrace"
    aliases: list[str]
    engine: str
    state: str
    tasks: list[str]
    capabilities: list[str] | ModelAbilities
    context_length: int | None
    slots: int | None
    parameters: int | None
    quantization: str | None
    tools: str
    thinking: str
    tool_format: str | None
    prompts: list[str]
    base: str | None
    adapter: bool
    root: str
    parent: str | None


class ModelList(msgspec.Struct, frozen=True, kw_only=True):
    """All models that are served, on one page."""

    object: Literal["list"] = "list"
    data: list[ModelCard]
    has_more: Literal[False] = False
    first_id: str | None
    last_id: str | None


async def described(service: Service, call: Call, name: str = "") -> Sequence[ModelInfo]:
    """Return the models of a call, those that are not loaded with what their files say.

    With a name only the file of that model is read; one that cannot be read says nothing.
    """
    read, models = service.describe, service.models(call)
    for info in models if read is not None else ():
        is_wanted = not name or name == info.id or name in info.aliases
        if read is not None and is_wanted and info.format == "none" and info.state != "ready":
            with suppress(HeadraceError):
                await read(info.id)
    return service.models(call)


async def list_models(service: Service, exchange: Exchange) -> None:
    """List the models that are served."""
    more = exchange.settings.list_aliases
    card = _anthropic_card if _is_anthropic(exchange) else _card
    cards = [
        card(info, name)
        for info in service.models(exchange.call)
        for name in (info.id, *(info.aliases if more else ()))
    ]
    first, last = (cards[0].id, cards[-1].id) if cards else (None, None)
    await exchange.answer(ModelList(data=cards, first_id=first, last_id=last))


async def show_model(service: Service, exchange: Exchange) -> None:
    """Show one model, by its id or an alias."""
    name: str = exchange.scope["path_params"]["model_id"]
    for info in service.models(exchange.call):
        if name in (info.id, *info.aliases):
            card = _anthropic_card if _is_anthropic(exchange) else _card
            await exchange.answer(card(info, info.id))
            return
    raise UnknownModel("No model of this name is served here.")


def _is_anthropic(exchange: Exchange) -> bool:
    return any(name == b"anthropic-version" for name, _ in exchange.scope["headers"])


def _anthropic_card(info: ModelInfo, name: str) -> ModelCard:
    return replace(_card(info, name), capabilities=abilities(info.capabilities))


def _card(info: ModelInfo, name: str) -> ModelCard:
    return ModelCard(
        id=name,
        display_name=name,
        created=info.created,
        created_at=datetime.fromtimestamp(info.created, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        max_input_tokens=info.context_length,
        aliases=list(info.aliases),
        engine=info.engine,
        state=info.state,
        tasks=sorted(info.capabilities.tasks),
        capabilities=info.capabilities.names,
        context_length=info.context_length,
        slots=info.max_running,
        parameters=info.parameters,
        quantization=info.quantization,
        tools=info.capabilities.tools,
        thinking=info.capabilities.thinking,
        tool_format=info.tool_format.get("tool calls", "").partition(":")[0] or None,
        prompts=sorted(info.prompts),
        base=info.base,
        adapter=info.adapter is not None,
        root=_root(info.adapter or info.source),
        parent=info.base if info.adapter else None,
    )


def _root(reference: str) -> str:
    """Return a reference without the folders of this machine."""
    return reference.rpartition("/")[2] if reference.startswith(("/", ".", "~")) else reference


class Health(msgspec.Struct, frozen=True):
    """`ok`, or the state of a model that is not ready."""

    status: str


async def live(_service: Service, exchange: Exchange) -> None:
    """Confirm that the process is alive."""
    await exchange.answer(Health("ok"))


async def ready(service: Service, exchange: Exchange) -> None:
    """Report whether requests would be served; 503 with the state when they would not."""
    states: list[State] = [info.state for info in service.backend.models()]
    if _is_ready(service, states):
        await exchange.answer(Health("ok"))
        return
    # Last the models that are only not loaded, which is no fault.
    waiting = sorted((state for state in states if state != "ready"), key=_LOADABLE.__contains__)
    await exchange.answer(Health(waiting[0] if waiting else "not ready"), status=503)


async def metrics(service: Service, exchange: Exchange) -> None:
    """Return all figures in Prometheus' format, or in OpenMetrics' if that is accepted."""
    assert service.observer is not None
    accept = dict(exchange.scope["headers"]).get(b"accept", b"").decode("latin-1")
    # In a thread: the time grows with the number of series.
    body, kind = await asyncio.to_thread(service.observer.exposition, accept)
    await exchange.reply(body, kind=kind.encode())


def _is_ready(service: Service, states: Sequence[State]) -> bool:
    if service.ready:
        return service.ready()
    if service.admin is None:
        return bool(states) and set(states) == {"ready"}
    # A pool loads a model when it is requested.
    return any(
        model.state == "ready" or (model.enabled and model.state in _LOADABLE)
        for model in service.admin.status().models
    )
