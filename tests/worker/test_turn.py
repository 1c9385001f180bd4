"""Turns at one engine: slots, deadlines, failures, and the drain."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable

import pytest

from headrace.core.errors import (
    DeadlineExceeded,
    Draining,
    GenerationFailed,
    HeadraceError,
    OutOfMemory,
    QueueTimeout,
    Unsupported,
)
from headrace.core.model import Capabilities
from headrace.core.request import EmbedRequest, GenerateRequest
from headrace.engines.base import EngineFacts
from headrace.machine import Sampler
from headrace.worker.compiler import Compiler
from headrace.worker.turn import Served, Turn, Turns


def served(slots: int = 1, *, sampler: Sampler | None = None) -> Served:
    facts = EngineFacts(
        device="cpu", context_length=8, max_running=slots, capabilities=Capabilities()
    )
    return Served(
        name="m",
        engine_name="e",
        facts=facts,
        turns=Turns(slots),
        max_choices=slots,
        compiler=Compiler(),
        sampler=sampler,
    )


def request(deadline_s: float | None = None) -> GenerateRequest:
    return GenerateRequest(prompt="x", deadline_s=deadline_s)


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def load(model: Served) -> tuple[int, int]:
    return model.turns.slots.running, model.turns.slots.waiting


async def holding(model: Served, freed: asyncio.Event, order: list[int], number: int) -> None:
    with Turn(model, request()) as turn:
        await turn.take_slot()
        order.append(number)
        try:
            await freed.wait()
        finally:
            turn.leave_slot()


async def test_slots_are_given_in_the_order_of_asking() -> None:
    """W20: never more than there are, and no request overtakes another."""
    model, freed, order = served(2), asyncio.Event(), []
    tasks = [asyncio.create_task(holding(model, freed, order, n)) for n in range(6)]
    await settle()
    assert (order, load(model)) == ([0, 1], (2, 4))
    freed.set()
    await asyncio.gather(*tasks)
    assert (order, load(model), len(model.turns)) == ([*range(6)], (0, 0), 0)


async def test_a_cancelled_request_leaves_its_place_at_once() -> None:
    """W18: and its turn, if it came in the same moment, goes to the next."""
    model, freed, order = served(), asyncio.Event(), []
    tasks = [asyncio.create_task(holding(model, freed, order, n)) for n in range(3)]
    await settle()
    tasks[1].cancel()
    await settle()
    assert load(model) == (1, 1)
    freed.set()
    await asyncio.gather(tasks[0], tasks[2])
    assert (order, load(model)) == ([0, 2], (0, 0))


async def test_the_deadline_holds_in_the_queue_and_in_a_wait() -> None:
    """W20: with errors that tell which it was."""
    model, freed = served(), asyncio.Event()
    holder = asyncio.create_task(holding(model, freed, [], 0))
    await settle()
    with pytest.raises(QueueTimeout), Turn(model, request(0.02)) as turn:
        await turn.take_slot()
    with pytest.raises(QueueTimeout), Turn(model, request(-1.0)) as turn:
        await turn.take_slot()
    freed.set()
    await holder
    with pytest.raises(DeadlineExceeded) as caught, Turn(model, request(0.02)) as turn:
        await turn.take_slot()
        try:
            await turn.within(asyncio.Event().wait())
        finally:
            turn.leave_slot()
    assert not isinstance(caught.value, QueueTimeout)
    assert caught.value.metrics is not None
    assert (load(model), len(model.turns)) == ((0, 0), 0)


async def test_a_time_out_of_the_work_itself_is_no_deadline() -> None:
    async def inner() -> None:
        raise TimeoutError("a connection's own")

    model = served(sampler=Sampler())
    with pytest.raises(GenerationFailed) as caught, Turn(model, request(60.0)) as turn:
        await turn.within(inner())
    assert caught.value.detail == "TimeoutError: a connection's own"


async def test_a_silent_engine_is_interrupted_by_the_drain() -> None:
    """W8: running requests end with an error once the time is up, and new ones are refused."""
    model = served()
    closed = asyncio.Event()

    async def silent() -> AsyncGenerator[int, None]:
        try:
            yield 1
            await asyncio.Event().wait()
        finally:
            closed.set()

    async def read() -> list[int]:
        with Turn(model, request()) as turn:
            return [event async for event in turn.steps(silent())]

    reading = asyncio.create_task(read())
    await settle()
    began = time.monotonic()
    await model.turns.drain(Draining("m is stopping."), 0.05)
    assert time.monotonic() - began < 2
    with pytest.raises(Draining):
        await reading
    assert closed.is_set()
    with pytest.raises(Draining), Turn(model, request()):
        pass
    assert len(model.turns) == 0


async def test_the_drain_waits_for_what_ends_by_itself() -> None:
    model, freed, order = served(), asyncio.Event(), []
    holder = asyncio.create_task(holding(model, freed, order, 0))
    await settle()
    draining = asyncio.create_task(model.turns.drain(Draining("m is stopping."), 60.0))
    await settle()
    assert not draining.done()
    freed.set()
    await asyncio.gather(holder, draining)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (Draining("x"), Draining),
        (MemoryError("x"), OutOfMemory),
        (ValueError("secret"), GenerationFailed),
    ],
)
@pytest.mark.parametrize("is_remote", [True, False])
async def test_what_is_raised_becomes_an_error_of_ours_with_the_figures(
    error: Exception, kind: type[HeadraceError], *, is_remote: bool
) -> None:
    """W17: a library can raise anything; an upstream's text may hold what was sent to it."""
    model = served(sampler=None if is_remote else Sampler())
    with pytest.raises(kind) as caught, Turn(model, request()):
        raise error
    assert caught.value is not error
    metrics = caught.value.metrics
    assert metrics is not None
    assert (metrics.outcome, metrics.engine, metrics.model) == ("error", "e", "m")
    shown = f"{caught.value.message} {caught.value.detail}"
    assert ("secret" in shown) == (isinstance(error, ValueError) and not is_remote)


async def test_a_model_is_asked_only_for_its_tasks() -> None:
    """W22: with what it is for."""
    turn = Turn(served(), EmbedRequest(inputs=("x",)))
    with pytest.raises(Unsupported, match="generates text"), turn:
        turn.require_task()


@pytest.mark.parametrize("raises", [asyncio.CancelledError, GeneratorExit])
def test_a_request_that_is_left_is_cancelled(raises: Callable[[], BaseException]) -> None:
    """W16: its figures say so."""
    turn = Turn(served(), request())
    with pytest.raises(BaseException) as caught, turn:  # noqa: PT011 - the very one
        raise raises()
    assert type(caught.value) is raises
    assert turn.metrics().outcome == "cancelled"


async def test_an_abort_meets_a_deadline_that_is_just_expiring() -> None:
    """W8: the drain goes on with the other requests."""
    model = served()
    with pytest.raises(DeadlineExceeded), Turn(model, request(0.01)) as turn:
        try:
            await turn.within(asyncio.Event().wait())
        finally:
            # asyncio refuses to move a time-out that has fired.
            fired: list[asyncio.Timeout] = [asyncio.timeout(-1.0)]
            with contextlib.suppress(TimeoutError):
                async with fired[0]:
                    await asyncio.sleep(1)
            turn._limits.add(fired[0])
            turn.abort(Draining("m is stopping."))
            turn._limits.clear()


async def test_a_request_that_comes_during_the_drain_has_its_figures() -> None:
    """W16: and its measurement is over."""
    model = served(sampler=Sampler())
    await model.turns.drain(Draining("m is stopping."), 0.0)
    with pytest.raises(Draining) as caught, Turn(model, request()):
        pass
    assert caught.value.metrics is not None
