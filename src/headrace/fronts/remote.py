"""What a front has of the process with the models: its Backend, and the application of the rest."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncGenerator, Callable

from starlette.types import Receive, Scope, Send

from headrace.api.problems import Refused
from headrace.core.errors import ErrorRecord, InvalidRequest, from_record
from headrace.core.events import Event
from headrace.core.model import ModelInfo
from headrace.core.request import AnyRequest
from headrace.core.stream import Mailbox, within
from headrace.fronts.wire import (
    Action,
    Chunk,
    Done,
    Head,
    Order,
    Over,
    Part,
    Pass,
    Refusal,
    Served,
    Taken,
    Want,
)
from headrace.worker.wire import Ask, Cancel, Ended, Message, until_ended

log = logging.getLogger("headrace.fronts")

_CANCEL_S = 30.0

Post = Callable[[Message], None]
"""Sends a message to the process with the models."""


class RemoteBackend:
    """A Backend: the models of the other process."""

    def __init__(self, post: Post) -> None:
        self._post = post
        self._numbers = itertools.count()
        self._mailboxes: dict[int, Mailbox[Event | Ended]] = {}
        self._orders: dict[int, asyncio.Future[ErrorRecord | None]] = {}
        self._models: tuple[ModelInfo, ...] = ()

    def models(self) -> tuple[ModelInfo, ...]:
        """Return the metadata of all models, without waiting; `memory` may be old."""
        return self._models

    async def aclose(self) -> None:
        """Do nothing: the models are the other process's."""

    def served(self, message: Served) -> None:
        """Take what has changed of the models."""
        infos = {info.id: info for info in (*self._models, *message.changed)}
        self._models = tuple(infos[name] for name in message.names)

    def put(self, number: int, event: Event | Ended) -> None:
        """Take an event of a stream; one that is left already is dropped."""
        if (mailbox := self._mailboxes.get(number)) is not None:
            mailbox.put(event)

    def done(self, message: Done) -> None:
        """Take the result of an order."""
        if (order := self._orders.pop(message.id, None)) is not None and not order.done():
            order.set_result(message.error)

    async def ask(self, request: AnyRequest) -> AsyncGenerator[Event, None]:
        """Yield the events of the other process's stream. Once it is closed, the slot is free.

        Raises:
            HeadraceError: as the other process raises it.
        """
        number, mailbox = self._begin(request)
        over = False
        try:
            while True:
                while not mailbox:
                    await mailbox.filled()
                event = mailbox.take()
                if isinstance(event, Ended):
                    over = True
                    if event.error is not None:
                        raise from_record(event.error)
                    return
                yield event
        finally:
            try:
                if not over:
                    await self._cancel(number, mailbox)
            finally:
                del self._mailboxes[number]

    async def order(self, action: Action, model: str) -> None:
        """Let the other process do something with a model.

        Raises:
            HeadraceError: as the Admin raises it.
        """
        number = next(self._numbers)
        done = self._orders[number] = asyncio.get_running_loop().create_future()
        self._post(Order(number, action, model))
        if (error := await done) is not None:
            raise from_record(error)

    def _begin(self, request: AnyRequest) -> tuple[int, Mailbox[Event | Ended]]:
        number, mailbox = next(self._numbers), Mailbox[Event | Ended]()
        try:
            self._post(Ask(number, request))
        except (OverflowError, TypeError, ValueError) as error:
            raise InvalidRequest(f"The request cannot be passed on: {error}") from error
        self._mailboxes[number] = mailbox
        return number, mailbox

    async def _cancel(self, number: int, mailbox: Mailbox[Event | Ended]) -> None:
        self._post(Cancel(number))
        if not await within(_CANCEL_S, until_ended(mailbox)):
            log.warning("headrace.fronts.cancel_slow")


class RemoteApplication:
    """An ASGI application: that of the other process, which gets each request and its body."""

    def __init__(self, post: Post) -> None:
        self._post = post
        # Apart from those of streams, as Cancel names both: these are negative.
        self._numbers = itertools.count(-1, -1)
        self._inboxes: dict[int, Mailbox[Want | Head | Chunk | Over]] = {}

    def put(self, message: Want | Head | Chunk | Over) -> None:
        """Take a message about a request; one that is left already is dropped."""
        if (inbox := self._inboxes.get(message.id)) is not None:
            inbox.put(message)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and send its answer."""
        number, inbox = next(self._numbers), Mailbox[Want | Head | Chunk | Over]()
        self._inboxes[number] = inbox
        reading: asyncio.Future[None] | None = None
        over = False
        self._post(_passed(number, scope))
        try:
            while not over:
                match await inbox.get():
                    case Want():
                        reading = asyncio.ensure_future(self._read(number, receive))
                    case Over():
                        over = True
                    case answer:
                        await self._answer(answer, send)
        finally:
            del self._inboxes[number]
            if not over:
                self._post(Cancel(number))
            if reading is not None:
                reading.cancel()
                await asyncio.wait({reading})

    async def _read(self, number: int, receive: Receive) -> None:
        try:
            message = await receive()
        except Refused as error:
            problem = error.problem
            refusal = Refusal(problem.status, problem.message, problem.code or "", problem.headers)
            self._post(Part(number, refusal=refusal))
            return
        gone = message["type"] == "http.disconnect"
        more = message.get("more_body", False)
        self._post(Part(number, message.get("body", b""), more=more, gone=gone))

    async def _answer(self, message: Head | Chunk, send: Send) -> None:
        if isinstance(message, Head):
            headers = list(message.headers)
            start = {"type": "http.response.start", "status": message.status, "headers": headers}
            await send(start)
        else:
            body, more = message.body, message.more
            await send({"type": "http.response.body", "body": body, "more_body": more})
        self._post(Taken(message.id))


def _passed(number: int, scope: Scope) -> Pass:
    return Pass(
        id=number,
        method=scope["method"],
        path=scope["path"],
        raw_path=scope["raw_path"],
        query_string=scope["query_string"],
        http_version=scope["http_version"],
        headers=tuple(scope["headers"]),
        client=scope["client"] or None,
        server=scope["server"] or None,
    )
