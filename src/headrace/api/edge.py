"""The middleware in front of every route: limits, hosts, origins, keys, ids and the access log."""

from __future__ import annotations

import hmac
import ipaddress
import logging
import re
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import ExitStack
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from headrace.api import fields, problems, rate_limits
from headrace.api.exchange import Call, Exchange, Service
from headrace.api.limits import ApiSettings
from headrace.api.pages import is_page
from headrace.api.problems import Headers, Refused, refused
from headrace.core import record
from headrace.core.errors import Forbidden, Unauthorized
from headrace.core.keys import KeyStore, digest_of, id_of

_HeaderList = Iterable[tuple[bytes, bytes]]

METRICS_PATH = "/metrics"
PRIORITY = b"x-headrace-priority"
"""The header of a request that gives way to others: `batch`."""

_log = logging.getLogger("headrace.api")
_access = logging.getLogger("headrace.access")
_OPEN_PATHS = frozenset({"/health", "/health/live", "/health/ready"})
_LONGEST_LOGGED = 200
_SAFE_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
_DBGPT_SPAN = re.compile(r"([0-9a-f]{32}):([0-9a-f]{16})")
_WARNING = b"x-headrace-warning"
_EXPOSED = b"x-request-id, server-timing, retry-after, retry-after-ms, " + b", ".join(
    (_WARNING, *rate_limits.NAMES)
)
_MAX_LOGGED = 1000
_FORWARDED = frozenset(
    {b"forwarded", b"via", b"x-forwarded-for", b"x-forwarded-host", b"x-real-ip"}
)
_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})


class Edge:
    """Checks every request, gives its answer an id, and writes the access log.

    Pure ASGI: the chunks of a stream are not buffered.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service
        self._logged: set[str] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        call = Call()
        headers = dict(scope["headers"])
        call.traceparent = _traceparent(headers)
        call.tracestate = headers.get(b"tracestate", b"").decode("latin-1")
        call.batch = headers.get(PRIORITY, b"").lower() == b"batch"
        settings, keys = self._service.current()
        dialect = problems.dialect_of(scope["path"])
        extra = [(name, call.id.encode()) for name in (b"x-request-id", dialect.id_header) if name]
        extra += _cors_headers(headers.get(b"origin"), settings)
        sender = _with_headers(send, call, extra, rate_limits.writer(keys, call, dialect))
        exchange = scope["headrace"] = Exchange(scope, receive, sender, settings, call, dialect)
        try:
            with ExitStack() as exchange.held:
                await self._serve(exchange, receive, headers)
        except Exception:
            # Already answered; only the log records it.
            call.outcome = "error"
            raise
        finally:
            # The exchange holds the scope: a cycle, which only the garbage collector would free.
            del scope["headrace"]
            self._record(scope, call, headers.get(b"x-request-id", b""))

    async def _serve(
        self, exchange: Exchange, receive: Receive, headers: dict[bytes, bytes]
    ) -> None:
        scope = exchange.scope
        try:
            if "headrace.refused" in scope:
                # Taken out of the scope, which the traceback leads to: it would be a cycle.
                raise scope.pop("headrace.refused")
            _check_head(scope, headers, exchange.settings)
            if scope["method"] == "OPTIONS" and b"access-control-request-method" in headers:
                await _answer_preflight(exchange, headers)
                return
            if scope["path"] not in _OPEN_PATHS and not is_page(scope["path"]):
                call = exchange.call
                call.client, call.is_admin = await authorise(
                    headers, exchange.settings, scope["path"], self._service.keys
                )
            await self._app(scope, receive, exchange.send)
        except Exception as error:
            # Any exception becomes a response, unless the headers have been sent.
            if exchange.call.status:
                raise
            await exchange.fail(error)

    def _record(self, scope: Scope, call: Call, client_id: bytes) -> None:
        ended = record.Call(
            method=scope["method"],
            route=getattr(scope.get("endpoint"), "path", "-"),
            status=call.status,
            outcome=call.outcome or _outcome(call.status),
            seconds=time.monotonic() - call.received,
        )
        _write_access_log(call, ended, client_id, scope["path"])
        self._log_once(ended.route, call)
        if self._service.called is not None:
            self._service.called(ended)

    def _log_once(self, route: str, call: Call) -> None:
        """Log each unknown or unsupported part once; a client can invent any number of names."""
        ignored = [(str(unknown), "unknown field %s is ignored") for unknown in call.unknown]
        ignored += [(name, "%s is not supported here and left out") for name in call.left_out]
        for name, text in ignored:
            logged = f"{route} {name}"
            if logged in self._logged or len(self._logged) >= _MAX_LOGGED:
                continue
            self._logged.add(logged)
            data = {"request_id": call.id, "route": route, "field": name}
            _log.warning("%s: %s", route, text % name, extra={"data": data})


async def authorise(
    headers: dict[bytes, bytes],
    settings: ApiSettings,
    path: str = "",
    keys: KeyStore | None = None,
) -> tuple[str, bool]:
    """Return a short id of the request's key, and whether it is an admin's.

    Without any keys every request is accepted, as an admin's without an id. If there are only
    metrics keys, only /metrics needs one.

    Raises:
        Unauthorized: there is no key, or an unknown one.
        Forbidden: the key is for the metrics and the path is not, or the other way round.
        DatabaseDown: it may be one of the database, which does not answer.
    """
    metrics = path == METRICS_PATH
    if not (settings.has_keys or (metrics and settings.metrics_keys)):
        return "", True
    key = _key(headers)
    if key is None:
        raise Unauthorized("An API key is needed: send it as `Authorization: Bearer <key>`.")
    digest = digest_of(key)
    offered = f"sha256:{digest}"
    is_admin = _is_among(offered, settings.admin_keys)
    is_client = _is_among(offered, settings.api_keys)
    is_scraper = _is_among(offered, settings.metrics_keys)
    # Not `or`: all are compared, so that the time does not depend on the kind of the key.
    if not is_admin | is_client | is_scraper and keys is not None and settings.uses_database:
        # Only the SHA-256 of an unguessable key is looked up, so the time tells nothing of it.
        account = await keys.find(digest)
        is_client = account is not None
        is_admin = account is not None and account.key.scope == "admin"
    if not is_admin | is_client | is_scraper:
        raise Unauthorized("This API key is not known here.")
    if not is_admin | (is_scraper if metrics else is_client):
        right = "may use models, but not read /metrics" if metrics else "may only read /metrics"
        raise Forbidden(f"This API key {right}.")
    return id_of(digest), is_admin


def check_admin(scope: Scope, settings: ApiSettings, *, is_admin: bool) -> None:
    """Check that a request may manage the models.

    Raises:
        Forbidden: the key is not an admin's; or there are no keys, and the request comes from
            another machine.
        Refused: a foreign web page sends it.
    """
    if not is_admin:
        raise Forbidden(
            "This API key may use models, but not manage them: that needs an admin key."
        )
    if not (settings.has_keys or _is_local(scope)):
        raise Forbidden("Without an admin key, models can only be managed from this machine.")
    headers = dict(scope["headers"])
    # Images and links of a foreign page send GETs without an Origin.
    if headers.get(b"sec-fetch-site") == b"cross-site" and b"origin" not in headers:
        raise _foreign_origin()


def _traceparent(headers: dict[bytes, bytes]) -> str:
    """Return the context of the caller's span; DB-GPT has a header of its own."""
    if (context := headers.get(b"traceparent")) is None and (
        span := headers.get(b"db-gpt-trace-span-id")
    ) is not None:
        return dbgpt_traceparent(span.decode("latin-1"))
    return (context or b"").decode("latin-1")


def dbgpt_traceparent(span: str) -> str:
    """Return a span of DB-GPT (`trace:span`, in hex) as W3C's traceparent; empty if it is none."""
    return f"00-{match[1]}-{match[2]}-01" if (match := _DBGPT_SPAN.fullmatch(span)) else ""


def _is_among(offered: str, hashes: Sequence[str]) -> bool:
    return bool(sum(hmac.compare_digest(offered, known) for known in hashes))


def _key(headers: dict[bytes, bytes]) -> bytes | None:
    scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
    if scheme.lower() == b"bearer" and token.strip():
        return token.strip()
    return headers.get(b"x-api-key")


def _check_head(scope: Scope, headers: dict[bytes, bytes], settings: ApiSettings) -> None:
    _check_host(scope["headers"], settings)
    if b"origin" in headers:
        _check_origin(headers[b"origin"].decode("latin-1"), settings)
    # A form of a foreign page, from a browser that sends no Origin with it.
    elif headers.get(b"sec-fetch-site") == b"cross-site" and scope["method"] == "POST":
        _check_origin("null", settings)


def _check_host(headers: _HeaderList, settings: ApiSettings) -> None:
    # Against DNS rebinding: a foreign page may have bound its name to this address.
    hosts = [value.decode("latin-1") for name, value in headers if name == b"host"]
    if not hosts:
        raise refused(403, "The request has no Host header.", "host_not_allowed")
    if not all(_is_served(_hostname(host), settings) for host in hosts):
        message = "This Host is not served here; `allowed_hosts` can add it."
        raise refused(403, message, "host_not_allowed")


def _check_origin(origin: str, settings: ApiSettings) -> None:
    allowed = settings.allowed_origins
    if "*" in allowed or origin in allowed:
        return
    try:
        loopback = urlsplit(origin).hostname in _LOOPBACK
    except ValueError:
        loopback = False
    if not loopback:
        raise _foreign_origin()


def _foreign_origin() -> Refused:
    message = "This Origin is not allowed; `allowed_origins` can add it."
    return refused(403, message, "origin_not_allowed")


def _is_local(scope: Scope) -> bool:
    """Whether a request comes from this machine, and not through a proxy."""
    hosts = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
    origins = [value.decode("latin-1") for name, value in scope["headers"] if name == b"origin"]
    if any(name in _FORWARDED for name, _ in scope["headers"]):
        return False
    # A page of another server on this machine is not the operator.
    if any(origin.partition("://")[2] not in hosts for origin in origins):
        return False
    peer = str((scope.get("client") or ("127.0.0.1",))[0]).removeprefix("::ffff:")
    loopback = _is_address(peer) and ipaddress.ip_address(peer).is_loopback
    return loopback and all(_hostname(host) in _LOOPBACK for host in hosts)


def _is_served(host: str, settings: ApiSettings) -> bool:
    allowed = {name.lower() for name in settings.allowed_hosts}
    if host in _LOOPBACK or "*" in allowed or host in allowed:
        return True
    if settings.host in {"0.0.0.0", "::", ""}:  # noqa: S104 - compared, not bound
        # DNS rebinding needs a name; a Host that is an address is one of this machine.
        return _is_address(host)
    return host == settings.host.lower()


def _hostname(host: str) -> str:
    if host.startswith("["):
        name, _, rest = host[1:].partition("]")
        return name.lower() if not rest or rest.startswith(":") else ""
    return host.partition(":")[0].lower()


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _cors_headers(origin: bytes | None, settings: ApiSettings) -> Headers:
    if origin is None:
        return ()
    try:
        _check_origin(origin.decode("latin-1"), settings)
    except Refused:
        return ()
    return (
        (b"access-control-allow-origin", origin),
        (b"access-control-expose-headers", _EXPOSED),
        (b"vary", b"origin"),
    )


def _with_headers(
    send: Send, call: Call, extra: _HeaderList, limits: Callable[[], Headers]
) -> Send:
    # Not a coroutine itself, which would cost one more frame for each chunk of a stream.
    def sender(message: Message) -> Awaitable[None]:
        if message["type"] == "http.response.start":
            call.status = message["status"]
            warned = [fields.warning(call.unknown)] if call.unknown else []
            warned += [f"not supported here, left out: {name}" for name in call.left_out]
            warnings = ((_WARNING, text.encode()) for text in warned)
            message["headers"] = [*message.get("headers", ()), *extra, *warnings, *limits()]
        return send(message)

    return sender


async def _answer_preflight(exchange: Exchange, headers: dict[bytes, bytes]) -> None:
    allowed = headers.get(b"access-control-request-headers", b"authorization, content-type")
    await exchange.start(
        204,
        (
            (b"access-control-allow-methods", b"GET, POST, DELETE"),
            (b"access-control-allow-headers", allowed),
            (b"access-control-max-age", b"600"),
        ),
    )
    await exchange.send({"type": "http.response.body", "body": b""})


def _write_access_log(call: Call, ended: record.Call, client_id: bytes, path: str) -> None:
    data = {
        "request_id": call.id,
        "client_request_id": client_id.decode() if _SAFE_ID.fullmatch(client_id) else "",
        "method": ended.method,
        "route": ended.route,
        "status": ended.status,
        "ms": round(ended.seconds * 1000, 3),
        "outcome": ended.outcome,
    }
    more = _for_people(call, path) if _access.isEnabledFor(logging.INFO) else {}
    _access.info("headrace.access", extra={"data": data, "more": more})


def _for_people(call: Call, path: str) -> dict[str, object]:
    """Return what the text log shows besides: the model, its tokens, their speed, the error."""
    more: dict[str, object] = {
        "problem": call.problem[:_LONGEST_LOGGED],
        "path": path[:_LONGEST_LOGGED],
    }
    if (metrics := call.metrics) is not None:
        usage, speed = metrics.usage, metrics.decode_tokens_per_second
        more |= {"model": metrics.model, "prompt": usage.prompt_tokens, "speed": speed}
        more["completion"] = usage.completion_tokens
    return more


def _outcome(status: int) -> record.Outcome:
    if not status:
        return "cancelled"
    return "ok" if status < 400 else "refused" if status < 500 else "error"
