"""`headrace serve`: models behind HTTP, until a signal ends it."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import ipaddress
import json
import os
import shlex
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from headrace.cli import supervised, terminal
from headrace.cli.common import Common, ModelFlags, given, known_models
from headrace.core.errors import ConfigError, HeadraceError

if TYPE_CHECKING:
    from headrace.cli.service import Open, Read
    from headrace.config import Config, ServerSettings, Settings
    from headrace.core.model import ModelSpec, Task

_BACKLOG = 2048
_TEXTS = ["The Danube is a river.", "The Alps are mountains."]
_EXAMPLES: dict[Task, tuple[str, dict[str, Any]]] = {
    "generate": (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": "Name three rivers."}]},
    ),
    "embed": ("/v1/embeddings", {"input": _TEXTS}),
    "rerank": ("/v1/rerank", {"query": "Which are rivers?", "documents": _TEXTS}),
}

_PLACES = {
    "metrics": "Metrics are at {}",
    "ollama": "Ollama's clients find it on {}",
    "dbgpt": "DB-GPT's cluster finds its worker on {}",
    "wire": "Fronts of the cluster connect to {}",
}

Models = Annotated[
    list[str] | None,
    Argument(
        metavar="MODEL",
        autocompletion=known_models,
        help="Models; by default all of the configuration, or its default_model.",
    ),
]


@dataclass(frozen=True)
class ServiceFlags:
    """Settings of the service and of all its models, by their names; None is not given."""

    host: Annotated[
        str | None, Option(help="Address to listen on; :: is every address, IPv4 too.")
    ] = None
    port: Annotated[int | None, Option(help="Port; 0 takes a free one.")] = None
    ollama_port: Annotated[
        int | None, Option(help="Second port, for clients that look for Ollama on 11434.")
    ] = None
    dbgpt_controller: Annotated[
        str | None, Option(help="Be a worker of the DB-GPT cluster with this controller's URL.")
    ] = None
    fronts: Annotated[
        str | None, Option(help="Processes for connections: a number, or auto by cores.")
    ] = None
    allow_public: Annotated[
        bool | None, Option(help="Listen beyond loopback without an API key.")
    ] = None
    allowed_hosts: Annotated[
        str | None, Option(help="Further names of this server, separated by commas.")
    ] = None
    allowed_origins: Annotated[
        str | None, Option(help="Allowed web origins, separated by commas.")
    ] = None
    max_idle_connections: Annotated[
        int | None, Option(help="Connections of one address without a running request.")
    ] = None
    drain_s: Annotated[
        float | None, Option(help="Time for running answers to finish at the end.")
    ] = None
    max_running: Annotated[int | None, Option(help="Concurrent requests of a model.")] = None
    max_queued: Annotated[int | None, Option(help="Waiting requests of a model.")] = None
    keep_alive: Annotated[str | None, Option(help="How long a model stays idle: 5m, 0, -1.")] = None
    continuation: Annotated[
        str | None, Option(help="How to continue an answer whose worker died: exact, fast, off.")
    ] = None
    memory: Annotated[
        str | None, Option(help="Memory for models, as 16GiB or cpu=50%,cuda:0=90%.")
    ] = None
    max_loading: Annotated[int | None, Option(help="Models that load at a time.")] = None


def serve(
    common: Common, models: Models = None, *, service: ServiceFlags, flags: ModelFlags
) -> None:
    """Serve models over HTTP, as OpenAI's API does.

    API keys come from the configuration or HEADRACE_API_KEYS: a flag would be visible to all users
    of this machine.
    """

    def read() -> tuple[Settings, list[ModelSpec]]:
        settings = flags.settings(common, service=True, **given(service))
        return settings, wanted(settings, models or [])

    run(read, as_json=bool(common.as_json))


def run(
    read: Read,
    *,
    as_json: bool,
    open: Open | None = None,
    wire: Callable[[Settings], socket.socket] | None = None,
    listening: Callable[[str], None] | None = None,
) -> None:
    """Serve what `read` returns until a signal; `open` and `wire` are as for `service.live`.

    `listening` is called with the URL, when requests are accepted.
    """
    settings, specs = read()
    config = _with_database(settings.config)
    server = config.server
    _warn_of_keys(server)
    with (
        _main_socket(server) as listener,
        _second(server, server.ollama_port) as ollama,
        _second(server, _metrics_port(config)) as metrics,
        listen_for_dbgpt(config) as dbgpt,
        wire(settings) if wire is not None else contextlib.nullcontext() as fronts,
    ):
        from headrace.cli.service import live
        from headrace.machine import loop_factory

        task = _task(specs[0], settings.config) if specs else "generate"
        others = {"metrics": metrics, "ollama": ollama, "dbgpt": dbgpt, "wire": fronts}
        show = functools.partial(
            announce, listener, specs, server, others, as_json=as_json, task=task
        )

        def begun() -> None:
            show()
            if listening is not None:
                listening(url_of(listener))

        with asyncio.Runner(loop_factory=loop_factory()) as runner:
            runner.run(
                live(
                    settings, specs, listener, reread=read, announce=begun, open=open, others=others
                )
            )


def _task(spec: ModelSpec, config: Config) -> Task:
    """Return what a model is for; generation if only its download would show it."""
    from headrace import runtime

    with contextlib.suppress(HeadraceError):
        tasks = runtime.describe(spec, config).capabilities.tasks
        return next(task for task in _EXAMPLES if task in tasks)
    return "generate"


def _metrics_port(config: Config) -> int | None:
    return config.telemetry.metrics_port if config.telemetry.metrics else None


def _second(
    server: ServerSettings, port: int | None
) -> contextlib.AbstractContextManager[socket.socket | None]:
    """Return a socket on another port of the server's address."""
    if port is None:
        return contextlib.nullcontext()
    return listen(server.model_copy(update={"port": port}))


def listen_for_dbgpt(config: Config) -> contextlib.AbstractContextManager[socket.socket | None]:
    """Return a socket for a DB-GPT cluster.

    Raises:
        ConfigError: requests without a key are not allowed there, or it cannot be bound.
    """
    settings = config.dbgpt
    if not settings.controller:
        return contextlib.nullcontext()
    allow = 'Allow it with [dbgpt] without_key = "use" (or "manage", to start and stop models too).'
    is_refused = settings.without_key == "refuse"
    if is_refused and has_keys(config.server):
        raise ConfigError(
            f"DB-GPT sends no key, and requests to this service need one. {allow}",
            param="dbgpt.without_key",
        )
    public = f"{settings.host} is reachable from other machines, and DB-GPT sends no key. {allow}"
    return _bound(settings.host, settings.port, public if is_refused else "", "dbgpt.without_key")


def _warn_of_keys(server: ServerSettings) -> None:
    from headrace.config.sources import CLIENT_KEYS

    named = [name for name in CLIENT_KEYS if os.environ.get(name)]
    if named and not has_keys(server):
        terminal.note(
            f"warning: {named[0]} is the key that commands send; this service needs no key. "
            "HEADRACE_API_KEYS, HEADRACE_ADMIN_KEYS and `headrace keys` set those."
        )


def has_keys(server: ServerSettings) -> bool:
    """Whether requests need a key."""
    return bool(server.api_keys or server.admin_keys or server.database)


def _with_database(config: Config) -> Config:
    """Return the configuration with the address of the default database, if that has keys."""
    from headrace.keys.book import has_keys as has_rows
    from headrace.keys.database import FILE

    path = config.home / FILE
    if config.server.database or not path.exists() or not has_rows(path):
        return config
    return config.model_copy(
        update={"server": config.server.model_copy(update={"database": str(path)})}
    )


def wanted(settings: Settings, names: Sequence[str]) -> list[ModelSpec]:
    """Return the models to be served.

    Raises:
        ConfigError: two of them would have the same name.
        HeadraceError: a reference is malformed, there is no such file, it is damaged, or no engine
            can run it; only what a download would show is not known yet.
    """
    from headrace import runtime
    from headrace.models.reference import parse

    config = settings.config
    chosen = names or list(config.models) or [config.default_model]
    specs = {spec.name: spec for spec in (settings.model_spec(name) for name in chosen)}
    if len(specs) < len({settings.model_spec(name).model for name in chosen}):
        raise ConfigError("Two models have the same name; name them apart in a headrace.toml.")
    for spec in specs.values():
        parse(spec.model)
        if spec.enabled and spec.preload:
            runtime.describe(spec, config)
    return list(specs.values())


def listen(server: ServerSettings) -> socket.socket:
    """Return a listening socket.

    Raises:
        ConfigError: the address is public and no key is set, or it cannot be bound.
    """
    return _bound(server.host, server.port, _public(server, server.host), "host")


def _main_socket(server: ServerSettings) -> socket.socket:
    """Return the socket that a supervisor has opened, or one on the configured address."""
    passed = supervised.passed_socket(os.environ)
    if passed is None:
        return listen(server)
    host = str(passed.getsockname()[0])
    if not _is_loopback(host) and (public := _public(server, host)):
        passed.close()
        raise ConfigError(public, param="host")
    return passed


def _public(server: ServerSettings, host: str) -> str:
    """Return the error for an address beyond loopback; empty if it is allowed."""
    if has_keys(server) or server.allow_public:
        return ""
    return (
        f"{host} is reachable from other machines and no API key is set: set "
        "HEADRACE_API_KEYS or `headrace keys create` one, or allow it with --allow-public."
    )


def _bound(host: str, port: int, public: str, param: str) -> socket.socket:
    """Return a socket that listens; `public` is the error for an address beyond loopback."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        if public and not _is_loopback(str(address[0])):
            raise ConfigError(public, param=param)
        # `::` is every address of this machine, those of IPv4 too.
        both = address[0] == "::" and socket.has_dualstack_ipv6()
        return socket.create_server(address, family=family, backlog=_BACKLOG, dualstack_ipv6=both)
    except OSError as error:
        raise ConfigError(f"Cannot listen on {host}:{port}: {error.strerror or error}.") from error


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def announce(
    listener: socket.socket,
    specs: Sequence[ModelSpec],
    settings: ServerSettings,
    others: Mapping[str, socket.socket | None] | None = None,
    *,
    task: Task = "generate",
    as_json: bool,
) -> None:
    """Print the address, and an example of a request for the first model, which has this task."""
    url = url_of(listener)
    names = [spec.name for spec in specs]
    extra = {
        name: _place_of(name, other) for name, other in (others or {}).items() if other is not None
    }
    if as_json:
        print(json.dumps({"url": url, "models": names, **extra}), flush=True)
        return
    print(f"Headrace serves {', '.join(names) or 'its cluster'} on {url}", flush=True)
    for name, place in extra.items():
        print(_PLACES[name].format(place), flush=True)
    if not names:
        return
    route, fields = _EXAMPLES[task]
    body = shlex.quote(json.dumps({"model": names[0], **fields}))
    key = ' -H "Authorization: Bearer $KEY"' if has_keys(settings) else ""
    print(f"Try: curl {url}{route} -H 'Content-Type: application/json'{key} -d {body}", flush=True)


def _place_of(name: str, listener: socket.socket) -> str:
    url = url_of(listener)
    if name == "wire":
        return url.removeprefix("http://")
    return f"{url}/metrics" if name == "metrics" else url


def url_of(listener: socket.socket) -> str:
    """Return the URL of a listening socket."""
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"
