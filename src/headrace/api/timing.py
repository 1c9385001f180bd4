"""The figures of a request as a `Server-Timing` header."""

from __future__ import annotations

from headrace.api.problems import Headers
from headrace.core.metrics import InferenceMetrics


def server_timing(metrics: InferenceMetrics) -> Headers:
    """Return the header with every duration that is defined, in milliseconds."""
    gaps = metrics.inter_token_ms
    return header(
        {
            "queue": metrics.queue_ms,
            "load": metrics.load_ms,
            "prefill": metrics.prefill_ms,
            "ttft": metrics.time_to_first_token_ms,
            "tpot": metrics.time_per_output_token_ms,
            "itl-p50": gaps and gaps.p50,
            "itl-p99": gaps and gaps.p99,
            "itl-max": gaps and gaps.max,
            "total": metrics.total_ms,
        }
    )


def header(durations: dict[str, float | None]) -> Headers:
    """Return one `Server-Timing` header of the durations that are not None."""
    parts = [f"{name};dur={ms:.3f}" for name, ms in durations.items() if ms is not None]
    return ((b"server-timing", ", ".join(parts).encode()),)
