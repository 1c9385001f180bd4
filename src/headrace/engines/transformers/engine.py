"""A model folder in torch: its device, type, quantisation and tokenizer."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import importlib.util
import sys
from collections.abc import AsyncGenerator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import torch
import transformers

from headrace.core.adapter import AdapterFile
from headrace.core.constraint import FORMS, Constraint
from headrace.core.errors import (
    ConfigError,
    GenerationFailed,
    HeadraceError,
    LoadFailed,
    OutOfMemory,
)
from headrace.core.events import PromptToken
from headrace.core.install import install_command
from headrace.core.model import Capabilities
from headrace.engines import plan
from headrace.engines.base import EngineFacts, EngineRequest, OpenRequest, RawEvent
from headrace.engines.drafting import Gain, log_gain
from headrace.engines.openmp import SpinGuard, physical_cores
from headrace.engines.pictures import image_marker, is_installed
from headrace.engines.plan import CachePlan
from headrace.engines.tokenizer import TokenizerMixin, Vocabulary, special_tokens
from headrace.engines.transformers import plan_cache, settled, step_tokens
from headrace.engines.transformers.answer import HONOURED, Answer, Draw, ends_of, failure, rules
from headrace.engines.transformers.batched import Batched, Processors, Unbatched, one_at_a_time
from headrace.engines.transformers.drafted import Drafting
from headrace.engines.transformers.lowrank import LowRank, Names
from headrace.engines.transformers.scorer import Scorer
from headrace.engines.transformers.single import Single
from headrace.text.grammar import grammar

_PROCESSORS = ("preprocessor_config.json", "processor_config.json")


class Engine(TokenizerMixin):
    """One model folder in torch, behind the library's batching or its `generate`."""

    def __init__(self, request: OpenRequest) -> None:
        self._options = settled(request)
        self._model: Any = None
        self._tokenizer: Any = None
        self._runner: Batched | Single | None = None
        self._scorer: Scorer | None = None
        self._guard: SpinGuard | None = None
        self._grammars: Any = None
        self._processor: Any = None
        self._drafting: Drafting | None = None
        self._gain: Gain | None = None
        try:
            self._load(request)
        except BaseException:
            self.close()
            raise

    def generate(self, request: EngineRequest) -> AsyncGenerator[RawEvent, None]:
        """Return the events of a request."""
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
            matcher=None if request.constraint is None else self._matcher(request.constraint),
            min_tokens=sampling.min_tokens or 0,
            ends=ends_of(sampling, self._ends),
        )
        return runner.generate(request, Answer(request, draw, self._vocabulary, self._ends))

    def prompt_tokens(
        self, token_ids: Sequence[int], candidates: int, adapter: str = ""
    ) -> AsyncGenerator[Sequence[PromptToken], None]:
        """Return the tokens of a prompt with their log probabilities."""
        if self._scorer is None:
            raise GenerationFailed("The engine is closed.")
        self._vocabulary.check(token_ids)
        return self._scorer.tokens(token_ids, candidates, adapter)

    def close(self) -> None:
        """Free the model."""
        if self._guard is not None:
            self._guard.close()
        runner, self._runner = self._runner, None
        scorer, self._scorer = self._scorer, None
        if scorer is not None:
            scorer.close()
        if runner is not None:
            runner.close()
        self._model = None
        del runner
        _release_memory()

    def _load(self, request: OpenRequest) -> None:
        options = self._options
        torch.set_num_threads(options.threads or physical_cores())
        device = plan.torch_device(request.device, torch)
        device = "cuda:0" if device == "cuda" else device
        if device == "cpu":
            self._guard = SpinGuard(torch.get_num_threads())
            self._guard.start()
        dtype = "auto" if options.dtype == "auto" else getattr(torch, options.dtype)
        arguments: dict[str, Any] = {
            "dtype": dtype,
            **_placement(
                options.device_map or ("balanced" if len(request.gpus) > 1 else None),
                options.max_memory,
            ),
            **_quantization(options.quantization, device, dtype),
        }
        if options.attention != "auto":
            arguments["attn_implementation"] = options.attention
        path, trusted = request.model.path, request.trust_remote_code
        if options.images:
            self._processor = _processor(path, trusted=trusted)
        sees = self._processor is not None
        self._model, self._tokenizer = _load(path, device, arguments, trusted=trusted, sees=sees)
        planned = plan_cache(_with_memory(request, device), options, device)
        self._vocabulary = Vocabulary(
            self._tokenizer, self._model.get_input_embeddings().num_embeddings
        )
        self._ends = _end_tokens(self._model, self._tokenizer)
        # Kept apart, as `generate` would apply them to every request.
        self._defaults = self._model.generation_config
        self._model.generation_config = transformers.GenerationConfig()
        self._adapters = LowRank(self._model, one_at_a_time(self._model))
        self._names = Names(self._vocabulary.size)
        for file in request.adapters:
            self._add(file)
        step = step_tokens(options, planned.slots, device)
        self._runner, note = self._start(planned, step)
        # A request that runs alone has hooks in the model.
        thread = self._runner.thread if isinstance(self._runner, Single) else None
        self._scorer = Scorer(self._model, self._vocabulary, thread, self._adapters)
        self.facts = self._facts(request, planned, note)

    async def add_adapter(self, file: AdapterFile) -> None:
        """Load an adapter; see `AdapterSwitch`."""
        try:
            await asyncio.to_thread(self._add, file)
        except RuntimeError as error:
            raise _refusal(error) from error

    async def remove_adapter(self, name: str) -> None:
        """Free an adapter; see `AdapterSwitch`."""
        await asyncio.to_thread(self._remove, name)

    def _add(self, file: AdapterFile) -> None:
        self._adapters.add(file)
        self._names.add(file.name)

    def _remove(self, name: str) -> None:
        self._adapters.remove(name)
        self._names.remove(name)

    def _start(self, planned: CachePlan, step: int) -> tuple[Batched | Single, str | None]:
        try:
            if planned.slots == 1 and not self._options.drafts:
                raise Unbatched("as configured")
            if self._processor is not None:
                raise Unbatched("the model takes images")
            if len(set(getattr(self._model, "hf_device_map", {}).values())) > 1:
                raise Unbatched("the model is on several devices")
            model, options, names = self._model, self._options, self._names
            return Batched(model, planned, step, options, self._processors, names), None
        except Unbatched as error:
            undrafted = ", and speculation is off" if self._options.drafts else ""
            note = f"one request at a time{undrafted}: {error}"
            length = planned.context_length
            return Single(self._model, step, self._adapters, self._processor, length), note

    def _processors(self) -> Processors:
        if not self._options.drafts:
            return Processors(self._adapters)
        self._gain = Gain(partial(log_gain, Path(self._model.name_or_path).name))
        self._drafting = Drafting(self._adapters, self._gain)
        return self._drafting

    @property
    def drafting(self) -> bool | None:
        """Whether tokens are drafted now; None without speculation."""
        return self._gain.is_on if self._gain and self._drafts else None

    @property
    def _drafts(self) -> bool:
        batched = isinstance(self._runner, Batched)
        return batched and self._drafting is not None and self._drafting.drafts

    def _facts(self, request: OpenRequest, planned: CachePlan, note: str | None) -> EngineFacts:
        if request.model.context_length:
            plan.granted_context(request, request.model.context_length)
        tokenizer = self._tokenizer
        assert self._runner is not None
        marker = image_marker(self._processor, request.model.chat_template)
        known = getattr(tokenizer, "backend_tokenizer", None) is not None
        if isinstance(self._runner, Batched) and self._options.drafts and not self._drafts:
            note = "speculation is off: the attention of the model has a window"
        return EngineFacts(
            device=str(self._model.device),
            context_length=planned.context_length,
            max_running=self._runner.max_running,
            chat_template=request.model.chat_template,
            special_tokens=special_tokens(tokenizer),
            max_token_bytes=self._vocabulary.max_token_bytes(),
            image_marker=marker,
            notes=(*planned.notes, *((note,) if note else ())),
            capabilities=Capabilities(
                sampling=HONOURED,
                json_schema=known,
                forms=frozenset(FORMS if known else ()),
                batch_invariant=isinstance(self._runner, Single),
                resume=True,
                vision=bool(marker),
                prompt_logprobs=True,
                adapters=True,
                speculation=self._options.way if self._drafts else "",
            ),
        )

    def _matcher(self, constraint: Constraint) -> Any:
        from llguidance import LLMatcher  # native, and rarely needed
        from llguidance.hf import from_tokenizer

        if self._grammars is None:
            self._grammars = from_tokenizer(self._tokenizer, n_vocab=self._vocabulary.size)
        matcher = LLMatcher(self._grammars, grammar(constraint), log_level=0)
        if matcher.is_error():
            raise GenerationFailed("The grammar was not compiled.", detail=matcher.get_error())
        return matcher


def _with_memory(request: OpenRequest, device: str) -> OpenRequest:
    """Return a request with the memory of AMD's GPU, of which the service knows no budget.

    Its list of GPUs is NVIDIA's.
    """
    if not (torch.version.hip and device.startswith("cuda")):
        return request
    free, _ = torch.cuda.mem_get_info(device)
    # What the model takes of it already is part of the plan.
    return msgspec.structs.replace(request, memory=free + torch.cuda.memory_reserved(device))


def _processor(path: str, *, trusted: bool) -> Any:
    """Return what prepares images for a model; None if it takes none, or Pillow is missing."""
    if not (is_installed() and any((Path(path) / name).exists() for name in _PROCESSORS)):
        return None
    common = {"local_files_only": True, "trust_remote_code": trusted}
    try:
        config = transformers.AutoConfig.from_pretrained(path, **common)
        if type(config) not in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
            return None
        return transformers.AutoProcessor.from_pretrained(path, **common)
    except (RuntimeError, OSError, ValueError, ImportError) as error:
        raise _refusal(error) from error


def _load(
    path: str, device: str, arguments: dict[str, Any], *, trusted: bool, sees: bool
) -> tuple[Any, Any]:
    """Return model and tokenizer of a folder. `arguments` are those of `from_pretrained`.

    Raises:
        LoadFailed, OutOfMemory: the library refused.
    """
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    common = {"local_files_only": True, "trust_remote_code": trusted}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, **common)
        kind = (
            transformers.AutoModelForImageTextToText if sees else transformers.AutoModelForCausalLM
        )
        model = kind.from_pretrained(path, use_safetensors=True, **arguments, **common)
        if "device_map" not in arguments:
            model = model.to(device)
    except (RuntimeError, OSError, ValueError) as error:
        raise _refusal(error) from error
    return model.eval(), tokenizer


def _quantization(kind: str, device: str, dtype: Any) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` for 8 or 4 bits.

    Raises:
        ConfigError: bitsandbytes or CUDA is missing.
    """
    if kind == "none":
        return {}
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"quantization {kind} needs bitsandbytes: {install_command(package='bitsandbytes')}"
        )
    if not device.startswith("cuda"):
        raise ConfigError(f"quantization {kind} needs a CUDA device, and this is {device}.")
    compute = torch.bfloat16 if dtype == "auto" else dtype
    config = transformers.BitsAndBytesConfig(
        load_in_8bit=kind == "int8",
        load_in_4bit=kind == "int4",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=compute,
    )
    return {"quantization_config": config, "device_map": {"": device}}


def _placement(device_map: str | None, max_memory: dict[str, str]) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` that spread a model over devices.

    Raises:
        ConfigError: accelerate is missing.
    """
    if device_map is None:
        return {}
    if importlib.util.find_spec("accelerate") is None:
        raise ConfigError(f"device_map needs accelerate: {install_command('transformers')}")
    # accelerate has numbers for GPUs.
    limits = {
        int(key.partition(":")[2] or 0) if key.startswith("cuda") else key: value
        for key, value in max_memory.items()
    }
    return {"device_map": device_map, "max_memory": limits or None}


def _end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """Return the tokens that end an answer."""
    configured: int | list[int] | None = model.generation_config.eos_token_id
    listed = [configured] if configured is None or isinstance(configured, int) else configured
    return frozenset(end for end in (*listed, tokenizer.eos_token_id) if end is not None)


def _release_memory() -> None:
    """Return memory that torch has freed to the device and to the system."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)


def _refusal(error: Exception) -> HeadraceError:
    reason = str(error)
    error_of_text = failure(reason)
    if isinstance(error_of_text, OutOfMemory):
        return error_of_text
    if "trust_remote_code" in reason:
        return LoadFailed(
            "The model brings code of its own; it is run only with trust_remote_code and a "
            "pinned revision.",
            detail=reason,
        )
    return LoadFailed("transformers could not load the model.", detail=reason)
