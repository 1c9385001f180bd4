"""One connection: its bytes become requests, and each is answered before the next is parsed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from email.utils import formatdate
from typing import cast

from starlette.types import ASGIApp, Scope

from headrace.api import limits
from headrace.api.framing import Head, HeadParser
from headrace.api.problems import Refused, refused
from headrace.api.transaction import Transaction
from headrace.core.network import network_of

_NEVER = float("inf")
_SCOPE: Scope = {
    "type": "http",
    "asgi": {"version": "3.0", "spec_version": "2.3"},
    "scheme": "http",
    "root_path": "",
}


class Connections:
    """The connections of one server, and what bounds those that no request runs on.

    An address may have `max_idle` of them; the one that has waited longest is closed for a new one.
    `is_open` is whether more requests are accepted, `date` the header of that name, `done` a future
    that is, and `empty` an event that is set while there are no connections. `closed` is called for
    each that has ended.
    """

    def __init__(
        self, app: ASGIApp, max_idle: int, closed: Callable[[], None] | None = None
    ) -> None:
        self.app = app
        self._closed = closed
        self.is_open = True
        self.date = b""
        self.empty = asyncio.Event()
        self.empty.set()
        self.done = asyncio.get_running_loop().create_future()
        self.done.set_result(None)
        self._max_idle = max_idle
        self._all = set[Connection]()
        self._idle: dict[str, dict[Connection, None]] = {}

    def open(self) -> Connection:
        """Return a new connection, for a transport."""
        return Connection(self)

    def add_idle(self, connection: Connection) -> None:
        """Count a connection as the latest that waits for a request."""
        self.empty.clear()
        self._all.add(connection)
        self.remove_idle(connection)
        idle = self._idle.setdefault(connection.address, {})
        idle[connection] = None
        if len(idle) > self._max_idle:
            oldest = next(iter(idle))
            self.remove_idle(oldest)
            oldest.abort()

    def remove_idle(self, connection: Connection) -> None:
        """No longer count a connection, as it has a request or is closed."""
        idle = self._idle.get(connection.address, {})
        idle.pop(connection, None)
        if not idle:
            self._idle.pop(connection.address, None)

    def remove(self, connection: Connection) -> None:
        """Forget a connection that is closed, and whose request has ended."""
        self.remove_idle(connection)
        self._all.discard(connection)
        if self._closed is not None:
            self._closed()
        if not self._all:
            self.empty.set()

    def sweep(self) -> None:
        """End the waits that have been too long; called once a second, which `date` needs too."""
        self.date = f"date: {formatdate(usegmt=True)}\r\n".encode()
        now = time.monotonic()
        for connection in [*self._all]:
            if connection.deadline < now:
                connection.expire()

    def shutdown(self) -> None:
        """Accept no more requests, and close each connection after its answer."""
        self.is_open = False
        for connection in [*self._all]:
            connection.shutdown()

    def abort(self) -> None:
        """Close all connections, and cancel their requests."""
        for connection in [*self._all]:
            connection.abort()


class Connection(asyncio.Protocol):
    """Reads a request, runs the app for it, and goes on to the next request.

    `address` is that of the client, for the bound of idle connections. `writable` is awaited
    before more is written, and `date` is the header of that name. `expire` is called when
    `deadline` (monotonic seconds) has passed.
    """

    def __init__(self, connections: Connections) -> None:
        self.address = ""
        self.deadline = 0.0
        self.writable = connections.done
        self._connections = connections
        self._transport: asyncio.Transport | None = None
        self._addresses: Scope = {}
        self._parser = HeadParser()
        self._is_first = True
        self._transaction: Transaction | None = None
        self._task: asyncio.Future[None] | None = None
        self._rest = b""
        self._discarded: int | None = None
        self._paused = False

    @property
    def date(self) -> bytes:
        """The `Date` header of an answer."""
        return self._connections.date

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Wait for the first request (called by the event loop)."""
        self._transport = cast("asyncio.Transport", transport)
        client, server = (transport.get_extra_info(name) for name in ("peername", "sockname"))
        self._addresses = {"client": client and client[:2], "server": server and server[:2]}
        self.address = network_of(client[0]) if client else ""
        self._wait(limits.HEAD_TIMEOUT_S)

    def connection_lost(self, exc: Exception | None) -> None:
        """Let the app know that the client has gone (called by the event loop)."""
        self._transport = None
        self.resume_writing()
        if self._transaction is not None:
            self._transaction.disconnect()
        if self._task is None:
            self._forget()

    def data_received(self, data: bytes) -> None:
        """Take what the client sent (called by the event loop)."""
        if self._discarded is not None:
            self._discard(self._discarded + len(data), data)
        elif self._transaction is None:
            self._read_head(data)
        else:
            self._read_body(self._transaction, data)

    def pause_writing(self) -> None:
        """Let the app wait until the client reads (called by the event loop)."""
        self.writable = asyncio.get_running_loop().create_future()
        if self._task is not None:
            self.deadline = time.monotonic() + limits.UNREAD_TIMEOUT_S

    def resume_writing(self) -> None:
        """Let the app go on (called by the event loop)."""
        if not self.writable.done():
            self.writable.set_result(None)
        self.writable = self._connections.done
        if self._task is not None:
            self.deadline = _NEVER

    def resume_reading(self) -> None:
        """Take more from the client, unless too much has been sent behind this request."""
        transport = self._transport
        if transport is None or transport.is_closing() or len(self._rest) > limits.MAX_UNREAD:
            return
        if self._paused:
            self._paused = False
            transport.resume_reading()

    def shutdown(self) -> None:
        """Close the connection, after the answer that is under way."""
        if self._task is not None and self._transaction is not None:
            self._transaction.keep_alive = False
        elif self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        """Close the connection at once, and cancel its request."""
        if self._task is not None:
            self._task.cancel()
        if self._transport is not None:
            self._transport.abort()

    def expire(self) -> None:
        """End a wait that has been too long."""
        transport, is_answering = self._transport, self._task is not None
        if (
            transport is None
            or transport.is_closing()
            or is_answering
            or self._discarded is not None
        ):
            self.abort()
        elif self._parser.head.started:
            message = f"The head was not received within {limits.HEAD_TIMEOUT_S:g} s."
            self._refuse(refused(408, message, "head_timeout"))
        else:
            transport.close()
            # It closes when all is written, which a client that does not read can delay.
            self.deadline = time.monotonic() + limits.DISCARD_TIMEOUT_S

    def _forget(self) -> None:
        self._transaction = None
        self._connections.remove(self)

    def _wait(self, seconds: float) -> None:
        self.deadline = time.monotonic() + seconds
        self._connections.add_idle(self)

    def _read_head(self, data: bytes) -> None:
        head, started = self._parser.head, self._parser.head.started
        try:
            rest = self._parser.feed(data)
            if head.complete:
                self._begin(head, rest)
                return
        except Refused as error:
            self._refuse(error)
            return
        if head.started and not started and not self._is_first:
            self.deadline = time.monotonic() + limits.HEAD_TIMEOUT_S

    def _begin(self, head: Head, rest: bytes) -> None:
        scope = head.scope()
        expected = head.value(b"expect").lower() if head.version == "1.1" else b""
        if expected not in {b"", b"100-continue"}:
            raise refused(417, "Only 100-continue can be expected.", "unknown_expectation")
        transaction = self._run(head, scope, expects=expected != b"")
        self._read_body(transaction, rest)

    def _refuse(self, error: Refused) -> None:
        """Answer with an error, drop what is still sent, and close."""
        self._discarded, head = 0, Head(b"/")
        self._run(head, {**head.scope(), "headrace.refused": error}, expects=False)

    def _run(self, head: Head, scope: Scope, *, expects: bool) -> Transaction:
        assert self._transport is not None
        transaction = Transaction(self, self._transport, head, expects=expects)
        transaction.keep_alive = transaction.keep_alive and self._connections.is_open
        self._transaction, self.deadline = transaction, _NEVER
        if not self.writable.done():
            self.deadline = time.monotonic() + limits.UNREAD_TIMEOUT_S
        self._connections.remove_idle(self)
        app = self._connections.app
        answer = app({**_SCOPE, **scope, **self._addresses}, transaction.receive, transaction.send)
        self._task = asyncio.ensure_future(answer)
        self._task.add_done_callback(self._ended)
        return transaction

    def _read_body(self, transaction: Transaction, data: bytes) -> None:
        self._rest += transaction.feed(data)
        too_much = len(self._rest) + transaction.unread > limits.MAX_UNREAD
        if (too_much or transaction.failed) and self._transport is not None and not self._paused:
            self._paused = True
            self._transport.pause_reading()

    def _ended(self, task: asyncio.Future[None]) -> None:
        """Complete the answer, and go on (called when the app has ended)."""
        transaction, self._task = self._transaction, None
        assert transaction is not None
        transaction.end(task)
        if self._transport is None:
            self._forget()
            return
        self._wait(limits.DISCARD_TIMEOUT_S)
        if not self._transport.is_closing():
            self._go_on(transaction)

    def _go_on(self, transaction: Transaction) -> None:
        """Read the next request; close if there is to be none; or wait for the end of this one."""
        assert self._transport is not None
        if transaction.keep_alive and transaction.complete:
            self._read_next()
            return
        if not transaction.keep_alive:
            self._transaction = None
            if transaction.complete and not self._rest and self._discarded is None:
                self._transport.close()
                return
            # Closing now would reset the connection, and with it the answer, as more is being sent.
            self._rest = b""
            self._transport.write_eof()
        self._discarded = self._discarded or 0
        self.resume_reading()

    def _discard(self, size: int, data: bytes) -> None:
        self._discarded = size
        if size > limits.MAX_DISCARDED:
            self.abort()
        elif self._transaction is not None and self._task is None:
            self._rest += self._transaction.feed(data)
            self._go_on(self._transaction)

    def _read_next(self) -> None:
        rest, self._rest = self._rest, b""
        self._transaction = self._discarded = None
        self._parser, self._is_first = HeadParser(), False
        self._wait(limits.IDLE_TIMEOUT_S)
        self.resume_reading()
        if rest:
            self._read_head(rest)
