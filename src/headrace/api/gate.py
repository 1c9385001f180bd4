"""The middleware in front of every route: ids, refusals, CORS, and the access log."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Awaitable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from headrace.api import auth, guard, problems
from headrace.api.exchange import Call, Exchange, Service
from headrace.api.problems import Headers
from headrace.api.settings import ApiSettings
from headrace.core import record

_access = logging.getLogger("headrace.access")
_SAFE_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
_EXPOSED = b"x-request-id, server-timing, retry-after, retry-after-ms"


class Gate:
    """Lets in what may come in, and gives every answer its id. Pure ASGI: no stream is held."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        call = scope["headrace"] = Call()
        headers = dict(scope["headers"])
        call.traceparent = headers.get(b"traceparent", b"").decode("latin-1")
        call.tracestate = headers.get(b"tracestate", b"").decode("latin-1")
        settings = self._service.settings
        sender = _marked(send, call, _shared(headers.get(b"origin"), settings))
        try:
            await self._serve(Exchange(scope, receive, sender, settings), receive, headers)
        except Exception:
            # Already answered: only the log must know.
            call.outcome = "error"
            raise
        finally:
            self._note(scope, call, headers.get(b"x-request-id", b""))

    def _note(self, scope: Scope, call: Call, client_id: bytes) -> None:
        ended = _ended(scope, call)
        _write_access_log(call, ended, client_id)
        if self._service.observer is not None:
            self._service.observer.called(ended)

    async def _serve(
        self, exchange: Exchange, receive: Receive, headers: dict[bytes, bytes]
    ) -> None:
        scope = exchange.scope
        try:
            _check(scope, headers, exchange.settings)
            if scope["method"] == "OPTIONS" and b"access-control-request-method" in headers:
                await _answer_preflight(exchange, headers)
                return
            if scope["path"] not in auth.OPEN_PATHS:
                call = exchange.call
                call.client, call.is_admin = auth.authorise(
                    headers, exchange.settings, scope["path"]
                )
            await self._app(scope, receive, exchange.send)
        except Exception as error:
            # The edge: what is refused or broken becomes an answer, while one can be given.
            if exchange.call.status:
                raise
            await exchange.fail(error)


def _check(scope: Scope, headers: dict[bytes, bytes], settings: ApiSettings) -> None:
    raw = scope["headers"]
    path = scope.get("raw_path") or scope["path"].encode("utf-8", "surrogateescape")
    guard.check_sizes(path, scope.get("query_string", b""), raw, settings)
    guard.check_host(raw, settings)
    if b"origin" in headers:
        guard.check_origin(headers[b"origin"].decode("latin-1"), settings)


def _shared(origin: bytes | None, settings: ApiSettings) -> Headers:
    if origin is None:
        return ()
    try:
        guard.check_origin(origin.decode("latin-1"), settings)
    except problems.Refused:
        return ()
    return (
        (b"access-control-allow-origin", origin),
        (b"access-control-expose-headers", _EXPOSED),
        (b"vary", b"origin"),
    )


def _marked(send: Send, call: Call, shared: Headers) -> Send:
    extra = ((b"x-request-id", call.id.encode()), *shared)

    # Not a coroutine itself: a chunk of a stream goes through without one more frame.
    def marked(message: Message) -> Awaitable[None]:
        if message["type"] == "http.response.start":
            call.status = message["status"]
            message["headers"] = [*message.get("headers", ()), *extra]
        return send(message)

    return marked


async def _answer_preflight(exchange: Exchange, headers: dict[bytes, bytes]) -> None:
    asked = headers.get(b"access-control-request-headers", b"authorization, content-type")
    await exchange.start(
        204,
        (
            (b"access-control-allow-methods", b"GET, POST"),
            (b"access-control-allow-headers", asked),
            (b"access-control-max-age", b"600"),
        ),
    )
    await exchange.send({"type": "http.response.body", "body": b""})


def _ended(scope: Scope, call: Call) -> record.Call:
    return record.Call(
        method=scope["method"],
        route=getattr(scope.get("endpoint"), "path", "-"),
        status=call.status,
        outcome=call.outcome or _outcome(call.status),
        seconds=time.monotonic() - call.received,
    )


def _write_access_log(call: Call, ended: record.Call, client_id: bytes) -> None:
    data = {
        "request_id": call.id,
        "client_request_id": client_id.decode() if _SAFE_ID.fullmatch(client_id) else "",
        "method": ended.method,
        "route": ended.route,
        "status": ended.status,
        "ms": round(ended.seconds * 1000, 3),
        "outcome": ended.outcome,
    }
    _access.info("headrace.access", extra={"data": data})


def _outcome(status: int) -> record.Outcome:
    if not status:
        return "cancelled"
    return "ok" if status < 400 else "refused" if status < 500 else "error"
