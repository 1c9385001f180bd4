"""One loaded model in this process: the engine with all that an engine does not know."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import cast

import msgspec

from headrace import engines
from headrace.core.errors import Draining
from headrace.core.events import Event
from headrace.core.model import ModelInfo, ModelSpec, State
from headrace.core.request import (
    CountRequest,
    DetokenizeRequest,
    EmbedRequest,
    EmbedResult,
    GenerateRequest,
    RerankRequest,
    RerankResult,
    TokenCount,
)
from headrace.engines.base import Embedder, Engine, OpenRequest, Pair, Reranker
from headrace.machine import Sampler, system
from headrace.models.transfer import silent
from headrace.worker.admission import Admission
from headrace.worker.answer import Answer, Loaded
from headrace.worker.batching import Batcher, OnStep
from headrace.worker.encode import embed, rerank
from headrace.worker.lifecycle import Lifecycle
from headrace.worker.prompt import Prompter
from headrace.worker.spec import (
    OnProgress,
    Resolve,
    WorkerSpec,
    loaded_info,
    open_request,
    resolved,
    unloaded_info,
)

log = logging.getLogger("headrace.worker")

OpenEngine = Callable[[str, OpenRequest], Engine]
_LAST_STEP_S = 5.0


class Worker:
    """A Backend for one model. `start` loads it; `aclose` drains and frees it."""

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
        self._resolve = resolve
        self._on_progress = on_progress or silent
        self._log_content = log_content
        self._open_engine = open_engine
        self._life = Lifecycle(spec.name)
        self._found: WorkerSpec | None = None
        self._info: ModelInfo | None = None
        self._loaded: Loaded | None = None

    @property
    def state(self) -> State:
        """One of the states of contract W7."""
        return self._life.state

    @property
    def load(self) -> tuple[int, int]:
        """How many requests run and how many wait."""
        admission = self._loaded and self._loaded.admission
        return (admission.running, admission.queued) if admission else (0, 0)

    def __repr__(self) -> str:
        """Tell the name, the state and the load."""
        running, queued = self.load
        return f"<Worker {self._life!r}, {running} running, {queued} queued>"

    async def start(self) -> None:
        """Load the model. Idempotent; callers at the same time share one load.

        Raises:
            HeadraceError: LoadFailed, OutOfMemory, UnknownModel and their like; everything that
                was taken is given back, and the state is failed.
        """
        await self._life.start(self._load)

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        """Yield progress, deltas and one Finish. Closing it stops the engine."""
        events = Answer(self._ready(), request).events()
        try:
            async for event in events:
                yield event
        finally:
            await events.aclose()

    async def embed(self, request: EmbedRequest, on_step: OnStep | None = None) -> EmbedResult:
        """Return a vector for each input, computed together with other requests' inputs."""
        return await embed(self._ready(), request, on_step or _unseen)

    async def rerank(self, request: RerankRequest, on_step: OnStep | None = None) -> RerankResult:
        """Put documents in order, scored together with other requests' documents."""
        return await rerank(self._ready(), request, on_step or _unseen)

    async def count_tokens(self, request: CountRequest) -> TokenCount:
        """Count exactly, off the event loop and beside any generation."""
        token_ids = await asyncio.to_thread(self._ready().prompter.count, request)
        return TokenCount(count=len(token_ids), token_ids=token_ids)

    async def detokenize(self, request: DetokenizeRequest) -> str:
        """Return the text of token ids, off the event loop."""
        return await asyncio.to_thread(self._ready().engine.detokenize, request.token_ids)

    def models(self) -> tuple[ModelInfo, ...]:
        """Return the metadata of the one model, at any time."""
        if self._info is None or self._loaded is None:
            return (unloaded_info(self.spec, self._life.state, self._life.reason, self._found),)
        memory = self._loaded.sampler.latest[0].worker_used
        return (msgspec.structs.replace(self._info, state=self._life.state, memory=memory),)

    async def aclose(self, drain_s: float = 0.0) -> None:
        """Refuse new requests, let running ones end within `drain_s` seconds, end the rest.

        Idempotent. A load under way is given up.
        """
        self._life.state = "draining"
        await self._life.abandon_start()
        loaded, self._loaded = self._loaded, None
        if loaded is not None:
            await _drain(loaded, drain_s)
            loaded.sampler.close()
            await asyncio.to_thread(_free, loaded)
        self._life.state = "stopped"

    def _ready(self) -> Loaded:
        self._life.require_ready()
        if self._loaded is None:
            raise Draining(f"{self.spec.name} is stopping.")
        return self._loaded

    async def _load(self) -> None:
        began = time.monotonic()
        found = self._found = await resolved(self._resolve, self.spec, self._on_progress)
        log.info("headrace.worker.start", extra={"data": await asyncio.to_thread(_facts, found)})
        self._on_progress("loading", 0, 0)
        opening = asyncio.ensure_future(asyncio.to_thread(self._open, found))
        try:
            engine, prompter, info = await asyncio.shield(opening)
        except asyncio.CancelledError:
            # A thread cannot be cancelled: what it opens for nobody is closed again.
            opening.add_done_callback(_close_opened)
            raise
        admission = Admission(info.max_running or 1, self.spec.max_queued)
        thread, limits = ThreadPoolExecutor(1, "batches"), engine.facts.batch
        # Only those tasks come this way that the engine has.
        embedder, reranker = cast("Embedder", engine), cast("Reranker", engine)
        self._loaded = Loaded(
            name=self.spec.name,
            engine_name=found.engine,
            engine=engine,
            prompter=prompter,
            admission=admission,
            sampler=Sampler(device=engine.facts.device),
            embeddings=Batcher(lambda ids: embedder.embed(ids), len, limits, thread),
            scores=Batcher(lambda pairs: reranker.score(pairs), _length, limits, thread),
            thread=thread,
            log_content=self._log_content,
        )
        load_ms = (time.monotonic() - began) * 1000
        self._info = msgspec.structs.replace(info, load_ms=load_ms, created=int(time.time()))
        data = {"model": self.spec.name, "engine": found.engine, "load_ms": round(load_ms, 1)}
        log.info("headrace.worker.ready", extra={"data": data})

    def _open(self, found: WorkerSpec) -> tuple[Engine, Prompter, ModelInfo]:
        engine = self._open_engine(found.engine, open_request(found))
        try:
            prompter = Prompter(found.model, engine)
            return engine, prompter, loaded_info(found, engine.facts, prompter)
        except BaseException:
            engine.close()
            raise


def _facts(found: WorkerSpec) -> dict[str, object]:
    parameters = msgspec.to_builtins(found.model) | {
        "chat_template": bool(found.model.chat_template)
    }
    file = msgspec.structs.replace(found.file, chat_template=None)
    return {
        "model": found.model.name,
        "source": found.model.model,
        "engine": found.engine,
        "engine_reason": found.engine_reason,
        "parameters": parameters,
        "file": file,
        "system": system(),
    }


async def _drain(loaded: Loaded, drain_s: float) -> None:
    error = Draining(f"{loaded.name} is stopping.")
    loaded.admission.close(error)
    if not await loaded.admission.idle(drain_s):
        loaded.admission.abort(error)
        loaded.embeddings.abort(error)
        loaded.scores.abort(error)
        await loaded.admission.idle(_LAST_STEP_S)


def _free(loaded: Loaded) -> None:
    # A batch under way cannot be broken off.
    loaded.thread.shutdown()
    loaded.engine.close()


def _length(pair: Pair) -> int:
    return len(pair.token_ids)


def _close_opened(opening: asyncio.Future[tuple[Engine, Prompter, ModelInfo]]) -> None:
    if not opening.cancelled() and opening.exception() is None:
        opening.result()[0].close()


def _unseen(done: int, total: int) -> None:
    """Steps that nobody asked for."""
