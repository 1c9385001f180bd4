"""A network in memory on a clock that jumps: nodes that can be killed, cut off and drained."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable, Collection, Mapping, Sequence
from typing import Any, cast

import msgspec
from tests.cluster.rig import member

from headrace.cluster.node import NodeServer
from headrace.cluster.secure import Member
from headrace.cluster.wire import Address, Placed
from headrace.core.errors import Draining, HeadraceError, QueueFull, UnknownModel
from headrace.core.events import Delta, Event, Finish
from headrace.core.library import LibraryEntry, LibraryFilter
from headrace.core.measurement import Curve
from headrace.core.metrics import InferenceMetrics, Usage
from headrace.core.model import Capabilities, ModelInfo
from headrace.core.request import AnyRequest, GenerateRequest
from headrace.core.status import (
    DeviceStatus,
    ModelStatus,
    Plan,
    PoolEvent,
    PoolStatus,
    Reloaded,
    ReplicaStatus,
    StoredModel,
)
from headrace.pool.events import EventBus

WAY_S = 0.001
TOKEN_S = 0.1


def clock() -> float:
    return asyncio.get_running_loop().time()


class Listing:
    """A directory whose content the test changes."""

    def __init__(self, content: Collection[Address], every_s: float = 1.0) -> None:
        self.content = content
        self.every_s = every_s

    @property
    def placed(self) -> dict[Address, Placed]:
        return {}

    async def addresses(self) -> AsyncGenerator[Collection[Address], None]:
        while True:
            yield self.content
            await asyncio.sleep(self.every_s)


class Wire(asyncio.Transport):
    """One direction of a connection. What is sent while it is held arrives later, in order."""

    def __init__(self, network: Network, address: Address, to: asyncio.Protocol) -> None:
        super().__init__()
        self.network = network
        self.address = address
        self.to = to
        self.other: Wire | None = None
        self.waiting: deque[bytes | None] = deque()
        self.ended = False
        self.is_due = False

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass

    def write(self, data: Any) -> None:
        if not self.ended:
            self.put(bytes(data))

    def put(self, data: bytes | None) -> None:
        self.waiting.append(data)
        self.flow()

    def flow(self) -> None:
        if self.waiting and not self.is_due and self.address not in self.network.held:
            self.is_due = True
            asyncio.get_running_loop().call_later(WAY_S, self.arrive)

    def arrive(self) -> None:
        self.is_due = False
        if self.waiting and self.address not in self.network.held:
            data = self.waiting.popleft()
            assert self.other is not None
            if data is None:
                self.other.finish()
            elif not self.other.ended:
                self.to.data_received(data)
        self.flow()

    def close(self) -> None:
        if not self.ended:
            self.put(None)
            self.finish()

    def abort(self) -> None:
        self.close()

    def finish(self) -> None:
        """The owner of this side learns that the connection is lost."""
        if not self.ended:
            self.ended = True
            assert self.other is not None
            asyncio.get_running_loop().call_soon(self.other.to.connection_lost, None)


class Network:
    """Addresses with nodes, and those that nothing reaches now."""

    def __init__(self) -> None:
        self.servers: dict[Address, NodeServer] = {}
        self.held: set[Address] = set()
        self.wires: dict[Address, list[Wire]] = {}

    async def connect(self, address: Address, factory: Callable[[], asyncio.Protocol]) -> object:
        await asyncio.sleep(WAY_S)
        while address in self.held:  # noqa: ASYNC110 - the clock jumps
            await asyncio.sleep(0.5)
        if address not in self.servers:
            raise ConnectionRefusedError(111, "Connection refused")
        server = self.servers[address]
        ours, theirs = factory(), server.accept(server.strangers.add("front", lambda _: None))
        there, back = Wire(self, address, theirs), Wire(self, address, ours)
        there.other, back.other = back, there
        self.wires.setdefault(address, []).extend((there, back))
        ours.connection_made(there)
        theirs.connection_made(back)
        return there

    def release(self, address: Address) -> None:
        self.held.discard(address)
        for wire in self.wires.get(address, ()):
            wire.flow()

    def cut(self, address: Address) -> None:
        """End all connections of an address, as the end of its process does."""
        for wire in self.wires.pop(address, ()):
            wire.waiting.clear()
            wire.abort()


class FakeNode:
    """A Backend and its Admin. An answer counts; models load in a second."""

    def __init__(self, name: str, models: Sequence[str], *, copies: int = 2) -> None:
        self.name = name
        self.copies = copies
        self.adapters: tuple[str, ...] = ()
        self.bus = EventBus()
        self.states: dict[str, str] = dict.fromkeys(models, "created")
        self.draining = False
        self.drained_at = float("inf")
        self.running = 0
        self.dead = False
        self.late: list[str] = []
        self.placed: list[tuple[str, int]] = []
        self.requests: list[GenerateRequest] = []
        self.slots = 8
        self.ahead_s = 0.0
        self.full = False
        self.refusal: HeadraceError | None = None
        self.broken: HeadraceError | None = None

    def stored(self) -> Sequence[StoredModel]:
        return ()

    def measurements(self) -> Sequence[Curve]:
        return ()

    async def library(self, wanted: LibraryFilter) -> Sequence[LibraryEntry]:
        return ()

    async def ask(self, request: AnyRequest) -> AsyncGenerator[Event, None]:
        assert isinstance(request, GenerateRequest)
        self.requests.append(request)
        if clock() - self.drained_at > 1.0:
            self.late.append(request.id)
        if self.refusal is not None and not self._always_fits(request):
            raise self.refusal
        self.running += 1
        try:
            await self._ready(request.model)
            count, start = request.sampling.max_tokens or 5, len(request.answered)
            if start:
                yield Delta("".join(f"{n} " for n in range(start)), tuple(range(start)))
            for number in range(start, count):
                await asyncio.sleep(TOKEN_S)
                if self.broken is not None:
                    raise self.broken
                yield Delta(f"{number} ", (number,))
            usage = Usage(prompt_tokens=1, completion_tokens=count)
            total_ms = (clock() + self.ahead_s - request.received) * 1000
            metrics = InferenceMetrics(started_at=7.0, usage=usage, total_ms=total_ms)
            yield Finish(("length",), usage, metrics)
        finally:
            self.running -= 1

    def _always_fits(self, request: GenerateRequest) -> bool:
        return request.continues and isinstance(self.refusal, QueueFull)

    async def _ready(self, name: str) -> None:
        model = next(iter(self.states)) if name in self.adapters else name
        if model not in self.states:
            raise UnknownModel("not here")
        if self.states[model] == "created":
            self.place(model, 1)
        while self.states[model] != "ready":  # noqa: ASYNC110 - the clock jumps
            await asyncio.sleep(0.1)

    def models(self) -> Sequence[ModelInfo]:
        able = Capabilities(resume=True, batch_invariant=True)
        models = [
            ModelInfo(
                id=name, source="fake", engine="fake", state=cast("Any", state), capabilities=able
            )
            for name, state in self.states.items()
        ]
        return models + [
            msgspec.structs.replace(
                models[0], id=f"own {name}", aliases=(name,), base=models[0].id, adapter="a file"
            )
            for name in self.adapters
        ]

    async def aclose(self) -> None:
        return

    def status(self) -> PoolStatus:
        device = DeviceStatus(name="cpu", total=9, budget=9, booked=0, free=9)
        return PoolStatus(models=self.model_statuses(), devices=(device,))

    def model_statuses(self) -> tuple[ModelStatus, ...]:
        return tuple(
            ModelStatus(
                id=name,
                source="fake",
                state=cast("Any", state),
                max_running=self.slots,
                running=self.running if place == 0 else 0,
                copies=self.copies,
                replicas=tuple(
                    ReplicaStatus(number=number, state=cast("Any", state))
                    for number in range(dict(self.placed).get(name, 1))
                ),
            )
            for place, (name, state) in enumerate(self.states.items())
        )

    def set_draining(self, on: bool) -> None:
        if on != self.draining:
            self.draining = on
            self.drained_at = clock() if on else float("inf")

    def place(self, model: str, copies: int) -> ModelStatus:
        self.placed.append((model, copies))
        if self.full:
            return next(status for status in self.status().models if status.id == model)
        if self.states[model] == "created":
            self.states[model] = "loading"
            asyncio.get_running_loop().call_later(1.0, self._loaded, model)
        return next(status for status in self.status().models if status.id == model)

    def _loaded(self, model: str) -> None:
        self.states[model] = "ready"
        self.bus.publish("ready", model)

    async def load(self, model: str, changes: Mapping[str, Any] | None = None) -> ModelStatus:
        return self.place(model, 1)

    async def unload(self, model: str) -> ModelStatus:
        raise Draining("no test unloads")

    restart = unload

    async def update(self, model: str, changes: Mapping[str, Any]) -> ModelStatus:
        raise Draining("no test updates")

    async def plan(self, model: str) -> Plan:
        raise Draining("no test plans")

    async def describe(self, model: str) -> None:
        raise Draining("no test describes")

    async def reload(self) -> Reloaded:
        return Reloaded()

    def events(self) -> AsyncGenerator[PoolEvent, None]:
        return self.bus.subscribe()


class Host:
    """A machine of the network: its node can be started and killed."""

    def __init__(
        self, network: Network, number: int, models: Sequence[str], *, ahead_s: float = 0.0
    ) -> None:
        self.network = network
        self.ahead_s = ahead_s
        self.name = f"n{number}"
        self.address = Address("10.0.0.1", number)
        self.models = models
        self.node: FakeNode | None = None
        self.serving: asyncio.Task[None] | None = None
        self.nodes: list[FakeNode] = []

    def start(self) -> FakeNode:
        self.node = node = FakeNode(self.name, self.models)
        self.nodes.append(node)
        node.ahead_s = self.ahead_s
        me = me_of(self.name)
        server = NodeServer(node, node, me, lambda: clock() + self.ahead_s)
        self.network.servers[self.address] = server
        self.serving = asyncio.ensure_future(server.run())
        return node

    def kill(self) -> None:
        if self.serving is not None:
            self.serving.cancel()
        self.network.servers.pop(self.address, None)
        self.network.cut(self.address)
        self.node = self.serving = None


def me_of(name: str, token: bytes = b"a token of this test") -> Member:
    return member(name, token, heartbeat_s=0.5, silence_s=2.0)
