"""What an operator does to a pool, and what the requests notice of it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.pool.rig import Machine, answer, ask, clock, counted, pool, run, spec

from headrace.core.errors import (
    ConfigError,
    Disabled,
    DoesNotFit,
    LoadFailed,
    UnknownModel,
)
from headrace.core.model import ModelSpec
from headrace.core.request import CountRequest
from headrace.core.stream import collect_count
from headrace.pool.admin import PoolAdmin, Wanted
from headrace.pool.policy import Rules
from headrace.pool.state import StateFile


class Service:
    """A pool with its operator, and the configuration that both were made of."""

    def __init__(self, *specs: ModelSpec, machine: Machine | None = None, **given: Any) -> None:
        self.machine = machine or Machine()
        self.config = {one.name: one for one in specs or (spec("a"), spec("b"))}
        self.budget = given.pop("budget", 100)
        self.state = StateFile(given.pop("path", None))
        self.pool = pool(self.machine, *self.config.values(), budget=self.budget)
        self.admin = PoolAdmin(
            self.pool,
            specify=self.specify,
            state=self.state,
            reread=self.reread,
            drain_s=given.pop("drain_s", 30.0),
        )
        self.admin.restore()

    def specify(self, name: str, changes: Mapping[str, Any]) -> ModelSpec:
        unknown = set(changes) - set(ModelSpec.__struct_fields__)
        if unknown:
            raise ConfigError(f"There is no setting {unknown.pop()!r}.")
        if name.startswith("builtin:"):
            return spec(name.removeprefix("builtin:"), **changes)
        if name not in self.config:
            raise ConfigError(f"There is no {name!r}.")
        return msgspec.structs.replace(self.config[name], **changes)

    def reread(self) -> Wanted:
        return Wanted(
            specs=tuple(self.config.values()),
            rules=Rules(),
            budgets={"cpu": self.budget},
            specify=self.specify,
            needs_restart=("server.port",),
        )

    def configure(self, *specs: ModelSpec) -> None:
        self.config = {one.name: one for one in specs}

    def states(self) -> dict[str, str]:
        return {one.id: one.state for one in self.admin.status().models}

    async def aclose(self) -> None:
        await self.pool.aclose()
        self.state.close()
        assert self.machine.held == {}


def begun(service: Service, model: str = "a", tokens: int = 20) -> asyncio.Task[Any]:
    return asyncio.create_task(answer(service.pool, ask(model, tokens)))


async def outcome(task: asyncio.Task[Any]) -> Any:
    await asyncio.wait({task})
    return task.exception() or task.result()[0]


def test_that_loading_waits_until_it_is_loaded_and_loads_once() -> None:
    async def main() -> None:
        service = Service()
        began = clock()
        first, second = await asyncio.gather(service.admin.load("a"), service.admin.load("a"))
        assert first.state == second.state == "ready"
        assert clock() - began == pytest.approx(1.0)
        assert (await service.admin.load("a")).memory == {"cpu": 10}
        assert service.machine.loads == 1
        await service.aclose()

    run(main())


def test_that_a_reference_is_added_under_its_short_name() -> None:
    async def main() -> None:
        service = Service()
        status = await service.admin.load("builtin:new", {"max_queued": 3})
        assert (status.id, status.state, status.max_queued) == ("new", "ready", 3)
        assert (await answer(service.pool, ask("new")))[0] == counted(5)
        # Again, with other settings: the same model, changed.
        assert (await service.admin.load("new", {"max_queued": 5})).max_queued == 5
        assert service.machine.loads == 1
        with pytest.raises(ConfigError):
            await service.admin.load("nothing")
        assert list(service.pool.seats) == ["a", "b", "new"]
        await service.aclose()

    run(main())


def test_that_loading_enables_and_resets() -> None:
    async def main() -> None:
        service = Service(spec("a", enabled=False), spec("b"))
        with pytest.raises(Disabled):
            await answer(service.pool, ask())
        assert (await service.admin.load("a")).enabled
        service.machine.fail_load["b"] = LoadFailed("no such luck")
        for _ in range(2):
            with pytest.raises(LoadFailed):
                await service.admin.load("b")
        for _ in range(9):
            await asyncio.gather(answer(service.pool, ask("b")), return_exceptions=True)
            await asyncio.sleep(5)
        assert service.states()["b"] == "failed"
        service.machine.fail_load.clear()
        with pytest.raises(LoadFailed, match="no such luck"):
            await answer(service.pool, ask("b"))
        assert (await service.admin.load("b")).state == "ready"
        assert (await answer(service.pool, ask("b")))[0] == counted(5)
        await service.aclose()

    run(main())


def test_that_loading_goes_on_when_who_asked_has_gone() -> None:
    async def main() -> None:
        service = Service()
        task = asyncio.create_task(service.admin.load("a"))
        await asyncio.sleep(0.5)
        task.cancel()
        await asyncio.sleep(1)
        assert service.states()["a"] == "ready"
        assert not service.pool.seat("a").is_waited_for
        await service.aclose()

    run(main())


def test_that_loading_what_is_just_being_unloaded_brings_it_back() -> None:
    async def main() -> None:
        service = Service()
        await service.admin.load("a")
        running = begun(service)
        await asyncio.sleep(0.5)
        going = asyncio.create_task(service.admin.unload("a"))
        await asyncio.sleep(0.5)
        counting = asyncio.create_task(
            collect_count(service.pool.ask(CountRequest(model="a", text="x")))
        )
        assert (await service.admin.load("a")).state == "ready"
        assert await outcome(running) == counted(20)
        assert (await counting).count == 1
        await going
        await asyncio.sleep(5)
        assert service.states()["a"] == "ready"
        assert service.machine.loads == 2
        await service.aclose()

    run(main())


def test_that_unloading_lets_the_running_end_and_gives_the_memory_back() -> None:
    async def main() -> None:
        service = Service(spec("a", max_running=1))
        await service.admin.load("a")
        running = begun(service)
        await asyncio.sleep(0.5)
        assert (await service.admin.unload("a")).state == "stopped"
        assert await outcome(running) == counted(20)
        assert service.machine.held == {}
        assert service.pool.ledger.booked() == {"cpu": 0}
        # It comes back for whoever asks, and not before.
        await asyncio.sleep(60)
        assert service.states()["a"] == "stopped"
        assert (await answer(service.pool, ask()))[0] == counted(5)
        # Nothing to unload is fine.
        await service.admin.unload("a")
        await service.admin.unload("a")
        with pytest.raises(UnknownModel):
            await service.admin.unload("c")
        await service.aclose()

    run(main())


def test_that_unloading_waits_for_the_running_no_longer_than_it_may() -> None:
    async def main() -> None:
        service = Service(drain_s=3.0)
        await service.admin.load("a")
        endless, began = begun(service, tokens=10_000), clock()
        await asyncio.sleep(0.5)
        await service.admin.unload("a")
        assert clock() - began == pytest.approx(3.5, abs=0.2)
        assert (await outcome(endless)).__class__.__name__ == "Draining"
        await service.aclose()

    run(main())


def test_that_the_end_does_not_wait_for_an_unload() -> None:
    """W8: a second word ends it at once, also what an operator lets run out."""

    async def main() -> None:
        service = Service()
        await service.admin.load("a")
        endless = begun(service, tokens=10_000)
        await asyncio.sleep(0.5)
        going = asyncio.create_task(service.admin.unload("a"))
        await asyncio.sleep(0.5)
        began = clock()
        await service.aclose()
        assert clock() - began < 1
        await asyncio.wait({going, endless})

    run(main())


def test_that_unloading_stops_a_load_and_who_waits_for_it_gets_it_again() -> None:
    async def main() -> None:
        service = Service()
        service.machine.load_s["a"] = 10.0
        lonely = asyncio.create_task(service.admin.load("a"))
        await asyncio.sleep(1)
        lonely.cancel()
        await asyncio.sleep(1)
        await service.admin.unload("a")
        assert service.machine.held == {}
        await asyncio.sleep(60)
        assert service.states()["a"] == "created"
        waiting = begun(service)
        await asyncio.sleep(1)
        await service.admin.unload("a")
        assert await outcome(waiting) == counted(20)
        await service.aclose()

    run(main())


def test_that_a_restart_gives_a_new_process_and_no_error() -> None:
    async def main() -> None:
        service = Service(spec("a", max_running=1))
        await service.admin.load("a")
        running, waiting = begun(service), begun(service)
        await asyncio.sleep(0.5)
        assert (await service.admin.restart("a")).state == "ready"
        assert await outcome(running) == await outcome(waiting) == counted(20)
        assert service.machine.loads == 2
        await service.aclose()

    run(main())


def test_that_soft_settings_change_in_place() -> None:
    async def main() -> None:
        service = Service()
        await service.admin.load("a")
        changes = {"pinned": True, "keep_alive": 5.0, "max_queued": 1, "aliases": ("z",)}
        status = await service.admin.update("a", changes)
        assert (status.pinned, status.keep_alive, status.max_queued) == (True, 5.0, 1)
        assert (await answer(service.pool, ask("z")))[0] == counted(5)
        await asyncio.sleep(60)
        # Pinned stays, whatever its keep-alive; unpinned it has been idle for long enough.
        assert service.states()["a"] == "ready"
        assert service.admin.status().models[0].until is None
        await service.admin.update("a", {"pinned": False})
        await asyncio.sleep(1)
        assert service.states()["a"] == "stopped"
        assert service.machine.loads == 1
        await service.aclose()

    run(main())


def test_that_replicas_come_and_go() -> None:
    async def main() -> None:
        service = Service(spec("a", max_running=1))
        await service.admin.load("a")
        await service.admin.update("a", {"replicas": 2})
        await asyncio.sleep(2)
        assert len(service.machine.held) == 2
        both = [begun(service), begun(service)]
        await asyncio.sleep(0.5)
        assert (await service.admin.update("a", {"replicas": 1})).running == 2
        assert [await outcome(one) for one in both] == [counted(20)] * 2
        await asyncio.sleep(1)
        assert len(service.machine.held) == 1
        assert len(service.admin.status().models[0].replicas) == 1
        await service.aclose()

    run(main())


@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize("size", [40, 80])
def test_that_hard_settings_change_without_failing_a_request(pinned: bool, size: int) -> None:
    """Also when both processes do not fit beside each other, and when the model is pinned."""

    async def main() -> None:
        machine = Machine()
        machine.sizes["a"] = size
        service = Service(spec("a", pinned=pinned, max_running=1), machine=machine)
        await service.admin.load("a")
        before = [begun(service), begun(service)]
        await asyncio.sleep(0.5)
        await service.admin.update("a", {"options": {"threads": 2}})
        after = begun(service)
        for one in [*before, after]:
            assert await outcome(one) == counted(20)
        assert service.machine.workers[-1].spec.options == {"threads": 2}
        await asyncio.sleep(1)
        assert len(machine.held) == 1
        assert machine.peak <= 100
        await service.aclose()

    run(main())


def test_that_a_changed_model_is_up_again_unasked() -> None:
    async def main() -> None:
        machine = Machine()
        machine.sizes["a"] = 80
        service = Service(machine=machine)
        await service.admin.load("a")
        await service.admin.update("a", {"options": {"threads": 2}})
        await asyncio.sleep(5)
        assert service.states()["a"] == "ready"
        assert service.machine.loads == 2
        # One that is not loaded stays so.
        await service.admin.update("b", {"options": {"threads": 2}})
        await asyncio.sleep(5)
        assert service.states()["b"] == "created"
        await service.aclose()

    run(main())


def test_that_a_wrong_change_changes_nothing() -> None:
    async def main() -> None:
        service = Service()
        before = service.admin.status()
        with pytest.raises(ConfigError, match="colour"):
            await service.admin.update("a", {"max_queued": 1, "colour": "red"})
        with pytest.raises(UnknownModel):
            await service.admin.update("c", {"max_queued": 1})
        with pytest.raises(ConfigError):
            await service.admin.load("a", {"colour": "red"})
        assert service.admin.status() == before
        assert service.machine.loads == 0
        await service.aclose()

    run(main())


def test_that_who_is_switched_off_ends_what_it_began_and_refuses_the_rest() -> None:
    async def main() -> None:
        service = Service(spec("a", max_running=1))
        await service.admin.load("a")
        running, waiting = begun(service), begun(service)
        await asyncio.sleep(0.5)
        began = clock()
        await service.admin.update("a", {"enabled": False})
        assert isinstance(await outcome(waiting), Disabled)
        assert clock() == began
        assert await outcome(running) == counted(20)
        await asyncio.sleep(1)
        assert service.machine.held == {}
        assert isinstance(await outcome(begun(service)), Disabled)
        await service.admin.update("a", {"enabled": True})
        assert await outcome(begun(service)) == counted(20)
        await service.aclose()

    run(main())


def test_that_who_waits_for_a_load_hears_that_it_was_switched_off() -> None:
    async def main() -> None:
        service = Service()
        waiting, loading = begun(service), asyncio.create_task(service.admin.load("a"))
        counting = asyncio.create_task(
            collect_count(service.pool.ask(CountRequest(model="a", text="x")))
        )
        await asyncio.sleep(0.5)
        await service.admin.update("a", {"enabled": False})
        for task in (waiting, loading, counting):
            assert isinstance(await outcome(task), Disabled)
        await service.aclose()

    run(main())


def test_what_a_reload_changes() -> None:
    async def main() -> None:
        service = Service(spec("same"), spec("soft"), spec("hard"), spec("gone", max_running=1))
        for name in ("same", "soft", "hard", "gone"):
            await service.admin.load(name)
        running = {name: begun(service, name) for name in service.config}
        waiting = begun(service, "gone")
        await asyncio.sleep(0.5)
        service.configure(
            spec("same"), spec("soft", max_queued=7), spec("hard", options={"x": 1}), spec("new")
        )
        reloaded = await service.admin.reload()
        assert reloaded.added == ("new",)
        assert set(reloaded.changed) == {"soft", "hard"}
        assert reloaded.removed == ("gone",)
        assert reloaded.needs_restart == ("server.port",)
        # Nobody who runs notices; who waits for what is gone is told.
        assert isinstance(await outcome(waiting), UnknownModel)
        for task in running.values():
            assert await outcome(task) == counted(20)
        await asyncio.sleep(5)
        assert service.states() == dict.fromkeys(("same", "soft", "hard", "new"), "ready")
        assert [one.spec.name for one in service.machine.workers].count("same") == 1
        assert {one.spec.name for one in service.machine.held} == set(service.config)
        with pytest.raises(UnknownModel):
            await answer(service.pool, ask("gone"))
        assert await service.admin.reload() == msgspec.structs.replace(
            reloaded, added=(), changed=(), removed=()
        )
        # It may come back.
        service.configure(*service.config.values(), spec("gone"))
        await service.admin.reload()
        assert (await answer(service.pool, ask("gone")))[0] == counted(5)
        await service.aclose()

    run(main())


def test_that_a_reload_keeps_what_was_done_by_hand() -> None:
    async def main() -> None:
        service = Service()
        await service.admin.update("a", {"pinned": True})
        await service.admin.load("builtin:new")
        service.configure(spec("a", max_queued=7), spec("b"))
        assert (await service.admin.reload()).changed == ("a",)
        status = service.admin.status().models[0]
        assert (status.pinned, status.max_queued) == (True, 7)
        assert service.states()["new"] == "ready"
        await service.aclose()

    run(main())


def test_that_a_wrong_configuration_changes_nothing() -> None:
    async def main() -> None:
        service = Service()
        before = service.admin.status()

        def refuse() -> Wanted:
            raise ConfigError("It is wrong.")

        service.admin._reread = refuse
        with pytest.raises(ConfigError):
            await service.admin.reload()
        assert service.admin.status() == before
        await service.aclose()

    run(main())


def test_that_what_the_configuration_accepts_no_more_is_dropped() -> None:
    async def main() -> None:
        service = Service()
        await service.admin.update("a", {"pinned": True})
        specify = service.specify

        def strict(name: str, changes: Mapping[str, Any]) -> ModelSpec:
            if changes:
                raise ConfigError("Not any more.")
            return specify(name, changes)

        service.specify = strict
        service.configure(spec("a"), spec("b", max_queued=1))
        assert set((await service.admin.reload()).changed) == {"a", "b"}
        assert [one.pinned for one in service.admin.status().models] == [False, False]
        await service.aclose()

    run(main())


def test_that_a_smaller_budget_takes_the_idle_out() -> None:
    async def main() -> None:
        machine = Machine()
        machine.sizes = {"a": 40, "b": 40}
        service = Service(machine=machine)
        await service.admin.load("a")
        await service.admin.load("b")
        running = begun(service, "b")
        await asyncio.sleep(0.5)
        service.budget = 50
        await service.admin.reload()
        await asyncio.sleep(3)
        assert service.states() == {"a": "stopped", "b": "ready"}
        assert await outcome(running) == counted(20)
        service.budget = 30
        await service.admin.reload()
        with pytest.raises(DoesNotFit):
            await answer(service.pool, ask("a"))
        await service.aclose()

    run(main())


def test_that_one_who_outgrows_the_budget_puts_an_idle_one_out() -> None:
    """M6: what is measured counts, and not what was estimated."""

    async def main() -> None:
        machine = Machine()
        machine.sizes = {"a": 40, "b": 40}
        service = Service(machine=machine)
        await service.admin.load("a")
        await service.admin.load("b")
        running = begun(service, "b", 100)
        await asyncio.sleep(2)
        worker = next(one for one in machine.held if one.spec.name == "b")
        machine.take(worker, 70)
        await asyncio.sleep(3)
        assert service.states() == {"a": "stopped", "b": "ready"}
        assert service.pool.ledger.booked() == {"cpu": 70}
        assert await outcome(running) == counted(100)
        await service.aclose()

    run(main())


def test_that_a_plan_tells_and_does_nothing() -> None:
    async def main() -> None:
        machine = Machine()
        machine.sizes = {"a": 40, "b": 50, "c": 70, "huge": 101, "new": 55}
        service = Service(spec("a"), spec("b"), spec("c"), spec("huge"), machine=machine)
        plan = await service.admin.plan("a")
        assert (plan.fits, plan.loaded, plan.evict) == (True, False, ())
        assert plan.need.devices == {"cpu": 40}
        assert plan.largest_context == 4096
        await service.admin.load("a")
        await service.admin.load("b")
        assert (await service.admin.plan("a")).loaded
        running = begun(service, "b", 100)
        await asyncio.sleep(5)
        # `a` is idle and `b` is busy; both would have to go.
        plan = await service.admin.plan("c")
        assert (plan.fits, set(plan.evict)) == (True, {"a", "b"})
        assert "a" in plan.reason
        plan = await service.admin.plan("builtin:new")
        assert (plan.fits, set(plan.evict)) == (True, {"b"})
        plan = await service.admin.plan("huge")
        assert (plan.fits, plan.evict) == (False, ())
        assert "would still be missing" in plan.reason
        await service.admin.update("a", {"pinned": True})
        assert not (await service.admin.plan("c")).fits
        with pytest.raises(ConfigError):
            await service.admin.plan("nothing")
        assert service.machine.loads == 2
        assert await outcome(running) == counted(100)
        assert service.states() == {"a": "ready", "b": "ready", "c": "created", "huge": "created"}
        await service.aclose()

    run(main())


def test_that_what_was_done_is_done_again_after_a_restart(tmp_path: Path) -> None:
    """What was loaded, stopped, pinned, disabled or added by hand outlives the service."""
    path = tmp_path / "state.json"

    async def first() -> None:
        service = Service(spec("a"), spec("b"), spec("c", preload=False), spec("d"), path=path)
        await service.pool.start()
        await service.admin.unload("a")
        await service.admin.update("b", {"pinned": True})
        await service.admin.load("c")
        await service.admin.update("d", {"enabled": False})
        await service.admin.load("builtin:new", {"max_queued": 3})
        await service.aclose()

    async def second() -> None:
        service = Service(spec("a"), spec("b"), spec("c", preload=False), spec("d"), path=path)
        await service.pool.start()
        models = {one.id: one for one in service.admin.status().models}
        assert {name: one.state for name, one in models.items()} == {
            "a": "created",
            "b": "ready",
            "c": "ready",
            "d": "created",
            "new": "ready",
        }
        assert (models["b"].pinned, models["d"].enabled) == (True, False)
        assert models["new"].max_queued == 3
        # It is asked for, and comes: stopped is not disabled.
        assert (await answer(service.pool, ask("a")))[0] == counted(5)
        await service.aclose()

    async def third() -> None:
        # The configuration has changed meanwhile: what is not possible any more is dropped.
        service = Service(spec("a", max_queued=5), path=path)
        assert set(service.pool.seats) == {"a", "new"}
        await service.aclose()

    run(first())
    run(second())
    run(third())


def test_that_many_hands_do_not_get_in_each_others_way() -> None:
    async def main() -> None:
        service = Service()
        await asyncio.gather(
            service.admin.load("a"),
            service.admin.update("a", {"options": {"x": 1}}),
            service.admin.restart("a"),
            service.admin.reload(),
            service.admin.update("a", {"options": {"x": 2}}),
        )
        await asyncio.sleep(10)
        assert service.states()["a"] == "ready"
        (worker,) = [one for one in service.machine.held if one.spec.name == "a"]
        assert worker.spec.options == {"x": 2}
        assert service.pool.ledger.booked() == {"cpu": sum(service.machine.held.values())}
        await service.aclose()

    run(main())


def test_that_what_is_removed_cannot_be_changed_any_more() -> None:
    async def main() -> None:
        service = Service()
        await service.admin.load("a")
        service.configure(spec("b", preload=False))
        _, late = await asyncio.gather(
            service.admin.reload(),
            service.admin.update("a", {"options": {"x": 1}}),
            return_exceptions=True,
        )
        assert isinstance(late, UnknownModel)
        await asyncio.sleep(5)
        assert service.machine.held == {}
        await service.aclose()

    run(main())


def test_what_listeners_hear() -> None:
    async def main() -> None:
        service = Service()
        events: list[tuple[str, str]] = []

        async def listen() -> None:
            async for event in service.admin.events():
                events.append((event.kind, event.model))

        listening = asyncio.create_task(listen())
        await asyncio.sleep(0)
        await service.admin.load("a")
        await service.admin.update("a", {"pinned": True})
        await service.admin.unload("a")
        await service.admin.load("builtin:new")
        await service.admin.reload()
        await service.aclose()
        await listening
        assert events == [
            ("loading", "a"),
            ("ready", "a"),
            ("updated", "a"),
            ("unloaded", "a"),
            ("added", "new"),
            ("loading", "new"),
            ("ready", "new"),
            ("reloaded", ""),
            ("draining", ""),
        ]

    run(main())


def test_that_what_was_stopped_by_hand_stays_so_over_two_restarts(tmp_path: Path) -> None:
    """M8."""

    async def main() -> None:
        file = tmp_path / "state.json"
        service = Service(path=file)
        await service.admin.load("builtin:x")
        await service.admin.unload("x")
        await service.aclose()
        for pinned in (True, False):
            service = Service(path=file)
            await service.pool.start()
            assert service.states()["x"] == "created"
            await service.admin.update("a", {"pinned": pinned})
            await service.aclose()

    run(main())
