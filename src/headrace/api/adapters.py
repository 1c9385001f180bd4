"""/admin/models/NAME/adapters, and vLLM's routes that load and unload adapters."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from headrace.api.admin import Reference, admin_of, changed
from headrace.api.exchange import Exchange, Service
from headrace.core.adapter import SEPARATOR
from headrace.core.errors import InvalidRequest, UnknownModel
from headrace.core.model import ModelInfo
from headrace.core.status import ModelStatus

_TEXT = b"text/plain; charset=utf-8"


class AdapterCard(msgspec.Struct, frozen=True, kw_only=True):
    """An adapter of a model; requests name it by its `id` or an alias."""

    adapter: str
    id: str
    aliases: list[str]
    source: str


class AdapterList(msgspec.Struct, frozen=True):
    """The adapters of a model."""

    data: list[AdapterCard]


class AdapterRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An adapter to be added, or to replace that of the same key.

    `source` is a path of the machine that serves, or a reference. `scale` multiplies its changes.
    `name` is a name in requests beside MODEL:ADAPTER.
    """

    adapter: Reference
    source: Reference
    scale: float = 1.0
    name: Reference | None = None


class LoadLoraRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """vLLM's request to load an adapter, which gets a name of its own.

    `model` is needed where several models are served. With `load_inplace` an adapter of this name
    is replaced.
    """

    lora_name: Reference
    lora_path: Reference
    load_inplace: bool = False
    model: Reference | None = None


class UnloadLoraRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """vLLM's request to unload an adapter; the number is not used."""

    lora_name: Reference
    lora_int_id: int | None = None


_ADD = msgspec.json.Decoder(AdapterRequest)
_LOAD = msgspec.json.Decoder(LoadLoraRequest)
_UNLOAD = msgspec.json.Decoder(UnloadLoraRequest)


async def show(service: Service, exchange: Exchange) -> None:
    """List the adapters of a model."""
    model = _model(service, exchange, exchange.scope["path_params"]["name"])
    await exchange.answer(AdapterList([*_cards(service, exchange, model)]))


async def add(service: Service, exchange: Exchange) -> None:
    """Add an adapter to a model while it serves; no request fails because of it."""
    model = _model(service, exchange, exchange.scope["path_params"]["name"])
    wire = await exchange.read(_ADD)
    table = {"source": wire.source, "scale": wire.scale, "name": wire.name}
    await exchange.answer(await _changed(service, model.id, wire.adapter, table))


async def remove(service: Service, exchange: Exchange) -> None:
    """Remove an adapter from a model; its running requests end before."""
    names = exchange.scope["path_params"]
    model = _model(service, exchange, names["name"])
    if all(card.adapter != names["adapter"] for card in _cards(service, exchange, model)):
        raise UnknownModel(f"The model has no adapter {names['adapter']!r}.")
    await exchange.answer(await _changed(service, model.id, names["adapter"], None))


async def load_as_vllm(service: Service, exchange: Exchange) -> None:
    """Add an adapter to a model, as vLLM does."""
    wire = await exchange.read(_LOAD)
    known = _adapter(service, exchange, wire.lora_name)
    if known is not None and not wire.load_inplace:
        raise InvalidRequest(
            f"There is an adapter {wire.lora_name!r} already; `load_inplace` replaces it.",
            param="lora_name",
        )
    if known is not None:
        model, adapter = known
    else:
        model, adapter = _only_model(service, exchange, wire.model), wire.lora_name
    table = {"source": wire.lora_path, "name": wire.lora_name}
    await _changed(service, model.id, adapter, table)
    await _reply(exchange, wire.lora_name, "added")


async def unload_as_vllm(service: Service, exchange: Exchange) -> None:
    """Remove an adapter, as vLLM does."""
    wire = await exchange.read(_UNLOAD)
    known = _adapter(service, exchange, wire.lora_name)
    if known is None:
        raise UnknownModel(f"There is no adapter {wire.lora_name!r}.")
    model, adapter = known
    await _changed(service, model.id, adapter, None)
    await _reply(exchange, wire.lora_name, "removed")


async def _changed(
    service: Service, model: str, adapter: str, table: dict[str, Any] | None
) -> ModelStatus:
    # None would be the configured one.
    settings = {f"adapters.{adapter}": False if table is None else table}
    return await changed(service, admin_of(service).update(model, settings))


async def _reply(exchange: Exchange, name: str, action: str) -> None:
    text = f"Success: LoRA adapter '{name}' {action} successfully."
    await exchange.reply(text.encode(), kind=_TEXT)


def _models(service: Service, exchange: Exchange) -> Iterator[ModelInfo]:
    """Yield the models that are no names of others."""
    return (info for info in service.models(exchange.call) if info.base is None)


def _model(service: Service, exchange: Exchange, name: str) -> ModelInfo:
    for info in _models(service, exchange):
        if name in (info.id, *info.aliases):
            return info
    raise UnknownModel("No model of this name is served here.")


def _only_model(service: Service, exchange: Exchange, name: str | None) -> ModelInfo:
    """Return the model with a name, or the only one that there is.

    Raises:
        UnknownModel: there is none of this name.
        InvalidRequest: there are several.
    """
    if name is not None:
        return _model(service, exchange, name)
    models = [*_models(service, exchange)]
    if len(models) != 1:
        names = ", ".join(info.id for info in models)
        raise InvalidRequest(f"Name the model of the adapter: {names}.", param="model")
    return models[0]


def _cards(service: Service, exchange: Exchange, model: ModelInfo) -> Iterator[AdapterCard]:
    prefix = f"{model.id}{SEPARATOR}"
    for info in service.models(exchange.call):
        if info.adapter is None or info.base != model.id:
            continue
        full = next(name for name in (*info.aliases, info.id) if name.startswith(prefix))
        yield AdapterCard(
            adapter=full.removeprefix(prefix),
            id=info.id,
            aliases=[*info.aliases],
            source=info.adapter,
        )


def _adapter(service: Service, exchange: Exchange, name: str) -> tuple[ModelInfo, str] | None:
    """Return the model and the key of the adapter that requests name so."""
    for model in _models(service, exchange):
        for card in _cards(service, exchange, model):
            if name in (card.id, *card.aliases):
                return model, card.adapter
    return None
