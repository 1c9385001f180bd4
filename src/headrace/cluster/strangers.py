"""Connections that have not proved yet who they are: how many there may be, and for how long."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
import time
from collections import Counter
from collections.abc import Callable

from headrace.cluster.wire import GREETING_TIMEOUT_S
from headrace.core.network import network_of

log = logging.getLogger("headrace.cluster")

MAX_STRANGERS = 64
"""Connections at a time, those that have not ended their TLS handshake too."""
_MAX_NOTES = 16
_NOTED_S = 60.0
_AGAIN_S = 0.05

Open = Callable[["Stranger"], asyncio.BaseProtocol]
"""Returns the protocol of a connection that is open."""


class Stranger:
    """A connection of an address, which is open since a time; `end` ends it, for a reason."""

    def __init__(self, address: str, since: float, end: Callable[[str], object]) -> None:
        self.address = address
        self.since = since
        self.end = end


class Strangers:
    """The strangers of one listener.

    With one too many, one of the address that has most of them is ended, the one that has waited
    longest: those of another address keep their time.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._all: dict[Stranger, None] = {}
        self._noted: dict[tuple[str, str, str], float] = {}

    def __len__(self) -> int:
        """How many there are."""
        return len(self._all)

    def __contains__(self, stranger: Stranger) -> bool:
        """Whether it is one, and has not been ended."""
        return stranger in self._all

    def add(self, address: str, end: Callable[[str], object]) -> Stranger:
        """Add the latest."""
        stranger = Stranger(network_of(address), self._clock(), end)
        self._all[stranger] = None
        if len(self._all) > MAX_STRANGERS:
            count = Counter(each.address for each in self._all)
            self._end(max(self._all, key=lambda each: count[each.address]), "too many others wait")
        return stranger

    def remove(self, stranger: Stranger) -> bool:
        """Remove one that has proved itself, or has gone; return whether it was there."""
        is_there = stranger in self._all
        self._all.pop(stranger, None)
        return is_there

    def check(self, now: float) -> None:
        """End those that take too long, whatever they have sent."""
        for stranger in [*self._all]:
            if now - stranger.since > GREETING_TIMEOUT_S:
                self._end(stranger, "the greeting took too long")

    def clear(self) -> None:
        """End all."""
        for stranger in [*self._all]:
            self._end(stranger, "the node is closing")

    def note(self, record: str, front: str, error: str) -> None:
        """Log why a connection is not kept; as others try again, the same once a minute."""
        note, now = (record, front, error), self._clock()
        self._noted = {key: at for key, at in self._noted.items() if now - at < _NOTED_S}
        if note not in self._noted and len(self._noted) < _MAX_NOTES:
            self._noted[note] = now
            log.warning(record, extra={"data": {"front": front, "error": error}})

    async def accept(
        self, listener: socket.socket, opened: Open, tls: ssl.SSLContext | None
    ) -> None:
        """Accept connections, and open each, until cancelled."""
        loop, full = asyncio.get_running_loop(), asyncio.Event()
        opening: set[asyncio.Task[None]] = set()

        def take() -> None:
            try:
                connection, place = listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                # Too many open files: those that wait are accepted when there is full.
                self.note("headrace.cluster.refused", "", str(error))
                full.set()
                return
            task = asyncio.ensure_future(self._open(connection, place[0], opened, tls))
            opening.add(task)
            task.add_done_callback(lambda task: over(task, connection))

        def over(task: asyncio.Task[None], connection: socket.socket) -> None:
            opening.discard(task)
            if task.cancelled():
                # Perhaps before it began.
                connection.close()

        listener.setblocking(False)
        try:
            while True:
                full.clear()
                loop.add_reader(listener, take)
                await full.wait()
                loop.remove_reader(listener)
                await asyncio.sleep(_AGAIN_S)
        finally:
            loop.remove_reader(listener)
            for task in opening:
                task.cancel()

    async def _open(
        self, connection: socket.socket, address: str, opened: Open, tls: ssl.SSLContext | None
    ) -> None:
        """Open a connection, which takes a handshake with TLS."""
        task, limit_s = asyncio.current_task(), GREETING_TIMEOUT_S if tls else None
        assert task is not None, "it runs as a task"
        stranger = self.add(address, lambda _: task.cancel())
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                lambda: opened(stranger),
                connection,
                ssl=tls,
                ssl_handshake_timeout=limit_s,
                ssl_shutdown_timeout=limit_s,
            )
        except (OSError, TimeoutError):
            # It has left, or made no handshake.
            self.remove(stranger)
        except asyncio.CancelledError:
            self.remove(stranger)
            raise

    def _end(self, stranger: Stranger, why: str) -> None:
        self.remove(stranger)
        stranger.end(why)
