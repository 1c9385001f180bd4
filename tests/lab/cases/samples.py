"""A small model for each engine, and what the engine declares that it cannot do with it."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock
from tests.adapters_made import SMOLLM2, SMOLLM2_FOLDER, TINY_FOLDER, gguf_adapter, peft_adapter
from tests.conftest import MODEL_HOME
from tests.tiny_gguf import WIDTH, tiny_gguf

from headrace import engines
from headrace.core.model import Task
from headrace.lab.cases import KINDS, Kind, drafts

Given = tuple[str, dict[str, Any]]
"""The reference of a model, and options that only its opening knows; `adapters` is a setting."""

At = Callable[[Path], AbstractAsyncContextManager[Given]]
"""Opens a model; it gets the path of SmolLM2's GGUF, which others are made of."""

FEW = frozenset(
    {
        "stream_equals_whole",
        "usage_is_exact",
        "cancelled_in_the_queue",
        "cancelled_in_decode",
        "close_gives_everything_back",
        "vectors_alone_and_together",
        "ranking",
    }
)
"""What changes with the Backend. The rest is the engine's, and echo runs it on every Backend."""

WITH_ADAPTERS = frozenset({"adapters", "adapters_together"})
"""What is refused by each sample that has none."""
ADAPTERS = WITH_ADAPTERS | {"adapter_unknown"}
IMAGES = frozenset({"images", "images_damaged", "images_cancelled", "images_fill_the_context"})
AUDIO = frozenset({"audio"})
"""What is refused by each sample that does not take it."""
_FORMS = frozenset({"regex", "choice", "grammar", "forms_fail_closed"})
_SCHEMAS = frozenset(
    {
        *("json_schema", "json_schema_fails_closed"),
        *("tool_calls_required", "tool_calls_or_form"),
    }
)

SOUND = FEW | {
    "greedy_repeats",
    "stop_strings",
    "every_script",
    "alone_and_among_sixteen",
    "cancelled_in_prefill",
    "resume",
    "json_schema",
    "json_schema_fails_closed",
    "tool_calls_required",
    "tool_calls_or_form",
    "tool_calls_cut",
    "thinking",
    *_FORMS,
}
"""What only a real model's text shows."""
REAL = FEW | {"greedy_repeats", "stop_strings", "every_script", "resume", "json_schema"}
"""Likewise, where each token takes long; the rest is slow, and a small model has all cases."""


@dataclass(frozen=True)
class Sample:
    """`refused` and `reported` are the cases that end so, and no others.

    Of a heavy sample `first` are the cases of its first Backend that run each time (None: all), and
    `further` those of the others. The rest is `slow`.
    """

    engine: str
    at: At
    task: Task = "generate"
    kinds: tuple[Kind, ...] = KINDS
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    refused: frozenset[str] = frozenset()
    reported: frozenset[str] = frozenset()
    heavy: bool = True
    slow: bool = False
    first: frozenset[str] | None = None
    further: frozenset[str] = FEW
    hears: bool = False
    name: str = ""

    def is_quick(self, kind: Kind, case: str) -> bool:
        if not self.heavy and self.first is None:
            return True
        if kind != "worker" and case == "close_gives_everything_back":
            # What a process held is gone with it, whoever is in it: echo and llamacpp show that.
            # What an engine keeps shows only in a process that goes on.
            return False
        wanted = self.first if kind == self.kinds[0] else self.further
        return wanted is None or case in wanted

    @property
    def title(self) -> str:
        return self.name or self.engine


def _with_adapters(make: Callable[[Path], str | Path], adapter: Callable[[Path, int], Path]) -> At:
    @asynccontextmanager
    async def at(gguf: Path) -> AsyncIterator[Given]:
        with tempfile.TemporaryDirectory() as folder:
            made = {name: str(adapter(Path(folder) / name, seed)) for seed, name in enumerate("ab")}
            yield str(make(gguf)), {"adapters": made}

    return at


def _path(make: Callable[[Path], str | Path]) -> At:
    @asynccontextmanager
    async def at(gguf: Path) -> AsyncIterator[Given]:
        yield str(make(gguf)), {}

    return at


def _smollm2(gguf: Path) -> Path:
    from tests import models_made

    return models_made.smollm2(gguf)


def _tiny(gguf: Path) -> Path:
    from tests import models_made

    return models_made.tiny_llama(gguf)


def _llava(gguf: Path) -> Path:
    from tests import models_made

    return models_made.tiny_llava(gguf)


@contextmanager
def _layer(gguf: Path) -> Iterator[Path]:
    """A model of one layer with random weights and SmolLM2's vocabulary."""
    with tempfile.TemporaryDirectory() as folder:
        yield tiny_gguf(Path(folder) / "tiny.gguf", gguf, spread=0.2)


def _half_layer(gguf: Path) -> str:
    from tests import models_made

    return converted(models_made.tiny_half(gguf))


@asynccontextmanager
async def _one_layer(gguf: Path) -> AsyncIterator[Given]:
    with _layer(gguf) as model:
        yield str(model), {}


@asynccontextmanager
async def _seeing(gguf: Path) -> AsyncIterator[Given]:
    """A model of one layer with a projector of random weights beside it."""
    from tests.pictures_made import projector

    with tempfile.TemporaryDirectory() as folder:
        tiny_gguf(Path(folder) / "tiny.gguf", gguf)
        projector(Path(folder) / "mmproj-tiny-f16.gguf", width=WIDTH)
        yield folder, {}


@asynccontextmanager
async def _hearing(gguf: Path) -> AsyncIterator[Given]:
    """The same with a projector of audio."""
    from tests.sounds_made import audio_projector

    with tempfile.TemporaryDirectory() as folder:
        tiny_gguf(Path(folder) / "tiny.gguf", gguf)
        audio_projector(Path(folder) / "mmproj-tiny-f16.gguf", width=WIDTH)
        yield folder, {}


def converted(gguf: Path) -> str:
    from headrace.engines.openvino import convert
    from headrace.models.inspect import inspect

    return convert(inspect(gguf), MODEL_HOME).path


def _minilm(gguf: Path) -> Path:
    from headrace.models.reference import parse
    from headrace.models.store import Store

    with FileLock(MODEL_HOME / "fetch.lock"):
        return Store(MODEL_HOME).fetch(parse("all-minilm-l6-v2"))


def _as_ir(make: Callable[[Path], Path]) -> Callable[[Path], str]:
    return lambda gguf: converted(make(gguf))


@asynccontextmanager
async def _ranker(gguf: Path) -> AsyncIterator[Given]:
    """A cross-encoder of random weights."""
    from tests.engines.sentence_transformers.conftest import make_ranker

    with tempfile.TemporaryDirectory() as folder:
        yield str(make_ranker(Path(folder), _minilm(gguf))), {}


@asynccontextmanager
async def _headrace(gguf: Path) -> AsyncIterator[Given]:
    """Headrace itself, as somebody else's server."""
    from tests.service.serving import served

    arguments = ("--context-length", "512", "--option", "threads=1", "--option", "slots=4")
    with _layer(gguf) as model, served(str(model), *arguments) as service:
        yield f"headrace:{model.stem}", {"base_url": f"{service.url}/v1"}


@asynccontextmanager
async def _claude(gguf: Path) -> AsyncIterator[Given]:
    from tests.lab.cases.claude import claude

    async with claude() as url:
        yield "anthropic:claude", {"base_url": url, "api_key": "sk-ant-secret"}


def _fields(*names: str) -> frozenset[str]:
    return frozenset(f"sampling_{name}" for name in names)


_ADAPTED = _with_adapters(str, partial(gguf_adapter, layers=SMOLLM2))
_DRAFTS = frozenset(case.name for case in drafts.CASES)
_SHORT = {"context_length": 256, "max_running": 4}
_PENALTIES = _fields("presence_penalty", "frequency_penalty", "repetition_penalty")
_NARROW = _fields("top_p", "top_k", "min_p")
_OF_LLAMACPP = _fields("min_tokens") | {"infill", "prompt_logprobs"}
_OF_OPENVINO = (
    _fields("logit_bias", "logprobs")
    | _SCHEMAS
    | _FORMS
    | IMAGES
    | _DRAFTS
    | {"infill", "prompt_logprobs"}
)
_OF_ECHO = (
    _NARROW
    | _PENALTIES
    | _fields("logit_bias", "min_tokens")
    | _SCHEMAS
    | _FORMS
    | {"tool_calls_strict", "infill"}
)
# Where cores are shared, two threads wait for one another in every layer.
_ONE_THREAD = {"threads": 1}

SAMPLES = [
    Sample(
        "echo",
        _path(lambda gguf: "builtin:echo"),
        settings=_SHORT,
        # Slow enough to be caught in the middle of an answer.
        options={"tokens_per_second": 200},
        refused=_OF_ECHO | IMAGES,
        heavy=False,
    ),
    Sample(
        "echo",
        _path(lambda gguf: "builtin:echo"),
        kinds=("process", "pool"),
        settings={"context_length": 4096, "max_running": 4},
        options={"images": True, "audio": True, "tokens_per_second": 200},
        refused=_OF_ECHO,
        heavy=False,
        first=IMAGES | AUDIO,
        further=IMAGES | AUDIO,
        hears=True,
        name="echo-images",
    ),
    Sample(
        "llamacpp",
        _one_layer,
        settings=_SHORT,
        options=_ONE_THREAD,
        kinds=("process",),
        refused=_OF_LLAMACPP | IMAGES,
        heavy=False,
        name="llamacpp-tiny",
    ),
    Sample(
        "llamacpp",
        _ADAPTED,
        kinds=("process", "pool"),
        settings=_SHORT,
        options=_ONE_THREAD,
        refused=_OF_LLAMACPP | IMAGES,
        first=ADAPTERS,
        further=frozenset(),
        name="llamacpp-adapters",
    ),
    Sample(
        "llamacpp",
        _seeing,
        kinds=("process",),
        settings={"context_length": 512, "max_running": 2},
        options=_ONE_THREAD,
        refused=_OF_LLAMACPP | _DRAFTS,
        heavy=False,
        first=IMAGES,
        name="llamacpp-images",
    ),
    Sample(
        "llamacpp",
        _hearing,
        kinds=("process",),
        settings={"context_length": 512, "max_running": 2},
        options=_ONE_THREAD,
        refused=_OF_LLAMACPP | _DRAFTS | IMAGES,
        heavy=False,
        first=AUDIO,
        hears=True,
        name="llamacpp-audio",
    ),
    Sample(
        "llamacpp",
        _path(str),
        settings=_SHORT,
        options=_ONE_THREAD,
        kinds=("process", "worker", "pool"),
        refused=_OF_LLAMACPP | IMAGES,
        first=SOUND,
    ),
    Sample(
        "openai",
        _headrace,
        settings=_SHORT,
        kinds=("worker", "pool"),
        refused=_OF_LLAMACPP
        | IMAGES
        | _DRAFTS
        | {"resume", "echo_comes_first", "thinking", "continued"},
        # Nobody knows how another server batches, and a near tie falls to either side.
        reported=frozenset({"alone_and_among_sixteen"}),
    ),
    Sample(
        "transformers",
        _path(_smollm2),
        kinds=("process",),
        settings=_SHORT,
        refused=IMAGES | {"infill"},
        first=REAL,
    ),
    Sample(
        "transformers",
        _path(_tiny),
        kinds=("worker", "pool"),
        settings=_SHORT,
        refused=IMAGES | {"infill"},
        name="tiny",
    ),
    Sample(
        "transformers",
        _with_adapters(_tiny, partial(peft_adapter, layers=TINY_FOLDER)),
        kinds=("process",),
        settings=_SHORT,
        refused=IMAGES | _DRAFTS | {"infill"},
        first=ADAPTERS | FEW,
        name="transformers-adapters",
    ),
    Sample(
        "transformers",
        _path(_llava),
        kinds=("process", "pool"),
        settings=_SHORT,
        first=IMAGES,
        further=frozenset(),
        refused=_DRAFTS | {"infill"},
        name="transformers-images",
    ),
    Sample(
        "openvino",
        _path(converted),
        kinds=("process",),
        settings=_SHORT,
        refused=_OF_OPENVINO,
        reported=frozenset({"alone_and_among_sixteen", "resume"}),
        first=REAL,
    ),
    Sample(
        "openvino",
        _path(_half_layer),
        kinds=("worker", "pool"),
        settings=_SHORT,
        refused=_OF_OPENVINO,
        reported=frozenset({"alone_and_among_sixteen", "resume"}),
        name="openvino-tiny",
    ),
    Sample("llamacpp", _path(str), "embed", ("process",), _SHORT, {"pooling": "mean"}),
    Sample("openvino", _path(_as_ir(_minilm)), "embed", ("worker",)),
    Sample("sentence_transformers", _path(_minilm), "embed", ("worker", "pool")),
    Sample("sentence_transformers", _ranker, "rerank", further=frozenset()),
    Sample(
        "anthropic",
        _claude,
        settings=_SHORT,
        kinds=("worker", "pool"),
        refused=_NARROW
        | {"images_damaged", "images_fill_the_context"}
        | _PENALTIES
        | _FORMS
        | _DRAFTS
        | _fields("temperature", "seed", "stop_token_ids", "ignore_eos", "logprobs", "logit_bias")
        | _fields("min_tokens")
        | {"infill", "prompt_logprobs", "continued"}
        | {"resume", "usage_is_exact", "several_choices", "echo_comes_first", "text_and_tokens"}
        | {"cancelled_in_prefill", "context_at_its_end", "thinking"},
    ),
]
"""One for each engine, or more where it has several ways."""

if engines.status("vllm").available:
    # It pins a torch of its own, so it is there only in an environment made for it.
    quick = {"eager": True, "kv_cache_bytes": 1 << 28, "dtype": "float32"}
    SAMPLES.append(
        Sample(
            "vllm",
            _path(_smollm2),
            kinds=("process",),
            settings=_SHORT,
            options=quick,
            refused=IMAGES | {"infill"},
            slow=True,
        )
    )
    SAMPLES.append(
        Sample(
            "vllm",
            _path(_llava),
            kinds=("process",),
            settings=_SHORT,
            options={**quick, "kv_cache_bytes": 64 << 20},
            slow=True,
            first=IMAGES,
            name="vllm-images",
        )
    )
    SAMPLES.append(
        Sample(
            "vllm",
            _with_adapters(_smollm2, partial(peft_adapter, layers=SMOLLM2_FOLDER)),
            kinds=("process",),
            settings=_SHORT,
            options=quick,
            refused=IMAGES | {"infill"},
            slow=True,
            first=ADAPTERS,
            name="vllm-adapters",
        )
    )


if engines.status("llama_server").available:
    # scripts/test-llama-server builds one; most builds have no llguidance.
    _OF_LLAMA_SERVER = (
        _OF_LLAMACPP | IMAGES | {"regex", "grammar", "tool_calls_required", "tool_calls_or_form"}
    )
    SAMPLES.append(
        Sample(
            "llama_server",
            _path(str),
            kinds=("process",),
            settings=_SHORT,
            options=_ONE_THREAD,
            refused=_OF_LLAMA_SERVER,
            slow=True,
        )
    )
    SAMPLES.append(
        Sample(
            "llama_server",
            _seeing,
            kinds=("process",),
            settings={"context_length": 512, "max_running": 2},
            options=_ONE_THREAD,
            refused=(_OF_LLAMA_SERVER - IMAGES) | _DRAFTS,
            slow=True,
            first=IMAGES,
            name="llama_server-images",
        )
    )
    SAMPLES.append(
        Sample(
            "llama_server",
            _ADAPTED,
            kinds=("process",),
            settings=_SHORT,
            options=_ONE_THREAD,
            refused=_OF_LLAMA_SERVER,
            slow=True,
            name="llama_server-adapters",
        )
    )
    SAMPLES.append(
        Sample(
            "llama_server",
            _path(str),
            "embed",
            ("process",),
            _SHORT,
            {"pooling": "mean"},
            slow=True,
        )
    )


def without_a_sample() -> set[str]:
    """The engines that could run here and have no sample."""
    able = {name for name in engines.names() if engines.status(name).available}
    return able - {sample.engine for sample in SAMPLES}
