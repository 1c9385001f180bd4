"""One worker's place in the pool: what it holds, whom it serves, how it stands."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from headrace.core.backend import Backend
from headrace.core.errors import Draining
from headrace.core.model import ModelInfo, ModelSpec, State
from headrace.core.request import GenerateRequest
from headrace.core.status import Footprint, ReplicaStatus
from headrace.pool.line import Request, Waiter
from headrace.pool.policy import Candidate, Resident
from headrace.worker.spec import OnProgress

_MOST_BLOCKS = 4096
_BLOCK, _LONGEST = 256, 64
_AILING_S = 60.0


class PooledWorker(Backend, Protocol):
    """A Backend with a life, as the pool needs it. `died` is set when it ended by itself."""

    died: asyncio.Event

    @property
    def state(self) -> State:
        """One of the states of contract W7."""
        ...

    @property
    def pid(self) -> int | None:
        """Its process, while there is one."""
        ...

    async def start(self) -> None:
        """Load. Idempotent."""
        ...

    async def memory(self) -> dict[str, int]:
        """Return the bytes that it holds now, by device."""
        ...

    async def aclose(self, drain_s: float = 0.0) -> None:
        """Drain and free; when it returns the memory is back."""
        ...


OpenWorker = Callable[[ModelSpec, OnProgress], PooledWorker]


@dataclass(eq=False)
class Lease:
    """The right of one request to `size` slots of a replica's worker; `cost` is in tokens."""

    replica: Replica
    worker: PooledWorker
    cost: float
    size: int
    since: float


class Replica:
    """A place for one worker; `key` names it in the ledger."""

    def __init__(
        self, spec: ModelSpec, number: int, serial: int, clock: Callable[[], float]
    ) -> None:
        self.spec = spec
        self.number = number
        self.key = f"{spec.name}/{number}#{serial}"
        self.weight = spec.weights[number] if number < len(spec.weights) else 1.0
        self.worker: PooledWorker | None = None
        self.info: ModelInfo | None = None
        self.footprint: Footprint | None = None
        self.leases: set[Lease] = set()
        self.closed = False
        self.loading: asyncio.Task[None] | None = None
        self.unloading: asyncio.Task[None] | None = None
        self.stage: tuple[str, int, int] = ("", 0, 0)
        self.began = self.loaded_at = self.idle_since = self.ailing_until = 0.0
        self.load_s = 0.0
        self.memory: dict[str, int] = {}
        self._clock = clock
        self._idle = asyncio.Event()
        self._idle.set()
        self._beginnings: OrderedDict[int, None] = OrderedDict()

    def __repr__(self) -> str:
        """Tell the key, the state and the load."""
        return f"<Replica {self.key} {self.state}, {len(self.leases)} running>"

    @property
    def state(self) -> State:
        """The worker's, or what its place is waiting for."""
        if self.unloading is not None:
            return "draining"
        if self.is_ready:
            return "draining" if self.closed else "ready"
        if self.loading is not None:
            return "loading"
        return "stopped" if self.info is not None else "created"

    @property
    def is_ready(self) -> bool:
        """Whether its worker is loaded, and has not died a moment ago."""
        return self.worker is not None and self.worker.state == "ready"

    @property
    def max_running(self) -> int:
        """How many requests it takes at once; 0 while nobody knows."""
        known = self.info.max_running if self.info else None
        planned = self.footprint.max_running if self.footprint else None
        return known or planned or self.spec.max_running or 0

    @property
    def running(self) -> int:
        """How many of its slots are taken."""
        return sum(lease.size for lease in self.leases)

    def report(self, what: str, done: int, total: int) -> None:
        """Note what a load is at; called from any thread.

        Raises:
            Draining: nobody wants the load any more.
        """
        if self.loading is None:
            raise Draining("Loading was given up.")
        self.stage = (what, done, total)

    def up(self, worker: PooledWorker, load_s: float, memory: dict[str, int]) -> None:
        """Take requests from now on."""
        now = self._clock()
        self.worker, self.info = worker, worker.models()[0]
        self.load_s, self.memory = load_s, memory
        self.loaded_at = self.idle_since = now
        self.stage = ("", 0, 0)
        self._beginnings.clear()

    def down(self) -> None:
        """Take no more, and forget those who were served: their streams end by themselves."""
        self.worker = None
        self.memory = {}
        self.leases.clear()
        self._idle.set()

    def took_ill(self) -> None:
        """Note that its worker has died."""
        self.ailing_until = self._clock() + _AILING_S

    def candidate(self, blocks: Sequence[int]) -> Candidate:
        """Tell how it stands for a request whose prompt begins with `blocks`."""
        running = self.running
        return Candidate(
            number=self.number,
            free=self.max_running - running if self.is_ready and not self.closed else 0,
            running=running,
            max_running=self.max_running,
            work=sum(lease.cost for lease in self.leases),
            weight=self.weight,
            ailing=self._clock() < self.ailing_until,
            matched=self._matched(blocks),
        )

    def resident(self, *, pinned: bool) -> Resident:
        """Tell how it stands for those who want its memory."""
        return Resident(
            key=self.key,
            devices=self.memory or (self.footprint.devices if self.footprint else {}),
            busy=bool(self.leases) or not self.is_ready,
            pinned=pinned,
            loaded_at=self.loaded_at,
            idle_since=self.idle_since,
            load_s=self.load_s,
            loading=not self.is_ready,
        )

    def take(self, waiter: Waiter, size: int) -> Lease:
        """Give slots to a request."""
        assert self.worker is not None, "only a ready replica is chosen"
        lease = Lease(self, self.worker, waiter.cost, size, self._clock())
        self.leases.add(lease)
        self._idle.clear()
        for block in waiter.blocks:
            self._beginnings[block] = None
            self._beginnings.move_to_end(block)
        while len(self._beginnings) > _MOST_BLOCKS:
            self._beginnings.popitem(last=False)
        return lease

    def give_back(self, lease: Lease) -> None:
        """Take slots back. A lease of a worker that has died since is none any more."""
        self.leases.discard(lease)
        if not self.leases:
            self.idle_since = self._clock()
            self._idle.set()

    async def idle(self) -> None:
        """Wait until nobody is served, or nobody waits for that any more."""
        await self._idle.wait()

    def hurry(self) -> None:
        """Have an unload under way wait for the running requests no longer."""
        self._idle.set()

    def status(self) -> ReplicaStatus:
        """Tell an operator how it stands."""
        return ReplicaStatus(
            number=self.number,
            state=self.state,
            pid=self.worker.pid if self.worker else None,
            weight=self.weight,
            running=self.running,
            memory=self.memory,
            load_ms=self.load_s * 1000 if self.is_ready else None,
        )

    def _matched(self, blocks: Sequence[int]) -> int:
        for count, block in enumerate(blocks):
            if block not in self._beginnings:
                return count
        return len(blocks)


def blocks_of(request: Request) -> tuple[int, ...]:
    """Return hashes of ever longer beginnings of a prompt; equal ones have equal caches."""
    if not isinstance(request, GenerateRequest):
        return ()
    if request.messages is not None:
        text = "\x1e".join(f"{one.role}\x1f{one.content}" for one in request.messages)
    elif isinstance(request.prompt, str):
        text = request.prompt
    else:
        text = " ".join(map(str, (request.prompt or ())[: _BLOCK * _LONGEST // 4]))
    hashes: list[int] = []
    for start in range(0, min(len(text), _BLOCK * _LONGEST), _BLOCK):
        hashes.append(hash((hashes[-1] if hashes else 0, text[start : start + _BLOCK])))
    return tuple(hashes)
