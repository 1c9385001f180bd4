"""Many models behind one Backend: a request finds its model, waits for it, and gets its answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from typing import TypeVar

import msgspec

from headrace.core.errors import (
    Draining,
    EngineError,
    HeadraceError,
    QueueTimeout,
    UnknownModel,
)
from headrace.core.events import Delta, Event, Finish
from headrace.core.model import Capabilities, ModelInfo, ModelSpec
from headrace.core.request import (
    CountRequest,
    DetokenizeRequest,
    EmbedRequest,
    EmbedResult,
    GenerateRequest,
    RerankRequest,
    RerankResult,
    TokenCount,
)
from headrace.pool.feed import Feed
from headrace.pool.ledger import Ledger
from headrace.pool.line import Request, Waiter
from headrace.pool.loader import KeepSpare, Loader, Sizing
from headrace.pool.policy import Rules
from headrace.pool.replica import OpenWorker, PooledWorker
from headrace.pool.resume import Answer, Diverged, may_repeat
from headrace.pool.seat import Seat
from headrace.pool.watch import Watch
from headrace.worker.spec import unloaded_info

_TELL_EVERY_S = 0.5

Encoding = TypeVar("Encoding", EmbedRequest, RerankRequest)
Encoded = TypeVar("Encoded", EmbedResult, RerankResult)


class Pool:
    """A Backend over many models, each in as many processes as it has replicas."""

    def __init__(
        self,
        specs: Sequence[ModelSpec],
        open_worker: OpenWorker,
        *,
        sizing: Sizing,
        ledger: Ledger,
        rules: Rules | None = None,
        spare: KeepSpare | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.feed = Feed()
        self.ledger = ledger
        self.seats: dict[str, Seat] = {}
        self.leaving: list[Seat] = []
        self.draining = self._started = False
        self._names: dict[str, str] = {}
        self._clock = clock
        self.loader = Loader(
            self._everybody, open_worker, sizing, ledger, rules or Rules(), self.feed, clock
        )
        self.loader.spare = spare
        self._hurry = asyncio.Event()
        self._drain_until = float("inf")
        self._streams = 0
        self._closing: asyncio.Task[None] | None = None
        for spec in specs:
            self.add(spec)

    def __repr__(self) -> str:
        """Tell the seats and the memory."""
        return f"<Pool {list(self.seats.values())!r}, {self.ledger!r}>"

    @property
    def ready(self) -> bool:
        """Whether the start is over, and a request would be answered, after a load at worst."""
        return (
            not self.draining
            and self._started
            and any(seat.spec.enabled and seat.failure is None for seat in self.seats.values())
        )

    def watched_by(self, watch: Watch) -> None:
        """Have somebody look on. To be said before anything is asked."""
        self.loader.watch = watch

    def add(self, spec: ModelSpec) -> Seat:
        """Serve one more model; nothing is loaded yet."""
        seat = self.seats[spec.name] = Seat(spec, self._clock)
        seat.draining = self.draining
        self.name_all()
        return seat

    def remove(self, seat: Seat) -> None:
        """Serve a model no more: who runs ends, who waits is refused, and it is unloaded."""
        del self.seats[seat.spec.name]
        self.leaving = [one for one in self.leaving if list(one.everybody())] + [seat]
        self.name_all()
        seat.draining = True
        seat.refuse(UnknownModel(f"The model {seat.spec.name!r} is not served any more."))
        for replica in seat.replicas:
            replica.closed = True
            seat.retired.add(replica)
        seat.replicas = []
        self.loader.let_go(seat)

    def name_all(self) -> None:
        """Note anew which names and aliases lead to which model."""
        self._names = {
            name: seat.spec.name
            for seat in self.seats.values()
            for name in (seat.spec.name, *seat.spec.aliases)
        }

    def seat(self, name: str) -> Seat:
        """Find a model by name or alias; the only one needs no name.

        Raises:
            UnknownModel: with the names that there are.
        """
        if not name and len(self.seats) == 1:
            return next(iter(self.seats.values()))
        if name not in self._names:
            served = ", ".join(sorted(self._names))
            raise UnknownModel(
                f"The model {name!r} is not served here; there is {served}.", param="model"
            )
        return self.seats[self._names[name]]

    async def start(self) -> None:
        """Load the models that are to be loaded from the start, in order, as long as they fit.

        Raises:
            HeadraceError: of the first that failed, after all have been tried.
        """
        self.loader.start()
        failed: HeadraceError | None = None
        for seat in list(self.seats.values()):
            if not (seat.preload and seat.spec.enabled):
                continue
            self.loader.want(seat, may_evict=False)
            loading = [one.loading for one in seat.replicas if one.loading is not None]
            if loading:
                await asyncio.wait(loading)
            failed = failed or seat.failure
        self._started = True
        if failed is not None:
            raise failed

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        """Yield the stream of a worker; when that dies, another goes on with it if it can.

        Raises:
            HeadraceError: of any family, at any time before the Finish.
        """
        with self.loader.watch.asked(request) as seen, self._counted():
            request, seat = seen.request, self.seat(request.model)
            answer = Answer(request, seat.spec.continuation, self._clock)
            stream = self._attempt(seat, request, answer)
            try:
                async for event in stream:
                    seen.saw(event)
                    yield event
                return
            except EngineError as error:
                if answer.is_whole:
                    # It died after its last word.
                    return
                broken, way = error, answer.way_on(error, _capabilities(seat))
            finally:
                await stream.aclose()
            if way is None or self.draining:
                raise broken
            self._note(seat, request, way, broken)
            stream = self._attempt(seat, answer.again(way), answer, first=True)
            try:
                async for event in stream:
                    seen.saw(event)
                    yield event
            except (HeadraceError, Diverged) as error:
                raise broken from error
            finally:
                await stream.aclose()

    async def embed(self, request: EmbedRequest) -> EmbedResult:
        """Return the vectors of a worker; when that dies, another is asked once more."""
        return await self._encoded(request, lambda worker, asked: worker.embed(asked))

    async def rerank(self, request: RerankRequest) -> RerankResult:
        """Return the order that a worker gives; when that dies, another is asked once more."""
        return await self._encoded(request, lambda worker, asked: worker.rerank(asked))

    async def count_tokens(self, request: CountRequest) -> TokenCount:
        """Count with the model's own tokenizer; this never queues."""
        return await (await self._worker(request.model)).count_tokens(request)

    async def detokenize(self, request: DetokenizeRequest) -> str:
        """Return text from the model's own tokenizer; this never queues."""
        return await (await self._worker(request.model)).detokenize(request)

    def models(self) -> tuple[ModelInfo, ...]:
        """Return the metadata of all, without waiting."""
        return tuple(_info(seat) for seat in self.seats.values())

    async def aclose(self, drain_s: float = 0.0) -> None:
        """Refuse what is new, let running answers end within `drain_s`, end the rest. Idempotent.

        Called again, it can shorten the wait. When it returns, all processes are gone.
        """
        self._drain_until = min(self._drain_until, self._clock() + drain_s)
        self._hurry.set()
        if self._closing is None:
            self.draining = True
            for seat in self._everybody():
                seat.draining = True
            self.feed.tell("draining")
            self._closing = asyncio.create_task(self._close(), name="close the pool")
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        error = Draining("The service is stopping.")
        for seat in self._everybody():
            seat.refuse(error)
        self.loader.give_up()
        self.feed.close()
        while self._streams and (left := self._drain_until - self._clock()) > 0:
            self._hurry.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await self._hurry.wait()
        await self.loader.aclose()
        self.loader.watch.closed()

    async def _attempt(
        self, seat: Seat, request: GenerateRequest, answer: Answer, *, first: bool = False
    ) -> AsyncGenerator[Event, None]:
        waiter, tokens = seat.join(request, first=first), None
        try:
            if not waiter.turn.done():
                self.loader.want(seat)
            while not waiter.turn.done():
                yield seat.progress()
                await self._for_turn(seat, waiter)
            worker, request = waiter.turn.result().worker, answer.asked(request, waiter.load_s)
            with self.loader.watch.attempted(request, worker, seat.spec) as seen:
                stream = worker.generate(seen.request)
                try:
                    async for event in stream:
                        if isinstance(event, Delta):
                            if (new := answer.new(event)) is not None:
                                yield new
                        elif isinstance(event, Finish):
                            seen.saw(event)
                            tokens = event.usage.total_tokens
                            yield answer.check(event)
                        else:
                            yield event
                finally:
                    await stream.aclose()
        finally:
            seat.abandon(waiter, tokens)
            self.loader.released(seat)

    async def _encoded(
        self, request: Encoding, ask: Callable[[PooledWorker, Encoding], Awaitable[Encoded]]
    ) -> Encoded:
        with self.loader.watch.asked(request) as seen, self._counted():
            result = await self._twice(self.seat(request.model), seen.request, ask)
            seen.saw(result)
            return result

    @contextmanager
    def _counted(self) -> Generator[None]:
        """Have the end of the pool wait for a request."""
        self._streams += 1
        try:
            yield
        finally:
            self._streams -= 1
            self._hurry.set()

    async def _twice(
        self,
        seat: Seat,
        request: Encoding,
        ask: Callable[[PooledWorker, Encoding], Awaitable[Encoded]],
    ) -> Encoded:
        try:
            return await self._once(seat, request, ask)
        except EngineError as error:
            if self.draining or not may_repeat(error, seat.spec.continuation):
                raise
            broken = error
        self._note(seat, request, "exact", broken)
        try:
            result = await self._once(seat, request, ask, first=True)
        except HeadraceError as error:
            raise broken from error
        metrics = msgspec.structs.replace(result.metrics, continuations=1, continued="exact")
        return msgspec.structs.replace(result, metrics=metrics)

    async def _once(
        self,
        seat: Seat,
        request: Encoding,
        ask: Callable[[PooledWorker, Encoding], Awaitable[Encoded]],
        *,
        first: bool = False,
    ) -> Encoded:
        waiter, tokens = seat.join(request, first=first), None
        try:
            if not waiter.turn.done():
                self.loader.want(seat)
            while not waiter.turn.done():
                await self._for_turn(seat, waiter)
            load_ms = request.load_ms + waiter.load_s * 1000
            worker = waiter.turn.result().worker
            request = msgspec.structs.replace(request, load_ms=load_ms)
            with self.loader.watch.attempted(request, worker, seat.spec) as seen:
                result = await ask(worker, seen.request)
                seen.saw(result)
            tokens = result.usage.total_tokens
            return result
        finally:
            seat.abandon(waiter, tokens)
            self.loader.released(seat)

    async def _for_turn(self, seat: Seat, waiter: Waiter) -> None:
        """Wait a while for a turn.

        Raises:
            QueueTimeout: the request's deadline has passed.
            Loading: the load takes longer than the request waits for it.
        """
        if (loading := seat.impatient(waiter)) is not None:
            raise loading
        request, wait_s = waiter.request, _TELL_EVERY_S
        if request.deadline_s is not None:
            left = request.received + request.deadline_s - self._clock()
            if left <= 0:
                what = "in the queue" if seat.is_ready else "for the model to load"
                raise QueueTimeout(f"The deadline passed while the request waited {what}.")
            wait_s = min(wait_s, left)
        await asyncio.wait({waiter.turn}, timeout=wait_s)

    async def _worker(self, name: str) -> PooledWorker:
        seat = self.seat(name)
        seat.check()
        if not seat.is_ready:
            self.loader.want(seat)
        worker = (await seat.up()).worker
        assert worker is not None, "a ready replica has one"
        return worker

    def _note(self, seat: Seat, request: Request, way: str, why: EngineError) -> None:
        seat.continuations += 1
        self.feed.tell("continued", seat.spec.name, id=request.id, way=way, why=why.message)

    def _everybody(self) -> list[Seat]:
        return [*self.seats.values(), *self.leaving]


def _capabilities(seat: Seat) -> Capabilities:
    return seat.info.capabilities if seat.info else Capabilities()


def _info(seat: Seat) -> ModelInfo:
    reason = seat.last_error if seat.state == "failed" else None
    if seat.info is None:
        return unloaded_info(seat.spec, seat.state, reason)
    live = next((one.worker for one in seat.replicas if one.worker and one.is_ready), None)
    info = live.models()[0] if live else msgspec.structs.replace(seat.info, memory=None)
    return msgspec.structs.replace(info, state=seat.state, reason=reason, aliases=seat.spec.aliases)
