"""GET /v1/models and /v1/models/{id}; an id may contain slashes."""

from __future__ import annotations

import msgspec

from headrace.api.exchange import Exchange, Service
from headrace.api.wire_models import ModelCard, ModelList
from headrace.core.errors import UnknownModel
from headrace.core.model import ModelInfo


async def list_models(service: Service, exchange: Exchange) -> None:
    """List what is served."""
    cards = [_card(info) for info in service.backend.models()]
    await exchange.reply(msgspec.json.encode(ModelList(data=cards)))


async def show_model(service: Service, exchange: Exchange) -> None:
    """Show one model, asked for by its id or an alias."""
    name: str = exchange.scope["path_params"]["model_id"]
    for info in service.backend.models():
        if name == info.id or name in info.aliases:
            await exchange.reply(msgspec.json.encode(_card(info)))
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
