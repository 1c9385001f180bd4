"""A route as an ASGI application, with what the documentation says of it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import msgspec
from starlette.types import Receive, Scope, Send

from headrace.api.bodies import ClientGone
from headrace.api.exchange import Exchange, Service

Handler = Callable[[Service, Exchange], Awaitable[None]]


@dataclass(frozen=True)
class Route:
    """One row of the table of routes; `chunk` is what a streamed answer is made of."""

    method: str
    path: str
    handler: Handler
    answer: type[msgspec.Struct]
    request: type[msgspec.Struct] | None = None
    chunk: type[msgspec.Struct] | None = None
    unready: bool = False


class Endpoint:
    """Runs a handler, and turns whatever it raises into an answer."""

    def __init__(self, route: Route, service: Service) -> None:
        self.path = route.path
        self._handler = route.handler
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        exchange = Exchange(scope, receive, send, self._service.settings)
        try:
            await self._handler(self._service, exchange)
        except ClientGone:
            exchange.call.outcome = "cancelled"
        except Exception as error:
            # The edge: what failed becomes an answer, while one can be given.
            if exchange.call.status:
                raise
            await exchange.fail(error)
