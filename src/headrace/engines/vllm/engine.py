"""One model in vLLM's AsyncLLM: what it is started with, and the processes that belong to it."""

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
from collections.abc import AsyncGenerator, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil

from headrace.core.errors import (
    ConfigError,
    GenerationFailed,
    LoadFailed,
    OutOfMemory,
    WorkerDied,
)
from headrace.core.model import Capabilities
from headrace.core.request import new_id
from headrace.engines.base import Admitted, EngineFacts, EngineRequest, OpenRequest, RawEvent
from headrace.engines.tokenizer import TokenizerMixin, Vocabulary
from headrace.engines.vllm import Options, memory_arguments
from headrace.engines.vllm.call import HONOURED, Call, failure, is_out_of_memory, parameters

_LOOK_S, _LAST_STEP_S, _KILLED_S = 0.5, 2.0, 5.0

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

_OURS = (
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
)

_ELSEWHERE = {theirs: f"it is the option {ours}" for ours, theirs in _TYPED.items()} | {
    "gpu_memory_utilization": "it is the option gpu_memory",
    "kv_cache_memory_bytes": "it is the option kv_cache_bytes",
    "max_model_len": "it is the model's context_length",
    "trust_remote_code": "it is the model's trust_remote_code",
    "revision": "it is the model's revision",
    **dict.fromkeys(("hf_token", "download_dir"), "Headrace fetches models itself"),
    **dict.fromkeys(_OURS, "Headrace sets it"),
}


class Engine(TokenizerMixin):
    """One model in an AsyncLLM, and the thread and process that belong to it."""

    def __init__(self, request: OpenRequest) -> None:
        self._options = Options(**request.options)
        self._llm: Any = None
        self._cores: list[psutil.Process] = []
        self._awake = False
        self._private = Path(tempfile.mkdtemp(prefix="vllm-"))
        # The engine core dies with the thread that started it: this one lives as long as we do.
        self._thread = ThreadPoolExecutor(1, "vllm")
        try:
            self._thread.submit(self._load, request).result()
        except BaseException:
            self.close()
            raise

    async def generate(self, request: EngineRequest) -> AsyncGenerator[RawEvent, None]:
        """Yield what vLLM generates; when this is closed the request is aborted."""
        if self._llm is None:
            raise GenerationFailed("The engine is closed.")
        prompt = [*request.token_ids, *request.answered]
        self._vocabulary.check(prompt)
        self._vocabulary.check(request.sampling.logit_bias, param="logit_bias")
        call = Call(request, self._vocabulary)
        await self._woken()
        outputs = self._llm.generate(
            {"type": "token", "prompt_token_ids": prompt},
            self._parameters(request),
            new_id(),
        )
        try:
            yield Admitted(0, len(prompt))
            async for output in outputs:
                for event in call.events(output):
                    yield event
        except Exception as error:
            # Whatever the library raises, the caller gets an error of ours.
            raise failure(error, self._core_failure()) from error
        finally:
            await outputs.aclose()

    async def _woken(self) -> None:
        """Wait until the core answers: vLLM itself would wait for ever for one that has died."""
        if self._awake:
            return
        asking = asyncio.ensure_future(self._llm.get_supported_tasks())
        try:
            while not (await asyncio.wait({asking}, timeout=_LOOK_S))[0]:
                alive = {child.pid for child in multiprocessing.active_children()}
                if not alive.issuperset(core.pid for core in self._cores):
                    raise WorkerDied("vLLM's engine core has died.", detail=self._core_failure())
            asking.result()
            self._awake = True
        except Exception as error:
            # It has died, or was dead before it was asked.
            raise failure(error, self._core_failure()) from error
        finally:
            asking.cancel()

    def _parameters(self, request: EngineRequest) -> Any:
        try:
            return parameters(request, self._defaults)
        except Exception as error:
            # It refuses some values at once.
            raise failure(error, "") from error

    def close(self) -> None:
        """End the engine core, and with it what it holds of the GPU."""
        llm, self._llm = self._llm, None
        if llm is not None:
            below = _with_children(self._cores)
            llm.shutdown(_LAST_STEP_S)
            # It does not wait for the processes that it kills, and they have the memory.
            _, alive = psutil.wait_procs(below, _KILLED_S)
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
        args = _arguments(request, self._options, device)
        # The limits of a batch are smaller where no server is behind the engine.
        config = args.create_engine_config(UsageContext.OPENAI_API_SERVER)
        before = {*multiprocessing.active_children()}
        try:
            self._llm = _open(config, self._private / "failed")
        except Exception as error:
            # The engine core says why on its own side.
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
        self._vocabulary = Vocabulary(tokenizer, int(model.get_vocab_size()))
        self._defaults: dict[str, Any] = dict(model.get_diff_sampling_param())
        self.facts = EngineFacts(
            device=device,
            context_length=int(model.max_model_len),
            max_running=int(config.scheduler_config.max_num_seqs),
            chat_template=request.model.chat_template,
            bos_token=tokenizer.bos_token or "",
            eos_token=tokenizer.eos_token or "",
            capabilities=Capabilities(
                sampling=HONOURED,
                json_schema=True,
                batch_invariant=self._options.batch_invariant,
                resume=True,
            ),
        )

    def _core_failure(self) -> str:
        """Return what the engine core failed with, nothing while it lives."""
        report = self._private / "failed"
        return report.read_text(encoding="utf-8") if report.exists() else ""


def _prepare(options: Options) -> None:
    """Set what vLLM takes from the environment, before it is imported."""
    os.environ |= {
        # A fork would hold our sockets open, and the locks of our threads for ever.
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        # The answers of a step come in one turn of the loop, and leave as one frame.
        "VLLM_V1_OUTPUT_PROC_CHUNK_SIZE": "8192",
        # Some of its functions are compiled at their first call, however eager it is.
        **({"TORCH_COMPILE_DISABLE": "1"} if options.eager else {}),
        **({"VLLM_BATCH_INVARIANT": "1"} if options.batch_invariant else {}),
    }
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")


def _arguments(request: OpenRequest, options: Options, device: str) -> Any:
    """Return vLLM's AsyncEngineArgs.

    Raises:
        ConfigError: a key of `engine_args` is unknown, or is for Headrace to set.
    """
    from vllm.engine.arg_utils import AsyncEngineArgs

    check(options.engine_args, (field.name for field in dataclasses.fields(AsyncEngineArgs)))
    given = {theirs: getattr(options, ours) for ours, theirs in _TYPED.items()}
    given["max_num_seqs"] = options.slots or request.max_running
    return AsyncEngineArgs(
        **{
            "model": request.model.path,
            "tokenizer": request.model.path,
            "max_model_len": request.context_length or -1,
            "trust_remote_code": request.trust_remote_code,
            "disable_log_stats": True,
            # Their own would give the same draws after each start.
            "seed": secrets.randbelow(1 << 31),
            # Where JSON allows any white space a small model can go on with it up to its limit.
            "structured_outputs_config": {"backend": "guidance", "disable_any_whitespace": True},
            **given,
            **memory_arguments(request, options, device),
            **options.engine_args,
        }
    )


def check(given: Iterable[str], known: Iterable[str]) -> None:
    """Refuse engine arguments that there are not, and those that are set in another way.

    Raises:
        ConfigError: naming the first such key, and the one nearest to it.
    """
    names = {name for name in known if not name.startswith("_")}
    for key in given:
        if (why := _ELSEWHERE.get(key)) is not None:
            raise ConfigError(f"engine_args may not give {key}: {why}.")
        if key not in names:
            near = difflib.get_close_matches(key, names - _ELSEWHERE.keys(), 1, 0.4)
            hint = f" The nearest is {near[0]}." if near else ""
            raise ConfigError(f"engine_args: vLLM has no engine argument {key!r}.{hint}")


def _with_children(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    every: list[psutil.Process] = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            every += [process, *process.children(recursive=True)]
    return every


def _open(config: Any, report: Path) -> Any:
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.executor import Executor

    from headrace.engines.vllm.core import tethered

    executor = tethered(Executor.get_class(config), str(report))
    return AsyncLLM(config, executor, log_stats=False, log_requests=False)
