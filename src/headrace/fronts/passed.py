"""A request that a front passes on: its answer by the application of this process."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from starlette.types import ASGIApp, Message, Scope

from headrace.api.problems import refused
from headrace.core.stream import Mailbox
from headrace.fronts.remote import Post
from headrace.fronts.wire import Chunk, Head, Over, Part, Pass, Taken, Want

_log = logging.getLogger("headrace.api")
_GONE: Message = {"type": "http.disconnect"}


class PassedRequest:
    """ASGI's `receive` and `send` for it. `changed` is called before the client sees the answer."""

    def __init__(self, message: Pass, post: Post, changed: Callable[[], None]) -> None:
        self._request = message
        self._number = message.id
        self._post = post
        self._changed = changed
        self._parts: Mailbox[Part] = Mailbox()
        self._room = asyncio.Event()
        self._is_wanted = self._is_gone = False

    def run(self, app: ASGIApp) -> Awaitable[None]:
        """Answer the request."""
        return app(_scope(self._request), self._receive, self._send)

    def ended(self, task: asyncio.Future[None]) -> None:
        """Report that nothing more is sent, which ends the connection of a part of an answer."""
        error = None if task.cancelled() else task.exception()
        if error is not None:
            _log.error("A request failed after its answer had begun.", exc_info=error)
        self._post(Over(self._number))

    def take(self, message: Part | Taken) -> None:
        """Take a part of the body, or note that the client has room."""
        if isinstance(message, Part):
            self._parts.put(message)
        else:
            self._room.set()

    async def _receive(self) -> Message:
        if self._is_gone:
            return _GONE
        # One that was cancelled has left its question open.
        if not self._is_wanted:
            self._is_wanted = True
            self._post(Want(self._number))
        part = await self._parts.get()
        self._is_wanted, self._is_gone = False, part.gone
        if (refusal := part.refusal) is not None:
            raise refused(refusal.status, refusal.message, refusal.code, refusal.headers)
        if part.gone:
            return _GONE
        return {"type": "http.request", "body": part.body, "more_body": part.more}

    async def _send(self, message: Message) -> None:
        self._room.clear()
        if message["type"] == "http.response.start":
            self._changed()
            self._post(Head(self._number, message["status"], tuple(message.get("headers", ()))))
        else:
            more = message.get("more_body", False)
            if not more:
                self._changed()
            self._post(Chunk(self._number, message.get("body", b""), more))
        await self._room.wait()


def _scope(request: Pass) -> Scope:
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "scheme": "http",
        "root_path": "",
        "method": request.method,
        "path": request.path,
        "raw_path": request.raw_path,
        "query_string": request.query_string,
        "http_version": request.http_version,
        "headers": list(request.headers),
        "client": request.client,
        "server": request.server,
    }
