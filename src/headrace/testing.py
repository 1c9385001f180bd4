"""A Backend for tests: it plays scripts and needs no model.

A script is given a request and returns the steps of its answer:

    from headrace.core.events import Delta, Progress
    from headrace.core.request import GenerateRequest
    from headrace.core.stream import collect
    from headrace.testing import Barrier, ScriptedBackend, finish

    barrier = Barrier()
    backend = ScriptedBackend(
        lambda request: [Progress("prefill"), barrier, Delta("Hi", (1,)), finish()]
    )
    task = asyncio.create_task(collect(backend.ask(GenerateRequest(prompt="Hello"))))
    await barrier.reached.wait()
    assert backend.running == 1
    barrier.open()
    assert (await task).text == "Hi"
    assert backend.requests[0].prompt == "Hello"
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Iterator, Sequence
from typing import Any

from headrace.core.events import (
    Delta,
    Event,
    Finish,
    FinishReason,
    Ranked,
    Ranking,
    Scores,
    Text,
    TokenCount,
    Vectors,
    bytes_of,
)
from headrace.core.metrics import InferenceMetrics, Usage
from headrace.core.model import ModelInfo
from headrace.core.request import (
    AnyRequest,
    CountRequest,
    DetokenizeRequest,
    EmbedRequest,
    GenerateRequest,
    RerankRequest,
    ScoreRequest,
)

Step = Event | BaseException | Callable[[], Awaitable[object]]
"""An event is yielded, an exception is raised, a function is called and awaited."""

Script = Callable[[Any], Iterable[Step]]
"""Returns the steps of the answer to a request."""

MODEL = ModelInfo(id="m", source="builtin:m", engine="scripted", state="ready")


class Barrier:
    """A step at which streams wait until `open` is called; `reached` is set by the first of them.

    A barrier that is never opened holds a stream until it is closed.
    """

    def __init__(self) -> None:
        self.reached = asyncio.Event()
        self._opened = asyncio.Event()

    def open(self) -> None:
        """Let all streams pass, now and later."""
        self._opened.set()

    async def __call__(self) -> None:
        """Wait at the barrier."""
        self.reached.set()
        await self._opened.wait()


def finish(
    *reasons: FinishReason, usage: Usage | None = None, metrics: InferenceMetrics | None = None
) -> Finish:
    """Return a Finish; by default of one choice that stopped."""
    usage = usage or Usage()
    metrics = metrics or InferenceMetrics(started_at=0.0, usage=usage, engine="scripted")
    return Finish(reasons or ("stop",), usage, metrics)


def default_script(request: AnyRequest) -> Iterator[Step]:
    """Yield a plausible answer to any request.

    A choice is "Hello", a vector begins with the index of its input, the last document ranks
    first, and a text has as many tokens as characters.
    """
    match request:
        case GenerateRequest():
            yield from _choices(request)
            return
        case EmbedRequest():
            size = (request.dimensions or 4) - 1
            indices = range(len(request.inputs))
            yield Vectors(tuple(bytes_of([float(index), *[0.5] * size]) for index in indices))
        case RerankRequest():
            best = [Ranked(i, i / 8) for i in reversed(range(len(request.documents)))]
            yield Ranking(tuple(best[: request.top_n]))
        case ScoreRequest():
            yield Scores(tuple(place / 8 for place in range(len(request.pairs))))
        case CountRequest(as_text=True):
            yield Text("A conversation.")
        case CountRequest():
            ids = tuple(range(len(request.text or "")))
            yield TokenCount(count=len(ids), token_ids=ids)
        case DetokenizeRequest():
            yield Text(" ".join(map(str, request.token_ids)))
    yield finish()


def _choices(request: GenerateRequest) -> Iterator[Step]:
    for index in range(request.n):
        yield Delta("Hel", (1,), index)
        yield Delta("lo", (2,), index)
    reasons: list[FinishReason] = ["stop"] * request.n
    yield finish(*reasons, usage=Usage(prompt_tokens=1, completion_tokens=2 * request.n))


class ScriptedBackend:
    """A Backend that plays a script for each request.

    Other tasks run between any two steps. The steps are taken one by one, so a script that is a
    generator runs as far as its stream is read. `close_s` is how long the engine takes to release
    a stream that ends or is closed.

    `requests` are all requests in order, and `received` is set by the first. `running` streams
    are open now, and at most `peak` have been. `ended` has the ids of the requests whose streams
    have ended or been closed, in order. `closed` is whether the backend has been closed. `script`
    and `served` may be replaced at any time.
    """

    def __init__(
        self,
        script: Script = default_script,
        models: Sequence[ModelInfo] = (MODEL,),
        *,
        close_s: float = 0.0,
    ) -> None:
        self.script = script
        self.served = list(models)
        self.requests: list[AnyRequest] = []
        self.received = asyncio.Event()
        self.running = 0
        self.peak = 0
        self.ended: list[str] = []
        self.closed = False
        self._close_s = close_s

    async def ask(self, request: AnyRequest) -> AsyncGenerator[Event, None]:
        """Play the script of a request.

        Raises:
            BaseException: each one that is a step.
        """
        self.requests.append(request)
        self.received.set()
        self.running += 1
        self.peak = max(self.peak, self.running)
        try:
            for step in self.script(request):
                await asyncio.sleep(0)
                if isinstance(step, BaseException):
                    raise step
                if isinstance(step, Event):
                    yield step
                else:
                    await step()
        finally:
            self.running -= 1
            await asyncio.sleep(self._close_s)
            self.ended.append(request.id)

    def models(self) -> Sequence[ModelInfo]:
        """Return `served`."""
        return self.served

    async def aclose(self) -> None:
        """Mark the backend as closed."""
        self.closed = True
