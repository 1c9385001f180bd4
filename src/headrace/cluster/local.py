"""NodePool and its Admin: a pool that is a node of a cluster."""

from __future__ import annotations

from headrace.core.status import ModelStatus
from headrace.pool.admin import PoolAdmin, status_of
from headrace.pool.pool import Pool


class NodePool(Pool):
    """A pool that is a node of a cluster."""

    is_node = True


class NodePoolAdmin(PoolAdmin):
    """A NodeAdmin. Draining refuses nothing here: fronts send no further requests."""

    _is_drained = False

    @property
    def draining(self) -> bool:
        """Whether the node takes no new requests: by an order, or as it ends."""
        return self._is_drained or self.pool.draining

    def set_draining(self, on: bool) -> None:
        """Take no new requests from fronts, or take them again."""
        self._is_drained = on

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
