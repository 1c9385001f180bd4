"""Turn: one request at one engine, with its slot, deadline, figures, log record and errors.

It is common to requests of every kind, at a local engine or an upstream. What each kind yields
is in `generate`, `encode` and `remote`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Mapping, Sequence
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

import msgspec

from headrace.core.errors import (
    DeadlineExceeded,
    GenerationFailed,
    HeadraceError,
    OutOfMemory,
    QueueTimeout,
    Unsupported,
    from_record,
    to_record,
)
from headrace.core.events import ChoicesLeft, Event, Finish, FinishReason
from headrace.core.metrics import DeviceUse, InferenceMetrics, Usage
from headrace.core.model import Task
from headrace.core.request import Request
from headrace.core.stream import within
from headrace.engines.base import EngineFacts
from headrace.machine import Sampler
from headrace.worker.compiler import Compiler
from headrace.worker.embed_prompts import EmbedPrompts
from headrace.worker.meter import Meter, figures, trace_of
from headrace.worker.places import Places, Slots

log = logging.getLogger("headrace.worker")

T = TypeVar("T")
R = TypeVar("R", bound=Request)
S = TypeVar("S", bound="Served")

_LAST_STEP_S = 5.0
_COUNTING = 2
_TASKS: dict[Task, tuple[str, str]] = {
    "generate": ("generates text", "/v1/chat/completions or generate()"),
    "embed": ("makes embeddings", "/v1/embeddings or embed()"),
    "rerank": ("ranks documents", "/v1/rerank or rerank()"),
}
"""What a model of each task does, and how it is requested: over HTTP and in Python."""


class Turns:
    """The open requests at one engine, and the slots that they share.

    Requests queue in the pool. Here the choices of requests for several wait, and what comes beside
    them, until it is their turn, and requests that count tokens for one of the few places in
    `counting`.
    """

    def __init__(self, slots: int) -> None:
        self.slots = Slots(slots)
        self.counting = Places(_COUNTING)
        self._open: set[Turn[Served, Request]] = set()
        self._closed: HeadraceError | None = None
        self._idle = asyncio.Event()
        self._idle.set()

    def __len__(self) -> int:
        """How many requests are open."""
        return len(self._open)

    def add(self, turn: Turn[Served, Request]) -> None:
        """Begin a request.

        Raises:
            HeadraceError: the engine is being drained.
        """
        if self._closed is not None:
            raise self._closed
        self._open.add(turn)
        self._idle.clear()

    def discard(self, turn: Turn[Served, Request]) -> None:
        """End a request."""
        self._open.discard(turn)
        if not self._open:
            self._idle.set()

    async def drain(self, error: HeadraceError, drain_s: float) -> None:
        """Refuse new requests, wait `drain_s` seconds for running ones, and abort the rest."""
        self._closed = error
        if not await self._is_idle(drain_s):
            for turn in tuple(self._open):
                turn.abort(error)
            await self._is_idle(_LAST_STEP_S)

    async def _is_idle(self, timeout_s: float) -> bool:
        return self._idle.is_set() or await within(timeout_s, self._idle.wait())


class Served(msgspec.Struct, frozen=True, kw_only=True):
    """A model that is ready to answer.

    `max_choices` is the limit of choices in a request. `sampler` measures this process; it is None
    if the engine is an upstream. `compiler` compiles constraints and checks answers.
    """

    name: str
    engine_name: str
    facts: EngineFacts
    turns: Turns
    max_choices: int
    compiler: Compiler
    sampler: Sampler | None = None
    log_content: bool = False
    prompts: EmbedPrompts = EmbedPrompts()

    @property
    def is_remote(self) -> bool:
        """Whether the engine is an upstream."""
        return self.sampler is None


class Turn(Generic[S, R]):
    """One request, as a context manager.

    An exception inside of it is raised as a HeadraceError with the figures so far in `metrics`.
    `usage` replaces the counted tokens if an upstream reports its own.
    """

    def __init__(self, served: S, request: R) -> None:
        self.served = served
        self.request = request
        self.meter = Meter(request)
        self.outcome: FinishReason = "cancelled"
        self.usage: Usage | None = None
        self._choices_left = request.slots
        self._answer: list[str] | None = [] if served.log_content else None
        self._measurement = None if served.sampler is None else served.sampler.watch()
        self._limits: set[asyncio.Timeout] = set()
        self._aborted: HeadraceError | None = None

    def __enter__(self) -> Self:
        """Begin.

        Raises:
            HeadraceError: the engine is being drained.
        """
        try:
            self.served.turns.add(self)  # pyright: ignore[reportArgumentType]  # only read
        except HeadraceError as error:
            self.__exit__(type(error), error, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Log the record of the request, and translate an exception."""
        try:
            if isinstance(error, Exception):
                # The text of an upstream's error may contain the request: it is not chained.
                raise self._failed(error) from (None if self.served.is_remote else error)
        finally:
            if log.isEnabledFor(logging.INFO):
                log.info("headrace.request", extra={"data": self._record()})
            self._devices()
            self.served.turns.discard(self)  # pyright: ignore[reportArgumentType]

    def require_task(self) -> None:
        """Check that the model supports this kind of request.

        Raises:
            Unsupported: names the tasks of the model, and how they are requested.
        """
        tasks = self.served.facts.capabilities.tasks
        if self.request.task not in tasks:
            verbs, ways = zip(*(_TASKS[task] for task in sorted(tasks)), strict=True)
            raise Unsupported(
                f"{self.served.name} {' and '.join(verbs)}: use {', '.join(ways)}.", param="model"
            )

    async def take_slot(self) -> None:
        """Wait for one of the engine's slots.

        Raises:
            QueueTimeout: the deadline passed before.
        """
        deadline = self.request.deadline
        if deadline is not None and time.monotonic() > deadline:
            raise QueueTimeout("The deadline had passed before the request's turn came.")
        late = QueueTimeout("The deadline passed before the request's turn came.")
        await self.within(self.served.turns.slots.take(self.request), late)

    def leave_slot(self) -> None:
        """Give a slot back."""
        self.served.turns.slots.leave(self.request)

    def choice_ended(self) -> Sequence[ChoicesLeft]:
        """Note that one of several choices has given its slot back; return what tells the pool."""
        self._choices_left -= 1
        return (ChoicesLeft(self._choices_left),) if self._choices_left > 0 else ()

    async def within(self, work: Awaitable[T], late: HeadraceError | None = None) -> T:
        """Await `work`, until the deadline or `abort`.

        Raises:
            DeadlineExceeded: or `late`, if given.
        """
        limit = asyncio.timeout(self._left_s())
        self._limits.add(limit)
        try:
            async with limit:
                return await work
        except TimeoutError:
            if not limit.expired():
                raise
        finally:
            self._limits.discard(limit)
        raise self._aborted or late or _too_late()

    async def steps(self, source: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
        """Yield the events of an engine, until the deadline or `abort`, even if none arrive."""
        try:
            while (event := await self.within(anext(source, None))) is not None:
                yield event
        finally:
            await source.aclose()

    def check(self) -> None:
        """Check that the request may go on.

        Raises:
            HeadraceError: of `abort`, or DeadlineExceeded.
        """
        if self._aborted is not None:
            raise self._aborted
        deadline = self.request.deadline
        if deadline is not None and time.monotonic() > deadline:
            raise _too_late()

    def abort(self, error: HeadraceError) -> None:
        """End the request at its next step; a wait in `within` ends at once."""
        self._aborted = error
        for limit in self._limits:
            with contextlib.suppress(RuntimeError):  # the deadline has just passed
                limit.reschedule(0.0)

    def answered(self, text: str) -> None:
        """Keep text of the answer for the log, if content is logged."""
        if self._answer is not None:
            self._answer.append(text)

    def finish(
        self, reasons: Sequence[FinishReason] = ("stop",), stops: Sequence[str | None] = ()
    ) -> Finish:
        """Return the last event; `stops` are the stop strings that ended the choices."""
        self.outcome = reasons[0]
        metrics = self.metrics()
        return Finish(tuple(reasons), metrics.usage, metrics, tuple(stops) if any(stops) else ())

    def metrics(self) -> InferenceMetrics:
        """Return the figures as of now."""
        served = self.served
        metrics = self.meter.finish(self.outcome, self._devices())
        return msgspec.structs.replace(
            metrics,
            usage=self.usage or metrics.usage,
            engine=served.engine_name,
            # The name of an adapter is that which the request was found by.
            model=self.request.model if self.request.adapter else served.name,
            worker=served.name,
        )

    def _devices(self) -> tuple[DeviceUse, ...]:
        if self.served.sampler is None or self._measurement is None:
            return ()
        return self.served.sampler.release(self._measurement)

    def _left_s(self) -> float | None:
        if self._aborted is not None:
            return 0.0
        deadline = self.request.deadline
        return None if deadline is None else deadline - time.monotonic()

    def _failed(self, error: Exception) -> HeadraceError:
        # A new exception: one error can end many streams, each with its own figures.
        self.outcome = "error"
        record = to_record(self._translated(error))
        return from_record(msgspec.structs.replace(record, metrics=self.metrics()))

    def _translated(self, error: Exception) -> HeadraceError:
        """Return the error of an engine as a HeadraceError: a library can raise anything."""
        if isinstance(error, HeadraceError):
            return error
        if isinstance(error, MemoryError):
            return OutOfMemory("The engine ran out of memory.")
        data = {"id": self.request.id}
        if self.served.is_remote:
            data["error"] = type(error).__name__
            log.error("headrace.engine.failed", extra={"data": data})
            return GenerationFailed("The engine failed.", detail=type(error).__name__)
        log.error("headrace.engine.failed", exc_info=error, extra={"data": data})
        return GenerationFailed("The engine failed.", detail=f"{type(error).__name__}: {error}")

    def _record(self) -> dict[str, object]:
        record = {"id": self.request.id, **trace_of(self.request), **figures(self.metrics())}
        if self.served.is_remote and self.usage is None:
            record["usage"] = "estimated"
        if self._answer is not None and self.request.task == "generate":
            record |= {"asked": self.request.content(), "answered": "".join(self._answer)}
        return record


def _too_late() -> DeadlineExceeded:
    return DeadlineExceeded("The deadline passed before the answer was complete.")


Answers = Mapping[type[Request], Callable[[Any, Any], AsyncGenerator[Event, None]]]
"""By the type of a request: the function that answers it, given what is served and the request."""


@contextlib.contextmanager
def until_left() -> Generator[threading.Event]:
    """Yield an event that is set on leaving, also by cancellation, for a thread to give up."""
    left = threading.Event()
    try:
        yield left
    finally:
        left.set()


async def unmeasured(request: Request, event: Awaitable[T]) -> AsyncGenerator[T | Finish, None]:
    """Yield one event and a Finish, for a request without a slot and a log record."""
    yield await event
    metrics = Meter(request).finish("stop")
    yield Finish(("stop",), metrics.usage, metrics)
