"""GET /props and POST /apply-template, as llama-server has them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar
from urllib.parse import parse_qs

import msgspec

from headrace.api import fields
from headrace.api.exchange import Exchange, Service
from headrace.api.fields import Body, Peers
from headrace.api.images import body_limit, held
from headrace.api.messages import (
    TEMPLATE_NAMES,
    Messages,
    Tools,
    image_urls,
    to_messages,
    to_template,
    to_tools,
)
from headrace.api.status import described
from headrace.api.wire import ModelName, envelope
from headrace.core import events
from headrace.core.errors import UnknownModel
from headrace.core.model import ModelInfo
from headrace.core.request import CountRequest
from headrace.core.stream import result


class Modalities(msgspec.Struct, frozen=True):
    """What a model takes beside text."""

    vision: bool
    audio: bool = False


class GenerationSettings(msgspec.Struct, frozen=True):
    """The context of a request, in tokens, and the parameters of the model's preset."""

    n_ctx: int
    params: dict[str, Any]


class Props(msgspec.Struct, frozen=True, kw_only=True):
    """A model; `total_slots` is how many requests run at once."""

    default_generation_settings: GenerationSettings
    total_slots: int
    model_alias: str
    model_path: str
    chat_template: str
    modalities: Modalities
    build_info: str
    is_sleeping: bool


class TemplateRequest(Body, frozen=True, kw_only=True):
    """A conversation as in a chat."""

    model: ModelName | None = None
    messages: Messages
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    tools: Tools | None = None

    peers: ClassVar[Peers] = fields.TEMPLATE


class Rendered(msgspec.Struct, frozen=True):
    """A conversation as the model's template writes it."""

    prompt: str


_DECODER = msgspec.json.Decoder(TemplateRequest)


async def props(service: Service, exchange: Exchange) -> None:
    """Describe a model, as llama-server does; `?model=` names it if there are several."""
    query = parse_qs(exchange.scope["query_string"].decode("latin-1"))
    name = query.get("model", [""])[0]
    await exchange.answer(_props(_model(await described(service, exchange.call, name), name)))


async def apply_template(service: Service, exchange: Exchange) -> None:
    """Return a conversation as the model's template writes it."""
    wire = await exchange.read(_DECODER, body_limit(service, exchange.settings))
    exchange.call.names = TEMPLATE_NAMES
    async with held(exchange, image_urls(wire.messages)) as translation:
        messages = await translation.run(lambda reader: to_messages(wire.messages, reader=reader))
    request = CountRequest(
        messages=messages,
        as_text=True,
        tools=to_tools(wire.tools),
        **to_template(wire),
        **envelope(wire.model, exchange.settings, exchange.call),
    )
    text, _ = await exchange.unless_gone(result(service.backend.ask(request), events.Text))
    await exchange.answer(Rendered(text.text))


def _model(models: Sequence[ModelInfo], name: str) -> ModelInfo:
    """Return a model by name; without one, the first that is loaded, or the first at all."""
    if name:
        models = [info for info in models if name == info.id or name in info.aliases]
    if not models:
        raise UnknownModel("No model of this name is served here.")
    able = [info for info in models if "generate" in info.capabilities.tasks] or models
    return next((info for info in able if info.state == "ready"), able[0])


def _props(info: ModelInfo) -> Props:
    return Props(
        default_generation_settings=GenerationSettings(
            info.context_length or 0, info.preset.get("defaults", {})
        ),
        total_slots=info.max_running or 1,
        model_alias=info.id,
        # Paths of this machine are not shown.
        model_path=info.id,
        chat_template=info.chat_template or "",
        modalities=Modalities(info.capabilities.vision, info.capabilities.audio),
        build_info="headrace",
        is_sleeping=info.state != "ready",
    )
