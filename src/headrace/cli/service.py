"""The life of a service: load, serve, reload the configuration, drain and end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections.abc import Callable, Coroutine, Generator, Mapping, Sequence
from typing import Any, Literal

import msgspec

from headrace import runtime
from headrace.api.app import create_app
from headrace.api.batch.store import Store
from headrace.api.limits import ApiSettings
from headrace.api.server import Server
from headrace.cli import streams
from headrace.cli.dbgpt import DbgptWorker, api_settings
from headrace.cli.supervised import Supervisor
from headrace.cluster.admin import ClusterAdmin
from headrace.cluster.node import NodeServer
from headrace.cluster.pool import ClusterPool
from headrace.cluster_runtime import open_node
from headrace.config import Config, Settings
from headrace.core.errors import HeadraceError
from headrace.core.model import ModelSpec
from headrace.core.status import Reloaded
from headrace.fronts.fronts import Fronts
from headrace.fronts.process import Home
from headrace.fronts.wire import Begin
from headrace.machine import (
    raise_open_files,
    share_malloc_arena,
    shorten_switch_interval,
    tune_garbage_collection,
    usable_cpus,
)
from headrace.pool.admin import PoolAdmin
from headrace.pool.pool import Pool
from headrace.telemetry.telemetry import Telemetry

Read = Callable[[], tuple[Settings, list[ModelSpec]]]
"""Reads the configuration, with the flags of the command; returns it and the models to serve."""

Open = Callable[[Read], tuple[PoolAdmin | ClusterAdmin, Telemetry]]
"""Opens what is served; it gets a function that reads the configuration again."""

_log = logging.getLogger("headrace.service")
_FOLDERS = 64
_MOST_FRONTS, _CORES_EACH = 4, 8
_HOPELESS = {"failed", "stopped", "created"}


async def live(
    settings: Settings,
    specs: Sequence[ModelSpec],
    listener: socket.socket,
    *,
    reread: Read,
    announce: Callable[[], None],
    open: Open | None = None,
    others: Mapping[str, socket.socket | None],
) -> None:
    """Serve on a socket until a signal; `announce` is called when requests are accepted.

    `open` opens what is served, by default the models `specs`. Of the `others`, `metrics` is a
    socket for the metrics only, `ollama` one more for everything, `dbgpt` one for a DB-GPT cluster,
    `wire` one for the fronts of a cluster.

    Raises:
        HeadraceError: no model could be loaded.
    """
    raise_open_files()
    share_malloc_arena()
    metrics, ollama, dbgpt, wire = map(others.get, ("metrics", "ollama", "dbgpt", "wire"))
    service = _Service(settings, specs, reread, open or _opener(settings, specs, wire))
    await service.keys.start()
    if service.fronts is not None:
        service.begin(service.fronts.run())
    loading = service.begin(service.load())
    ending = [loading, *map(service.begin, service.background())]
    service.run_batches()
    service.listen(metrics, ollama)
    if wire is not None:
        ending.append(service.begin(_node(settings, service.admin).serve(wire)))
    try:
        if dbgpt is not None:
            service.join(dbgpt)
        with service.signals():
            announce()
            service.supervisor.send("READY=1")
            await service.server.serve(listener)
    finally:
        for task in ending:
            task.cancel()
        await service.aclose()
    if not loading.cancelled():
        loading.result()


def _opener(settings: Settings, specs: Sequence[ModelSpec], wire: object) -> Open:
    is_node = wire is not None
    return lambda reread: runtime.open_service(settings, specs, reread=reread, is_node=is_node)


def _node(settings: Settings, admin: PoolAdmin | ClusterAdmin) -> NodeServer:
    assert isinstance(admin, PoolAdmin), "a front is no node"
    return open_node(settings, admin)


class _Service:
    """The backend, its server, and the handlers of signals."""

    def __init__(
        self, settings: Settings, specs: Sequence[ModelSpec], reread: Read, open: Open
    ) -> None:
        self._read = reread
        self._settings = self._latest = settings
        self._tasks: set[asyncio.Task[Any]] = set()
        self._stops = 0
        self._failed = self._is_ready = False
        # A service that was started from a terminal ends with it.
        self._terminal = streams.is_terminal()
        self.supervisor = Supervisor(os.environ)
        self._optional = not all(spec.preload and spec.enabled for spec in specs)
        self.admin, self.telemetry = open(self._reread)
        self.backend: Pool | ClusterPool = self.admin.pool
        self._optional = self._optional or isinstance(self.admin, ClusterAdmin)
        self.keys = runtime.open_keys(settings.config)
        self.keys.on_read = self.pass_on
        self.telemetry.add(self.keys)
        telemetry = settings.config.telemetry
        self._app = create_app(
            self.backend,
            api_settings(settings.config),
            ready=self.ready,
            admin=self.admin,
            observer=self.telemetry,
            metrics=telemetry.metrics and telemetry.metrics_port is None,
            batches=_batches(settings.config),
            keys=self.keys,
        )
        self._batching: asyncio.Task[None] | None = None
        idle = settings.config.server.max_idle_connections
        self.fronts = self._open_fronts(idle)
        self.server = self.fronts or Server(self._app, idle)
        self.second = self.fronts or Server(self._app, idle)
        self.aside = Server(self._app.metrics_alone(), idle)
        self._worker: DbgptWorker | None = None

    def _open_fronts(self, max_idle: int) -> Fronts | None:
        """Return the processes for connections; None if this one has them itself."""
        config = self._settings.config
        if (count := _fronts(config.server.fronts)) == 1:
            return None
        home = Home(self.backend, self.admin, self._app, self.telemetry, self._changed)
        share = max(1, max_idle // count)
        log, settings = runtime.log_settings(config), self._applied(config)
        return Fronts(home, Begin(log, settings, share, count))

    def _changed(self) -> None:
        if self.fronts is not None:
            self.fronts.changed()

    def ready(self) -> bool:
        """Whether new requests are accepted."""
        return self.backend.ready and not self._failed

    def _applied(self, config: Config) -> ApiSettings:
        return msgspec.structs.replace(api_settings(config), needs_key=self.keys.required)

    def pass_on(self) -> None:
        """Let the processes for connections know that the database has keys."""
        if self.fronts is not None and self.keys.required:
            self.fronts.replace_settings(self._applied(self._settings.config))

    def begin(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run a coroutine as a task beside the server."""
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def listen(self, metrics: socket.socket | None, ollama: socket.socket | None) -> None:
        """Serve the other sockets, too."""
        for server, listener in ((self.aside, metrics), (self.second, ollama)):
            if listener is not None:
                self.begin(server.serve(listener))

    def background(self) -> tuple[Coroutine[Any, Any, Any], ...]:
        """Return what runs as long as the service."""
        watching, alive = self.telemetry.watch(), self.supervisor.watch()
        return self.follow(), watching, alive, self.keys.run()

    def join(self, listener: socket.socket) -> None:
        """Serve a DB-GPT cluster on a socket, and register there."""
        self._worker = DbgptWorker(self._app, self.backend, self.admin, self._settings, listener)
        self.begin(self._worker.server.serve(listener))
        self.begin(self._worker.cluster.run())
        for controller in self._worker.cluster.controllers:
            self.telemetry.watch_controller(controller.url, controller.count)

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

    def run_batches(self) -> None:
        """Run the batches that are kept, from where they are, until the service stops."""
        if self._app.batches is not None:
            self._batching = self.begin(self._app.batches.run())

    def stop(self) -> None:
        """Wait up to `drain_s` for running answers, and at a second call no longer.

        Batches stop at once, as they go on with the next service.
        """
        self.supervisor.send("STOPPING=1")
        if self._batching is not None:
            self._batching.cancel()
        wait_s = 0.0 if self._stops else self._settings.config.server.drain_s
        if self._stops == 1:
            _log.info("headrace.service.cut")
        self._stops += 1
        if self._stops > 2:
            self.server.abort()
            self.second.abort()
            if self._worker is not None:
                self._worker.server.abort()
        self.begin(self._end(wait_s))

    def hang_up(self) -> None:
        """Read the configuration again, or end the service if its terminal was closed."""
        if self._terminal and not os.isatty(0):
            self.stop()
        elif not self._stops:
            self.begin(self.admin.reload()).add_done_callback(_log_reload)

    async def load(self) -> None:
        """Load all models; if none can be served, end the service.

        Raises:
            HeadraceError: no model could be loaded.
        """
        try:
            await self.backend.start()
            self._note_ready()
        except HeadraceError:
            if self._stops:
                return
            states = {info.state for info in self.backend.models()}
            if states <= _HOPELESS and not self._optional:
                self._failed = True
                self.server.stop()
                raise
            # The other models are served; the pool has logged which is not.
        finally:
            tune_garbage_collection()
            shorten_switch_interval()

    def _note_ready(self) -> None:
        """Log that requests are accepted, or that a front waits for its nodes."""
        if self._stops or self._is_ready:
            return
        self._is_ready = not isinstance(self.backend, ClusterPool) or self.backend.ready
        _log.info("headrace.service.ready" if self._is_ready else "headrace.service.waiting")
        self.supervisor.send(f"STATUS={'Ready' if self._is_ready else 'Waiting for nodes'}")

    async def follow(self) -> None:
        """Apply the changes of a reload to the server, after the models."""
        async for event in self.admin.events():
            self.telemetry.happened(event)
            self._changed()
            if event.kind == "node_joined":
                self._note_ready()
            if event.kind == "reloaded":
                self._settings = self._latest
                applied = self._applied(self._latest.config)
                self._app.replace_settings(applied)
                if self.fronts is not None:
                    self.fronts.replace_settings(applied)
                if self._worker is not None:
                    self._worker.apply(self._latest)

    async def aclose(self) -> None:
        """Close the backend, and wait for all tasks."""
        if self._batching is not None:
            self._batching.cancel()
        await self._close_backend(0.0)
        self.aside.stop()
        self.second.stop()
        if self._tasks:
            await asyncio.wait(self._tasks)
        if self._app.batches is not None:
            self._app.batches.store.close()
        await self.keys.aclose()
        await self.telemetry.aclose()
        _log.info("headrace.service.stopped")

    def _reread(self) -> tuple[Settings, list[ModelSpec]]:
        settings, specs = self._read()
        self._latest = settings
        return settings, specs

    async def _end(self, wait_s: float) -> None:
        # New requests are refused with a 503; those that still run at the end get an error event,
        # and each connection is closed after its last answer.
        try:
            await self._close_backend(wait_s)
        finally:
            self.server.stop()
            self.second.stop()

    async def _close_backend(self, wait_s: float) -> None:
        """Close it, and let a cluster know first that no more requests are accepted."""
        if self._worker is None:
            await self.backend.aclose(wait_s)
            return
        try:
            await asyncio.gather(self._worker.cluster.leave(), self.backend.aclose(wait_s))
        finally:
            self._worker.server.stop()


def _fronts(setting: int | Literal["auto"]) -> int:
    if setting == "auto":
        return min(_MOST_FRONTS, max(1, usable_cpus() // _CORES_EACH))
    return setting


def _log_reload(reloading: asyncio.Task[Reloaded]) -> None:
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


def _batches(config: Config) -> Store | str:
    """Return the batches of the service, or why there are none.

    Services on any free port have the first folder that none of the others uses.
    """
    folders = [config.batch_folder]
    if not config.server.port:
        folders += [folders[0].with_name(f"0-{number}") for number in range(1, _FOLDERS)]
    for folder in folders:
        try:
            return Store(folder)
        except BlockingIOError:
            continue
        except OSError as error:
            _log.warning("Batches cannot be kept in %s: %s", folder, error.strerror)
            break
    return "Batches cannot be kept here: their folder is used by another service, or not usable."
