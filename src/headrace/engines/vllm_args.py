"""What vLLM is started with: our options in its terms, the rest checked, and the memory of it."""

from __future__ import annotations

import dataclasses
import difflib
import os
import secrets
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from headrace import machine
from headrace.core.errors import ConfigError
from headrace.core.model import ModelFile
from headrace.core.status import Footprint
from headrace.engines.base import OpenRequest

_GIB = 1 << 30
# Measured: two processes of Python with torch and vLLM; with CUDA, what that takes beside them.
_HOST, _CUDA_DEVICE = 3 * _GIB, 2 * _GIB
_CPU_CACHE, _CPU_SHARE = 4 * _GIB, 6
_USUAL_SHARE = 0.9
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "F32": 4, "BF16": 2, "F16": 2}

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


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """The options by our names."""

    dtype: str = "auto"
    quantization: str | None = None
    kv_type: str = "auto"
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    gpu_memory: float | None = None
    kv_cache_bytes: int | None = None
    slots: int | None = None
    step_tokens: int | None = None
    prefix_cache: bool = True
    eager: bool = False
    load_format: str = "safetensors"


def prepare(*, eager: bool, batch_invariant: bool) -> None:
    """Set what vLLM takes from the environment, before it is imported."""
    os.environ |= {
        # A fork would hold our sockets open, and the locks of our threads for ever.
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        # The answers of a step come in one turn of the loop, and leave as one frame.
        "VLLM_V1_OUTPUT_PROC_CHUNK_SIZE": "8192",
        # Some of its functions are compiled at their first call, however eager it is.
        **({"TORCH_COMPILE_DISABLE": "1"} if eager else {}),
        **({"VLLM_BATCH_INVARIANT": "1"} if batch_invariant else {}),
    }
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")


def arguments(request: OpenRequest, asked: Asked, rest: Mapping[str, Any], device: str) -> Any:
    """Return vLLM's AsyncEngineArgs.

    Raises:
        ConfigError: a key of `rest` is unknown, or is for Headrace to set.
    """
    from vllm.engine.arg_utils import AsyncEngineArgs

    check(rest, (field.name for field in dataclasses.fields(AsyncEngineArgs)))
    given = {theirs: getattr(asked, ours) for ours, theirs in _TYPED.items()}
    given["max_num_seqs"] = asked.slots or request.max_running
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
            **_memory(request, asked, device),
            **rest,
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


def _memory(request: OpenRequest, asked: Asked, device: str) -> dict[str, Any]:
    """Return how much vLLM may take: of a GPU all at once, of the host for the cache alone."""
    if device == "cpu":
        return {"kv_cache_memory_bytes": asked.kv_cache_bytes or _cpu_cache(request.memory)}
    share = {"gpu_memory_utilization": _share(request.memory, asked, _gpu_memory())}
    return share | ({"kv_cache_memory_bytes": asked.kv_cache_bytes} if asked.kv_cache_bytes else {})


def _share(memory: int | None, asked: Asked, total: int) -> float:
    if asked.gpu_memory is not None:
        return asked.gpu_memory
    return _USUAL_SHARE if not (memory and total) else min(_USUAL_SHARE, memory / total)


def _cpu_cache(memory: int | None) -> int:
    return min(_CPU_CACHE, (memory or machine.host_memory()) // _CPU_SHARE)


def _gpu_memory() -> int:
    """Return the bytes of the smallest GPU, 0 where there is none."""
    return min((one.total for one in machine.devices() if one.kind == "cuda"), default=0)


def estimate(request: OpenRequest, asked: Asked) -> Footprint:
    """Return what the model takes of the host, and of each GPU it is spread over."""
    total = _gpu_memory()
    weights = _weights(request.model, asked)
    if request.device == "cpu" or not total:
        kv_cache = asked.kv_cache_bytes or _cpu_cache(request.memory)
        devices, held = {"cpu": weights + kv_cache + _HOST}, weights + kv_cache
    else:
        spread = asked.tensor_parallel * asked.pipeline_parallel
        each = int(total * _share(request.memory, asked, total))
        if asked.kv_cache_bytes:
            each = weights // spread + asked.kv_cache_bytes + _CUDA_DEVICE
        kv_cache = asked.kv_cache_bytes or max(0, each - weights // spread - _CUDA_DEVICE)
        devices = {"cpu": _HOST, **{f"cuda:{number}": each for number in range(spread)}}
        kv_cache, held = kv_cache * spread, weights + kv_cache * spread
    return Footprint(
        devices=devices,
        parts={"weights": weights, "kv_cache": kv_cache, "overhead": sum(devices.values()) - held},
        context_length=request.context_length or request.model.context_length,
        max_running=asked.slots or request.max_running,
    )


def _weights(model: ModelFile, asked: Asked) -> int:
    stored, wanted = _BYTES.get(model.quantization or ""), _BYTES.get(asked.dtype)
    if stored is None or asked.quantization:
        return model.size
    # What is stored in 32 bits is loaded in 16, unless they are asked for.
    return model.size * (wanted or min(stored, 2)) // stored
