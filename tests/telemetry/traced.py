"""Records of requests, as a service makes them."""

from __future__ import annotations

from typing import Any

from headrace.core.metrics import DeviceUse, Gaps, InferenceMetrics, Usage
from headrace.core.record import RequestRecord, SpanRecord

NOW = 1_700_000_000.0


def metrics(number: int = 1, **fields: Any) -> InferenceMetrics:
    """Figures that grow with the number: the n-th request takes n times as long as the first."""
    figures: dict[str, Any] = {
        "started_at": NOW + number,
        "queue_ms": 0.1 * number,
        "time_to_first_token_ms": 10.0 * number,
        "prefill_ms": 9.0 * number,
        "prefill_tokens_per_second": 1111.1 / (number or 1),
        "decode_tokens_per_second": 500.0 / (number or 1),
        "time_per_output_token_ms": 2.0 * number,
        "inter_token_ms": Gaps(p50=2.0, p99=3.5, max=4.25),
        "total_ms": 100.0 * number,
        "chunks": 44,
        "usage": Usage(prompt_tokens=12, cached_tokens=4, completion_tokens=45),
        "devices": (
            DeviceUse(
                name="cpu",
                total=16 << 30,
                used=4 << 30,
                worker_used=150_000_000,
                worker_mean=149_000_000,
                worker_peak=151_000_000,
            ),
        ),
        "engine": "llamacpp",
        "worker": "small-1",
        "model": "small",
        "outcome": "ok",
    }
    return InferenceMetrics(**{**figures, **fields})


def spans(number: int = 1) -> tuple[SpanRecord, ...]:
    """A root, and below it the queue and the answer, with its two phases."""
    steps = [
        ("chat small", "01", "", 0.0, 100.0),
        ("generate", "03", "01", 10.0, 90.0),
        ("queue", "02", "01", 0.0, 10.0),
        ("prefill", "04", "03", 10.0, 30.0),
        ("decode", "05", "03", 40.0, 60.0),
    ]
    return tuple(
        SpanRecord(
            name=name,
            span_id=f"{id:0>16}",
            parent_id=parent and f"{parent:0>16}",
            start_ms=start * number,
            ms=ms * number,
            kind="internal" if parent else "server",
            attributes={"gen_ai.request.model": "small", "tokens": 45},
        )
        for name, id, parent, start, ms in steps
    )


def record(number: int = 1, **fields: Any) -> RequestRecord:
    """The n-th request; received in the n-th second after NOW."""
    known: dict[str, Any] = {
        "id": f"{number * 0x9E3779B97F4A7C15F39CC060 % 2**96:024x}",
        "trace_id": f"{number * 0xC2B2AE3D27D4EB4F165667B19E3779F9 % 2**128:032x}",
        "time": NOW + number,
        "operation": "chat",
        "model": "small",
        "outcome": "ok",
        "metrics": metrics(number),
        "client": "5e884898da280471",
        "finish_reasons": ("stop",),
        "parameters": {"max_tokens": 64, "temperature": 0.0, "stop": ["\n\n"]},
        "spans": spans(number),
    }
    return RequestRecord(**{**known, **fields})
