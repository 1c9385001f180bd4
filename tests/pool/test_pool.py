from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from tests.worker.rig import ask, echo, finish, first_delta, listed, resolve, text, until

from headrace.core.errors import (
    Draining,
    LoadFailed,
    Loading,
    UnknownModel,
    WorkerDied,
)
from headrace.core.events import Event, Progress
from headrace.core.model import ModelInfo, ModelSpec, State
from headrace.core.request import CountRequest, DetokenizeRequest, GenerateRequest, TokenCount
from headrace.core.stream import collect
from headrace.pool import pool as pools
from headrace.pool.pool import Pool, backoff_s
from headrace.worker.process import WorkerProcess
from headrace.worker.spec import unloaded_info
from headrace.worker.worker import Worker


class Fake:
    """A worker in this process whose load waits for a gate and fails when told to."""

    def __init__(self, spec: ModelSpec) -> None:
        self.died = asyncio.Event()
        self.gate = asyncio.Event()
        self.gate.set()
        self.loads = 0
        self.failures: list[Exception] = []
        self.requests: list[GenerateRequest] = []
        self.reason: str | None = None
        self._worker = Worker(spec, resolve)
        self._state: State | None = None

    @property
    def state(self) -> State:
        return self._state or self._worker.state

    async def start(self) -> None:
        self.loads += 1
        self._state = "loading"
        try:
            await self.gate.wait()
            if self.failures:
                raise self.failures.pop()
            await self._worker.start()
        except Exception as error:
            self.reason = str(error)
            self._state = "failed"
            raise
        self._state = None
        self.died.clear()

    def die(self) -> None:
        self._state, self.reason = "failed", "died"
        self.died.set()

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        self.requests.append(request)
        stream = self._worker.generate(request)
        try:
            async for event in stream:
                yield event
        finally:
            await stream.aclose()

    async def count_tokens(self, request: CountRequest) -> TokenCount:
        return await self._worker.count_tokens(request)

    async def detokenize(self, request: DetokenizeRequest) -> str:
        return await self._worker.detokenize(request)

    def models(self) -> tuple[ModelInfo, ...]:
        return (unloaded_info(self._worker.spec, self.state, self.reason),)

    async def aclose(self, drain_s: float = 0.0) -> None:
        self._state = None
        await self._worker.aclose(drain_s)


class Rig:
    """A pool of fakes, and the fakes by name."""

    def __init__(self, *specs: ModelSpec) -> None:
        self.fakes: dict[str, Fake] = {}
        self.pool = Pool(specs, self._open)

    def _open(self, spec: ModelSpec) -> Fake:
        self.fakes[spec.name] = Fake(spec)
        return self.fakes[spec.name]


@asynccontextmanager
async def rig(*specs: ModelSpec) -> AsyncIterator[Rig]:
    made = Rig(*(specs or (echo(),)))
    try:
        yield made
    finally:
        await made.pool.aclose()


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits between restarts are a hundredth of what they are."""
    monkeypatch.setattr(pools, "backoff_s", lambda failures: backoff_s(failures) / 100)


def test_the_wait_doubles_up_to_a_minute() -> None:
    """W19: 1, 2, 4 ... 60 s after failures in a row."""
    assert [backoff_s(count) for count in range(9)] == [0, 1, 2, 4, 8, 16, 32, 60, 60]
    assert backoff_s(1000) == 60


async def test_names_and_aliases_lead_to_their_model() -> None:
    """W2: an unknown one is an error that lists what is served."""
    specs = (echo(name="one", aliases=("uno",), text="1"), echo(name="two", text="2"))
    async with rig(*specs) as made:
        for name, said in (("one", "1"), ("uno", "1"), ("two", "2")):
            assert (await collect(made.pool.generate(ask(model=name)))).text == said
        for name in ("three", ""):
            with pytest.raises(UnknownModel, match="there is one, two, uno") as caught:
                await collect(made.pool.generate(ask(model=name)))
            assert caught.value.param == "model"
        with pytest.raises(UnknownModel):
            await made.pool.count_tokens(CountRequest(model="three", text="a"))
        count = await made.pool.count_tokens(CountRequest(model="uno", text="abc"))
        assert count.count == 3
        ask_text = DetokenizeRequest(model="two", token_ids=(97,))
        assert await made.pool.detokenize(ask_text) == "a"
        assert [info.id for info in made.pool.models()] == ["one", "two"]


async def test_without_a_name_the_only_model_answers() -> None:
    async with rig() as made:
        assert (await collect(made.pool.generate(ask("hi")))).text == "hi"


async def test_many_requests_share_one_load_and_know_how_long_it_took() -> None:
    """W5, W16: coalesced; load_ms is the wait, and is not in queue_ms."""
    async with rig() as made:
        fake = made.fakes["echo"]
        fake.gate.clear()
        tasks = [asyncio.ensure_future(listed(made.pool.generate(ask()))) for _ in range(20)]
        await asyncio.sleep(0.1)
        assert not made.pool.ready
        fake.gate.set()
        answers = await asyncio.gather(*tasks)
        assert made.pool.ready
        for events in answers:
            assert events[0] == Progress("loading")
            metrics = finish(events).metrics
            assert metrics.load_ms >= 100
            assert metrics.queue_ms is not None
            assert metrics.queue_ms < metrics.load_ms
        assert fake._worker.state == "ready"
        later = finish(await listed(made.pool.generate(ask())))
        assert later.metrics.load_ms == 0


async def test_too_many_waiting_for_a_load_are_refused() -> None:
    """W20: bounded also before there is a queue."""
    async with rig(echo(max_queued=2)) as made:
        fake = made.fakes["echo"]
        fake.gate.clear()
        tasks = [asyncio.ensure_future(collect(made.pool.generate(ask()))) for _ in range(3)]
        await asyncio.sleep(0.01)
        with pytest.raises(Loading, match="3 requests wait"):
            await collect(made.pool.generate(ask()))
        fake.gate.set()
        assert len(await asyncio.gather(*tasks)) == 3


async def test_a_load_that_failed_is_not_tried_again_at_once() -> None:
    """W5: the reason and a time to come back; then it is tried again."""
    async with rig() as made:
        fake = made.fakes["echo"]
        fake.failures = [LoadFailed("no file")]
        with pytest.raises(LoadFailed, match="no file"):
            await collect(made.pool.generate(ask()))
        with pytest.raises(LoadFailed, match="has failed: no file") as caught:
            await collect(made.pool.generate(ask()))
        assert caught.value.retry_after_s is not None
        assert 0 < caught.value.retry_after_s <= 1
        assert fake.loads == 1
        await asyncio.sleep(caught.value.retry_after_s)
        assert (await collect(made.pool.generate(ask("ok")))).text == "ok"


async def test_one_model_that_fails_leaves_the_others_serving() -> None:
    """W5: start tries all and raises the first failure."""
    async with rig(echo(name="bad"), echo(name="good")) as made:
        made.fakes["bad"].failures = [LoadFailed("bad")]
        with pytest.raises(LoadFailed, match="bad"):
            await made.pool.start()
        assert not made.pool.ready
        assert (await collect(made.pool.generate(ask("x", model="good")))).text == "x"


@pytest.mark.usefixtures("fast")
async def test_a_worker_that_died_is_started_again_by_itself() -> None:
    """W19: with a wait that grows, until it stays."""
    async with rig() as made:
        await made.pool.start()
        fake = made.fakes["echo"]
        for loads in (2, 3, 4):
            fake.die()
            assert not made.pool.ready
            await until(lambda: made.pool.ready)
            assert fake.loads == loads
        fake.failures = [LoadFailed("a"), LoadFailed("b")]
        fake.die()
        await until(lambda: made.pool.ready)
        assert fake.loads == 7
        assert (await collect(made.pool.generate(ask("ok")))).text == "ok"


async def test_cancelling_who_waits_for_a_load_leaves_the_load_to_the_others() -> None:
    """W18: closing a stream while its model loads leaves no place behind."""
    async with rig() as made:
        fake, before = made.fakes["echo"], asyncio.all_tasks()
        fake.gate.clear()
        stays = asyncio.ensure_future(collect(made.pool.generate(ask("stays"))))
        leaves = made.pool.generate(ask("leaves"))
        assert await anext(leaves) == Progress("loading")
        task = asyncio.ensure_future(anext(leaves))
        await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.wait({task})
        await leaves.aclose()
        seat = made.pool._seats["echo"]
        assert seat.waiting == 1
        assert "1 waiting" in repr(made.pool)
        fake.gate.set()
        assert (await stays).text == "stays"
        assert seat.waiting == 0
        assert [request.prompt for request in fake.requests] == ["stays"]
        left = asyncio.all_tasks() - before
        assert [one.get_name() for one in left] == ["keep echo"]


async def test_closing_the_pools_stream_frees_the_workers_slot() -> None:
    """W18: in prefill and decode."""
    async with rig(echo(tokens_per_second=20)) as made:
        await made.pool.start()
        for phase in (1, 3):
            stream = made.pool.generate(ask())
            for _ in range(phase):
                await anext(stream)
            assert made.fakes["echo"]._worker.load == (1, 0)
            await stream.aclose()
            assert made.fakes["echo"]._worker.load == (0, 0)


async def test_a_request_is_not_changed_by_its_wait() -> None:
    """W9: load_ms is on a copy."""
    async with rig() as made:
        request = ask()
        await collect(made.pool.generate(request))
        assert request.load_ms == 0
        assert made.fakes["echo"].requests[0].load_ms > 0


@asynccontextmanager
async def processes(**options: Any) -> AsyncIterator[tuple[Pool, WorkerProcess]]:
    opened: list[WorkerProcess] = []

    def open_worker(spec: ModelSpec) -> WorkerProcess:
        opened.append(WorkerProcess(spec, resolve))
        return opened[0]

    pool = Pool([echo(**options)], open_worker)
    try:
        yield pool, opened[0]
    finally:
        await pool.aclose()


async def test_a_killed_process_comes_back_and_the_pool_serves_on() -> None:
    """W17, W19: the running stream gets an error; the next request an answer."""
    async with processes(tokens_per_second=20) as (pool, process):
        stream = pool.generate(ask("a" * 99))
        await first_delta(stream)
        assert process.pid is not None
        first = process.pid
        os.kill(first, signal.SIGKILL)
        with pytest.raises(WorkerDied, match="SIGKILL"):
            await listed(stream)
        await until(lambda: pool.ready and process.pid not in {None, first})
        assert (await collect(pool.generate(ask("back")))).text == "back"


async def test_closing_the_pool_while_a_model_loads() -> None:
    """W8: who waits is told, the child is gone."""
    async with processes(load_s=30) as (pool, process):
        task = asyncio.ensure_future(collect(pool.generate(ask())))
        await until(lambda: process.state == "loading")
        await asyncio.sleep(0.1)
        await pool.aclose()
        with pytest.raises(Draining):
            await task
        assert (process.state, process.pid) == ("stopped", None)
        await pool.aclose()


async def test_a_drained_pool_ends_its_streams_well() -> None:
    """W8: within the deadline."""
    async with processes(tokens_per_second=50) as (pool, _):
        task = asyncio.ensure_future(listed(pool.generate(ask("abcdef"))))
        await asyncio.sleep(0)
        await until(lambda: pool.ready)
        await asyncio.sleep(0.05)
        await pool.aclose(drain_s=5)
        assert text(await task) == "abcdef"
