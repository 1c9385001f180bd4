"""Where nodes are: a directory yields addresses, and is only a hint.

What a directory has yielded is tried; a node leaves when its connection ends, or when it drains,
and not when a directory forgets it, is empty, or is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncGenerator, Collection, Sequence
from typing import Protocol

from headrace.cluster.wire import Address
from headrace.config.cluster import ClusterSettings
from headrace.core.errors import ConfigError

log = logging.getLogger("headrace.cluster")

_DNS_EVERY_S = 2.0
_LARGEST_PORT = 65535


class Directory(Protocol):
    """Yields the addresses of nodes, again whenever they may have changed."""

    def addresses(self) -> AsyncGenerator[Collection[Address], None]:
        """Yield the known addresses. Errors of a lookup are logged, and not raised."""
        ...


class StaticDirectory:
    """The addresses of the configuration."""

    def __init__(self, nodes: Sequence[Address]) -> None:
        self._nodes = tuple(nodes)

    async def addresses(self) -> AsyncGenerator[Collection[Address], None]:
        """Yield them once."""
        yield self._nodes


class DnsDirectory:
    """All addresses of a name, such as that of a headless Service of Kubernetes."""

    def __init__(self, name: Address, every_s: float = _DNS_EVERY_S) -> None:
        self._name = name
        self._every_s = every_s
        self._error = ""

    async def addresses(self) -> AsyncGenerator[Collection[Address], None]:
        """Look the name up every two seconds."""
        while True:
            yield await self._lookup()
            await asyncio.sleep(self._every_s)

    async def _lookup(self) -> Collection[Address]:
        loop, error = asyncio.get_running_loop(), ""
        resolved: set[Address] = set()
        try:
            for *_, place in await loop.getaddrinfo(*self._name, type=socket.SOCK_STREAM):
                resolved.add(Address(str(place[0]), int(place[1])))
        except OSError as failure:
            error = failure.strerror or str(failure)
        if error and error != self._error:
            data = {"name": str(self._name), "error": error}
            log.warning("headrace.cluster.lookup_failed", extra={"data": data})
        self._error = error
        return resolved


def parse_address(text: str) -> Address:
    """Read HOST:PORT, or [HOST]:PORT.

    Raises:
        ConfigError: it is neither.
    """
    host, _, port = text.strip().rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    with contextlib.suppress(ValueError):
        if host and 0 < int(port) <= _LARGEST_PORT:
            return Address(host, int(port))
    raise ConfigError(f"{text!r} is no HOST:PORT of a node.", param="nodes")


def directories(settings: ClusterSettings) -> list[Directory]:
    """Return the directories of the configuration.

    Raises:
        ConfigError: an address is malformed, or there is none.
    """
    chosen: list[Directory] = []
    if settings.nodes:
        chosen.append(StaticDirectory([parse_address(text) for text in settings.nodes]))
    if settings.dns is not None:
        chosen.append(DnsDirectory(parse_address(settings.dns)))
    if not chosen:
        raise ConfigError(
            "A front needs the addresses of its nodes: set cluster.nodes or cluster.dns.",
            param="nodes",
        )
    return chosen
