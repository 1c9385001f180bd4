"""Embeddings and rankings in the pool: the same line, loads, evictions and second chances."""

from __future__ import annotations

import asyncio

import pytest
from tests.pool.rig import Machine, answer, ask, clock, pool, run, spec

from headrace.core.errors import Draining, Loading, QueueFull, QueueTimeout, WorkerDied
from headrace.core.events import EmbedResult
from headrace.core.request import EmbedRequest, RerankRequest
from headrace.core.stream import collect_ranking, collect_vectors
from headrace.pool.line import cost_of
from headrace.pool.pool import Pool


def embedding(model: str = "a", count: int = 1, **given: object) -> EmbedRequest:
    inputs = tuple("x" * n for n in range(1, count + 1))
    return EmbedRequest(**{"model": model, "inputs": inputs, "received": clock(), **given})  # pyright: ignore[reportArgumentType]


def test_a_model_is_loaded_on_demand_and_let_go_again() -> None:
    """P: the wait for the load is in the figures."""

    async def main() -> None:
        one = pool(Machine(), spec("a", preload=False, keep_alive=5.0, max_running=8))
        await one.start()
        result = await collect_vectors(one.ask(embedding(count=3)))
        assert [vector[0] for vector in result.vectors] == [1, 2, 3]
        assert result.metrics.load_ms == pytest.approx(1000, abs=100)
        ranked = await collect_ranking(
            one.ask(RerankRequest(model="a", query="q", documents=("x", "y")))
        )
        assert [each.index for each in ranked.ranking] == [0, 1]
        assert one.seats["a"].state == "ready"
        await asyncio.sleep(10)
        assert one.seats["a"].state == "stopped"
        await one.aclose()

    run(main())


def test_busy_models_are_not_evicted() -> None:
    async def main() -> None:
        machine = Machine(15)
        one = pool(machine, spec("a", max_running=8), spec("b", preload=False))
        await one.start()
        long = asyncio.ensure_future(collect_vectors(one.ask(embedding(count=40))))
        await asyncio.sleep(0.1)
        began = clock()
        await answer(one, ask("b"))
        assert clock() - began > 3.5
        assert (await long).usage.prompt_tokens == 40
        await one.aclose()

    run(main())


def test_the_line_is_bounded_and_deadlines_hold() -> None:
    """P: 429 with a time, 408, and 503 while it loads too long."""

    async def main() -> None:
        one = pool(Machine(), spec("a", max_running=1, max_queued=1), spec("b", preload=False))
        await one.start()
        tasks = [
            asyncio.ensure_future(collect_vectors(one.ask(embedding(count=10)))) for _ in range(2)
        ]
        await asyncio.sleep(0)
        with pytest.raises(QueueFull) as full:
            await collect_vectors(one.ask(embedding()))
        assert (full.value.retry_after_s or 0) > 0
        await asyncio.gather(*tasks)
        busy = asyncio.ensure_future(collect_vectors(one.ask(embedding(count=20))))
        await asyncio.sleep(0)
        with pytest.raises(QueueTimeout):
            await collect_vectors(one.ask(embedding(deadline_s=0.5)))
        await busy
        with pytest.raises(Loading):
            await collect_vectors(one.ask(embedding("b", load_wait_s=0.0)))
        await one.aclose()

    run(main())


async def _dying(one: Pool, machine: Machine) -> EmbedResult | BaseException:
    """Return what comes of a request whose worker dies."""
    task = asyncio.ensure_future(collect_vectors(one.ask(embedding(count=5))))
    await asyncio.sleep(0.25)
    machine.workers[0].die()
    await asyncio.wait({task})
    return task.exception() or task.result()


def test_a_worker_that_dies_is_asked_once_more() -> None:
    """P: as an answer is continued; not where that is off, and not twice."""

    async def main() -> None:
        machine = Machine()
        one = pool(machine, spec("a", max_running=8))
        await one.start()
        result = await _dying(one, machine)
        assert isinstance(result, EmbedResult)
        assert result.usage.prompt_tokens == 5
        assert (result.metrics.continuations, result.metrics.continued) == (1, "exact")
        assert one.seats["a"].continuations == 1
        await one.aclose()
        machine = Machine()
        one = pool(machine, spec("a", max_running=8, continuation="off"))
        await one.start()
        assert isinstance(await _dying(one, machine), WorkerDied)
        await one.aclose()

    run(main())


def test_a_drain_lets_it_end_and_then_refuses() -> None:
    async def main() -> None:
        one = pool(Machine(), spec("a", max_running=8))
        await one.start()
        running = asyncio.ensure_future(collect_vectors(one.ask(embedding(count=5))))
        await asyncio.sleep(0.1)
        closing = asyncio.ensure_future(one.aclose(10))
        assert (await running).usage.prompt_tokens == 5
        await closing
        with pytest.raises(Draining):
            await collect_vectors(one.ask(embedding()))

    run(main())


def test_what_is_long_costs_more() -> None:
    """P: fairness is by tokens."""
    assert cost_of(EmbedRequest(inputs=("x" * 40, (1, 2, 3)))) == 13
    assert cost_of(RerankRequest(query="x" * 8, documents=("y" * 40, "z" * 4))) == 15
