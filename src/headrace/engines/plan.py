"""Plans a load: the number of requests and their tokens, by the memory that it may take.

The estimate without the library and the load use the same functions, and total memory instead of
what is free at the moment, so that they have the same result.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any, Literal

import msgspec

from headrace import machine
from headrace.core.adapter import AdapterFile
from headrace.core.errors import LoadFailed
from headrace.core.private import private_folder
from headrace.core.status import Footprint
from headrace.engines.base import BatchLimits, OpenRequest
from headrace.models.folder import LayerSizes

PAGE = 256
"""Lengths of contexts and caches that are chosen here are multiples of this."""
_MOST_BYTES = 1 << 62
ENCODER_REQUESTS = 256
"""Requests at once of an embedder or reranker; their items share batches."""
ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "F32": 4, "BF16": 2, "F16": 2}
"""Bytes of an element, by torch's names of types and by those of safetensors."""
CONTEXT = 4096
_CUDA_BUILD = 400 << 20  # of torch's libraries for CUDA, which take memory on any machine
_BATCH = 64 << 20  # of the libraries, beside the values of layers


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
    """Choose context and slots so that the cache holds at most `fits` tokens (None: no limit).

    A `shared` cache has to hold one request of full length, as each takes only what it needs. A
    `divided` one has a part for each slot, and slots are reduced before the context; the slots of
    a `fixed` one are kept. A context that the request sets is kept. Notes name the `limit`.

    Raises:
        LoadFailed: the request sets a longer context than the model has.
    """
    if request.model.context_length is not None:
        granted_context(request, request.model.context_length)
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
    """Return an estimate; all but weights and cache is overhead."""
    overhead = sum(devices.values()) - weights - kv_cache
    return Footprint(
        devices=devices,
        parts={"weights": weights, "kv_cache": kv_cache, "overhead": overhead},
        context_length=planned.context_length,
        max_running=planned.slots,
    )


def tokens_in(memory: float, bytes_per_token: float) -> int | None:
    """Return how many tokens of a cache fit `memory`, None where their size is unknown."""
    return int(memory / bytes_per_token) if bytes_per_token else None


def granted_context(request: OpenRequest, limit: int) -> int:
    """Return the requested context length, or the model's own.

    Raises:
        LoadFailed: it is longer than the model's.
    """
    wanted = request.context_length or limit
    if wanted > limit:
        raise LoadFailed(f"context_length {wanted} is more than the model's {limit}.")
    return wanted


def encoder_requests(request: OpenRequest) -> int:
    """Return how many requests an embedder or reranker takes at once."""
    return min(ENCODER_REQUESTS, request.max_running or ENCODER_REQUESTS)


def encoder_batch(sizes: LayerSizes, limits: BatchLimits, context: int) -> int:
    """Return how many bytes the largest batch of an encoder takes while it is computed.

    Its elements have 4 bytes.
    """
    several = min(limits.tokens, limits.items * context)
    # One text can be longer than a batch of several.
    tokens = max(several, context)
    layers = 4 * tokens * (3 * sizes.inner + 6 * sizes.hidden)
    # Two texts of different lengths have a mask for each pair of tokens.
    masks = 5 * several * min(context, several // 2)
    # Four copies of each, at most: DeBERTa adds up three kinds of attention.
    scores = 16 * sizes.heads * tokens * context if sizes.eager else 0
    return _BATCH + layers + masks + scores


def with_adapters(need: Footprint, adapters: Sequence[AdapterFile]) -> Footprint:
    """Return a footprint with the adapters, which are where the layers of the model are."""
    size = sum(adapter.size for adapter in adapters)
    if not size:
        return need
    gpus = tuple(device for device in need.devices if device != machine.HOST)
    places = gpus or tuple(need.devices)
    more = {device: need.devices[device] + size // len(places) for device in places}
    parts = {**need.parts, "adapters": size}
    return msgspec.structs.replace(need, devices=need.devices | more, parts=parts)


def countable(need: Footprint) -> Footprint:
    """Return a footprint that can be sent to other processes, whatever a header made of it."""

    def bounded(amounts: dict[str, int]) -> dict[str, int]:
        return {name: min(amount, _MOST_BYTES) for name, amount in amounts.items()}

    devices, parts = bounded(need.devices), bounded(need.parts)
    choices = tuple(map(bounded, need.choices))
    return msgspec.structs.replace(need, devices=devices, parts=parts, choices=choices)


def torch_libraries() -> int:
    """Return the bytes that torch takes beside those of a build for CPUs alone."""
    with contextlib.suppress(PackageNotFoundError):
        library = distribution("torch").locate_file("torch/lib/libtorch_cuda.so")
        if Path(str(library)).exists():
            return _CUDA_BUILD
    return 0


def has_cuda() -> bool:
    """Whether the machine has a CUDA device."""
    return any(device.kind == "cuda" for device in machine.devices())


def expected_device(wanted: str) -> str:
    """Return the device that a load will most likely take, `cpu` or `cuda:N`."""
    if wanted in {"auto", "cuda"}:
        return "cuda:0" if wanted == "cuda" or has_cuda() else "cpu"
    return wanted if wanted.startswith("cuda") else "cpu"


def expected_gpus(request: OpenRequest, device: str) -> tuple[str, ...]:
    """Return the GPUs of a load on `device`, which is `expected_device`'s; none on a CPU."""
    return (request.gpus or (device,)) if device.startswith("cuda") else ()


def divided(amount: int, gpus: tuple[str, ...], own: int) -> dict[str, int]:
    """Return what each GPU takes of an amount in bytes, and `own` for the library beside it."""
    return dict.fromkeys(gpus, amount // len(gpus) + own)


def torch_caches(request: OpenRequest) -> Sequence[Path]:
    """Return the folders, created if necessary, in which torch's libraries keep what they made.

    Those are code of the model that may run, and compiled kernels of a GPU.
    """
    hub = Path(os.environ.get("HF_HOME") or "~/.cache/huggingface")
    places: list[str | Path] = []
    if request.trust_remote_code:
        places.append(os.environ.get("HF_MODULES_CACHE") or hub / "modules")
    if expected_device(request.device) != "cpu":
        places.append(os.environ.get("TRITON_CACHE_DIR") or "~/.triton")
        places.append(os.environ.get("CUDA_CACHE_PATH") or "~/.nv")
    folders = [Path(place).expanduser() for place in places]
    for folder in folders:
        with contextlib.suppress(OSError):
            private_folder(folder)
    return folders


def torch_device(wanted: str, torch: Any) -> str:
    """Return torch's device for a request's `device`: the same, or the best for `auto`.

    Raises:
        LoadFailed: torch does not have it here.
    """
    # A build for ROCm has AMD's GPUs under CUDA's name.
    gpu = "rocm" if torch.version.hip else "cuda"
    available = {gpu: "cuda"} if torch.cuda.is_available() else {}
    available |= {"mps": "mps"} if torch.backends.mps.is_available() else {}
    available["cpu"] = "cpu"
    if wanted == "auto":
        return next(iter(available.values()))
    kind, colon, number = wanted.partition(":")
    if kind not in available:
        raise LoadFailed(f"torch has no device {wanted} here; it has {', '.join(available)}.")
    return available[kind] + colon + number
