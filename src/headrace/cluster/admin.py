"""ClusterAdmin: the Admin of a front, for the models of all nodes."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from typing import Any

import msgspec

from headrace.cluster.link import NodeLink
from headrace.cluster.pool import ClusterPool
from headrace.cluster.view import Node
from headrace.cluster.wire import Done, Placed
from headrace.core.errors import HeadraceError, InvalidRequest, NoNode, UnknownModel, Unsupported
from headrace.core.library import LibraryEntry, LibraryFilter
from headrace.core.measurement import Curve
from headrace.core.model import State
from headrace.core.status import (
    DeviceStatus,
    ModelStatus,
    NodeStatus,
    Plan,
    PoolEvent,
    PoolStatus,
    Reloaded,
    StoredModel,
)

_RETRY_AFTER_S = 2.0
_STATES: tuple[State, ...] = ("ready", "loading", "draining", "failed", "stopped", "created")


class ClusterAdmin:
    """An Admin. A `model` may be NODE:MODEL, which is that of one node.

    `reread` reads the configuration of this front again.
    """

    def __init__(self, pool: ClusterPool, *, reread: Callable[[], tuple[str, ...]]) -> None:
        self.pool = pool
        self._reread = reread

    async def aclose(self) -> None:
        """Close the pool; the nodes go on."""
        await self.pool.aclose()

    def status(self) -> PoolStatus:
        """Return the status of all models, devices and nodes, without waiting."""
        nodes = self.pool.view.nodes.values()
        by_model: dict[str, list[tuple[Node, ModelStatus]]] = {
            name: [] for name in self.pool.view.known
        }
        for node in nodes:
            for name, model in node.models.items():
                busy = max(0, model.busy - model.status.queued)
                status = msgspec.structs.replace(model.status, running=busy)
                by_model[name].append((node, status))
        return PoolStatus(
            models=tuple(self._merged(name, there) for name, there in by_model.items()),
            devices=tuple(_named(node, device) for node in nodes for device in node.devices),
            nodes=tuple(map(self._node, self.pool.links.values())),
        )

    def stored(self) -> Sequence[StoredModel]:
        """Return nothing: a front does not know what its nodes have on their disks."""
        return ()

    def measurements(self) -> Sequence[Curve]:
        """Return nothing: each node measures itself."""
        return ()

    async def library(self, wanted: LibraryFilter) -> Sequence[LibraryEntry]:
        """Refuse: what fits differs between nodes."""
        raise Unsupported("A front has no library; each node has one, by its own `/admin/library`.")

    async def describe(self, model: str) -> None:
        """Let a node read the header of a model that was not loaded yet; see `Admin`."""
        nodes, name = self._served(model)
        if nodes:
            await self._order("describe", nodes[:1], name, {})

    async def load(self, model: str, changes: Mapping[str, Any] | None = None) -> ModelStatus:
        """Load a model at the node where it fits best, or at all that have it; see `Admin`."""
        nodes, name = self._named(model)
        if not nodes:
            known = self.pool.view.model_of(name)
            nodes = self.pool.view.ready(known) if known else []
        if nodes:
            done = await self._order("load", nodes, name, changes or {})
        else:
            done = [(await self._at_best("load", name, changes or {}))[1]]
        return self._result(done, name)

    async def unload(self, model: str) -> ModelStatus:
        """Unload a model at all nodes; see `Admin`."""
        return await self._everywhere("unload", model)

    async def restart(self, model: str) -> ModelStatus:
        """Unload and load again, at the nodes that have loaded it, one after the other."""
        nodes, name = self._served(model)
        known = self.pool.view.model_of(name)
        loaded = [node for node in nodes if known in node.loaded] or nodes[:1]
        done: list[Done] = []
        for node in loaded:
            done += await self._order("restart", [node], name, {})
        return self._result(done, name)

    async def update(self, model: str, changes: Mapping[str, Any]) -> ModelStatus:
        """Change settings of a model at all nodes that serve it; see `Admin`."""
        return await self._everywhere("update", model, changes)

    async def plan(self, model: str) -> Plan:
        """Return what a load would need and do at the node that would get it; see `Admin`."""
        nodes, name = self._named(model)
        if nodes:
            node, (done,) = nodes[0], await self._order("plan", nodes, name, {})
        else:
            node, done = await self._at_best("plan", name, {})
        assert done.plan is not None, "a node answers with a plan"
        devices = tuple(_named(node, device) for device in done.plan.devices)
        reason = f"At {node.name}: {done.plan.reason}"
        return msgspec.structs.replace(done.plan, devices=devices, reason=reason)

    async def reload(self) -> Reloaded:
        """Read the configuration again, here and at all nodes; see `Admin`."""
        needs_restart = await asyncio.to_thread(self._reread)
        done = await self._order("reload", [*self.pool.view.nodes.values()], "", {})
        reloaded = [answer.reloaded for answer in done if answer.reloaded is not None]
        self.pool.events.publish("reloaded")
        return Reloaded(
            added=_united(each.added for each in reloaded),
            changed=_united(each.changed for each in reloaded),
            removed=_united(each.removed for each in reloaded),
            needs_restart=_united([needs_restart, *(each.needs_restart for each in reloaded)]),
        )

    async def drain(self, node: str, on: bool) -> NodeStatus:
        """Send nothing new to a node, or send requests to it again.

        Raises:
            UnknownModel: there is no such node.
        """
        link = self._link(node)
        await link.order("drain", changes={"on": on})
        return self._node(link)

    def events(self) -> AsyncGenerator[PoolEvent, None]:
        """Yield events of all nodes from now on."""
        return self.pool.events.subscribe()

    def _link(self, node: str) -> NodeLink:
        if (link := self.pool.connected.get(node)) is None:
            names = ", ".join(sorted(self.pool.connected)) or "none"
            message = f"The node {node!r} is not connected; there is {names}."
            raise UnknownModel(message, param="node")
        return link

    def _named(self, model: str) -> tuple[list[Node], str]:
        """Return the node of NODE:MODEL, if it is one, and the name of the model."""
        node, colon, name = model.partition(":")
        if colon and node in self.pool.view.nodes and not self.pool.view.model_of(model):
            return [self.pool.view.nodes[node]], name
        return [], model

    def _served(self, model: str) -> tuple[list[Node], str]:
        """Return the nodes that serve a model, and its name.

        Raises:
            UnknownModel: there is none.
        """
        nodes, name = self._named(model)
        known = self.pool.view.model_of(name)
        if known is None:
            served = ", ".join(sorted(self.pool.view.names))
            message = f"The model {name!r} is not served here; there is {served}."
            raise UnknownModel(message, param="model")
        return nodes or self.pool.view.having(known), name

    async def _at_best(
        self, action: Any, model: str, changes: Mapping[str, Any]
    ) -> tuple[Node, Done]:
        """Let the best node that may run a model do something; return the node and its result.

        Raises:
            NoNode: there is none.
            InvalidRequest: none has a label that the model names.
            HeadraceError: as the node raises it.
        """
        refusal: HeadraceError = NoNode(
            "No node of the cluster takes it now.", retry_after_s=_RETRY_AFTER_S
        )
        for node in self._candidates(self.pool.view.model_of(model)):
            try:
                (done,) = await self._order(action, [node], model, changes)
            except InvalidRequest as error:
                if error.param != "nodes":
                    raise
                refusal = error
            else:
                return node, done
        raise refusal

    def _candidates(self, model: str | None) -> list[Node]:
        """Return the node for a load; of a model that none serves all, most free memory first."""
        if model is not None:
            node = self.pool.view.choose(model)
            return [] if node is None else [node]
        usable = [node for node in self.pool.view.nodes.values() if not node.draining]
        return sorted(usable, key=lambda node: (-node.free_total, node.name))

    async def _everywhere(
        self, action: Any, model: str, changes: Mapping[str, Any] | None = None
    ) -> ModelStatus:
        nodes, name = self._served(model)
        return self._result(await self._order(action, nodes, name, changes or {}), name)

    async def _order(
        self, action: Any, nodes: Sequence[Node], model: str, changes: Mapping[str, Any]
    ) -> list[Done]:
        """Let nodes do something at a time; return the results of those that could.

        Raises:
            HeadraceError: the first error, if all have failed.
        """
        links = [self.pool.connected[node.name] for node in nodes]
        orders = [link.order(action, model, changes) for link in links]
        results = await asyncio.gather(*orders, return_exceptions=True)
        failures = [result for result in results if isinstance(result, BaseException)]
        unexpected = [error for error in failures if not isinstance(error, HeadraceError)]
        if unexpected or (failures and len(failures) == len(results)):
            raise (unexpected or failures)[0]
        return [result for result in results if isinstance(result, Done)]

    def _result(self, done: Sequence[Done], name: str) -> ModelStatus:
        """Return the status of a model of all nodes; that of the order if no node serves it."""
        known = self.pool.view.model_of(name)
        for status in self.status().models:
            if status.id == known:
                return status
        if done and (status := done[0].status) is not None:
            return status
        raise NoNode(f"No node serves {name} any more.", retry_after_s=_RETRY_AFTER_S)

    def _merged(self, name: str, there: Sequence[tuple[Node, ModelStatus]]) -> ModelStatus:
        if not there:
            return msgspec.structs.replace(
                self.pool.view.known[name], state="stopped", replicas=(), memory={}, running=0
            )
        best = min((status for _, status in there), key=lambda status: _STATES.index(status.state))
        loaded = [pair for pair in there if pair[1].state in ("ready", "loading", "draining")]
        replicas = [
            msgspec.structs.replace(replica, node=node.name)
            for node, status in loaded or there[:1]
            for replica in status.replicas
        ]
        statuses = [status for _, status in there]
        memory: Counter[str] = Counter()
        for status in statuses:
            memory.update(status.memory)
        return msgspec.structs.replace(
            best,
            replicas=tuple(replicas),
            memory=dict(memory),
            running=sum(status.running for status in statuses),
            queued=sum(status.queued for status in statuses),
            places=sum(status.places for status in statuses),
            max_running=sum(status.max_running or 0 for _, status in loaded) or best.max_running,
            restarts=sum(status.restarts for status in statuses),
            evictions=sum(status.evictions for status in statuses),
            continuations=sum(status.continuations for status in statuses)
            + self.pool.continuations.get(name, 0),
            last_error=next(filter(None, (status.last_error for status in statuses)), None),
        )

    def _node(self, link: NodeLink) -> NodeStatus:
        node = self.pool.view.nodes.get(link.name) if link.is_up else None
        since = self.pool.since.get(link.address, 0.0)
        placed = self.pool.placed(link.address)
        if node is None:
            return NodeStatus(
                name=link.name or (placed.node if placed else ""),
                address=str(link.address),
                state="gone",
                since=since,
                reason=link.failure,
                placed=_text(placed),
            )
        models = node.models.values()
        return NodeStatus(
            name=node.name,
            address=str(link.address),
            state="draining" if node.draining else "connected",
            since=since,
            version=link.node.version if link.node else "",
            labels=node.labels,
            models=tuple(node.loaded),
            running=sum(max(0, model.busy - model.status.queued) for model in models),
            queued=sum(model.status.queued for model in models),
            clock_s=round(link.clock_s, 3),
            placed=_text(placed),
        )


def _text(placed: Placed | None) -> str | None:
    if placed is None:
        return None
    return f"{placed.state}: {placed.reason}" if placed.reason else placed.state


def _named(node: Node, device: DeviceStatus) -> DeviceStatus:
    return msgspec.structs.replace(device, name=f"{node.name}/{device.name}")


def _united(parts: Iterable[Sequence[str]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for part in parts for name in part))
