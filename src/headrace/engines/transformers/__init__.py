"""Models of Hugging Face in torch: safetensors, continuous batching, CPU or GPU."""

from __future__ import annotations

from typing import ClassVar, Literal

import msgspec
from pydantic import Field

from headrace import machine
from headrace.core.model import ModelFile
from headrace.core.status import Footprint
from headrace.engines import plan
from headrace.engines.base import About, OpenRequest
from headrace.engines.plan import ELEMENT_BYTES, PAGE, CachePlan, expected_device
from headrace.engines.speculation import SpeculationOptions, Way

ABOUT = About(
    formats=("safetensors",),
    devices=("cpu", "cuda", "mps", "rocm"),
    confined=True,
    spreads=True,
    requires="transformers",
    extra="transformers",
    able=frozenset({"adapters", "forms", "infill", "json_schema", "logprobs"})
    | {"prompt_logprobs", "resume", "speculation", "vision"},
)

_MIB = 1 << 20
_SLOTS, _STEP = {"cpu": 16, "cuda": 256}, {"cpu": 256, "cuda": 2048}
# Requests of full length that fit at once on a CPU. More run while they are shorter.
_FULL_ON_CPU = 4
_CPU_SHARE, _CUDA_SHARE = 0.25, 0.6
# Measured: Python with torch and transformers, and what CUDA takes beside it (as documented).
_PROCESS, _CUDA_HOST, _CUDA_DEVICE = 520 * _MIB, 1500 * _MIB, 600 * _MIB
_PACKED = {"int8": 0.55, "int4": 0.32}


class Options(SpeculationOptions):
    """Settings of transformers. All are fixed once the model is loaded."""

    ways: ClassVar[tuple[Way, ...]] = ("off", "auto", "ngram")

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
        "have to be reproducible.",
    )
    cache_tokens: int | None = Field(
        None,
        ge=256,
        le=1 << 30,
        description="Tokens that the KV cache holds for all requests together; by default what "
        "fits. A request that is evicted from it is computed again.",
    )
    step_tokens: int | None = Field(
        None,
        ge=16,
        le=1 << 16,
        description="Tokens computed in one step, after which a cancelled request ends; by "
        "default 256, 2048 on a GPU.",
    )
    prefix_cache: bool = Field(True, description="Share the KV cache of equal beginnings.")
    images: bool = Field(
        True, description="Take images where the model does; then one request runs at a time."
    )
    quantization: Literal["none", "int8", "int4"] = Field(
        "none", description="Pack the weights while loading; needs bitsandbytes and CUDA."
    )
    device_map: Literal["auto", "balanced", "balanced_low_0", "sequential"] | None = Field(
        None, description="How layers are spread over devices; `balanced` if it has several GPUs."
    )
    max_memory: dict[str, str] = Field(
        {}, description='With `device_map`, the most of each: {"cuda:0": "20GiB", "cpu": "60GiB"}.'
    )
    threads: int | None = Field(
        None, ge=1, le=1024, description="CPU threads; by default one for each core it may use."
    )


def settled(request: OpenRequest) -> Options:
    """Return the options, with one slot where requests run alone.

    Only a request that runs alone is reproducible bit by bit.
    """
    options = Options(**request.options)
    alone = options.batching == "off" or (request.repeatable and options.slots is None)
    return options.model_copy(update={"slots": 1}) if alone else options


def plan_cache(request: OpenRequest, options: Options, device: str) -> CachePlan:
    """Choose the sizes that are not set, so that the cache fits its share of the memory."""
    kind = _kind(device)
    slots = options.slots or min(_SLOTS[kind], request.max_running or _SLOTS[kind])
    full = min(slots, _FULL_ON_CPU) if kind == "cpu" else slots
    fits = None if options.cache_tokens else _fitting(request, options, device)
    planned = plan.plan_cache(request, full, fits, limit="the memory for models")
    tokens = max(planned.context_length, options.cache_tokens or planned.tokens)
    return msgspec.structs.replace(planned, slots=slots, tokens=-(-tokens // PAGE) * PAGE)


def step_tokens(options: Options, slots: int, device: str) -> int:
    """Return how many tokens are computed in one step; those of all drafts fit in."""
    return max(slots * (1 + options.most_drafted), options.step_tokens or _STEP[_kind(device)])


writes = plan.torch_caches


def footprint(request: OpenRequest) -> Footprint:
    """Estimate what loading takes, from the folder's headers and the options."""
    options, model, device = settled(request), request.model, expected_device(request.device)
    planned = plan_cache(request, options, device)
    step = step_tokens(options, planned.slots, device)
    weights = _weights(model, options)
    kv_cache = planned.tokens * _kv_bytes(model, options)
    mask = step * (planned.tokens + step) * _width(model, options)
    model_bytes = weights + kv_cache + mask
    devices = {"cpu": model_bytes + _PROCESS + plan.torch_libraries()}
    if gpus := plan.expected_gpus(request, device):
        devices = {"cpu": _PROCESS + _CUDA_HOST}
        devices |= plan.divided(model_bytes, gpus, _CUDA_DEVICE)
    return plan.footprint(devices, planned, weights=weights, kv_cache=kv_cache)


def _kind(device: str) -> str:
    return "cuda" if device.startswith("cuda") else "cpu"


def _fitting(request: OpenRequest, options: Options, device: str) -> int | None:
    """Return how many tokens of the cache fit the memory, None where their size is unknown."""
    per_token = _kv_bytes(request.model, options)
    if device == "cpu":
        return plan.tokens_in((request.memory or machine.host_memory()) * _CPU_SHARE, per_token)
    gpus = plan.expected_gpus(request, device)
    totals = (item.total for item in machine.devices() if item.key in gpus)
    memory = request.memory or sum(totals)
    left = memory * _CUDA_SHARE - _weights(request.model, options)
    return plan.tokens_in(max(0.0, left), per_token)


def _width(model: ModelFile, options: Options) -> int:
    return ELEMENT_BYTES.get(options.dtype) or ELEMENT_BYTES.get(model.quantization or "", 2)


def _weights(model: ModelFile, options: Options) -> int:
    stored = ELEMENT_BYTES.get(model.quantization or "")
    if stored is None:
        return model.size
    packed = _PACKED.get(options.quantization)
    return int(model.size * (packed * 2 if packed else _width(model, options)) / stored)


def _kv_bytes(model: ModelFile, options: Options) -> int:
    # The header's figure is for elements of 2 bytes.
    return (model.kv_bytes_per_token or 0) * _width(model, options) // 2
