"""What a model will take in transformers: how many requests, how many tokens, how much memory."""

from __future__ import annotations

import msgspec

from headrace import machine
from headrace.core.model import ModelFile
from headrace.core.status import Footprint
from headrace.engines.base import OpenRequest

PAGE = 256
"""Tokens of a page of the manager's cache, by its own default."""

_MIB = 1 << 20
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "F32": 4, "BF16": 2, "F16": 2}
_SLOTS, _STEP = {"cpu": 16, "cuda": 256}, {"cpu": 256, "cuda": 2048}
# So many requests of full length fit at once on a CPU. More run while they are shorter.
_FULL_ON_CPU = 4
_CPU_SHARE, _CUDA_SHARE = 0.25, 0.6
# Measured: Python with torch and transformers, and what CUDA takes beside it (as documented).
_PROCESS, _CUDA_HOST, _CUDA_DEVICE = 520 * _MIB, 1500 * _MIB, 600 * _MIB
_PACKED = {"int8": 0.55, "int4": 0.32}


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """What the options say about size."""

    dtype: str = "auto"
    quantization: str = "none"
    slots: int | None = None
    cache_tokens: int | None = None
    step_tokens: int | None = None
    prefix_cache: bool = True


class Plan(msgspec.Struct, frozen=True):
    """Requests at once, tokens for each, tokens of all in the cache, tokens in one step."""

    slots: int
    context_length: int
    cache_tokens: int
    step_tokens: int
    prefix_cache: bool = True
    notes: tuple[str, ...] = ()


def expected_device(wanted: str) -> str:
    """Return the device that a load will most likely take, without loading the library."""
    there = any(device.kind == "cuda" for device in machine.devices())
    if wanted.startswith("cuda") or (wanted == "auto" and there):
        return "cuda:0" if wanted in {"auto", "cuda"} else wanted
    return "cpu"


def make_plan(request: OpenRequest, asked: Asked, device: str) -> Plan:
    """Choose what was not asked for, so that the cache fits its share of the memory."""
    model, kind = request.model, "cuda" if device.startswith("cuda") else "cpu"
    wanted = request.context_length or model.context_length or 4096
    slots = asked.slots or min(_SLOTS[kind], request.max_running or _SLOTS[kind])
    fits = _fitting(request, asked, device)
    full = min(slots, _FULL_ON_CPU) if kind == "cpu" else slots
    notes: list[str] = []
    context = wanted
    if request.context_length is None and asked.cache_tokens is None and fits < wanted:
        context = max(PAGE, fits // PAGE * PAGE)
        notes.append(f"context cut to {context}, to fit the memory for models")
    cache = max(context, asked.cache_tokens or min(full * context, max(fits, context)))
    return Plan(
        slots=slots,
        context_length=context,
        cache_tokens=-(-cache // PAGE) * PAGE,
        step_tokens=max(slots, asked.step_tokens or _STEP[kind]),
        prefix_cache=asked.prefix_cache,
        notes=tuple(notes),
    )


def estimate(request: OpenRequest, asked: Asked) -> Footprint:
    """Return what the model takes of the host, and of the GPU if it goes to one."""
    device = expected_device(request.device)
    plan = make_plan(request, asked, device)
    weights = _weights(request.model, asked)
    kv_cache = plan.cache_tokens * _kv_bytes(request.model, asked)
    mask = plan.step_tokens * (plan.cache_tokens + plan.step_tokens) * _width(request.model, asked)
    overhead = _PROCESS + mask
    devices = {"cpu": weights + kv_cache + overhead}
    if device != "cpu":
        on_device = weights + kv_cache + mask + _CUDA_DEVICE
        devices = {"cpu": _PROCESS + _CUDA_HOST, device: on_device}
        overhead = sum(devices.values()) - weights - kv_cache
    return Footprint(
        devices=devices,
        parts={"weights": weights, "kv_cache": kv_cache, "overhead": overhead},
        context_length=plan.context_length,
        max_running=plan.slots,
    )


def _fitting(request: OpenRequest, asked: Asked, device: str) -> int:
    """Return how many tokens of the cache fit the memory."""
    per_token = _kv_bytes(request.model, asked)
    if not per_token:
        return 1 << 40
    if device == "cpu":
        return int((request.memory or machine.host_memory()) * _CPU_SHARE / per_token)
    there = [one.total for one in machine.devices() if one.key == device]
    memory = request.memory or (there[0] if there else 0)
    return max(0, int((memory * _CUDA_SHARE - _weights(request.model, asked)) / per_token))


def _width(model: ModelFile, asked: Asked) -> int:
    return _BYTES.get(asked.dtype) or _BYTES.get(model.quantization or "", 2)


def _weights(model: ModelFile, asked: Asked) -> int:
    stored = _BYTES.get(model.quantization or "")
    if stored is None:
        return model.size
    packed = _PACKED.get(asked.quantization)
    return int(model.size * (packed * 2 if packed else _width(model, asked)) / stored)


def _kv_bytes(model: ModelFile, asked: Asked) -> int:
    # The header's figure is for elements of 2 bytes.
    return (model.kv_bytes_per_token or 0) * _width(model, asked) // 2
