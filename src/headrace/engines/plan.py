"""How many requests of how many tokens a model is loaded for, by the memory that it may take.

An estimate without the library and the load that follows use the same functions, and the memory
that there is, not what is free at the moment: so they come to the same result.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from headrace import machine
from headrace.core.errors import LoadFailed
from headrace.core.status import Footprint
from headrace.engines.base import OpenRequest

PAGE = 256
"""A context or cache whose length is chosen here is a multiple of so many tokens."""
ENCODER_REQUESTS = 256
"""Requests at once of an embedder or reranker; their items share batches."""
ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "F32": 4, "BF16": 2, "F16": 2}
"""Bytes of an element, by torch's names of types and by those of safetensors."""
CONTEXT = 4096


class CachePlan(msgspec.Struct, frozen=True):
    """`slots` requests at once, `context_length` tokens each; the cache holds `tokens` in all."""

    slots: int
    context_length: int
    tokens: int
    notes: tuple[str, ...] = ()


def plan_cache(
    request: OpenRequest,
    slots: int,
    fits: int | None,
    *,
    limit: str,
    kind: Literal["shared", "divided", "fixed"] = "shared",
) -> CachePlan:
    """Choose context and slots so that the cache holds no more than the `fits` tokens (None: all).

    Of a `shared` cache each request takes what it needs, so one of full length has to fit. A
    `divided` one has a part for each slot, and slots give way before the context does; the slots
    of a `fixed` one do not. A context that the request asks for is kept. Notes name the `limit`.
    """
    context = request.context_length or request.model.context_length or CONTEXT
    notes: list[str] = []
    if fits is None:
        return CachePlan(slots, context, slots * context)
    if kind == "divided" and slots * context > fits:
        slots = max(1, fits // context)
        notes.append(f"slots cut to {slots}, to fit {limit}")
    whole = 1 if kind == "shared" else slots
    if request.context_length is None and whole * context > fits:
        context = max(PAGE, fits // whole // PAGE * PAGE)
        notes.append(f"context cut to {context}, to fit {limit}")
    tokens = slots * context if kind != "shared" else max(context, min(fits, slots * context))
    return CachePlan(slots, context, tokens, tuple(notes))


def footprint(
    devices: dict[str, int], planned: CachePlan, *, weights: int, kv_cache: int
) -> Footprint:
    """Return an estimate; what is neither weights nor cache is overhead."""
    overhead = sum(devices.values()) - weights - kv_cache
    return Footprint(
        devices=devices,
        parts={"weights": weights, "kv_cache": kv_cache, "overhead": overhead},
        context_length=planned.context_length,
        max_running=planned.slots,
    )


def tokens_in(memory: float, bytes_per_token: float) -> int | None:
    """Return how many tokens of a cache fit so many bytes, None where their size is unknown."""
    return int(memory / bytes_per_token) if bytes_per_token else None


def granted_context(request: OpenRequest, most: int) -> int:
    """Return the context that is asked for, or the model's own.

    Raises:
        LoadFailed: more is asked for than the model has.
    """
    wanted = request.context_length or most
    if wanted > most:
        raise LoadFailed(f"context_length {wanted} is more than the model's {most}.")
    return wanted


def encoder_requests(request: OpenRequest) -> int:
    """Return how many requests an embedder or reranker takes at once."""
    return min(ENCODER_REQUESTS, request.max_running or ENCODER_REQUESTS)


def has_cuda() -> bool:
    """Whether the machine has a CUDA device."""
    return any(device.kind == "cuda" for device in machine.devices())


def expected_device(wanted: str) -> str:
    """Return the device that a load will most likely take, `cpu` or `cuda:N`."""
    if wanted in {"auto", "cuda"}:
        return "cuda:0" if wanted == "cuda" or has_cuda() else "cpu"
    return wanted if wanted.startswith("cuda") else "cpu"
