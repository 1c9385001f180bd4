"""vLLM: safetensors on one GPU or several, with its engine core in a process below ours."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from headrace import machine
from headrace.core.errors import ConfigError
from headrace.core.model import ModelFile
from headrace.core.status import Footprint
from headrace.engines.base import About, OpenRequest
from headrace.engines.plan import ELEMENT_BYTES
from headrace.engines.speculation import SpeculationOptions, Way

ABOUT = About(
    formats=("safetensors",),
    devices=("cpu", "cuda"),
    requires="vllm",
    extra="vllm",
    spreads=True,
    able=frozenset(
        {"forms", "infill", "json_schema", "logprobs", "prompt_logprobs", "resume", "speculation"}
        | {"adapters", "vision"}
    ),
)

_GIB = 1 << 30
# Measured: two processes of Python with torch and vLLM; with CUDA, its own memory beside them.
_HOST, _CUDA_DEVICE = 3 * _GIB, 2 * _GIB
# Each further GPU has a process of its own, which takes as much: twice the estimate was measured
# with two.
_RANK = 3 * _GIB
# What CUDA's context and graphs take beside the share that vLLM is given: 1.15 GiB was measured.
_BESIDE = 2 * _GIB
_CPU_CACHE, _CPU_SHARE = 4 * _GIB, 6
_DEFAULT_SHARE, _LEAST_SHARE = 0.9, 0.01
_METHODS = {"draft": "draft_model"}
_NGRAM = 4
"""Tokens at the end of a text that are looked up in it."""


class Options(SpeculationOptions):
    """Settings of vLLM. All are fixed once the model is loaded."""

    ways: ClassVar[tuple[Way, ...]] = ("off", "auto", "ngram", "draft", "mtp", "eagle3")
    of_ngrams: ClassVar[int] = 8

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
    tensor_parallel: int | None = Field(
        None,
        ge=1,
        le=64,
        description="GPUs that share each layer; by default all of the model's `device`.",
    )
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
        description="Answers that do not depend on concurrent requests; slower, and only "
        "for GPUs of compute capability 8.0 and later.",
    )
    load_format: Literal["safetensors", "fastsafetensors", "runai_streamer", "dummy"] = Field(
        "safetensors",
        description="How the weights are read; `dummy` makes random ones, for measurements.",
    )
    engine_args: dict[str, Any] = Field(
        {}, description="Other engine arguments of vLLM, by their names in Python."
    )


def footprint(request: OpenRequest) -> Footprint:
    """Estimate what loading takes of the host, and of each GPU that the model is spread over."""
    options = Options(**request.options)
    spread = parallel(options, request.gpus) * options.pipeline_parallel
    gpus = request.gpus or tuple(f"cuda:{number}" for number in range(spread))
    total = _gpu_memory(gpus)
    weights = _weights(request.model, options) + (request.draft.size if request.draft else 0)
    if request.device == "cpu" or not total:
        kv_cache = options.kv_cache_bytes or _cpu_cache(request.memory)
        devices, known = {"cpu": weights + kv_cache + _HOST}, weights + kv_cache
    else:
        share = int(total * _share(request, options, total))
        each = min(total, share + _BESIDE)
        if options.kv_cache_bytes:
            each = weights // spread + options.kv_cache_bytes + _CUDA_DEVICE
        kv_cache = options.kv_cache_bytes or max(0, share - weights // spread - _CUDA_DEVICE)
        devices = {"cpu": _HOST + (spread - 1) * _RANK, **dict.fromkeys(gpus, each)}
        kv_cache, known = kv_cache * spread, weights + kv_cache * spread
    return Footprint(
        devices=devices,
        parts={"weights": weights, "kv_cache": kv_cache, "overhead": sum(devices.values()) - known},
        context_length=request.context_length or request.model.context_length,
        max_running=options.slots or request.max_running,
    )


def _weights(model: ModelFile, options: Options) -> int:
    stored, wanted = ELEMENT_BYTES.get(model.quantization or ""), ELEMENT_BYTES.get(options.dtype)
    if stored is None or options.quantization:
        return model.size
    # Weights of 32 bits are loaded in 16, unless `dtype` says otherwise.
    return model.size * (wanted or min(stored, 2)) // stored


def memory_arguments(request: OpenRequest, options: Options, device: str) -> dict[str, Any]:
    """Return how much vLLM may take: of a GPU in all, of the host for the cache only."""
    kv_cache = options.kv_cache_bytes
    if device == "cpu":
        return {"kv_cache_memory_bytes": kv_cache or _cpu_cache(request.memory)}
    share = {"gpu_memory_utilization": _share(request, options, _gpu_memory(request.gpus))}
    return share | ({"kv_cache_memory_bytes": kv_cache} if kv_cache else {})


def speculative_config(request: OpenRequest, options: Options) -> dict[str, Any]:
    """Return vLLM's engine argument for drafts; empty without."""
    if not options.drafts:
        return {}
    config: dict[str, Any] = {
        "method": _METHODS.get(options.way, options.way),
        "num_speculative_tokens": options.most_drafted,
    }
    if options.way == "ngram":
        # vLLM takes the longest of these lengths that it has seen before.
        config |= {"prompt_lookup_min": 2, "prompt_lookup_max": _NGRAM}
    if request.draft is not None:
        config["model"] = request.draft.path
    return {"speculative_config": config}


def parallel(options: Options, gpus: tuple[str, ...]) -> int:
    """Return how many GPUs share each layer.

    Raises:
        ConfigError: the options are for another number of GPUs than the model has.
    """
    pipeline = options.pipeline_parallel
    tensor = options.tensor_parallel or max(1, len(gpus) // pipeline)
    if gpus and tensor * pipeline != len(gpus):
        raise ConfigError(
            f"tensor_parallel {tensor} and pipeline_parallel {pipeline} are for "
            f"{tensor * pipeline} GPUs, and the model's device is {len(gpus)}."
        )
    return tensor


def _share(request: OpenRequest, options: Options, total: int) -> float:
    if options.gpu_memory is not None:
        return options.gpu_memory
    memory = request.memory and request.memory // (len(request.gpus) or 1)
    if not (memory and total):
        return _DEFAULT_SHARE
    return max(_LEAST_SHARE, min(_DEFAULT_SHARE, (memory - _BESIDE) / total))


def _cpu_cache(memory: int | None) -> int:
    return min(_CPU_CACHE, (memory or machine.host_memory()) // _CPU_SHARE)


def _gpu_memory(gpus: tuple[str, ...]) -> int:
    """Return the bytes of the smallest of these GPUs, or of all; 0 where there is none."""
    present = [device for device in machine.devices() if device.kind == "cuda"]
    named = [device for device in present if device.key in gpus] or present
    return min((device.total for device in named), default=0)
