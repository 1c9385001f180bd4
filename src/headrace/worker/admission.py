"""The bounded queue in front of an engine's slots."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict

from headrace.core.errors import HeadraceError, QueueFull, QueueTimeout

_SMOOTHING = 0.2


class Admission:
    """First come, first served: at most `max_running` at once and `max_queued` behind them."""

    def __init__(self, max_running: int, max_queued: int) -> None:
        self.max_running = max_running
        self.max_queued = max_queued
        self.running = 0
        self._waiting: OrderedDict[asyncio.Future[None], None] = OrderedDict()
        self._closed: HeadraceError | None = None
        self._aborted: HeadraceError | None = None
        self._idle = asyncio.Event()
        self._idle.set()
        self._held_s = 0.0

    @property
    def queued(self) -> int:
        """How many wait."""
        return len(self._waiting)

    async def enter(self, deadline: float | None = None) -> float:
        """Wait for a slot and take it; return the monotonic time, which `leave` wants.

        `deadline` is monotonic seconds. A caller that is cancelled leaves the queue at once.

        Raises:
            QueueFull: with the time after which a slot should be free, from the measured rate.
            QueueTimeout: the deadline came first.
        """
        if self._closed is not None:
            raise self._closed
        if deadline is not None and time.monotonic() > deadline:
            raise QueueTimeout("The deadline had passed before the request's turn came.")
        if self.running >= self.max_running or self._waiting:
            await self._queue(deadline)
        else:
            self._take()
        return time.monotonic()

    def leave(self, entered: float) -> None:
        """Give the slot to the next in the queue, or back."""
        held = time.monotonic() - entered
        self._held_s += (held - self._held_s) * (_SMOOTHING if self._held_s else 1)
        self.running -= 1
        while self._waiting and self.running < self.max_running:
            turn, _ = self._waiting.popitem(last=False)
            if not turn.done():
                self._take()
                turn.set_result(None)
        if not self.running:
            self._idle.set()

    def close(self, error: HeadraceError) -> None:
        """Refuse everybody from now on, those in the queue first."""
        self._closed = error
        while self._waiting:
            turn, _ = self._waiting.popitem(last=False)
            if not turn.done():
                turn.set_exception(error)

    def abort(self, error: HeadraceError) -> None:
        """Have `check` refuse those that still run."""
        self._aborted = error

    def check(self) -> None:
        """Raise what `abort` was given."""
        if self._aborted is not None:
            raise self._aborted

    async def idle(self, timeout_s: float) -> bool:
        """Wait until nothing runs; tell whether it came to that."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    def _take(self) -> None:
        self.running += 1
        self._idle.clear()

    async def _queue(self, deadline: float | None) -> None:
        if len(self._waiting) >= self.max_queued:
            raise QueueFull(
                f"{self.max_queued} requests are waiting already.", retry_after_s=self._drain_s()
            )
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[turn] = None
        try:
            await asyncio.wait({turn}, timeout=_remaining(deadline))
            if not turn.done():
                raise QueueTimeout("The deadline passed before the request's turn came.")
            turn.result()
        except BaseException:
            self._give_up(turn)
            raise

    def _give_up(self, turn: asyncio.Future[None]) -> None:
        self._waiting.pop(turn, None)
        if turn.done() and not turn.cancelled() and turn.exception() is None:
            # The turn came in the same moment: pass it on.
            self.leave(time.monotonic())
        turn.cancel()

    def _drain_s(self) -> float:
        return max(1.0, self._held_s * (len(self._waiting) + 1) / self.max_running)


def _remaining(deadline: float | None) -> float | None:
    return None if deadline is None else max(0.0, deadline - time.monotonic())
