"""A pool on a clock of its own: fake workers, fake memory, and time that passes at once."""

from __future__ import annotations

import asyncio
import contextlib
import selectors
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Self

import msgspec

from headrace.core.errors import Draining, HeadraceError, LoadFailed, WorkerDied
from headrace.core.events import Delta, Event, Finish, Ranked, Ranking, Text, TokenCount, Vectors
from headrace.core.metrics import InferenceMetrics, Usage
from headrace.core.model import Capabilities, ModelInfo, ModelSpec, State
from headrace.core.request import (
    AnyRequest,
    CountRequest,
    DetokenizeRequest,
    EmbedRequest,
    GenerateRequest,
    RerankRequest,
)
from headrace.core.sampling import Sampling
from headrace.core.status import Footprint
from headrace.pool.ledger import Ledger
from headrace.pool.policy import Rules
from headrace.pool.pool import Pool
from headrace.worker.spec import OnProgress

GIB = 1 << 30
LINGER_S = 15.0


class _Selector(selectors.SelectSelector):
    """Instead of waiting, lets the loop's time pass."""

    loop: TimeLoop

    def select(self, timeout: float | None = None) -> Any:
        ready = super().select(0)
        if not ready and timeout is None:
            raise AssertionError("everything waits, and nothing will ever happen")
        if not ready and timeout:
            self.loop.now += timeout
        return ready


class _Inline(ThreadPoolExecutor):
    """Runs everything where it is asked for."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:  # noqa: BLE001 - as an executor does
            future.set_exception(error)
        return future


class TimeLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock jumps to the next thing that is due."""

    def __init__(self) -> None:
        self.now = 1000.0
        selector = _Selector()
        selector.loop = self
        super().__init__(selector)
        self.set_default_executor(_Inline())

    def time(self) -> float:
        return self.now

    async def shutdown_default_executor(self, timeout: float | None = None) -> None:  # noqa: ASYNC109
        """Do nothing: it has no threads, and asyncio would start one to wait for them."""


def run(main: Coroutine[Any, Any, Any], within_s: float = 100_000) -> Any:
    """Run on a loop of its own, for so many of its seconds at most."""
    with asyncio.Runner(loop_factory=TimeLoop) as runner:
        return runner.run(asyncio.wait_for(main, within_s))


class Machine:
    """What the fakes share: memory that is really taken, and what is to go wrong."""

    def __init__(self, total: int = 100) -> None:
        self.total = total
        self.foreign = 0
        self.held: dict[FakeWorker, int] = {}
        self.peak = 0
        self.loading = self.most_loading = 0
        self.loads = 0
        self.adapts = False
        self.sizes: dict[str, int] = {}
        self.load_s: dict[str, float] = {}
        self.fail_load: dict[str, HeadraceError] = {}
        self.workers: list[FakeWorker] = []
        self.crashes: list[tuple[float, int]] = []

    def read(self) -> Mapping[str, tuple[int, int]]:
        used = self.foreign + sum(self.held.values())
        return {"cpu": (self.total, self.total - used)}

    def take(self, worker: FakeWorker, size: int) -> None:
        self.held[worker] = size
        self.peak = max(self.peak, sum(self.held.values()))

    def footprint(self, spec: ModelSpec, on_progress: OnProgress) -> Footprint:
        on_progress("looking", 0, 0)
        return Footprint(
            devices={"cpu": self.size_of(spec)},
            parts={"adapters": len(spec.adapters)},
            load_s=self.load_s.get(spec.name, 1.0),
            max_running=spec.max_running or 2,
        )

    def size_of(self, spec: ModelSpec) -> int:
        """Return the size of a model, and 1 for each of its adapters."""
        return self.sizes.get(spec.name, 10) + len(spec.adapters)

    def remember(self, spec: ModelSpec, devices: dict[str, int], load_s: float) -> None:
        assert devices
        assert load_s >= 0

    def without_file(self, spec: ModelSpec) -> Self:
        return self

    def largest_context(self, spec: ModelSpec, budgets: dict[str, int]) -> int | None:
        return 4096


def clock() -> float:
    return asyncio.get_running_loop().time()


class FakeWorker:
    """Says `max_tokens` tokens, one each 0.1 s; the ids and the text count them."""

    def __init__(self, spec: ModelSpec, machine: Machine) -> None:
        self.spec = spec
        self.machine = machine
        self.died = asyncio.Event()
        self.freed = asyncio.Event()
        self.killed = asyncio.Event()
        """Set it to end the process while it loads."""
        self.state: State = "created"
        self.pid = 1
        self.running = 0
        self.reason: str | None = None
        self.failure: HeadraceError | None = None
        self.broken: HeadraceError | None = None
        self.late: HeadraceError | None = None
        self.refuses = False
        self.asked: list[GenerateRequest] = []
        machine.workers.append(self)

    @property
    def max_running(self) -> int:
        return self.spec.max_running or 2

    async def start(self) -> None:
        machine, name = self.machine, self.spec.name
        machine.loads += 1
        machine.loading += 1
        machine.most_loading = max(machine.most_loading, machine.loading)
        machine.take(self, machine.size_of(self.spec))
        self.state = "loading"
        try:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.killed.wait(), machine.load_s.get(name, 1.0))
                raise LoadFailed(f"The worker of {name} was killed by SIGKILL while loading.")
            if name in machine.fail_load:
                raise machine.fail_load[name]
        except BaseException:
            self.state = "failed"
            machine.held.pop(self, None)
            raise
        finally:
            machine.loading -= 1
        self.state = "ready"

    drafting: bool | None = None

    @property
    def held(self) -> Mapping[str, int]:
        return {"cpu": self.machine.held[self]} if self in self.machine.held else {}

    async def adapt(self, spec: ModelSpec) -> bool:
        """Take and drop adapters, of one size each; one whose file is "bad" is refused."""
        machine = self.machine
        if not machine.adapts:
            return False
        try:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.died.wait(), 0.1)
                raise WorkerDied("was killed")
        except asyncio.CancelledError:
            # Its process goes on with it.
            self.spec = spec
            machine.take(self, machine.size_of(spec))
            raise
        if self.refuses or any(adapter.source == "bad" for adapter in spec.adapters.values()):
            raise LoadFailed("The library refused it.")
        self.spec = spec
        machine.take(self, machine.size_of(spec))
        return True

    async def memory(self) -> dict[str, int]:
        return {"cpu": self.machine.held[self]} if self in self.machine.held else {}

    def ask(self, request: AnyRequest) -> AsyncGenerator[Event, None]:
        match request:
            case GenerateRequest():
                return self._generate(request)
            case EmbedRequest() | RerankRequest():
                return self._encode(request)
            case CountRequest() | DetokenizeRequest():
                return self._tokens(request)
            case _:
                raise AssertionError("no test asks for it")

    async def _generate(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        if self.state != "ready":
            raise Draining("not ready") if self.state == "stopped" else LoadFailed("not ready")
        self.asked.append(request)
        self.running += 1
        assert self.running <= self.max_running, "more than it has slots for"
        count, start = request.sampling.max_tokens or 5, len(request.answered)
        try:
            if start:
                yield Delta("".join(f"{n} " for n in range(start)), tuple(range(start)))
            for number in range(start, count):
                await asyncio.sleep(0.1)
                if self.broken is not None:
                    raise self.broken
                yield Delta(f"{number} ", (number,))
            usage = Usage(prompt_tokens=1, completion_tokens=count)
            metrics = InferenceMetrics(started_at=0.0, usage=usage, load_ms=request.load_ms)
            yield Finish(("length",), usage, metrics)
            if self.late is not None:
                raise self.late
        finally:
            self.running -= 1

    async def _encode(self, request: EmbedRequest | RerankRequest) -> AsyncGenerator[Event, None]:
        """Take 0.1 s for each input; its vector is its length, and the first ranks best."""
        self.running += 1
        assert self.running <= self.max_running, "more than it has slots for"
        inputs = request.inputs if isinstance(request, EmbedRequest) else request.documents
        try:
            await asyncio.sleep(0.1 * len(inputs))
            if self.broken is not None:
                raise self.broken
        finally:
            self.running -= 1
        usage = Usage(prompt_tokens=len(inputs))
        if isinstance(request, EmbedRequest):
            yield Vectors(tuple(bytes([len(text), 0, 0, 0]) for text in inputs))
        else:
            yield Ranking(tuple(Ranked(place, -float(place)) for place in range(len(inputs))))
        metrics = InferenceMetrics(started_at=0.0, usage=usage, load_ms=request.load_ms)
        yield Finish(("stop",), usage, metrics)

    async def _tokens(
        self, request: CountRequest | DetokenizeRequest
    ) -> AsyncGenerator[Event, None]:
        if isinstance(request, CountRequest):
            yield TokenCount(count=len(request.text or ""))
        else:
            yield Text(" ".join(map(str, request.token_ids)))
        yield Finish(("stop",), Usage(), InferenceMetrics(started_at=0.0))

    def models(self) -> tuple[ModelInfo, ...]:
        info = ModelInfo(
            id=self.spec.name,
            source=self.spec.model,
            engine="fake",
            state=self.state,
            reason=self.reason,
            max_running=self.max_running,
            capabilities=Capabilities(batch_invariant=True, resume=True),
            memory=self.machine.held.get(self),
        )
        return (info,)

    async def aclose(self, drain_s: float = 0.0) -> None:
        self.broken = self.broken or Draining("stopping")
        await asyncio.sleep(0.05)
        if self.died.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.freed.wait(), LINGER_S)
        else:
            self.machine.held.pop(self, None)
        self.state = "stopped"

    def _free(self) -> None:
        self.machine.held.pop(self, None)
        self.freed.set()

    def abandon(self) -> None:
        raise AssertionError("the loop is there")

    def die(self, reason: str = "was killed by SIGKILL", *, linger_s: float = 0.0) -> None:
        """End as a killed process does; its memory is free after `linger_s`."""
        self.reason = self.reason or reason
        self.broken = self.failure = WorkerDied(reason, detail="the last lines of stderr")
        if linger_s:
            asyncio.get_running_loop().call_later(linger_s, self._free)
        else:
            self._free()
        self.state = "failed"
        self.died.set()


def spec(name: str = "a", **given: Any) -> ModelSpec:
    return ModelSpec(**{"name": name, "model": f"builtin:{name}", **given})


def pool(machine: Machine, *specs: ModelSpec, budget: int | None = None, **rules: Any) -> Pool:
    def worker(one: ModelSpec, _report: OnProgress) -> FakeWorker:
        return FakeWorker(one, machine)

    return with_pool(machine, worker, *specs, budget=budget, **rules)


def with_pool(
    machine: Machine,
    worker: Callable[[ModelSpec, OnProgress], FakeWorker],
    *specs: ModelSpec,
    budget: int | None = None,
    **rules: Any,
) -> Pool:
    ledger = Ledger({"cpu": machine.total if budget is None else budget}, machine.read)
    return Pool(
        specs or (spec(),),
        worker,
        sizing=machine,
        ledger=ledger,
        rules=Rules(**rules),
        clock=clock,
    )


def ask(model: str = "a", tokens: int = 5, **given: Any) -> GenerateRequest:
    sampling = Sampling(max_tokens=tokens, temperature=given.pop("temperature", 0.0))
    return GenerateRequest(
        **{"model": model, "prompt": "x", "sampling": sampling, "received": clock(), **given}
    )


async def answer(pool: Pool, request: GenerateRequest) -> tuple[str, Finish]:
    """Return the text and the Finish of one answer."""
    text, last = "", None
    stream = pool.ask(request)
    try:
        async for event in stream:
            assert last is None, "something after the Finish"
            if isinstance(event, Delta):
                text += event.text
            elif isinstance(event, Finish):
                last = event
    finally:
        await stream.aclose()
    assert last is not None
    return text, last


def counted(tokens: int) -> str:
    return "".join(f"{number} " for number in range(tokens))


def with_tokens(request: GenerateRequest, tokens: int) -> GenerateRequest:
    return msgspec.structs.replace(request, sampling=Sampling(max_tokens=tokens, temperature=0.0))
