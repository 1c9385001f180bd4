"""The pool as its requests see it: loads, lines, evictions, deaths, the end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from tests.pool.rig import (
    FakeWorker,
    Machine,
    answer,
    ask,
    clock,
    counted,
    pool,
    run,
    spec,
    with_pool,
)

from headrace.core.errors import (
    DeadlineExceeded,
    Disabled,
    DoesNotFit,
    Draining,
    GenerationFailed,
    LoadFailed,
    Loading,
    QueueFull,
    QueueTimeout,
    UnknownModel,
    WorkerDied,
)
from headrace.core.events import Delta, Event, Finish
from headrace.core.model import ModelSpec
from headrace.core.request import CountRequest, GenerateRequest
from headrace.core.stream import collect_count


def entries(served: Any) -> dict[str, str]:
    return {name: entry.state for name, entry in served.entries.items()}


def test_that_a_hundred_requests_make_one_load() -> None:
    """M4: loads are coalesced."""

    async def main() -> None:
        machine = Machine()
        served = pool(machine, spec(max_running=4))
        texts = await asyncio.gather(*(answer(served, ask(received=clock())) for _ in range(60)))
        assert {text for text, _ in texts} == {counted(5)}
        assert machine.loads == 1
        assert all(finish.metrics.load_ms == pytest.approx(1000) for _, finish in texts)
        await served.aclose()
        assert machine.held == {}

    run(main())


def test_that_the_names_lead_to_the_models() -> None:
    async def main() -> None:
        served = pool(Machine(), spec("a", aliases=("b",)), spec("c"))
        assert (await answer(served, ask("b")))[0] == counted(5)
        assert entries(served) == {"a": "ready", "c": "created"}
        with pytest.raises(UnknownModel, match=r"there is a, b, c"):
            await answer(served, ask("d"))
        await served.aclose()

    run(main())


def test_that_a_full_line_is_told_when_to_come_again() -> None:
    """M7: 8 slots, 16 places, 72 at once; who was refused comes again at his time, and is taken."""

    async def main() -> None:
        served = pool(Machine(), spec(max_running=8, max_queued=16))
        await asyncio.gather(*(answer(served, ask(tokens=20)) for _ in range(8)))
        refused: list[tuple[float, float]] = []

        async def one() -> None:
            while True:
                try:
                    await answer(served, ask(tokens=20))
                except QueueFull as error:
                    assert error.retry_after_s is not None
                    refused.append((clock(), error.retry_after_s))
                    await asyncio.sleep(error.retry_after_s)
                else:
                    return

        began = clock()
        await asyncio.gather(*(one() for _ in range(72)))
        assert len([at for at, _ in refused if at == began]) == 48
        # 72 requests of 2 s on 8 slots take 18 s at best.
        assert 18 <= clock() - began < 24
        assert len(refused) < 60
        await served.aclose()

    run(main())


def test_that_an_answer_of_a_lost_node_goes_on_in_a_full_queue() -> None:
    """Issue 15.1: its client has a part of it already, so that it is neither refused nor last."""

    async def main() -> None:
        served = pool(Machine(), spec(max_running=1, max_queued=2))
        await answer(served, ask())
        ends: list[str] = []

        async def one(name: str, **given: Any) -> None:
            await answer(served, ask(tokens=20, client=name, **given))
            ends.append(name)

        async with asyncio.TaskGroup() as group:
            for name in ("running", "first", "second"):
                group.create_task(one(name))
                await asyncio.sleep(0.01)
            with pytest.raises(QueueFull):
                await answer(served, ask(client="first"))
            group.create_task(one("goes on", continues=True))
        assert ends == ["running", "goes on", "first", "second"]
        await served.aclose()

    run(main())


class Reader(FakeWorker):
    """Computes prompts one after the other, each in `PROMPT_S`."""

    PROMPT_S = 2.0

    def __init__(self, one: ModelSpec, machine: Machine) -> None:
        super().__init__(one, machine)
        self.prompts = asyncio.Lock()

    async def _generate(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        async with self.prompts:
            await asyncio.sleep(self.PROMPT_S)
        async for event in super()._generate(request):
            yield event


def test_that_the_prompts_of_one_client_are_not_all_before_that_of_another() -> None:
    """Issue 11: a client's first token comes after one prompt of another, and not after eight."""

    async def main() -> None:
        machine = Machine()
        served = with_pool(machine, lambda one, _: Reader(one, machine), spec(max_running=8))
        await answer(served, ask())
        began = clock()
        flood = [asyncio.create_task(answer(served, ask(tokens=1, client="a"))) for _ in range(30)]
        await asyncio.sleep(0.5)
        for _ in range(3):
            sent = clock()
            await answer(served, ask(tokens=1, client="b"))
            assert clock() - sent <= 2 * Reader.PROMPT_S + 0.2
        await asyncio.gather(*flood)
        # The 33 take no longer than one client's would.
        assert clock() - began < 33 * (Reader.PROMPT_S + 0.1) + 0.5
        await served.aclose()

    run(main())


@pytest.mark.parametrize("client", ["", "a"])
def test_that_one_client_alone_uses_all_of_a_worker_that_begins_many_at_a_time(client: str) -> None:
    """What is computed in a moment, for any number of requests, is not done one by one."""

    async def main() -> None:
        served = pool(Machine(), spec(max_running=64, max_queued=1000))
        await answer(served, ask())
        began = clock()
        async with asyncio.TaskGroup() as group:
            for _ in range(640):
                group.create_task(answer(served, ask(tokens=10, client=client)))
        assert clock() - began < 10 * 1.15
        await served.aclose()

    run(main())


def test_that_one_client_cannot_take_all_places_of_the_queue() -> None:
    """Issue 11: another client has a place, and only one as long as the queue is full."""

    async def main() -> None:
        served = pool(Machine(), spec(max_running=1, max_queued=4))
        await answer(served, ask())
        async with asyncio.TaskGroup() as group:
            for client in "aaaaab":
                group.create_task(answer(served, ask(client=client)))
            await asyncio.sleep(0.01)
            for client in "ab":
                with pytest.raises(QueueFull):
                    await answer(served, ask(client=client))
        await served.aclose()

    run(main())


def test_that_clients_take_turns_by_tokens() -> None:
    """M7: one who asks much does not keep one who asks little waiting."""

    async def main() -> None:
        served = pool(Machine(), spec(max_running=1))
        await answer(served, ask())
        ends: dict[str, list[float]] = {"greedy": [], "modest": []}

        async def one(client: str, tokens: int) -> None:
            await answer(served, ask(tokens=tokens, client=client))
            ends[client].append(clock())

        began = clock()
        async with asyncio.TaskGroup() as group:
            for _ in range(20):
                group.create_task(one("greedy", 50))
            await asyncio.sleep(0.01)
            for _ in range(5):
                group.create_task(one("modest", 10))
        assert max(ends["modest"]) - began < 5 * 1 + 3 * 5
        assert max(ends["greedy"]) - began < 20 * 5 + 5 * 1 + 1
        await served.aclose()

    run(main())


def test_that_deadlines_count_in_the_line_and_the_place_is_free_again() -> None:
    async def main() -> None:
        served = pool(Machine(), spec(max_running=1))
        await answer(served, ask())
        long = asyncio.create_task(answer(served, ask(tokens=100)))
        await asyncio.sleep(0)
        began = clock()
        with pytest.raises(QueueTimeout):
            await answer(served, ask(deadline_s=1.0))
        assert clock() - began == pytest.approx(1.0)
        assert len(served.entry("a").queue) == 0
        long.cancel()
        await asyncio.wait({long})
        assert served.entry("a").running == 0
        await served.aclose()

    run(main())


def test_that_who_does_not_stream_hears_how_long_a_load_takes() -> None:
    """Loading is 503 with the rest of the measured time, and goes on for the one who comes back."""

    async def main() -> None:
        machine = Machine()
        machine.load_s["a"] = 60
        served = pool(machine)
        with pytest.raises(Loading) as caught:
            await answer(served, ask(load_wait_s=10))
        assert caught.value.retry_after_s == pytest.approx(60, abs=1)
        await asyncio.sleep(30)
        with pytest.raises(Loading) as caught:
            await answer(served, ask(load_wait_s=10))
        assert caught.value.retry_after_s == pytest.approx(30, abs=1)
        await asyncio.sleep(caught.value.retry_after_s or 0)
        assert (await answer(served, ask(load_wait_s=10)))[0] == counted(5)
        assert machine.loads == 1
        await served.aclose()

    run(main())


def test_that_the_idle_make_room_and_the_busy_and_the_pinned_do_not() -> None:
    """M6: never over budget."""

    async def main() -> None:
        machine = Machine()
        machine.sizes = {"a": 40, "b": 40, "c": 40, "big": 90}
        served = pool(
            machine, spec("a", pinned=True), spec("b"), spec("c"), spec("big"), budget=100
        )
        await answer(served, ask("a"))
        await answer(served, ask("b"))
        await asyncio.sleep(5)
        await answer(served, ask("c"))
        assert entries(served) == {"a": "ready", "b": "stopped", "c": "ready", "big": "created"}
        with pytest.raises(DoesNotFit, match=r"Pinned: a"):
            await answer(served, ask("big"))
        running = asyncio.create_task(answer(served, ask("c", 100)))
        await asyncio.sleep(1)
        assert (await answer(served, ask("b")))[0] == counted(5)
        # It ran to its end before it went.
        assert (await running)[0] == counted(100)
        assert machine.peak <= 100
        assert served.entry("c").evictions == 1
        await served.aclose()

    run(main())


def test_that_taking_turns_does_not_thrash() -> None:
    """Two models that want one place, each with a full line: few swaps, and nobody starves."""

    async def main() -> None:
        machine = Machine()
        machine.sizes, machine.load_s = {"a": 80, "b": 80}, {"a": 5.0, "b": 5.0}
        served = pool(machine, spec("a"), spec("b"), budget=100, longest_wait_s=20)
        end, most = clock() + 600, 0.0

        async def client(model: str) -> None:
            nonlocal most
            while clock() < end:
                began = clock()
                await answer(served, ask(model, 10))
                most = max(most, clock() - began)

        await asyncio.gather(*(client(name) for name in "aabb" * 2))
        assert most < 60
        assert machine.loads <= 2 * 600 / 25
        assert machine.peak <= 100
        await served.aclose()

    run(main())


@pytest.mark.parametrize(("keep_alive", "stays_s"), [(5.0, 5.0), (0.0, 0.0), (-1.0, None)])
def test_that_models_stay_as_long_as_they_are_told(
    keep_alive: float, stays_s: float | None
) -> None:
    """M6: keep-alive of the model and of the request."""

    async def main() -> None:
        machine = Machine()
        served = pool(machine, spec(keep_alive=300 if stays_s is not None else 1))
        await answer(served, ask(keep_alive=keep_alive))
        await asyncio.sleep((100 if stays_s is None else stays_s) - 0.1)
        assert machine.held or not stays_s
        await asyncio.sleep(1)
        assert bool(machine.held) == (stays_s is None)
        await served.aclose()

    run(main())


@pytest.mark.parametrize("way", ["exact", "fast"])
def test_that_an_answer_outlives_its_worker(way: str) -> None:
    """A worker dies in mid-stream: a pause, and the rest; the figures say so."""

    async def main() -> None:
        machine = Machine()
        served = pool(machine, spec(continuation=way))
        await served.start()
        began = clock()
        task = asyncio.create_task(answer(served, ask(tokens=30)))
        await asyncio.sleep(1.05)
        machine.workers[-1].die()
        text, finish = await task
        assert text == counted(30)
        assert finish.usage.completion_tokens == 30
        assert (finish.metrics.continuations, finish.metrics.continued) == (1, way)
        assert finish.metrics.time_to_first_token_ms == pytest.approx(100, abs=20)
        # The load, and for `exact` what had been said already.
        assert clock() - began == pytest.approx(4 if way == "fast" else 5, abs=0.2)
        assert served.entry("a").restarts == served.entry("a").continuations == 1
        await served.aclose()

    run(main())


def test_that_off_breaks_it_off_at_once() -> None:
    async def main() -> None:
        machine = Machine()
        served = pool(machine, spec(continuation="off"))
        await served.start()
        task = asyncio.create_task(answer(served, ask(tokens=30)))
        await asyncio.sleep(1.05)
        machine.workers[-1].die()
        died = clock()
        with pytest.raises(WorkerDied):
            await task
        assert clock() - died < 0.2
        # It is ready again without being asked.
        await asyncio.sleep(1.1)
        assert entries(served) == {"a": "ready"}
        await served.aclose()

    run(main())


def test_that_no_answer_is_continued_twice_or_without_a_seed() -> None:
    async def main() -> None:
        machine = Machine()
        served = pool(machine, spec(continuation="exact"))
        await served.start()
        twice = asyncio.create_task(answer(served, ask(tokens=30)))
        await asyncio.sleep(1.05)
        machine.workers[-1].die("the first")
        await asyncio.sleep(3)
        machine.workers[-1].die("the second")
        with pytest.raises(WorkerDied, match="the first"):
            await twice
        await asyncio.sleep(3)
        unseeded = asyncio.create_task(answer(served, ask(tokens=30, temperature=1.0)))
        await asyncio.sleep(1.05)
        machine.workers[-1].broken = GenerationFailed("once")
        with pytest.raises(GenerationFailed, match="once"):
            await unseeded
        await served.aclose()

    run(main())


def test_that_the_breaker_opens_after_three_and_a_reset_closes_it() -> None:
    """M5: back-off, and `failed` with its reason until somebody resets it."""

    async def main() -> None:
        machine = Machine()
        served = pool(machine, spec("a"), spec("b"))
        await served.start()
        restarts: list[float] = []
        for _ in range(3):
            died = clock()
            next(w for w in machine.held if w.spec.name == "a").die()
            await asyncio.sleep(0.01)
            while entries(served)["a"] == "loading":  # noqa: ASYNC110  # a fake clock: costs nothing
                await asyncio.sleep(0.01)
            restarts.append(round(clock() - died, 1))
        # At once and after 1 s, each with a load of 1 s; not after the third.
        assert restarts == [1.0, 2.0, 0.0]
        assert entries(served) == {"a": "failed", "b": "ready"}
        with pytest.raises(LoadFailed, match="SIGKILL"):
            await answer(served, ask("a"))
        assert (await answer(served, ask("b")))[0] == counted(5)
        served.entry("a").reset()
        assert (await answer(served, ask("a")))[0] == counted(5)
        await served.aclose()

    run(main())


def test_that_a_load_that_fails_is_told_to_all_and_not_tried_at_once() -> None:
    async def main() -> None:
        machine = Machine()
        machine.fail_load["a"] = LoadFailed("no such luck")
        served = pool(machine)
        outcomes = await asyncio.gather(
            *(answer(served, ask()) for _ in range(5)), return_exceptions=True
        )
        assert {type(one) for one in outcomes} == {LoadFailed}
        assert machine.loads == 1
        assert machine.held == {}
        assert await caught(served) == LoadFailed
        with pytest.raises(LoadFailed) as refused:
            await answer(served, ask())
        assert refused.value.retry_after_s == pytest.approx(1.0)
        assert machine.loads == 2
        await asyncio.sleep(1.1)
        machine.fail_load.clear()
        assert (await answer(served, ask()))[0] == counted(5)
        await served.aclose()

    async def caught(served: Any) -> type[BaseException]:
        try:
            await answer(served, ask())
        except LoadFailed as error:
            return type(error)
        raise AssertionError

    run(main())


def test_that_replicas_share_the_work_by_weight_and_health() -> None:
    """M3: least outstanding work, weighted; and the beginning of a prompt finds its cache."""

    async def main() -> None:
        machine = Machine()
        served = pool(machine, spec(replicas=2, weights=(3.0, 1.0), max_running=8))
        await served.start()
        assert len(machine.held) == 2
        await asyncio.gather(*(answer(served, ask(prompt=f"{n}" * 400)) for n in range(8)))
        shares = [len(worker.asked) for worker in machine.workers]
        assert shares[0] == pytest.approx(6, abs=1)
        assert sum(shares) == 8
        # Each prompt comes again to the one that knows it.
        knows = {one.prompt: worker for worker in machine.workers for one in worker.asked}
        for prompt, worker in knows.items():
            before = len(worker.asked)
            await answer(served, ask(prompt=f"{prompt}and more"))
            assert len(worker.asked) == before + 1
        # One dies; the other takes what comes, and the answer too.
        running = asyncio.create_task(answer(served, ask(tokens=20, prompt="z")))
        await asyncio.sleep(0.35)
        busy: FakeWorker = next(worker for worker in machine.workers if worker.running)
        busy.die()
        began = clock()
        assert (await running)[0] == counted(20)
        assert clock() - began < 2.1
        await served.aclose()

    run(main())


def test_that_who_is_switched_off_or_stopping_refuses() -> None:
    async def main() -> None:
        served = pool(Machine(), spec(enabled=False))
        await served.start()
        with pytest.raises(Disabled):
            await answer(served, ask())
        await served.aclose()
        with pytest.raises(Draining):
            await answer(served, ask())
        with pytest.raises(Draining):
            await collect_count(served.ask(CountRequest(text="x")))
        served.add(spec("late"))
        with pytest.raises(Draining):
            await answer(served, ask("late"))

    run(main())


@pytest.mark.parametrize("hurried", [False, True])
def test_that_the_end_lets_the_short_ones_finish(hurried: bool) -> None:
    """W8: within the deadline, or until a second word ends it at once."""

    async def main() -> None:
        machine = Machine()
        served = pool(machine, spec(max_running=2), spec("b"))
        await served.start()
        machine.load_s["b"] = 1000
        short = asyncio.create_task(answer(served, ask(tokens=20)))
        endless = asyncio.create_task(answer(served, ask(tokens=10_000)))
        await asyncio.sleep(0.5)
        waiting = asyncio.create_task(answer(served, ask()))
        await asyncio.sleep(0.1)
        began = clock()
        closing = asyncio.create_task(served.aclose(10))
        await asyncio.sleep(0.3)
        assert not served.ready
        with pytest.raises(Draining):
            await waiting
        if hurried:
            await served.aclose(0)
            with pytest.raises(Draining):
                await short
        else:
            assert (await short)[0] == counted(20)
        with pytest.raises(Draining):
            await endless
        await closing
        assert clock() - began == pytest.approx(0.4 if hurried else 10, abs=0.3)
        assert machine.held == {}

    run(main())


def test_that_the_end_does_not_wait_for_a_load() -> None:
    async def main() -> None:
        machine = Machine()
        machine.load_s["a"] = 1000
        served = pool(machine)
        waiting = asyncio.create_task(answer(served, ask()))
        await asyncio.sleep(5)
        began = clock()
        await served.aclose(30)
        with pytest.raises(Draining):
            await waiting
        assert clock() - began < 1
        assert machine.held == {}

    run(main())


def test_that_counting_does_not_queue() -> None:
    """M9."""

    async def main() -> None:
        served = pool(Machine(), spec(max_running=1))
        running = asyncio.create_task(answer(served, ask(tokens=100)))
        await asyncio.sleep(2)
        began = clock()
        assert (await collect_count(served.ask(CountRequest(text="abc")))).count == 3
        assert clock() == began
        running.cancel()
        await asyncio.wait({running})
        await served.aclose()

    run(main())


def test_that_closing_a_stream_frees_the_slot_in_each_phase() -> None:
    async def main() -> None:
        machine = Machine()
        served = pool(machine, spec(max_running=1))
        entry = served.entry("a")
        for moment in (0.0, 0.5, 1.5):
            stream = served.ask(ask(tokens=50))
            end = clock() + moment
            async for _ in stream:
                if clock() >= end:
                    break
            await stream.aclose()
            assert len(entry.queue) == entry.running == 0
        first = served.ask(ask(tokens=50))
        assert isinstance(await anext(first), Delta)
        second = served.ask(ask())
        await anext(second)
        assert len(entry.queue) == 1
        await second.aclose()
        assert len(entry.queue) == 0
        await first.aclose()
        assert entry.running == 0
        await served.aclose()

    run(main())


def test_that_a_deadline_of_the_engine_is_not_taken_for_one_of_the_line() -> None:
    assert issubclass(QueueTimeout, DeadlineExceeded)


def test_that_an_unload_that_fails_costs_nothing_for_good() -> None:
    async def main() -> None:
        machine = Machine()
        served = pool(machine, spec(keep_alive=0.0))
        asked = asyncio.create_task(answer(served, ask()))
        await asyncio.sleep(1.2)

        async def broken(drain_s: float = 0.0) -> None:
            machine.held.clear()
            raise RuntimeError("the driver does not answer")

        machine.workers[0].aclose = broken  # type: ignore[method-assign]
        assert (await asked)[0] == counted(5)
        await asyncio.sleep(1)
        assert served.ledger.booked() == {"cpu": 0}
        assert (await answer(served, ask()))[0] == counted(5)
        assert machine.loads == 2
        await served.aclose()

    run(main())


def test_that_a_death_after_the_last_word_changes_nothing() -> None:
    async def main() -> None:
        machine = Machine()
        served = pool(machine)
        await served.start()
        stream = served.ask(ask())
        events: list[Event] = []
        async for event in stream:
            events.append(event)
            if isinstance(event, Finish):
                machine.workers[0].late = WorkerDied("a moment later")
        assert [type(event).__name__ for event in events].count("Finish") == 1
        assert isinstance(events[-1], Finish)
        assert served.entry("a").continuations == 0
        await served.aclose()

    run(main())


def test_that_who_waits_for_the_busy_does_not_block_who_can_have_room() -> None:
    """M6: in order, but not in a line behind one who waits for others to end."""

    async def main() -> None:
        machine = Machine()
        machine.sizes = {"busy": 50, "idle": 40, "big": 90, "small": 40}
        names = ("busy", "idle", "big", "small")
        served = pool(machine, *(spec(name) for name in names), budget=100)
        await answer(served, ask("idle"))
        endless = asyncio.create_task(answer(served, ask("busy", 3000)))
        await asyncio.sleep(5)
        big = asyncio.create_task(answer(served, ask("big")))
        await asyncio.sleep(1)
        began = clock()
        assert (await answer(served, ask("small")))[0] == counted(5)
        assert clock() - began < 5
        assert not endless.done()
        endless.cancel()
        assert (await big)[0] == counted(5)
        await asyncio.wait({endless})
        await served.aclose()

    run(main())
