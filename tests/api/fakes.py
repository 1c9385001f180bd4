"""A scripted Backend, and ways to call an application."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from typing import Any

import httpx
from msgspec.structs import replace

from headrace.api.app import create_app
from headrace.api.limits import ApiSettings
from headrace.core.errors import ConfigError, InvalidRequest, UnknownModel, UnknownRequest
from headrace.core.events import (
    Delta,
    Finish,
    FinishReason,
    Progress,
    Ranked,
    Ranking,
    Scores,
    Text,
    TokenCount,
    ToolCallDelta,
    Vectors,
    bytes_of,
)
from headrace.core.library import LibraryEntry, LibraryFilter
from headrace.core.measurement import Curve
from headrace.core.metrics import Gaps, InferenceMetrics, Usage
from headrace.core.model import ModelInfo
from headrace.core.record import (
    Activity,
    Call,
    History,
    RequestRecord,
    Sample,
    TraceFilter,
    UsageFilter,
    UsageGroup,
    UsageRow,
)
from headrace.core.request import (
    AnyRequest,
    CountRequest,
    DetokenizeRequest,
    EmbedRequest,
    GenerateRequest,
    RerankRequest,
    ScoreRequest,
)
from headrace.core.status import (
    DeviceStatus,
    Footprint,
    ModelStatus,
    Plan,
    PoolEvent,
    PoolStatus,
    Reloaded,
    StoredModel,
)
from headrace.testing import Script, ScriptedBackend, Step

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
MODELS = (
    ModelInfo(id="m", source="/secret/m", engine="fake", state="ready", aliases=("best",)),
    ModelInfo(id="org/big", source="hub:org/big", engine="fake", state="ready"),
)
READ = Usage(prompt_tokens=7)


def finish(*reasons: FinishReason) -> Finish:
    return Finish(reasons or ("stop",), USAGE, METRICS)


def hello(request: AnyRequest) -> Iterator[Step]:
    """Answer any request for a model that is there."""
    if request.model == "none":
        yield UnknownModel("No such model.")
    match request:
        case GenerateRequest():
            for index in range(request.n):
                yield Delta("Hel", (1,), index)
                yield Delta("", (2,), index)
                yield Delta('lo\n"ü', (3,), index)
            reasons: list[FinishReason] = ["stop"] * request.n
            yield finish(*reasons)
            return
        case EmbedRequest():
            yield vectors(request)
        case RerankRequest():
            ranking = tuple(Ranked(i, i / 8) for i in reversed(range(len(request.documents))))
            yield Ranking(ranking[: request.top_n])
        case ScoreRequest():
            yield Scores(tuple(place / 8 for place in range(len(request.pairs))))
        case CountRequest(as_text=True):
            yield Text("A conversation.")
        case CountRequest():
            yield TokenCount(count=3, token_ids=(7, 8, 9))
        case DetokenizeRequest():
            yield Text(" ".join(map(str, request.token_ids)))
    yield Finish(("stop",), READ, METRICS)


def vectors(request: EmbedRequest) -> Vectors | InvalidRequest:
    """Vectors of 4 (or fewer) dimensions: the place of the input, and thirds."""
    size = request.dimensions or 4
    if size > 4:
        return InvalidRequest("There are 4 dimensions.", param="dimensions")
    places = range(len(request.inputs))
    return Vectors(tuple(bytes_of([place, *[1 / 3] * (size - 1)]) for place in places))


class FakeBackend(ScriptedBackend):
    """Serves two models. It takes a moment to release a stream, and whoever closes has to wait."""

    def __init__(self, script: Script = hello, models: Sequence[ModelInfo] = MODELS) -> None:
        super().__init__(script, models, close_s=0.01)


DEVICES = (DeviceStatus(name="cpu", total=100, budget=80, booked=30, free=60),)
LOADED = ModelStatus(
    id="m", source="s", state="ready", aliases=("best",), memory={"cpu": 20, "cuda:0": 10},
    until=1.5, context_length=64,
)  # fmt: skip
ASLEEP = ModelStatus(id="org/big", source="hub:org/big", state="stopped")

LIBRARY_ENTRY = LibraryEntry(
    name="tiny:1m", family="tiny", title="Tiny", about="of a test", reference="hub:org/tiny:Q8_0",
    quantization="Q8_0", quantizations=("Q8_0",), parameters=1, active=1, size=2, context_length=3,
    layers=4, vocabulary=5, kv_bytes_per_token=6, license="MIT", needs={"cpu": 90}, fits=False,
)  # fmt: skip


class FakeAdmin:
    """Notes what it is told to do. `wait` is awaited before each change, as a load would take."""

    def __init__(
        self, *told: PoolEvent | Exception | None, wait: Callable[[], Any] | None = None
    ) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.told = told
        self.listeners = 0
        self.finished = 0
        self.begun = asyncio.Event()
        self.closing = asyncio.Event()
        self.models = [LOADED, ASLEEP]
        self._wait = wait

    def status(self) -> PoolStatus:
        return PoolStatus(models=tuple(self.models), devices=DEVICES)

    async def describe(self, model: str) -> None:
        self.calls.append(("describe", model))

    async def load(self, model: str, changes: Mapping[str, Any] | None = None) -> ModelStatus:
        return await self._change("load", model, changes)

    async def unload(self, model: str) -> ModelStatus:
        return await self._change("unload", model)

    async def restart(self, model: str) -> ModelStatus:
        return await self._change("restart", model)

    async def update(self, model: str, changes: Mapping[str, Any]) -> ModelStatus:
        if "nonsense" in changes:
            raise ConfigError("nonsense: no such setting.", param="nonsense")
        changed = await self._change("update", model, dict(changes))
        return replace(changed, pinned=bool(changes.get("pinned")))

    async def plan(self, model: str) -> Plan:
        await self._change("plan", model)
        need = Footprint(devices={"cpu": 10})
        return Plan(model=model, engine="fake", need=need, fits=True, devices=DEVICES)

    def stored(self) -> Sequence[StoredModel]:
        return [StoredModel(name="smol", reference="index:smol", size=7, added=3)]

    def measurements(self) -> Sequence[Curve]:
        return ()

    async def library(self, wanted: LibraryFilter) -> Sequence[LibraryEntry]:
        self.calls.append(("library", wanted))
        return [LIBRARY_ENTRY] if LIBRARY_ENTRY.fits or not wanted.fits else []

    async def reload(self) -> Reloaded:
        await self._change("reload", "m")
        return Reloaded(added=("new",), needs_restart=("server.port",))

    async def events(self) -> AsyncGenerator[PoolEvent, None]:
        """What was given; errors are raised, and None is a wait for `closing`."""
        self.listeners += 1
        try:
            for one in self.told:
                if one is None:
                    await self.closing.wait()
                elif isinstance(one, Exception):
                    raise one
                else:
                    yield one
        finally:
            self.listeners -= 1

    async def _change(self, *call: Any) -> ModelStatus:
        self.calls.append(call)
        self.begun.set()
        if self._wait:
            await self._wait()
        self.finished += 1
        found = next((one for one in self.models if call[1] in (one.id, *one.aliases)), None)
        if found is None:
            raise UnknownModel("No such model.")
        return found


class FakeMonitor:
    """A Monitor with nothing to show but `kept` records and `used` amounts; notes its calls."""

    def __init__(self, *kept: RequestRecord, used: Sequence[UsageRow] = ()) -> None:
        self.kept = kept
        self.used = used
        self.noted: list[tuple[Any, ...]] = []

    def activity(self) -> Activity:
        return Activity()

    def exposition(self, accept: str) -> tuple[bytes, str]:
        return b"", accept

    def called(self, call: Call) -> None:
        pass

    def history(self) -> History:
        return History(every_s=5, samples=(Sample(time=1.5, running=2, memory={"cpu": 3}),))

    def traces(self, wanted: TraceFilter, skip: int, limit: int) -> list[RequestRecord]:
        self.noted.append((wanted, skip, limit))
        return [record for record in self.kept if wanted.takes(record)][skip : skip + limit]

    def trace(self, name: str) -> RequestRecord:
        for record in self.kept:
            if record.id == name:
                return record
        raise UnknownRequest("No such request.", param="id")

    def usage(self, by: Sequence[UsageGroup], wanted: UsageFilter) -> Sequence[UsageRow]:
        self.noted.append((tuple(by), wanted))
        return self.used


def client(
    backend: FakeBackend | None = None,
    ready: Callable[[], bool] | None = None,
    admin: FakeAdmin | None = None,
    peer: tuple[str, int] = ("127.0.0.1", 1),
    **settings: Any,
) -> httpx.AsyncClient:
    app = create_app(backend or FakeBackend(), ApiSettings(**settings), ready=ready, admin=admin)
    transport = httpx.ASGITransport(app, client=peer)
    return httpx.AsyncClient(transport=transport, base_url="http://localhost")


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


async def sent(
    path: str, body: Any, script: Script | None = None, **settings: Any
) -> tuple[Any, Any]:
    """Post a body; return the response, and the backend, which has got the request."""
    backend = FakeBackend(script) if script else FakeBackend()
    async with client(backend, **settings) as http:
        return await http.post(path, json=body), backend


async def accepted(path: str, body: Any, **settings: Any) -> Any:
    """Post a body that is answered; return the request that it became."""
    answer, backend = await sent(path, body, **settings)
    assert answer.status_code == 200, answer.text
    return backend.requests[0]


def thinking_text_and_calls(*last: ToolCallDelta) -> Iterator[Step]:
    """An answer in pieces, whose second call is `last`."""
    yield Progress("prefill", 0, 5)
    yield Delta(reasoning="Let me ", token_ids=(1,))
    yield Delta(reasoning="think.", token_ids=(2,))
    yield Delta("Hel", (3,))
    yield Delta("", (4,))
    yield Delta("lo\u2028", (5,))
    yield ToolCallDelta(0, "call_1", "f")
    yield ToolCallDelta(0, arguments='{"a"')
    yield ToolCallDelta(0, arguments=": 1}")
    yield from last
    yield finish("tool_calls")


def typed_events(text: str) -> Iterator[dict[str, Any]]:
    """Yield the events of a stream, each of which has its type twice; comments are left out."""
    for block in text.split("\n\n"):
        if block and not block.startswith(":"):
            kind, data = block.split("\n")
            event = json.loads(data.removeprefix("data: "))
            assert kind == f"event: {event['type']}"
            yield event
