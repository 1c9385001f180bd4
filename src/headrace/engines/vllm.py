"""vLLM: safetensors on one GPU or several, with its engine core in a process below ours."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import shutil
import tempfile
from collections.abc import AsyncGenerator, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import psutil
from pydantic import Field

from headrace.core.errors import GenerationFailed, LoadFailed, OutOfMemory, WorkerDied
from headrace.core.model import Capabilities
from headrace.core.request import new_id
from headrace.core.status import Footprint
from headrace.engines.base import (
    SAMPLING,
    About,
    Admitted,
    EngineFacts,
    EngineOptions,
    EngineRequest,
    OpenRequest,
    RawEvent,
)
from headrace.engines.transformers_tokens import TokenizerMixin, Vocabulary
from headrace.engines.vllm_args import Asked, arguments, estimate, prepare
from headrace.engines.vllm_call import Call, failure, is_out_of_memory, parameters

ABOUT = About(formats=("safetensors",), devices=("cpu", "cuda"), requires="vllm", extra="vllm")

_LOOK_S, _LAST_STEP_S, _KILLED_S = 0.5, 2.0, 5.0


class Options(EngineOptions):
    """Settings of vLLM. All are fixed once the model is loaded."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Type of the weights; `auto` is the one they are stored in, 16 bits."
    )
    quantization: str | None = Field(
        None,
        max_length=40,
        description="Method by which the weights are packed, `fp8` for one; by default what the "
        "model's own configuration says.",
    )
    kv_type: str = Field(
        "auto", max_length=40, description="Type of the KV cache: `auto` or `fp8`, for two."
    )
    tensor_parallel: int = Field(1, ge=1, le=64, description="GPUs that share each layer.")
    pipeline_parallel: int = Field(1, ge=1, le=64, description="GPUs that share the layers.")
    gpu_memory: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Share of each GPU's memory that it takes for weights and cache; by default "
        "the budget for models.",
    )
    kv_cache_bytes: int | None = Field(
        None,
        ge=1 << 20,
        description="Bytes of the KV cache on each device; by default what `gpu_memory` leaves, "
        "and on a CPU a sixth of the budget, at most 4 GiB.",
    )
    slots: int | None = Field(
        None, ge=1, le=8192, description="Requests in one batch; by default what vLLM's server has."
    )
    step_tokens: int | None = Field(
        None,
        ge=16,
        le=1 << 20,
        description="Tokens computed in one step; by default what vLLM's server has.",
    )
    prefix_cache: bool = Field(True, description="Share the KV cache of equal beginnings.")
    eager: bool = Field(
        False, description="Compile nothing and capture no graphs: loads sooner, runs slower."
    )
    batch_invariant: bool = Field(
        False,
        description="Answers that repeat themselves whatever runs beside them; slower, and only "
        "for GPUs of compute capability 8.0 and later.",
    )
    load_format: Literal["safetensors", "fastsafetensors", "runai_streamer", "dummy"] = Field(
        "safetensors",
        description="How the weights are read; `dummy` makes them up, for measurements.",
    )
    engine_args: dict[str, Any] = Field(
        {}, description="Other engine arguments of vLLM, by their names in Python."
    )


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
            # Whatever the library raised is put in our own terms.
            raise failure(error, self._said()) from error
        finally:
            await outputs.aclose()

    async def _woken(self) -> None:
        """Wait for the core's first word: vLLM itself would wait for ever for one that has died."""
        if self._awake:
            return
        asking = asyncio.ensure_future(self._llm.get_supported_tasks())
        try:
            while not (await asyncio.wait({asking}, timeout=_LOOK_S))[0]:
                alive = {one.pid for one in multiprocessing.active_children()}
                if not alive.issuperset(core.pid for core in self._cores):
                    raise WorkerDied("vLLM's engine core has died.", detail=self._said())
            asking.result()
            self._awake = True
        except Exception as error:
            # It has died, or was dead before it was asked.
            raise failure(error, self._said()) from error
        finally:
            asking.cancel()

    def _parameters(self, request: EngineRequest) -> Any:
        try:
            return parameters(request, self._defaults)
        except Exception as error:
            # It refuses some values as soon as it hears of them.
            raise failure(error, "") from error

    def close(self) -> None:
        """End the engine core, and with it what it holds of the GPU."""
        llm, self._llm = self._llm, None
        if llm is not None:
            below = _with_children(self._cores)
            llm.shutdown(_LAST_STEP_S)
            # It does not wait for those that it kills, and they have the memory.
            _, alive = psutil.wait_procs(below, _KILLED_S)
            for process in alive:
                process.kill()
            psutil.wait_procs(alive, _KILLED_S)
        self._thread.shutdown()
        shutil.rmtree(self._private, ignore_errors=True)

    def _load(self, request: OpenRequest) -> None:
        prepare(eager=self._options.eager, batch_invariant=self._options.batch_invariant)
        from vllm.platforms import current_platform  # after the environment is prepared
        from vllm.usage.usage_lib import UsageContext

        device = str(current_platform.device_type)
        if request.device.partition(":")[0] not in {"auto", device}:
            raise LoadFailed(f"This build of vLLM is for {device}, not for {request.device}.")
        args = arguments(request, asked(self._options), self._options.engine_args, device)
        # The limits of a batch are smaller where no server is behind the engine.
        config = args.create_engine_config(UsageContext.OPENAI_API_SERVER)
        before = {*multiprocessing.active_children()}
        try:
            self._llm = _open(config, self._private / "failed")
        except Exception as error:
            # The engine core says why on its own side.
            said = self._said() or f"{type(error).__name__}: {error}"
            kind = OutOfMemory if is_out_of_memory(said) else LoadFailed
            raise kind("vLLM could not load the model.", detail=said) from error
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
            adds_bos=bool(self.tokenize("", add_special=True)),
            capabilities=Capabilities(
                sampling=SAMPLING,
                json_schema=True,
                batch_invariant=self._options.batch_invariant,
                resume=True,
            ),
        )

    def _said(self) -> str:
        """Return what the engine core failed with, nothing while it lives."""
        report = self._private / "failed"
        return report.read_text(encoding="utf-8") if report.exists() else ""


def footprint(request: OpenRequest) -> Footprint:
    """Estimate what loading takes, from the model's header and the options."""
    return estimate(request, asked(Options(**request.options)))


def asked(options: Options) -> Asked:
    """Return the options without those for vLLM alone."""
    return Asked(**options.model_dump(exclude={"engine_args", "batch_invariant"}))


def _with_children(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    every: list[psutil.Process] = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            every += [process, *process.children(recursive=True)]
    return every


def _open(config: Any, report: Path) -> Any:
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.executor import Executor

    from headrace.engines.vllm_core import tethered

    executor = tethered(Executor.get_class(config), str(report))
    return AsyncLLM(config, executor, log_stats=False, log_requests=False)
