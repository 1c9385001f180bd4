"""NodeServer: one Backend and its Admin, for any number of fronts."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import aclosing
from typing import Any

import msgspec

from headrace.cluster.reports import NodeAdmin, Reporter
from headrace.cluster.secure import Member, Refusal, check, proof, verify
from headrace.cluster.strangers import Stranger, Strangers
from headrace.cluster.wire import (
    FROM_FRONT,
    GREETINGS,
    MAX_GREETING,
    MAX_UNSENT,
    MAX_UNSENT_EVENTS,
    Begin,
    Done,
    Greeting,
    Happened,
    Hello,
    Order,
    Proof,
    Pulse,
    Refused,
    Status,
    ToNode,
)
from headrace.core.backend import Backend
from headrace.core.errors import ErrorRecord
from headrace.core.request import AnyRequest, GenerateRequest
from headrace.pool.pool import Pool
from headrace.worker.outcome import failure
from headrace.worker.wire import MAX_FRAME, Cancel, Emitted, Ended, Link

log = logging.getLogger("headrace.cluster")

_MAX_FRONTS = 256
_PATIENCE = 2.0
"""How many times `silence_s` a front may be silent, as it notices a broken connection first."""


class NodeServer:
    """Serves fronts. A front that is gone or silent has its streams cancelled.

    `backend` answers the requests, and `admin` carries out orders; neither is closed here.
    """

    def __init__(
        self,
        backend: Backend,
        admin: NodeAdmin,
        member: Member,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.backend = backend
        self.admin = admin
        self.identity = member.identity
        self.access = member.access
        self.clock = clock
        self.fronts: set[FrontConnection] = set()
        self.strangers = Strangers(clock)
        self.reporter = Reporter(backend, admin, member.labels)
        self._heartbeat_s = member.heartbeat_s
        self._silence_s = member.silence_s * _PATIENCE
        self._tasks: set[asyncio.Task[Any]] = set()

    def __repr__(self) -> str:
        """Describe the name and the number of fronts."""
        return f"<NodeServer {self.identity.name}, {len(self.fronts)} fronts>"

    async def serve(self, listener: socket.socket) -> None:
        """Accept fronts on a socket until cancelled."""
        accepting = self.begin(self.strangers.accept(listener, self.accept, self.access.server))
        try:
            await self.run()
        finally:
            accepting.cancel()
            self.strangers.clear()
            for front in [*self.fronts]:
                front.link.close()

    async def run(self) -> None:
        """Report to the fronts, and look for silent ones, until cancelled."""
        following = self.begin(self._follow())
        checked = self.clock()
        try:
            while True:
                await asyncio.sleep(self._heartbeat_s)
                now = self.clock()
                if now - checked < 2 * self._heartbeat_s:
                    # Otherwise this process stood still, and what was sent is not read yet.
                    self._check(now)
                checked = now
                self.beat()
        finally:
            following.cancel()

    def accept(self, stranger: Stranger) -> asyncio.Protocol:
        """Return the protocol of a new connection."""
        return FrontConnection(self, stranger).link

    def begin(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run a coroutine as a task."""
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def beat(self) -> None:
        """Send a pulse to all fronts, and what has changed."""
        loads, status = self.reporter.beat()
        self.report(Pulse(loads))
        if status is not None:
            self.report(status)

    def report(self, message: Pulse | Status | Happened) -> None:
        """Send a message to all fronts."""
        for front in self.fronts:
            front.link.send(message)

    def _check(self, now: float) -> None:
        for front in [*self.fronts]:
            if now - front.heard > self._silence_s:
                front.link.fail("the front was silent")
        self.strangers.check(now)

    async def _follow(self) -> None:
        """Report events of the pool, and what they have changed, at once."""
        async with aclosing(self.admin.events()) as events:
            async for event in events:
                self.beat()
                self.report(Happened(event))


class FrontConnection:
    """A front's connection. Until it has proved itself, only its greeting is decoded."""

    def __init__(self, server: NodeServer, stranger: Stranger) -> None:
        self.heard = server.clock()
        self.name = ""
        self.link: Link[Any] = Link(
            GREETINGS, self._receive, self._closed, limit=MAX_GREETING, connected=self._connected
        )
        self._server = server
        self._stranger = stranger
        self._hello = server.identity.hello()
        self._other: Hello | None = None
        self._is_known = self._is_accepted = False
        self._unsent = 0
        self._streams: dict[int, asyncio.Task[ErrorRecord | None]] = {}

    def _connected(self) -> None:
        self._stranger.end = self.link.fail
        if len(self._server.fronts) >= _MAX_FRONTS:
            self._refuse(Refusal("This node has too many connections."))

    def _receive(self, messages: Sequence[Any]) -> None:
        self.heard = self._server.clock()
        try:
            for message in messages:
                if self._is_known:
                    self._take(message)
                else:
                    self._greet(message)
        except Refusal as refusal:
            self._refuse(refusal)

    def _refuse(self, refusal: Refusal) -> None:
        self._server.strangers.note(
            "headrace.cluster.refused", self._other.name if self._other else "", str(refusal)
        )
        self.link.send(Refused(str(refusal)))
        self.link.close()

    def _greet(self, message: Greeting) -> None:
        server = self._server
        match message:
            case Hello() if self._other is None:
                check(message, "front")
                self._other = message
                self._hello = server.identity.hello()
                self.link.send(self._hello)
            case Proof(mac) if self._other is not None:
                verify(mac, server.access.token, "front", self._other, self._hello)
                if server.strangers.remove(self._stranger):
                    self._welcome(self._other)
            case Refused(reason):
                self._refused(reason)
            case _:
                raise Refusal("The greeting is malformed.")

    def _welcome(self, other: Hello) -> None:
        server, link = self._server, self.link
        self.name, self._is_known = other.name, True
        link.expect(FROM_FRONT, limit=MAX_FRAME)
        link.limit_unsent(MAX_UNSENT)
        link.send(Proof(proof(server.access.token, "node", other, self._hello)))
        # The other side decodes what follows with another decoder.
        link.flush()
        server.beat()
        link.send(server.reporter.whole())
        server.fronts.add(self)

    def _take(self, message: ToNode) -> None:
        match message:
            case Begin():
                self._begin(message)
            case Cancel(id=number):
                if (running := self._streams.get(number)) is not None:
                    running.cancel()
            case Order():
                self._server.begin(self._order(message))
            case Refused(reason):
                self._refused(reason)
            case Pulse():
                self._accepted()

    def _accepted(self) -> None:
        """Note that the front has joined: one that does not accept this node sends no pulse."""
        if not self._is_accepted:
            self._is_accepted = True
            log.info("headrace.cluster.front_joined", extra={"data": {"front": self.name}})

    def _refused(self, reason: str) -> None:
        self._server.strangers.note(
            "headrace.cluster.not_accepted", self._other.name if self._other else "", reason
        )
        self.link.close()

    def _begin(self, message: Begin) -> None:
        if message.id in self._streams:
            raise Refusal(f"There is a stream {message.id} already.")
        # Times of the front are of another clock.
        received = self._server.clock() - max(0.0, message.age_s)
        request = msgspec.structs.replace(message.request, received=received)
        task = asyncio.ensure_future(failure(self._answer(message.id, request), log))
        self._streams[message.id] = task
        # Not in the task itself: a task that is cancelled before it starts runs no code.
        task.add_done_callback(lambda task: self._end(message.id, task))

    def _end(self, number: int, task: asyncio.Task[ErrorRecord | None]) -> None:
        del self._streams[number]
        self.link.send(Ended(number, None if task.cancelled() else task.result()))

    async def _answer(self, number: int, request: AnyRequest) -> None:
        send, room, backend = self.link.send, self.link.room, self._server.backend
        if isinstance(backend, Pool) and isinstance(request, GenerateRequest):
            await backend.relay(request, lambda event: self._pass_on(Emitted(number, event)))
            return
        async with aclosing(backend.ask(request)) as stream:
            async for event in stream:
                if not room.is_set():
                    await room.wait()
                send(Emitted(number, event))

    def _pass_on(self, emitted: Emitted) -> None:
        """Send a small event without waiting for room, unless too many wait already."""
        self.link.send(emitted)
        if self.link.room.is_set():
            self._unsent = 0
            return
        self._unsent += 1
        if self._unsent > MAX_UNSENT_EVENTS:
            self.link.fail("the front does not read")

    async def _order(self, order: Order) -> None:
        results: list[Done] = []

        async def carry_out() -> None:
            results.append(await carried_out(self._server.admin, order))

        error = await failure(carry_out(), log)
        # The front has the new state before the result.
        self._server.beat()
        self.link.send(Done(order.id, error) if error is not None else results[0])

    def _closed(self, why: str) -> None:
        server = self._server
        server.strangers.remove(self._stranger)
        server.fronts.discard(self)
        if self._is_accepted:
            data = {"front": self.name, "reason": why}
            log.info("headrace.cluster.front_left", extra={"data": data})
        for task in self._streams.values():
            task.cancel()


async def carried_out(admin: NodeAdmin, order: Order) -> Done:
    """Carry out an order, and return its result.

    Raises:
        HeadraceError: as the Admin raises it.
    """
    model, changes = order.model, order.changes
    match order.action:
        case "load":
            return Done(order.id, status=await admin.load(model, changes or None))
        case "unload":
            return Done(order.id, status=await admin.unload(model))
        case "restart":
            return Done(order.id, status=await admin.restart(model))
        case "update":
            return Done(order.id, status=await admin.update(model, changes))
        case "plan":
            return Done(order.id, plan=await admin.plan(model))
        case "reload":
            return Done(order.id, reloaded=await admin.reload())
        case "place":
            return Done(order.id, status=admin.place(model, int(changes.get("copies", 1))))
        case "describe":
            await admin.describe(model)
            return Done(order.id)
        case "drain":
            admin.set_draining(bool(changes.get("on", True)))
            return Done(order.id)
