"""One request and its answer, on raw ASGI."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import msgspec
from starlette.types import Receive, Scope, Send

from headrace.api import bodies, problems
from headrace.api.bodies import ClientGone
from headrace.api.problems import Headers, Problem
from headrace.api.settings import ApiSettings
from headrace.api.timing import server_timing
from headrace.core.backend import Admin, Backend
from headrace.core.record import Observer, Outcome
from headrace.core.request import new_id

T = TypeVar("T")
S = TypeVar("S", bound=msgspec.Struct)


@dataclass(eq=False)
class Service:
    """What every handler works with. `settings` may be replaced; what has begun keeps its own."""

    backend: Backend
    settings: ApiSettings
    ready: Callable[[], bool] | None = None
    admin: Admin | None = None
    observer: Observer | None = None


@dataclass(slots=True)
class Call:
    """What is known of a request while it runs; the access log is written from it.

    `received` is monotonic seconds. `status` is 0 until the headers have gone out. `client` is a
    short id of the key, and `is_admin` tells whether it is an admin's. `traceparent` and
    `tracestate` are as the client sent them.
    """

    id: str = field(default_factory=new_id)
    received: float = field(default_factory=time.monotonic)
    status: int = 0
    outcome: Outcome | Literal[""] = ""
    client: str = ""
    is_admin: bool = False
    traceparent: str = ""
    tracestate: str = ""


class Exchange:
    """Reads one request, and sends its answer."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, settings: ApiSettings) -> None:
        self.scope = scope
        self.send = send
        self.settings = settings
        self.call: Call = scope["headrace"]
        self._receive = receive

    async def read(self, decoder: msgspec.json.Decoder[S]) -> S:
        """Take the body and decode it.

        Raises:
            Refused, InvalidRequest, Unsupported: see `bodies`.
            ClientGone: the client left before its end.
        """
        headers = dict(self.scope["headers"])
        body = await bodies.read(self._receive, headers, self.settings)
        return await bodies.decode(body, decoder, self.settings.max_depth)

    async def unless_gone(self, work: Coroutine[Any, Any, T]) -> T:
        """Run `work`. When the client goes first, `work` is cancelled and has ended on return.

        Raises:
            ClientGone: the client closed the connection.
        """
        task = asyncio.create_task(work)
        watcher = asyncio.create_task(_gone(self._receive))
        try:
            await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            raise ClientGone
        finally:
            task.cancel()
            watcher.cancel()
            await asyncio.wait({task, watcher})
            # Looked at, or asyncio would complain of a failure that nobody is there to read.
            for ended in (task, watcher):
                _ = ended.cancelled() or ended.exception()
            # What is raised leads here, and would be held by what it leads to.
            del task, watcher, ended

    def start(self, status: int, headers: Headers) -> Awaitable[None]:
        """Send the status and the headers."""
        return self.send(
            {"type": "http.response.start", "status": status, "headers": list(headers)}
        )

    async def reply(self, body: bytes, *, status: int = 200, headers: Headers = ()) -> None:
        """Send a whole JSON answer."""
        length = (b"content-length", str(len(body)).encode())
        await self.start(status, ((b"content-type", b"application/json"), length, *headers))
        await self.send({"type": "http.response.body", "body": body})

    async def refuse(self, problem: Problem) -> None:
        """Send an error with its status, and the figures where there are any."""
        timing = () if problem.metrics is None else server_timing(problem.metrics)
        await self.reply(problem.body(), status=problem.status, headers=(*problem.headers, *timing))

    async def fail(self, error: Exception) -> None:
        """Answer whatever was raised before the headers went out."""
        problems.log(error, self.call.id)
        await self.refuse(problems.describe(error, self.call.id))


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
