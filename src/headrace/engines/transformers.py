"""Models of Hugging Face in torch: safetensors, continuous batching, CPU or GPU."""

from __future__ import annotations

import sys
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from headrace.core.errors import GenerationFailed, LoadFailed
from headrace.core.model import Capabilities
from headrace.core.status import Footprint
from headrace.engines.base import (
    SAMPLING,
    About,
    EngineFacts,
    EngineOptions,
    EngineRequest,
    OpenRequest,
    RawEvent,
)
from headrace.engines.grammar import grammar
from headrace.engines.openmp import SpinGuard
from headrace.engines.transformers_size import Asked, Plan, estimate, make_plan
from headrace.engines.transformers_tokens import TokenizerMixin, Vocabulary

if TYPE_CHECKING:
    from headrace.engines.transformers_batch import Batched
    from headrace.engines.transformers_single import Single

ABOUT = About(
    formats=("safetensors",),
    devices=("cpu", "cuda", "mps"),
    requires="transformers",
    extra="transformers",
)


class Options(EngineOptions):
    """Settings of transformers. All are fixed once the model is loaded."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Type of weights and cache; `auto` is the one they are stored in."
    )
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2", "flash_attention_3"] = Field(
        "auto", description="Implementation of attention; `auto` is flash where it is installed."
    )
    batching: Literal["auto", "off"] = Field(
        "auto", description="Continuous batching where the model allows it, or one at a time."
    )
    slots: int | None = Field(
        None,
        ge=1,
        le=1024,
        description="Requests in one batch; by default 16, 256 on a GPU, and 1 where answers "
        "must repeat themselves.",
    )
    cache_tokens: int | None = Field(
        None,
        ge=256,
        le=1 << 30,
        description="Tokens that the KV cache holds for all requests together; by default what "
        "fits. A request that is pushed out of it is computed again.",
    )
    step_tokens: int | None = Field(
        None,
        ge=16,
        le=1 << 16,
        description="Tokens computed in one step, after which a cancelled request is gone; by "
        "default 256, 2048 on a GPU.",
    )
    prefix_cache: bool = Field(True, description="Share the KV cache of equal beginnings.")
    quantization: Literal["none", "int8", "int4"] = Field(
        "none", description="Pack the weights while loading; needs bitsandbytes and CUDA."
    )
    device_map: Literal["auto", "balanced", "balanced_low_0", "sequential"] | None = Field(
        None, description="Spread the layers over devices; by default one device has them all."
    )
    max_memory: dict[str, str] = Field(
        {}, description='With `device_map`, the most of each: {"cuda:0": "20GiB", "cpu": "60GiB"}.'
    )
    threads: int | None = Field(
        None, ge=1, le=1024, description="CPU threads; by default what torch chooses."
    )


class Engine(TokenizerMixin):
    """One model folder in torch, behind the library's batching or its `generate`."""

    def __init__(self, request: OpenRequest) -> None:
        self._options = Options(**request.options)
        self._model: Any = None
        self._tokenizer: Any = None
        self._runner: Batched | Single | None = None
        self._guard: SpinGuard | None = None
        try:
            self._load(request)
        except BaseException:
            self.close()
            raise

    def generate(self, request: EngineRequest) -> AsyncGenerator[RawEvent, None]:
        """Return what the model generates."""
        from headrace.engines.transformers_answer import Answer
        from headrace.engines.transformers_sample import Draw, rules

        runner, sampling = self._runner, request.sampling
        if runner is None:
            raise GenerationFailed("The engine is closed.")
        self._vocabulary.check((*request.token_ids, *request.answered))
        self._vocabulary.check(sampling.logit_bias, param="logit_bias")
        draw = Draw(
            rules(sampling, self._defaults),
            (*request.token_ids, *request.answered),
            seed=sampling.seed,
            bias=sampling.logit_bias,
            matcher=None if request.json_schema is None else self._matcher(request.json_schema),
        )
        return runner.generate(request, Answer(request, draw, self._vocabulary, self._ends))

    def close(self) -> None:
        """Free the model."""
        if self._guard is not None:
            self._guard.close()
        runner, self._runner = self._runner, None
        if runner is not None:
            runner.close()
        self._model = None
        del runner
        if "headrace.engines.transformers_load" in sys.modules:
            from headrace.engines.transformers_load import give_back

            give_back()

    def _load(self, request: OpenRequest) -> None:
        import torch  # with the model, not before
        import transformers

        from headrace.engines import transformers_load as loading

        options = self._options
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        device = loading.pick_device(request.device)
        if device == "cpu":
            self._guard = SpinGuard(torch.get_num_threads())
            self._guard.start()
        dtype = "auto" if options.dtype == "auto" else getattr(torch, options.dtype)
        arguments: dict[str, Any] = {
            "dtype": dtype,
            **loading.placement(options.device_map, options.max_memory),
            **loading.quantization(options.quantization, device, dtype),
        }
        if options.attention != "auto":
            arguments["attn_implementation"] = options.attention
        self._model, self._tokenizer = loading.load(
            request.model.path, device, arguments, trusted=request.trust_remote_code
        )
        plan = make_plan(request, _asked(request, options), device)
        self._vocabulary = Vocabulary(
            self._tokenizer, self._model.get_input_embeddings().num_embeddings
        )
        self._ends = loading.end_tokens(self._model, self._tokenizer)
        # Kept apart: `generate` would mix them into every request.
        self._defaults = self._model.generation_config
        self._model.generation_config = transformers.GenerationConfig()
        self._runner, note = self._start(plan)
        self.facts = self._facts(request, plan, note)

    def _start(self, plan: Plan) -> tuple[Batched | Single, str | None]:
        from headrace.engines.transformers_batch import Batched, Unbatched
        from headrace.engines.transformers_load import is_spread
        from headrace.engines.transformers_single import Single

        flash = self._options.attention == "auto"
        try:
            if plan.slots == 1:
                raise Unbatched("as asked")
            if is_spread(self._model):
                raise Unbatched("the model is on several devices")
            return Batched(self._model, plan, flash=flash), None
        except Unbatched as error:
            return Single(self._model, plan.step_tokens), f"one request at a time: {error}"

    def _facts(self, request: OpenRequest, plan: Plan, note: str | None) -> EngineFacts:
        if request.model.context_length and plan.context_length > request.model.context_length:
            raise LoadFailed(
                f"context_length {plan.context_length} is more than the model's "
                f"{request.model.context_length}."
            )
        tokenizer = self._tokenizer
        assert self._runner is not None
        return EngineFacts(
            device=str(self._model.device),
            context_length=plan.context_length,
            max_running=self._runner.max_running,
            chat_template=request.model.chat_template,
            bos_token=tokenizer.bos_token or "",
            eos_token=tokenizer.eos_token or "",
            adds_bos=bool(self.tokenize("", add_special=True)),
            notes=(*plan.notes, *((note,) if note else ())),
            capabilities=Capabilities(
                sampling=SAMPLING,
                json_schema=getattr(tokenizer, "backend_tokenizer", None) is not None,
                batch_invariant=self._runner.max_running == 1,
                resume=True,
            ),
        )

    def _matcher(self, schema: dict[str, Any]) -> Any:
        from llguidance import LLMatcher  # native, and rarely needed
        from llguidance.hf import from_tokenizer

        text = grammar(schema)
        if self._grammars is None:
            self._grammars = from_tokenizer(self._tokenizer, n_vocab=self._vocabulary.size)
        return LLMatcher(self._grammars, text)

    _grammars: Any = None


def footprint(request: OpenRequest) -> Footprint:
    """Estimate what loading takes, from the folder's headers and the options."""
    return estimate(request, _asked(request, Options(**request.options)))


def _asked(request: OpenRequest, options: Options) -> Asked:
    """Return what is asked for about size; only alone does a request repeat itself bit by bit."""
    alone = options.batching == "off" or (request.repeatable and options.slots is None)
    return Asked(
        dtype=options.dtype,
        quantization=options.quantization,
        slots=1 if alone else options.slots,
        cache_tokens=options.cache_tokens,
        step_tokens=options.step_tokens,
        prefix_cache=options.prefix_cache,
    )
