"""/admin: what is loaded, and changes to it; also llama-server's routes for the same.

The answers are those of headrace.core.status.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Annotated, Any, cast

import msgspec
from msgspec import Meta

from headrace.api.exchange import Exchange, Service
from headrace.api.overview import observer
from headrace.api.query import query
from headrace.api.stream import send_events
from headrace.core.backend import Admin, ClusterAdmin
from headrace.core.errors import UnknownModel
from headrace.core.library import LibraryEntry, LibraryFilter
from headrace.core.measurement import Curve
from headrace.core.status import ModelStatus, StoredModel

_MAX_REFERENCE = 512
# Some sixty plans take a second of a thread: one client at a time gets them.
_LISTING = asyncio.Semaphore(1)

Reference = Annotated[str, Meta(min_length=1, max_length=_MAX_REFERENCE)]


class ModelRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A model, by its name or an alias."""

    model: Reference


class LoadRequest(ModelRequest, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A model to be loaded; a reference that is not served yet is added with these settings."""

    settings: dict[str, Any] | None = None


class PinRequest(ModelRequest, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A model to be pinned, so that it is never evicted; or, with `pinned` false, unpinned."""

    pinned: bool = True


class UpdateRequest(ModelRequest, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings to be changed: `keep_alive`, `enabled`, `options.threads`, ..."""

    settings: dict[str, Any]


class DrainRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A node that gets nothing new; or, with `on` false, that gets requests again."""

    node: Reference
    on: bool = True


class StoredModels(msgspec.Struct, frozen=True):
    """The downloaded models, by name."""

    data: list[StoredModel]


class Library(msgspec.Struct, frozen=True):
    """Well-known models, by family, each with what it would need on this machine."""

    data: list[LibraryEntry]


class Measurements(msgspec.Struct, frozen=True):
    """Runs of `headrace bench` and `tune` on this machine, of each the newest first."""

    data: list[Curve]


class Success(msgspec.Struct, frozen=True):
    """llama-server's answer."""

    success: bool = True


_MODEL = msgspec.json.Decoder(ModelRequest)
_LOAD = msgspec.json.Decoder(LoadRequest)
_PIN = msgspec.json.Decoder(PinRequest)
_DRAIN = msgspec.json.Decoder(DrainRequest)
_UPDATE = msgspec.json.Decoder(UpdateRequest)


async def show_all(service: Service, exchange: Exchange) -> None:
    """Show the state of all models and devices."""
    await exchange.answer(admin_of(service).status())


async def show_one(service: Service, exchange: Exchange) -> None:
    """Show the state of one model."""
    name: str = exchange.scope["path_params"]["name"]
    for status in admin_of(service).status().models:
        if name == status.id or name in status.aliases:
            await exchange.answer(status)
            return
    raise UnknownModel("No model of this name is served here.")


# A change is completed even if the client disconnects.


async def load(service: Service, exchange: Exchange) -> None:
    """Load a model and wait for it; one that is not served yet is added."""
    await exchange.answer(await _load(service, exchange))


async def unload(service: Service, exchange: Exchange) -> None:
    """Unload a model and wait until its memory is free."""
    await exchange.answer(await _unload(service, exchange))


async def restart(service: Service, exchange: Exchange) -> None:
    """Unload a model and load it again; also resets one that has failed."""
    wire = await exchange.read(_MODEL)
    await exchange.answer(await changed(service, admin_of(service).restart(wire.model)))


async def pin(service: Service, exchange: Exchange) -> None:
    """Pin a model, so that it is never evicted, or unpin it."""
    wire = await exchange.read(_PIN)
    await exchange.answer(
        await changed(service, admin_of(service).update(wire.model, {"pinned": wire.pinned}))
    )


async def update(service: Service, exchange: Exchange) -> None:
    """Change settings of a model; no request fails because of it."""
    wire = await exchange.read(_UPDATE)
    await exchange.answer(
        await changed(service, admin_of(service).update(wire.model, wire.settings))
    )


async def plan(service: Service, exchange: Exchange) -> None:
    """Show what loading a model would need and do."""
    wanted = query(exchange.scope, ModelRequest)
    await exchange.answer(await exchange.unless_gone(admin_of(service).plan(wanted.model)))


async def stored(service: Service, exchange: Exchange) -> None:
    """List the models that were downloaded to this machine, with their sizes on the disk."""
    await exchange.answer(StoredModels([*await asyncio.to_thread(admin_of(service).stored)]))


async def measurements(service: Service, exchange: Exchange) -> None:
    """List what `headrace bench` and `tune` have measured on this machine."""
    curves = await asyncio.to_thread(admin_of(service).measurements)
    await exchange.answer(Measurements([*curves]))


async def library(service: Service, exchange: Exchange) -> None:
    """List well-known models with what each would need here, as `headrace library` does."""
    wanted = query(exchange.scope, LibraryFilter)

    async def listed() -> Library:
        async with _LISTING:
            return Library([*await admin_of(service).library(wanted)])

    await exchange.answer(await exchange.unless_gone(listed()))


async def reload(service: Service, exchange: Exchange) -> None:
    """Read the configuration again and apply what has changed."""
    await exchange.answer(await admin_of(service).reload())


async def events(service: Service, exchange: Exchange) -> None:
    """Send the events of the models from now on, as server-sent events."""
    await exchange.unless_gone(send_events(exchange, admin_of(service).events()))


async def activity(service: Service, exchange: Exchange) -> None:
    """Show the running requests, and the figures of each model over the last minute."""
    await exchange.answer(observer(service).activity())


async def drain(service: Service, exchange: Exchange) -> None:
    """Send nothing new to a node of the cluster, or send requests to it again."""
    wire = await exchange.read(_DRAIN)
    admin = cast("ClusterAdmin", admin_of(service))
    await exchange.answer(await admin.drain(wire.node, wire.on))


async def load_as_llama_server(service: Service, exchange: Exchange) -> None:
    """Load a model, as llama-server does."""
    await _load(service, exchange)
    await exchange.answer(Success())


async def unload_as_llama_server(service: Service, exchange: Exchange) -> None:
    """Unload a model, as llama-server does."""
    await _unload(service, exchange)
    await exchange.answer(Success())


def admin_of(service: Service) -> Admin:
    """Return what manages the models."""
    assert service.admin is not None
    return service.admin


async def _load(service: Service, exchange: Exchange) -> ModelStatus:
    wire = await exchange.read(_LOAD)
    return await changed(service, admin_of(service).load(wire.model, wire.settings))


async def _unload(service: Service, exchange: Exchange) -> ModelStatus:
    wire = await exchange.read(_MODEL)
    return await changed(service, admin_of(service).unload(wire.model))


async def changed(service: Service, change: Awaitable[ModelStatus]) -> ModelStatus:
    """Await a change; the next overview shows it, however new the last one is."""
    try:
        return await change
    finally:
        service.kept = None
