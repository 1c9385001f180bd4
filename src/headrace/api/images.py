"""Pictures and sounds in requests: `data:` URLs, and URLs of hosts that are allowed."""

from __future__ import annotations

import asyncio
import binascii
import ipaddress
import re
import socket
from collections.abc import AsyncGenerator, Callable, Generator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import NamedTuple, TypeVar
from urllib.parse import SplitResult, urlsplit

from headrace.api.bodies import too_large
from headrace.api.exchange import Exchange, Service
from headrace.api.limits import ApiSettings
from headrace.api.problems import refused
from headrace.certificates import certificates
from headrace.core.errors import InvalidRequest
from headrace.core.media import MAX_IMAGE_BYTES, Audio, Image, M, Media, Pictures, too_many_bytes

MAX_HELD = 512 << 20
"""Bytes of the pictures and sounds of all requests that run or wait."""
FETCH_TIMEOUT_S = 10.0
"""For one picture or sound, from the look-up of its host to its last byte."""

_SPACES = re.compile(r"[\t\n\r ]+")
_NAT64 = ipaddress.ip_network("64:ff9b::/96")

T = TypeVar("T")

Fetched = Mapping[str, bytes]
"""Pictures and sounds of other hosts, by URL."""
Urls = Iterable[tuple[str, str]]
"""URLs of pictures and sounds, each with its place in errors."""


class Held:
    """The pictures and sounds of all requests together, bounded.

    `shares` is how many processes share the bound.
    """

    def __init__(self) -> None:
        self.size = 0
        self.shares = 1

    @contextmanager
    def hold(self, size: int) -> Generator[None]:
        """Count so many bytes while the context is open.

        Raises:
            Refused: there would be more than `MAX_HELD`.
        """
        is_alone = self.shares > 1 and not self.size
        if self.size + size > MAX_HELD // self.shares and not is_alone:
            message = "The images and sounds of other requests take all room; try again later."
            raise refused(503, message, "too_many_images", ((b"retry-after", b"1"),))
        self.size += size
        try:
            yield
        finally:
            self.size -= size


HELD = Held()


def body_limit(service: Service, settings: ApiSettings) -> int:
    """Return the most bytes of a conversation: more where a model may take images or audio."""
    # What a model can do is known once it is loaded.
    may_see = any(
        info.capabilities.vision or info.capabilities.audio or info.state != "ready"
        for info in service.backend.models()
    )
    sizes = (settings.max_body_bytes, settings.max_image_body_bytes)
    return max(sizes) if may_see else sizes[0]


class Translation(NamedTuple):
    """Makes core requests of bodies that may have media; `fetched` are those of other hosts."""

    fetched: Fetched
    has_images: bool

    async def run(self, make: Callable[[ImageReader], T]) -> T:
        """Return what `make` returns, which gets the reader of the images and sounds.

        With any it runs in a thread, as decoding them takes long.
        """
        reader = ImageReader(self.fetched)
        return await asyncio.to_thread(make, reader) if self.has_images else make(reader)


@asynccontextmanager
async def held(exchange: Exchange, urls: Urls, others: int = 0) -> AsyncGenerator[Translation]:
    """Count the media of a request while the context is open, and fetch those of allowed hosts.

    `others` is the size of images that have no URL, as base64.

    Raises:
        Refused: the body is too large without its media, or there are too many of all requests.
        InvalidRequest: one cannot be fetched.
    """
    places = [*urls]
    sent = others + sum(len(url) for url, _ in places)
    if exchange.body_size - sent > exchange.settings.max_body_bytes:
        raise too_large(exchange.settings.max_body_bytes)
    remote = {url: place for url, place in reversed(places) if url[:4].lower() == "http"}
    has_images = sent > 0
    del urls, places
    with HELD.hold(sent + (MAX_IMAGE_BYTES if remote else 0)):
        fetched: Fetched = {}
        if remote and exchange.settings.media_hosts:
            work = fetch(remote, exchange.settings.media_hosts)
            fetched = await exchange.unless_gone(work)
        yield Translation(fetched, has_images)


class ImageReader:
    """Reads the pictures and sounds of one request; `pictures` has their bytes."""

    def __init__(self, fetched: Fetched | None = None) -> None:
        self.pictures = Pictures()
        self._fetched = fetched or {}

    def read(self, url: str, place: str) -> Image:
        """Return the picture of a URL: the data in it, or what was fetched from it.

        Raises:
            InvalidRequest: it is no picture, beyond a bound, or its URL is not allowed; `place` is
                its name in errors.
        """
        return self._read(Image, url, place, self.pictures.add)

    def read_audio(self, url: str, place: str) -> Audio:
        """Return the sound of a URL, as `read` does a picture.

        Raises:
            InvalidRequest: it is no sound, beyond a bound, or its URL is not allowed.
        """
        return self._read(Audio, url, place, self.pictures.add_audio)

    def _read(self, kind: type[M], url: str, place: str, add: Callable[[bytes, str], M]) -> M:
        pictures = self.pictures
        if isinstance(part := pictures.by_url.get(url), kind):
            pictures.again(part, place)
            return part
        part = pictures.by_url[url] = add(self._data(kind, url, place), place)
        return part

    def _data(self, kind: type[Media], url: str, place: str) -> bytes:
        scheme = url.partition(":")[0].lower()
        if scheme == "data":
            return _decoded(url, place, self.pictures.room(place))
        if url in self._fetched:
            return self._fetched[url]
        noun, many = ("image", "images") if kind is Image else ("audio", "sounds")
        is_web = scheme in ("http", "https")
        reason = f"{many} of this host are not fetched; send" if is_web else "send"
        raise InvalidRequest(f"{place}: {reason} the {noun} in a data: URL.", param=place)


def _decoded(url: str, place: str, room: int) -> bytes:
    head, comma, text = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise InvalidRequest(f"{place}: a data: URL has ;base64,.", param=place)
    if len(text) > room * 2:
        raise too_many_bytes(place)
    text = _SPACES.sub("", text)
    if len(text) // 4 * 3 - 2 > room:
        raise too_many_bytes(place)
    try:
        return binascii.a2b_base64(text, strict_mode=True)
    except ValueError as error:
        raise InvalidRequest(f"{place}: not base64: {error}.", param=place) from None


async def fetch(urls: Mapping[str, str], hosts: Sequence[str]) -> Fetched:
    """Return the media of URLs with a host that is allowed; `urls` have their place in errors.

    Raises:
        InvalidRequest: one cannot be fetched, or leads to an address that is not public.
    """
    import httpx2  # slow to import

    fetched: dict[str, bytes] = {}
    room = Pictures().room("")
    for url, place in urls.items():
        parts = _split(url, place)
        if not _is_allowed(parts.hostname or "", hosts):
            continue
        try:
            async with asyncio.timeout(FETCH_TIMEOUT_S):
                fetched[url] = await _fetch(parts, place, room)
        except TimeoutError:
            raise _unfetched(place, f"it took more than {FETCH_TIMEOUT_S:g} s") from None
        except (httpx2.HTTPError, httpx2.InvalidURL, OSError) as error:
            raise _unfetched(place, type(error).__name__) from None
        room -= len(fetched[url])
    return fetched


def _split(url: str, place: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018  # raises for a port that is none
    except ValueError as error:
        raise InvalidRequest(f"{place}: {error}.", param=place) from None
    if parts.username is not None or parts.password is not None:
        raise InvalidRequest(f"{place}: a URL with a user is not fetched.", param=place)
    return parts


def _is_allowed(host: str, hosts: Sequence[str]) -> bool:
    host = host.rstrip(".").lower()
    return any(
        pattern == "*" or host == pattern or (pattern[:2] == "*." and host.endswith(pattern[1:]))
        for pattern in map(str.lower, hosts)
    )


async def _fetch(parts: SplitResult, place: str, room: int) -> bytes:
    import httpx2

    host, port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
    address = await _address(host, port, place)
    shown = f"[{address}]" if ":" in address else address
    # To the address that was checked: a second look-up could have another answer.
    url = parts._replace(netloc=f"{shown}:{port}", fragment="").geturl()
    headers = {"Host": parts.netloc, "Accept": "image/*, audio/*", "Accept-Encoding": "identity"}
    # Reading them would hold up all streams.
    known = await asyncio.to_thread(certificates)
    async with (
        httpx2.AsyncClient(verify=known, trust_env=False, follow_redirects=False) as client,
        client.stream("GET", url, headers=headers, extensions={"sni_hostname": host}) as response,
    ):
        if response.status_code != 200:
            raise _unfetched(place, f"its host answered {response.status_code}")
        if response.headers.get("content-encoding", "identity") != "identity":
            raise _unfetched(place, "it is compressed")
        data = bytearray()
        async for chunk in response.aiter_raw():
            data += chunk
            if len(data) > room:
                raise too_many_bytes(place)
        return bytes(data)


async def _address(host: str, port: int, place: str) -> str:
    """Return an address of a host, all of whose addresses are public."""
    loop = asyncio.get_running_loop()
    try:
        answers = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise _unfetched(place, "its host has no address") from None
    addresses = [str(answer[4][0]) for answer in answers]
    if not addresses or not all(map(is_public, addresses)):
        raise _unfetched(place, "its host has an address that is not public")
    return addresses[0]


def is_public(address: str) -> bool:
    """Whether an address is one of the public internet, also by an IPv4 address within it."""
    try:
        number = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(number, ipaddress.IPv6Address):
        inner = number.ipv4_mapped or number.sixtofour
        if number in _NAT64:
            inner = ipaddress.IPv4Address(int(number) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
        if number.teredo is not None or number.is_site_local or number.scope_id is not None:
            return False
    return number.is_global and not number.is_multicast and not number.is_reserved


def _unfetched(place: str, reason: str) -> InvalidRequest:
    return InvalidRequest(f"{place}: it was not fetched: {reason}.", param=place)
