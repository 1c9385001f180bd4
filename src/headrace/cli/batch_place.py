"""Where the requests of `headrace batch` are answered: a running service, or this process."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncGenerator, Callable, Collection, Mapping
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import TYPE_CHECKING

import msgspec

from headrace.api.batch.lines import Item
from headrace.api.batch.work import Reply, Send
from headrace.cli import terminal
from headrace.cli.common import address
from headrace.cli.remote import listens
from headrace.core.errors import HeadraceError, UpstreamError

if TYPE_CHECKING:
    from headrace.cli.client import Client
    from headrace.config import Settings
    from headrace.core.model import ModelSpec
    from headrace.pool.pool import Pool

Place = Callable[[], AbstractAsyncContextManager[tuple[Send, Callable[[], int]]]]
"""Opens the place: yields what sends a request, and returns how many run at a time."""

_PATIENCE_S = 2.0
# For a service that is started again.
_GONE_S = 60.0
_AGAIN_S = 1.0
_GUESSED_SLOTS = 8
_LOOK_EVERY_S = 2.0
_GIVES_WAY = {"X-Headrace-Priority": "batch"}


def open_place(
    settings: Settings, models: Collection[str], *, url: str | None, local: bool
) -> Place:
    """Return where requests for these models are answered; an empty name is for any model.

    Raises:
        HeadraceError: a model cannot be served here.
    """
    explicit = bool(url or os.environ.get("HEADRACE_URL"))
    if not local and (explicit or (settings.config.server.port and listens(settings))):
        base = address(settings, url)
        if explicit or asyncio.run(_has(base, models)):
            return partial(_service, base, models)
    return partial(_here, settings, _specs(settings, models))


async def _has(url: str, models: Collection[str]) -> bool:
    """Whether a service has all these models."""
    from headrace.cli.client import Client

    try:
        async with Client(url) as client, asyncio.timeout(_PATIENCE_S):
            return {*models} - {""} <= {*await client.slots()}
    except (HeadraceError, TimeoutError):
        return False


@contextlib.asynccontextmanager
async def _service(
    url: str, models: Collection[str]
) -> AsyncGenerator[tuple[Send, Callable[[], int]]]:
    from headrace.cli.client import Client

    async with Client(url) as client:
        slots = _Slots(models)
        learning = asyncio.create_task(slots.learn(client))
        try:
            yield _Sender(client).send, slots
        finally:
            learning.cancel()
            await asyncio.wait({learning})


class _Slots:
    """How many requests the models run at a time, as the service reports it."""

    def __init__(self, models: Collection[str]) -> None:
        self._models = models
        self._slots = _GUESSED_SLOTS

    def __call__(self) -> int:
        return self._slots

    async def learn(self, client: Client) -> None:
        """Look until all models are loaded, which is when their slots are known."""
        while True:
            with contextlib.suppress(HeadraceError):
                if self.saw(await client.slots()):
                    return
            await asyncio.sleep(_LOOK_EVERY_S)

    def saw(self, slots: Mapping[str, int | None]) -> bool:
        """Take the slots of the models that are served; return whether all are known."""
        known = [slots.get(name) for name in self._models if name]
        known = known or [next(iter(slots.values()), None)]
        self._slots = sum(number for number in known if number) or _GUESSED_SLOTS
        return all(known)


class _Sender:
    """Sends requests to a service, also to one that is started again meanwhile."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._reached = float("-inf")

    async def send(self, item: Item) -> Reply:
        """Return what the service answers.

        Raises:
            UpstreamError: there is no service, or has been none for some time.
            RequestError: it refuses the key.
        """
        while True:
            try:
                response = await self._client.post(item.url, item.body, _GIVES_WAY)
                break
            except UpstreamError:
                if time.monotonic() - self._reached > _GONE_S:
                    raise
                await asyncio.sleep(_AGAIN_S)
        self._reached = time.monotonic()
        headers = response.headers
        after_s = _number(headers.get("retry-after"))
        after_ms = _number(headers.get("retry-after-ms"))
        wait_s = after_s if after_ms is None else after_ms / 1000
        return Reply(
            response.status_code, headers.get("x-request-id", ""), response.content, wait_s
        )


def _number(text: str | None) -> float | None:
    """Return a header that is a number; a date is none."""
    try:
        return float(text) if text else None
    except ValueError:
        return None


def _specs(settings: Settings, models: Collection[str]) -> list[ModelSpec]:
    """Return the models to be loaded here, each with the names that requests use for it."""
    from headrace.cli.serve import wanted

    names = sorted({name or settings.config.default_model for name in models})
    specs = {spec.name: spec for spec in wanted(settings, names)}
    for name in names:
        spec = specs[settings.model_spec(name).name]
        known = spec.names
        more = () if name in known else (name,)
        specs[spec.name] = msgspec.structs.replace(spec, aliases=(*spec.aliases, *more))
    return [*specs.values()]


@contextlib.asynccontextmanager
async def _here(
    settings: Settings, specs: list[ModelSpec]
) -> AsyncGenerator[tuple[Send, Callable[[], int]]]:
    from headrace import runtime
    from headrace.api.batch.local import ask
    from headrace.api.exchange import Call, Service
    from headrace.api.limits import ApiSettings

    pool = runtime.open_pool(settings, specs)
    service = Service(pool, ApiSettings())

    async def send(item: Item) -> Reply:
        return await ask(service, item.url, item.body, Call(is_admin=True))

    try:
        await _start(pool)
        slots = sum(entry.slots for entry in pool.entries.values())
        yield send, lambda: slots or _GUESSED_SLOTS
    finally:
        await pool.aclose()


async def _start(pool: Pool) -> None:
    """Load the models; on a terminal, show how far that is."""
    with terminal.progress() as report:
        starting = asyncio.create_task(pool.start())
        try:
            while not starting.done():
                for entry in pool.entries.values():
                    if entry.stage[0]:
                        report(f"{entry.spec.name}: {entry.stage[0]}", *entry.stage[1:])
                await asyncio.wait({starting}, timeout=0.1)
            starting.result()
        finally:
            starting.cancel()
            await asyncio.wait({starting})
