"""NodePool and its Admin: a pool that is a node of a cluster."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from headrace.cluster.policy import allows
from headrace.core.errors import InvalidRequest, UnknownModel
from headrace.core.status import ModelStatus, Plan
from headrace.pool.admin import PoolAdmin
from headrace.pool.pool import Pool
from headrace.pool.status import status_of


class NodePool(Pool):
    """A pool that is a node of a cluster."""

    is_node = True


class NodePoolAdmin(PoolAdmin):
    """A NodeAdmin. Draining refuses nothing here: fronts send no further requests.

    `labels` are the name of the node and its labels; a model that names others is not added.
    """

    labels: tuple[str, ...] = ("",)
    _is_drained = False

    @property
    def draining(self) -> bool:
        """Whether the node takes no new requests: by an order, or as it ends."""
        return self._is_drained or self.pool.draining

    def set_draining(self, on: bool) -> None:
        """Take no new requests from fronts, or take them again."""
        self._is_drained = on

    async def load(self, model: str, changes: Mapping[str, Any] | None = None) -> ModelStatus:
        """Load a model, and wait for it; see `Admin`.

        Raises:
            InvalidRequest: it may run on other nodes only.
        """
        self._check_labels(model)
        return await super().load(model, changes)

    async def plan(self, model: str) -> Plan:
        """Return what a load would need and do; see `load`."""
        self._check_labels(model)
        return await super().plan(model)

    def _check_labels(self, model: str) -> None:
        try:
            wanted = self.pool.entry(model).spec.nodes
        except UnknownModel:
            wanted = self._specify(model, {}).nodes
        if not allows(wanted, self.labels[0], self.labels[1:]):
            names, others = ", ".join(wanted), ", ".join(self.labels[1:]) or "none"
            raise InvalidRequest(
                f"{model} may run on nodes with the name or label {names} alone; the labels of "
                f"{self.labels[0]} are {others}.",
                param="nodes",
            )

    def place(self, model: str, copies: int) -> ModelStatus:
        """Load a model in so many workers, if that evicts no other, without waiting for it."""
        entry, loader = self.pool.entry(model), self.pool.loader
        if entry.copies != copies:
            entry.copies = copies
            entry.apply(entry.spec)
            loader.unload_idle(entry)
        if entry.spec.enabled:
            loader.ensure_loaded(entry, may_evict=False)
        return status_of(entry)
