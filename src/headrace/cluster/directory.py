"""Where nodes are: a directory yields addresses, and is only a hint.

What a directory has yielded is tried; a node leaves when its connection ends, or when it drains,
and not when a directory forgets it, is empty, or is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Protocol

from headrace.cluster import listing
from headrace.cluster.secure import Member, Refusal
from headrace.cluster.wire import Address, Placed
from headrace.config.cluster import ClusterSettings
from headrace.core.errors import ConfigError

log = logging.getLogger("headrace.cluster")

_EVERY_S = 2.0
_LARGEST_PORT = 65535


class Directory(Protocol):
    """Yields the addresses of nodes, again whenever they may have changed.

    `placed` is what it knows beside the address of some.
    """

    @property
    def placed(self) -> Mapping[Address, Placed]:
        """What places the nodes reports of them, as of the last look."""
        ...

    def addresses(self) -> AsyncGenerator[Collection[Address], None]:
        """Yield the known addresses. Errors of a lookup are logged, and not raised."""
        ...


class StaticDirectory:
    """The addresses of the configuration."""

    placed: Mapping[Address, Placed] = MappingProxyType({})

    def __init__(self, nodes: Sequence[Address]) -> None:
        self._nodes = tuple(nodes)

    async def addresses(self) -> AsyncGenerator[Collection[Address], None]:
        """Yield them once."""
        yield self._nodes


class _Polled:
    """A directory that is looked up every two seconds."""

    def __init__(self, name: Address, every_s: float = _EVERY_S) -> None:
        self.placed: Mapping[Address, Placed] = {}
        self._name = name
        self._every_s = every_s
        self._error = ""

    async def addresses(self) -> AsyncGenerator[Collection[Address], None]:
        """Yield what each lookup returns; nothing of one that fails."""
        while True:
            addresses: Collection[Address] = ()
            error = ""
            try:
                addresses = await self._lookup()
            except (OSError, Refusal, ConfigError) as failure:
                text = getattr(failure, "strerror", None) or str(failure)
                error = text or type(failure).__name__
            self._note(error)
            yield addresses
            await asyncio.sleep(self._every_s)

    async def _lookup(self) -> Collection[Address]:
        raise NotImplementedError

    def _note(self, error: str) -> None:
        if error and error != self._error:
            data = {"name": str(self._name), "error": error}
            log.warning("headrace.cluster.lookup_failed", extra={"data": data})
        self._error = error


class DnsDirectory(_Polled):
    """All addresses of a name, such as that of a headless Service of Kubernetes."""

    async def _lookup(self) -> Collection[Address]:
        loop = asyncio.get_running_loop()
        places = await loop.getaddrinfo(*self._name, type=socket.SOCK_STREAM)
        return {Address(str(place[0]), int(place[1])) for *_, place in places}


class RayDirectory(_Polled):
    """The nodes that `headrace cluster up` has placed on the machines of a Ray cluster."""

    def __init__(self, name: Address, member: Member, every_s: float = _EVERY_S) -> None:
        super().__init__(name, every_s)
        self._member = member

    async def _lookup(self) -> Collection[Address]:
        nodes = await listing.fetch(self._name, self._member)
        self.placed = {parse_address(node.address): node for node in nodes}
        return self.placed.keys()


def parse_address(text: str) -> Address:
    """Read HOST:PORT, or [HOST]:PORT.

    Raises:
        ConfigError: it is neither.
    """
    host, _, port = text.strip().rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    with contextlib.suppress(ValueError):
        # What a resolver would not take is an error of the configuration.
        if host and host.encode("idna") and 0 < int(port) <= _LARGEST_PORT:
            return Address(host, int(port))
    raise ConfigError(f"{text!r} is no HOST:PORT of a node.", param="nodes")


def ray_directory(settings: ClusterSettings) -> Address:
    """Return where the directory listens that `cluster up` places beside the head of Ray.

    Raises:
        ConfigError: `cluster.ray` is not set, or is malformed.
    """
    if settings.ray is None:
        raise ConfigError("Set cluster.ray to the address of Ray's head, HOST:PORT.", param="ray")
    return Address(parse_address(settings.ray).host, settings.ray_port)


def directories(settings: ClusterSettings, member: Member) -> list[Directory]:
    """Return the directories of the configuration, for a front.

    Raises:
        ConfigError: an address is malformed, or there is none.
    """
    chosen: list[Directory] = []
    if settings.nodes:
        chosen.append(StaticDirectory([parse_address(text) for text in settings.nodes]))
    if settings.dns is not None:
        chosen.append(DnsDirectory(parse_address(settings.dns)))
    if settings.ray is not None:
        chosen.append(RayDirectory(ray_directory(settings), member))
    if not chosen:
        raise ConfigError(
            "A front needs the addresses of its nodes: set cluster.nodes, cluster.dns or "
            "cluster.ray.",
            param="nodes",
        )
    return chosen
