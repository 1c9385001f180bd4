"""The memory of request bodies in sum."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from headrace.api import limits
from headrace.api.bodies import Bodies, ClientGone
from headrace.api.problems import Refused

LIMIT = 8 << 20


class Client:
    """Sends a body in parts, when it is told to."""

    def __init__(self) -> None:
        self.parts: asyncio.Queue[dict[str, Any]] = asyncio.Queue()

    def send(self, size: int, *, more: bool = True) -> None:
        self.parts.put_nowait({"type": "http.request", "body": b"a" * size, "more_body": more})

    async def receive(self) -> dict[str, Any]:
        return await self.parts.get()


async def test_bodies_are_bounded_in_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    """Issue 11.1: many unfinished bodies do not fill the memory, and small ones still pass."""
    monkeypatch.setattr(limits, "MAX_BODIES", 3 << 20)
    bodies = Bodies()
    clients = [Client() for _ in range(4)]
    reads = [asyncio.ensure_future(bodies.read(client.receive, LIMIT)) for client in clients]
    for client in clients:
        client.send(1 << 20)
    with pytest.raises(Refused) as refused:
        await reads[-1]
    assert (refused.value.problem.status, refused.value.problem.code) == (503, "too_many_bodies")
    assert bodies.size == 3 << 20
    clients[0].send(1)
    with pytest.raises(Refused):
        await reads[0]
    small = Client()
    small.send(1000)
    small.send(1000, more=False)
    assert len(await bodies.read(small.receive, LIMIT)) == 2000
    clients[1].send(1, more=False)
    assert len(await reads[1]) == (1 << 20) + 1
    clients[2].parts.put_nowait({"type": "http.disconnect"})
    with pytest.raises(ClientGone):
        await reads[2]
    assert bodies.size == 0
