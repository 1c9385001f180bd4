"""`headrace serve`: models behind HTTP, until a signal says stop."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import shlex
import signal
import socket
from collections.abc import AsyncGenerator, Generator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headrace.cli import terminal
from headrace.cli.common import Common, known_models, parse_options
from headrace.cli.run import ContextLength, Device, Engine, Options
from headrace.core.errors import ConfigError, HeadraceError

if TYPE_CHECKING:
    import uvicorn

    from headrace.config import ServerSettings, Settings
    from headrace.core.model import ModelSpec
    from headrace.pool.pool import Pool

_BACKLOG = 2048
_LAST_WORDS_S = 2.0


def serve(
    common: Common,
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL]...",
            autocompletion=known_models,
            help="Models; all of the configuration when left out, or its default_model.",
        ),
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port; 0 takes a free one.")] = None,
    allow_public: Annotated[
        bool | None, typer.Option(help="Listen beyond loopback without an API key.")
    ] = None,
    allowed_hosts: Annotated[
        str | None, typer.Option(help="Further names to be reached by, between commas.")
    ] = None,
    allowed_origins: Annotated[
        str | None, typer.Option(help="Web origins that may ask, between commas.")
    ] = None,
    drain_s: Annotated[
        float | None, typer.Option(help="How long running answers may finish at the end.")
    ] = None,
    engine: Engine = None,
    device: Device = None,
    context_length: ContextLength = None,
    max_running: Annotated[int | None, typer.Option(help="Requests at once, a model.")] = None,
    max_queued: Annotated[int | None, typer.Option(help="Requests that wait, a model.")] = None,
    option: Options = None,
) -> None:
    """Serve models over HTTP, as OpenAI's API does.

    API keys come from the configuration or HEADRACE_API_KEYS: a flag would show them to everyone
    on this machine.
    """
    settings = common.settings(
        service=True,
        host=host,
        port=port,
        allow_public=allow_public,
        allowed_hosts=allowed_hosts,
        allowed_origins=allowed_origins,
        drain_s=drain_s,
        engine=engine,
        device=device,
        context_length=context_length,
        max_running=max_running,
        max_queued=max_queued,
        options=parse_options(option),
    )
    specs = wanted(settings, models or [])
    listener = listen(settings.config.server)
    with listener:
        _loop(_serve(settings, specs, listener, as_json=bool(common.as_json)))


def wanted(settings: Settings, names: Sequence[str]) -> list[ModelSpec]:
    """Return the models to be served.

    Raises:
        ConfigError: two of them would have the same name.
        RequestError: a reference cannot be one.
    """
    from headrace.models.reference import parse

    config = settings.config
    chosen = names or list(config.models) or [config.default_model]
    specs = {spec.name: spec for spec in (settings.model_spec(name) for name in chosen)}
    if len(specs) < len({settings.model_spec(name).model for name in chosen}):
        raise ConfigError("Two models have the same name; name them apart in a headrace.toml.")
    for spec in specs.values():
        parse(spec.model)
    return list(specs.values())


def listen(server: ServerSettings) -> socket.socket:
    """Return a socket that is bound and not yet accepting.

    Raises:
        ConfigError: the address is open to others and nothing guards it, or cannot be had.
    """
    try:
        found = socket.getaddrinfo(server.host, server.port, type=socket.SOCK_STREAM)
        family, _, _, _, address = found[0]
        if not (_is_loopback(str(address[0])) or server.api_keys or server.allow_public):
            raise ConfigError(
                f"{server.host} can be reached by others and no API key is set: set "
                "HEADRACE_API_KEYS, or allow it with --allow-public.",
                param="host",
            )
        bound = (str(address[0]), int(address[1]))
        return socket.create_server(bound, family=family, backlog=_BACKLOG)
    except OSError as error:
        raise ConfigError(
            f"Cannot listen on {server.host}:{server.port}: {error.strerror or error}."
        ) from error


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def _loop(main: Any) -> None:
    try:
        from uvloop import run
    except ImportError:
        asyncio.run(main)
    else:
        run(main)


async def _serve(
    settings: Settings, specs: Sequence[ModelSpec], listener: socket.socket, *, as_json: bool
) -> None:
    from headrace import runtime

    backend = runtime.open_backend(settings, specs)
    server = _server(backend, settings.config.server)
    loading = asyncio.ensure_future(_load(backend, server))
    try:
        async with _stopping(server, backend, settings.config.server.drain_s):
            announce(listener, specs, settings.config.server, as_json=as_json)
            await server.serve(sockets=[listener])
    finally:
        loading.cancel()
        await asyncio.wait({loading})
        await backend.aclose()
    if not loading.cancelled():
        loading.result()


def _server(backend: Pool, settings: ServerSettings) -> uvicorn.Server:
    import uvicorn

    from headrace.api.app import create_app
    from headrace.api.settings import ApiSettings

    api = ApiSettings(
        host=settings.host,
        allowed_hosts=settings.allowed_hosts,
        allowed_origins=settings.allowed_origins,
        key_hashes=tuple(key.removeprefix("sha256:") for key in settings.api_keys),
        max_body=settings.max_body_bytes,
        deadline_s=settings.deadline_s,
        headers_after_s=settings.headers_after_s,
    )
    config = uvicorn.Config(
        create_app(backend, api),
        http="httptools",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        h11_max_incomplete_event_size=api.max_head,
        timeout_graceful_shutdown=int(settings.drain_s + _LAST_WORDS_S) + 1,
    )

    class Server(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self) -> Generator[None]:
            # Ours are better: uvicorn raises the signal once more at its end.
            yield

    return Server(config)


@contextlib.asynccontextmanager
async def _stopping(server: uvicorn.Server, backend: Pool, drain_s: float) -> AsyncGenerator[None]:
    """At the first signal let running answers end, up to `drain_s`; at the second do not wait."""
    loop = asyncio.get_running_loop()
    ends: list[asyncio.Future[None]] = []

    def stop() -> None:
        # The backend refuses what is new; what still runs in the end gets an error event, and
        # with its last answer each connection ends.
        wait_s = 0.0 if server.should_exit else drain_s
        ends.append(asyncio.ensure_future(backend.aclose(wait_s)))
        server.should_exit = True

    signals = (signal.SIGTERM, signal.SIGINT)
    for number in signals:
        loop.add_signal_handler(number, stop)
    try:
        yield
    finally:
        for number in signals:
            loop.remove_signal_handler(number)
        await asyncio.gather(*ends)


async def _load(backend: Pool, server: uvicorn.Server) -> None:
    """Load all models; when not one can be served there is nothing to stay for.

    Raises:
        HeadraceError: why nothing could be loaded.
    """
    try:
        await backend.start()
    except HeadraceError as error:
        states = {info.state for info in backend.models()}
        if states <= {"failed", "stopped", "created"}:
            server.should_exit = True
            raise
        terminal.note(f"error: {error.message}")


def announce(
    listener: socket.socket,
    specs: Sequence[ModelSpec],
    settings: ServerSettings,
    *,
    as_json: bool,
) -> None:
    """Print the address, and how to ask."""
    host, port = listener.getsockname()[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    names = [spec.name for spec in specs]
    if as_json:
        print(json.dumps({"url": url, "models": names}), flush=True)
        return
    print(f"Headrace serves {', '.join(names)} on {url}", flush=True)
    message = {"role": "user", "content": "Name three rivers."}
    body = shlex.quote(json.dumps({"model": names[0], "messages": [message]}))
    key = ' -H "Authorization: Bearer $KEY"' if settings.api_keys else ""
    print(
        f"Try: curl {url}/v1/chat/completions -H 'Content-Type: application/json'{key} -d {body}",
        flush=True,
    )
