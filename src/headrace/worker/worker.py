"""One model in this process, at a local engine or an upstream, and the states of a worker."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from typing import cast

import msgspec

from headrace import engines
from headrace.core.errors import Draining, HeadraceError, LoadFailed, Loading
from headrace.core.events import Event
from headrace.core.model import ModelInfo, ModelSpec, State
from headrace.core.request import (
    AnyRequest,
)
from headrace.core.values import masked
from headrace.engines.abilities import DraftSwitch
from headrace.engines.base import Embedder, Engine, OpenRequest, Pair, RemoteEngine, Reranker
from headrace.machine import Sampler, system
from headrace.models.transfer import silent
from headrace.text import renderer
from headrace.worker import count, encode, generate, remote
from headrace.worker.adapters import Adapters
from headrace.worker.batching import Batcher
from headrace.worker.compiler import Compiler
from headrace.worker.embed_prompts import embed_prompts
from headrace.worker.generate import Loaded
from headrace.worker.prompt import Prompter
from headrace.worker.remote import Connected
from headrace.worker.spec import (
    OnProgress,
    Resolve,
    WorkerSpec,
    loaded_info,
    open_request,
    remote_info,
    resolved,
    unloaded_info,
)
from headrace.worker.turn import Answers, Turns

log = logging.getLogger("headrace.worker")

OpenEngine = Callable[[str, OpenRequest], Engine]


_ANSWERS: Answers = {**generate.ANSWERS, **count.ANSWERS, **encode.ANSWERS}


class Lifecycle:
    """The states of a worker (contract W7).

    created -> loading -> ready -> draining -> stopped; failed from any of them, with a reason.
    `start` may be called at any time and concurrently: all callers share one load.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.state: State = "created"
        self.reason: str | None = None
        self._starting: asyncio.Task[None] | None = None

    async def start(self, load: Callable[[], Awaitable[None]]) -> None:
        """Run `load` unless the worker is ready or loading already.

        Raises:
            Draining: the worker is being stopped.
            HeadraceError: what `load` raised; the state is then failed.
        """
        if self.state == "ready":
            return
        if self.state == "draining":
            raise Draining(f"{self.name} is stopping.")
        if self._starting is None or self._starting.done():
            self.state, self.reason = "loading", None
            self._starting = asyncio.create_task(self._start(load), name=f"load {self.name}")
        # All callers share the load: a caller that is cancelled does not end it.
        try:
            await asyncio.shield(self._starting)
        except asyncio.CancelledError:
            if _is_cancelled():
                raise
            raise Draining(f"{self.name} was stopped while it was loading.") from None

    async def _start(self, load: Callable[[], Awaitable[None]]) -> None:
        try:
            await load()
        except HeadraceError as error:
            self.fail(error.message)
            raise
        except Exception as error:
            # Any call to the system can fail: a process, a socket, a directory.
            self.fail(f"{type(error).__name__}: {error}")
            raise LoadFailed(f"{self.name} could not be loaded.", detail=self.reason) from error
        except BaseException:
            self.fail("Loading was given up.")
            raise
        self.state = "ready"

    def fail(self, reason: str) -> None:
        """Enter `failed`, unless the worker is being stopped."""
        if self.state not in {"draining", "stopped"}:
            self.state, self.reason = "failed", reason

    async def abandon_start(self) -> None:
        """Cancel the current load, if any, and wait until it has ended."""
        task = self._starting
        if task is not None and not task.done():
            task.cancel()
            await asyncio.wait({task})
        if task is not None and not task.cancelled():
            task.exception()

    def require_ready(self) -> None:
        """Check that requests can be answered.

        Raises:
            Loading, Draining, LoadFailed: by state.
        """
        if self.state == "ready":
            return
        if self.state in {"draining", "stopped"}:
            raise Draining(f"{self.name} is {self.state}.")
        if self.state == "failed":
            raise LoadFailed(f"{self.name} has failed: {self.reason}")
        raise Loading(f"{self.name} is not ready: {self.state}.")

    def __repr__(self) -> str:
        """Describe the state and its reason."""
        return f"<{self.name} {self.state}{f': {self.reason}' if self.reason else ''}>"


def _is_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


class Worker:
    """A Backend for one model. `start` loads it; `aclose` drains and frees it.

    A remote model takes no memory here and cannot crash, so it needs no process of its own.
    """

    def __init__(
        self,
        spec: ModelSpec,
        resolve: Resolve,
        *,
        on_progress: OnProgress | None = None,
        log_content: bool = False,
        open_engine: OpenEngine = engines.open_engine,
    ) -> None:
        self.spec = spec
        self.died = asyncio.Event()
        self.failure: HeadraceError | None = None
        self._resolve = resolve
        self._on_progress = on_progress or silent
        self._log_content = log_content
        self._open_engine = open_engine
        self._life = Lifecycle(spec.name)
        self._resolved: WorkerSpec | None = None
        self._info: ModelInfo | None = None
        self._served: Loaded | Connected | None = None

    @property
    def state(self) -> State:
        """One of the states of contract W7."""
        return self._life.state

    @property
    def pid(self) -> None:
        """None: it has no process of its own."""
        return

    @property
    def load(self) -> tuple[int, int]:
        """How many slots are taken, and how many requests wait for one."""
        if self._served is None:
            return 0, 0
        return self._served.turns.slots.running, self._served.turns.slots.waiting

    def __repr__(self) -> str:
        """Describe the name, the state and the load."""
        running, waiting = self.load
        return f"<Worker {self._life!r}, {running} running, {waiting} waiting>"

    async def start(self) -> None:
        """Load the model, or find the upstream's key. Idempotent; callers share one load.

        Raises:
            HeadraceError: LoadFailed, OutOfMemory, UnknownModel, ...; all resources have been
                released, and the state is failed.
        """
        await self._life.start(self._load)

    def ask(self, request: AnyRequest) -> AsyncGenerator[Event, None]:
        """Return the events of an answer; see `Backend`. Closing the stream stops the engine."""
        served = self._served
        if served is None or self._life.state != "ready":
            return self._refuse()
        if isinstance(served, Loaded) and request.adapter:
            return _with_adapter(served, request)
        answers = remote.ANSWERS if served.is_remote else _ANSWERS
        return answers[type(request)](served, request)

    async def adapt(self, spec: ModelSpec) -> bool:
        """Serve a specification that has other adapters; see `PooledWorker`."""
        if not isinstance(served := self._served, Loaded):
            return False
        worker_spec = await resolved(self._resolve, spec, silent)
        if not await served.adapters.change(worker_spec.adapters):
            return False
        self.spec, self._resolved = spec, worker_spec
        return True

    def models(self) -> tuple[ModelInfo, ...]:
        """Return the metadata of the one model, at any time."""
        if self._info is None or self._served is None:
            return (unloaded_info(self.spec, self._life.state, self._life.reason, self._resolved),)
        sampler = self._served.sampler
        memory = None if sampler is None else sampler.latest[0].worker_used
        return (msgspec.structs.replace(self._info, state=self._life.state, memory=memory),)

    @property
    def held(self) -> Mapping[str, int]:
        """The memory of this process, if a local model is loaded, in bytes by device."""
        if self._served is None or (sampler := self._served.sampler) is None:
            return {}
        return {device.key: used for device in sampler.latest if (used := device.worker_used)}

    @property
    def drafting(self) -> bool | None:
        """As in `ReplicaStatus`."""
        engine = self._served.engine if self._served else None
        return engine.drafting if isinstance(engine, DraftSwitch) else None

    async def memory(self) -> dict[str, int]:
        """Return nothing: the memory belongs to the calling process, or to another machine."""
        return {}

    async def aclose(self, drain_s: float = 0.0) -> None:
        """Refuse new requests, let running ones end within `drain_s` seconds, end the rest.

        Idempotent. A load under way is cancelled.
        """
        self._life.state = "draining"
        await self._life.abandon_start()
        served, self._served = self._served, None
        if served is not None:
            try:
                await served.turns.drain(Draining(f"{self.spec.name} is stopping."), drain_s)
            finally:
                await _free(served)
        self._life.state = "stopped"

    def abandon(self) -> None:
        """Do nothing: there is no process that could outlive the event loop."""

    async def _refuse(self) -> AsyncGenerator[Event, None]:
        self._life.require_ready()
        raise Draining(f"{self.spec.name} is stopping.")
        yield  # pyright: ignore[reportUnreachable]  # makes this a generator

    async def _load(self) -> None:
        began = time.monotonic()
        worker_spec = self._resolved = await resolved(self._resolve, self.spec, self._on_progress)
        if worker_spec.file.format != "remote":
            facts = await asyncio.to_thread(_start_facts, worker_spec)
            log.info("headrace.worker.start", extra={"data": facts})
        self._on_progress("loading", 0, 0)
        opening = asyncio.ensure_future(asyncio.to_thread(self._open, worker_spec))
        try:
            self._served, info = await asyncio.shield(opening)
        except asyncio.CancelledError:
            # A thread cannot be cancelled: an engine that it opens too late is closed.
            opening.add_done_callback(_close_opened)
            raise
        load_ms = (time.monotonic() - began) * 1000
        self._info = msgspec.structs.replace(info, load_ms=load_ms, created=int(time.time()))
        data = {"model": self.spec.name, "engine": worker_spec.engine, "load_ms": round(load_ms, 1)}
        log.info("headrace.worker.ready", extra={"data": data})

    def _open(self, worker_spec: WorkerSpec) -> tuple[Loaded | Connected, ModelInfo]:
        """Open the engine. Blocking."""
        if open_request(worker_spec).task == "generate" and worker_spec.file.format != "remote":
            renderer.prepare()
        engine = self._open_engine(worker_spec.engine, open_request(worker_spec))
        if worker_spec.file.format == "remote":
            upstream = cast("RemoteEngine", engine)
            return self._connected(worker_spec, upstream), remote_info(worker_spec, upstream.facts)
        try:
            prompter = Prompter(worker_spec.model, engine)
            info = loaded_info(worker_spec, engine.facts, prompter)
        except BaseException:
            engine.close()
            raise
        return self._loaded(worker_spec, engine, prompter, info.max_running or 1), info

    def _connected(self, worker_spec: WorkerSpec, engine: RemoteEngine) -> Connected:
        slots = engine.facts.max_running or 1
        return Connected(
            name=self.spec.name,
            engine_name=worker_spec.engine,
            facts=engine.facts,
            turns=Turns(slots),
            max_choices=slots + self.spec.max_queued,
            compiler=Compiler(),
            log_content=self._log_content,
            prompts=embed_prompts(worker_spec.model, worker_spec.file),
            engine=engine,
            stops=self.spec.stop,
        )

    def _loaded(
        self, worker_spec: WorkerSpec, engine: Engine, prompter: Prompter, slots: int
    ) -> Loaded:
        thread, limits = ThreadPoolExecutor(1, "batches"), engine.facts.batch
        # Only tasks that the engine has are sent to them.
        embedder, reranker = cast("Embedder", engine), cast("Reranker", engine)
        return Loaded(
            name=self.spec.name,
            engine_name=worker_spec.engine,
            facts=engine.facts,
            turns=Turns(slots),
            max_choices=slots + self.spec.max_queued,
            compiler=Compiler(engine.facts.grammar_library),
            sampler=Sampler(
                device=worker_spec.service_name(engine.facts.device),
                name=worker_spec.service_name,
            ),
            log_content=self._log_content,
            engine=engine,
            adapters=Adapters(worker_spec.adapters, engine),
            prompter=prompter,
            embeddings=Batcher(lambda ids: embedder.embed(ids), len, limits, thread),
            scores=Batcher(lambda pairs: reranker.score(pairs), _length, limits, thread),
            prompts=embed_prompts(worker_spec.model, worker_spec.file)._replace(
                are_fixed=engine.facts.fixed_prompt
            ),
            thread=thread,
        )


async def _with_adapter(served: Loaded, request: AnyRequest) -> AsyncGenerator[Event, None]:
    with served.adapters.held(request.adapter) as name:
        request = msgspec.structs.replace(request, adapter=name)
        async with aclosing(_ANSWERS[type(request)](served, request)) as stream:
            async for event in stream:
                yield event


def _start_facts(worker_spec: WorkerSpec) -> dict[str, object]:
    parameters = msgspec.to_builtins(worker_spec.model) | {
        "chat_template": bool(worker_spec.model.chat_template),
        "env": masked("env", worker_spec.model.env),
    }
    file = msgspec.structs.replace(worker_spec.file, chat_template=None)
    return {
        "model": worker_spec.model.name,
        "source": worker_spec.model.model,
        "engine": worker_spec.engine,
        "engine_reason": worker_spec.engine_reason,
        "parameters": parameters,
        "file": file,
        "system": system(),
    }


async def _free(served: Loaded | Connected) -> None:
    await served.compiler.aclose()
    if isinstance(served, Connected):
        await served.engine.aclose()
        return
    if served.sampler is not None:
        served.sampler.close()
    # A batch under way cannot be interrupted.
    await asyncio.to_thread(served.thread.shutdown)
    await asyncio.to_thread(served.engine.close)


def _length(pair: Pair) -> int:
    return len(pair.token_ids)


def _close_opened(opening: asyncio.Future[tuple[Loaded | Connected, ModelInfo]]) -> None:
    if opening.cancelled() or opening.exception() is not None:
        return
    served, _ = opening.result()
    if isinstance(served, Loaded):
        served.engine.close()
