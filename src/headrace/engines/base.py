"""The contract of an engine: a module with `ABOUT`, `Options` and `Engine`.

`Engine` is a Generator, an Embedder or a Reranker, by the tasks of `facts.capabilities`; it may be
several. One whose models are served elsewhere (`ABOUT.remote`) is a RemoteEngine. `module.py` lists
what else the module may have.

All but `Engine` is read without the engine's library (by `doctor`, `config show`, the docs), so
the library is imported when an `Engine` is made and not before. In a package, `Engine` is that of
its `engine.py`, which is imported only then.

An engine knows token ids and sampling. It knows nothing of templates, stop strings, characters,
queues, deadlines, processes or HTTP; the worker around it does all that.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import msgspec
from pydantic import BaseModel, ConfigDict

from headrace.core.adapter import AdapterFile
from headrace.core.constraint import Constraint
from headrace.core.errors import ConfigError
from headrace.core.events import (
    Delta,
    FinishReason,
    Progress,
    TokenCount,
    TokenLogprob,
    ToolCallDelta,
)
from headrace.core.metrics import Usage
from headrace.core.model import Capabilities, ModelFile, Task
from headrace.core.request import CountRequest, EmbedRequest, GenerateRequest, RerankRequest
from headrace.core.sampling import Sampling


class EngineOptions(BaseModel):
    """Base of every engine's `Options`: unknown keys are refused, values are frozen."""

    # Those of most engines are only looked at, and their validators never built.
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, defer_build=True)


class About(msgspec.Struct, frozen=True, kw_only=True):
    """Facts about an engine that need no library.

    `devices` are the kinds of devices that it can run on, by a build of its library or program for
    them; on each it has the same abilities. `requires` is the import name of the library (None:
    nothing), `extra` the extra of the package that brings it (None: the core does). A remote engine
    takes requests as they are and runs in the process that serves. A `confined` one writes only
    temporary files, and those that its module's `writes` names, and needs no network; one with a
    `program` of its own starts that confined, and is not confined itself. One that `spreads` can
    put a model on several GPUs. `automatic` is False for one that is only used when it is
    configured by name. `able` are those of `core.model.ABILITIES` that a model can have on it.
    """

    formats: tuple[str, ...]
    devices: tuple[str, ...] = ("cpu",)
    requires: str | None = None
    extra: str | None = None
    tasks: tuple[Task, ...] = ("generate",)
    able: frozenset[str] = frozenset()
    spreads: bool = False
    confined: bool = False
    program: bool = False
    remote: bool = False
    automatic: bool = True


def check_task(task: Task, title: str, tasks: Sequence[Task]) -> None:
    """Check that an engine or a provider has a task.

    Raises:
        ConfigError: it has not; `title` names it.
    """
    if task not in tasks:
        raise ConfigError(
            f"{title} has no models for the task {task}; it has {', '.join(tasks)}.", param="task"
        )


class OpenRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine is opened with.

    `device` is auto, a kind of `About.devices`, or the first of `gpus`: the GPUs that it may use,
    by the names that this process has for them; empty leaves them to the library. None leaves
    `context_length` and `max_running` to the engine. `memory` is how many bytes of the devices
    models may take (None: all); defaults depend on it, and not on what is free at the moment.
    `repeatable` requires reproducible greedy and seeded answers, where options leave the choice.
    `task` is the task of the model. `trust_remote_code` lets code of the model's own folder run.
    `prompt` precedes texts to embed, unless their request has another; it is part of what is
    tokenized already. `adapters` are loaded beside the model, by an engine that is `able` to.
    `draft` is the model of the option `draft_model`, whose vocabulary is that of `model`.
    """

    model: ModelFile
    device: str = "auto"
    gpus: tuple[str, ...] = ()
    draft: ModelFile | None = None
    context_length: int | None = None
    max_running: int | None = None
    memory: int | None = None
    repeatable: bool = False
    trust_remote_code: bool = False
    task: Task = "generate"
    prompt: str = ""
    options: dict[str, Any] = {}
    adapters: tuple[AdapterFile, ...] = ()


class EngineRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A request in token ids. `max_tokens` counts new tokens; stop strings are the worker's.

    `answered` are the tokens of the answer that exist already, for engines that can `resume`: they
    are computed like those of the prompt, and only what follows them is yielded. The engine may
    count them as tokens of the prompt.

    `constraint` has been compiled by the engine's llguidance before; `text.grammar` has its text.
    An engine that declares `json_schema` enforces it. The worker checks the answer all the same.

    `visible` are control tokens whose text is part of the answer, as a parser reads them; the text
    of all others is left out.

    `media` are the encoded pictures and sounds, in the order of their markers in the prompt, which
    is `text` then; `token_ids` has the markers only.

    `adapter` is the name of one of those that were loaded, and empty for the model alone. What is
    cached of a prompt is never that of another adapter.
    """

    token_ids: tuple[int, ...]
    max_tokens: int
    answered: tuple[int, ...] = ()
    sampling: Sampling = Sampling()
    constraint: Constraint | None = None
    visible: frozenset[int] = frozenset()
    text: str = ""
    media: tuple[bytes, ...] = ()
    adapter: str = ""


class Admitted(msgspec.Struct, frozen=True):
    """The engine has begun with the request; `done` of `total` prompt tokens are computed.

    `cached` of them were taken from a cache. With media, `total` counts their tokens too.
    """

    done: int = 0
    total: int = 0
    cached: int = 0


class RawDelta(msgspec.Struct, frozen=True):
    """New tokens and their bytes; the bytes may end inside a character.

    The model's own end token comes without bytes. A token of `stop_token_ids` ends the stream and
    is no part of it.
    """

    data: bytes
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()


class RawDraft(msgspec.Struct, frozen=True):
    """Tokens of a draft that the model has checked, and how many of them it accepted.

    It comes before the accepted tokens, or with the first of them.
    """

    drafted: int
    accepted: int


class RawFinish(msgspec.Struct, frozen=True, kw_only=True):
    """The end of an answer and the engine's counts. `stop` is an end token, `length` the limit."""

    reason: Literal["stop", "length"]
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


RawEvent = Admitted | RawDelta | RawDraft | RawFinish


class BatchLimits(NamedTuple):
    """The largest batch of an embedder or reranker; `tokens` counts the padding too.

    A batch is padded to its longest item. `padding` is the number of tokens that take as long as
    starting a batch: an item that would add more padding goes into a batch of its own.
    """

    items: int = 32
    tokens: int = 16384
    padding: int = 256


class EngineFacts(msgspec.Struct, frozen=True, kw_only=True):
    """Facts about a loaded engine. `max_running` is how many requests it batches.

    `context_length` is in tokens for each request, prompt and completion together. A token is at
    most `max_token_bytes` of text: longer texts are refused without making tokens of them.
    `special_tokens` are the texts of those that the model has, by their names in chat templates:
    `bos_token`, `eos_token`, `unk_token`, ... `grammar_library` is the file with the llguidance
    that compiles constraints; empty is the package of that name. `infill_ids` are the tokens that
    the model's file names for a prefix, a suffix and the gap between them. `image_marker` is the
    text that stands for a picture or a sound in a prompt, for engines that take them. With
    `fixed_prompt`, all texts to embed have the prompt that the engine was opened with.
    """

    device: str
    context_length: int
    max_running: int
    capabilities: Capabilities
    chat_template: str | None = None
    special_tokens: Mapping[str, str] = {}
    max_token_bytes: int | None = None
    grammar_library: str = ""
    infill_ids: tuple[int, ...] = ()
    image_marker: str = ""
    batch: BatchLimits = BatchLimits()
    fixed_prompt: bool = False
    notes: tuple[str, ...] = ()

    @property
    def bos_token(self) -> str:
        """The text of the token that begins a sequence; empty if the model has none."""
        return self.special_tokens.get("bos_token", "")

    @property
    def eos_token(self) -> str:
        """The text of the token that ends a sequence; empty if the model has none."""
        return self.special_tokens.get("eos_token", "")


class Pair(msgspec.Struct, frozen=True):
    """A query and a document as one sequence, of which the document begins at `second`.

    `texts` are both, for an engine that scores texts; its token ids are as many as it computes.
    """

    token_ids: tuple[int, ...]
    second: int
    texts: tuple[str, str] | None = None


class Engine(Protocol):
    """One loaded model. `__init__(request: OpenRequest)` blocks until it can answer.

    Raises (from `__init__`):
        ConfigError: an option is unknown or wrong.
        LoadFailed, OutOfMemory: the library refused.
    """

    facts: EngineFacts

    def tokenize(self, text: str, *, add_special: bool) -> Sequence[int]:
        """Return token ids; markers such as `<|im_end|>` become their tokens. Blocking."""
        ...

    def detokenize(self, token_ids: Sequence[int]) -> str:
        """Return the text of token ids, special tokens included. Blocking."""
        ...

    def close(self) -> None:
        """Free the model. Blocking, idempotent."""
        ...


class Generator(Engine, Protocol):
    """An engine for the task `generate`."""

    def generate(self, request: EngineRequest) -> AsyncGenerator[RawEvent, None]:
        """Yield Admitted once or more, then deltas, then one RawFinish.

        When the generator is closed the engine has stopped and its slot is free. Errors may be
        raised by the call or by the first step.
        """
        ...

    def shown(self, token_ids: Sequence[int], visible: frozenset[int] = frozenset()) -> str:
        """Return the text that a stream shows for tokens of an answer. Blocking.

        `visible` is that of the request. Bytes that are no whole character are U+FFFD. Only called
        for engines that can `resume`.
        """
        ...


class Embedder(Engine, Protocol):
    """An engine for the task `embed`; deriving from it gives `tokenize_all`."""

    def tokenize_all(self, texts: Sequence[str]) -> Sequence[Sequence[int]]:
        """Return what `tokenize` makes of each text with special tokens. Blocking.

        Worth overriding where the tokenizer takes many texts at once.
        """
        return [self.tokenize(text, add_special=True) for text in texts]

    def embed(self, batch: Sequence[Sequence[int]]) -> Sequence[bytes]:
        """Return one vector for each list of token ids, as the model gives it. Blocking.

        The ids are whole: `tokenize(text, add_special=True)` made them, or the client. A vector is
        `dimensions` little-endian 32-bit floats. Called by one thread at a time.
        """
        ...


class Reranker(Engine, Protocol):
    """An engine for the task `rerank`."""

    def pair(self, query: str, document: str) -> Pair:
        """Return the sequence that the model scores. Blocking."""
        ...

    def score(self, batch: Sequence[Pair]) -> Sequence[float]:
        """Return for each pair how well the document answers the query. Blocking.

        Scores are as the model's own library reports them. Called by one thread at a time.
        """
        ...


class RemoteFinish(msgspec.Struct, frozen=True, kw_only=True):
    """The end of an upstream's answer; `usage` is None where it reports none."""

    finish_reasons: tuple[FinishReason, ...]
    usage: Usage | None = None


RemoteEvent = Progress | Delta | ToolCallDelta | RemoteFinish


class RemoteEngine(Protocol):
    """A model that another service runs. `__init__(request: OpenRequest)` opens no connection.

    Raises (from `__init__`):
        ConfigError: an option is unknown or wrong, or the key is missing.
    """

    facts: EngineFacts

    def answer(self, request: GenerateRequest) -> AsyncGenerator[RemoteEvent, None]:
        """Yield deltas and one RemoteFinish. Closing it closes the upstream's stream.

        Raises:
            UpstreamError: with the text of the upstream, without the key.
            Unsupported: a field that this upstream does not know.
        """
        ...

    async def embed(self, request: EmbedRequest) -> tuple[Sequence[bytes], Usage]:
        """Return one vector for each input, and the usage. Only for the task `embed`."""
        ...

    async def rerank(self, request: RerankRequest) -> tuple[Sequence[tuple[int, float]], Usage]:
        """Return index and score of the documents, best first. Only for the task `rerank`."""
        ...

    async def count_tokens(self, request: CountRequest) -> TokenCount:
        """Return the upstream's count, or an estimate that is marked `estimated`."""
        ...

    async def aclose(self) -> None:
        """Close the connections. Idempotent."""
        ...
