"""What llama.cpp will take: how many requests of how many tokens, and how much memory."""

from __future__ import annotations

import importlib.util
import math
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import msgspec

from headrace import machine
from headrace.core.model import ModelFile
from headrace.core.status import Footprint
from headrace.engines.base import OpenRequest
from headrace.models.gguf import Skipped, read_header

_DEFAULT_SLOTS = 4
_MIB = 1 << 20
_KV_SHARE = {"f16": 1.0, "bf16": 1.0, "q8_0": 34 / 64, "q4_0": 18 / 64}

# Measured with SmolLM2-135M. A process with the library: Python, the code, buffers, warm-up.
_PROCESS = 64 * _MIB
_PER_WORD, _PER_SLOT = 400, 2 * _MIB
# Activations of a token of the batch go with the width, which goes with the root of the size.
_PER_ACTIVATION = 2.6
# Not measured with this library yet: what CUDA itself takes of the host and of the GPU.
_CUDA_HOST, _CUDA_DEVICE = 400 * _MIB, 500 * _MIB


class Settings(NamedTuple):
    """The options that decide on the memory; `batch` is how many tokens are computed at once."""

    batch: int
    kv_type: str
    gpu_layers: int


class ContextPlan(msgspec.Struct, frozen=True):
    """How many requests at once, and how many tokens each of them may hold."""

    slots: int
    context_length: int
    notes: tuple[str, ...] = ()


def plan_context(
    request: OpenRequest, slots: int | None, kv_type: str, memory: int | None
) -> ContextPlan:
    """Choose slots and context so that the KV cache takes at most a quarter of `memory` bytes.

    What was asked for is kept. Of what was not, slots give way first and then the context.
    """
    model, asked = request.model, slots
    context = request.context_length or model.context_length or 4096
    slots = asked or min(_DEFAULT_SLOTS, request.max_running or _DEFAULT_SLOTS)
    per_token = (model.kv_bytes_per_token or 0) * _KV_SHARE[kv_type]
    if not per_token or memory is None:
        return ContextPlan(slots, context)
    fits = int(memory / 4 / per_token)
    notes: list[str] = []
    if slots * context > fits and asked is None:
        slots = max(1, fits // context)
        notes.append(f"slots cut to {slots}, to fit a quarter of the memory for models")
    if slots * context > fits and request.context_length is None:
        context = max(256, fits // slots // 256 * 256)
        notes.append(f"context cut to {context}, to fit a quarter of the memory for models")
    return ContextPlan(slots, context, tuple(notes))


def estimate(model: ModelFile, plan: ContextPlan, settings: Settings, device: str) -> Footprint:
    """Return what the model takes of the host, and of the GPU if `device` is one.

    Raises:
        LoadFailed: the model's header cannot be read.
    """
    words, layers = _words_and_layers(Path(model.path), _stamp(model.path))
    tokens = plan.slots * plan.context_length
    batch = min(max(settings.batch, plan.slots), 512)
    kv_cache = int(tokens * (model.kv_bytes_per_token or 0) * _KV_SHARE[settings.kv_type])
    activations = _PER_ACTIVATION * math.sqrt(model.parameters or 0) * batch
    overhead = _PROCESS + words * _PER_WORD + int(activations) + plan.slots * _PER_SLOT
    devices = {"cpu": model.size + kv_cache + overhead}
    if device.startswith("cuda"):
        share = _share(settings.gpu_layers, layers)
        moved = int(share * (model.size + kv_cache)) + int(activations) + words * batch * 4
        on_host = int((1 - share) * (model.size + kv_cache))
        devices = {"cpu": on_host + overhead + _CUDA_HOST, device: moved + _CUDA_DEVICE}
        overhead = sum(devices.values()) - model.size - kv_cache
    return Footprint(
        devices=devices,
        parts={"weights": model.size, "kv_cache": kv_cache, "overhead": overhead},
        context_length=plan.context_length,
        max_running=plan.slots,
    )


def expected_device(wanted: str) -> str:
    """Return the device that a load will most likely take, without loading the library."""
    there = any(device.kind == "cuda" for device in machine.devices())
    if wanted.startswith("cuda") or (wanted == "auto" and there and _is_built_for_cuda()):
        return "cuda:0"
    return "cpu"


def _share(gpu_layers: int, layers: int) -> float:
    # The layer after the last, the output's, counts as one too.
    return 1.0 if gpu_layers < 0 else min(1.0, gpu_layers / (layers + 1))


def _stamp(path: str) -> tuple[int, int]:
    try:
        status = Path(path).stat()
    except OSError:
        return 0, 0
    return status.st_size, status.st_mtime_ns


@lru_cache(maxsize=64)
def _words_and_layers(path: Path, stamp: tuple[int, int]) -> tuple[int, int]:
    del stamp  # part of the key: another file under the same name is read again
    metadata = read_header(path).metadata
    words = metadata.get("tokenizer.ggml.tokens")
    layers = metadata.get(f"{metadata.get('general.architecture')}.block_count")
    known = words.length if isinstance(words, Skipped) else 0
    return known, layers if isinstance(layers, int) else 0


@lru_cache(maxsize=1)
def _is_built_for_cuda() -> bool:
    spec = importlib.util.find_spec("xllamacpp")
    places = [Path(place) for place in (spec.submodule_search_locations or ())] if spec else []
    beside = [place.with_name("xllamacpp.libs") for place in places]
    found = (file.name for place in (*places, *beside) for file in place.glob("*"))
    return any(word in name for name in found for word in ("cuda", "cublas"))
