"""GET /health/live, /health/ready and /health."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from headrace.api.exchange import Exchange, Service
from headrace.api.wire_models import Health
from headrace.core.model import State

_FINE: frozenset[State] = frozenset({"ready", "created", "stopped"})


async def live(_service: Service, exchange: Exchange) -> None:
    """Tell that the process answers."""
    await exchange.reply(msgspec.json.encode(Health("ok")))


async def ready(service: Service, exchange: Exchange) -> None:
    """Tell whether requests would be answered; 503 with the state when they would not."""
    states: list[State] = [info.state for info in service.backend.models()]
    if _is_ready(service, states):
        await exchange.reply(msgspec.json.encode(Health("ok")))
        return
    # What only sleeps explains the least.
    waiting = sorted((one for one in states if one != "ready"), key=_FINE.__contains__)
    state = waiting[0] if waiting else "not ready"
    await exchange.reply(msgspec.json.encode(Health(state)), status=503)


def _is_ready(service: Service, states: Sequence[State]) -> bool:
    if service.ready:
        return service.ready()
    if service.admin is None:
        return bool(states) and set(states) == {"ready"}
    # A pool loads what is asked for.
    return any(
        one.state == "ready" or (one.enabled and one.state in _FINE)
        for one in service.admin.status().models
    )
