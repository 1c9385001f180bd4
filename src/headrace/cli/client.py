"""The HTTP side of the commands that speak to a running service."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Awaitable, Callable, Generator, Mapping
from typing import Any, TypeVar

import httpx2 as httpx
import msgspec

from headrace.config import Settings
from headrace.config.sources import CLIENT_KEYS
from headrace.core import errors
from headrace.core.errors import ConfigError, HeadraceError
from headrace.core.record import Activity
from headrace.core.status import ModelStatus, Plan, PoolEvent, PoolStatus, Reloaded

T = TypeVar("T")

_ANY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}  # noqa: S104 - not to bind
_CONNECT_S = 5.0
_LONGEST_EXCERPT = 200


class _Detail(msgspec.Struct, frozen=True):
    message: str
    param: str | None = None
    code: str | None = None


class _Body(msgspec.Struct, frozen=True):
    error: _Detail


def address(settings: Settings, url: str | None) -> str:
    """Return where the service is: as told, from HEADRACE_URL, or where `serve` would listen.

    Raises:
        ConfigError: it cannot be known.
    """
    if told := url or os.environ.get("HEADRACE_URL"):
        told = told if "://" in told else f"http://{told}"
        return told.rstrip("/").removesuffix("/v1")
    server = settings.config.server
    if server.port == 0:
        raise ConfigError("The port is a free one; say which with --url.", param="port")
    host = _ANY_ADDRESS.get(server.host, server.host)
    return f"http://{f'[{host}]' if ':' in host else host}:{server.port}"


def ask(settings: Settings, url: str | None, work: Callable[[Client], Awaitable[T]]) -> T:
    """Do something with a running service, and return what came of it."""

    async def asked() -> T:
        async with Client(address(settings, url)) as client:
            return await work(client)

    return asyncio.run(asked())


class Client:
    """A running service, as an operator sees it. All methods raise what the service answers.

    Raises:
        ConfigError: the address is none.
        UpstreamError: nobody listens there (`param` is then `url`), or what does has gone.
        HeadraceError: the error of the service, as its own class.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        key = next((os.environ[name] for name in CLIENT_KEYS if os.environ.get(name)), None)
        self._http = httpx.AsyncClient(
            base_url=_checked(url),
            headers={"Authorization": f"Bearer {key}"} if key else {},
            # A load takes as long as it takes.
            timeout=httpx.Timeout(None, connect=_CONNECT_S),
            # A proxy that is meant for the web does not know this machine.
            trust_env=url.startswith("https:"),
        )

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def status(self) -> PoolStatus:
        """Ask how all models stand."""
        return await self._ask("GET", "/admin/models", PoolStatus)

    async def activity(self) -> Activity:
        """Ask what runs now, and how each model has done of late."""
        return await self._ask("GET", "/admin/activity", Activity)

    async def order(self, what: str, model: str, **fields: Any) -> ModelStatus:
        """Order one of `load`, `unload`, `restart`, `pin` and `update`, and wait for its end."""
        body = {"model": model, **fields}
        return await self._ask("POST", f"/admin/models/{what}", ModelStatus, body)

    async def plan(self, model: str) -> Plan:
        """Ask what loading a model would need."""
        return await self._ask("GET", "/admin/plan", Plan, query={"model": model})

    async def reload(self) -> Reloaded:
        """Let the service read its configuration again."""
        return await self._ask("POST", "/admin/reload", Reloaded)

    async def follow(self, each: Callable[[PoolEvent], None]) -> None:
        """Call `each` with what happens, until the service ends."""
        with self._named():
            async with self._http.stream("GET", "/admin/events") as answer:
                if answer.is_error:
                    await answer.aread()
                    raise _refusal(answer)
                async for line in answer.aiter_lines():
                    if line.startswith("data:"):
                        each(self._decoded(line[5:], PoolEvent))

    async def _ask(
        self,
        method: str,
        path: str,
        kind: type[T],
        body: object = None,
        query: Mapping[str, str] | None = None,
    ) -> T:
        with self._named():
            answer = await self._http.request(method, path, json=body, params=query)
        if answer.is_error:
            raise _refusal(answer)
        return self._decoded(answer.content, kind)

    def _decoded(self, content: bytes | str, kind: type[T]) -> T:
        try:
            return msgspec.json.decode(content, type=kind)
        except msgspec.MsgspecError as error:
            raise errors.UpstreamError(
                f"What answers at {self.url} is no Headrace, or another version of it.",
                detail=str(error),
            ) from None

    @contextlib.contextmanager
    def _named(self) -> Generator[None]:
        try:
            yield
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise errors.UpstreamError(
                f"No service at {self.url}; start one with `headrace serve`.",
                param="url",
                detail=str(error),
            ) from None
        except httpx.HTTPError as error:
            raise errors.UpstreamError(
                f"The service at {self.url} has gone.", detail=f"{type(error).__name__}: {error}"
            ) from None


def _checked(text: str) -> httpx.URL:
    try:
        url = httpx.URL(text)
    except httpx.InvalidURL as error:
        raise ConfigError(f"{text} is no URL: {error}.", param="url") from None
    if url.scheme not in ("http", "https") or not url.host:
        raise ConfigError(f"{text} is no URL of a service, as http://HOST:PORT.", param="url")
    return url


def _refusal(answer: httpx.Response) -> HeadraceError:
    """Return the error of the service as it was raised there."""
    try:
        detail = msgspec.json.decode(answer.content, type=_Body).error
    except msgspec.MsgspecError:
        excerpt = " ".join(answer.text.split())[:_LONGEST_EXCERPT]
        said = f"What answers at {answer.url} is no Headrace: {answer.status_code} {excerpt}"
        return errors.UpstreamError(said)
    kind, message = _kind(answer.status_code, detail.code), detail.message
    if answer.status_code in (401, 403):
        message = f"{message} Set HEADRACE_ADMIN_KEY."
    return kind(message, param=detail.param)


def _kind(status: int, code: str | None) -> type[HeadraceError]:
    from headrace.api.problems import KINDS

    known = {code: kind for kind, (_, _, code) in KINDS.items()}
    if code and code in known:
        return known[code]
    return errors.RequestError if status < 500 else errors.HeadraceError
