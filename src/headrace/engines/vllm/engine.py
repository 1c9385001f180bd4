"""A model in vLLM's AsyncLLM: its arguments and its processes."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import difflib
import multiprocessing
import os
import secrets
import shutil
import tempfile
from collections.abc import AsyncGenerator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil

from headrace.core.adapter import AdapterFile
from headrace.core.constraint import FORMS
from headrace.core.envelope import new_id
from headrace.core.errors import (
    ConfigError,
    GenerationFailed,
    LoadFailed,
    OutOfMemory,
    WorkerDied,
)
from headrace.core.events import PromptToken
from headrace.core.model import Capabilities
from headrace.engines.base import Admitted, EngineFacts, EngineRequest, OpenRequest, RawEvent
from headrace.engines.pictures import decoded, image_marker
from headrace.engines.tokenizer import TokenizerMixin, Vocabulary, special_tokens
from headrace.engines.vllm import (
    Options,
    memory_arguments,
    parallel,
    speculative_config,
)
from headrace.engines.vllm.adapters import Adapters, lora_arguments
from headrace.engines.vllm.call import (
    Call,
    failure,
    honoured,
    is_out_of_memory,
    parameters,
    prompt_tokens,
    scoring_parameters,
)

_POLL_S, _SHUTDOWN_S, _KILLED_S = 0.5, 2.0, 5.0

_UNCOUNTED = "the library does not report the drafted tokens of a request: they are 0"

_TYPED = {
    "dtype": "dtype",
    "quantization": "quantization",
    "kv_type": "kv_cache_dtype",
    "tensor_parallel": "tensor_parallel_size",
    "pipeline_parallel": "pipeline_parallel_size",
    "slots": "max_num_seqs",
    "step_tokens": "max_num_batched_tokens",
    "prefix_cache": "enable_prefix_caching",
    "eager": "enforce_eager",
    "load_format": "load_format",
}
"""Our names of options to those of vLLM's engine arguments."""

_MANAGED = (
    "model",
    "model_weights",
    "tokenizer",
    "served_model_name",
    "skip_tokenizer_init",
    "runner",
    "convert",
    "enable_prompt_embeds",
    "disable_log_stats",
    "enable_log_requests",
    "structured_outputs_config",
)

_REFUSED = {theirs: f"it is the option {ours}" for ours, theirs in _TYPED.items()} | {
    "gpu_memory_utilization": "it is the option gpu_memory",
    "kv_cache_memory_bytes": "it is the option kv_cache_bytes",
    "max_model_len": "it is the model's context_length",
    "trust_remote_code": "it is the model's trust_remote_code",
    "revision": "it is the model's revision",
    "enable_lora": "it is on for a model with adapters",
    **dict.fromkeys(("hf_token", "download_dir"), "Headrace fetches models itself"),
    **dict.fromkeys(_MANAGED, "Headrace sets it"),
}


class Engine(TokenizerMixin):
    """A model in an AsyncLLM, with the thread and the process of its core."""

    def __init__(self, request: OpenRequest) -> None:
        self._options = Options(**request.options)
        self._llm: Any = None
        self._cores: list[psutil.Process] = []
        self._core_answers = False
        self._private = Path(tempfile.mkdtemp(prefix="vllm-"))
        # The engine core ends with the thread that started it, so the engine keeps that thread.
        self._thread = ThreadPoolExecutor(1, "vllm")
        try:
            self._thread.submit(self._load, request).result()
        except BaseException:
            self.close()
            raise

    async def generate(self, request: EngineRequest) -> AsyncGenerator[RawEvent, None]:
        """Yield the events of a request; closing this aborts it."""
        if self._llm is None:
            raise GenerationFailed("The engine is closed.")
        prompt = [*request.token_ids, *request.answered]
        self._vocabulary.check(prompt)
        self._vocabulary.check(request.sampling.logit_bias, param="logit_bias")
        call = Call(request, self._vocabulary)
        await self._wait_for_core()
        sent: dict[str, Any] = {"type": "token", "prompt_token_ids": prompt}
        if request.media:
            images = await asyncio.to_thread(lambda: [*map(decoded, request.media)])
            sent = {"prompt_token_ids": prompt, "multi_modal_data": {"image": images}}
        lora = await self._adapters.loaded(request.adapter, self._llm, self._core_failure())
        outputs = self._llm.generate(sent, self._parameters(request), new_id(), lora_request=lora)
        try:
            if not request.media:
                yield Admitted(0, len(prompt))
            async for output in outputs:
                for event in call.events(output):
                    yield event
        except Exception as error:
            # Any exception of the library becomes a HeadraceError.
            raise failure(error, self._core_failure()) from error
        finally:
            await outputs.aclose()

    async def prompt_tokens(
        self, token_ids: Sequence[int], candidates: int, adapter: str = ""
    ) -> AsyncGenerator[Sequence[PromptToken], None]:
        """Yield the tokens of a prompt with their log probabilities; closing this aborts it."""
        if self._llm is None:
            raise GenerationFailed("The engine is closed.")
        self._vocabulary.check(token_ids)
        await self._wait_for_core()
        prompt = {"type": "token", "prompt_token_ids": list(token_ids)}
        lora = await self._adapters.loaded(adapter, self._llm, self._core_failure())
        parameters = scoring_parameters(candidates)
        outputs = self._llm.generate(prompt, parameters, new_id(), lora_request=lora)
        scored: list[Any] = []
        try:
            async for output in outputs:
                scored += output.prompt_logprobs or ()
        except Exception as error:
            # Any exception of the library becomes a HeadraceError.
            raise failure(error, self._core_failure()) from error
        finally:
            await outputs.aclose()
        yield prompt_tokens(token_ids, scored, candidates, self._vocabulary)

    async def add_adapter(self, file: AdapterFile) -> None:
        """Take an adapter; see `AdapterSwitch`."""
        self._adapters.add(file, self.facts.device)

    async def remove_adapter(self, name: str) -> None:
        """Free an adapter; see `AdapterSwitch`."""
        await self._adapters.remove(name, self._llm)

    async def _wait_for_core(self) -> None:
        """Wait until the core answers: vLLM would wait without end for one that has died."""
        if self._core_answers:
            return
        probe = asyncio.ensure_future(self._llm.get_supported_tasks())
        try:
            while not (await asyncio.wait({probe}, timeout=_POLL_S))[0]:
                alive = {child.pid for child in multiprocessing.active_children()}
                if not alive.issuperset(core.pid for core in self._cores):
                    raise WorkerDied("vLLM's engine core has died.", detail=self._core_failure())
            probe.result()
            self._core_answers = True
        except Exception as error:
            # The core died before or during the call.
            raise failure(error, self._core_failure()) from error
        finally:
            probe.cancel()

    def _parameters(self, request: EngineRequest) -> Any:
        try:
            return parameters(request, self._defaults)
        except Exception as error:
            # vLLM checks some values at once.
            raise failure(error, "") from error

    def close(self) -> None:
        """End the engine core, and free its memory of the GPU."""
        llm, self._llm = self._llm, None
        if llm is not None:
            processes = _with_children(self._cores)
            llm.shutdown(_SHUTDOWN_S)
            # vLLM does not wait for the processes that it kills, which have the memory.
            _, alive = psutil.wait_procs(processes, _KILLED_S)
            for process in alive:
                process.kill()
            psutil.wait_procs(alive, _KILLED_S)
        self._thread.shutdown()
        shutil.rmtree(self._private, ignore_errors=True)

    def _load(self, request: OpenRequest) -> None:
        _prepare(self._options)
        from vllm.platforms import current_platform  # after the environment is prepared
        from vllm.usage.usage_lib import UsageContext

        device = str(current_platform.device_type)
        if request.device.partition(":")[0] not in {"auto", device}:
            raise LoadFailed(f"This build of vLLM is for {device}, not for {request.device}.")
        first = tuple(f"cuda:{number}" for number in range(len(request.gpus)))
        if request.gpus != first:
            raise LoadFailed("vLLM takes the first GPUs of its process; run it in one of its own.")
        args = _arguments(request, self._options, device)
        # The batch limits are smaller in vLLM's other contexts.
        config = args.create_engine_config(UsageContext.OPENAI_API_SERVER)
        self._adapters = Adapters(request.adapters, self._private, config)
        before = {*multiprocessing.active_children()}
        try:
            self._llm = _open(config, self._private / "failed")
        except Exception as error:
            # The engine core has the reason.
            reason = self._core_failure() or f"{type(error).__name__}: {error}"
            kind = OutOfMemory if is_out_of_memory(reason) else LoadFailed
            raise kind("vLLM could not load the model.", detail=reason) from error
        cores = {*multiprocessing.active_children()} - before
        self._cores = [psutil.Process(core.pid) for core in cores]
        self._settle(request, config, device)

    def _settle(self, request: OpenRequest, config: Any, device: str) -> None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(
            request.model.path,
            local_files_only=True,
            trust_remote_code=request.trust_remote_code,
        )
        model = config.model_config
        marker = _image_marker(request) if model.is_multimodal_model else ""
        self._vocabulary = Vocabulary(tokenizer, int(model.get_vocab_size()))
        self._defaults: dict[str, Any] = dict(model.get_diff_sampling_param())
        self.facts = EngineFacts(
            device=device,
            context_length=int(model.max_model_len),
            max_running=int(config.scheduler_config.max_num_seqs),
            chat_template=request.model.chat_template,
            special_tokens=special_tokens(tokenizer),
            max_token_bytes=self._vocabulary.max_token_bytes(),
            image_marker=marker,
            capabilities=Capabilities(
                sampling=honoured(drafts=self._options.drafts),
                json_schema=True,
                forms=frozenset(FORMS),
                batch_invariant=self._options.batch_invariant,
                resume=True,
                vision=bool(marker),
                prompt_logprobs=True,
                adapters=True,
                speculation=self._options.way if self._options.drafts else "",
            ),
            notes=(_UNCOUNTED,) if self._options.drafts else (),
        )

    def _core_failure(self) -> str:
        """Return the error of the engine core, empty while it lives."""
        from headrace.engines.vllm.core import reported

        return reported(self._private / "failed")


def _image_marker(request: OpenRequest) -> str:
    """Return the text that stands for an image; empty for a model without images."""
    from transformers import AutoProcessor

    path, trusted = request.model.path, request.trust_remote_code
    with contextlib.suppress(OSError, ValueError):
        processor: Any = AutoProcessor.from_pretrained(
            path, local_files_only=True, trust_remote_code=trusted
        )
        if getattr(processor, "image_processor", None) is not None:
            return image_marker(processor, request.model.chat_template)
    return ""


def _prepare(options: Options) -> None:
    """Set vLLM's environment variables, before it is imported."""
    os.environ |= {
        # A fork would keep open sockets and held locks of this process.
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        # The tokens of a step are read in one turn of the loop, and sent as one frame.
        "VLLM_V1_OUTPUT_PROC_CHUNK_SIZE": "8192",
        # Some functions are compiled at their first call, even with `eager`.
        **({"TORCH_COMPILE_DISABLE": "1"} if options.eager else {}),
        **({"VLLM_BATCH_INVARIANT": "1"} if options.batch_invariant else {}),
    }
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")


def _arguments(request: OpenRequest, options: Options, device: str) -> Any:
    """Return vLLM's AsyncEngineArgs.

    Raises:
        ConfigError: a key of `engine_args` is unknown, or set by Headrace.
    """
    from vllm.engine.arg_utils import AsyncEngineArgs

    check(options.engine_args, (field.name for field in dataclasses.fields(AsyncEngineArgs)))
    values = {theirs: getattr(options, ours) for ours, theirs in _TYPED.items()}
    values["max_num_seqs"] = options.slots or request.max_running
    values["tensor_parallel_size"] = parallel(options, request.gpus)
    return AsyncEngineArgs(
        **{
            "model": request.model.path,
            "tokenizer": request.model.path,
            "max_model_len": request.context_length or -1,
            "trust_remote_code": request.trust_remote_code,
            "disable_log_stats": True,
            "worker_extension_cls": "headrace.engines.vllm.rank.Rank",
            # vLLM's default gives the same draws after each start.
            "seed": secrets.randbelow(1 << 31),
            # With free white space a small model can repeat it up to the limit.
            "structured_outputs_config": {"backend": "guidance", "disable_any_whitespace": True},
            **values,
            **memory_arguments(request, options, device),
            **speculative_config(request, options),
            **options.engine_args,
            **lora_arguments(request.adapters, device, options.engine_args),
        }
    )


def check(values: Iterable[str], known: Iterable[str]) -> None:
    """Check for engine arguments that are unknown, or set in another way.

    Raises:
        ConfigError: naming the first such key, and the nearest known one.
    """
    names = {name for name in known if not name.startswith("_")}
    for key in values:
        if (reason := _REFUSED.get(key)) is not None:
            raise ConfigError(f"engine_args may not give {key}: {reason}.")
        if key not in names:
            nearest = difflib.get_close_matches(key, names - _REFUSED.keys(), 1, 0.4)
            hint = f" The nearest is {nearest[0]}." if nearest else ""
            raise ConfigError(f"engine_args: vLLM has no engine argument {key!r}.{hint}")


def _with_children(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    all_processes: list[psutil.Process] = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            all_processes += [process, *process.children(recursive=True)]
    return all_processes


def _open(config: Any, report: Path) -> Any:
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.executor import Executor

    from headrace.engines.vllm.core import tethered

    executor = tethered(Executor.get_class(config), str(report))
    return AsyncLLM(config, executor, log_stats=False, log_requests=False)
