"""The connections to one upstream: requests, retries, and streams of events."""

from __future__ import annotations

import asyncio
import itertools
import random
import ssl
from collections.abc import AsyncGenerator, Mapping
from functools import cache
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import httpx2 as httpx
import msgspec

from headrace.core.errors import HeadraceError, UpstreamError
from headrace.engines import remote
from headrace.engines.remote import Access, Patience, RemoteOptions
from headrace.text.sse import EventReader, EventTooLong

DONE = b"[DONE]"
_LONGEST_BODY = 64 << 20
_LONGEST_REFUSAL = 64 << 10
_FIRST_WAIT_S = 0.25
_LAST_WORDS_S = 0.25
_HERE = ("127.0.0.1", "::1", "localhost")
_JSON, _EVENTS = "application/json", "text/event-stream"


class _Failed(NamedTuple):
    """What went wrong before an answer began, and whether it is worth another try."""

    error: HeadraceError
    again: bool


@cache
def certificates() -> ssl.SSLContext:
    """Return what upstreams are checked with; reading it takes a while, so it is read once."""
    return httpx.create_ssl_context()


class Upstream:
    """Pooled connections to one address with one key."""

    def __init__(self, way: Access, options: RemoteOptions, api_version: str | None) -> None:
        self._way = way
        self._options = options
        self._http = httpx.AsyncClient(
            headers={"Accept-Encoding": "identity"} | _entry(way),
            params={"api-version": api_version} if api_version else None,
            timeout=httpx.Timeout(None, connect=options.connect_s),
            # How many run at once is decided in front of this.
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=256),
            verify=certificates(),
            # A proxy that is meant for the web does not know this machine.
            trust_env=urlsplit(way.base_url).hostname not in _HERE,
            follow_redirects=False,
        )

    def __repr__(self) -> str:
        """Name the address."""
        return f"<Upstream {self._way.base_url}>"

    async def ask(
        self, path: str, body: bytes, headers: Mapping[str, str], url: str | None = None
    ) -> Any:
        """Return the JSON of an answer. `headers` go beside our own.

        Raises:
            HeadraceError: what the upstream's refusal means, or that there is no answer.
        """
        wait = asyncio.timeout(self._options.first_token_s)
        try:
            async with wait:
                place = url or f"{self._way.base_url}{path}"
                response = await self._open(place, body, _JSON, headers)
                try:
                    answer = await _read(response, _LONGEST_BODY)
                finally:
                    await response.aclose()
            if answer is None:
                raise UpstreamError("The upstream's answer is too long.")
            return msgspec.json.decode(answer)
        except TimeoutError:
            if not wait.expired():
                raise
        except httpx.HTTPError as error:
            raise self._broken(error) from None
        except (msgspec.DecodeError, UnicodeDecodeError):
            raise UpstreamError("The upstream's answer is no JSON.") from None
        raise UpstreamError(f"No answer within {self._options.first_token_s:g} s.")

    async def events(
        self, path: str, body: bytes, headers: Mapping[str, str], patience: Patience
    ) -> AsyncGenerator[bytes, None]:
        """Yield the data of events, without the last one, which is [DONE].

        Raises:
            HeadraceError: a refusal, silence, or a stream that breaks off.
        """
        response: httpx.Response | None = None
        reader, done = EventReader(), False
        try:
            opening = self._open(f"{self._way.base_url}{path}", body, _EVENTS, headers)
            response = await patience.wait(opening)
            chunks = response.aiter_bytes()
            while not done and (chunk := await patience.wait(anext(chunks, None))) is not None:
                for data in reader.feed(chunk):
                    if done := data == DONE:
                        break
                    yield data
            for data in () if done else reader.rest():
                if done := data == DONE:
                    break
                yield data
            if not done:
                raise UpstreamError("The upstream's stream is truncated: it has no end.")
            await _drain(chunks)
        except EventTooLong:
            raise UpstreamError("The upstream sent an event that is too long.") from None
        except httpx.HTTPError as error:
            raise self._broken(error) from None
        finally:
            if response is not None:
                await response.aclose()

    async def aclose(self) -> None:
        """Close all connections."""
        await self._http.aclose()

    async def _open(
        self, url: str, body: bytes, kind: str, more: Mapping[str, str]
    ) -> httpx.Response:
        """Return an answer that has begun well. Nothing is tried again once one has begun."""
        for tried in itertools.count():
            answer = await self._try(url, body, kind, more)
            if not isinstance(answer, _Failed):
                return answer
            wait_s = self._wait_s(answer, tried)
            if wait_s is None:
                raise answer.error
            await asyncio.sleep(wait_s)
        raise AssertionError

    async def _try(
        self, url: str, body: bytes, kind: str, more: Mapping[str, str]
    ) -> httpx.Response | _Failed:
        headers = {**more, "Content-Type": _JSON, "Accept": kind}
        request = self._http.build_request("POST", url, content=body, headers=headers)
        try:
            response = await self._http.send(request, stream=True)
        except httpx.HTTPError as error:
            return _Failed(self._broken(error), isinstance(error, httpx.TransportError))
        if response.status_code == 200 and _kind_of(response) == kind:
            return response
        try:
            return await self._refused(response, kind)
        except httpx.HTTPError as error:
            return _Failed(self._broken(error), again=True)
        finally:
            await response.aclose()

    async def _refused(self, response: httpx.Response, kind: str) -> _Failed:
        content, status = await _read(response, _LONGEST_REFUSAL) or b"", response.status_code
        try:
            reason = msgspec.json.decode(content)
        except (msgspec.DecodeError, UnicodeDecodeError):
            reason = content.decode(errors="replace")
        if status == 200:
            return _Failed(self._strange(response, reason, kind), again=False)
        after_s = remote.retry_after_s(response.headers)
        error = remote.refusal(self._way, status, reason, after_s)
        return _Failed(error, status in remote.RETRIED)

    def _strange(self, response: httpx.Response, reason: Any, kind: str) -> HeadraceError:
        if isinstance(reason, dict) and "error" in reason:
            return remote.complaint(self._way, reason)
        got = self._way.scrub(_kind_of(response) or "nothing")
        return UpstreamError(f"The upstream answered with {got}, not {kind}.")

    def _wait_s(self, failed: _Failed, tried: int) -> float | None:
        if not failed.again or tried >= self._options.max_retries:
            return None
        asked = failed.error.retry_after_s
        if asked is not None:
            return asked if asked <= remote.LONGEST_RETRY_S else None
        # Requests that were refused together are not tried again together.
        return _FIRST_WAIT_S * 2**tried * random.uniform(0.5, 1.5)  # noqa: S311

    def _broken(self, error: httpx.HTTPError) -> UpstreamError:
        # The library's text can hold what was sent, so it is scrubbed as well.
        detail = self._way.scrub(f"{type(error).__name__}: {error}")
        if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
            return UpstreamError("The upstream cannot be reached.", detail=detail)
        return UpstreamError("The connection to the upstream broke off.", detail=detail)


def _entry(way: Access) -> dict[str, str]:
    """Return the header with the key, where there is one."""
    if way.key is None:
        return {}
    key, name = way.key.get_secret_value(), way.provider.key_header
    return {name: f"Bearer {key}" if name == "Authorization" else key}


def _kind_of(response: httpx.Response) -> str:
    return response.headers.get("content-type", "").partition(";")[0].strip().lower()


async def _read(response: httpx.Response, most: int) -> bytes | None:
    """Return a body, None where it is longer than `most` bytes."""
    parts, size = list[bytes](), 0
    async for part in response.aiter_bytes():
        size += len(part)
        if size > most:
            return None
        parts.append(part)
    return b"".join(parts)


async def _drain(chunks: Any) -> None:
    """Read what follows the last word, so that the connection can be used again."""
    try:
        async with asyncio.timeout(_LAST_WORDS_S):
            while await anext(chunks, None) is not None:
                pass
    except (TimeoutError, httpx.HTTPError):
        # The answer was whole.
        return
