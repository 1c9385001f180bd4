"""What a crash means for the request that caused it, for the others, and for the model."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import Any

import msgspec
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
    Draining,
    HeadraceError,
    LoadFailed,
    Loading,
    Quarantined,
    QueueFull,
    QueueTimeout,
    RateLimited,
    WorkerDied,
)
from headrace.core.events import Event, TokenCount
from headrace.core.model import ModelSpec
from headrace.core.request import CountRequest, DetokenizeRequest, GenerateRequest
from headrace.core.status import Footprint
from headrace.core.stream import collect_count
from headrace.pool.admin import status_of
from headrace.pool.failures import Breaker
from headrace.pool.ledger import Ledger, named
from headrace.pool.policy import Rules
from headrace.pool.pool import Pool
from headrace.worker.spec import OnProgress

RULES = Rules()
KNOWN_HELD = FakeWorker.held


class Brittle(FakeWorker):
    """Dies of a prompt with the word poison, before the first token or after `after` tokens."""

    after = 0

    async def _generate(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        poisonous, count = "poison" in str(request.prompt), 0
        if poisonous:
            # As an engine does whose own process has died: it tells before its end is noticed.
            await asyncio.sleep(0.05)
        async for event in super()._generate(request):
            if poisonous and count >= self.after:
                self.machine.crashes.append((clock(), self.running))
                self.die("was killed by SIGSEGV")
                raise self.broken or AssertionError
            count += 1
            yield event

    async def _tokens(
        self, request: CountRequest | DetokenizeRequest
    ) -> AsyncGenerator[Event, None]:
        if isinstance(request, CountRequest) and "poison" in str(request.text):
            await asyncio.sleep(0.05)
            self.machine.crashes.append((clock(), self.running))
            self.die("was killed by SIGSEGV")
            raise self.broken or AssertionError
        async for event in super()._tokens(request):
            yield event


def brittle(machine: Machine, *specs: ModelSpec, after: int = 0, **rules: Any) -> Pool:
    def worker(one: ModelSpec, _report: Any) -> FakeWorker:
        made = Brittle(one, machine)
        made.after = after
        return made

    return with_pool(machine, worker, *specs, **rules)


async def failed(served: Pool, **given: Any) -> HeadraceError:
    with pytest.raises(HeadraceError) as caught:
        await answer(served, ask(**given))
    return caught.value


def test_that_poison_is_tried_again_alone_and_then_refused() -> None:
    """Issue 11.6: two crashes at most, the second without others, and the model goes on."""

    async def main() -> None:
        machine = Machine()
        served = brittle(machine, spec(max_running=4))
        await served.start()
        others = [asyncio.create_task(answer(served, ask(tokens=60))) for _ in range(3)]
        await asyncio.sleep(0.35)
        assert isinstance(await failed(served, prompt="poison"), WorkerDied)
        assert [running for _, running in machine.crashes] == [4, 1]
        assert [text for text, _ in await asyncio.gather(*others)] == [counted(60)] * 3
        for _ in range(10):
            error = await failed(served, prompt="poison")
            assert isinstance(error, Quarantined)
            assert error.retry_after_s == pytest.approx(60, abs=10)
        assert len(machine.crashes) == 2
        assert served.entry("a").state == "ready"
        assert (await answer(served, ask()))[0] == counted(5)
        # After a while it is tried again, alone, and then refused for twice as long.
        await asyncio.sleep(60)
        assert isinstance(await failed(served, prompt="poison"), WorkerDied)
        error = await failed(served, prompt="poison")
        assert isinstance(error, Quarantined)
        assert error.retry_after_s is not None
        assert error.retry_after_s > 100
        assert [running for _, running in machine.crashes][2:] in ([1], [1, 1])
        await served.aclose()

    run(main())


def test_that_many_of_the_same_at_once_are_two_crashes() -> None:
    async def main() -> None:
        machine = Machine()
        served = brittle(machine, spec(max_running=4))
        await served.start()
        errors = await asyncio.gather(*(failed(served, prompt="poison") for _ in range(12)))
        assert {type(error) for error in errors} == {WorkerDied, Quarantined}
        assert [running for _, running in machine.crashes] == [4, 1]
        assert (await answer(served, ask()))[0] == counted(5)
        await served.aclose()

    run(main())


def test_that_a_text_which_crashes_the_tokenizer_is_refused_and_others_are_not() -> None:
    """Issue 11.6: a request that does not queue is suspected too, and no one else is.

    The others were refused in its place, and the breaker opened for all.
    """

    async def count(served: Pool, text: str) -> TokenCount | HeadraceError:
        try:
            return await collect_count(served.ask(CountRequest(text=text, client="bad")))
        except HeadraceError as error:
            return error

    async def main() -> None:
        machine = Machine()
        served = brittle(machine, spec(max_running=4))
        await served.start()
        running = asyncio.create_task(answer(served, ask(tokens=20, client="good")))
        await asyncio.sleep(0.35)
        assert isinstance(await count(served, "poison"), WorkerDied)
        assert isinstance(await count(served, "poison"), WorkerDied)
        assert (await running)[0] == counted(20)
        for number in range(20):
            error = await count(served, "poison" if number < 10 else f"poison {number}")
            assert isinstance(error, WorkerDied | Quarantined | RateLimited), error
            assert (await answer(served, ask(client="good")))[0] == counted(5)
        assert len(machine.crashes) <= 4
        assert machine.crashes[1][1] == 0, "the second time it runs alone"
        assert served.entry("a").state == "ready"
        await served.aclose()

    run(main())


@pytest.mark.parametrize("continuation", ["fast", "off"])
def test_that_the_same_request_never_trips_the_breaker(continuation: str) -> None:
    """Issue 11.6: without keys too, in any number and beside others."""

    async def main() -> None:
        machine = Machine()
        served = brittle(machine, spec(continuation=continuation))
        await served.start()
        for _ in range(20):
            error = await failed(served, prompt="poison")
            assert isinstance(error, WorkerDied | Quarantined)
            assert (await answer(served, ask()))[0] == counted(5)
            assert served.entry("a").state == "ready"
            await asyncio.sleep(1)
        assert len(machine.crashes) <= 3
        await served.aclose()

    run(main())


def test_that_a_client_with_ever_other_poison_is_refused_and_others_are_not() -> None:
    """Issue 11.6: the crashes count against the key that sent them."""

    async def main() -> None:
        machine = Machine()
        served = brittle(machine, spec(max_running=4))
        await served.start()
        kinds = set[type[HeadraceError]]()

        async def attack() -> None:
            for number in range(30):
                error = await failed(served, prompt=f"poison {number}", client="bad")
                kinds.add(type(error))
                await asyncio.sleep(0.2)

        async def work() -> None:
            for number in range(40):
                request = ask(tokens=20, prompt=f"{number}", client="good")
                assert (await answer(served, request))[0] == counted(20)

        await asyncio.gather(attack(), work(), work())
        assert kinds == {WorkerDied, RateLimited}
        # The first pair of crashes may hit others; after it, all that the client sends runs alone.
        assert [running for _, running in machine.crashes][2:] in ([], [1], [1, 1], [1, 1, 1])
        assert served.entry("a").state == "ready"
        await served.aclose()

    run(main())


def test_that_poison_after_the_first_tokens_ends_refused() -> None:
    async def main() -> None:
        machine = Machine()
        served = brittle(machine, spec(), after=3)
        await served.start()
        errors = [type(await failed(served, prompt="poison", tokens=9)) for _ in range(5)]
        assert errors == [WorkerDied, *[Quarantined] * 4]
        assert len(machine.crashes) == 2
        await served.aclose()

    run(main())


def test_that_the_innocent_are_answered_and_cleared() -> None:
    """What was only there when a worker died runs alone once, and beside others again."""

    async def main() -> None:
        machine = Machine()
        served = pool(machine, spec(max_running=4))
        await served.start()
        asked = [asyncio.create_task(answer(served, ask(prompt=f"{n}"))) for n in range(4)]
        await asyncio.sleep(0.05)
        machine.workers[-1].die()
        assert [text for text, _ in await asyncio.gather(*asked)] == [counted(5)] * 4
        began = clock()
        again = [asyncio.create_task(answer(served, ask(prompt=f"{n}"))) for n in range(4)]
        await asyncio.gather(*again)
        assert clock() - began == pytest.approx(0.5, abs=0.05)
        await served.aclose()

    run(main())


def test_that_one_that_runs_alone_makes_place_after_its_first_token() -> None:
    async def main() -> None:
        machine = Machine()
        served = pool(machine, spec(max_running=2))
        await served.start()
        suspect = asyncio.create_task(answer(served, ask(tokens=100, prompt="long")))
        await asyncio.sleep(0.05)
        machine.workers[-1].die()
        await asyncio.sleep(1.5)
        began = clock()
        assert (await answer(served, ask()))[0] == counted(5)
        assert clock() - began < 1
        assert not suspect.done()
        assert (await suspect)[0] == counted(100)
        await served.aclose()

    run(main())


@pytest.mark.parametrize(("client", "prompts"), [("", ["same"] * 4), ("key", "abcd")])
def test_that_after_a_death_requests_run_beside_one_that_has_no_end(
    client: str, prompts: list[str]
) -> None:
    """Issue 11.6: they ran one after the other, and the first had no end.

    The same request has passed its beginning then, and a client is kept apart from others only.
    """

    async def main() -> None:
        machine = Machine()
        served = pool(machine, spec(max_running=4))
        await served.start()
        endless = ask(tokens=5000, prompt=prompts[0], client=client)
        running = asyncio.create_task(answer(served, endless))
        await asyncio.sleep(0.05)
        machine.workers[-1].die()
        await asyncio.sleep(2)
        began = clock()
        for prompt in prompts[1:]:
            assert (await answer(served, ask(prompt=prompt, client=client)))[0] == counted(5)
        assert clock() - began < 3
        assert not running.done()
        running.cancel()
        await asyncio.wait({running})
        await served.aclose()

    run(main())


def test_that_one_that_has_to_be_alone_does_not_hold_up_the_others_for_long() -> None:
    """Issue 11.6: what runs may have no end; they waited for it together, without an end."""

    async def main() -> None:
        machine = Machine()
        served = brittle(machine, spec(max_running=4))
        await served.start()
        assert isinstance(await failed(served, prompt="poison", client="bad"), WorkerDied)
        running = asyncio.create_task(answer(served, ask(tokens=5000, client="good")))
        await asyncio.sleep(3)
        began, waits = clock(), list[float]()
        refused = asyncio.create_task(failed(served, prompt="x", client="bad"))
        while clock() - began < 60:
            asked = clock()
            assert (await answer(served, ask(client="good")))[0] == counted(5)
            waits.append(clock() - asked)
        assert max(waits) < 12
        assert sum(wait > 2 for wait in waits) == 1
        error = await refused
        assert isinstance(error, QueueFull)
        assert error.retry_after_s
        assert not running.done()
        running.cancel()
        await asyncio.wait({running})
        await served.aclose()

    run(main())


def test_that_the_breaker_is_half_open_after_a_while() -> None:
    """Issue 11.6, M5: 30 s, then doubling; the status says when, and an answer closes it."""

    async def main() -> None:
        machine = Machine()
        served = pool(machine)
        await served.start()
        entry, waits = served.entry("a"), list[float]()
        for crashes in (3, 1, 1):
            for _ in range(crashes):
                await entry.ready_replica()
                next(iter(machine.held)).die()
                await asyncio.sleep(0.01)
            error = await failed(served)
            assert isinstance(error, LoadFailed)
            assert error.retry_after_s is not None
            waits.append(error.retry_after_s)
            status = status_of(entry)
            assert (status.state, served.ready) == ("failed", False)
            assert status.retry_at is not None
            assert status.retry_at - entry.wall(clock()) == pytest.approx(waits[-1], abs=1)
            await asyncio.sleep(waits[-1] + 0.01)
            assert served.ready
            served.loader.ensure_loaded(entry)
        assert waits == pytest.approx([30, 60, 120], abs=0.1)
        assert (await answer(served, ask()))[0] == counted(5)
        assert entry.state == "ready"
        assert "stderr" in (status_of(entry).last_error or "")
        await served.aclose()

    run(main())


def test_the_breaker_by_itself() -> None:
    """The longest time is 600 s; quiet times begin at 30 s again; known culprits count once."""
    breaker, now = Breaker(), 1000.0
    times: list[float] = []
    for _ in range(8):
        while breaker.until <= now:
            breaker.crashed(now, RULES)
        times.append(breaker.until - now)
        now = breaker.until
    assert times == [30, 60, 120, 240, 480, 600, 600, 600]
    breaker.answered(now)
    now += 10_000
    for _ in range(3):
        breaker.crashed(now, RULES)
    assert breaker.until - now == 30
    one, two, both = frozenset("a"), frozenset("b"), frozenset("ab")
    breaker, now = Breaker(), 0.0
    for culprits in (one, both, one, both, one):
        breaker.crashed(now, RULES, culprits)
    assert breaker.until == 0.0
    breaker.answered(now)
    breaker.crashed(now, RULES, two)
    breaker.crashed(now, RULES)
    assert breaker.until == 0.0
    breaker.crashed(now, RULES)
    assert breaker.until == 30.0


@pytest.mark.parametrize("crashed", [True, False])
def test_that_requests_wait_while_a_load_is_tried_again(crashed: bool) -> None:
    """Issue 11.6: a process that is killed while it loads fails nobody, if it has served before."""

    async def main() -> None:
        machine = Machine()
        served = pool(machine, spec(max_running=4))
        await served.start()
        if crashed:
            machine.workers[-1].die()
        else:
            # Counting waits as well.
            await served.loader.unload(served.entry("a"), served.entry("a").replicas[0], "unloaded")
        await asyncio.sleep(0.05)
        waiting = [asyncio.create_task(answer(served, ask(prompt=f"{n}"))) for n in range(3)]
        counting = asyncio.create_task(collect_count(served.ask(CountRequest(text="abc"))))
        late = asyncio.create_task(failed(served, deadline_s=0.8))
        await asyncio.sleep(0.5)
        machine.workers[-1].killed.set()
        # Those that come in the meantime wait too.
        await asyncio.sleep(0.1)
        waiting.append(asyncio.create_task(answer(served, ask())))
        assert served.entry("a").state == "loading"
        assert isinstance(await late, QueueTimeout)
        assert [text for text, _ in await asyncio.gather(*waiting)] == [counted(5)] * 4
        assert (await counting).count == 3
        assert "while loading" in (served.entry("a").failures.last_error or "")
        await served.aclose()

    run(main())


@pytest.mark.parametrize("load_s", [1.0, 100.0])
def test_that_a_load_that_always_fails_ends(load_s: float) -> None:
    """Issue 11.6: three tries, whether or not they are within the window of the breaker."""

    async def main() -> None:
        machine = Machine()
        served = pool(machine)
        await served.start()
        machine.load_s["a"], machine.fail_load["a"] = load_s, LoadFailed("no such file")
        machine.workers[-1].die()
        await asyncio.sleep(0.01)
        errors = await asyncio.gather(*(failed(served, prompt=f"{n}") for n in range(3)))
        assert {type(error) for error in errors} == {LoadFailed}
        assert machine.loads == 1 + (3 if load_s > 60 else 2)
        await asyncio.sleep(1000)
        assert machine.loads <= 4
        # The next request is the next try.
        machine.fail_load.clear()
        assert (await answer(served, ask()))[0] == counted(5)
        await served.aclose()

    run(main())


def test_that_an_answer_of_a_model_that_has_failed_says_when() -> None:
    """Issue 11.6: not the crash that its first attempt met, but when to try again."""

    async def main() -> None:
        machine = Machine()
        served = pool(machine, spec(max_running=4))
        await served.start()
        for _ in range(2):
            machine.workers[-1].die()
            await asyncio.sleep(2.5)
        asked = [asyncio.create_task(failed(served, prompt=f"{n}")) for n in range(3)]
        await asyncio.sleep(0.05)
        machine.workers[-1].die()
        for error in await asyncio.gather(*asked):
            assert isinstance(error, LoadFailed)
            assert error.retry_after_s == pytest.approx(30, abs=1)
        await served.aclose()

    run(main())


def test_that_an_answer_whose_model_takes_long_to_load_again_says_when() -> None:
    """Issue 11.6: a request without a stream waits for `load_wait_s` alone, after a crash too."""

    async def main() -> None:
        machine = Machine()
        served = pool(machine, spec(max_running=4))
        await served.start()
        machine.load_s["a"] = 60.0
        asked = [asyncio.create_task(failed(served, load_wait_s=30.0)) for _ in range(3)]
        await asyncio.sleep(0.05)
        machine.workers[-1].die()
        for error in await asyncio.gather(*asked):
            assert isinstance(error, Loading)
            assert error.retry_after_s
        await served.aclose()

    run(main())


def test_that_an_answer_does_not_go_on_at_a_worker_that_is_about_to_end() -> None:
    """Issue 11.19: the error of a rank comes before the end of its worker is noticed."""

    async def main() -> None:
        machine = Machine()
        served = pool(machine, spec(max_running=8))
        await served.start()
        asked = [asyncio.create_task(answer(served, ask(tokens=20))) for _ in range(8)]
        await asyncio.sleep(0.55)
        worker = machine.workers[-1]
        worker.broken = WorkerDied("vLLM's engine core has died.", detail="NCCL error")
        asyncio.get_running_loop().call_later(0.4, worker.die)
        assert [text for text, _ in await asyncio.gather(*asked)] == [counted(20)] * 8
        assert (len(machine.workers), served.entry("a").continuations) == (2, 8)
        # Issue 11.20: the cause is the one that the engine gave, with its detail.
        assert served.entry("a").failures.last_error == "vLLM's engine core has died.\nNCCL error"
        await served.aclose()

    run(main())


def test_that_a_worker_that_only_says_that_it_died_is_ended() -> None:
    async def main() -> None:
        machine = Machine()
        served = pool(machine)
        await served.start()
        asked = asyncio.create_task(answer(served, ask(tokens=20)))
        await asyncio.sleep(0.55)
        machine.workers[-1].broken = WorkerDied("vLLM's engine core has died.")
        assert (await asked)[0] == counted(20)
        assert len(machine.workers) == 2
        await served.aclose()

    run(main())


@pytest.mark.parametrize("linger_s", [3.5, 100.0])
def test_that_a_load_waits_for_the_memory_of_what_has_died(linger_s: float) -> None:
    """Issue 11.16: not refused, nothing is evicted for it; 15 s at most are waited."""

    async def main() -> None:
        machine = Machine(100)
        machine.sizes = {"a": 90, "b": 10}
        served = pool(machine, spec("a"), spec("b"))
        await served.start()
        asked = [asyncio.create_task(answer(served, ask(tokens=20))) for _ in range(2)]
        await asyncio.sleep(0.55)
        began = clock()
        machine.workers[0].die(linger_s=linger_s)
        await asyncio.sleep(1)
        assert served.ledger.booked() == {"cpu": 100}
        if linger_s < 15:
            assert [text for text, _ in await asyncio.gather(*asked)] == [counted(20)] * 2
            assert clock() - began == pytest.approx(linger_s + 1 + 2, abs=0.7)
            assert machine.peak <= 100
        else:
            await asyncio.sleep(14.5)
            assert served.ledger.booked()["cpu"] < 100
        assert served.entry("b").evictions == 0
        await served.aclose()

    run(main())


def test_that_an_overrun_that_a_reload_would_repeat_evicts_nothing() -> None:
    """Issue 11.18: 130,570 MiB of 129,394, with the figures of the machine."""
    budget = {"cuda:0": 129_394}
    ledger = Ledger(budget, lambda: {"cuda:0": (143_771, 12_577)})
    ledger.book("a", {"cuda:0": 129_394})
    ledger.settle("a", {"cuda:0": 130_570})
    assert ledger.excess() == {}
    # With another model there is too much, as before.
    ledger.book("b", {"cuda:0": 1000})
    assert ledger.excess() == {"cuda:0": 1000}
    ledger.release("b")
    # A budget that has become smaller is kept.
    budget["cuda:0"] = 100_000
    assert ledger.excess() == {"cuda:0": 30_570}


def test_the_names_of_what_a_process_holds() -> None:
    """A process numbers the GPUs that it may see from 0."""
    held = {"cpu": 1, "cuda:0": 2, "cuda:1": 3}
    assert named(held, ["cpu", "cuda:3", "cuda:1"]) == {"cpu": 1, "cuda:3": 2, "cuda:1": 3}
    assert named({"cpu": 1}, ["cpu"]) == {"cpu": 1}


def test_that_a_model_over_its_budget_stays() -> None:
    async def main() -> None:
        machine = Machine(200)
        machine.sizes = {"a": 90}
        served = pool(machine, budget=100)
        await served.start()
        machine.held[machine.workers[0]] = 105
        await asyncio.sleep(300)
        assert (served.entry("a").state, served.entry("a").evictions) == ("ready", 0)
        assert served.ledger.booked() == {"cpu": 105}
        await served.aclose()

    run(main())


class SlowMachine(Machine):
    """Loads `a` in 600 seconds, of which 2 are expected."""

    def __init__(self) -> None:
        super().__init__()
        self.load_s = {"a": 600.0, "b": 1.0}

    def footprint(self, spec: ModelSpec, on_progress: Callable[..., Any]) -> Any:
        self.load_s["a"] = 2.0
        try:
            return super().footprint(spec, on_progress)
        finally:
            self.load_s["a"] = 600.0


def test_that_a_load_that_hangs_keeps_no_place() -> None:
    """Issue 11.10: others load after the time that it was expected to take."""

    async def main() -> None:
        served = pool(SlowMachine(), spec("a"), spec("b", preload=True))
        began = clock()
        starting = asyncio.create_task(served.start())
        await asyncio.sleep(0.1)
        assert (await answer(served, ask("b")))[0] == counted(5)
        assert clock() - began < 2 * 1.25 + 1 + 0.6
        await asyncio.sleep(0.1)
        assert served.ready
        await served.aclose()
        await asyncio.wait({starting})

    run(main())


def test_that_a_service_is_not_ready_while_its_only_model_loads() -> None:
    """Nor when the load takes longer than expected: no request could be answered yet."""

    async def main() -> None:
        served = pool(SlowMachine(), spec("a", preload=True))
        starting = asyncio.create_task(served.start())
        await asyncio.sleep(100)
        assert not served.ready
        await asyncio.sleep(600)
        assert served.ready
        await starting
        await served.aclose()

    run(main())


def test_that_what_does_not_queue_has_a_deadline_and_holds_the_end() -> None:
    """Counting waits for a load no longer than it may, and the pool's end waits for it."""

    async def main() -> None:
        machine = Machine()
        machine.load_s["a"] = 60.0
        served = pool(machine)
        cases: list[tuple[dict[str, Any], type[HeadraceError]]] = [
            ({"load_wait_s": 5.0}, Loading),
            ({"deadline_s": 3.0}, QueueTimeout),
        ]
        for given, error in cases:
            began = clock()
            request = CountRequest(text="abc", received=began, **given)
            with pytest.raises(error):
                await collect_count(served.ask(request))
            assert clock() - began <= 5
        await asyncio.sleep(70)
        gate = asyncio.Event()
        tokens = machine.workers[0]._tokens

        async def slow(request: Any) -> AsyncGenerator[Event, None]:
            await gate.wait()
            async for event in tokens(request):
                yield event

        machine.workers[0]._tokens = slow  # type: ignore[method-assign]
        counting = asyncio.create_task(collect_count(served.ask(CountRequest(text="abc"))))
        await asyncio.sleep(0.1)
        closing = asyncio.create_task(served.aclose(10))
        await asyncio.sleep(1)
        assert not closing.done()
        gate.set()
        assert (await counting).count == 3
        began = clock()
        await closing
        assert clock() - began < 1
        with pytest.raises(Draining):
            await collect_count(served.ask(CountRequest(text="abc")))

    run(main())


@pytest.mark.parametrize(
    ("own", "requests", "expected"),
    [
        (300.0, [0.0], 300.0),
        (300.0, [600.0, 0.0, 400.0], 600.0),
        (300.0, [None], 300.0),
        (-1.0, [600.0], -1.0),
        (0.0, [10.0], 10.0),
    ],
)
def test_that_a_client_only_lengthens_keep_alive(
    own: float, requests: list[float | None], expected: float
) -> None:
    """Issue 11.9: what one key asks for does not unload the model of the others."""

    async def main() -> None:
        served = pool(Machine(), spec(keep_alive=own))
        for wanted in requests:
            given: dict[str, Any] = {"keep_alive": wanted, "lengthens": wanted is not None}
            await answer(served, ask(**given))
        assert served.entry("a").keep_alive == expected
        await served.aclose()

    run(main())


def test_that_a_gpu_that_knows_our_processes_knows_all() -> None:
    """Issue 11.20: what NVML does not report of a process is 0, once it has reported one."""

    async def main() -> None:
        loader = pool(Machine()).loader
        planned = {"cpu": 10, "cuda:0": 80, "cuda:1": 80}
        # In a container, the driver does not know the processes: the estimate stays.
        assert loader._measured(planned, {"cpu": 12}) == {"cpu": 12, "cuda:0": 80, "cuda:1": 80}
        assert loader._measured(planned, {"cpu": 12, "cuda:1": 70}) == {"cpu": 12, "cuda:1": 70}
        assert loader._measured(planned, {"cpu": 12}) == {"cpu": 12}
        assert loader._measured(planned, {}) == planned

    run(main())


def test_that_the_ledger_follows_a_model_that_grows_on_any_device() -> None:
    """Issue 11.8: while it runs, and not at its load alone; a booking is never lowered."""

    async def main() -> None:
        machine = Machine()
        served = pool(machine)
        served.ledger.budgets["cuda:0"] = 50
        await served.start()
        worker = machine.workers[0]
        held: dict[str, int] = {}
        type(worker).held = property(lambda _: held)  # type: ignore[assignment]
        try:
            for now, booked in (({"cuda:0": 30}, 30), ({"cuda:0": 20, "cpu": 15}, 30)):
                held.update(now)
                await asyncio.sleep(1)
                assert served.ledger.booked()["cuda:0"] == booked
            assert served.ledger.booked()["cpu"] == 15
            assert served.entry("a").replicas[0].memory == {"cpu": 15, "cuda:0": 30}
        finally:
            type(worker).held = KNOWN_HELD  # type: ignore[assignment]
        await served.aclose()

    run(main())


class Encoder(Machine):
    """A machine whose models take 8 at their load, and 18 with their largest batch."""

    def footprint(self, spec: ModelSpec, on_progress: OnProgress) -> Footprint:
        need = super().footprint(spec, on_progress)
        return msgspec.structs.replace(need, devices={"cpu": 18}, parts={"batch": 10})


def test_that_what_requests_take_stays_booked_after_the_load() -> None:
    """Issue 11.8: a load of 8 does not show the batch, into which another model could be loaded."""

    async def main() -> None:
        machine = Encoder()
        machine.sizes = {"a": 8, "b": 8}
        served = pool(machine, spec("a"), spec("b", preload=False), budget=30)
        await served.start()
        assert served.entry("a").replicas[0].memory == {"cpu": 8}
        assert served.ledger.booked()["cpu"] == 18
        await answer(served, ask("b"))
        assert not served.entry("a").is_ready
        assert served.ledger.booked()["cpu"] == 18
        await served.aclose()

    run(main())
