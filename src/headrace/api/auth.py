"""API keys: known by their hashes, compared in constant time."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence

from starlette.types import Scope

from headrace.api import guard
from headrace.api.settings import ApiSettings
from headrace.core.errors import Forbidden, Unauthorized

OPEN_PATHS = frozenset({"/health", "/health/live", "/health/ready"})
METRICS_PATH = "/metrics"

_CLIENT_DIGITS = 16


def hash_key(key: str) -> str:
    """Return the form in which a key is kept."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def authorise(
    headers: dict[bytes, bytes], settings: ApiSettings, path: str = ""
) -> tuple[str, bool]:
    """Let a request with a known key pass; return a short id of the key, and if it is an admin's.

    Without any keys everybody passes, as an admin without an id. Keys for the metrics alone close
    nothing but the metrics.

    Raises:
        Unauthorized: there is no key, or an unknown one.
        Forbidden: the key is for the metrics and the path is not, or the other way round.
    """
    metrics = path == METRICS_PATH
    if not (settings.has_keys or (metrics and settings.metrics_key_hashes)):
        return "", True
    key = _key(headers)
    if key is None:
        raise Unauthorized("An API key is needed: send it as `Authorization: Bearer <key>`.")
    offered = hashlib.sha256(key).hexdigest()
    is_admin = _is_among(offered, settings.admin_key_hashes)
    asks = _is_among(offered, settings.key_hashes)
    reads = _is_among(offered, settings.metrics_key_hashes)
    # Not `or`: all are compared, so that the time tells nothing of which one, or how near.
    if not is_admin | asks | reads:
        raise Unauthorized("This API key is not known here.")
    if not is_admin | (reads if metrics else asks):
        what = "may ask models, not read /metrics" if metrics else "may read /metrics alone"
        raise Forbidden(f"This API key {what}.")
    return offered[:_CLIENT_DIGITS], is_admin


def check_admin(scope: Scope, settings: ApiSettings, *, is_admin: bool) -> None:
    """Let those pass who may change what is served.

    Raises:
        Forbidden: the key is not an admin's; or there are no keys, and it is not this machine.
        Refused: a foreign web page asks.
    """
    if not is_admin:
        raise Forbidden("This API key may ask models, not manage them: that needs an admin key.")
    if not (settings.has_keys or guard.is_local(scope)):
        raise Forbidden("Without an admin key, models are managed from this machine alone.")
    guard.check_site(dict(scope["headers"]))


def _is_among(offered: str, hashes: Sequence[str]) -> bool:
    return bool(sum(hmac.compare_digest(offered, known) for known in hashes))


def _key(headers: dict[bytes, bytes]) -> bytes | None:
    scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
    if scheme.lower() == b"bearer" and token.strip():
        return token.strip()
    return headers.get(b"x-api-key")
