"""What OpenVINO will take: how many requests of how many tokens, and how much memory."""

from __future__ import annotations

import msgspec

from headrace import machine
from headrace.core.model import ModelFile
from headrace.core.status import Footprint
from headrace.engines.base import OpenRequest

_DEFAULT_RUNNING = 32
_MIB = 1 << 20
# Of two bytes for a value. With 8 bits, each row of a head has a scale and a zero of its own.
_KV_SHARE = {"auto": 1.0, "u8": 0.6}

# Measured with SmolLM2-135M: the process with the library and the vocabulary.
_PROCESS = 260 * _MIB
# The weights as they are computed with, beside the file's pages; of a GGUF a graph is made first.
_COPIES = {"gguf": 3.4, "openvino": 2.0}


class CachePlan(msgspec.Struct, frozen=True):
    """Requests at once, tokens of each, and tokens that the KV cache holds for all together."""

    max_running: int
    context_length: int
    tokens: int
    bytes: int
    notes: tuple[str, ...] = ()


def plan_cache(request: OpenRequest, tokens: int | None, kv_type: str) -> CachePlan:
    """Choose the size of the KV cache: a quarter of the memory for models at most.

    What was asked for is kept. Requests share the cache, so a full one makes some of them wait.
    """
    model, notes = request.model, list[str]()
    running = request.max_running or _DEFAULT_RUNNING
    context = request.context_length or model.context_length or 4096
    per_token = (model.kv_bytes_per_token or 0) * _KV_SHARE[kv_type]
    memory = machine.host_memory() if request.memory is None else request.memory
    fits = int(memory / 4 / per_token) if per_token else running * context
    if request.context_length is None and context > (tokens or fits):
        context = max(256, (tokens or fits) // 256 * 256)
        notes.append(f"context cut to {context}, to fit the KV cache")
    tokens = tokens or max(context, min(fits, running * context))
    return CachePlan(running, context, tokens, int(tokens * per_token), tuple(notes))


def estimate(model: ModelFile, plan: CachePlan) -> Footprint:
    """Return what the model takes of the host."""
    weights = int(model.size * _COPIES.get(model.format, 2.0))
    overhead = _PROCESS
    return Footprint(
        devices={"cpu": weights + plan.bytes + overhead},
        parts={"weights": weights, "kv_cache": plan.bytes, "overhead": overhead},
        context_length=plan.context_length,
        max_running=plan.max_running,
    )
