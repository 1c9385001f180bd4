"""Request bodies: bounded while they come, checked, and decoded into structs."""

from __future__ import annotations

import asyncio
import re
from typing import TypeVar

import msgspec
from starlette.types import Receive

from headrace.api.problems import Problem, Refused
from headrace.api.settings import ApiSettings
from headrace.core.errors import InvalidRequest, Unsupported

T = TypeVar("T", bound=msgspec.Struct)

_LARGE = 64 << 10
# An unterminated string runs to the end, so that the scan never looks at a byte twice.
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)
_NOT_BRACKETS = bytes(byte for byte in range(256) if byte not in b"[]{}")
_AS_SQUARE = bytes.maketrans(b"{}", b"[]")
_PLACE = re.compile(r"(?P<what>.*?)(?: - at (?:`key` in )?`\$\.?(?P<where>.*)`)?", re.DOTALL)
_NAMED = re.compile(r"Object (?P<how>missing required|contains unknown) field `(?P<name>.*)`")


class ClientGone(Exception):
    """The client closed the connection; nobody reads an answer."""


async def read(receive: Receive, headers: dict[bytes, bytes], settings: ApiSettings) -> bytes:
    """Take the whole body.

    Raises:
        Refused: 408, 413 or 415.
        ClientGone: the client left before its end.
    """
    kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
    if kind not in {b"", b"application/json"} and not kind.endswith(b"+json"):
        raise _refused(415, "The body must be application/json.", "unsupported_content_type")
    declared = headers.get(b"content-length", b"0")
    if not declared.isdigit() or int(declared[:20]) > settings.max_body:
        raise _too_large(settings)
    try:
        async with asyncio.timeout(settings.body_timeout_s):
            return await _read_all(receive, settings)
    except TimeoutError:
        raise _refused(408, "The body did not come in time.", "body_timeout") from None


async def _read_all(receive: Receive, settings: ApiSettings) -> bytes:
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > settings.max_body:
            raise _too_large(settings)
        if not message.get("more_body", False):
            return b"".join(parts)


async def decode(body: bytes, decoder: msgspec.json.Decoder[T], max_depth: int) -> T:
    """Decode a body; a large one in a thread, so that nobody else waits for it.

    Raises:
        InvalidRequest: it is not JSON, too deep, or a field is wrong.
        Unsupported: a field is understood but cannot be honoured.
    """
    if len(body) > _LARGE:
        return await asyncio.to_thread(parse, body, decoder, max_depth)
    return parse(body, decoder, max_depth)


def parse(body: bytes, decoder: msgspec.json.Decoder[T], max_depth: int) -> T:
    """Decode a body here and now. Raises as `decode` does."""
    if is_deeper(body, max_depth):
        raise InvalidRequest(f"The JSON is nested deeper than {max_depth} levels.")
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        raise _field_error(str(error), decoder.type) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise InvalidRequest("The body is not valid JSON in UTF-8.") from None


def is_deeper(body: bytes, limit: int) -> bool:
    """Tell whether the brackets of a JSON text nest deeper than `limit`; linear, no recursion."""
    if body.count(b"[") + body.count(b"{") <= limit:
        return False
    left = _STRING.sub(b"", body).translate(_AS_SQUARE, _NOT_BRACKETS)
    for _ in range(limit):
        # Each pass takes the innermost level away. What no pass can shorten is not JSON.
        shorter = left.replace(b"[]", b"")
        if len(shorter) == len(left):
            return len(left) > limit
        left = shorter
    return bool(left)


def _field_error(text: str, kind: object) -> InvalidRequest | Unsupported:
    match = _PLACE.fullmatch(text)
    what, where = (match["what"], match["where"] or "") if match else (text, "")
    if named := _NAMED.fullmatch(what):
        where = f"{where}.{named['name']}".lstrip(".")
        is_missing = named["how"].startswith("missing")
        what = "This field is required" if is_missing else "This field is unknown"
    field = re.split(r"[.\[]", where, maxsplit=1)[0]
    if field in getattr(kind, "REFUSED", ()):
        return Unsupported(f"{field} is not supported here.", param=field)
    return InvalidRequest(f"{where}: {what}." if where else f"{what}.", param=where or None)


def _too_large(settings: ApiSettings) -> Refused:
    problem = Problem(
        status=413,
        message=f"The body is larger than {settings.max_body} bytes.",
        code="body_too_large",
        headers=((b"connection", b"close"),),
    )
    return Refused(problem)


def _refused(status: int, message: str, code: str) -> Refused:
    return Refused(Problem(status=status, message=message, code=code))
