"""The figures of an answer as DB-GPT has them."""

from __future__ import annotations

import msgspec

from headrace.core.metrics import DeviceUse, InferenceMetrics, Usage

_GIB = 1 << 30


class UsageBody(msgspec.Struct, frozen=True, kw_only=True):
    """Token counts."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class GpuInfo(msgspec.Struct, frozen=True, kw_only=True):
    """Memory of a GPU, in GiB; `allocated` is the worker's."""

    total_memory_gb: float
    allocated_memory_gb: float
    cached_memory_gb: float
    available_memory_gb: float


class ModelInferenceMetrics(msgspec.Struct, frozen=True, kw_only=True):
    """Times are milliseconds since 1970; `speed_per_second` counts the prompt's tokens too."""

    collect_index: int
    start_time_ms: int
    end_time_ms: int
    current_time_ms: int
    first_token_time_ms: int | None
    first_completion_time_ms: int | None
    first_completion_tokens: int | None
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    speed_per_second: float | None
    prefill_tokens_per_second: float | None
    decode_tokens_per_second: float | None
    current_gpu_infos: list[GpuInfo] | None
    avg_gpu_infos: list[GpuInfo] | None


def usage_body(usage: Usage) -> UsageBody:
    """Return the token counts of an answer."""
    return UsageBody(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        total_tokens=usage.total_tokens,
    )


def figures(metrics: InferenceMetrics, frames: int, first_tokens: int) -> ModelInferenceMetrics:
    """Return the figures of an answer that was sent in so many frames.

    `first_tokens` are those of its first text.
    """
    usage, start_ms = metrics.usage, metrics.started_at * 1000
    end_ms, first_ms = round(start_ms + metrics.total_ms), metrics.time_to_first_token_ms
    first = None if first_ms is None else round(start_ms + first_ms)
    gpus = [device for device in metrics.devices if device.name.startswith("cuda")]
    return ModelInferenceMetrics(
        collect_index=frames,
        start_time_ms=round(start_ms),
        end_time_ms=end_ms,
        current_time_ms=end_ms,
        first_token_time_ms=first,
        first_completion_time_ms=first,
        first_completion_tokens=first_tokens or None,
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        total_tokens=usage.total_tokens,
        speed_per_second=(
            usage.total_tokens / metrics.total_ms * 1000 if metrics.total_ms else None
        ),
        prefill_tokens_per_second=metrics.prefill_tokens_per_second,
        decode_tokens_per_second=metrics.decode_tokens_per_second,
        current_gpu_infos=[_gpu(gpu, gpu.worker_used) for gpu in gpus] or None,
        avg_gpu_infos=[_gpu(gpu, gpu.worker_mean) for gpu in gpus] or None,
    )


def _gpu(device: DeviceUse, allocated: int) -> GpuInfo:
    return GpuInfo(
        total_memory_gb=device.total / _GIB,
        allocated_memory_gb=allocated / _GIB,
        cached_memory_gb=device.used / _GIB,
        available_memory_gb=max(device.total - device.used, 0) / _GIB,
    )
