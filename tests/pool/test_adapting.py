"""Adapters that change while a model serves: in its workers, or in new ones (issue 17.4)."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from tests.pool.rig import Machine, answer, ask, clock, counted, run, spec
from tests.pool.test_admin import Service, begun, outcome

from headrace.core.adapter import Adapter
from headrace.core.errors import ConfigError, Draining, LoadFailed
from headrace.core.model import ModelSpec

ONE, TWO = Adapter(source="one"), Adapter(source="two")


def adapting(*, adapts: bool = True, budget: int = 100, **given: Any) -> Service:
    machine = Machine()
    machine.adapts = adapts
    return Service(spec("a", adapters={"one": ONE}, **given), machine=machine, budget=budget)


async def update(service: Service, **adapters: Adapter) -> None:
    await service.admin.update("a", {"adapters": adapters})


def names(service: Service) -> list[str]:
    return [info.id for info in service.pool.models()]


def test_workers_that_can_change_them_are_kept() -> None:
    """Issue 17.4, M6: no load, no second copy, and the memory of the adapter is booked."""

    async def main() -> None:
        service = adapting(replicas=2)
        await service.admin.load("a")
        await asyncio.sleep(2)
        running = begun(service, "a:one")
        await asyncio.sleep(0.2)
        began, loads = clock(), service.machine.loads
        await update(service, one=ONE, two=TWO)
        assert clock() - began == pytest.approx(0.1 * loads)
        assert names(service) == ["a", "a:one", "a:two"]
        assert (await answer(service.pool, ask("a:two")))[0] == counted(5)
        assert await outcome(running) == counted(20)
        assert service.machine.loads == loads
        assert service.machine.peak == 12 * loads
        assert service.pool.ledger.booked() == {"cpu": 12 * loads}
        await update(service)
        assert names(service) == ["a"]
        assert service.machine.held.keys() == {*service.machine.workers}
        await service.aclose()

    run(main())


@pytest.mark.parametrize(("adapts", "budget"), [(False, 100), (False, 12), (True, 11)])
def test_others_are_replaced(adapts: bool, budget: int) -> None:
    """Issue 17.4, M6: an engine that cannot, beside or after the old one; and no more than fits."""

    async def main() -> None:
        service = adapting(adapts=adapts, budget=budget)
        await service.admin.load("a")
        running = begun(service, "a:one")
        await asyncio.sleep(0.2)
        with pytest.raises(ConfigError, match=r"would need .*, and the budget is"):
            await update(service, **{f"a{number}": TWO for number in range(budget - 9)})
        await update(service, two=TWO)
        assert (await answer(service.pool, ask("a:two")))[0] == counted(5)
        assert await outcome(running) == counted(20)
        assert service.machine.loads == (1 if adapts else 2)
        assert service.machine.peak <= budget
        await service.aclose()

    run(main())


def test_new_workers_come_before_the_old_ones_go() -> None:
    """Issue 17.4: where both fit, no request waits for the load, and the names appear after it."""

    async def main() -> None:
        service = adapting(adapts=False, replicas=2)
        service.machine.load_s["a"] = 5.0
        await service.admin.load("a")
        await asyncio.sleep(10)
        changing = asyncio.create_task(update(service, one=ONE, two=TWO))
        for _ in range(9):
            began = clock()
            await answer(service.pool, ask("a:one"))
            assert clock() - began == pytest.approx(0.5)
            assert names(service) == ["a", "a:one"]
        running = begun(service, "a:one")
        await changing
        assert service.states() == {"a": "ready"}
        assert (await answer(service.pool, ask("a:two")))[0] == counted(5)
        assert await outcome(running) == counted(20)
        await asyncio.sleep(5)
        assert service.machine.loads == len(service.machine.workers) == 4
        assert service.pool.ledger.booked() == {"cpu": 24}
        assert service.machine.peak == 46
        await service.aclose()

    run(main())


def test_a_load_that_fails_changes_nothing() -> None:
    """Issue 17.4: the model goes on without what its engine refuses."""

    async def main() -> None:
        service = adapting(adapts=False)
        await service.admin.load("a")
        service.machine.fail_load["a"] = LoadFailed("The library refused it.")
        with pytest.raises(ConfigError, match="The library refused it"):
            await update(service, two=TWO)
        assert (await answer(service.pool, ask("a:one")))[0] == counted(5)
        assert (names(service), service.states()) == (["a", "a:one"], {"a": "ready"})
        assert service.pool.ledger.booked() == {"cpu": 11}
        await service.aclose()

    run(main())


def test_what_comes_between() -> None:
    """Issue 17.4: another adapter, another setting, an unload and the end, while a worker loads."""

    async def main() -> None:
        service = adapting(adapts=False)
        service.machine.load_s["a"] = 5.0
        await service.admin.load("a")
        await asyncio.gather(
            service.admin.update("a", {"adapters": {"two": TWO}}),
            service.admin.update("a", {"options": {"x": 1}}),
        )
        assert (await answer(service.pool, ask("a:two")))[0] == counted(5)
        await asyncio.sleep(20)
        assert service.machine.loads == 3
        assert len(service.machine.held) == 1
        for interrupt in (service.admin.unload("a"), service.pool.aclose()):
            await service.admin.load("a") if service.states()["a"] != "ready" else None
            changing = asyncio.create_task(update(service, one=ONE, more=ONE))
            await asyncio.sleep(2)
            assert service.pool.entry("a").coming
            await interrupt
            with pytest.raises(Draining):
                await changing
            assert service.machine.held == {}
            assert not service.pool.entry("a").coming
        service.state.close()

    run(main())


def test_one_who_asked_and_has_gone() -> None:
    """Issue 17.4: what was loaded for it is unloaded."""

    async def main() -> None:
        service = adapting(adapts=False)
        service.machine.load_s["a"] = 5.0
        await service.admin.load("a")
        changing = asyncio.create_task(update(service, two=TWO))
        await asyncio.sleep(2)
        changing.cancel()
        await asyncio.wait({changing})
        await asyncio.sleep(5)
        assert len(service.machine.held) == 1
        assert (await answer(service.pool, ask("a:one")))[0] == counted(5)
        await service.aclose()

    run(main())


def test_one_who_has_gone_while_workers_change() -> None:
    """Issue 17.4: all workers have what they had; what a process held once may stay booked."""

    async def main() -> None:
        service = adapting(replicas=2)
        await service.admin.load("a")
        await asyncio.sleep(2)
        for after_s in (0.05, 0.15):
            changing = asyncio.create_task(update(service, one=ONE, two=TWO))
            await asyncio.sleep(after_s)
            changing.cancel()
            await asyncio.wait({changing})
            assert names(service) == ["a", "a:one"]
            for worker in service.machine.workers:
                assert worker.spec.adapters == {"one": ONE}
            assert 22 <= service.pool.ledger.booked()["cpu"] <= service.machine.peak
        await update(service, two=TWO)
        assert (await answer(service.pool, ask("a:two")))[0] == counted(5)
        await service.aclose()

    run(main())


def test_a_refusal_changes_nothing() -> None:
    """Issue 17.4: what the library refuses, of the second of two workers too."""

    async def main() -> None:
        service = adapting(replicas=2)
        await service.admin.load("a")
        await asyncio.sleep(2)
        first, second = service.machine.workers
        with pytest.raises(ConfigError, match="The library refused it"):
            await update(service, two=Adapter(source="bad"))
        second.refuses = True
        with pytest.raises(ConfigError, match="The library refused it"):
            await update(service, one=ONE, two=TWO)
        assert names(service) == ["a", "a:one"]
        for worker in (first, second):
            assert worker.spec.adapters == {"one": ONE}
        assert (await answer(service.pool, ask("a:one")))[0] == counted(5)
        assert service.machine.loads == 2
        await service.aclose()

    run(main())


def test_a_death_meanwhile() -> None:
    """Issue 17.4, M5: the worker that follows has them."""

    async def main() -> None:
        service = adapting()
        await service.admin.load("a")
        changing = asyncio.create_task(update(service, two=TWO))
        await asyncio.sleep(0.05)
        service.machine.workers[0].die()
        await changing
        assert (await answer(service.pool, ask("a:two")))[0] == counted(5)
        assert service.machine.workers[-1].spec.adapters == {"two": TWO}
        await service.aclose()

    run(main())


def test_a_configuration_that_is_read_again() -> None:
    """Issue 17.4: in place, too, with other settings of the kind; and one that needs a load."""

    def changed(**given: Any) -> ModelSpec:
        return spec("a", **{"adapters": {"two": TWO}, "max_queued": 3, **given})

    async def main() -> None:
        service = adapting()
        await service.admin.load("a")
        service.configure(changed())
        assert (await service.admin.reload()).changed == ("a",)
        assert service.machine.loads == 1
        assert service.pool.entry("a").spec.max_queued == 3
        assert (await answer(service.pool, ask("a:two")))[0] == counted(5)
        service.configure(changed(adapters={"one": ONE}, context_length=64))
        await service.admin.reload()
        assert (await answer(service.pool, ask("a:one")))[0] == counted(5)
        assert service.machine.loads == 2
        await service.aclose()

    run(main())
