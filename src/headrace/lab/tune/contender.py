"""One engine with one set of options, in a process of its own, and its measurements."""

from __future__ import annotations

import asyncio
import contextlib
import math
import statistics
import time
from collections.abc import AsyncGenerator, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from headrace import engines
from headrace.core.errors import HeadraceError
from headrace.core.model import ModelFile, ModelSpec
from headrace.engines.measured import Agreement, Figures, Trial
from headrace.lab.figures import percentile
from headrace.lab.tune.agreement import Reference
from headrace.lab.tune.measure import Bound, Shape, Turn, turn
from headrace.roofline import limit
from headrace.worker.process import WorkerProcess
from headrace.worker.spec import OnProgress, Resolve, open_request, resolved

NO_TIME = "no time was left for it"
_WARM_TOKENS = 8
_OF_TURNS = 0.85


class Contender:
    """An engine that loads a model as in a service, and is measured; an error is its `fault`.

    `left_out` is the reason why it was not measured to the end.
    """

    def __init__(self, spec: ModelSpec, variant: dict[str, Any], resolve: Resolve) -> None:
        self.spec = spec
        self.variant = variant
        self.fault: str | None = None
        self.left_out: str | None = None
        self.agreement: Agreement | None = None
        self.load_s: float | None = None
        self.file: ModelFile | None = None
        self.turns: dict[int, list[Turn]] = {}
        self.memory: dict[str, int] = {}
        self._resolve = resolve
        self._tokens = 0
        self._worker: WorkerProcess | None = None

    @property
    def engine(self) -> str:
        """The engine's name."""
        assert self.spec.engine is not None, "a contender has an engine"
        return self.spec.engine

    @property
    def can_win(self) -> bool:
        """Whether nothing speaks against it so far."""
        return self.fault is None and self.left_out is None

    @property
    def is_loaded(self) -> bool:
        """Whether it holds its model now."""
        return self._worker is not None

    def __repr__(self) -> str:
        """Show the engine and its options."""
        return f"<Contender {self.engine} {self.variant}>"

    async def prepare(
        self, file: ModelFile, home: Path, budgets: dict[str, int], report: OnProgress
    ) -> None:
        """Convert the model if this engine needs another format, and check that it fits."""
        with self._catching():
            await asyncio.to_thread(engines.convert, self.engine, file, home, report)
            work = await resolved(self._resolve, self.spec, report)
            self.file = work.file
            need = await asyncio.to_thread(engines.footprint, self.engine, open_request(work))
            over = [name for name, size in need.devices.items() if size > budgets.get(name, size)]
            if over:
                self.fault = f"it does not fit into the memory of {', '.join(over)}"

    @contextlib.asynccontextmanager
    async def loaded(self, *, keep: bool) -> AsyncGenerator[WorkerProcess]:
        """Yield its worker, loaded; afterwards it stays loaded only with `keep`.

        Raises:
            HeadraceError: it could not be loaded.
        """
        worker = self._worker or WorkerProcess(self.spec, self._resolve)
        self._worker = worker
        try:
            if worker.state != "ready":
                await worker.start()
                load_s = (worker.models()[0].load_ms or 0.0) / 1000
                self.load_s = min(load_s, self.load_s or load_s)
            yield worker
        except BaseException:
            keep = False
            raise
        finally:
            if not keep:
                await self.aclose()

    async def try_out(
        self, shape: Shape, least: Mapping[int, float], limit_s: float, *, keep: bool
    ) -> None:
        """Load it and take a first turn with each number of streams, in `limit_s` seconds.

        A turn is cut when it is slower than `least` has for its number of streams.
        """
        end = time.monotonic() + limit_s
        with self._catching(end, only_late=True):
            async with asyncio.timeout_at(_loop_time(end)), self.loaded(keep=keep) as worker:
                bound = Bound(limit_s * _OF_TURNS)
                await turn(worker, 2, Shape(seconds=0, tokens=_WARM_TOKENS), "warm", bound)
                self.memory = await worker.memory()
                for place, streams in enumerate(shape.streams):
                    # The last part of the time is for the end of requests that are cut.
                    left = (end - time.monotonic()) * _OF_TURNS / (len(shape.streams) - place)
                    bound = Bound(left, least.get(streams, 0.0))
                    await self._turn(worker, streams, shape, 0, bound)

    async def judge(self, reference: Reference, limit_s: float, *, keep: bool) -> None:
        """Compare its answers with the reference's."""
        end = time.monotonic() + limit_s
        with self._catching(end):
            async with asyncio.timeout_at(_loop_time(end)), self.loaded(keep=keep) as worker:
                self.agreement = await reference.compare(worker)
                self.fault = self.agreement.fault()

    async def measure(self, shape: Shape, number: int, limit_s: float, *, keep: bool) -> None:
        """Take one turn with each number of streams, of a round; one that is cut does not count."""
        end = time.monotonic() + limit_s
        with self._catching(end, only_late=True):
            async with asyncio.timeout_at(_loop_time(end)), self.loaded(keep=keep) as worker:
                for streams in shape.streams:
                    bound = Bound((end - time.monotonic()) * _OF_TURNS)
                    await self._turn(worker, streams, shape, number, bound)

    async def _turn(
        self, worker: WorkerProcess, streams: int, shape: Shape, number: int, bound: Bound
    ) -> None:
        done, self._tokens = Turn(), shape.tokens
        try:
            await turn(worker, streams, shape, f"{number} {streams}", bound, done)
        except asyncio.CancelledError:
            # The time was over while the requests of a turn that was cut came to their end.
            if done.cut:
                self._keep(streams, done)
            raise
        self._keep(streams, done)

    def _keep(self, streams: int, done: Turn) -> None:
        turns = self.turns.setdefault(streams, [])
        # What was cut tells how fast it is at most, until there is a whole turn.
        if not turns or not done.cut:
            turns[:] = [*(each for each in turns if not each.cut), done]
        for name, size in done.memory.items():
            self.memory[name] = max(size, self.memory.get(name, 0))

    def expected_s(self, streams: int) -> float:
        """Return how long a turn takes, from the last one; 0 if there was none."""
        if not (turns := self.turns.get(streams)):
            return 0.0
        last = turns[-1]
        return self._tokens * streams / (last.rate or 1e-3) if last.cut else last.seconds

    def whole(self, streams: int) -> int:
        """Return how many turns were not cut."""
        return sum(not each.cut for each in self.turns.get(streams, ()))

    async def aclose(self) -> None:
        """Unload the model. Idempotent."""
        worker, self._worker = self._worker, None
        if worker is not None:
            await worker.aclose()

    def rate(self, streams: int) -> float:
        """Return the median of output tokens/s, 0 without any turn."""
        return statistics.median(self.rates(streams) or [0.0])

    def rates(self, streams: int) -> list[float]:
        """Return output tokens/s of each turn."""
        return [turn.rate for turn in self.turns.get(streams, [])]

    def trial(self, bandwidth: float | None, tokens: int) -> Trial:
        """Return its measurements for the record; `tokens` is the length of the answers."""
        return Trial(
            engine=self.engine,
            version=engines.version(self.engine),
            options=self.variant,
            precision=self.file.quantization if self.file else None,
            load_s=self.load_s,
            memory=self.memory,
            agreement=self.agreement,
            figures=tuple(
                self._figures(streams, turns, bandwidth, tokens)
                for streams, turns in sorted(self.turns.items())
                if turns[-1].cut != "slow" and turns[-1].tokens
            ),
            fault=self.fault,
            left_out=self.left_out,
        )

    def _figures(
        self, streams: int, turns: Sequence[Turn], bandwidth: float | None, tokens: int
    ) -> Figures:
        rates = [turn.rate for turn in turns]
        first = [second * 1000 for turn in turns for second in turn.first_s] or [0.0]
        cached = sum(turn.prompt_tokens for turn in turns) / len(first) + tokens / 2
        allowed = limit(self.file, streams, cached, bandwidth) if self.file and bandwidth else None
        return Figures(
            streams=streams,
            tokens_per_s=statistics.median(rates),
            spread=(min(rates), max(rates)),
            first_token_ms_p50=statistics.median(first),
            first_token_ms_p99=percentile(first, 99),
            of_limit=statistics.median(rates) / allowed if allowed else None,
            rates=tuple(rates),
        )

    @contextlib.contextmanager
    def _catching(self, end: float = math.inf, *, only_late: bool = False) -> Generator[None]:
        """Note an error as its fault; `only_late` keeps what was measured where time ran out."""
        try:
            yield
        except HeadraceError as error:
            self.fault = error.message
        except TimeoutError:
            if time.monotonic() < end:
                raise
            is_measured = any(turns[-1].tokens for turns in self.turns.values())
            if not (only_late and is_measured):
                self.left_out = NO_TIME


def _loop_time(end: float) -> float:
    """Return a time of `time.monotonic` by the clock of the event loop."""
    return asyncio.get_running_loop().time() + end - time.monotonic()


def make_contender(
    spec: ModelSpec, engine: str, options: dict[str, Any], resolve: Resolve, streams: int
) -> Contender:
    """Return an engine with its options; those that the user has set take precedence."""
    known = engines.options(engine).model_fields
    own = {key: value for key, value in spec.options.items() if key in known}
    as_served = msgspec.structs.replace(
        spec,
        engine=engine,
        options={**options, **own},
        max_queued=max(spec.max_queued, streams),
    )
    return Contender(as_served, options, resolve)
