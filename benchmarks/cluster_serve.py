"""Two ways of Ray Serve to the engine `echo`, which cluster.py --serve measures.

- proxy: Headrace's HTTP application is a deployment, behind Serve's own HTTP proxy;
- handle: Headrace's HTTP application is in this process, and gets each event from a deployment
  by a handle, as one object.

The deployments have one replica each, and the engine runs in a process of its own, as everywhere.
It prints one line of JSON: the URL of each way, and the ids of the processes whose CPU counts. It
ends at the end of its input. Arguments are a folder and the options of the engine as JSON.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
from collections.abc import AsyncGenerator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import psutil
import ray
from ray import serve
from starlette.types import ASGIApp, Receive, Scope, Send

from headrace import runtime
from headrace.api.app import create_app
from headrace.api.limits import ApiSettings
from headrace.api.server import Server
from headrace.core.backend import Backend
from headrace.core.events import Event
from headrace.core.model import ModelInfo
from headrace.core.request import AnyRequest
from headrace.lab import drive
from headrace.pool.pool import Pool

_STREAMS = 1000
_STORE_BYTES = 80_000_000


async def open_pool(folder: str, options: Mapping[str, Any]) -> Pool:
    """Return a pool that has loaded the engine."""
    settings = runtime.load_settings(environ={"HEADRACE_HOME": folder})
    spec = msgspec.structs.replace(settings.model_spec("echo"), options=dict(options))
    pool = runtime.open_pool(settings, [spec])
    await pool.start()
    return pool


def application(folder: str, options: Mapping[str, Any]) -> ASGIApp:
    """Return Headrace's HTTP application, which opens its pool when it is started."""
    opened: list[ASGIApp] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            await opened[0](scope, receive, send)
            return
        await receive()
        opened.append(served(await open_pool(folder, options)))
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await send({"type": "lifespan.shutdown.complete"})

    return app


def served(backend: Backend) -> ASGIApp:
    """Return the HTTP application of a backend."""
    return create_app(backend, ApiSettings())  # pyright: ignore[reportReturnType] - as ASGI types it


class Events:
    """A deployment that streams the events of its pool."""

    async def __init__(self, folder: str, options: Mapping[str, Any]) -> None:  # type: ignore[misc]
        self._pool = await open_pool(folder, options)
        self._requests: msgspec.msgpack.Decoder[AnyRequest] = msgspec.msgpack.Decoder(AnyRequest)

    async def models(self) -> bytes:
        """Return what the pool serves."""
        return msgspec.msgpack.encode(self._pool.models())

    async def ask(self, data: bytes) -> AsyncGenerator[bytes]:
        """Yield the events of a request, each encoded."""
        async for event in self._pool.ask(self._requests.decode(data)):
            yield msgspec.msgpack.encode(event)


class HandleBackend:
    """The deployment `Events` as a Backend."""

    def __init__(self, handle: Any, infos: Sequence[ModelInfo]) -> None:
        self._handle = handle.options(stream=True)
        self._infos = infos
        self._events: msgspec.msgpack.Decoder[Event] = msgspec.msgpack.Decoder(Event)

    async def ask(self, request: AnyRequest) -> AsyncGenerator[Event, None]:
        """Yield the events that the deployment sends."""
        parts = self._handle.ask.remote(msgspec.msgpack.encode(request))
        try:
            async for data in parts:
                yield self._events.decode(data)
        finally:
            parts.cancel()

    def models(self) -> Sequence[ModelInfo]:
        """Return what the deployment serves."""
        return self._infos

    async def aclose(self) -> None:
        """Do nothing: Serve ends the deployment."""


def pids(*names: str) -> list[int]:
    """Return the ids of Ray's processes with one of these names in their titles."""
    running = psutil.Process().children(recursive=True)
    titles = {process.pid: " ".join(process.cmdline()) for process in running}
    return [pid for pid, title in titles.items() if any(f"ray::{name}" in title for name in names)]


async def run(folder: Path, options: dict[str, Any]) -> None:
    """Deploy, serve the handle's front, and wait for the end of the input."""
    port = drive.free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    settings = {"max_ongoing_requests": _STREAMS, "ray_actor_options": {"num_cpus": 0}}
    home = str(folder / "proxy")
    proxied = serve.ingress(lambda: application(home, options))(type("Proxied", (), {}))
    serve.run(serve.deployment(**settings)(proxied).bind(), name="proxy", route_prefix="/")
    events = serve.deployment(**settings)(Events).bind(str(folder / "handle"), options)
    handle = serve.run(events, name="handle", route_prefix=None)
    infos = msgspec.msgpack.decode(await handle.models.remote(), type=tuple[ModelInfo, ...])
    front = Server(served(HandleBackend(handle, infos)))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        serving = asyncio.create_task(front.serve(listener))
        ways = {
            "proxy": (port, pids("ProxyActor", "ServeReplica:proxy")),
            "handle": (listener.getsockname()[1], [os.getpid(), *pids("ServeReplica:handle")]),
        }
        line = {
            name: {"url": f"http://127.0.0.1:{at}", "pids": ids} for name, (at, ids) in ways.items()
        }
        print(json.dumps(line), flush=True)
        await asyncio.to_thread(sys.stdin.read)
        front.stop()
        await serving


def main() -> None:
    """Start Ray, serve, and end Ray."""
    folder = Path(sys.argv[1])
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=_STORE_BYTES,
        _temp_dir=str(folder / "ray"),
    )
    try:
        asyncio.run(run(folder, json.loads(sys.argv[2])))
    finally:
        serve.shutdown()
        ray.shutdown()


if __name__ == "__main__":
    main()
