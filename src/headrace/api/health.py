"""GET /health/live, /health/ready and /health."""

from __future__ import annotations

import msgspec

from headrace.api.exchange import Exchange, Service
from headrace.api.wire_models import Health


async def live(_service: Service, exchange: Exchange) -> None:
    """Tell that the process answers."""
    await exchange.reply(msgspec.json.encode(Health("ok")))


async def ready(service: Service, exchange: Exchange) -> None:
    """Tell whether requests would be answered; 503 with the state when they would not."""
    states = [info.state for info in service.backend.models()]
    waiting = [state for state in states if state != "ready"]
    is_ready = service.ready() if service.ready else bool(states) and not waiting
    if is_ready:
        await exchange.reply(msgspec.json.encode(Health("ok")))
        return
    state = waiting[0] if waiting else "not ready"
    await exchange.reply(msgspec.json.encode(Health(state)), status=503)
