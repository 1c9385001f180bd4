"""The models of one service by name: loaded when first wanted, started again when they die."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from typing import Any, Protocol

import msgspec

from headrace.core.backend import Backend
from headrace.core.errors import HeadraceError, LoadFailed, Loading, QueueTimeout, UnknownModel
from headrace.core.events import Event, Progress
from headrace.core.model import ModelInfo, ModelSpec, State
from headrace.core.request import CountRequest, DetokenizeRequest, GenerateRequest, TokenCount

log = logging.getLogger("headrace.pool")

_MAX_BACKOFF_S = 60.0
_STEADY_S = 60.0


class PooledWorker(Backend, Protocol):
    """A Backend with a life, as the pool needs it. `died` is set when it ended by itself."""

    died: asyncio.Event

    @property
    def state(self) -> State:
        """One of the states of contract W7."""
        ...

    async def start(self) -> None:
        """Load. Idempotent."""
        ...

    async def aclose(self, drain_s: float = 0.0) -> None:
        """Drain and free."""
        ...


OpenWorker = Callable[[ModelSpec], PooledWorker]


def backoff_s(failures: int) -> float:
    """Return how long to wait after so many failures in a row: 0, 1, 2, 4 ... 60 seconds."""
    return min(_MAX_BACKOFF_S, 2.0 ** min(failures - 1, 6)) if failures else 0.0


class Seat:
    """One model's place in the pool: its worker, who waits for its load, how it has failed."""

    def __init__(self, spec: ModelSpec, worker: PooledWorker) -> None:
        self.spec = spec
        self.worker = worker
        self.waiting = 0
        self._failures = 0
        self._retry_at = 0.0
        self._ready_at = 0.0
        self._keeper: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        """Tell the worker and how many wait for it."""
        return f"<Seat {self.worker!r}, {self.waiting} waiting>"

    async def ready(self) -> None:
        """Wait until the model is loaded; many waiters share one load.

        Raises:
            Loading: too many wait already.
            LoadFailed: it has failed a moment ago; with the time after which to try again.
            HeadraceError: what the load raises.
        """
        if self.worker.state == "ready":
            return
        if self.waiting > self.spec.max_queued:
            raise Loading(f"{self.spec.name} is loading, and {self.waiting} requests wait for it.")
        wait_s = self._retry_at - time.monotonic()
        if self.worker.state == "failed" and wait_s > 0:
            reason = self.worker.models()[0].reason
            raise LoadFailed(f"{self.spec.name} has failed: {reason}", retry_after_s=wait_s)
        self.waiting += 1
        try:
            await self._start()
        finally:
            self.waiting -= 1

    async def aclose(self, drain_s: float) -> None:
        """Stop the worker and whoever restarts it."""
        if self._keeper is not None:
            self._keeper.cancel()
        await self.worker.aclose(drain_s)

    async def _start(self) -> None:
        try:
            await self.worker.start()
        except HeadraceError:
            self._failed()
            raise
        self._ready_at = time.monotonic()
        if self._keeper is None or self._keeper.done():
            self._keeper = asyncio.create_task(self._keep(), name=f"keep {self.spec.name}")

    def _failed(self) -> None:
        if time.monotonic() < self._retry_at:
            # One of many who waited for the same load.
            return
        self._failures += 1
        self._retry_at = time.monotonic() + backoff_s(self._failures)

    async def _keep(self) -> None:
        # Ready again without being asked: a service behind a balancer gets no request otherwise.
        await self.worker.died.wait()
        while self.worker.state == "failed":
            if time.monotonic() - self._ready_at > _STEADY_S:
                self._failures = 0
            await asyncio.sleep(backoff_s(self._failures))
            try:
                await self.worker.start()
            except HeadraceError as error:
                self._failed()
                data = {"model": self.spec.name, "error": error.message}
                log.warning("headrace.pool.restart_failed", extra={"data": data})
            else:
                self._failures += 1
                self._ready_at = time.monotonic()
                log.warning("headrace.pool.restarted", extra={"data": {"model": self.spec.name}})
                await self.worker.died.wait()


async def _in_time(ready: Coroutine[Any, Any, None], request: GenerateRequest) -> None:
    if request.deadline_s is None:
        return await ready
    left = request.received + request.deadline_s - time.monotonic()
    try:
        async with asyncio.timeout(left):
            return await ready
    except TimeoutError as error:
        raise QueueTimeout("The deadline passed while the model was loading.") from error


class Pool:
    """A Backend that finds the model a request names, by name or alias."""

    def __init__(self, specs: Sequence[ModelSpec], open_worker: OpenWorker) -> None:
        self._seats = {spec.name: Seat(spec, open_worker(spec)) for spec in specs}
        self._names = {name: spec.name for spec in specs for name in (spec.name, *spec.aliases)}

    def __repr__(self) -> str:
        """Tell the seats."""
        return f"<Pool {list(self._seats.values())!r}>"

    @property
    def ready(self) -> bool:
        """Whether every model is loaded."""
        return all(seat.worker.state == "ready" for seat in self._seats.values())

    async def start(self) -> None:
        """Load all models.

        Raises:
            HeadraceError: of the first that failed, after all have been tried.
        """
        results = await asyncio.gather(
            *(seat.ready() for seat in self._seats.values()), return_exceptions=True
        )
        for result in results:
            if isinstance(result, BaseException):
                raise result

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        """Yield the stream of the model's worker, after a wait for its load if need be."""
        seat = self._seat(request.model)
        began = time.monotonic()
        if seat.worker.state != "ready":
            yield Progress("loading")
            await _in_time(seat.ready(), request)
            request = msgspec.structs.replace(request, load_ms=(time.monotonic() - began) * 1000)
        stream = seat.worker.generate(request)
        try:
            async for event in stream:
                yield event
        finally:
            await stream.aclose()

    async def count_tokens(self, request: CountRequest) -> TokenCount:
        """Count with the model's own tokenizer."""
        seat = self._seat(request.model)
        await seat.ready()
        return await seat.worker.count_tokens(request)

    async def detokenize(self, request: DetokenizeRequest) -> str:
        """Return text from the model's own tokenizer."""
        seat = self._seat(request.model)
        await seat.ready()
        return await seat.worker.detokenize(request)

    def models(self) -> tuple[ModelInfo, ...]:
        """Return the metadata of all, without waiting."""
        return tuple(info for seat in self._seats.values() for info in seat.worker.models())

    async def aclose(self, drain_s: float = 0.0) -> None:
        """Drain and stop all workers at once. Idempotent."""
        await asyncio.gather(*(seat.aclose(drain_s) for seat in self._seats.values()))

    def _seat(self, name: str) -> Seat:
        if not name and len(self._seats) == 1:
            return next(iter(self._seats.values()))
        if name not in self._names:
            served = ", ".join(sorted(self._names))
            raise UnknownModel(
                f"The model {name!r} is not served here; there is {served}.", param="model"
            )
        return self._seats[self._names[name]]
