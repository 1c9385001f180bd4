"""API keys: known by their hashes, compared in constant time."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence

from headrace.core.errors import Unauthorized

OPEN_PATHS = frozenset({"/health", "/health/live", "/health/ready"})


def hash_key(key: str) -> str:
    """Return the form in which a key is kept."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def authorise(headers: dict[bytes, bytes], hashes: Sequence[str]) -> None:
    """Let a request with a known key pass.

    Raises:
        Unauthorized: there is no key, or an unknown one.
    """
    key = _key(headers)
    if key is None:
        raise Unauthorized("An API key is needed: send it as `Authorization: Bearer <key>`.")
    offered = hashlib.sha256(key).hexdigest()
    # All are compared, so that the time tells nothing of which one, or how near.
    if not sum(hmac.compare_digest(offered, known) for known in hashes):
        raise Unauthorized("This API key is not known here.")


def _key(headers: dict[bytes, bytes]) -> bytes | None:
    scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
    if scheme.lower() == b"bearer" and token.strip():
        return token.strip()
    return headers.get(b"x-api-key")
