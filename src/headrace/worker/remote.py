"""A model of an upstream, as a worker in the process that serves."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable
from typing import cast

import msgspec

from headrace import engines
from headrace.core.errors import Draining, Unsupported
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
from headrace.engines.base import Engine, OpenRequest, RemoteEngine
from headrace.models.transfer import silent
from headrace.worker.admission import Admission
from headrace.worker.lifecycle import Lifecycle
from headrace.worker.remote_answer import Connected, RemoteAnswer
from headrace.worker.remote_vectors import embed, rerank
from headrace.worker.spec import (
    OnProgress,
    Resolve,
    WorkerSpec,
    open_request,
    resolved,
    unloaded_info,
)

log = logging.getLogger("headrace.worker")

OpenEngine = Callable[[str, OpenRequest], Engine]
_LAST_STEP_S = 5.0
_ROLES = ("system", "developer", "user", "assistant")


class RemoteWorker:
    """A Backend for one remote model. It holds no memory, and nothing of it can die."""

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
        self._resolve = resolve
        self._on_progress = on_progress or silent
        self._log_content = log_content
        self._open_engine = open_engine
        self._life = Lifecycle(spec.name)
        self._found: WorkerSpec | None = None
        self._info: ModelInfo | None = None
        self._connected: Connected | None = None
        self._answers: set[RemoteAnswer] = set()

    @property
    def state(self) -> State:
        """One of the states of contract W7."""
        return self._life.state

    @property
    def pid(self) -> None:
        """It has no process of its own."""
        return

    @property
    def load(self) -> tuple[int, int]:
        """How many requests run and how many wait."""
        admission = self._connected and self._connected.admission
        return (admission.running, admission.queued) if admission else (0, 0)

    def __repr__(self) -> str:
        """Tell the name, the state and the load."""
        running, queued = self.load
        return f"<RemoteWorker {self._life!r}, {running} running, {queued} queued>"

    async def start(self) -> None:
        """Check the options and find the key; nobody is connected to. Idempotent.

        Raises:
            HeadraceError: ConfigError, and what a library raises that is not there.
        """
        await self._life.start(self._load)

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        """Yield deltas and one Finish. Closing it cuts the upstream's stream."""
        answer = RemoteAnswer(self._ready(), request)
        self._answers.add(answer)
        events = answer.events()
        try:
            async for event in events:
                yield event
        finally:
            self._answers.discard(answer)
            await events.aclose()

    async def embed(self, request: EmbedRequest) -> EmbedResult:
        """Return a vector for each input, as the upstream makes them."""
        return await embed(self._ready(), request)

    async def rerank(self, request: RerankRequest) -> RerankResult:
        """Put documents in order, as the upstream does."""
        return await rerank(self._ready(), request)

    async def count_tokens(self, request: CountRequest) -> TokenCount:
        """Count at the upstream, or guess."""
        return await self._ready().engine.count_tokens(request)

    async def detokenize(self, request: DetokenizeRequest) -> str:
        """Refuse: only the upstream has the vocabulary.

        Raises:
            Unsupported: always.
        """
        raise Unsupported("The tokens of a remote model cannot be read here.", param="tokens")

    async def memory(self) -> dict[str, int]:
        """Return nothing: the model is elsewhere."""
        return {}

    def models(self) -> tuple[ModelInfo, ...]:
        """Return the metadata of the one model, at any time."""
        if self._info is None:
            return (unloaded_info(self.spec, self._life.state, self._life.reason, self._found),)
        return (msgspec.structs.replace(self._info, state=self._life.state),)

    async def aclose(self, drain_s: float = 0.0) -> None:
        """Refuse new requests, let running ones end within `drain_s` seconds, end the rest.

        Idempotent.
        """
        self._life.state = "draining"
        await self._life.abandon_start()
        connected, self._connected = self._connected, None
        if connected is not None:
            await self._drain(connected, drain_s)
            await connected.engine.aclose()
        self._life.state = "stopped"

    async def _drain(self, connected: Connected, drain_s: float) -> None:
        error, admission = Draining(f"{self.spec.name} is stopping."), connected.admission
        admission.close(error)
        if not await admission.idle(drain_s):
            admission.abort(error)
            for answer in self._answers:
                answer.hurry()
            await admission.idle(_LAST_STEP_S)

    def _ready(self) -> Connected:
        self._life.require_ready()
        if self._connected is None:
            raise Draining(f"{self.spec.name} is stopping.")
        return self._connected

    async def _load(self) -> None:
        began = time.monotonic()
        found = self._found = await resolved(self._resolve, self.spec, self._on_progress)
        opened = await asyncio.to_thread(self._open_engine, found.engine, open_request(found))
        engine = cast("RemoteEngine", opened)
        info = _info(found, engine)
        self._connected = Connected(
            name=self.spec.name,
            engine_name=found.engine,
            engine=engine,
            admission=Admission(info.max_running or 1, self.spec.max_queued),
            stops=self.spec.stop,
            log_content=self._log_content,
        )
        load_ms = (time.monotonic() - began) * 1000
        self._info = msgspec.structs.replace(info, load_ms=load_ms, created=int(time.time()))
        data = {"model": info.id, "source": info.source, "engine": info.engine}
        log.info("headrace.worker.ready", extra={"data": data | {"options": info.options}})


def _info(found: WorkerSpec, engine: RemoteEngine) -> ModelInfo:
    facts = engine.facts
    return msgspec.structs.replace(
        unloaded_info(found.model, "ready", None, found),
        device=facts.device,
        context_length=facts.context_length or None,
        max_running=facts.max_running,
        capabilities=facts.capabilities,
        roles=_ROLES if facts.capabilities.chat else (),
        notes=facts.notes,
    )
