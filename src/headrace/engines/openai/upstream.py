"""The connections to one upstream: requests, retries, and streams of events."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import AsyncGenerator, Mapping
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import httpx2 as httpx

from headrace.certificates import certificates
from headrace.core.errors import HeadraceError, UpstreamError
from headrace.engines import remote
from headrace.engines.remote import Access, RemoteOptions, SilenceTimer
from headrace.text.chunks import Malformed, is_end, loads
from headrace.text.sse import EventReader, EventTooLong

_LONGEST_BODY = 64 << 20
_LONGEST_REFUSAL = 64 << 10
_FIRST_RETRY_S = 0.25
_DRAIN_S = 0.25
_LOCAL_HOSTS = ("127.0.0.1", "::1", "localhost")
_JSON, _EVENTS = "application/json", "text/event-stream"


class _Failed(NamedTuple):
    """An error before the answer began, and whether to retry."""

    error: HeadraceError
    retry: bool


class Upstream:
    """Pooled connections to one address with one key."""

    def __init__(self, access: Access, options: RemoteOptions, api_version: str | None) -> None:
        self._access = access
        self._options = options
        self._http = httpx.AsyncClient(
            headers={"Accept-Encoding": "identity"} | _key_header(access),
            params={"api-version": api_version} if api_version else None,
            timeout=httpx.Timeout(None, connect=options.connect_s),
            # The queue limits how many run at once.
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=256),
            verify=certificates(),
            # A proxy for the web does not reach this machine.
            trust_env=urlsplit(access.base_url).hostname not in _LOCAL_HOSTS,
            follow_redirects=False,
        )

    def __repr__(self) -> str:
        """Name the address."""
        return f"<Upstream {self._access.base_url}>"

    async def post(
        self, path: str, body: bytes, headers: Mapping[str, str], url: str | None = None
    ) -> Any:
        """Return the JSON of an answer. `headers` are added to the client's.

        Raises:
            HeadraceError: the upstream refused, or there is no answer.
        """
        wait = asyncio.timeout(self._options.first_token_s)
        try:
            async with wait:
                address = url or f"{self._access.base_url}{path}"
                response = await self._open(address, body, _JSON, headers)
                try:
                    answer = await _read(response, _LONGEST_BODY)
                finally:
                    await response.aclose()
            if answer is None:
                raise UpstreamError("The upstream's answer is too long.")
            return loads(answer)
        except TimeoutError:
            if not wait.expired():
                raise
        except httpx.HTTPError as error:
            raise self._broken(error) from None
        except Malformed:
            raise UpstreamError("The upstream's answer is no JSON.") from None
        raise UpstreamError(f"No answer within {self._options.first_token_s:g} s.")

    async def events(
        self, path: str, body: bytes, headers: Mapping[str, str], timer: SilenceTimer
    ) -> AsyncGenerator[bytes, None]:
        """Yield the data of events, without the last one, which is [DONE].

        Raises:
            HeadraceError: a refusal, silence, or a stream that breaks off.
        """
        response: httpx.Response | None = None
        reader, done = EventReader(), False
        try:
            opening = self._open(f"{self._access.base_url}{path}", body, _EVENTS, headers)
            response = await timer.wait(opening)
            chunks = response.aiter_bytes()
            while not done and (chunk := await timer.wait(anext(chunks, None))) is not None:
                for data in reader.feed(chunk):
                    if done := is_end(data):
                        break
                    yield data
            for data in () if done else reader.rest():
                if done := is_end(data):
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
        self, url: str, body: bytes, kind: str, headers: Mapping[str, str]
    ) -> httpx.Response:
        """Return a response that has begun well; retry as configured until one has."""
        for attempt in itertools.count():
            answer = await self._try(url, body, kind, headers)
            if not isinstance(answer, _Failed):
                return answer
            wait_s = self._wait_s(answer, attempt)
            if wait_s is None:
                raise answer.error
            await asyncio.sleep(wait_s)
        raise AssertionError

    async def _try(
        self, url: str, body: bytes, kind: str, headers: Mapping[str, str]
    ) -> httpx.Response | _Failed:
        headers = {**headers, "Content-Type": _JSON, "Accept": kind}
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
            return _Failed(self._broken(error), retry=True)
        finally:
            await response.aclose()

    async def _refused(self, response: httpx.Response, kind: str) -> _Failed:
        content, status = await _read(response, _LONGEST_REFUSAL) or b"", response.status_code
        try:
            reason = loads(content)
        except Malformed:
            reason = content.decode(errors="replace")
        if status == 200:
            return _Failed(self._unexpected_type(response, reason, kind), retry=False)
        after_s = remote.retry_after_s(response.headers)
        error = remote.status_error(self._access, status, reason, after_s)
        return _Failed(error, status in remote.RETRIED)

    def _unexpected_type(self, response: httpx.Response, reason: Any, kind: str) -> HeadraceError:
        if isinstance(reason, dict) and "error" in reason:
            return remote.stream_error(self._access, reason)
        received = self._access.scrub(_kind_of(response) or "nothing")
        return UpstreamError(f"The upstream answered with {received}, not {kind}.")

    def _wait_s(self, failed: _Failed, attempt: int) -> float | None:
        if not failed.retry or attempt >= self._options.max_retries:
            return None
        requested_s = failed.error.retry_after_s
        if requested_s is not None:
            return requested_s if requested_s <= remote.LONGEST_RETRY_S else None
        # Requests that were refused together are retried at different times.
        return _FIRST_RETRY_S * 2**attempt * random.uniform(0.5, 1.5)  # noqa: S311

    def _broken(self, error: httpx.HTTPError) -> UpstreamError:
        # The library's text can contain the request, so it is scrubbed as well.
        detail = self._access.scrub(f"{type(error).__name__}: {error}")
        if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
            return UpstreamError("The upstream cannot be reached.", detail=detail)
        return UpstreamError("The connection to the upstream broke off.", detail=detail)


def _key_header(access: Access) -> dict[str, str]:
    """Return the header with the key, where there is one."""
    if access.key is None:
        return {}
    key, name = access.key.get_secret_value(), access.provider.key_header
    return {name: f"Bearer {key}" if name == "Authorization" else key}


def _kind_of(response: httpx.Response) -> str:
    return response.headers.get("content-type", "").partition(";")[0].strip().lower()


async def _read(response: httpx.Response, limit: int) -> bytes | None:
    """Return a body, None where it is longer than `limit` bytes."""
    parts, size = list[bytes](), 0
    async for part in response.aiter_bytes():
        size += len(part)
        if size > limit:
            return None
        parts.append(part)
    return b"".join(parts)


async def _drain(chunks: Any) -> None:
    """Read the rest of the stream, so that the connection can be used again."""
    try:
        async with asyncio.timeout(_DRAIN_S):
            while await anext(chunks, None) is not None:
                pass
    except (TimeoutError, httpx.HTTPError):
        # The answer was complete.
        return
