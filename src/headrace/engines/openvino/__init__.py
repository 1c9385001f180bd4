"""OpenVINO: continuous batching on CPUs, from OpenVINO IR and from GGUF in F16 or Q8_0."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec
from pydantic import Field

from headrace import machine
from headrace.core.errors import ConfigError
from headrace.core.model import ModelFile
from headrace.core.status import Footprint
from headrace.engines import plan
from headrace.engines.base import About, BatchLimits, EngineOptions, OpenRequest
from headrace.engines.openmp import physical_cores
from headrace.engines.openvino.conversion import convert, prepared
from headrace.engines.plan import CachePlan
from headrace.models.folder import layer_sizes

__all__ = ["ABOUT", "Options", "convert", "footprint", "prepared", "tune_options", "writes"]

ABOUT = About(
    formats=("openvino", "gguf"),
    requires="openvino_genai",
    extra="openvino",
    tasks=("generate", "embed", "rerank"),
    confined=True,
    able=frozenset({"infill", "logprobs", "resume"}),
)

BLOCK = 32
"""Tokens of a block of the KV cache."""

_DEFAULT_RUNNING = 32
# Relative to two bytes for a value. With 8 bits, each row of a head has a scale and a zero.
_KV_SHARE = {"auto": 1.0, "u8": 0.6}

ENCODER_BATCH = BatchLimits(items=32, tokens=16384)
"""The largest batch of an embedder or reranker."""
ENCODER_CONTEXT = 512
"""Tokens of a text for an embedder or reranker that does not name its limit."""

# Measured with SmolLM2-135M and all-MiniLM-L6-v2: the process with the library and the vocabulary.
_PROCESS, _ENCODER_PROCESS = 260 << 20, 180 << 20
# The weights in memory, beside the file's pages; a GGUF is converted to a graph first.
_COPIES = {"gguf": 3.4, "openvino": 2.0}


class Options(EngineOptions):
    """Settings of OpenVINO. All are fixed once the model is loaded."""

    threads: int | None = Field(
        None, ge=1, le=1024, description="CPU threads; by default one for each core it may use."
    )
    precision: Literal["auto", "f32", "bf16", "f16"] = Field(
        "auto",
        description="Precision of the computation; `auto` is the fastest of the machine, "
        "f32 where answers have to be reproducible.",
    )
    kv_type: Literal["auto", "u8"] = Field(
        "auto", description="Type of the KV cache; `auto` has 16 bits, `u8` takes 0.6 of it."
    )
    cache_tokens: int | None = Field(
        None,
        ge=BLOCK,
        le=1 << 30,
        description="Tokens that the KV cache holds for all requests together; by default those "
        "of all of them at full length, or what fits a quarter of the memory for models.",
    )
    batch_size: int = Field(
        256,
        ge=32,
        le=65536,
        description="Tokens computed in one step, after which a cancelled request ends.",
    )
    prefix_cache: bool | None = Field(
        None,
        description="Keep a prompt's KV cache for the next one; on where `precision` is f32 and "
        "answers need not be reproducible.",
    )
    properties: dict[str, str | int | float | bool] = Field(
        {}, description="More properties of OpenVINO's CPU device, by their names in capitals."
    )


def writes(request: OpenRequest) -> Sequence[Path]:
    """Return the folder in which the library keeps compiled models, if the options name one."""
    cache = Options(**request.options).properties.get("CACHE_DIR")
    return (Path(str(cache)),) if cache else ()


def footprint(request: OpenRequest) -> Footprint:
    """Estimate what loading takes of the host, from the file's header and the options.

    Raises:
        LoadFailed: the configuration of an embedder or reranker is missing or damaged.
    """
    options, model = settled(request), request.model
    if request.task != "generate":
        return _encoder_footprint(request)
    planned = plan_cache(request, options)
    weights = int(model.size * _COPIES.get(model.format, 2.0))
    kv_cache = int(planned.tokens * _kv_bytes(model, options))
    devices = {"cpu": weights + kv_cache + _PROCESS}
    return plan.footprint(devices, planned, weights=weights, kv_cache=kv_cache)


def _encoder_footprint(request: OpenRequest) -> Footprint:
    model = request.model
    weights = int(model.size * _COPIES["openvino"])
    context = request.context_length or model.context_length or ENCODER_CONTEXT
    batch = plan.encoder_batch(layer_sizes(Path(model.path)), ENCODER_BATCH, context)
    return Footprint(
        devices={"cpu": weights + batch + _ENCODER_PROCESS},
        parts={"weights": weights, "batch": batch, "overhead": _ENCODER_PROCESS},
        context_length=request.context_length or model.context_length,
        max_running=plan.encoder_requests(request),
    )


def plan_cache(request: OpenRequest, options: Options) -> CachePlan:
    """Choose the size of the KV cache: a quarter of the memory for models at most.

    Requests share the cache, so a full one makes some of them wait.
    """
    memory = machine.host_memory() if request.memory is None else request.memory
    fits = plan.tokens_in(memory / 4, _kv_bytes(request.model, options))
    slots, requested = request.max_running or _DEFAULT_RUNNING, options.cache_tokens
    planned = plan.plan_cache(request, slots, requested or fits, limit="the KV cache")
    return planned if requested is None else msgspec.structs.replace(planned, tokens=requested)


def _kv_bytes(model: ModelFile, options: Options) -> float:
    """Return the bytes of a token in the KV cache."""
    return (model.kv_bytes_per_token or 0) * _KV_SHARE[options.kv_type]


def tune_options(request: OpenRequest) -> Sequence[dict[str, Any]]:
    """Return options worth trying: a larger batch of prompts, and full precision."""
    more = [{"batch_size": 1024}] if (request.max_running or 1) > 1 else []
    return [*more, {"precision": "f32"}]


def settled(request: OpenRequest) -> Options:
    """Return the options, with defaults for reproducible answers where the request needs them.

    Raises:
        ConfigError: a property is not in capitals.
    """
    options = Options(**request.options)
    for name in options.properties:
        if not name.isidentifier() or not name.isupper():
            raise ConfigError(f"{name!r} is no property of OpenVINO: they are in capitals.")
    defaults: dict[str, Any] = {}
    if options.prefix_cache is None:
        # In 16 bits, concurrent prompts that share a prefix get wrong answers from it.
        is_exact = options.precision == "f32"
        defaults["prefix_cache"] = is_exact and not request.repeatable
    if request.repeatable and "precision" not in request.options:
        defaults["precision"] = "f32"
    return options.model_copy(update=defaults)


def properties_of(options: Options) -> dict[str, str | int | float | bool]:
    """Return the library's own properties."""
    properties = dict(options.properties)
    properties["INFERENCE_NUM_THREADS"] = options.threads or physical_cores()
    if options.precision != "auto":
        properties["INFERENCE_PRECISION_HINT"] = options.precision
    if options.kv_type != "auto":
        properties["KV_CACHE_PRECISION"] = options.kv_type
    return properties
