"""The model of a running service, as `headrace run` uses it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from headrace.cli.common import address
from headrace.core.errors import ConfigError, HeadraceError, RequestError, UpstreamError
from headrace.core.model import ModelSpec

if TYPE_CHECKING:
    from headrace.cli.client import Client
    from headrace.config import Settings

_PATIENCE_S = 2.0
# A service may load the model first.
_LOAD_S = 3600.0


def served(settings: Settings, name: str | None, url: str | None) -> ModelSpec | None:
    """Return a model of a running service, as an upstream; None if it has no such model.

    `name` is what the user wrote, by default the configured model. With a `url`, or HEADRACE_URL,
    there has to be a service, and with a `url` it is the one that refuses an unknown model.

    Raises:
        HeadraceError: there is no service at the given address, or no single model to choose.
    """
    explicit = bool(url or os.environ.get("HEADRACE_URL"))
    if not explicit and not (settings.config.server.port and listens(settings)):
        return None
    return asyncio.run(_served(settings, name, url, explicit=explicit))


def listens(settings: Settings) -> bool:
    """Whether a program listens where `headrace serve` would; without a library for HTTP."""
    place = urlsplit(address(settings, None))
    try:
        socket.create_connection((place.hostname or "", place.port or 80), 0.5).close()
    except OSError:
        return False
    return True


async def _served(
    settings: Settings, name: str | None, url: str | None, *, explicit: bool
) -> ModelSpec | None:
    from headrace.cli.client import Client

    async with Client(address(settings, url)) as client:
        if url and name:
            return _upstream(client, name)
        try:
            async with asyncio.timeout(_PATIENCE_S):
                names = await client.names()
        except (HeadraceError, TimeoutError) as error:
            if not explicit:
                return None
            if isinstance(error, HeadraceError):
                raise
            raise UpstreamError(f"The service at {client.url} does not answer.") from None
    if url and not name:
        return _upstream(client, _only(set(names.values()), client.url))
    wanted = name or settings.config.default_model
    if not (known := names.get(wanted)):
        same = _canonical(settings.model_spec(wanted).model)
        known = next((id for name, id in names.items() if _reference(name) == same), None)
    return _upstream(client, known) if known else None


def _canonical(reference: str) -> str:
    from headrace.models.reference import parse

    return str(parse(reference))


def _reference(name: str) -> str | None:
    """Return a reference in its canonical form; None for a name, or a path in another folder."""
    with contextlib.suppress(RequestError):
        if not (canonical := _canonical(name)).startswith("/") or name.startswith("/"):
            return canonical
    return None


def _only(names: set[str], url: str) -> str:
    if len(names) != 1:
        listed = ", ".join(sorted(names)) or "none"
        raise ConfigError(f"Name a model of the service at {url}: {listed}.", param="model")
    return names.pop()


def _upstream(client: Client, name: str) -> ModelSpec:
    options = {"base_url": f"{client.url}/v1", "first_token_s": _LOAD_S, "stall_s": _LOAD_S}
    key = {"api_key": client.key} if client.key else {}
    return ModelSpec(name=name, model=f"headrace:{name}", options=options | key)
