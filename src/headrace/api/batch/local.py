"""Answers requests of a batch in this process, by the routes that answer them over HTTP."""

from __future__ import annotations

import asyncio
from typing import Any

from msgspec.structs import replace
from starlette.types import Message, Scope

from headrace.api.batch.work import Reply
from headrace.api.chat import chat_completions
from headrace.api.completions import completions
from headrace.api.embeddings import embeddings
from headrace.api.exchange import Call, Exchange, Handler, Service
from headrace.api.problems import OPENAI
from headrace.api.rerank import rerank
from headrace.api.responses import responses
from headrace.api.score import score

_FOREVER_S = 1e9
_HANDLERS: dict[str, Handler] = {
    "/v1/chat/completions": chat_completions,
    "/v1/completions": completions,
    "/v1/embeddings": embeddings,
    "/v1/responses": responses,
    "/v1/rerank": rerank,
    "/v1/score": score,
}


async def ask(service: Service, url: str, body: bytes, call: Call) -> Reply:
    """Return the answer of the route at `url`, one of the endpoints of batches.

    It may wait for long, and has no deadline.
    """
    parts: list[bytes] = []
    headers: dict[bytes, bytes] = {}

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            call.status = message["status"]
            headers.update(message["headers"])
        else:
            parts.append(message["body"])

    scope: Scope = {"type": "http", "method": "POST", "path": url, "headers": []}
    settings = replace(service.settings, deadline_s=None, load_wait_s=_FOREVER_S)
    exchange = Exchange(scope, _Body(body), send, settings, call, OPENAI)
    try:
        await _HANDLERS[url](service, exchange)
    except Exception as error:
        # Any exception becomes the answer to this request, as over HTTP.
        if call.status:
            raise
        await exchange.fail(error)
    after = headers.get(b"retry-after-ms")
    return Reply(call.status, call.id, b"".join(parts), float(after) / 1000 if after else None)


class _Body:
    """Receives the whole body, and then waits: this client does not leave."""

    def __init__(self, body: bytes) -> None:
        self._body: bytes | None = body

    async def __call__(self) -> dict[str, Any]:
        body, self._body = self._body, None
        if body is None:
            await asyncio.get_running_loop().create_future()
        return {"type": "http.request", "body": body, "more_body": False}
