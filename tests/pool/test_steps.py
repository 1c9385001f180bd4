"""All that can happen to a pool, in any order: 10,000 random steps, and what always holds."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator, Mapping
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from tests.pool.rig import LINGER_S, FakeWorker, Machine, TimeLoop, counted

from headrace.core.errors import (
    ConfigError,
    Disabled,
    DoesNotFit,
    Draining,
    GenerationFailed,
    HeadraceError,
    LoadFailed,
    Loading,
    OutOfMemory,
    Quarantined,
    QueueFull,
    QueueTimeout,
    UnknownModel,
    WorkerDied,
)
from headrace.core.events import ChoicesLeft, Delta, Event, Finish
from headrace.core.metrics import InferenceMetrics, Usage
from headrace.core.model import ModelSpec
from headrace.core.request import CountRequest, GenerateRequest
from headrace.core.sampling import Sampling
from headrace.core.stream import collect_count, merge
from headrace.pool.admin import PoolAdmin, Wanted
from headrace.pool.entry import ModelEntry
from headrace.pool.ledger import Ledger
from headrace.pool.policy import Rules
from headrace.pool.pool import Pool
from headrace.pool.state import StateFile
from headrace.worker.places import Slots

BUDGET = 100
NAMES = ("a", "b", "c", "d")
RULES = Rules(max_loading=2, min_residence_s=0.5, longest_wait_s=5.0)
DRAIN_S = 30.0
MOST_TOKENS = 30
MOST_CHOICES = 3
# One after another, on an only slot.
LONGEST_STREAM_S = MOST_CHOICES * MOST_TOKENS * (0.1 + 0.3)
LONGEST_LOAD_S = 3.0
FAULTS = (WorkerDied, GenerationFailed, OutOfMemory)


class Whimsical(FakeWorker):
    """Sends its tokens in groups of different sizes, holds text back, and can fail once."""

    def __init__(self, spec: ModelSpec, world: World) -> None:
        super().__init__(spec, world.machine)
        self.world = world
        self.once: HeadraceError | None = None
        self.slots = Slots(self.max_running)
        self.group = 1 + len(world.machine.workers) % 3

    async def _generate(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        if self.state != "ready":
            raise Draining("not ready") if self.state == "stopped" else LoadFailed("not ready")
        left = itertools.count(request.n - 1, -1)
        stream = merge([self._choice(request, index, left) for index in range(request.n)])
        try:
            async for event in stream:
                yield event
        finally:
            await stream.aclose()
        count = request.sampling.max_tokens or 5
        usage = Usage(prompt_tokens=1, completion_tokens=count * request.n)
        yield Finish(("length",) * request.n, usage, InferenceMetrics(started_at=0.0, usage=usage))

    async def aclose(self, drain_s: float = 0.0) -> None:
        self.world.closes(self)
        await super().aclose(drain_s)

    async def _choice(
        self, request: GenerateRequest, index: int, left: Iterator[int]
    ) -> AsyncGenerator[Event, None]:
        count, start = request.sampling.max_tokens or 5, len(request.answered)
        await self.slots.take(request)
        self.running += 1
        assert self.running <= self.max_running, "more than it has slots for"
        try:
            if start:
                yield Delta(counted(start), request.answered)
            for first in range(start, count, self.group):
                last = min(count, first + self.group)
                await asyncio.sleep(0.1 * (last - first))
                if self.once is not None:
                    error, self.once = self.once, None
                    self.world.note(self.spec.name, "fault")
                    raise error
                if self.broken is not None:
                    raise self.broken
                for delta in said(first, last, index, held=first > start, end=last == count):
                    yield delta
        finally:
            self.running -= 1
            self.slots.leave(request)
        if others := next(left):
            yield ChoicesLeft(others)


def said(first: int, last: int, index: int, *, held: bool, end: bool) -> list[Delta]:
    """Return deltas for some tokens; the last character comes with the next token only."""
    text, ids = counted(last)[len(counted(first)) :], tuple(range(first, last))
    text = (" " if held else "") + text
    return [Delta(text if end else text[:-1], ids, index)]


class Asked:
    """One request, its reader, and what came of it."""

    def __init__(
        self, world: World, request: GenerateRequest, pace_s: float, entry: ModelEntry
    ) -> None:
        self.world = world
        self.request = request
        self.pace_s = pace_s
        self.began = world.loop.time()
        self.entry = entry
        # Without a seed, `exact` cannot be; what becomes of it is tested elsewhere.
        steady = request.sampling.temperature == 0
        self.continuation = entry.spec.continuation if steady else "off"
        self.leaves = False
        self.error: HeadraceError | None = None
        self.finish: Finish | None = None
        self.texts = [""] * request.n
        self.task = world.loop.create_task(self._read(), name="reader")

    async def _read(self) -> None:
        stream = self.world.pool.ask(self.request)
        try:
            async for event in stream:
                assert self.finish is None, "something after the Finish"
                if isinstance(event, Delta):
                    self.texts[event.index] += event.text
                elif isinstance(event, Finish):
                    self.finish = event
                if self.leaves:
                    return
                if isinstance(event, Delta) and self.pace_s:
                    await asyncio.sleep(self.pace_s)
        except HeadraceError as error:
            self.error = error
        finally:
            await stream.aclose()

    def check(self) -> None:
        """Look whether the answer was the right one, if the client stayed for it."""
        if self.task.cancelled() or self.leaves:
            return
        self.task.result()
        assert (self.finish is None) != (self.error is None), "not answered exactly once"
        expected = counted(self.request.sampling.max_tokens or 0)
        if self.finish is not None:
            assert self.texts == [expected] * self.request.n
            assert len(self.finish.finish_reasons) == self.request.n
        else:
            assert all(expected.startswith(text) for text in self.texts)
            self._explain(self.error)

    def _explain(self, error: HeadraceError | None) -> None:
        request, world, name = self.request, self.world, self.entry.spec.name
        happened = [what for at, who, what in world.log if at >= self.began and who in (name, "*")]
        ever = {what for _, who, what in world.log if who in (name, "*")}
        size = world.machine.sizes[name]
        match error:
            case QueueFull():
                assert error.retry_after_s is not None
                assert error.retry_after_s > 0
            case QueueTimeout():
                assert request.deadline_s is not None
            case Loading():
                assert request.load_wait_s is not None
                assert error.retry_after_s is not None
                assert error.retry_after_s > 0
            case DoesNotFit():
                assert size > BUDGET or "foreign" in ever or world.ever_pinned - {name}
            case WorkerDied() | GenerationFailed() | OutOfMemory():
                broke = [what for what in happened if what == "fault"]
                assert broke
                others = {what for what in happened if what != "fault"} | (ever & {"load fault"})
                others |= {"pinned"} if world.ever_pinned else set()
                limited = request.deadline_s is not None or request.load_wait_s is not None
                if len(broke) == 1 and not others and not limited and world.faults(name) < 3:
                    assert self.continuation == "off", f"not continued: {error!r}"
            case LoadFailed():
                assert ever & {"fault", "load fault"}
                if "has failed" in error.message:
                    assert error.retry_after_s
            case Quarantined():
                # The same request was in two crashes at least, in one of them alone.
                assert world.crashes[name] >= 2
                assert error.retry_after_s
            case Disabled():
                assert ever & {"admin", "switched off"}
            case UnknownModel():
                assert "removed" in happened
            case Draining():
                assert {"closing", "admin"} & set(happened)
            case _:
                raise AssertionError(f"unexpected: {error!r}")


class World:
    """The pool, its machine, and everything that was asked of it."""

    def __init__(self) -> None:
        self.loop = TimeLoop()
        self.machine = Machine(1000)
        self.log: list[tuple[float, str, str]] = []
        self.asked: list[Asked] = []
        self.calls: list[asyncio.Task[Any]] = []
        self.complaints: list[Any] = []
        self.config: dict[str, ModelSpec] = {}
        self.ever_pinned: set[str] = set()
        self.crashes: Counter[str] = Counter()
        self.counts: list[asyncio.Task[Any]] = []
        self.closing = False
        self.loop.set_exception_handler(lambda _, context: self.complaints.append(context))

    def open(self, specs: Mapping[str, ModelSpec]) -> None:
        self.config = dict(specs)
        self.note_pinned(specs.values())
        for spec in specs.values():
            if not spec.enabled:
                self.note(spec.name, "switched off")
        self.ledger = Ledger({"cpu": BUDGET}, self.read)
        self.pool = Pool(
            tuple(specs.values()),
            lambda spec, _report: Whimsical(spec, self),
            sizing=self.machine,
            ledger=self.ledger,
            rules=RULES,
            clock=self.loop.time,
        )
        self.admin = PoolAdmin(
            self.pool,
            specify=self.specify,
            state=StateFile(None),
            reread=self.reread,
            drain_s=DRAIN_S,
        )
        publish = self.pool.events.publish

        def watched(kind: Any, model: str = "", replica: int = 0, **data: Any) -> None:
            if kind == "evicted":
                self.evicts(model, replica, data["by"])
            publish(kind, model, replica, **data)

        self.pool.events.publish = watched  # type: ignore[method-assign]

    def read(self) -> Mapping[str, tuple[int, int]]:
        held = sum(self.machine.held.values())
        return {"cpu": (BUDGET, max(0, BUDGET - held - self.machine.foreign))}

    def specify(self, name: str, changes: Mapping[str, Any]) -> ModelSpec:
        if name not in self.config:
            raise ConfigError(f"There is no {name}.")
        return msgspec.structs.replace(self.config[name], **changes)

    def reread(self) -> Wanted:
        return Wanted(
            specs=tuple(self.config.values()),
            rules=RULES,
            budgets={"cpu": BUDGET},
            specify=self.specify,
        )

    def note(self, who: str, what: str) -> None:
        self.log.append((self.loop.time(), who, what))

    def kill(self, worker: FakeWorker, linger_s: float) -> None:
        """End a worker's process; the driver frees its memory after `linger_s`."""

        async def die() -> None:
            worker.die(linger_s=linger_s)

        self.note(worker.spec.name, "fault")
        self.crashes[worker.spec.name] += 1
        self.loop.run_until_complete(die())

    def note_pinned(self, specs: Any) -> None:
        self.ever_pinned |= {spec.name for spec in specs if spec.pinned}

    def faults(self, name: str) -> int:
        return sum(1 for _, who, what in self.log if who == name and what == "fault")

    def evicts(self, model: str, number: int, by: str) -> None:
        """M6: the busy and the pinned never go."""
        entries = [entry for entry in self.everybody() if entry.spec.name == model]
        able = [
            replica
            for entry in entries
            for replica in entry.all_replicas()
            if replica.number == number and not replica.leases
            if not entry.spec.pinned or replica in entry.retired
        ]
        assert able, f"{model} was evicted by {by}, busy or pinned"
        retired = any(replica in entry.retired for entry in entries for replica in able)
        assert by != model or retired, f"{model} was evicted for itself"

    def closes(self, worker: Whimsical) -> None:
        """Whoever is unloaded in the middle of an answer was told to be, or has died."""
        if worker.running and not worker.died.is_set() and not self.closing:
            told = [who for at, who, what in self.log if what == "admin"]
            assert worker.spec.name in told, f"{worker.spec.name} was unloaded while it served"

    def everybody(self) -> list[ModelEntry]:
        return [*self.pool.entries.values(), *self.pool.leaving]

    def pass_time(self, seconds: float) -> None:
        self.loop.run_until_complete(asyncio.sleep(seconds))

    def call(self, work: Coroutine[Any, Any, Any]) -> None:
        self.calls.append(self.loop.create_task(_safely(work), name="call"))

    def check(self) -> None:
        machine, pool = self.machine, self.pool
        assert not self.complaints, self.complaints
        assert machine.peak <= BUDGET, "over the budget"
        assert self.ledger.booked()["cpu"] <= BUDGET
        assert machine.most_loading <= RULES.max_loading
        waiting = leases = 0
        for entry in self.everybody():
            places = list(entry.queue)
            assert len(places) == len(entry.queue)
            assert all(not ticket.lease.done() for ticket in places)
            slots = 3 * 2
            assert len([one for one in places if not one.priority]) <= 8 + slots
            waiting += len(places)
            for replica in entry.all_replicas():
                leases += len(replica.leases)
                assert replica.running <= max(replica.max_running, 0)
                assert all(lease.worker is replica.worker for lease in replica.leases)
                if replica.worker is not None:
                    assert replica.worker.running <= replica.running  # type: ignore[attr-defined]
        busy = [one for one in self.asked if not one.task.done()]
        assert waiting + leases <= len(busy)
        counting = [task for task in self.counts if not task.done()]
        assert len(pool._requests) <= len(busy) + len(counting)
        for one in [one for one in self.asked if one.task.done()]:
            one.check()
            self.asked.remove(one)
        for call in [call for call in self.calls if call.done()]:
            call.result()
            self.calls.remove(call)

    def settle(self) -> None:
        """Let everything run out, in the time that the rules promise."""
        self.machine.foreign = 0
        self.machine.fail_load.clear()
        # In each round, somebody waits as long as he has to, those in the way end what they
        # began, his model is loaded, and at least one request is answered.
        round_s = RULES.longest_wait_s + LONGEST_STREAM_S + LONGEST_LOAD_S + 1.0
        rounds = len(self.asked) + len(self.calls) * 2 + 1
        self.wait(round_s * rounds + 2 * DRAIN_S + 60.0 + LINGER_S)
        assert not [one for one in self.asked if not one.task.done()], self.pool
        assert not [call for call in self.calls if not call.done()], self.pool
        # What is let go, and what comes back after it, has time to.
        self.pass_time(60.0 + DRAIN_S + 4 * LONGEST_LOAD_S)
        self.check()
        for entry in self.everybody():
            assert not len(entry.queue)
            assert not entry._load_waits
            assert entry.running == 0
            assert not entry.retired
        assert self.pool.loader.memory._waiting == []
        assert len(self.pool._requests) == 0
        assert sum(self.machine.held.values()) == self.ledger.booked()["cpu"]
        assert {task.get_name().split()[0] for task in asyncio.all_tasks(self.loop)} <= {
            "pool",
            "watch",
        }

    def wait(self, within_s: float) -> None:
        tasks = [one.task for one in self.asked] + self.calls
        if tasks:
            self.loop.run_until_complete(asyncio.wait(tasks, timeout=within_s))

    def close(self, drain_s: float) -> None:
        self.note("*", "closing")
        self.closing = True
        began = self.loop.time()
        self.loop.run_until_complete(self.pool.aclose(drain_s))
        assert self.loop.time() - began <= drain_s + 1.0, "the end took too long"
        # What a killed process held is free when the driver says so.
        assert all(worker.died.is_set() for worker in self.machine.held)
        self.wait(2 * MOST_TOKENS)
        assert not [one for one in self.asked if not one.task.done()]
        self.pass_time(0.01)
        self.check()
        assert not self.calls
        assert self.ledger.booked()["cpu"] == 0
        assert not asyncio.all_tasks(self.loop)

    def abandon(self) -> None:
        """Free the loop, whatever state it is in."""
        for task in asyncio.all_tasks(self.loop):
            task.cancel()
        self.loop.run_until_complete(asyncio.sleep(0.2))
        self.loop.run_until_complete(self.loop.shutdown_asyncgens())
        self.loop.close()


async def _safely(work: Coroutine[Any, Any, Any]) -> None:
    try:
        await work
    except HeadraceError as error:
        assert error.message


class _Errors(logging.Handler):
    """What the pool logs as its own mistakes."""

    def __init__(self, put: Callable[[Any], None]) -> None:
        super().__init__(logging.ERROR)
        self.put = put

    def emit(self, record: logging.LogRecord) -> None:
        self.put((record.getMessage(), record.exc_info))


soft = st.fixed_dictionaries(
    {},
    optional={
        "pinned": st.sampled_from([False] * 5 + [True]),
        "enabled": st.sampled_from([True] * 9 + [False]),
        "keep_alive": st.sampled_from([-1.0, 0.0, 3.0, 30.0]),
        "max_queued": st.sampled_from([0, 4, 8]),
        "replicas": st.integers(1, 2),
        "continuation": st.sampled_from(["fast", "exact", "off"]),
        "weights": st.sampled_from([(), (2.0, 1.0)]),
    },
)
hard = st.fixed_dictionaries({"options": st.fixed_dictionaries({"x": st.integers(0, 3)})})
changes = st.one_of(soft, hard, st.fixed_dictionaries({"max_running": st.integers(1, 3)}))
names = st.sampled_from(NAMES)
lingering = st.sampled_from([0.0, 0.0, 0.3, 10.0])
requests = st.fixed_dictionaries(
    {
        "name": names,
        "tokens": st.integers(1, MOST_TOKENS),
        "n": st.sampled_from([1, 1, 1, 2, MOST_CHOICES]),
        "client": st.sampled_from(["", "x", "y"]),
        "pace_s": st.sampled_from([0.0, 0.0, 0.3]),
        "temperature": st.sampled_from([0.0, 0.0, 1.0]),
        "keep_alive": st.sampled_from([None, None, None, 0.0, 2.0, -1.0]),
        "deadline_s": st.sampled_from([None] * 5 + [0.5, 10.0]),
        "load_wait_s": st.sampled_from([None] * 5 + [0.5, 5.0]),
    }
)
configs = st.dictionaries(names, st.tuples(soft, st.integers(1, 3)), min_size=3)


def specs_of(config: Mapping[str, tuple[dict[str, Any], int]]) -> dict[str, ModelSpec]:
    return {
        name: ModelSpec(
            name=name, model=f"builtin:{name}", **{"max_queued": 8, "max_running": slots, **given}
        )
        for name, (given, slots) in config.items()
    }


class Steps(RuleBasedStateMachine):
    """Requests, faults, operators and time, in any order."""

    taken = 0

    def __init__(self) -> None:
        super().__init__()
        self.world = World()
        self.errors = _Errors(self.world.complaints.append)
        logging.getLogger("headrace.pool").addHandler(self.errors)
        self.abrupt: float | None = None

    @initialize(
        slots=st.lists(st.integers(1, 3), min_size=4, max_size=4),
        given=st.lists(soft, min_size=4, max_size=4),
        sizes=st.lists(st.sampled_from([10, 25, 40, 60, 100]), min_size=4, max_size=4),
        loads=st.lists(st.sampled_from([0.2, 1.0, 3.0]), min_size=4, max_size=4),
        abrupt=st.sampled_from([None, None, 0.0, 5.0]),
    )
    def begin(
        self,
        slots: list[int],
        given: list[dict[str, Any]],
        sizes: list[int],
        loads: list[float],
        abrupt: float | None,
    ) -> None:
        self.abrupt = abrupt
        self.world.machine.sizes = dict(zip(NAMES, sizes, strict=True))
        self.world.machine.load_s = dict(zip(NAMES, loads, strict=True))
        pairs = zip(given, slots, strict=True)
        self.world.open(specs_of(dict(zip(NAMES, pairs, strict=True))))

    @rule(request=requests, seconds=st.sampled_from([0.0, 0.2, 1.0]))
    def ask(self, request: dict[str, Any], seconds: float) -> None:
        self._ask(**request)
        self.world.pass_time(seconds)

    @rule(
        many=st.lists(requests, min_size=2, max_size=4),
        seconds=st.sampled_from([0.0, 0.2, 1.0, 5.0]),
    )
    def ask_many(self, many: list[dict[str, Any]], seconds: float) -> None:
        for request in many:
            self._ask(**request)
        self.world.pass_time(seconds)

    def _ask(
        self, name: str, client: str, pace_s: float, temperature: float, tokens: int, **given: Any
    ) -> None:
        world = self.world
        if name not in world.pool.entries:
            name = next(iter(world.pool.entries))
        request = GenerateRequest(
            model=name,
            prompt="x",
            sampling=Sampling(max_tokens=tokens, temperature=temperature),
            client=client,
            received=world.loop.time(),
            **given,
        )
        world.asked.append(Asked(world, request, pace_s, world.pool.entries[name]))

    @rule(seconds=st.sampled_from([0.0, 0.01, 0.05, 0.1, 0.3, 0.5]))
    def pass_a_moment(self, seconds: float) -> None:
        self.world.pass_time(seconds)

    @rule(seconds=st.sampled_from([1.0, 2.0, 3.0, 10.0, 30.0]))
    def pass_time(self, seconds: float) -> None:
        self.world.pass_time(seconds)

    @rule(which=st.integers(0, 30), politely=st.booleans())
    def leave(self, which: int, politely: bool) -> None:
        world = self.world
        if not world.asked:
            return
        one = world.asked[which % len(world.asked)]
        if politely:
            one.leaves = True
        elif not one.task.cancelling():
            # A second time would interrupt what frees the slots of its choices.
            one.task.cancel()
        world.pass_time(0)

    @rule(name=names)
    def count(self, name: str) -> None:
        self.world.call(collect_count(self.world.pool.ask(CountRequest(model=name, text="abc"))))
        self.world.counts.append(self.world.calls[-1])

    @rule(
        which=st.integers(0, 30),
        error=st.sampled_from([None, GenerationFailed, OutOfMemory]),
        linger_s=lingering,
    )
    def hurt(self, which: int, error: type[HeadraceError] | None, linger_s: float) -> None:
        """Kill a worker that serves, or have the next token of one of its streams fail."""
        busy = [one for one in self.world.machine.held if one.running]
        if not busy:
            return
        worker = busy[which % len(busy)]
        assert isinstance(worker, Whimsical)
        if error is None:
            self.world.kill(worker, linger_s)
        else:
            worker.once = error("once")

    @rule(which=st.integers(0, 30), linger_s=lingering)
    def kill_the_idle(self, which: int, linger_s: float) -> None:
        idle = [one for one in self.world.machine.held if one.state == "ready" and not one.running]
        if idle:
            self.world.kill(idle[which % len(idle)], linger_s)

    @rule(which=st.integers(0, 30))
    def kill_a_load(self, which: int) -> None:
        loading = [one for one in self.world.machine.held if one.state == "loading"]
        if loading:
            worker = loading[which % len(loading)]
            self.world.note(worker.spec.name, "load fault")
            worker.killed.set()
            self.world.pass_time(0)

    @rule(name=names, fails=st.sampled_from([False, False, True]))
    def break_loads(self, name: str, fails: bool) -> None:
        if fails:
            self.world.machine.fail_load[name] = LoadFailed("no such luck")
            self.world.note(name, "load fault")
        else:
            self.world.machine.fail_load.pop(name, None)

    @rule(amount=st.sampled_from([0, 0, 30, 80]))
    def take_memory(self, amount: int) -> None:
        """Other programs take memory of the machine, as much as there is."""
        held = sum(self.world.machine.held.values())
        self.world.machine.foreign = min(amount, BUDGET - held)
        if self.world.machine.foreign:
            self.world.note("*", "foreign")

    @rule(name=names, change=st.one_of(st.none(), changes))
    def load(self, name: str, change: dict[str, Any] | None) -> None:
        self._note_change(name, change or {})
        self.world.call(self.world.admin.load(name, change))

    @rule(name=names, again=st.booleans())
    def unload(self, name: str, again: bool) -> None:
        self.world.note(name, "admin")
        admin = self.world.admin
        self.world.call(admin.restart(name) if again else admin.unload(name))

    @rule(name=names, change=changes)
    def update(self, name: str, change: dict[str, Any]) -> None:
        self._note_change(name, change)
        self.world.call(self.world.admin.update(name, change))

    @rule(config=configs)
    def reload(self, config: dict[str, tuple[dict[str, Any], int]]) -> None:
        world = self.world
        world.config = specs_of(config)
        world.note_pinned(world.config.values())
        for name in NAMES:
            world.note(name, "admin" if name in world.config else "removed")
        world.call(world.admin.reload())

    @invariant()
    def holds(self) -> None:
        Steps.taken += 1
        if hasattr(self.world, "pool"):
            self.world.check()

    def teardown(self) -> None:
        try:
            if hasattr(self.world, "pool"):
                if self.abrupt is None:
                    self.world.settle()
                self.world.close(self.abrupt or 0.0)
        finally:
            logging.getLogger("headrace.pool").removeHandler(self.errors)
            self.world.abandon()

    def _note_change(self, name: str, change: Mapping[str, Any]) -> None:
        self.world.note(name, "admin")
        if change.get("pinned"):
            self.world.ever_pinned.add(name)


def walk(examples: int, *, derandomize: bool) -> None:
    run_state_machine_as_test(
        Steps,
        settings=settings(
            max_examples=examples,
            stateful_step_count=200,
            derandomize=derandomize,
            deadline=None,
            database=None,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
        ),
    )


@pytest.mark.timeout(600)  # a counterexample takes a while to become a short one
def test_what_always_holds() -> None:
    """M4-M7, W7, W8, W17: within the budget, nobody forgotten, nobody cut off, idle at the end."""
    Steps.taken = 0
    walk(65, derandomize=True)
    assert Steps.taken >= 10_000


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_what_always_holds_for_longer() -> None:
    """The same with other steps each time."""
    walk(5000, derandomize=False)
