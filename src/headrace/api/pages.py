"""The console at / and the page /docs: files that `scripts/console` has built, for browsers.

They hold no data, so they need no key; what they show comes from the API, with the user's key.
"""

from __future__ import annotations

import asyncio
import gzip
import hashlib
from functools import cache
from pathlib import Path
from typing import NamedTuple

from headrace.api.exchange import Exchange, Service
from headrace.api.problems import Headers, refused

FOLDER = Path(__file__).parents[1] / "console"
PREFIX = "/console/"

_KINDS = {
    ".html": b"text/html; charset=utf-8",
    ".js": b"text/javascript; charset=utf-8",
    ".css": b"text/css; charset=utf-8",
    ".svg": b"image/svg+xml",
}
_POLICY = (
    b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    b"connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    b"require-trusted-types-for 'script'; trusted-types 'none'"
)
_HEADERS = (
    (b"content-security-policy", _POLICY),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cache-control", b"no-cache"),
    (b"vary", b"accept-encoding, accept"),
)


class Asset(NamedTuple):
    """A file as it is sent, plain and compressed, with its entity tag."""

    body: bytes
    packed: bytes
    tag: bytes
    kind: bytes


def is_page(path: str) -> bool:
    """Whether a path is that of a page or of a file of one, which need no key."""
    return path in {"/", "/docs"} or path.startswith(PREFIX)


def tag_of(body: bytes) -> bytes:
    """Return the entity tag of a body."""
    return b'"%b"' % hashlib.sha256(body).hexdigest()[:20].encode()


async def unchanged(exchange: Exchange, tag: bytes, headers: Headers) -> bool:
    """Answer with a 304 if the client has what `tag` stands for; return whether it has."""
    if tag not in dict(exchange.scope["headers"]).get(b"if-none-match", b""):
        return False
    await exchange.start(304, headers)
    await exchange.send({"type": "http.response.body", "body": b""})
    return True


async def home(_service: Service, exchange: Exchange) -> None:
    """Send the console to browsers; clients of Ollama get the text that they look for."""
    accepted = dict(exchange.scope["headers"]).get(b"accept", b"")
    if exchange.settings.console and b"text/html" in accepted:
        await _send(exchange, "index.html")
        return
    await exchange.reply(b"Ollama is running", kind=b"text/plain; charset=utf-8")


async def docs(_service: Service, exchange: Exchange) -> None:
    """Send the page with the documentation of the API."""
    await _send(exchange, "index.html")


async def file(_service: Service, exchange: Exchange) -> None:
    """Send a file of the pages."""
    await _send(exchange, exchange.scope["path_params"]["name"])


async def _send(exchange: Exchange, name: str) -> None:
    asset = await _asset(name) if exchange.settings.console else None
    if asset is None:
        path = exchange.scope["path"]
        raise refused(404, f"Invalid URL (GET {path})", "unknown_url")
    headers = ((b"etag", asset.tag), *_HEADERS)
    if await unchanged(exchange, asset.tag, headers):
        return
    if b"gzip" in dict(exchange.scope["headers"]).get(b"accept-encoding", b""):
        headers = (*headers, (b"content-encoding", b"gzip"))
        await exchange.reply(asset.packed, headers=headers, kind=asset.kind)
    else:
        await exchange.reply(asset.body, headers=headers, kind=asset.kind)


async def _asset(name: str) -> Asset | None:
    # Compressed once, in a thread, as it takes some milliseconds.
    return (await asyncio.to_thread(assets)).get(name)


@cache
def assets() -> dict[str, Asset]:
    """Return the files of the pages by their names. Blocking."""
    paths = [path for path in sorted(FOLDER.iterdir()) if path.suffix in _KINDS]
    return {path.name: _read(path) for path in paths}


def _read(path: Path) -> Asset:
    body = path.read_bytes()
    return Asset(body, gzip.compress(body, 9, mtime=0), tag_of(body), _KINDS[path.suffix])
