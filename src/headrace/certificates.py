"""The certificates by which the hosts of HTTPS are known."""

from __future__ import annotations

import ssl
from functools import cache


@cache
def certificates() -> ssl.SSLContext:
    """Return what checks them; they are read once, which takes 50 ms."""
    import httpx2  # slow to import

    return httpx2.create_ssl_context()
