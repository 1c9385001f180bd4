"""One request to an upstream, from its turn in the queue to its Finish."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator

import msgspec

from headrace.core.errors import (
    DeadlineExceeded,
    GenerationFailed,
    HeadraceError,
    InvalidRequest,
    Unsupported,
    from_record,
    to_record,
)
from headrace.core.events import Delta, Event, Finish, FinishReason
from headrace.core.metrics import InferenceMetrics, Usage
from headrace.core.model import Task
from headrace.core.request import EmbedRequest, GenerateRequest, RerankRequest
from headrace.engines.base import RemoteEngine, RemoteEvent, RemoteFinish
from headrace.engines.remote import estimated_count
from headrace.text.stops import StopMatcher
from headrace.worker.admission import Admission
from headrace.worker.meter import Meter, figures, trace_of
from headrace.worker.prompt import check_supported

log = logging.getLogger("headrace.worker")


class Connected(msgspec.Struct, frozen=True, kw_only=True):
    """What a remote model consists of."""

    name: str
    engine_name: str
    engine: RemoteEngine
    admission: Admission
    stops: tuple[str, ...] = ()
    log_content: bool = False


class Account:
    """The clock and the figures of one request to an upstream."""

    def __init__(
        self, connected: Connected, request: GenerateRequest | EmbedRequest | RerankRequest
    ) -> None:
        self._connected = connected
        self._request = request
        self._counted = 0
        self._usage: Usage | None = None
        self.meter = Meter(request)
        self.outcome: FinishReason = "cancelled"
        limit = request.deadline_s
        self.deadline = None if limit is None else request.received + limit

    def delta(self, delta: Delta) -> None:
        """Note a delta; a token for each of its log probabilities, else one."""
        tokens = len(delta.logprobs) or 1
        self._counted += tokens
        self.meter.delta(tokens, visible=bool(delta.text or delta.reasoning))

    def settle(self, usage: Usage) -> None:
        """Take the upstream's account instead of what was counted here."""
        self._usage = usage
        missing = usage.completion_tokens - self._counted
        self.meter.correct(usage.prompt_tokens, missing, usage.cached_tokens)

    def metrics(self) -> InferenceMetrics:
        """Return the figures as of now."""
        made = self.meter.finish(self.outcome)
        name = self._connected.name
        return msgspec.structs.replace(
            made,
            usage=self._usage or made.usage,
            engine=self._connected.engine_name,
            model=name,
            worker=name,
        )

    def failed(self, error: Exception) -> HeadraceError:
        """Return the error as our own, with the figures up to now."""
        self.outcome = "error"
        if not isinstance(error, HeadraceError):
            # Its text may hold what was sent to the upstream: nobody is told.
            kind = type(error).__name__
            data = {"id": self._request.id, "error": kind}
            log.error("headrace.engine.failed", extra={"data": data})
            error = GenerationFailed("The engine failed.", detail=kind)
        return from_record(msgspec.structs.replace(to_record(error), metrics=self.metrics()))

    def record(self) -> dict[str, object]:
        """Return what the log says of the request; `estimated` marks a count that is a guess."""
        guessed = {} if self._usage else {"usage": "estimated"}
        told = {**trace_of(self._request), **figures(self.metrics())}
        return {"id": self._request.id, **told, **guessed}


class RemoteAnswer:
    """The state of one request while it runs."""

    def __init__(self, connected: Connected, request: GenerateRequest) -> None:
        self._connected = connected
        self._request = request
        self._account = Account(connected, request)
        self._reasons: list[FinishReason] = ["stop"] * request.n
        self._stops = (*request.sampling.stop, *connected.stops)
        self._matchers = [StopMatcher(self._stops) for _ in range(request.n)]
        self._said: list[str] = []
        self._limit: asyncio.Timeout | None = None

    async def events(self) -> AsyncGenerator[Event, None]:
        """Yield the whole stream.

        Raises:
            HeadraceError: with the figures up to then in its `metrics`.
        """
        account, admission = self._account, self._connected.admission
        entered: float | None = None
        stream: AsyncGenerator[RemoteEvent, None] | None = None
        try:
            self._check()
            entered = await admission.enter(account.deadline)
            account.meter.admitted(estimated_count(self._request).count, 0)
            for index in range(self._request.n if self._request.echo else 0):
                yield Delta(str(self._request.prompt), index=index)
            stream = self._connected.engine.answer(self._asked())
            while (event := await self._step(stream)) is not None:
                for delta in self._take(event):
                    yield delta
                if all(matcher.matched is not None for matcher in self._matchers):
                    break
            for delta in self._rest():
                yield delta
            account.outcome = self._reasons[0]
            metrics = account.metrics()
            yield Finish(tuple(self._reasons), metrics.usage, metrics)
        except Exception as error:  # noqa: BLE001  # a library can raise anything; see `failed`
            raise account.failed(error) from None
        finally:
            if stream is not None:
                await stream.aclose()
            if entered is not None:
                admission.leave(entered)
            log.info("headrace.request", extra={"data": self._record()})

    def hurry(self) -> None:
        """Have it look now whether it is to end, however silent the upstream is."""
        if self._limit is not None:
            self._limit.reschedule(0.0)

    def _check(self) -> None:
        request, admission = self._request, self._connected.admission
        check_task(self._connected, "generate")
        check_supported(request, self._connected.engine.facts.capabilities)
        if request.n > admission.max_running + admission.max_queued:
            raise InvalidRequest("n is too large for this model.", param="n")
        if request.echo and (request.sampling.logprobs is not None or request.messages):
            raise Unsupported("Only a plain prompt can be echoed here.", param="echo")
        if request.echo and not isinstance(request.prompt, str):
            raise Unsupported("Token ids cannot be echoed here.", param="echo")

    def _asked(self) -> GenerateRequest:
        sampling = msgspec.structs.replace(self._request.sampling, stop=self._stops)
        return msgspec.structs.replace(self._request, sampling=sampling)

    async def _step(self, stream: AsyncGenerator[RemoteEvent, None]) -> RemoteEvent | None:
        """Wait for the next event, until the deadline or until somebody is in a hurry."""
        deadline, admission = self._account.deadline, self._connected.admission
        admission.check()
        left = None if deadline is None else deadline - time.monotonic()
        self._limit = limit = asyncio.timeout(left)
        try:
            async with limit:
                return await anext(stream, None)
        except TimeoutError:
            if not limit.expired():
                raise
        finally:
            self._limit = None
        admission.check()
        raise DeadlineExceeded("The deadline passed before the answer was complete.")

    def _take(self, event: RemoteEvent) -> list[Event]:
        if isinstance(event, Delta):
            return self._shown(event)
        if isinstance(event, RemoteFinish):
            self._reasons = list(event.finish_reasons)
            if event.usage is not None:
                self._account.settle(event.usage)
            return []
        return [event]

    def _shown(self, delta: Delta) -> list[Event]:
        matcher = self._matchers[delta.index]
        if matcher.matched is not None:
            return []
        self._account.delta(delta)
        text = matcher.feed(delta.text)
        self._say(text)
        shown = Delta(text, delta.token_ids, delta.index, delta.reasoning, delta.logprobs)
        return [shown] if text or shown.reasoning or shown.logprobs else []

    def _rest(self) -> list[Delta]:
        made: list[Delta] = []
        for index, matcher in enumerate(self._matchers):
            text = matcher.flush()
            self._say(text)
            if matcher.matched is not None:
                self._reasons[index] = "stop"
            if text:
                made.append(Delta(text, index=index))
        return made

    def _say(self, text: str) -> None:
        if self._connected.log_content:
            self._said.append(text)

    def _record(self) -> dict[str, object]:
        record = self._account.record()
        if not self._connected.log_content:
            return record
        asked = self._request.messages or self._request.prompt
        return record | {"asked": asked, "answered": "".join(self._said)}


def check_task(connected: Connected, task: Task) -> None:
    """Refuse what the model is not for.

    Raises:
        Unsupported: naming the task.
    """
    if task not in connected.engine.facts.capabilities.tasks:
        raise Unsupported(f"{connected.name} is not for the task {task}.", param="model")
