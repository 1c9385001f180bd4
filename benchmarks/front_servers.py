"""The two servers that front.py compares Headrace with.

Usage: `python front_servers.py limit|pydantic TOKENS_PER_SECOND`
"""

from __future__ import annotations

import asyncio
import json
import socket
import sys
import time
import uuid
from collections.abc import AsyncGenerator
from typing import Any

import uvicorn
import uvloop
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from starlette.types import ASGIApp, Receive, Scope, Send

_BACKLOG = 2048
_START = {
    "type": "http.response.start",
    "status": 200,
    "headers": [
        (b"content-type", b"text/event-stream; charset=utf-8"),
        (b"cache-control", b"no-cache"),
    ],
}


class Steps:
    """Wakes all streams together, `speed` times a second: one timer, as for one engine's steps."""

    def __init__(self, speed: float) -> None:
        self._speed = speed
        self._waiting: list[asyncio.Future[None]] = []
        self._ticker: asyncio.Task[None] | None = None

    def next(self) -> asyncio.Future[None]:
        """Return a future that completes with the next step."""
        loop = asyncio.get_running_loop()
        if self._ticker is None:
            self._ticker = loop.create_task(self._tick())
        step: asyncio.Future[None] = loop.create_future()
        self._waiting.append(step)
        return step

    async def _tick(self) -> None:
        due = time.monotonic()
        while True:
            due += 1 / self._speed
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            waiting, self._waiting = self._waiting, []
            for step in waiting:
                if not step.done():
                    step.set_result(None)


def limit(steps: Steps) -> ASGIApp:
    """Return a bare ASGI app; the request contains the bytes of its chunks."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        request = json.loads(body)
        chunk = request["chunk"].encode()
        gone = asyncio.ensure_future(receive())
        await send(_START)
        for _ in range(request["max_tokens"]):
            await steps.next()
            if gone.done():
                return
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        gone.cancel()
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})

    return app


class ChunkChoice(BaseModel):
    """A choice in a completion's chunk, as OpenAI's clients expect it."""

    index: int
    text: str
    logprobs: dict[str, Any] | None = None
    finish_reason: str | None = None


class Chunk(BaseModel):
    """One chunk of a completion."""

    id: str
    object: str = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChunkChoice]


class Completion(BaseModel):
    """The fields of a request that matter here."""

    model: str = "echo"
    prompt: str
    max_tokens: int = 16
    stream: bool = False


def with_pydantic(steps: Steps) -> FastAPI:
    """Return a FastAPI app with a model for each chunk and a StreamingResponse, a common design."""
    app = FastAPI()

    @app.post("/v1/completions")
    async def completions(request: Completion) -> StreamingResponse:
        async def chunks() -> AsyncGenerator[str, None]:
            number, created = f"cmpl-{uuid.uuid4().hex[:24]}", int(time.time())
            for place in range(request.max_tokens):
                await steps.next()
                chunk = Chunk(
                    id=number,
                    created=created,
                    model=request.model,
                    system_fingerprint="headrace",
                    choices=[
                        ChunkChoice(index=0, text=request.prompt[place % len(request.prompt)])
                    ],
                )
                yield f"data: {chunk.model_dump_json()}\n\n"
            yield "data: [DONE]\n\n"

        return StreamingResponse(chunks(), media_type="text/event-stream")

    return app


async def _serve(app: ASGIApp) -> None:
    config = uvicorn.Config(
        app,
        http="httptools",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
    )
    with socket.create_server(("127.0.0.1", 0), backlog=_BACKLOG) as listener:
        print(json.dumps({"url": f"http://127.0.0.1:{listener.getsockname()[1]}"}), flush=True)
        await uvicorn.Server(config).serve(sockets=[listener])


if __name__ == "__main__":
    kinds = {"limit": limit, "pydantic": with_pydantic}
    uvloop.run(_serve(kinds[sys.argv[1]](Steps(float(sys.argv[2])))))
