"""The status of a model, for operators."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from headrace.core.status import ModelStatus
from headrace.core.values import masked_options
from headrace.pool.entry import ModelEntry


def status_of(entry: ModelEntry) -> ModelStatus:
    """Return the status of a model."""
    spec, info = entry.spec, entry.info
    footprint = next((replica.footprint for replica in entry.replicas if replica.footprint), None)
    stage = entry.stage
    return ModelStatus(
        id=spec.name,
        source=spec.model,
        state=entry.state,
        aliases=spec.aliases,
        engine=info.engine if info else spec.engine or "auto",
        engine_reason=info.engine_reason if info else "",
        device=info.device if info else spec.device or "auto",
        quantization=info.quantization if info else None,
        context_length=info.context_length if info else spec.context_length,
        enabled=spec.enabled,
        pinned=spec.pinned,
        keep_alive=spec.keep_alive,
        continuation=spec.continuation,
        estimated=footprint,
        memory=_sum([replica.memory for replica in entry.all_replicas()]),
        running=entry.running,
        max_running=entry.slots or None,
        queued=len(entry.queue),
        max_queued=spec.max_queued,
        places=max(0, entry.room - entry.queue.count(batch=False)),
        until=_until(entry),
        last_used=entry.wall(entry.last_used) if entry.last_used is not None else None,
        restarts=entry.restarts,
        evictions=entry.evictions,
        continuations=entry.continuations,
        last_error=entry.failures.last_error,
        retry_at=entry.wall(entry.failures.retry_at) if entry.failures.wait_s else None,
        progress=stage[0] or None,
        done=stage[1],
        total=stage[2],
        replicas=tuple(replica.status() for replica in entry.all_replicas()),
        options=masked_options(spec.options),
        preload=entry.preload,
        copies=spec.replicas,
        nodes=spec.nodes,
    )


def _until(entry: ModelEntry) -> float | None:
    idle = [replica.idle_since for replica in entry.replicas if replica.is_ready]
    if not idle or entry.keep_alive < 0 or entry.spec.pinned or entry.running:
        return None
    return entry.wall(max(idle) + entry.keep_alive)


def _sum(parts: Sequence[Mapping[str, int]]) -> dict[str, int]:
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: sum(part.get(name, 0) for part in parts) for name in names}
