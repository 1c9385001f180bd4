"""The life of a service: it loads, answers, reads its configuration again, drains and ends."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Coroutine, Generator, Sequence
from typing import Any

import msgspec
import uvicorn
from msgspec.structs import replace

from headrace import runtime
from headrace.api import limits
from headrace.api.app import create_app
from headrace.api.limits import ApiSettings
from headrace.cli import terminal
from headrace.config import Config, Settings
from headrace.core.errors import HeadraceError
from headrace.core.model import ModelSpec
from headrace.core.status import Reloaded
from headrace.machine import shorten_switch_interval, tune_garbage_collection

Read = Callable[[], tuple[Settings, list[ModelSpec]]]
"""Reads the configuration, with the flags of the command: the settings, and what is served."""

_log = logging.getLogger("headrace.service")
_LAST_WORDS_S = 2
# Longer than those who call keep an idle connection: whoever closes it first must not be the one
# that a request is on its way to. Python's clients keep it for 5 s, balancers mostly for 60.
_IDLE_CONNECTION_S = 75
_HOPELESS = {"failed", "stopped", "created"}


async def live(
    settings: Settings,
    specs: Sequence[ModelSpec],
    listener: socket.socket,
    *,
    reread: Read,
    announce: Callable[[], None],
    metrics: socket.socket | None = None,
) -> None:
    """Serve on a socket until a signal comes; `announce` is called when it can be asked.

    `metrics` is a socket for the metrics alone.

    Raises:
        HeadraceError: why nothing could be loaded.
    """
    service = _Service(settings, specs, reread)
    loading = service.begin(service.load())
    following = service.begin(service.follow())
    watching = service.begin(service.telemetry.watch())
    if metrics is not None:
        service.begin(service.aside.serve(sockets=[metrics]))
    try:
        with service.signals():
            announce()
            await service.server.serve(sockets=[listener])
    finally:
        following.cancel()
        watching.cancel()
        loading.cancel()
        await service.aclose()
    if not loading.cancelled():
        loading.result()


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None]:
        # Ours are better: uvicorn raises the signal once more at its end.
        yield


class _Service:
    """The backend, the server in front of it, and what signals do to them."""

    def __init__(self, settings: Settings, specs: Sequence[ModelSpec], reread: Read) -> None:
        self._read = reread
        self._settings = self._latest = settings
        self._tasks: set[asyncio.Task[Any]] = set()
        self._stops = 0
        # Where the service was started by hand, it goes when its terminal does.
        self._terminal = sys.stdin is not None and not sys.stdin.closed and sys.stdin.isatty()
        self._optional = not all(spec.preload and spec.enabled for spec in specs)
        self.admin, self.telemetry = runtime.open_service(settings, specs, reread=self._reread)
        self.backend = self.admin.pool
        telemetry = settings.config.telemetry
        self._app = create_app(
            self.backend,
            api_settings(settings.config),
            ready=self.ready,
            admin=self.admin,
            observer=self.telemetry,
            metrics=telemetry.metrics and telemetry.metrics_port is None,
        )
        self.server = _Server(_uvicorn(self._app))
        self.aside = _Server(_uvicorn(self._app.metrics_alone()))

    def ready(self) -> bool:
        """Tell whether new requests are taken."""
        return self.backend.ready

    def begin(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run something beside the server."""
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    @contextlib.contextmanager
    def signals(self) -> Generator[None]:
        """Let signals stop the service and reload its configuration."""
        loop = asyncio.get_running_loop()
        actions = {
            signal.SIGTERM: self.stop,
            signal.SIGINT: self.stop,
            signal.SIGHUP: self.hang_up,
        }
        for number, action in actions.items():
            loop.add_signal_handler(number, action)
        try:
            yield
        finally:
            for number in actions:
                loop.remove_signal_handler(number)

    def stop(self) -> None:
        """At the first call let running answers end, up to `drain_s`; at the second do not wait."""
        wait_s = 0.0 if self._stops else self._settings.config.server.drain_s
        self._stops += 1
        self.server.force_exit = self._stops > 2
        self.begin(self._end(wait_s))

    def hang_up(self) -> None:
        """Read the configuration again; the end of its terminal is the end of the service."""
        if self._terminal and not os.isatty(0):
            self.stop()
        elif not self._stops:
            self.begin(self.admin.reload()).add_done_callback(_tell)

    async def load(self) -> None:
        """Load all models; when not one can be served there is nothing to stay for.

        Raises:
            HeadraceError: why nothing could be loaded.
        """
        try:
            await self.backend.start()
        except HeadraceError as error:
            if self._stops:
                return
            states = {info.state for info in self.backend.models()}
            if states <= _HOPELESS and not self._optional:
                self.server.should_exit = True
                raise
            terminal.note(f"error: {error.message}")
        finally:
            tune_garbage_collection()
            shorten_switch_interval()

    async def follow(self) -> None:
        """Apply to the server what a reload has changed, once the models have taken it."""
        async for event in self.admin.events():
            self.telemetry.happened(event)
            if event.kind == "reloaded":
                self._settings = self._latest
                self._app.replace_settings(api_settings(self._latest.config))

    async def aclose(self) -> None:
        """End all that runs here, and the backend."""
        await self.backend.aclose()
        self.aside.should_exit = True
        if self._tasks:
            await asyncio.wait(self._tasks)
        await self.telemetry.aclose()

    def _reread(self) -> tuple[Settings, list[ModelSpec]]:
        settings, specs = self._read()
        self._latest = settings
        return settings, specs

    async def _end(self, wait_s: float) -> None:
        # What comes now is refused with a 503; what still runs in the end gets an error event,
        # and with its last answer each connection ends.
        try:
            await self.backend.aclose(wait_s)
        finally:
            self.server.should_exit = True


def _tell(reloading: asyncio.Task[Reloaded]) -> None:
    if reloading.cancelled():
        return
    error = reloading.exception()
    if error is None:
        data = msgspec.to_builtins(reloading.result())
        _log.info("The configuration was read again.", extra={"data": data})
    elif isinstance(error, HeadraceError):
        _log.error("The configuration stays as it was: %s", error.message)
    else:
        _log.error("The configuration could not be read again.", exc_info=error)


def api_settings(config: Config) -> ApiSettings:
    """Return what the HTTP surface uses of the configuration: fields of the same names."""
    settings = msgspec.convert(config.server, ApiSettings, from_attributes=True)
    return replace(settings, metrics_keys=config.telemetry.metrics_keys)


def _uvicorn(app: Any) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http="httptools",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        h11_max_incomplete_event_size=limits.MAX_HEADER,
        timeout_graceful_shutdown=_LAST_WORDS_S,
        timeout_keep_alive=_IDLE_CONNECTION_S,
    )
