"""A route as an ASGI application, with what the documentation says of it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import msgspec
from starlette.types import Receive, Scope, Send

from headrace.api import auth
from headrace.api.bodies import ClientGone
from headrace.api.exchange import Exchange, Service
from headrace.core.errors import ConfigError, InvalidRequest

Handler = Callable[[Service, Exchange], Awaitable[None]]


@dataclass(frozen=True)
class Route:
    """One row of the table of routes; `chunk` is what a streamed answer is made of.

    `answer` is None where there are only streams, or text of the kinds `texts`. `query` are
    required parameters.
    """

    method: str
    path: str
    handler: Handler
    answer: type[msgspec.Struct] | None
    request: type[msgspec.Struct] | None = None
    chunk: type[msgspec.Struct] | None = None
    unready: bool = False
    query: tuple[str, ...] = ()
    admin: bool = False
    texts: tuple[str, ...] = ()


class Endpoint:
    """Runs a handler, and turns whatever it raises into an answer."""

    def __init__(self, route: Route, service: Service) -> None:
        self.path = route.path
        self._route = route
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        exchange = Exchange(scope, receive, send, self._service.settings)
        try:
            if self._route.admin:
                auth.check_admin(scope, exchange.settings, is_admin=exchange.call.is_admin)
            await self._route.handler(self._service, exchange)
        except ClientGone:
            exchange.call.outcome = "cancelled"
        except Exception as error:
            # The edge: what failed becomes an answer, while one can be given.
            if exchange.call.status:
                raise
            if self._route.admin and isinstance(error, ConfigError):
                # Here it is the request that holds the wrong setting, or asks for it to be read.
                error = InvalidRequest(error.message, param=error.param)
            await exchange.fail(error)
