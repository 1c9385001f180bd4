"""A client that goes away, in each phase, streamed or not."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterable
from typing import Any

import pytest
from tests.api.fakes import CHAT, TEXT, FakeBackend, chat, text

from headrace.api import limits
from headrace.api.app import Application, create_app
from headrace.api.limits import ApiSettings
from headrace.core.backend import Backend
from headrace.core.events import Delta, Progress
from headrace.core.request import AnyRequest
from headrace.testing import Barrier, Step


class Wire:
    """One raw ASGI connection whose client can leave."""

    def __init__(
        self,
        backend: Backend,
        path: str,
        body: Any,
        *,
        stalls: bool = False,
        app: Application | None = None,
        **settings: Any,
    ) -> None:
        self.sent: list[dict[str, Any]] = []
        self.stalls = stalls
        self.sending = asyncio.Event()
        self.gone = asyncio.Event()
        self._incoming = [{"type": "http.request", "body": json.dumps(body).encode()}]
        scope = {
            "type": "http",
            "method": "POST",
            "path": path,
            "query_string": b"",
            "headers": [(b"host", b"localhost")],
        }
        app = app or create_app(backend, ApiSettings(**settings))
        self.task = asyncio.ensure_future(app(scope, self._receive, self._send))

    async def _receive(self) -> Any:
        if self._incoming:
            return self._incoming.pop()
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        self.sent.append(message)
        if message.get("body"):
            self.sending.set()
            if self.stalls:
                await asyncio.Event().wait()
        if message["type"] == "http.response.body" and not message.get("more_body"):
            self.gone.set()  # as our server has it: the end of the answer reads as a disconnect

    async def leave(self) -> None:
        self.gone.set()
        async with asyncio.timeout(0.25):
            await self.task


class Stuck:
    """A script that waits at one place until it is closed; `there` is set once it waits."""

    def __init__(self, *before: Step) -> None:
        barrier = Barrier()
        self.there = barrier.reached
        self._steps = [*before, barrier]

    def __call__(self, _request: AnyRequest) -> Iterable[Step]:
        return self._steps


PHASES: dict[str, list[Step]] = {
    "queued": [Progress("queued")],
    "loading": [Progress("queued"), Progress("loading")],
    "prefill": [Progress("prefill", 1, 2)],
    "decode": [Progress("prefill"), Delta("Hi", (1,)), Delta(" you", (2,))],
}


@pytest.mark.parametrize("fields", [{}, {"stream": True}])
@pytest.mark.parametrize("phase", PHASES)
async def test_client_gone_closes_the_stream(
    phase: str, fields: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """W18: in each phase, streamed or not, the backend's generator has been closed."""
    caplog.set_level(logging.INFO, "headrace.access")
    before = asyncio.all_tasks()
    script = Stuck(*PHASES[phase])
    backend = FakeBackend(script)
    wire = Wire(backend, CHAT, chat(**fields))
    await script.there.wait()
    await wire.leave()
    assert (backend.running, len(backend.ended)) == (0, 1)
    assert bool(wire.sent) == (phase == "decode" and bool(fields))
    assert not any(b"[DONE]" in message.get("body", b"") for message in wire.sent)
    assert vars(caplog.records[-1])["data"]["outcome"] == "cancelled"
    assert asyncio.all_tasks() == before, "nothing is left running"


async def test_client_gone_while_comments_are_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """W18: also after the headers, while nothing has come yet."""
    script = Stuck()
    backend = FakeBackend(script)
    monkeypatch.setattr(limits, "COMMENT_EVERY_S", 0.01)
    wire = Wire(backend, CHAT, chat(stream=True), headers_after_s=0.01)
    await wire.sending.wait()
    await wire.leave()
    assert (backend.running, len(backend.ended)) == (0, 1)


@pytest.mark.parametrize("fields", [{}, {"stream": True}])
async def test_client_gone_closes_every_prompt(
    fields: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """W18: of several prompts, the running ones are closed and the waiting never begin."""
    before = asyncio.all_tasks()
    script = Stuck(Delta("Hi", (1,)))
    backend = FakeBackend(script)
    monkeypatch.setattr(limits, "PARALLEL_PROMPTS", 3)
    wire = Wire(backend, TEXT, text(["a", "b", "c", "d"], **fields))
    await script.there.wait()
    await wire.leave()
    assert (backend.running, len(backend.ended), len(backend.requests)) == (0, 3, 3)
    assert asyncio.all_tasks() == before


async def test_client_gone_while_a_slow_reader_blocks() -> None:
    """W18: a send that waits for the client does not keep the slot."""
    backend = FakeBackend(Stuck(Delta("Hi", (1,))))
    wire = Wire(backend, CHAT, chat(stream=True), stalls=True)
    await wire.sending.wait()
    await wire.leave()
    assert (backend.running, len(backend.ended)) == (0, 1)


async def test_client_gone_before_its_body_ended() -> None:
    """W18: half a request reaches no backend."""
    backend = FakeBackend()
    wire = Wire(backend, CHAT, chat())
    wire._incoming = [{"type": "http.request", "body": b"{", "more_body": True}]
    await asyncio.sleep(0)
    await wire.leave()
    assert backend.requests == []
    assert wire.sent == []


async def test_server_shutdown_closes_the_stream() -> None:
    """W18: cancelling the request itself gives everything back as well."""
    script = Stuck(Delta("Hi", (1,)))
    backend = FakeBackend(script)
    wire = Wire(backend, CHAT, chat(stream=True))
    await script.there.wait()
    wire.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await wire.task
    assert (backend.running, len(backend.ended)) == (0, 1)


@pytest.mark.parametrize("fields", [{}, {"stream": True}])
async def test_the_end_of_an_answer_is_no_disconnect(
    fields: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """W14: a server that reports the end as a disconnect does not turn it into a cancel."""
    caplog.set_level(logging.INFO, "headrace.access")
    backend = FakeBackend()
    wire = Wire(backend, CHAT, chat(**fields))
    await wire.task
    assert len(backend.ended) == 1
    assert vars(caplog.records[-1])["data"]["outcome"] == "ok"
