"""GET /metrics: all figures, for Prometheus."""

from __future__ import annotations

import asyncio

from headrace.api.auth import METRICS_PATH
from headrace.api.endpoint import Route
from headrace.api.exchange import Exchange, Service


async def metrics(service: Service, exchange: Exchange) -> None:
    """Tell all figures as Prometheus reads them, or as OpenMetrics to those who accept it."""
    assert service.observer is not None
    accept = dict(exchange.scope["headers"]).get(b"accept", b"").decode("latin-1")
    # Beside the event loop: the more series there are, the longer it takes to write them.
    body, kind = await asyncio.to_thread(service.observer.exposition, accept)
    length = (b"content-length", str(len(body)).encode())
    await exchange.start(200, ((b"content-type", kind.encode()), length))
    await exchange.send({"type": "http.response.body", "body": body})


METRICS = Route(
    "GET",
    METRICS_PATH,
    metrics,
    None,
    texts=("text/plain", "application/openmetrics-text"),
)
