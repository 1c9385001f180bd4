"""This service as a worker of a DB-GPT cluster: what it registers, and what the cluster may do."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import msgspec

from headrace.api.dbgpt.controller import Address, Controller
from headrace.api.dbgpt.wire import WORKER_TYPES
from headrace.api.edge import check_admin
from headrace.api.exchange import Exchange
from headrace.core.backend import Admin, Backend
from headrace.core.errors import Forbidden, UnknownModel
from headrace.core.model import ModelInfo
from headrace.core.status import ModelStatus
from headrace.core.stream import within

WithoutKey = Literal["refuse", "use", "manage"]
"""What requests may do here, as DB-GPT sends no key: `refuse` leaves it to the keys."""

MANAGER = "WorkerManager@service"
"""The row by which DB-GPT finds where models are started and stopped."""

_LEAVE_TIMEOUT_S = 3.0


class ClusterSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The controllers of a cluster, and where it reaches this worker; see `[dbgpt]`."""

    controllers: tuple[str, ...]
    address: Address
    heartbeat_s: float = 20.0
    without_key: WithoutKey = "refuse"


class Cluster:
    """Keeps the controllers informed of the models that are served.

    A model that the cluster has stopped is not offered to it until it is loaded again.
    """

    def __init__(self, backend: Backend, admin: Admin, settings: ClusterSettings) -> None:
        self.address = settings.address
        self._backend = backend
        self._admin = admin
        self.settings = settings
        self._stopped: set[str] = set()
        self._deleted: set[str] = set()
        self._running: asyncio.Task[None] | None = None
        self._has_left = False
        self.controllers = [
            Controller(
                url, settings.address, settings.heartbeat_s, rows=self.rows, known=self.known
            )
            for url in settings.controllers
        ]

    async def run(self) -> None:
        """Register the models and keep them registered, until `leave`."""
        if self._has_left:
            return
        self._running = asyncio.ensure_future(self._run())
        with contextlib.suppress(asyncio.CancelledError):
            await self._running

    async def leave(self) -> None:
        """End the heartbeats, and deregister all models; takes some seconds at most."""
        if self._has_left:
            return
        self._has_left = True
        if self._running is not None:
            self._running.cancel()
            await asyncio.wait({self._running})
        leaving = asyncio.gather(*(controller.leave() for controller in self.controllers))
        await within(_LEAVE_TIMEOUT_S, leaving)

    def rows(self) -> list[str]:
        """Return what the controllers offer: names with a worker type, `smollm2@llm`."""
        statuses = self._statuses()
        offered = (info for info in self._named() if self._is_offered(info, statuses))
        return [MANAGER, *(row for info in offered for row in _rows(info))]

    def known(self) -> list[str]:
        """Return the same with those that are stopped and can be started."""
        infos = (info for info in self._named() if info.id not in self._deleted)
        return [MANAGER, *(row for info in infos for row in _rows(info))]

    def models(self, name: str = "") -> list[ModelInfo]:
        """Return the models that the cluster can have, or one of them by its name.

        Raises:
            UnknownModel: there is none of this name.
        """
        infos = [info for info in self._named() if name in {"", info.id, *info.aliases}]
        if name and not infos:
            raise UnknownModel("No model of this name is served here.")
        return infos

    async def start(self, name: str, changes: Mapping[str, Any]) -> None:
        """Load a model that is served, with changed settings, and register it.

        Raises:
            HeadraceError: it is not served, a setting is wrong, or the load failed.
        """
        (info,) = self.models(name)
        await self._admin.load(_loaded(info), changes)
        await self._offer(info)

    async def stop(self, name: str, *, delete: bool = False) -> None:
        """Unload a model, and deregister it; with `delete` its row is removed.

        Raises:
            HeadraceError: it is not served.
        """
        (info,) = self.models(name)
        # First, so that the cluster sends no more requests, which would load it again.
        self._stopped.add(info.id)
        if delete:
            self._deleted.add(info.id)
        await self._synchronise()
        await self._admin.unload(_loaded(info))

    async def restart(self, name: str) -> None:
        """Unload a model and load it again.

        Raises:
            HeadraceError: it is not served, or the load failed.
        """
        (info,) = self.models(name)
        await self._admin.restart(_loaded(info))
        await self._offer(info)

    async def update(self, name: str, changes: Mapping[str, Any]) -> None:
        """Change settings of a model.

        Raises:
            HeadraceError: it is not served, or a setting is wrong.
        """
        (info,) = self.models(name)
        await self._admin.update(_loaded(info), changes)

    def check(self, exchange: Exchange) -> None:
        """Check that a request may start and stop models.

        Raises:
            Forbidden: the settings do not allow it, or not from this place.
            Refused: a foreign web page sends it.
        """
        if self.settings.without_key == "use":
            raise Forbidden('The setting without_key = "manage" lets DB-GPT manage models here.')
        if self.settings.without_key == "refuse":
            check_admin(exchange.scope, exchange.settings, is_admin=exchange.call.is_admin)

    async def _run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._follow())
            for controller in self.controllers:
                tasks.create_task(controller.run())

    async def _follow(self) -> None:
        async for event in self._admin.events():
            if event.kind == "ready":
                self._stopped.discard(event.model)
                self._deleted.discard(event.model)
            for controller in self.controllers:
                controller.changed()

    async def _offer(self, info: ModelInfo) -> None:
        self._stopped.discard(info.id)
        self._deleted.discard(info.id)
        await self._synchronise()

    async def _synchronise(self) -> None:
        await asyncio.gather(*(controller.synchronise() for controller in self.controllers))

    def _named(self) -> Iterator[ModelInfo]:
        # DB-GPT separates the worker type by an @.
        return (info for info in self._backend.models() if "@" not in info.id)

    def _statuses(self) -> dict[str, ModelStatus]:
        return {status.id: status for status in self._admin.status().models}

    def _is_offered(self, info: ModelInfo, statuses: Mapping[str, ModelStatus]) -> bool:
        if info.id in self._stopped:
            return False
        status = statuses.get(_loaded(info))
        if status is None:
            return info.state != "failed"
        # A model that has failed is tried by the first request after a while.
        waits = status.retry_at is not None and status.retry_at > time.time()
        return status.enabled and not (status.state == "failed" and waits)


def _loaded(info: ModelInfo) -> str:
    """Return the name of the model that is loaded, for one with a preset of its own."""
    return info.base or info.id


def _rows(info: ModelInfo) -> list[str]:
    tasks = info.capabilities.tasks
    return [f"{info.id}@{kind}" for task, kind in WORKER_TYPES.items() if task in tasks]
