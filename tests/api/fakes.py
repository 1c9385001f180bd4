"""A scripted Backend, and ways to call an application."""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from typing import Any

import httpx

from headrace.api.app import create_app
from headrace.api.settings import ApiSettings
from headrace.core.errors import UnknownModel
from headrace.core.events import Delta, Event, Finish, FinishReason
from headrace.core.metrics import Gaps, InferenceMetrics, Usage
from headrace.core.model import ModelInfo
from headrace.core.request import CountRequest, DetokenizeRequest, GenerateRequest, TokenCount

USAGE = Usage(prompt_tokens=5, cached_tokens=2, completion_tokens=3)
METRICS = InferenceMetrics(
    started_at=1.0,
    queue_ms=1.5,
    prefill_ms=2.5,
    time_to_first_token_ms=4.0,
    time_per_output_token_ms=3.0,
    inter_token_ms=Gaps(p50=1, p99=2, max=3),
    total_ms=9.0,
    chunks=3,
    usage=USAGE,
    engine="fake",
    model="m",
    outcome="ok",
)
Script = Callable[[GenerateRequest], Iterable[Any]]


def finish(*reasons: FinishReason) -> Finish:
    return Finish(reasons or ("stop",), USAGE, METRICS)


def hello(request: GenerateRequest) -> Iterable[Any]:
    for index in range(request.n):
        yield Delta("Hel", (1,), index)
        yield Delta("", (2,), index)
        yield Delta('lo\n"ü', (3,), index)
    reasons: list[FinishReason] = ["stop"] * request.n
    yield finish(*reasons)


class FakeBackend:
    """Plays a script: events are yielded, exceptions raised, awaitable makers awaited."""

    def __init__(self, script: Script = hello, models: Sequence[ModelInfo] = ()) -> None:
        self.script = script
        self.requests: list[GenerateRequest] = []
        self.counted: list[CountRequest] = []
        self.running = 0
        self.peak = 0
        self.closed = 0
        self.served = list(models) or [
            ModelInfo(id="m", source="/secret/m", engine="fake", state="ready", aliases=("best",)),
            ModelInfo(id="org/big", source="hub:org/big", engine="fake", state="ready"),
        ]

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        self.requests.append(request)
        self.running += 1
        self.peak = max(self.peak, self.running)
        try:
            for step in self.script(request):
                if isinstance(step, BaseException):
                    raise step
                if inspect.isroutine(step):
                    await step()
                else:
                    yield step
        finally:
            self.running -= 1
            # An engine needs a moment to let go; whoever closes has to wait for it.
            await asyncio.sleep(0.01)
            self.closed += 1

    async def count_tokens(self, request: CountRequest) -> TokenCount:
        self.counted.append(request)
        if request.model == "none":
            raise UnknownModel("No such model.")
        return TokenCount(count=3, token_ids=(7, 8, 9))

    async def detokenize(self, request: DetokenizeRequest) -> str:
        return " ".join(map(str, request.token_ids))

    def models(self) -> Sequence[ModelInfo]:
        return self.served

    async def aclose(self) -> None:
        return None


def client(
    backend: FakeBackend | None = None, ready: Callable[[], bool] | None = None, **settings: Any
) -> httpx.AsyncClient:
    app = create_app(backend or FakeBackend(), ApiSettings(**settings), ready=ready)
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost")


CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": "hi"}], **fields}


def text(prompt: Any = "hi", **fields: Any) -> dict[str, Any]:
    return {"model": "m", "prompt": prompt, **fields}


def events(body: str) -> list[Any]:
    """The `data:` payloads of a stream; `[DONE]` stays a string."""
    lines = [block for block in body.split("\n\n") if block.startswith("data: ")]
    payloads = [line.removeprefix("data: ") for line in lines]
    return [one if one == "[DONE]" else json.loads(one) for one in payloads]
