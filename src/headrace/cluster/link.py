"""NodeLink: the front's connection to one address, made again whenever it is lost."""

from __future__ import annotations

import asyncio
import itertools
import logging
import ssl
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from typing import Any, Protocol

from headrace.cluster.figures import Received
from headrace.cluster.secure import Credentials, Member, Refusal, check, proof, verify
from headrace.cluster.wire import (
    FROM_NODE,
    GREETING_TIMEOUT_S,
    GREETINGS,
    MAX_GREETING,
    Action,
    Address,
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
    ToFront,
)
from headrace.core.errors import InvalidRequest, NodeGone, from_record, to_record
from headrace.core.events import Delta, Event, Finish
from headrace.core.request import AnyRequest
from headrace.core.stream import Mailbox, within
from headrace.worker.wire import MAX_FRAME, Cancel, Emitted, Ended, Link, Message, until_ended

log = logging.getLogger("headrace.cluster")

_FIRST_DELAY_S, _LONGEST_DELAY_S = 0.1, 5.0
_CANCEL_S = 30.0
_SHORTEST_WAIT_S = 0.01

Connect = Callable[[Address, Callable[[], asyncio.Protocol]], Awaitable[object]]
"""Makes a connection for a protocol. Raises OSError."""


class Members(Protocol):
    """What a link reports to."""

    def joined(self, link: NodeLink) -> str | None:
        """Take a node that has proved who it is; or return why it is not taken."""
        ...

    def left(self, link: NodeLink, why: str) -> None:
        """Note that the connection of a node that has joined is lost."""
        ...

    def received(self, link: NodeLink, message: Status | Pulse | Happened) -> None:
        """Take a report of a node."""
        ...


def connector(access: Credentials) -> Connect:
    """Return a function that connects over TCP, with TLS if there are certificates."""

    async def connect(address: Address, factory: Callable[[], asyncio.Protocol]) -> object:
        loop = asyncio.get_running_loop()
        return await loop.create_connection(factory, *address, ssl=access.client)

    return connect


class NodeLink:
    """One address. While it `is_up`, `name` is that of the node, and requests can be sent.

    `was_tried` is whether the first attempt to connect has ended, with a connection or without;
    `failure` is why there is no connection.
    """

    def __init__(
        self,
        address: Address,
        members: Members,
        member: Member,
        connect: Connect,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.address = address
        self.node: Hello | None = None
        self.is_up = self.was_tried = False
        self.failure = "not connected yet"
        self.failing_since = clock()
        self.clock_s = 0.0
        self._members = members
        self._identity = member.identity
        self._token = member.access.token
        self._has_tls = member.access.client is not None
        self._connect = connect
        self._heartbeat_s = member.heartbeat_s
        self._silence_s = member.silence_s
        self._clock = clock
        self._numbers = itertools.count()
        self._mailboxes: dict[int, Mailbox[Event | Ended]] = {}
        self._orders: dict[int, asyncio.Future[Done]] = {}
        self._link: Link[Any] | None = None
        self._heard = self._checked = 0.0

    def __repr__(self) -> str:
        """Describe the address, the node and the state."""
        return f"<NodeLink {self.address} {self.name or '-'} {'up' if self.is_up else 'down'}>"

    @property
    def name(self) -> str:
        """The name of the node; empty before the first greeting."""
        return self.node.name if self.node else ""

    @property
    def open_streams(self) -> int:
        """How many streams are open."""
        return len(self._mailboxes)

    async def run(self) -> None:
        """Connect, and connect again whenever the connection is lost, until cancelled."""
        delay = _FIRST_DELAY_S
        while True:
            try:
                await self._visit()
                delay = _FIRST_DELAY_S
            except (OSError, ssl.SSLError, TimeoutError, Refusal) as error:
                self._note(error)
            await asyncio.sleep(delay)
            delay = min(_LONGEST_DELAY_S, delay * 2)

    def _note(self, error: Exception) -> None:
        self.was_tried = True
        before, self.failure = self.failure, str(error) or type(error).__name__
        # A node that is not there yet is no error; one that does not fit together with this is.
        if isinstance(error, (ssl.SSLError, Refusal)) and self.failure != before:
            data = {"address": str(self.address), "error": self.failure}
            log.warning("headrace.cluster.node_refused", extra={"data": data})

    async def _visit(self) -> None:
        """Make one connection, and return when a node that had joined is gone.

        Raises:
            OSError, TimeoutError, Refusal: the node did not join.
        """
        hello = self._identity.hello()
        greeting = _Greeting(hello, self._token, has_tls=self._has_tls)
        over: asyncio.Future[str] = asyncio.get_running_loop().create_future()

        def closed(why: str) -> None:
            greeting.closed(why)
            if not over.done():
                over.set_result(why)

        link: Link[Any] = Link(GREETINGS, greeting.receive, closed, limit=MAX_GREETING)
        greeting.link = link
        try:
            async with asyncio.timeout(GREETING_TIMEOUT_S):
                await self._connect(self.address, lambda: link)
                link.send(hello)
                self.node = await greeting.node
            self._check_members(link)
            self._join(link, greeting)
            why = "the front is closing"
            try:
                why = await self._watch(over)
            finally:
                self._leave(why)
        finally:
            link.close()

    def _check_members(self, link: Link[Any]) -> None:
        if (refusal := self._members.joined(self)) is not None:
            link.send(Refused(refusal))
            raise Refusal(refusal)

    def _join(self, link: Link[Any], greeting: _Greeting) -> None:
        assert self.node is not None, "the greeting has ended"
        self.clock_s = greeting.clock_s
        self._link, self.is_up, self.was_tried = link, True, True
        self._heard = self._checked = self._clock()
        greeting.deliver(self._receive)

    def _leave(self, why: str) -> None:
        if not self.is_up:
            return
        self.is_up, self._link = False, None
        self.failure, self.failing_since = why, self._clock()
        gone = to_record(NodeGone(f"The node {self.name} has gone: {why}."))
        for number, mailbox in self._mailboxes.items():
            mailbox.put(Ended(number, gone))
        self._mailboxes.clear()
        for order in self._orders.values():
            if not order.done():
                order.set_result(Done(0, gone))
        self._orders.clear()
        self._members.left(self, why)

    async def _watch(self, over: asyncio.Future[str]) -> str:
        """Send pulses until the connection ends or is silent; return why."""
        wait_s = self._heartbeat_s
        while True:
            self._send(Pulse())
            await asyncio.wait({over}, timeout=wait_s)
            if over.done():
                return over.result()
            now = self._clock()
            late_s = now - self._checked - wait_s
            self._checked = now
            if late_s > self._heartbeat_s:
                # It was this process that stood still: what the node has sent is not read yet.
                self._heard = max(self._heard, now - self._heartbeat_s)
            left_s = self._heard + self._silence_s - now
            if left_s <= 0:
                why = f"it was silent for {now - self._heard:.1f} s"
                if self._link is not None:
                    self._link.fail(why)
                return why
            # Running answers wait for the end of the silence, and not for the next pulse.
            wait_s = min(self._heartbeat_s, max(_SHORTEST_WAIT_S, left_s))

    def _send(self, message: Message) -> None:
        if self._link is not None:
            self._link.send(message)

    def _receive(self, messages: Sequence[ToFront]) -> None:
        self._heard = self._clock()
        for message in messages:
            if isinstance(message, Emitted):
                if (mailbox := self._mailboxes.get(message.id)) is not None:
                    mailbox.put(message.event)
            elif isinstance(message, Ended):
                if (mailbox := self._mailboxes.pop(message.id, None)) is not None:
                    mailbox.put(message)
            elif isinstance(message, Done):
                order = self._orders.pop(message.id, None)
                if order is not None and not order.done():
                    order.set_result(message)
            else:
                self._members.received(self, message)

    async def ask(self, request: AnyRequest) -> AsyncGenerator[Event, None]:
        """Yield the events of the node's stream. Once it is closed, the slot is free there.

        Raises:
            NodeGone: the connection is lost.
            HeadraceError: as the node raises it.
        """
        number, mailbox = self._begin(request)
        received, over = Received(request, self._clock), False
        try:
            while True:
                while not mailbox:
                    await mailbox.filled()
                event = mailbox.take()
                if isinstance(event, Ended):
                    over = True
                    if event.error is not None:
                        raise received.failed(from_record(event.error), self.name)
                    return
                if type(event) is Delta:
                    if not received.is_visible:
                        received.saw(event)
                elif type(event) is Finish:
                    event = received.corrected(event, self.name)
                yield event
        finally:
            try:
                if not over:
                    await self._cancel(number, mailbox)
            finally:
                self._mailboxes.pop(number, None)

    def _begin(self, request: AnyRequest) -> tuple[int, Mailbox[Event | Ended]]:
        if not self.is_up:
            raise self._not_sent()
        number = next(self._numbers)
        age_s = max(0.0, self._clock() - request.received)
        try:
            self._send(Begin(number, request, age_s))
        except (OverflowError, TypeError, ValueError) as error:
            raise InvalidRequest(f"The request cannot be passed on: {error}") from error
        mailbox = self._mailboxes[number] = Mailbox()
        return number, mailbox

    def _not_sent(self) -> NodeGone:
        error = NodeGone(f"The node {self.name} has gone: {self.failure}.")
        error.was_sent = False
        return error

    async def _cancel(self, number: int, mailbox: Mailbox[Event | Ended]) -> None:
        """Cancel a stream, and wait until the node reports that its slot is free."""
        self._send(Cancel(number))
        if not await within(_CANCEL_S, until_ended(mailbox)):
            log.warning("headrace.cluster.cancel_slow", extra={"data": {"node": self.name}})

    async def order(
        self, action: Action, model: str = "", changes: Mapping[str, Any] | None = None
    ) -> Done:
        """Let the node do what an operator wants, and wait for its end.

        Raises:
            NodeGone: the connection is lost.
            HeadraceError: as the node raises it.
        """
        if not self.is_up:
            raise self._not_sent()
        number = next(self._numbers)
        done: asyncio.Future[Done] = asyncio.get_running_loop().create_future()
        self._send(Order(number, action, model, dict(changes or {})))
        self._orders[number] = done
        answer = await done
        if answer.error is not None:
            raise from_record(answer.error)
        return answer


class _Greeting:
    """The front's part of a greeting. `node` is the Hello of a node that has proved itself."""

    def __init__(self, hello: Hello, token: bytes, *, has_tls: bool) -> None:
        self.node: asyncio.Future[Hello] = asyncio.get_running_loop().create_future()
        self.link: Link[Any] | None = None
        self.clock_s = 0.0
        self._hello = hello
        self._token = token
        self._has_tls = has_tls
        self._other: Hello | None = None
        self._early: list[ToFront] = []
        self._deliver: Callable[[Sequence[Any]], None] = self._early.extend

    def receive(self, messages: Sequence[Any]) -> None:
        """Take the messages of a frame: those of the greeting, then all others."""
        if self.node.done():
            self._deliver(messages)
            return
        try:
            for message in messages:
                self._greet(message)
        except Refusal as refusal:
            if self.link is not None:
                self.link.send(Refused(str(refusal)))
            self._fail(refusal)

    def deliver(self, receive: Callable[[Sequence[ToFront]], None]) -> None:
        """Deliver the messages after the greeting, those that have come already too."""
        early, self._early = self._early, []
        self._deliver = receive
        if early:
            receive(early)

    def closed(self, why: str) -> None:
        """Note that the connection has ended."""
        if self._other is None and self._has_tls:
            why += ", perhaps as the node does not accept the certificate of this front"
        self._fail(Refusal(why))

    def _greet(self, message: Greeting) -> None:
        assert self.link is not None, "messages come over it"
        match message:
            case Hello() if self._other is None:
                check(message, "node")
                self._other = message
                # It was sent between the two, on a busy machine long before it is read.
                self.clock_s = message.time - (self._hello.time + time.time()) / 2
                self.link.send(Proof(proof(self._token, "front", self._hello, message)))
            case Proof(mac) if self._other is not None and not self.node.done():
                verify(mac, self._token, "node", self._hello, self._other)
                self.link.expect(FROM_NODE, limit=MAX_FRAME)
                self.node.set_result(self._other)
            case Refused(reason):
                raise Refusal(reason)
            case _:
                raise Refusal("The greeting is malformed.")

    def _fail(self, refusal: Refusal) -> None:
        if not self.node.done():
            self.node.set_exception(refusal)
            # It may be that nothing waits for it any more.
            self.node.exception()
