"""AsyncModelWorker: one model as a Python object, a pool of one."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence
from types import TracebackType
from typing import Any, Self, Unpack

import msgspec

from headrace import arguments, runtime
from headrace.arguments import Messages, Numbers, Prompt
from headrace.config import Config, Settings
from headrace.core.errors import (
    Draining,
    HeadraceError,
    InvalidRequest,
    LoadFailed,
    Loading,
    NotStarted,
)
from headrace.core.events import (
    EmbedResult,
    Event,
    GenerateResult,
    RerankResult,
    TokenCount,
)
from headrace.core.model import ModelInfo, ModelSpec, State
from headrace.core.options import EmbedOptions, GenerateOptions, ModelOptions, RerankOptions
from headrace.core.parameters import Parameter
from headrace.core.request import (
    AnyRequest,
    CountRequest,
    DetokenizeRequest,
    EmbedRequest,
    RerankRequest,
)
from headrace.core.stream import (
    collect,
    collect_count,
    collect_ranking,
    collect_text,
    collect_vectors,
)
from headrace.pool.entry import ModelEntry
from headrace.pool.pool import Pool
from headrace.telemetry import otel
from headrace.telemetry.recorder import Recorder
from headrace.telemetry.spans import Tracing
from headrace.worker.spec import OnProgress, unloaded_info


class AsyncModelWorker:
    """Binds a model; `start` (or `async with`) loads it in a process of its own.

    `model` is a configured name, an alias, a reference or a whole specification. `arguments`
    are settings of the model (`engine`, `device`, `context_length`, ...) and options of its
    engine; they override the environment and the file. With `isolate=False` no process is made.
    `name` is that of the model's names which requests use, if it is not `model`.

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
        name: str = "",
        **arguments: Unpack[ModelOptions],
    ) -> None:
        if isinstance(model, ModelSpec):
            given = {name: value for name, value in arguments.items() if value is not None}
            self.spec = msgspec.structs.replace(model, **given)
            config = config or _with_library_defaults(runtime.load_settings())
        else:
            settings = runtime.load_settings()
            self.spec = settings.model_spec(model, arguments)
            name = model
            config = config or _with_library_defaults(settings)
        self._name = name if name in self.spec.names else self.spec.name
        self._config = config
        self._isolate = isolate
        self._on_progress = on_progress
        self._pool: Pool | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._state: State = "created"
        self._reason: str | None = None
        self._tracing = Tracing()

    @classmethod
    def from_spec(cls, spec: ModelSpec, **keywords: Any) -> Self:
        """Bind a model by its specification; keywords are those of the class."""
        return cls(spec, **keywords)

    @property
    def state(self) -> State:
        """One of created, loading, ready, draining, stopped, failed."""
        if self._pool is None or self._state != "ready":
            return self._state
        return self._entry(self._pool).state

    @property
    def metadata(self) -> ModelInfo:
        """The metadata of the model; complete once it is loaded."""
        if self._pool is None:
            return unloaded_info(self.spec, self._state, self._reason)
        return msgspec.structs.replace(self._pool.models()[0], state=self.state)

    def parameters(self) -> tuple[Parameter, ...]:
        """Describe the settings of the model and the options of its engine, with their values.

        Before a start the engine is that which would be chosen; a model that is not on this
        machine has none yet.

        Raises:
            HeadraceError: the reference is invalid, or no engine can run the model.
        """
        info = self.metadata
        if info.engine == "auto":
            info = runtime.describe(self.spec, self._config)
        return runtime.parameters(self.spec, info.engine)

    def __repr__(self) -> str:
        """Describe the name and the state."""
        return f"<AsyncModelWorker {self.spec.name} {self.state}>"

    async def start(self) -> None:
        """Download the model if needed, and load it. Idempotent; callers share one load.

        Raises:
            HeadraceError: UnknownModel, LoadFailed, OutOfMemory, UpstreamError, ConfigError.
        """
        self._leave_closed_loop()
        if self._state == "draining":
            raise Draining(f"{self.spec.name} is stopping.")
        if self._pool is None:
            self._pool = self._open()
            self._loop = asyncio.get_running_loop()
            self._state, self._reason = "loading", None
        pool = self._in_own_loop(self._pool)
        entry = self._entry(pool)
        if self._state == "ready" and entry.failures.error is not None:
            entry.reset()
        try:
            await pool.start()
        except HeadraceError as error:
            if self._pool is pool:
                self._pool, self._state, self._reason = None, "failed", error.message
            await pool.aclose()
            await self._close_tracing()
            raise
        if self._pool is not pool or pool.draining:
            raise Draining(f"{self.spec.name} was stopped while it was loading.")
        self._state = "ready"

    async def stop(self, drain_s: float = 0.0) -> None:
        """Let running streams end within `drain_s` seconds, and close. Idempotent."""
        self._leave_closed_loop()
        if self._pool is not None:
            pool = self._in_own_loop(self._pool)
            self._state = "draining"
            await pool.aclose(drain_s)
            self._pool = None
        self._state = "stopped"
        await self._close_tracing()

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
        self,
        prompt: Prompt | None = None,
        *,
        messages: Messages | None = None,
        **options: Unpack[GenerateOptions],
    ) -> AsyncGenerator[Event, None]:
        """Return the stream of an answer: deltas, then one Finish with usage and metrics.

        `messages` are as over HTTP: their content is a text, or a list of parts; `json_schema`,
        `regex`, `choice` or `grammar` is what the text has to be.

        Raises:
            InvalidRequest: an option is unknown or wrong.
        """
        return self._ask(arguments.request(self._named(options), prompt, messages, options))

    def _named(self, options: GenerateOptions) -> str:
        # The name of an adapter follows that of the model, and no alias.
        return self.spec.name if options.get("adapter") else self._name

    async def generate(
        self,
        prompt: Prompt | None = None,
        *,
        messages: Messages | None = None,
        **options: Unpack[GenerateOptions],
    ) -> GenerateResult:
        """Return the whole answer; arguments as for `generate_stream`.

        Raises:
            HeadraceError: its `text` and `choices` are what was written before, its `metrics` what
                that cost.
        """
        return await collect(self.generate_stream(prompt, messages=messages, **options))

    async def embed(self, inputs: Sequence[Prompt], **options: Unpack[EmbedOptions]) -> Numbers:
        """Return a vector for each text, or list of token ids.

        Raises:
            InvalidRequest: an option is unknown or wrong.
        """
        return arguments.vectors(await self.embed_raw(inputs, **options))

    async def embed_raw(
        self, inputs: Sequence[Prompt], **options: Unpack[EmbedOptions]
    ) -> EmbedResult:
        """Return the vectors as bytes, with usage and metrics; arguments as for `embed`."""
        if isinstance(inputs, str):
            raise InvalidRequest("Give a list of texts.", param="inputs")
        texts = tuple(item if isinstance(item, str) else tuple(item) for item in inputs)
        body = {"inputs": texts, "model": self._name}
        body |= arguments.given(options, EmbedOptions.__annotations__)
        return await collect_vectors(self._ask(arguments.built(EmbedRequest, body)))

    async def rerank(
        self, query: str, documents: Sequence[str], **options: Unpack[RerankOptions]
    ) -> RerankResult:
        """Put documents in order: the best first, each with its index and score.

        Raises:
            InvalidRequest: an option is unknown or wrong.
        """
        body = {"query": query, "documents": documents, "model": self._name}
        body |= arguments.given(options, RerankOptions.__annotations__)
        return await collect_ranking(self._ask(arguments.built(RerankRequest, body)))

    async def count_tokens(
        self,
        text: str | None = None,
        *,
        messages: Messages | None = None,
        add_special: bool = False,
    ) -> TokenCount:
        """Count the tokens of a text, or of messages in the template. Does not wait for a slot."""
        count_request = CountRequest(
            model=self._name, text=text, messages=arguments.turns(messages), add_special=add_special
        )
        return await collect_count(self._ask(count_request))

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        """Return the text of token ids."""
        request = DetokenizeRequest(token_ids=tuple(token_ids))
        return await collect_text(self._ask(request))

    def _open(self) -> Pool:
        pool = runtime.open_pool_of_one(
            self.spec, self._config, isolate=self._isolate, on_progress=self._on_progress
        )
        # Traced if the environment or the program configures an exporter.
        self._tracing = tracing = otel.configure()
        if tracing.exporter is not None:
            pool.attach_observer(Recorder(pool.models, tracing=tracing))
        return pool

    def _entry(self, pool: Pool) -> ModelEntry:
        return pool.entry(self.spec.name)

    def _ask(self, request: AnyRequest) -> AsyncGenerator[Event, None]:
        """Return the events of an answer; if not ready, the stream raises the reason."""
        try:
            pool = self._ready()
        except HeadraceError as error:
            return _raise(error)
        return pool.ask(self._in_current_span(request))

    def _ready(self) -> Pool:
        name = self.spec.name
        self._leave_closed_loop()
        if self._pool is not None and self._state == "ready":
            return self._in_own_loop(self._pool)
        if self._state == "loading":
            raise Loading(f"{name} is loading.")
        if self._state == "failed":
            raise LoadFailed(f"{name} has failed: {self._reason}")
        state = "has not been started" if self._state == "created" else f"is {self._state}"
        raise NotStarted(f"{name} {state}: call start(), or use it in a `with` statement.")

    def _in_own_loop(self, pool: Pool) -> Pool:
        """Check that the caller runs in the event loop in which the model was started."""
        loop = self._loop
        with contextlib.suppress(RuntimeError):
            # A stream may be created outside of any loop and read in the right one.
            loop = asyncio.get_running_loop()
        if loop is not self._loop:
            raise InvalidRequest(
                f"{self.spec.name} was started in another event loop; use and stop it there."
            )
        return pool

    def _leave_closed_loop(self) -> None:
        """End the processes of an event loop that is closed."""
        if self._loop is not None and self._loop.is_closed():
            if self._pool is not None:
                self._pool.abandon()
            self._pool = self._loop = None
            self._state = "stopped"

    async def _close_tracing(self) -> None:
        tracing, self._tracing = self._tracing, Tracing()
        await tracing.aclose()

    def _in_current_span(self, request: AnyRequest) -> AnyRequest:
        """Make the request's span a child of the caller's current span."""
        exporter = self._tracing.exporter
        if exporter is None or (span := exporter.current()) is None:
            return request
        return msgspec.structs.replace(request, traceparent=span.traceparent, tracestate=span.state)


async def _raise(error: HeadraceError) -> AsyncGenerator[Event, None]:
    raise error
    yield  # pyright: ignore[reportUnreachable]  # makes this a generator


def _with_library_defaults(settings: Settings) -> Config:
    # A library logs warnings only, unless it is configured.
    if settings.origin("log_level") == "default":
        return settings.config.model_copy(update={"log_level": "warning"})
    return settings.config
