"""Requests of keys with limits, before and after they have begun."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from headrace.api.metered import Metered
from headrace.core.events import Delta
from headrace.core.keys import Account, Key, Limits
from headrace.core.request import GenerateRequest
from headrace.testing import ScriptedBackend, finish


async def test_later_events_are_read_from_the_backend_itself() -> None:
    """Issue 16: with limits a token costs what it costs without; benchmarks/front.py --keys."""
    key = Key(id="k", name="k", limits=Limits(requests_per_day=5), created=0)
    reserved: list[str] = []

    async def reserve(client: str, request: str, least: int, most: int) -> int:
        reserved.append(client)
        return most

    keys: Any = SimpleNamespace(account=lambda _: Account(key), reserve=reserve)
    backend = ScriptedBackend(lambda _: [Delta("a", (1,)), Delta("b", (2,)), finish()])
    stream = Metered(backend, keys).ask(GenerateRequest(prompt="x", client="k"))
    assert aiter(stream) is stream
    first = await anext(stream)
    assert (first, reserved) == (Delta("a", (1,)), ["k"])
    assert type(aiter(stream)) is type(backend.ask(GenerateRequest(prompt="x")))
    rest = [event async for event in stream]
    assert rest[0] == Delta("b", (2,))
    await stream.aclose()
    assert backend.running == 0
