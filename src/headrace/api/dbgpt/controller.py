"""A DB-GPT controller: which models are registered there, and their heartbeats."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Collection
from typing import NamedTuple

from headrace.certificates import certificates

TIMEOUT_S = 5.0
"""For one call of a controller."""

_FIRST_RETRY_S = 1.0
_PATH = "/api/controller/models"
_log = logging.getLogger("headrace.dbgpt")


class Address(NamedTuple):
    """Where the cluster reaches this worker; the host of an IPv6 address is in brackets."""

    host: str
    port: int

    def __str__(self) -> str:
        """Return it as in a URL."""
        return f"{self.host}:{self.port}"


class ControllerError(Exception):
    """A controller does not answer, or not as it should."""


class Controller:
    """One controller of the cluster.

    `rows` returns the names to be registered, each with its worker type (`smollm2@llm`), `known`
    those that can be started. `registered` is what the controller has of this worker.
    """

    def __init__(
        self,
        url: str,
        address: Address,
        heartbeat_s: float,
        *,
        rows: Callable[[], Collection[str]],
        known: Callable[[], Collection[str]],
    ) -> None:
        import httpx2  # slow to import

        self.url = url.rstrip("/")
        self.registered: dict[str, None] = {}
        self.failures = 0
        self._address = address
        self._heartbeat_s = heartbeat_s
        self._rows = rows
        self._known = known
        self._changed = asyncio.Event()
        self._lock = asyncio.Lock()
        self._http = httpx2.AsyncClient(
            verify=certificates(), timeout=TIMEOUT_S, trust_env=False, follow_redirects=False
        )

    def count(self) -> float:
        """Return how many rows it has; none while it cannot be reached."""
        return 0 if self.failures else len(self.registered)

    def changed(self) -> None:
        """Look at the rows again soon."""
        self._changed.set()

    async def run(self) -> None:
        """Register, and send heartbeats, until cancelled."""
        due = 0.0
        while True:
            is_due = time.monotonic() >= due
            if not await self.synchronise(beat=is_due):
                # A controller that was started again is found by the next heartbeat.
                due = 0.0
                await asyncio.sleep(self._retry_s())
                continue
            if is_due:
                due = time.monotonic() + self._heartbeat_s
            self._changed.clear()
            if set(self._rows()) != self.registered.keys():
                continue
            await self._wait(due)

    async def synchronise(self, *, beat: bool = False) -> bool:
        """Register and deregister what has changed; with `beat`, send the heartbeats too.

        Return whether the controller has answered all of it.
        """
        async with self._lock:
            before = self.failures
            try:
                await self._synchronise(beat=beat or before > 0)
            except ControllerError as error:
                self._failed(error)
                return False
            self.failures = 0
            if before:
                _log.info("The DB-GPT controller %s answers.", self.url)
            return True

    async def leave(self) -> None:
        """Remove all rows; heartbeats have to have ended, as one would register again."""
        rows = tuple(self.registered)
        try:
            for row in rows:
                await self._deregister(row, remove=True)
        except ControllerError as error:
            _log.warning("Not deregistered at the DB-GPT controller %s: %s.", self.url, error)
        else:
            if rows:
                _log.info("Deregistered at the DB-GPT controller %s.", self.url)
        finally:
            await self._http.aclose()

    async def _synchronise(self, *, beat: bool) -> None:
        rows, known = self._rows(), self._known()
        gone = [row for row in self.registered if row not in rows]
        for row in gone:
            await self._deregister(row, remove=row not in known)
        new = [row for row in rows if row not in self.registered]
        for row in rows:
            if row in self.registered and beat:
                await self._call("POST", "/api/controller/heartbeat", json=self._row(row))
            elif row not in self.registered:
                await self._call("POST", _PATH, json=self._row(row))
                self.registered[row] = None
        for names, text in ((gone, "Deregistered %s at"), (new, "Registered %s at")):
            if names:
                text += " the DB-GPT controller %s, as %s."
                _log.info(text, ", ".join(names), self.url, self._address)

    async def _deregister(self, row: str, *, remove: bool) -> None:
        where = {"model_name": row, "host": self._address.host, "port": self._address.port}
        flag = str(remove).lower()
        await self._call("DELETE", _PATH, params={**where, "remove_from_registry": flag})
        self.registered.pop(row, None)

    async def _call(self, method: str, path: str, **content: object) -> None:
        """Send a call; its answer is not read, as only the status matters.

        Raises:
            ControllerError: there is no answer in time, or it is not a 200.
        """
        import httpx2

        try:
            async with (
                asyncio.timeout(TIMEOUT_S),
                self._http.stream(method, self.url + path, **content) as response,  # pyright: ignore[reportArgumentType]
            ):
                status = response.status_code
        except TimeoutError:
            raise ControllerError(f"no answer within {TIMEOUT_S:g} s") from None
        except (httpx2.HTTPError, httpx2.InvalidURL, OSError) as error:
            raise ControllerError(str(error) or type(error).__name__) from None
        if status != 200:
            raise ControllerError(f"it answered {method} {path} with {status}")

    def _row(self, name: str) -> dict[str, object]:
        return {
            "model_name": name,
            "host": self._address.host,
            "port": self._address.port,
            "weight": 1.0,
            "check_healthy": True,
            "healthy": False,
            "enabled": True,
            "prompt_template": None,
            "last_heartbeat": None,
            "remove_from_registry": False,
        }

    def _failed(self, error: ControllerError) -> None:
        self.failures += 1
        # After 1, 2, 4, 8, ... failures: the log does not grow with the time.
        if self.failures & (self.failures - 1) == 0:
            text = "The DB-GPT controller %s cannot be reached: %s. It is tried again."
            _log.warning(text, self.url, error)

    def _retry_s(self) -> float:
        wait = min(_FIRST_RETRY_S * 2.0 ** min(self.failures - 1, 10), self._heartbeat_s)
        return wait * random.uniform(0.8, 1.0)  # noqa: S311 - spreads workers, hides nothing

    async def _wait(self, until: float) -> None:
        try:
            async with asyncio.timeout(max(until - time.monotonic(), 0)):
                await self._changed.wait()
        except TimeoutError:
            pass
