"""The application behind its own server: the openai package, and real sockets."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Iterable
from typing import Any

import httpx
import openai
import pytest
from tests.api.fakes import CHAT, FakeAdmin, FakeBackend, chat, finish, hello
from tests.api.sockets import serving

from headrace.api import limits
from headrace.api.app import create_app
from headrace.api.limits import ApiSettings
from headrace.api.server import Server
from headrace.core.errors import QueueFull, WorkerDied
from headrace.core.events import Delta
from headrace.core.status import PoolEvent


def settings(port: int) -> dict[str, Any]:
    return {"base_url": f"http://127.0.0.1:{port}/v1", "api_key": "k", "max_retries": 0}


MESSAGES: Any = [{"role": "user", "content": "hi"}]
TEXT = 'Hello\n"ü'


def test_openai_sync() -> None:
    """A: the openai package, blocking, streamed and not."""
    with serving(FakeBackend()) as port, openai.OpenAI(**settings(port)) as http:
        assert [model.id for model in http.models.list()] == ["m", "org/big"]
        whole = http.chat.completions.create(model="m", messages=MESSAGES, n=2)
        assert [choice.message.content for choice in whole.choices] == [TEXT, TEXT]
        assert whole.usage is not None
        assert whole.usage.total_tokens == 8
        options: Any = {"include_usage": True}
        chunks = list(
            http.chat.completions.create(
                model="m", messages=MESSAGES, stream=True, stream_options=options
            )
        )
        texts = [chunk.choices[0].delta.content or "" for chunk in chunks[:-1]]
        assert "".join(texts) == TEXT, "W13"
        assert chunks[-2].choices[0].finish_reason == "stop"
        assert chunks[-1].usage == whole.usage, "W15"
        assert chunks[-1].model_extra is not None
        assert chunks[-1].model_extra["metrics"]["total_ms"] == 9.0, "W16"


def test_openai_completions() -> None:
    """A: several prompts through the openai package."""
    with serving(FakeBackend()) as port, openai.OpenAI(**settings(port)) as http:
        whole = http.completions.create(model="m", prompt=["a", "b"])
        assert [(one.index, one.text) for one in whole.choices] == [(0, TEXT), (1, TEXT)]
        stream = http.completions.create(model="m", prompt=[[1], [2]], stream=True)
        texts = ["", ""]
        for chunk in stream:
            texts[chunk.choices[0].index] += chunk.choices[0].text
        assert texts == [TEXT, TEXT]


async def test_openai_async() -> None:
    """A: the openai package, async, streamed and not, many at once."""

    async def streamed(http: openai.AsyncOpenAI) -> str:
        stream = await http.chat.completions.create(model="m", messages=MESSAGES, stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    with serving(FakeBackend()) as port:
        async with openai.AsyncOpenAI(**settings(port)) as http:
            whole = await http.chat.completions.create(model="m", messages=MESSAGES)
            assert whole.choices[0].message.content == TEXT
            assert await asyncio.gather(*(streamed(http) for _ in range(16))) == [TEXT] * 16


def test_openai_sees_errors_as_its_own() -> None:
    """W17: statuses and error events become the package's exceptions."""
    backend = FakeBackend(lambda _: [Delta("a", (1,)), WorkerDied("It died.")])
    with serving(backend) as port, openai.OpenAI(**settings(port)) as http:
        stream = http.chat.completions.create(model="m", messages=MESSAGES, stream=True)
        with pytest.raises(openai.APIError, match="It died"):
            list(stream)
        backend.script = lambda _: [QueueFull("Full.")]
        with pytest.raises(openai.RateLimitError):
            http.chat.completions.create(model="m", messages=MESSAGES)
        with pytest.raises(openai.NotFoundError):
            http.models.retrieve("none")
        with pytest.raises(openai.BadRequestError) as caught:
            http.chat.completions.create(model="m", messages=MESSAGES, temperature=3)
        assert caught.value.param == "temperature"
        with pytest.raises(openai.AuthenticationError):
            http.with_options(api_key="wrong").models.list()


def test_a_closed_socket_closes_the_stream() -> None:
    """W18: a client that drops its connection mid-stream frees the slot at once."""

    def endless(_request: Any) -> Iterable[Any]:
        while True:
            yield lambda: asyncio.sleep(0.005)
            yield Delta("x", (1,))

    backend = FakeBackend(endless)
    body = json.dumps(chat(stream=True)).encode()
    with serving(backend) as port:
        with socket.create_connection(("127.0.0.1", port)) as raw:
            head = (
                f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer k\r\n"
                f"content-length: {len(body)}\r\n\r\n"
            )
            raw.sendall(head.encode() + body)
            while b"data: " not in raw.recv(4096):
                pass
        deadline = time.monotonic() + 0.25
        while not backend.ended and time.monotonic() < deadline:
            time.sleep(0.005)
        assert (backend.running, len(backend.ended)) == (0, 1)


def test_one_connection_serves_many_requests() -> None:
    """A: refusals and streams leave the connection usable."""
    backend = FakeBackend(lambda request: [*hello(request)] if request.n == 1 else [finish()])
    with serving(backend) as port, openai.OpenAI(**settings(port)) as http:
        for _ in range(3):
            with pytest.raises(openai.BadRequestError):
                http.chat.completions.create(model="m", messages=[])
            stream = http.chat.completions.create(model="m", messages=MESSAGES, stream=True)
            assert len(list(stream)) == 4


@pytest.mark.parametrize("pool_ends", [True, False])
async def test_listeners_do_not_keep_the_server(
    pool_ends: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """M8: the streams of events end with the pool, or at the latest with the server's patience."""
    monkeypatch.setattr(limits, "CLOSE_TIMEOUT_S", 30 if pool_ends else 0.1)
    admin = FakeAdmin(PoolEvent(time=1, kind="draining"), None)
    server = Server(create_app(FakeBackend(), ApiSettings(), admin=admin))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        serve = asyncio.ensure_future(server.serve(listener))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/admin/events"
        async with httpx.AsyncClient() as http, http.stream("GET", url) as stream:
            lines = stream.aiter_lines()
            async for line in lines:
                if line == "event: draining":
                    break
            server.stop()
            if pool_ends:
                admin.closing.set()
            async with asyncio.timeout(3):
                await serve
                if pool_ends:
                    assert [line async for line in lines][-1] == "", "a whole answer"
    assert admin.listeners == 0
