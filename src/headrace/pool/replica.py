"""Replica: the place of one worker in the pool, its state and its leases."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from headrace.core.errors import Draining, HeadraceError
from headrace.core.model import ModelInfo, ModelSpec, PlacedSpec, State
from headrace.core.request import AnyRequest
from headrace.core.status import Footprint, ReplicaStatus
from headrace.machine import HOST
from headrace.pool.leases import Leases, Tally
from headrace.pool.ledger import to_book
from headrace.pool.pace import Pace
from headrace.pool.policy import Candidate, Resident
from headrace.pool.replica_state import Empty, LoadingState, Ready, ReplicaState, Unloading
from headrace.pool.worker import PooledWorker

_MAX_BLOCKS = 4096
_UNHEALTHY_S = 60.0


@dataclass(eq=False)
class Lease:
    """One request's hold on `size` slots of a replica's worker; the costs are in tokens.

    `choices` are those that have not ended: the worker gives each a slot when it is its turn.
    `has_begun` is whether the worker has sent a token or a result.
    """

    replica: Replica
    worker: PooledWorker
    request: AnyRequest
    since: float
    cost: float = 0.0
    size: int = 0
    choices: int = 1
    prompt_cost: float = 0.0
    has_begun: bool = False
    is_alone: bool = False


class Replica:
    """A place for one worker; `key` names it in the ledger.

    Only its own methods change its state: Empty -> LoadingState -> Ready -> Unloading -> Empty.
    It takes requests when it is Ready and there is no reason to be closed.
    """

    def __init__(
        self, spec: ModelSpec, number: int, serial: int, clock: Callable[[], float]
    ) -> None:
        self.number = number
        self.key = f"{spec.name}/{number}#{serial}"
        self.configure(spec)
        self.info: ModelInfo | None = None
        self.footprint: Footprint | None = None
        self.reason: str | None = None
        """Why it is not loaded."""
        self._placed: tuple[str, ...] = ()
        self.leases = Leases[Lease]()
        self.guests: set[Lease] = set()
        """Those of requests that do not queue, without slots."""
        self.lost: list[Lease] = []
        """Leases that ended with the worker, of which the end is not noticed yet."""
        self.cause: HeadraceError | None = None
        """The first error of these."""
        self.began = self.loaded_at = self.idle_since = 0.0
        self.load_s = 0.0
        self.memory: dict[str, int] = {}
        self.is_overdue = False
        self._stage: tuple[str, int, int] = ("", 0, 0)
        self._state: ReplicaState = Empty()
        self._closed: set[object] = set()
        self._unhealthy_until = 0.0
        self._clock = clock
        self._pace = Pace(clock)
        self._idle = asyncio.Event()
        self._idle.set()
        self._prefixes: OrderedDict[int, None] = OrderedDict()

    def __repr__(self) -> str:
        """Describe the key, the state and the load."""
        return f"<Replica {self.key} {self.state}, {len(self.leases)} running>"

    @property
    def state(self) -> State:
        """The state as it is reported (contract W7)."""
        if self.unloading is not None:
            return "draining"
        if self.is_ready:
            return "draining" if self._closed else "ready"
        if self.loading is not None:
            return "loading"
        return "stopped" if self.info is not None else "created"

    @property
    def worker(self) -> PooledWorker | None:
        """The worker, until its memory is free."""
        return self._state.worker if isinstance(self._state, Ready | Unloading) else None

    @property
    def loading(self) -> asyncio.Task[None] | None:
        """The task that loads the worker."""
        return self._state.task if isinstance(self._state, LoadingState) else None

    @property
    def unloading(self) -> asyncio.Task[None] | None:
        """The task that unloads the worker."""
        return self._state.task if isinstance(self._state, Unloading) else None

    @property
    def is_empty(self) -> bool:
        """Whether a load can begin."""
        return isinstance(self._state, Empty)

    @property
    def is_ready(self) -> bool:
        """Whether its worker is loaded and alive."""
        return self.worker is not None and self.worker.state == "ready"

    @property
    def takes_requests(self) -> bool:
        """Whether its slots can be given to requests."""
        return self.is_ready and self.unloading is None and not (self._closed or self.lost)

    @property
    def stage(self) -> tuple[str, int, int]:
        """The stage of a load, and how much of how much is done."""
        return self._stage if self.loading is not None else ("", 0, 0)

    @property
    def max_running(self) -> int:
        """How many requests it runs at once; 0 if unknown."""
        known = self.info.max_running if self.info else None
        planned = self.footprint.max_running if self.footprint else None
        return known or planned or self.spec.max_running or 0

    @property
    def running(self) -> int:
        """How many of its slots are taken."""
        return min(self.leases.all.taken, self.max_running)

    @property
    def free(self) -> int:
        """How many more requests it takes: always one beside several choices of a request."""
        if not self.takes_requests:
            return 0
        running = self.leases.all
        left = self.max_running - running.size
        return max(left, 1) if running.several and not running.awaited else left

    def configure(self, spec: ModelSpec) -> None:
        """Apply a specification that needs no new worker."""
        self.spec = spec
        weights, number = spec.weights, self.number
        self.weight = weights[number] if number < len(weights) else 1.0

    def begin_loading(self, task: asyncio.Task[None]) -> None:
        """Move from Empty to LoadingState."""
        assert self.is_empty, "only an empty replica is loaded"
        self.is_overdue = False
        self._state = LoadingState(task)

    def overdue(self) -> None:
        """Note that the load takes longer than expected."""
        self.is_overdue = True

    def report(self, stage: str, done: int, total: int) -> None:
        """Note the progress of a load; called from any thread.

        Raises:
            Draining: the load is cancelled.
        """
        if self.loading is None:
            raise Draining("Loading was given up.")
        self._stage = (stage, done, total)

    def estimated(self, footprint: Footprint) -> None:
        """Set the estimated footprint of the load."""
        self.footprint = footprint

    def place(self, footprint: Footprint, known: Collection[str]) -> None:
        """Set the devices of the load, of all those that are `known`."""
        self.footprint = footprint
        gpus = tuple(device for device in footprint.devices if device != HOST)
        # Without a GPU it must not take one by itself.
        has_gpus = footprint.devices and any(device != HOST for device in known)
        self._placed = gpus or ((HOST,) if has_gpus else ())

    @property
    def placed_spec(self) -> ModelSpec:
        """The specification with the devices of the last load."""
        return PlacedSpec.of(self.spec, self._placed) if self._placed else self.spec

    def starting(self) -> None:
        """Note that the load has started and is no longer queued."""
        self.began = self._clock()

    def loaded(self, worker: PooledWorker, load_s: float, memory: dict[str, int]) -> None:
        """Move from LoadingState to Ready; an unload that has started since gets the worker."""
        now, unloading = self._clock(), self.unloading
        self._state = Ready(worker) if unloading is None else Unloading(unloading, worker)
        self.info = worker.models()[0]
        self.load_s, self.memory = load_s, memory
        self.loaded_at = self.idle_since = now
        self._stage = ("", 0, 0)
        self.reason = None
        self._prefixes.clear()

    def loading_ended(self) -> None:
        """Move from LoadingState to Empty if the load has failed; called by its task."""
        if self.loading is not None:
            self._state = Empty()

    def grown(self, held: Mapping[str, int]) -> bool:
        """Raise the memory to what the worker holds now; return whether it is more."""
        before, both = self.memory, {**self.memory, **held}
        self.memory = {d: max(before.get(d, 0), held.get(d, 0)) for d in both}
        return self.memory != before

    def close(self, reason: object) -> None:
        """Add a reason to take no new requests."""
        self._closed.add(reason)

    def reopen(self, reason: object) -> None:
        """Remove a reason; without any, requests are taken again."""
        self._closed.discard(reason)

    def begin_unloading(self, task: asyncio.Task[None]) -> None:
        """Move to Unloading from any other state; `task` cancels a load in progress."""
        assert self.unloading is None, "one unload at a time"
        self._state = Unloading(task, self.worker)

    def unloaded(self) -> None:
        """Move from Unloading to Empty; it can be loaded again."""
        self._forget()
        self._closed.clear()

    def died(self) -> None:
        """Move from Ready to Empty: the worker has ended unexpectedly."""
        self._forget()
        self._unhealthy_until = self._clock() + _UNHEALTHY_S

    def _forget(self) -> None:
        # The streams of the requests end by themselves.
        self._state = Empty()
        self.memory = {}
        for held in (self.leases, self.guests, self.lost):
            held.clear()
        self.cause = None
        self._idle.set()

    def candidate(
        self, request: AnyRequest, blocks: Sequence[int] = (), *, paced: bool
    ) -> Candidate:
        """Return the facts for `choose_replica`; `blocks` are hashes of the prompt's beginning."""
        return Candidate(
            number=self.number,
            free=self.free,
            running=self.running,
            max_running=self.max_running,
            work=self.leases.all.cost,
            weight=self.weight,
            unhealthy=self._clock() < self._unhealthy_until,
            matched=self._matched(blocks),
            batch=self.leases.batch.choices,
            starting=self.leases.batch.starting,
            held=paced and self._holds_back(request),
        )

    def _holds_back(self, request: AnyRequest) -> bool:
        """Whether what a client sent before has to begin or end first.

        Prompts that are computed at one time delay each other, and those of one client would delay
        the next client's. An upstream has no memory here, and computes on any number of machines.
        """
        own = self.leases.of_client(request.client)
        if self.running >= self.max_running:
            # The next slot is for one of its requests, and its several choices go one by one.
            several = request.slots > 1 and own.several
            is_full = len(self.leases) >= self.max_running
            return bool(own.starting or several or (is_full and own.requests))
        if not (own.starting and request.client and self._is_local):
            return False
        return self.leases.all.starting_cost >= self._pace.ahead

    @property
    def _is_local(self) -> bool:
        return self.footprint is not None and bool(self.footprint.devices)

    def resident(self, *, pinned: bool) -> Resident:
        """Return the facts for `make_room`."""
        return Resident(
            key=self.key,
            devices=to_book(self.footprint, self.memory),
            busy=bool(self.leases) or not self.is_ready,
            pinned=pinned,
            loaded_at=self.loaded_at,
            idle_since=self.idle_since,
            load_s=self.load_s,
            loading=not self.is_ready,
        )

    def take(
        self, request: AnyRequest, blocks: Sequence[int], cost: float, *, size: int, alone: bool
    ) -> Lease:
        """Give slots to a request."""
        assert self.worker is not None, "only a ready replica is chosen"
        if not self.leases.all.starting:
            self._pace.resume()
        # An upstream answers all choices of a request in one slot.
        choices, prompt = request.slots if self._is_local else 1, request.prompt_cost()
        lease = Lease(self, self.worker, request, self._clock(), cost, size, choices, prompt)
        lease.is_alone = alone
        self.leases.add(lease)
        self._idle.clear()
        for block in blocks:
            self._prefixes[block] = None
            self._prefixes.move_to_end(block)
        while len(self._prefixes) > _MAX_BLOCKS:
            self._prefixes.popitem(last=False)
        return lease

    def take_guest(self, request: AnyRequest) -> Lease:
        """Return a lease without slots; its end takes it out of `guests`."""
        assert self.worker is not None, "only a ready replica is chosen"
        lease = Lease(self, self.worker, request, self._clock())
        self.guests.add(lease)
        return lease

    def begun(self, lease: Lease) -> None:
        """Note the first token or result of a request."""
        # One that was alone makes place for others.
        size = 1 if lease.is_alone else lease.size
        self.leases.change(lease, has_begun=True, size=size)
        self._pace.begun(lease.prompt_cost)

    def choice_ended(self, lease: Lease, left: int) -> None:
        """Note that one of several choices has ended, and `left` have not."""
        self.leases.change(lease, choices=left)

    def lose(self, lease: Lease, error: HeadraceError) -> None:
        """Note that the worker has failed a request for good: it takes no more."""
        if not self.lost:
            self.cause = error
        self.lost.append(lease)

    def has_others(self, client: str, *, alone: bool = False) -> bool:
        """Whether it serves other clients, or a request of theirs that has to be `alone`."""
        own = self.leases.of_client(client) if client else Tally()
        if alone:
            return self.leases.all.awaited > own.awaited
        guests = (not client or guest.request.client != client for guest in self.guests)
        return self.leases.all.requests > own.requests or any(guests)

    def give_back(self, lease: Lease) -> None:
        """Take slots back. A lease of a worker that has died is ignored."""
        self.leases.remove(lease)
        if not self.leases:
            self.idle_since = self._clock()
            self._idle.set()

    async def idle(self) -> None:
        """Wait until no request runs, or `stop_draining` is called."""
        await self._idle.wait()

    def stop_draining(self) -> None:
        """Make an unload in progress stop waiting for the running requests."""
        self._idle.set()

    def status(self) -> ReplicaStatus:
        """Return its status for operators."""
        return ReplicaStatus(
            number=self.number,
            state=self.state,
            pid=self.worker.pid if self.worker else None,
            weight=self.weight,
            running=self.running,
            memory=self.memory,
            drafting=self.worker.drafting if self.worker else None,
            load_ms=self.load_s * 1000 if self.is_ready else None,
            reason=self.reason,
        )

    def _matched(self, blocks: Sequence[int]) -> int:
        new = (count for count, block in enumerate(blocks) if block not in self._prefixes)
        return next(new, len(blocks))
