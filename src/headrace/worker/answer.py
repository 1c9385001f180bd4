"""One request on a loaded engine, from its turn in the queue to its Finish."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator
from concurrent.futures import Executor
from typing import cast

import msgspec

from headrace.core.errors import (
    DeadlineExceeded,
    GenerationFailed,
    HeadraceError,
    InvalidRequest,
    OutOfMemory,
    Unsupported,
    from_record,
    to_record,
)
from headrace.core.events import Delta, Event, Finish, FinishReason, Progress
from headrace.core.metrics import DeviceUse, InferenceMetrics
from headrace.core.model import Task
from headrace.core.request import GenerateRequest
from headrace.core.stream import merge
from headrace.engines.base import (
    Admitted,
    Engine,
    EngineRequest,
    Generator,
    Pair,
    RawDelta,
    RawEvent,
)
from headrace.machine import Sampler
from headrace.text.pipeline import TextPipeline
from headrace.worker.admission import Admission
from headrace.worker.batching import Batcher
from headrace.worker.meter import Meter, figures, trace_of
from headrace.worker.prompt import Job, Prompter

log = logging.getLogger("headrace.worker")

_DOES: dict[Task, str] = {
    "generate": "generates text",
    "embed": "makes embeddings",
    "rerank": "ranks documents",
}


class Loaded(msgspec.Struct, frozen=True, kw_only=True):
    """What a loaded model consists of."""

    name: str
    engine_name: str
    engine: Engine
    prompter: Prompter
    admission: Admission
    sampler: Sampler
    embeddings: Batcher[tuple[int, ...], bytes]
    scores: Batcher[Pair, float]
    thread: Executor
    log_content: bool = False


class Answer:
    """The state of one request while it runs."""

    def __init__(self, loaded: Loaded, request: GenerateRequest) -> None:
        self._loaded = loaded
        self._request = request
        self._meter = Meter(request)
        self._watch = loaded.sampler.watch()
        self._reasons: list[FinishReason] = ["stop"] * request.n
        self._outcome: FinishReason = "cancelled"
        self._said: list[str] | None = [] if loaded.log_content else None
        started = request.deadline_s
        self._deadline = None if started is None else request.received + started

    async def events(self) -> AsyncGenerator[Event, None]:
        """Yield the whole stream.

        Raises:
            HeadraceError: with the figures up to then in its `metrics`.
        """
        stream: AsyncGenerator[Event, None] | None = None
        try:
            check_task(self._loaded, "generate")
            self._check_choices()
            job = await asyncio.to_thread(self._loaded.prompter.job, self._request)
            for index in range(self._request.n if job.echo else 0):
                yield Delta(text=job.echo, index=index)
            stream = self._choices(job)
            async for event in stream:
                yield event
            self._outcome = self._reasons[0]
            yield Finish(tuple(self._reasons), self._meter.usage, self._metrics())
        except Exception as error:  # a library can raise anything; see failure_of
            raise self._failed(failure_of(error, self._request.id)) from error
        finally:
            if stream is not None:
                await stream.aclose()
            log.info("headrace.request", extra={"data": self._record()})
            self._loaded.sampler.release(self._watch)

    def _choices(self, job: Job) -> AsyncGenerator[Event, None]:
        if self._request.answered:
            return self._resumed(job)
        streams = [
            self._choice(index, choice, TextPipeline(job.stops))
            for index, choice in enumerate(job.choices)
        ]
        return streams[0] if len(streams) == 1 else merge(streams)

    def _resumed(self, job: Job) -> AsyncGenerator[Event, None]:
        request, text = job.choices[0], TextPipeline(job.stops)
        self._meter.resumed(len(request.token_ids), len(request.answered))
        shown = text.feed(job.said.encode())
        self._say(shown)
        opening = Delta(shown, request.answered)
        if job.over is None and not text.stopped:
            return self._choice(0, request, text, opening)
        self._reasons[0] = job.over or "stop"
        return self._whole(opening, text)

    async def _whole(self, opening: Delta, text: TextPipeline) -> AsyncGenerator[Event, None]:
        yield opening
        if rest := self._rest(0, text):
            yield rest

    async def _choice(
        self, index: int, request: EngineRequest, text: TextPipeline, opening: Delta | None = None
    ) -> AsyncGenerator[Event, None]:
        admission, meter = self._loaded.admission, self._meter
        entered = await admission.enter(self._deadline)
        raw: AsyncGenerator[RawEvent, None] | None = None
        sent = 0
        try:
            if opening is not None:
                yield opening
            raw = cast("Generator", self._loaded.engine).generate(request)
            if self._deadline is not None:
                raw = _until(self._deadline, raw)
            async for event in raw:
                self._check()
                if isinstance(event, RawDelta):
                    shown, tokens = text.feed(event.data), len(event.token_ids)
                    sent += tokens
                    meter.delta(tokens, visible=bool(shown))
                    self._say(shown)
                    yield Delta(shown, event.token_ids, index, "", event.logprobs)
                    if text.stopped:
                        break
                elif isinstance(event, Admitted):
                    meter.admitted(len(request.token_ids), event.cached)
                    yield Progress("prefill", event.done, event.total)
                else:
                    self._reasons[index] = event.reason
                    missing = event.completion_tokens - sent
                    meter.correct(len(request.token_ids), missing, event.cached_tokens)
            if rest := self._rest(index, text):
                yield rest
        finally:
            if raw is not None:
                await raw.aclose()
            admission.leave(entered)

    def _record(self) -> dict[str, object]:
        record = {
            "id": self._request.id,
            **trace_of(self._request),
            **figures(self._metrics()),
        }
        if self._said is None:
            return record
        asked = self._request.messages or self._request.prompt
        return record | {"asked": asked, "answered": "".join(self._said)}

    def _rest(self, index: int, text: TextPipeline) -> Delta | None:
        rest = text.flush()
        self._say(rest)
        if text.stopped:
            self._reasons[index] = "stop"
        return Delta(rest, index=index) if rest else None

    def _say(self, text: str) -> None:
        if self._said is not None:
            self._said.append(text)

    def _check_choices(self) -> None:
        most = self._loaded.admission.max_running + self._loaded.admission.max_queued
        if self._request.n > most:
            raise InvalidRequest(f"n is at most {most} for this model.", param="n")

    def _check(self) -> None:
        self._loaded.admission.check()
        if self._deadline is not None and time.monotonic() > self._deadline:
            raise too_late()

    def _failed(self, error: HeadraceError) -> HeadraceError:
        # A new one: the same error can end many streams, each with figures of its own.
        self._outcome = "error"
        return from_record(msgspec.structs.replace(to_record(error), metrics=self._metrics()))

    def _metrics(self) -> InferenceMetrics:
        devices: tuple[DeviceUse, ...] = self._loaded.sampler.release(self._watch)
        return msgspec.structs.replace(
            self._meter.finish(self._outcome, devices),
            engine=self._loaded.engine_name,
            model=self._loaded.name,
            worker=self._loaded.name,
        )


async def _until(
    deadline: float, raw: AsyncGenerator[RawEvent, None]
) -> AsyncGenerator[RawEvent, None]:
    """Yield what the engine does. It is interrupted at the deadline, however silent it is."""
    try:
        while True:
            limit = asyncio.timeout(deadline - time.monotonic())
            try:
                async with limit:
                    event = await anext(raw, None)
            except TimeoutError as error:
                if limit.expired():
                    raise too_late() from error
                raise
            if event is None:
                return
            yield event
    finally:
        await raw.aclose()


def check_task(loaded: Loaded, task: Task) -> None:
    """Refuse what the model is not for.

    Raises:
        Unsupported: with what it is for.
    """
    tasks = loaded.engine.facts.capabilities.tasks
    if task not in tasks:
        does = " and ".join(_DOES[one] for one in sorted(tasks))
        raise Unsupported(f"{loaded.name} {does}; it is not for this.", param="model")


def failure_of(error: Exception, request_id: str) -> HeadraceError:
    """Return what an engine raised in terms of our own: a library can raise anything."""
    if isinstance(error, HeadraceError):
        return error
    if isinstance(error, MemoryError):
        return OutOfMemory("The engine ran out of memory.")
    data = {"id": request_id}
    log.error("headrace.engine.failed", exc_info=error, extra={"data": data})
    return GenerationFailed("The engine failed.", detail=f"{type(error).__name__}: {error}")


def too_late() -> DeadlineExceeded:
    """Return the error of one whose deadline has passed while it ran."""
    return DeadlineExceeded("The deadline passed before the answer was complete.")
