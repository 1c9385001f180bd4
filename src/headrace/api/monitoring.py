"""GET /health, /health/live, /health/ready and /metrics: what load balancers and scrapers read."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import msgspec

from headrace.api.exchange import Exchange, Service
from headrace.core.model import State

_FINE: frozenset[State] = frozenset({"ready", "created", "stopped"})


class Health(msgspec.Struct, frozen=True):
    """`ok`, or the state of what is not ready."""

    status: str


async def live(_service: Service, exchange: Exchange) -> None:
    """Confirm that the process is alive."""
    await exchange.answer(Health("ok"))


async def ready(service: Service, exchange: Exchange) -> None:
    """Report whether requests would be served; 503 with the state when they would not."""
    states: list[State] = [info.state for info in service.backend.models()]
    if _is_ready(service, states):
        await exchange.answer(Health("ok"))
        return
    # A model that is merely not loaded explains the least.
    waiting = sorted((state for state in states if state != "ready"), key=_FINE.__contains__)
    await exchange.answer(Health(waiting[0] if waiting else "not ready"), status=503)


async def metrics(service: Service, exchange: Exchange) -> None:
    """Return all figures in Prometheus' format, or as OpenMetrics where that is accepted."""
    assert service.observer is not None
    accept = dict(exchange.scope["headers"]).get(b"accept", b"").decode("latin-1")
    # Beside the event loop: the more series there are, the longer it takes to write them.
    body, kind = await asyncio.to_thread(service.observer.exposition, accept)
    await exchange.reply(body, kind=kind.encode())


def _is_ready(service: Service, states: Sequence[State]) -> bool:
    if service.ready:
        return service.ready()
    if service.admin is None:
        return bool(states) and set(states) == {"ready"}
    # A pool loads what is requested.
    return any(
        model.state == "ready" or (model.enabled and model.state in _FINE)
        for model in service.admin.status().models
    )
