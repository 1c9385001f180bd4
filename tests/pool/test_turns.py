"""Many who want the same memory, and models that fail in parts: nobody waits for ever."""

from __future__ import annotations

import asyncio
import random

import pytest
from tests.pool.rig import Machine, answer, ask, clock, counted, pool, run, spec

from headrace.core.errors import Draining, LoadFailed, WorkerDied

LONGEST_WAIT_S = 5.0


@pytest.mark.parametrize("seed", range(3))
def test_that_no_model_starves_among_many(seed: int) -> None:
    """M6: five models in room for two, all wanted all the time."""

    async def main() -> None:
        machine, chance, names = Machine(), random.Random(seed), "abcde"
        machine.sizes = dict.fromkeys(names, 40)
        served = pool(machine, *map(spec, names), budget=100, longest_wait_s=LONGEST_WAIT_S)
        end, waits = clock() + 900, {name: [0.0] for name in names}

        async def client(name: str) -> None:
            while clock() < end:
                began, tokens = clock(), chance.randint(1, 20)
                assert (await answer(served, ask(name, tokens)))[0] == counted(tokens)
                waits[name].append(clock() - began - tokens / 10)
                await asyncio.sleep(chance.choice([0.0, 0.0, 0.5]))

        await asyncio.gather(*(client(name) for name in names * 3))
        # All wait for their turn at the same time. Then each of those before has those in its way
        # end what they began (2 s), is loaded (1 s), and is seen to (within 1 s); in front of the
        # third client of the same model, there is one more answer.
        bound = LONGEST_WAIT_S + len(names) * (2 + 1 + 1) + 2
        assert max(map(max, waits.values())) < bound
        # Who came first was loaded first, and each has had its share.
        assert "".join(worker.spec.name for worker in machine.workers[:5]) == names
        shares = [len(one) for one in waits.values()]
        assert min(shares) > 0.6 * max(shares)
        assert machine.peak <= 100
        await served.aclose()

    run(main())


def test_that_a_second_replica_pushes_nobody_out() -> None:
    """Not another model, and not its own twin."""

    async def main() -> None:
        machine = Machine()
        machine.sizes = {"a": 40, "b": 40}
        served = pool(machine, spec("a", replicas=2, max_running=1), spec("b"), budget=100)
        await served.start()
        await answer(served, ask("b"))
        many = [asyncio.create_task(answer(served, ask("a", 100))) for _ in range(8)]
        await asyncio.sleep(60)
        assert {name: entry.state for name, entry in served.entries.items()} == {
            "a": "ready",
            "b": "ready",
        }
        await asyncio.wait(many)
        assert all(task.result()[0] == counted(100) for task in many)
        assert machine.loads == 2
        await served.aclose()

    run(main())


def test_that_one_that_serves_already_pushes_nobody_out_for_its_twin() -> None:
    async def main() -> None:
        machine = Machine()
        machine.sizes = {"a": 30, "b": 40}
        served = pool(machine, spec("a", replicas=2, max_running=1), spec("b"), budget=100)
        await served.start()
        await asyncio.sleep(2)
        assert len(machine.held) == 3
        # It has grown, and does not fit any more when it comes back.
        machine.sizes["a"] = 60
        many = [asyncio.create_task(answer(served, ask("a", 100))) for _ in range(6)]
        await asyncio.sleep(0.5)
        machine.workers[0].die()
        await asyncio.wait(many)
        assert all(task.result()[0] == counted(100) for task in many)
        assert [entry.evictions for entry in served.entries.values()] == [0, 0]
        await served.aclose()

    run(main())


def test_that_a_model_that_gave_up_in_part_refuses_when_the_rest_has_gone() -> None:
    """M5: the breaker opens while another replica is loading, which then serves, and goes."""

    async def main() -> None:
        machine = Machine()
        served = pool(machine, spec(replicas=2, keep_alive=5.0), max_loading=2)
        await served.start()
        await asyncio.sleep(2)
        first, second = served.entry("a").replicas
        for replica, then_s in ((first, 0.1), (second, 1.5), (first, 0.1)):
            assert replica.worker is not None
            replica.worker.die()  # type: ignore[attr-defined]
            await asyncio.sleep(then_s)
        assert served.entry("a").failures.is_open
        await asyncio.sleep(2)
        assert (await answer(served, ask()))[0] == counted(5)
        await asyncio.sleep(10)
        assert machine.held == {}
        with pytest.raises(LoadFailed, match="SIGKILL"):
            await asyncio.wait_for(answer(served, ask()), 60)
        await served.aclose()

    run(main())


def test_that_who_waits_is_told_when_the_last_replica_of_a_failed_model_goes() -> None:
    async def main() -> None:
        machine = Machine()
        served = pool(machine, spec(max_running=1, continuation="off"), crashes=1)
        await served.start()
        entry = served.entry("a")
        running = asyncio.create_task(answer(served, ask(tokens=30)))
        await asyncio.sleep(0.5)
        waiting = asyncio.create_task(answer(served, ask()))
        await asyncio.sleep(0.5)
        machine.workers[-1].die()
        outcomes = await asyncio.gather(running, waiting, return_exceptions=True)
        assert [type(one) for one in outcomes] == [WorkerDied, LoadFailed]
        assert (entry.state, len(entry.queue)) == ("failed", 0)
        await served.aclose()

    run(main())


def test_that_who_waits_for_a_load_is_not_missed_by_the_end() -> None:
    """The end comes in the moment between the load and the wait's going on."""

    async def main() -> None:
        served = pool(Machine())
        entry = served.entry("a")
        counting = asyncio.create_task(entry.ready_replica())
        await asyncio.sleep(0)
        entry.became_ready()
        entry.draining = True
        entry.refuse(Draining("The service is stopping."))
        with pytest.raises(Draining):
            await asyncio.wait_for(counting, 10)
        await served.aclose()

    run(main())


def test_that_who_wanted_first_is_loaded_first() -> None:
    async def main() -> None:
        machine = Machine()
        machine.sizes = dict.fromkeys("abcd", 80)
        served = pool(machine, *map(spec, "abcd"), budget=100, longest_wait_s=LONGEST_WAIT_S)
        tasks = [asyncio.create_task(answer(served, ask("a", 100)))]
        for name in "bcd":
            await asyncio.sleep(1.5)
            tasks.append(asyncio.create_task(answer(served, ask(name, 30))))
        await asyncio.gather(*tasks)
        assert "".join(worker.spec.name for worker in machine.workers) == "abcd"
        await served.aclose()

    run(main())
