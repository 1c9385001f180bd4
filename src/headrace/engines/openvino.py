"""OpenVINO: continuous batching on CPUs, from OpenVINO IR and from GGUF in F16 or Q8_0."""

from __future__ import annotations

import gc
from collections.abc import AsyncGenerator, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from headrace.core.errors import ConfigError, LoadFailed
from headrace.core.model import Capabilities
from headrace.core.status import Footprint
from headrace.engines.base import (
    About,
    Embedder,
    EngineFacts,
    EngineOptions,
    EngineRequest,
    Generator,
    OpenRequest,
    RawEvent,
    Reranker,
)
from headrace.engines.openmp import physical_cores
from headrace.engines.openvino_call import HONOURED, Stepper
from headrace.engines.openvino_convert import convert, needs_conversion, not_converted, prepared
from headrace.engines.openvino_size import CachePlan, estimate, plan_cache
from headrace.engines.openvino_text import Vocabulary, without_telemetry

if TYPE_CHECKING:
    from openvino_genai import ContinuousBatchingPipeline, SchedulerConfig, Tokenizer

__all__ = ["ABOUT", "Engine", "Options", "convert", "footprint", "prepared", "tune_options"]

ABOUT = About(
    formats=("openvino", "gguf"),
    requires="openvino_genai",
    extra="openvino",
    tasks=("generate", "embed", "rerank"),
)

_BLOCK = 32
_NOTE = "the library does not tell how many prompt tokens came from the prefix cache: cached is 0"


class Options(EngineOptions):
    """Settings of OpenVINO. All are fixed once the model is loaded."""

    threads: int | None = Field(
        None, ge=1, le=1024, description="CPU threads; by default one for each core it may use."
    )
    precision: Literal["auto", "f32", "bf16", "f16"] = Field(
        "auto",
        description="What it computes in; `auto` is the fastest of the machine, "
        "f32 where answers must repeat themselves.",
    )
    kv_type: Literal["auto", "u8"] = Field(
        "auto", description="Type of the KV cache; `auto` has 16 bits, `u8` takes 0.6 of it."
    )
    cache_tokens: int | None = Field(
        None,
        ge=_BLOCK,
        le=1 << 30,
        description="Tokens that the KV cache holds for all requests together; by default those "
        "of all of them at full length, or what fits a quarter of the memory for models.",
    )
    batch_size: int = Field(
        256,
        ge=32,
        le=65536,
        description="Tokens computed in one step, after which a cancelled request is gone.",
    )
    prefix_cache: bool | None = Field(
        None,
        description="Keep a prompt's KV cache for the next one; on where `precision` is f32 and "
        "answers need not repeat themselves.",
    )
    properties: dict[str, str | int | float | bool] = Field(
        {}, description="More properties of OpenVINO's CPU device, by their names in capitals."
    )


class _TextEngine:
    """One model in one pipeline, which batches what runs at the same time."""

    def __init__(self, request: OpenRequest) -> None:
        if needs_conversion(request.model):
            raise not_converted(request.model)
        import openvino_genai as genai  # a native library: loaded with the model, not before

        self._request = request
        self._options = options = settled(request)
        plan = plan_cache(request, options.cache_tokens, options.kv_type)
        self._plan = plan
        self._scheduler = _scheduler(genai.SchedulerConfig(), plan, options)
        self._tokenizer: Tokenizer | None = genai.Tokenizer(request.model.path)
        self.vocabulary = Vocabulary(self._tokenizer)
        self._stepper = Stepper(self._open, self.vocabulary)
        self.facts = self._facts()

    def generate(self, request: EngineRequest) -> AsyncGenerator[RawEvent, None]:
        """Return what the model generates."""
        self.vocabulary.check((*request.token_ids, *request.answered))
        return self._stepper.stream(request)

    def tokenize(self, text: str, *, add_special: bool) -> Sequence[int]:
        """Return token ids, markers included."""
        return self.vocabulary.tokenize(text, add_special=add_special)

    def detokenize(self, token_ids: Sequence[int]) -> str:
        """Return text.

        Raises:
            InvalidRequest: an id is outside of the vocabulary.
        """
        return self.vocabulary.text(token_ids)

    def shown(self, token_ids: Sequence[int]) -> str:
        """Return the text of token ids without control tokens, which a stream leaves out."""
        return self.vocabulary.text(token_ids, shown=True)

    def close(self) -> None:
        """Free the model."""
        self._stepper.close()
        gc.collect()

    def _open(self) -> ContinuousBatchingPipeline:
        import openvino_genai as genai

        path, properties = self._request.model.path, properties_of(self._options)
        try:
            return genai.ContinuousBatchingPipeline(
                path, self._tokenizer, self._scheduler, "CPU", **properties
            )
        except RuntimeError as error:
            raise LoadFailed("OpenVINO could not load the model.", detail=str(error)) from error

    def _facts(self) -> EngineFacts:
        vocabulary = self.vocabulary
        return EngineFacts(
            device="cpu",
            context_length=self._plan.context_length,
            max_running=self._plan.max_running,
            chat_template=self._request.model.chat_template,
            bos_token=vocabulary.bos_token,
            eos_token=vocabulary.eos_token,
            adds_bos=bool(vocabulary.tokenize("", add_special=True)),
            notes=(*self._plan.notes, _NOTE),
            capabilities=Capabilities(sampling=HONOURED, resume=True),
        )


def open_model(request: OpenRequest) -> Generator | Embedder | Reranker:
    """Load a model for its task.

    Raises:
        ConfigError, LoadFailed, OutOfMemory: it cannot be.
    """
    if request.device not in {"auto", "cpu"}:
        raise LoadFailed(f"OpenVINO runs on the CPU here, not on {request.device}.")
    without_telemetry()
    if request.task == "generate":
        return _TextEngine(request)
    from headrace.engines import openvino_vectors

    kinds = {"embed": openvino_vectors.VectorEngine, "rerank": openvino_vectors.ScoreEngine}
    return kinds[request.task](request, properties_of(settled(request)))


Engine = open_model


def footprint(request: OpenRequest) -> Footprint:
    """Estimate what loading takes, from the file's header and the options."""
    options = settled(request)
    return estimate(request.model, plan_cache(request, options.cache_tokens, options.kv_type))


def tune_options(request: OpenRequest) -> Sequence[dict[str, Any]]:
    """Return what is worth a try: a larger batch of prompts, and answers nearer to the model's."""
    more = [{"batch_size": 1024}] if (request.max_running or 1) > 1 else []
    return [*more, {"precision": "f32"}]


def settled(request: OpenRequest) -> Options:
    """Return the options; of those that were not given, such that answers repeat if they must.

    Raises:
        ConfigError: a property is not written as the library's are.
    """
    options = Options(**request.options)
    for name in options.properties:
        if not name.isidentifier() or not name.isupper():
            raise ConfigError(f"{name!r} is no property of OpenVINO: they are in capitals.")
    changed: dict[str, Any] = {}
    if options.prefix_cache is None:
        # In 16 bits, prompts that share a beginning and run together get wrong answers from it.
        exact = options.precision == "f32"
        changed["prefix_cache"] = exact and not request.repeatable
    if request.repeatable and "precision" not in request.options:
        changed["precision"] = "f32"
    return options.model_copy(update=changed)


def properties_of(options: Options) -> dict[str, str | int | float | bool]:
    """Return the library's own properties."""
    found = dict(options.properties)
    found["INFERENCE_NUM_THREADS"] = options.threads or physical_cores()
    if options.precision != "auto":
        found["INFERENCE_PRECISION_HINT"] = options.precision
    if options.kv_type != "auto":
        found["KV_CACHE_PRECISION"] = options.kv_type
    return found


def _scheduler(config: SchedulerConfig, plan: CachePlan, options: Options) -> SchedulerConfig:
    config.num_kv_blocks = -(-plan.tokens // _BLOCK) + 1
    config.max_num_seqs = plan.max_running
    config.max_num_batched_tokens = max(options.batch_size, plan.max_running)
    config.dynamic_split_fuse = True
    config.enable_prefix_caching = bool(options.prefix_cache)
    return config
