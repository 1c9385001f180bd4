"""The memory of request bodies in sum."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from typing import Any

import pytest
from tests.api import fakes

from headrace.api import limits
from headrace.api.bodies import KEPT, Bodies, ClientGone, Kept
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


def test_the_bodies_of_requests_that_wait_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Issue 11.5: 150 counts of 8 MB took 2.5 GB; one key has half of what is kept at most."""
    monkeypatch.setattr(limits, "MAX_KEPT", 4 << 20)
    kept = Kept()
    with ExitStack() as held:
        for client in ("a", "a", "b"):
            held.enter_context(kept.hold(1 << 20, client))
        for size, client in ((1 << 20, "a"), (2 << 20, "c")):
            with pytest.raises(Refused) as refused, kept.hold(size, client):
                pass
            assert refused.value.problem.code == "too_many_bodies"
        with kept.hold(1 << 20, "c"), kept.hold(limits.SMALL_BODY, "a"):
            assert kept.size == (4 << 20) + limits.SMALL_BODY
    assert kept.size == 0
    with kept.hold(5 << 20, "a"):
        assert kept.size == 5 << 20


async def test_a_body_is_kept_until_the_answer_has_ended() -> None:
    during: list[int] = []

    class Backend(fakes.FakeBackend):
        def ask(self, request: Any) -> Any:
            during.append(KEPT.size)
            return super().ask(request)

    body = b'{"model":"m","messages":[{"role":"user","content":"x"}]}'
    kind = {"content-type": "application/json"}
    async with fakes.client(Backend()) as http:
        answer = await http.post("/v1/chat/completions", content=body, headers=kind)
    assert answer.status_code == 200
    assert during == [len(body)]
    assert KEPT.size == 0
