"""Placing: which nodes preload which models."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from headrace.cluster.link import NodeLink
from headrace.cluster.policy import choose_node, copies_of
from headrace.cluster.view import View
from headrace.core.errors import HeadraceError
from headrace.core.status import ModelStatus

log = logging.getLogger("headrace.cluster")

_SETTLED_S = 1.0
"""How long after a node has joined models are placed: others may join too."""
_LOST_S = 5.0
"""How long after a node has left: it may be restarted, and its answers go on at the others now."""
_AGAIN_S = 60.0
"""A node that was lost so recently before is not waited for."""
_LONGEST_S = 15.0
"""How long to wait for other nodes at most."""
_PATIENCE_S = 30.0
"""How long a node is waited for that was ordered to load a model."""


@dataclass(slots=True)
class _Placed:
    """A model at a node: in how many workers, since when, and whether it was loaded there."""

    copies: int
    at: float
    was_loaded: bool = False


class Placing:
    """Loads each model that is preloaded, or in use, at as many distinct nodes as it has replicas.

    If there are fewer nodes, they get several workers. Nothing is placed before all known addresses
    have been tried, and for 5 s after a node was lost. A load that has not succeeded within 30 s
    is ordered again, there or elsewhere. A model that a node has unloaded since, for lack of memory
    or as it was idle, is not loaded again: requests do that.
    """

    def __init__(
        self,
        view: View,
        links: Mapping[str, NodeLink],
        tried: Callable[[], bool],
        clock: Callable[[], float],
    ) -> None:
        self._view = view
        self._links = links
        self._tried = tried
        self._clock = clock
        self._placed: dict[str, dict[str, _Placed]] = {}
        self._busy: dict[str, tuple[str, float]] = {}
        self._quiet_until = 0.0
        self._stepped = clock()
        self._lost: dict[str, float] = {}
        self._orders: set[asyncio.Task[None]] = set()

    def joined(self) -> None:
        """Wait until further nodes have joined."""
        self._quiet_until = self._clock() + _SETTLED_S

    def left(self, node: str) -> None:
        """Forget what was placed at a node; wait for it to come back, unless it is lost often."""
        now = self._clock()
        self._lost = {name: at for name, at in self._lost.items() if now - at < _AGAIN_S}
        if node not in self._lost:
            self._quiet_until = now + _LOST_S
        self._lost[node] = now
        self._busy.pop(node, None)
        for nodes in self._placed.values():
            nodes.pop(node, None)

    def step(self) -> None:
        """Place what is missing: one load at a time for each node."""
        now = self._clock()
        is_quiet = now >= self._quiet_until and self._tried()
        # In a large cluster there may always be a node that comes or goes.
        if not is_quiet and now < self._stepped + _LONGEST_S:
            return
        self._stepped = now
        self._note_loads(now)
        for model in [*self._view.known.values()]:
            if model.enabled:
                self._place(model)

    def _note_loads(self, now: float) -> None:
        for node in self._view.nodes.values():
            for name in node.loaded:
                placed = self._placed.setdefault(name, {})
                # Another front may have ordered it, or this one before it was restarted.
                copies = max(1, len(node.models[name].status.replicas))
                placed.setdefault(node.name, _Placed(copies, now)).was_loaded = True
            model, until = self._busy.get(node.name, ("", 0.0))
            there = node.models.get(model)
            if until < now or there is None or there.status.state in ("ready", "failed"):
                self._busy.pop(node.name, None)

    def _place(self, model: ModelStatus) -> None:
        nodes = {node.name: node for node in self._view.serving(model.id)}
        placed = self._placed.setdefault(model.id, {})
        self._forget_failed(placed)
        there = [name for name in placed if name in nodes]
        wanted = any(node.models[model.id].status.preload for node in nodes.values())
        if not nodes or not (there or wanted):
            return
        copies = copies_of(model.copies, len(nodes))
        missing = min(model.copies, len(nodes)) - len(there)
        for name in there:
            if placed[name].copies != copies:
                self._order(name, model.id, copies)
        while missing > 0 and (name := self._next(model.id, there)) is not None:
            self._order(name, model.id, copies)
            there.append(name)
            missing -= 1

    def _forget_failed(self, placed: dict[str, _Placed]) -> None:
        limit = self._clock() - _PATIENCE_S
        for name, place in [*placed.items()]:
            if not place.was_loaded and place.at < limit:
                del placed[name]

    def _next(self, model: str, there: list[str]) -> str | None:
        nodes = self._view.nodes
        left_out = [nodes[name] for name in {*there, *self._busy} if name in nodes]
        return choose_node([*self._view.unloaded(model, left_out)])

    def _order(self, node: str, model: str, copies: int) -> None:
        now = self._clock()
        placed = self._placed[model].setdefault(node, _Placed(copies, now))
        placed.copies = copies
        self._busy[node] = (model, now + _PATIENCE_S)
        order = asyncio.ensure_future(self._ordered(self._links[node], model, copies))
        self._orders.add(order)
        order.add_done_callback(self._orders.discard)

    async def _ordered(self, link: NodeLink, model: str, copies: int) -> None:
        try:
            await link.order("place", model, {"copies": copies})
        except HeadraceError as error:
            data = {"node": link.name, "model": model, "error": error.message}
            log.warning("headrace.cluster.not_placed", extra={"data": data})
