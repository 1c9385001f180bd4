"""View: what a front knows of the nodes and their models, and its choice among them."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from headrace.cluster.policy import (
    Candidate,
    allows,
    choose_node,
    fits,
    free_memory,
    rank,
)
from headrace.cluster.wire import ModelReport, Pulse, Status
from headrace.core.model import ModelInfo, State
from headrace.core.status import DeviceStatus, ModelStatus

_MAX_CANDIDATES = 16
"""Nodes that are compared for one request; with more, others are compared for the next one."""
_MAX_BLOCKS = 4096
"""Beginnings of prompts that are remembered for each model."""


@dataclass(slots=True)
class NodeModel:
    """A model at a node.

    `open` are the streams of this front, and `reported` those of them that `busy` includes.
    """

    status: ModelStatus
    infos: tuple[ModelInfo, ...] = ()
    busy: int = 0
    open: int = 0
    reported: int = 0

    @property
    def load(self) -> float:
        """The running and waiting requests for each slot."""
        busy = max(self.busy + self.open - self.reported, self.open)
        return busy / (self.status.max_running or 1)


@dataclass(slots=True, eq=False)
class Node:
    """A node that has joined."""

    name: str
    labels: tuple[str, ...] = ()
    draining: bool = False
    devices: tuple[DeviceStatus, ...] = ()
    models: dict[str, NodeModel] = field(default_factory=dict[str, NodeModel])
    free: dict[str, int] = field(default_factory=dict[str, int])
    free_total: int = 0
    idle: int = 0

    @property
    def loaded(self) -> list[str]:
        """The names of the models that are loaded."""
        return [name for name, model in self.models.items() if model.status.state == "ready"]


class View:
    """All nodes by name. It has no connections: reports are applied to it."""

    def __init__(self) -> None:
        self.nodes: dict[str, Node] = {}
        self.known: dict[str, ModelStatus] = {}
        self._names: dict[str, str] = {}
        self._serving: dict[str, dict[str, Node]] = {}
        self._ready: dict[str, dict[str, Node]] = {}
        self._around: dict[str, list[str]] = {}
        self._seen: dict[str, OrderedDict[int, str]] = {}
        self._turn = itertools.count()

    def join(self, name: str) -> Node:
        """Add a node without models."""
        node = self.nodes[name] = Node(name)
        return node

    def leave(self, name: str) -> None:
        """Remove a node; its models stay known."""
        node = self.nodes.pop(name)
        for model in node.models:
            self._serving[model].pop(name, None)
            self._is_ready(node, model, ready=False)

    def apply(self, name: str, status: Status) -> None:
        """Apply the report of a node."""
        node = self.nodes[name]
        for report in status.models:
            self._apply(node, report)
        for model in status.removed:
            self._remove(node, model)
        node.labels, node.draining, node.devices = status.labels, status.draining, status.devices
        node.free = free_memory(status.devices)
        node.free_total = sum(node.free.values())
        node.idle = node.free_total + sum(map(_idle_memory, node.models.values()))

    def pulse(self, name: str, pulse: Pulse) -> None:
        """Apply the loads of a node."""
        models = self.nodes[name].models
        for model, (running, queued) in pulse.loads.items():
            if (there := models.get(model)) is not None:
                there.busy, there.reported = running + queued, there.open

    def _apply(self, node: Node, report: ModelReport) -> None:
        status, model = report.status, report.status.id
        there = node.models.get(model)
        if there is None:
            there = node.models[model] = NodeModel(status)
            self._serving.setdefault(model, {})[node.name] = node
            self._ready.setdefault(model, {})
        there.status, there.busy = status, status.running + status.queued
        there.reported = there.open
        if report.infos is not None:
            there.infos = report.infos
        self._known_as(status, there.infos)
        self._is_ready(node, model, ready=status.state == "ready" and status.enabled)

    def _is_ready(self, node: Node, model: str, *, ready: bool) -> None:
        nodes = self._ready.setdefault(model, {})
        if ready == (node.name in nodes):
            return
        if ready:
            nodes[node.name] = node
        else:
            del nodes[node.name]
        # Twice, so that a part of it can go over the end.
        self._around[model] = [*nodes, *nodes]

    def _known_as(self, status: ModelStatus, infos: Iterable[ModelInfo]) -> None:
        self.known[status.id] = status
        of_infos = (name for info in infos for name in _names(info))
        for name in (status.id, *status.aliases, *of_infos):
            self._names[name] = status.id

    def _remove(self, node: Node, model: str) -> None:
        node.models.pop(model, None)
        self._is_ready(node, model, ready=False)
        serving = self._serving.get(model, {})
        serving.pop(node.name, None)
        if not serving:
            self.known.pop(model, None)
            self._names = {name: id for name, id in self._names.items() if id != model}

    def model_of(self, name: str) -> str | None:
        """Return the id of a model by any of its names; an only model is found without one."""
        if not name and len(self.known) == 1:
            return next(iter(self.known))
        return self._names.get(name)

    @property
    def names(self) -> Collection[str]:
        """The names that requests can use."""
        return self._names.keys()

    def serving(self, model: str) -> list[Node]:
        """Return the nodes that have a model, loaded or not, and are not draining."""
        nodes = self._serving.get(model, {}).values()
        wanted = self.known[model].nodes if model in self.known else ()
        return [n for n in nodes if not n.draining and allows(wanted, n.name, n.labels)]

    def having(self, model: str) -> list[Node]:
        """Return all nodes that have a model, loaded or not."""
        return [*self._serving.get(model, {}).values()]

    def lacking(self, model: str, name: str) -> list[Node]:
        """Return the nodes that have a model, but no preset or adapter of that name."""
        return [
            node
            for node in self.having(model)
            if not any(name in _names(info) for info in node.models[model].infos)
        ]

    def ready(self, model: str) -> list[Node]:
        """Return the nodes that have loaded a model, and are not draining."""
        return [node for node in self._ready.get(model, {}).values() if not node.draining]

    def choose(
        self, model: str, blocks: Sequence[int] = (), excluded: Collection[Node] = ()
    ) -> Node | None:
        """Return the node for a request, or None; `blocks` are of the prompt's beginning."""
        ready = self._ready.get(model, {})
        names = self._window(model, excluded)
        matched = self._matched(model, blocks)
        for name in matched:
            there = ready.get(name)
            if there is not None and name not in names and there not in excluded:
                names += [] if there.draining else [name]
        if names:
            candidates = [
                Candidate(
                    name,
                    ready=True,
                    load=ready[name].models[model].load,
                    matched=matched.get(name, 0),
                    rank=place,
                )
                for place, name in enumerate(names)
            ]
        else:
            candidates = list(self.unloaded(model, excluded))
        chosen = choose_node(candidates)
        return None if chosen is None else self.nodes[chosen]

    def unloaded(self, model: str, excluded: Collection[Node] = ()) -> Iterator[Candidate]:
        """Yield the nodes that could load a model."""
        need = next((node.models[model].status.estimated for node in self.serving(model)), None)
        for node in self.serving(model):
            there = node.models[model].status
            if node in excluded or not there.enabled:
                continue
            estimated = there.estimated or need
            yield Candidate(
                node.name,
                loading=there.state == "loading",
                failed=there.state == "failed",
                fits=fits(estimated.devices if estimated else None, node.free),
                free=node.free_total,
                idle=node.idle,
                rank=rank(model, node.name),
            )

    def began(self, node: Node, model: str, blocks: Sequence[int]) -> None:
        """Note that a request was sent to a node."""
        if (there := node.models.get(model)) is not None:
            there.open += 1
        seen = self._seen.setdefault(model, OrderedDict())
        for block in blocks:
            seen[block] = node.name
            seen.move_to_end(block)
        while len(seen) > _MAX_BLOCKS:
            seen.popitem(last=False)

    def ended(self, node: Node, model: str) -> None:
        """Note that a request at a node has ended."""
        if (there := node.models.get(model)) is not None:
            there.open -= 1

    def _window(self, model: str, excluded: Collection[Node]) -> list[str]:
        """Return the names of some usable nodes, of others for each request if there are many."""
        nodes, names = self._ready.get(model, {}), self._around.get(model, [])
        count = len(nodes)
        start = next(self._turn) * _MAX_CANDIDATES % count if count > _MAX_CANDIDATES else 0
        chosen = names[start : start + min(count, _MAX_CANDIDATES)]
        usable = (name for name in chosen if nodes[name] not in excluded)
        return [name for name in usable if not nodes[name].draining]

    def _matched(self, model: str, blocks: Sequence[int]) -> dict[str, int]:
        """Return for nodes how many blocks of a prompt they have had last."""
        seen = self._seen.get(model)
        matched: dict[str, int] = {}
        for count, block in enumerate(blocks, 1) if seen else ():
            if (name := seen.get(block)) is None:  # type: ignore[union-attr]
                break
            matched[name] = count
        return matched


def best_info(infos: Sequence[ModelInfo]) -> ModelInfo:
    """Return the metadata of the node where the model is in the best state."""
    order: tuple[State, ...] = ("ready", "loading", "draining", "created", "stopped", "failed")
    return min(infos, key=lambda info: order.index(info.state))


def _names(info: ModelInfo) -> tuple[str, ...]:
    return (info.id, *info.aliases)


def _idle_memory(model: NodeModel) -> int:
    return 0 if model.status.running else sum(model.status.memory.values())
