"""Services: this one in the database, and the places of those that have ended."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Mapping
from pathlib import Path

from headrace.core.keys import Account
from headrace.keys.book import KeyBook, Settlement

_SILENT_S = 20.0


class Services:
    """This service as the database knows it, and how long each other has been silent.

    A service shows with each `look` that it lives. The places that one held for its running
    requests are given back when it has been silent for 20 s, which are counted only while the
    database answers; at once if it was a process of this machine that is not there any more.
    All methods that have a book block.
    """

    def __init__(self) -> None:
        self._id = _new_id()
        self._heard: dict[str, tuple[int, float]] = {}

    def forget(self) -> None:
        """Count the silence of the others from now on."""
        self._heard.clear()

    def look(self, book: KeyBook, used: Mapping[str, float]) -> int:
        """Show that this service lives; return the number of changes of the keys."""
        book.database.synchronise()
        book.beat(self._id)
        book.used(used.items())
        for service, beats in book.services().items():
            if service != self._id and self._has_ended(service, beats):
                book.bury(service)
                self._heard.pop(service, None)
        return book.changes()

    def reserve(
        self, book: KeyBook, *, id: str, least: int, most: int, now: float
    ) -> tuple[Account, int]:
        """Charge a request that this service runs."""
        return book.reserve(self._id, id, least, most, now)

    def settle(self, book: KeyBook, *, settlement: Settlement) -> None:
        """Correct what was charged by this service."""
        book.settle(self._id, settlement)

    def renew(self, book: KeyBook, running: Mapping[str, int]) -> None:
        """Hold just the places of what runs, whatever was written when the connection was lost."""
        book.bury(self._id)
        self._id = _new_id()
        book.beat(self._id)
        book.hold(self._id, running)

    def end(self, book: KeyBook) -> None:
        """Give back all places of this service."""
        book.bury(self._id)

    def _has_ended(self, service: str, beats: int) -> bool:
        now = time.monotonic()
        known, since = self._heard.get(service, (None, now))
        if beats != known:
            self._heard[service] = (beats, now)
            since = now
        return now - since > _SILENT_S or _is_dead(service)


def _new_id() -> str:
    return f"{_processes()}/{os.getpid()}/{secrets.token_hex(8)}"


def _processes() -> str:
    """Return what the process ids of this machine (or container) belong to; empty if not known."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot}:{Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def _is_dead(service: str) -> bool:
    """Whether a service was a process of this machine that is not there any more."""
    place, pid, _ = service.rsplit("/", 2)
    if not place or place != _processes():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    # Another service in this process is one of a test, or one before the connection was lost.
    return False
