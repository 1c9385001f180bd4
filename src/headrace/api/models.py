"""GET /v1/models and /v1/models/{id}; an id may contain slashes."""

from __future__ import annotations

from typing import Literal

import msgspec

from headrace.api.exchange import Exchange, Service
from headrace.core.errors import UnknownModel
from headrace.core.model import ModelInfo


class ModelCard(msgspec.Struct, frozen=True, kw_only=True):
    """A model that requests name by its `id` or an alias."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "headrace"
    aliases: list[str]
    engine: str
    state: str
    tasks: list[str]
    context_length: int | None
    parameters: int | None
    quantization: str | None


class ModelList(msgspec.Struct, frozen=True, kw_only=True):
    """Every model that is served."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


async def list_models(service: Service, exchange: Exchange) -> None:
    """List what is served."""
    await exchange.answer(ModelList(data=[_card(info) for info in service.backend.models()]))


async def show_model(service: Service, exchange: Exchange) -> None:
    """Show one model, by its id or an alias."""
    name: str = exchange.scope["path_params"]["model_id"]
    for info in service.backend.models():
        if name == info.id or name in info.aliases:
            await exchange.answer(_card(info))
            return
    raise UnknownModel("No model of this name is served here.")


def _card(info: ModelInfo) -> ModelCard:
    return ModelCard(
        id=info.id,
        created=info.created,
        aliases=list(info.aliases),
        engine=info.engine,
        state=info.state,
        tasks=sorted(info.capabilities.tasks),
        context_length=info.context_length,
        parameters=info.parameters,
        quantization=info.quantization,
    )
