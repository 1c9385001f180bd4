"""The figures of one request. Definitions are in docs/figures.md."""

from __future__ import annotations

import msgspec


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """Token counts, exact, as the engine reports them. `prompt_tokens` includes the cached ones."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        """Prompt and completion together."""
        return self.prompt_tokens + self.completion_tokens


class Gaps(msgspec.Struct, frozen=True, kw_only=True):
    """Milliseconds between one delta and the next."""

    p50: float
    p99: float
    max: float


class DeviceUse(msgspec.Struct, frozen=True, kw_only=True):
    """Memory of one device in bytes; `worker_*` is what this worker holds of it.

    Mean and peak are over the request, sampled in the background; `busy_*` are from 0 to 1, of a
    GPU what everybody did and of the host what this worker did. `joules` is the request's share of
    the energy. What nobody tells is None, and so is `busy_*` of a request that was soon over.
    """

    name: str
    total: int
    used: int
    worker_used: int
    worker_mean: int
    worker_peak: int
    busy_mean: float | None = None
    busy_peak: float | None = None
    joules: float | None = None


class InferenceMetrics(msgspec.Struct, frozen=True, kw_only=True):
    """What one request cost. Durations are monotonic milliseconds; an undefined figure is None.

    `continuations` counts how often a worker died and the answer went on, `continued` in which
    way: `exact` or `fast`.
    """

    started_at: float
    queue_ms: float | None = None
    load_ms: float = 0.0
    time_to_first_token_ms: float | None = None
    prefill_ms: float | None = None
    prefill_tokens_per_second: float | None = None
    decode_tokens_per_second: float | None = None
    time_per_output_token_ms: float | None = None
    inter_token_ms: Gaps | None = None
    total_ms: float = 0.0
    chunks: int = 0
    usage: Usage = Usage()
    devices: tuple[DeviceUse, ...] = ()
    engine: str = ""
    worker: str = ""
    model: str = ""
    outcome: str = ""
    continuations: int = 0
    continued: str = ""
