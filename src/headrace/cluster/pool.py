"""ClusterPool: the models of all nodes behind one Backend."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping, Sequence
from contextlib import aclosing
from typing import Any

import msgspec

from headrace.cluster.attempt import Attempt
from headrace.cluster.directory import Directory
from headrace.cluster.link import Connect, NodeLink
from headrace.cluster.placing import Placing
from headrace.cluster.route import Route
from headrace.cluster.secure import Member
from headrace.cluster.view import Node, View, best_info
from headrace.cluster.wire import Address, Happened, Placed, Pulse, Status
from headrace.core.errors import (
    Draining,
    HeadraceError,
    NodeGone,
)
from headrace.core.events import Event, Finish, Progress
from headrace.core.model import ModelInfo
from headrace.core.request import AnyRequest
from headrace.core.status import ModelStatus
from headrace.pool.continuation import Continuation, Diverged
from headrace.pool.events import EventBus
from headrace.pool.observer import NullObserver, Observer
from headrace.pool.requests import OpenRequests

log = logging.getLogger("headrace.cluster")

_MAX_ADDRESSES = 4096
_FORGET_S = 600.0
_HOUSEKEEPING_S = 0.5
_WAIT_S = 10.0
"""How long an answer that has begun waits for a node: one that is restarted comes back."""
_STEP_S = 0.1


class ClusterPool:
    """A Backend over the nodes of a cluster.

    An answer whose node is gone goes on at another, once; one whose node stops as often as that
    happens. A request that a node refuses before it has begun is sent to another.
    """

    def __init__(
        self,
        directories: Sequence[Directory],
        member: Member,
        connect: Connect,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.events = EventBus()
        self.view = View()
        self.observer: Observer = NullObserver()
        self.links: dict[Address, NodeLink] = {}
        self.connected: dict[str, NodeLink] = {}
        self.draining = False
        self.continuations: dict[str, int] = {}
        self.since: dict[Address, float] = {}
        self.placing = Placing(self.view, self.connected, self._have_tried, clock)
        self._directories = directories
        self._member = member
        self._connect = connect
        self._clock = clock
        self._listed: dict[int, frozenset[Address]] = {}
        self._visits: dict[Address, asyncio.Task[None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._requests = OpenRequests(clock)
        self._infos: tuple[ModelInfo, ...] | None = None

    def __repr__(self) -> str:
        """Describe how many nodes there are."""
        return f"<ClusterPool {len(self.connected)} of {len(self.links)} nodes>"

    @property
    def ready(self) -> bool:
        """Whether a node takes requests."""
        return not self.draining and any(not node.draining for node in self.view.nodes.values())

    @property
    def entries(self) -> Mapping[str, ModelStatus]:
        """The models that are known, by name."""
        return self.view.known

    def placed(self, address: Address) -> Placed | None:
        """Return what places the nodes reports of the one at an address."""
        for directory in self._directories:
            if (placed := directory.placed.get(address)) is not None:
                return placed
        return None

    def attach_observer(self, observer: Observer) -> None:
        """Attach an observer. Call before the first request."""
        self.observer = observer

    async def start(self) -> None:
        """Begin to connect to the nodes, without waiting for them."""
        for number, directory in enumerate(self._directories):
            self._task(self._follow(number, directory), f"directory {number}")
        self._task(self._keep_house(), "housekeeping of the cluster")

    def models(self) -> tuple[ModelInfo, ...]:
        """Return the metadata of the models of all nodes, without waiting."""
        if self._infos is None:
            infos: dict[str, list[ModelInfo]] = {}
            for node in self.view.nodes.values():
                for model in node.models.values():
                    for info in model.infos:
                        infos.setdefault(info.id, []).append(info)
            self._infos = tuple(map(best_info, infos.values()))
        return self._infos

    async def aclose(self, drain_s: float = 0.0) -> None:
        """Refuse new requests, let running ones end within `drain_s`, end the rest. Idempotent."""
        if not self.draining:
            self.draining = True
            self.events.publish("draining", running=len(self._requests), drain_s=drain_s)
            self.events.close()
        self._requests.limit_wait(drain_s)
        await self._requests.wait()
        running = [*self._tasks, *self._visits.values()]
        for task in running:
            task.cancel()
        if running:
            await asyncio.wait(running)
        self.observer.closed()

    def ask(self, request: AnyRequest) -> AsyncGenerator[Event, None]:
        """Return the stream of a node; if the node is gone, another one continues if possible.

        Raises:
            NoNode: no node can take the request.
            HeadraceError: as the nodes raise it.
        """
        return self._answer(request) if request.queues else self._answer_at_once(request)

    async def _answer_at_once(self, request: AnyRequest) -> AsyncGenerator[Event, None]:
        with self._requests.counted():
            route, has_begun = self._route(request), False
            while True:
                node = route.next()
                try:
                    async with aclosing(self.connected[node.name].ask(request)) as stream:
                        async for event in stream:
                            has_begun = True
                            yield event
                    return
                except HeadraceError as error:
                    route.failed(node, error, has_begun=has_begun)

    async def _answer(self, request: AnyRequest) -> AsyncGenerator[Event, None]:
        with self.observer.observe(request) as observation, self._requests.counted():
            given = observation.request
            route = self._route(given)
            continuation = Continuation(given, route.status.continuation, self._clock)
            while not continuation.is_whole:
                node = await self._next(route, continuation)
                link = self.connected[node.name]
                attempt = Attempt(self.view, node, link, route.status, observation, route.blocks)
                try:
                    async with attempt:
                        async for event in attempt.events(_request(continuation)):
                            if type(event) is Finish:
                                attempt.finished(event)
                            elif not attempt.has_begun and type(event) is not Progress:
                                attempt.has_begun = True
                            if (new := continuation.new(event)) is not None:
                                observation.saw(new)
                                yield new
                        return
                except (HeadraceError, Diverged) as error:
                    if not continuation.is_whole:
                        self._retry(route, node, attempt, continuation, error)

    async def _next(self, route: Route, continuation: Continuation) -> Node:
        """Return the node for an attempt; a client that has a part of the answer waits for one.

        Raises:
            HeadraceError: there is none; see `Route.next`.
        """
        wait_s = _WAIT_S if continuation.has_begun else 0.0
        until = min(self._clock() + wait_s, continuation.request.deadline or float("inf"))
        # Nodes join, and cease to drain.
        while not route.has_next and self._clock() < until:  # noqa: ASYNC110
            await asyncio.sleep(_STEP_S)
        return route.next()

    def _route(self, request: AnyRequest) -> Route:
        if self.draining:
            raise Draining("The service is stopping.")
        return Route(self.view, request)

    def _retry(
        self,
        route: Route,
        node: Node,
        attempt: Attempt,
        continuation: Continuation,
        error: HeadraceError | Diverged,
    ) -> None:
        """Prepare another attempt.

        Raises:
            HeadraceError: the answer cannot be continued.
        """
        why = str(error)
        try:
            planned = isinstance(error, Draining) and attempt.has_begun
            if planned:
                error = NodeGone(f"The node {node.name} is stopping.")
            if self.draining and continuation.way is None and isinstance(error, HeadraceError):
                raise error
            refused = isinstance(error, HeadraceError) and not isinstance(error, NodeGone)
            if refused or (isinstance(error, NodeGone) and not error.was_sent):
                assert isinstance(error, HeadraceError), "Diverged is no refusal"
                route.failed(node, error, has_begun=attempt.has_begun)
                return
            way = continuation.retry(error, route.capabilities, planned=planned)
            route.excluded.add(node)
        finally:
            del error  # its traceback has this frame: that would be a reference cycle
        model = route.model
        self.continuations[model] = self.continuations.get(model, 0) + 1
        self.events.publish("continued", model, id=continuation.request.id, way=way, why=why)

    def joined(self, link: NodeLink) -> str | None:
        """Take a node; or return why not."""
        if (other := self.connected.get(link.name)) is not None:
            return f"The node {link.name} is connected at {other.address} already."
        self.connected[link.name] = link
        self.view.join(link.name)
        self.since[link.address] = time.time()
        self.placing.joined()
        self.events.publish("node_joined", node=link.name, address=str(link.address))
        return None

    def left(self, link: NodeLink, why: str) -> None:
        """Remove a node whose connection is lost."""
        del self.connected[link.name]
        self.view.leave(link.name)
        self._infos = None
        self.since[link.address] = time.time()
        self.placing.left(link.name)
        self.events.publish("node_left", node=link.name, why=why)

    def received(self, link: NodeLink, message: Status | Pulse | Happened) -> None:
        """Take a report of a node."""
        if isinstance(message, Pulse):
            self.view.pulse(link.name, message)
        elif isinstance(message, Status):
            self.view.apply(link.name, message)
            self._infos = None
        else:
            data = {**message.event.data, "node": link.name}
            self.events.forward(msgspec.structs.replace(message.event, data=data))

    def _have_tried(self) -> bool:
        return all(link.was_tried for link in self.links.values())

    def _task(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(_log_failure)

    async def _follow(self, number: int, directory: Directory) -> None:
        """Connect to the addresses of a directory: it only ever adds some."""
        async with aclosing(directory.addresses()) as listings:
            async for addresses in listings:
                self._listed[number] = frozenset(addresses)
                for address in addresses:
                    self._add(address)

    def _add(self, address: Address) -> None:
        if address in self.links or len(self.links) >= _MAX_ADDRESSES:
            return
        link = NodeLink(address, self, self._member, self._connect, self._clock)
        self.links[address] = link
        visit = asyncio.create_task(link.run(), name=f"link to {address}")
        visit.add_done_callback(_log_failure)
        self._visits[address] = visit

    async def _keep_house(self) -> None:
        while True:
            await asyncio.sleep(_HOUSEKEEPING_S)
            self.placing.step()
            self._forget()

    def _forget(self) -> None:
        """Forget addresses that no directory lists any more, and that cannot be reached."""
        listed = {address for listing in self._listed.values() for address in listing}
        now = self._clock()
        for address, link in [*self.links.items()]:
            is_old = not link.is_up and now - link.failing_since > _FORGET_S
            # An empty listing says nothing.
            if is_old and listed and address not in listed:
                self._visits.pop(address).cancel()
                del self.links[address]
                self.since.pop(address, None)


def _log_failure(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        data = {"task": task.get_name()}
        log.error("headrace.cluster.task", exc_info=error, extra={"data": data})


def _request(continuation: Continuation) -> AnyRequest:
    """Return the request for a node, which admits the rest of an answer that has begun."""
    request = continuation.start(0.0)
    if not continuation.has_begun:
        return request
    return msgspec.structs.replace(request, continues=True)
