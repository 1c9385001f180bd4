"""AsyncModelWorker: one model as a Python object."""

from __future__ import annotations

import difflib
import struct
from collections.abc import AsyncGenerator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

import msgspec

from headrace import __version__, runtime
from headrace.config import Config, Settings
from headrace.core.backend import Backend
from headrace.core.errors import InvalidRequest
from headrace.core.events import Event, GenerateResult
from headrace.core.model import ModelInfo, ModelSpec, State
from headrace.core.request import (
    CountRequest,
    DetokenizeRequest,
    EmbedRequest,
    EmbedResult,
    GenerateRequest,
    Message,
    RerankRequest,
    RerankResult,
    TokenCount,
)
from headrace.core.sampling import Sampling
from headrace.core.stream import collect
from headrace.pool.watch import Asked, Nobody, Watch
from headrace.telemetry import otel, traceparent
from headrace.telemetry.observed import Observed
from headrace.telemetry.span import Tracing
from headrace.worker.spec import OnProgress
from headrace.worker.worker import Worker

Messages = Sequence[Message | Mapping[str, Any]]
Prompt = str | Sequence[int]
Vectors = list[list[float]]

T = TypeVar("T", EmbedRequest, RerankRequest)

_SAMPLING = set(Sampling.__struct_fields__)
_REQUEST = {"n", "echo", "context_length", "json_schema", "template_options", "deadline_s"}


class AsyncModelWorker:
    """Binds a model; `start` (or `async with`) loads it in a process of its own.

    `model` is a configured name, an alias, a reference or a whole specification. `arguments`
    are settings of the model (`engine`, `device`, `context_length`, ...) and options of its
    engine; they win over the environment and the file. With `isolate=False` no process is made.

    Raises:
        ConfigError: a setting is unknown or wrong.
    """

    def __init__(
        self,
        model: str | ModelSpec,
        *,
        config: Config | None = None,
        isolate: bool = True,
        on_progress: OnProgress | None = None,
        **arguments: Any,
    ) -> None:
        if isinstance(model, ModelSpec):
            self.spec = msgspec.structs.replace(model, **arguments)
            config = config or _quiet(runtime.load_settings())
        else:
            settings = runtime.load_settings()
            self.spec = settings.model_spec(model, arguments)
            config = config or _quiet(settings)
        self._worker = runtime.open_worker(
            self.spec, config, isolate=isolate, on_progress=on_progress
        )
        self._backend: Backend = self._worker
        self._watch: Watch = Nobody()
        self._tracing = Tracing()

    @classmethod
    def from_spec(cls, spec: ModelSpec, **keywords: Any) -> Self:
        """Bind a model that is specified already; keywords are those of the class."""
        return cls(spec, **keywords)

    @property
    def state(self) -> State:
        """One of created, loading, ready, draining, stopped, failed."""
        return self._worker.state

    @property
    def metadata(self) -> ModelInfo:
        """What is known of the model; all of it once it is loaded."""
        return self._worker.models()[0]

    def __repr__(self) -> str:
        """Tell the name and the state."""
        return f"<AsyncModelWorker {self._worker!r}>"

    async def start(self) -> None:
        """Fetch the model if need be, and load it. Idempotent.

        Raises:
            HeadraceError: UnknownModel, LoadFailed, OutOfMemory, UpstreamError, ConfigError.
        """
        self._observe()
        async with self._watch.loading(self._worker, self.spec):
            await self._worker.start()

    async def stop(self, drain_s: float = 0.0) -> None:
        """Let running streams end within `drain_s` seconds, end the rest, free all. Idempotent."""
        await self._worker.aclose(drain_s)
        self._watch.closed()
        tracing, self._tracing = self._tracing, Tracing()
        await tracing.aclose()

    async def restart(self) -> None:
        """Stop, and load the same model again."""
        await self.stop()
        await self.start()

    async def aclose(self) -> None:
        """Stop at once."""
        await self.stop()

    async def __aenter__(self) -> Self:
        """Load the model."""
        try:
            await self.start()
        except BaseException:
            await self.aclose()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop the model."""
        await self.aclose()

    def generate_stream(
        self, prompt: Prompt | None = None, *, messages: Messages | None = None, **options: Any
    ) -> AsyncGenerator[Event, None]:
        """Return the stream of an answer: deltas, then one Finish with usage and metrics.

        `options` are the fields of Sampling (`max_tokens`, `temperature`, `stop`, ...) and of
        GenerateRequest (`n`, `echo`, `json_schema`, `deadline_s`, ...).

        Raises:
            InvalidRequest: an option is unknown or wrong.
        """
        asked = request(self.spec.name, prompt, messages, options)
        return self._backend.generate(self._below(asked))

    async def generate(
        self, prompt: Prompt | None = None, *, messages: Messages | None = None, **options: Any
    ) -> GenerateResult:
        """Return the whole answer; arguments as for `generate_stream`."""
        return await collect(self.generate_stream(prompt, messages=messages, **options))

    async def embed(self, inputs: Sequence[Prompt], **options: Any) -> Vectors:
        """Return a vector for each text, or list of token ids.

        `options` are fields of EmbedRequest: `dimensions`, `normalize`, `truncate`, `deadline_s`.

        Raises:
            InvalidRequest: an option is unknown or wrong.
        """
        return vectors(await self.embed_raw(inputs, **options))

    async def embed_raw(self, inputs: Sequence[Prompt], **options: Any) -> EmbedResult:
        """Return the vectors as bytes, with usage and metrics; arguments as for `embed`."""
        if isinstance(inputs, str):
            raise InvalidRequest("Give a list of texts.", param="inputs")
        given = tuple(one if isinstance(one, str) else tuple(one) for one in inputs)
        body = {"inputs": given, "model": self.spec.name, **options}
        return await self._backend.embed(self._below(_built(EmbedRequest, body)))

    async def rerank(self, query: str, documents: Sequence[str], **options: Any) -> RerankResult:
        """Put documents in order: the best first, each with its index and score.

        `options` are fields of RerankRequest: `top_n`, `truncate`, `deadline_s`.

        Raises:
            InvalidRequest: an option is unknown or wrong.
        """
        body = {"query": query, "documents": documents, "model": self.spec.name, **options}
        return await self._backend.rerank(self._below(_built(RerankRequest, body)))

    async def count_tokens(
        self,
        text: str | None = None,
        *,
        messages: Messages | None = None,
        add_special: bool = False,
    ) -> TokenCount:
        """Count a text, or messages as the template puts them. Never waits behind generation."""
        ask = CountRequest(text=text, messages=_messages(messages), add_special=add_special)
        return await self._worker.count_tokens(ask)

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        """Return the text of token ids."""
        return await self._worker.detokenize(DetokenizeRequest(token_ids=tuple(token_ids)))

    def _observe(self) -> None:
        """Have requests traced, where the environment or the program has an exporter."""
        if self._tracing.exporter is not None:
            return
        self._tracing = tracing = otel.configure(__version__)
        if tracing.exporter is not None:
            # What runs in this process has no attempts that could be told from its requests.
            attempts = None if isinstance(self._worker, Worker) else self.spec
            observed = Observed(self._worker, tracing=tracing, attempts=attempts)
            self._backend, self._watch = observed, observed.watcher

    def _below(self, request: Asked) -> Asked:
        """Make a request's span one below the caller's own."""
        exporter = self._tracing.exporter
        if exporter is None or (above := exporter.current()) is None:
            return request
        header = traceparent.written(above.trace_id, above.span_id, above.flags)
        return msgspec.structs.replace(request, traceparent=header, tracestate=above.state)


def vectors(result: EmbedResult) -> Vectors:
    """Return the vectors as lists of numbers."""
    form = struct.Struct(f"<{result.dimensions}f")
    return [list(form.unpack(one)) for one in result.vectors]


def _built(kind: type[T], body: Mapping[str, Any]) -> T:
    for name in body.keys() - {*kind.__struct_fields__}:
        raise InvalidRequest(f"There is no option {name!r}", param=name)
    try:
        return msgspec.convert(body, kind)
    except msgspec.ValidationError as error:
        raise InvalidRequest(str(error)) from error


def _quiet(settings: Settings) -> Config:
    # A library that is not asked says nothing but warnings.
    if settings.origin("log_level") == "default":
        return settings.config.model_copy(update={"log_level": "warning"})
    return settings.config


def request(
    model: str, prompt: Prompt | None, messages: Messages | None, options: Mapping[str, Any]
) -> GenerateRequest:
    """Build a request from keyword arguments.

    Raises:
        InvalidRequest: an option is unknown, or a value has the wrong type or range.
    """
    for name in options.keys() - _SAMPLING - _REQUEST:
        near = difflib.get_close_matches(name, _SAMPLING | _REQUEST, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise InvalidRequest(f"There is no option {name!r}{hint}", param=name)
    sampling = {name: value for name, value in options.items() if name in _SAMPLING}
    if isinstance(sampling.get("stop"), str):
        sampling["stop"] = (sampling["stop"],)
    fields = {name: value for name, value in options.items() if name in _REQUEST}
    text = prompt if prompt is None or isinstance(prompt, str) else tuple(prompt)
    body = {"model": model, "prompt": text, "sampling": sampling, **fields}
    try:
        built = msgspec.convert(body | {"messages": _messages(messages)}, GenerateRequest)
    except msgspec.ValidationError as error:
        raise InvalidRequest(str(error)) from error
    return built


def _messages(messages: Messages | None) -> tuple[Message, ...] | None:
    try:
        return msgspec.convert(messages, tuple[Message, ...] | None)
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"messages: {error}", param="messages") from error
