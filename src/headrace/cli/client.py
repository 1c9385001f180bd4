"""An HTTP client of a running service, for the commands that use one."""

from __future__ import annotations

import contextlib
import os
import re
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Generator, Mapping
from typing import Any, TypeVar
from urllib.parse import quote

import httpx2 as httpx
import msgspec

from headrace.config.sources import CLIENT_KEYS
from headrace.core import errors
from headrace.core.errors import ConfigError, HeadraceError
from headrace.core.record import Activity
from headrace.core.status import ModelStatus, NodeStatus, Plan, PoolEvent, PoolStatus, Reloaded
from headrace.text.chunks import Malformed, is_end
from headrace.text.sse import EventReader, EventTooLong

T = TypeVar("T")

_CONNECT_S = 5.0
_LONGEST_EXCERPT = 200


class _Detail(msgspec.Struct, frozen=True):
    message: str
    param: str | None = None
    code: str | None = None


class _Body(msgspec.Struct, frozen=True):
    error: _Detail


class Card(msgspec.Struct, frozen=True):
    """What a service lists of a model."""

    id: str
    aliases: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    state: str = ""
    tools: str = "none"
    capabilities: tuple[str, ...] = ()
    context_length: int | None = None
    slots: int | None = None

    @property
    def calls_tools(self) -> bool:
        """Whether it calls tools, as far as is known: until it is loaded, it is not."""
        return self.tools != "none" or self.state != "ready"


class AdapterCard(msgspec.Struct, frozen=True):
    """An adapter of a model; requests name it by its `id` or an alias."""

    adapter: str
    id: str
    aliases: tuple[str, ...]
    source: str


class _Adapters(msgspec.Struct, frozen=True):
    data: tuple[AdapterCard, ...]


class _Cards(msgspec.Struct, frozen=True):
    data: tuple[Card, ...]


class Client:
    """A client of a running service; its methods raise the errors of the service.

    Raises:
        ConfigError: the URL is not valid.
        UpstreamError: nothing listens there (`param` is then `url`), or the service has ended.
        HeadraceError: the error of the service, by its own class.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.key = key = _key()
        address = _checked(url)
        is_secure = address.scheme == "https"
        self._http = httpx.AsyncClient(
            base_url=address,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            # A load has no time limit.
            timeout=httpx.Timeout(None, connect=_CONNECT_S),
            # A proxy for the web cannot reach a service on this machine.
            trust_env=is_secure,
            # Certificates take 50 ms to read.
            verify=is_secure,
        )

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def status(self) -> PoolStatus:
        """Return the state of all models and devices."""
        return await self._ask("GET", "/admin/models", PoolStatus)

    async def activity(self) -> Activity:
        """Return the running requests, and the recent rates of each model."""
        return await self._ask("GET", "/admin/activity", Activity)

    async def names(self) -> dict[str, str]:
        """Return the id of each model by its id, its aliases and, for an admin, its reference.

        A reference of several models, which differ in their settings, is left out.
        """
        try:
            models = (await self.status()).models
        except (errors.RequestError, errors.UpstreamError):
            models = await self.cards()
        sources = Counter(getattr(model, "source", "") for model in models)
        references = {
            source: model.id
            for model in models
            if sources[source := getattr(model, "source", "")] == 1
        }
        return references | {name: m.id for m in models for name in (*m.aliases, m.id)}

    async def cards(self) -> tuple[Card, ...]:
        """Return what the service lists of its models."""
        return (await self._ask("GET", "/v1/models", _Cards)).data

    async def slots(self) -> dict[str, int | None]:
        """Return how many requests each model runs at a time, by its id and its aliases.

        None is not known, as before its first load.
        """
        models = await self.cards()
        return {name: model.slots for model in models for name in (model.id, *model.aliases)}

    async def post(self, path: str, body: bytes, headers: Mapping[str, str]) -> httpx.Response:
        """Send a body of JSON, and return the answer, also if it is an error.

        Raises:
            RequestError: the key is missing, unknown, or not for this.
        """
        kind = {"Content-Type": "application/json"}
        with self._named_errors():
            response = await self._http.post(path, content=body, headers=kind | dict(headers))
        if response.status_code in (401, 403):
            raise _refusal(response)
        return response

    async def order(self, action: str, model: str, **fields: Any) -> ModelStatus:
        """Request `load`, `unload`, `restart`, `pin` or `update`, and wait for its end."""
        body = {"model": model, **fields}
        return await self._ask("POST", f"/admin/models/{action}", ModelStatus, body)

    async def adapters(self, model: str) -> tuple[AdapterCard, ...]:
        """Return the adapters of a model."""
        return (await self._ask("GET", _adapters_of(model), _Adapters)).data

    async def add_adapter(self, model: str, body: Mapping[str, object]) -> ModelStatus:
        """Add an adapter to a model, or replace one."""
        return await self._ask("POST", _adapters_of(model), ModelStatus, body)

    async def remove_adapter(self, model: str, adapter: str) -> ModelStatus:
        """Remove an adapter from a model."""
        path = f"{_adapters_of(model)}/{quote(adapter)}"
        return await self._ask("DELETE", path, ModelStatus)

    async def drain(self, node: str, *, on: bool) -> NodeStatus:
        """Let a front send nothing new to a node, or send requests to it again."""
        return await self._ask("POST", "/admin/nodes/drain", NodeStatus, {"node": node, "on": on})

    async def plan(self, model: str) -> Plan:
        """Return what loading a model would need."""
        return await self._ask("GET", "/admin/plan", Plan, query={"model": model})

    async def reload(self) -> Reloaded:
        """Let the service read its configuration again."""
        return await self._ask("POST", "/admin/reload", Reloaded)

    def events(self) -> AsyncGenerator[PoolEvent]:
        """Yield the events of the service as they happen, until it ends."""
        return self.stream("GET", "/admin/events", msgspec.json.Decoder(PoolEvent).decode)

    async def stream(
        self, method: str, path: str, decode: Callable[[bytes], T], body: object = None
    ) -> AsyncGenerator[T]:
        """Yield the data of server-sent events, decoded, until the stream ends."""
        reader = EventReader()
        with self._named_errors():
            async with self._http.stream(method, path, json=body) as response:
                if response.is_error:
                    await response.aread()
                    raise _refusal(response)
                async for chunk in response.aiter_bytes():
                    for data in reader.feed(chunk):
                        if not is_end(data):
                            yield self._decoded(data, decode)

    async def _ask(
        self,
        method: str,
        path: str,
        kind: type[T],
        body: object = None,
        query: Mapping[str, str] | None = None,
    ) -> T:
        with self._named_errors():
            response = await self._http.request(method, path, json=body, params=query)
        if response.is_error:
            raise _refusal(response)
        return self._decoded(response.content, msgspec.json.Decoder(kind).decode)

    def _decoded(self, content: bytes, decode: Callable[[bytes], T]) -> T:
        try:
            return decode(content)
        except (msgspec.MsgspecError, Malformed) as error:
            raise errors.UpstreamError(
                f"The service at {self.url} is no Headrace, or another version of it.",
                detail=str(error),
            ) from None

    @contextlib.contextmanager
    def _named_errors(self) -> Generator[None]:
        try:
            yield
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise errors.UpstreamError(
                f"No service at {self.url}; start one with `headrace serve`.",
                param="url",
                detail=str(error),
            ) from None
        except EventTooLong:
            raise errors.UpstreamError(
                f"The service at {self.url} sent an event that is too long."
            ) from None
        except httpx.HTTPError as error:
            raise errors.UpstreamError(
                f"The service at {self.url} has gone.", detail=f"{type(error).__name__}: {error}"
            ) from None


def _adapters_of(model: str) -> str:
    return f"/admin/models/{quote(model)}/adapters"


def _key() -> str | None:
    """Return the key of the environment.

    Raises:
        ConfigError: it has characters that no header can have.
    """
    name = next((name for name in CLIENT_KEYS if os.environ.get(name, "").strip()), None)
    key = os.environ[name].strip() if name else None
    if key and not re.fullmatch(r"[!-~]+", key):
        # The HTTP library's error would contain it.
        raise ConfigError(f"The key in {name} has characters that are not allowed.", param="key")
    return key


def _checked(text: str) -> httpx.URL:
    try:
        url = httpx.URL(text)
    except httpx.InvalidURL as error:
        raise ConfigError(f"{text} is no URL: {error}.", param="url") from None
    if url.scheme not in ("http", "https") or not url.host:
        raise ConfigError(f"{text} is no URL of a service, as http://HOST:PORT.", param="url")
    return url


def _refusal(response: httpx.Response) -> HeadraceError:
    """Return the error that was raised in the service."""
    try:
        detail = msgspec.json.decode(response.content, type=_Body).error
    except msgspec.MsgspecError:
        excerpt = " ".join(response.text.split())[:_LONGEST_EXCERPT]
        return errors.UpstreamError(
            f"The service at {response.url} is no Headrace: {response.status_code} {excerpt}"
        )
    message = detail.message
    if response.status_code in (401, 403):
        scope = "ADMIN" if "/admin/" in response.url.path else "API"
        message = f"{message} Set HEADRACE_{scope}_KEY."
    return _kind(response.status_code, detail.code)(message, param=detail.param)


def _kind(status: int, code: str | None) -> type[HeadraceError]:
    from headrace.api.problems import KINDS

    known = {code: kind for kind, (_, _, code) in KINDS.items()}
    if code and code in known:
        return known[code]
    return errors.RequestError if status < 500 else errors.HeadraceError
