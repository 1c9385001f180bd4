"""What a node reports of itself: at first everything, then only what has changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import msgspec

from headrace.cluster.wire import ModelReport, Status
from headrace.core.backend import Admin, Backend
from headrace.core.model import ModelInfo
from headrace.core.status import DeviceStatus, ModelStatus, ReplicaStatus

_MOST_SKIPPED = 10
"""How many reports leave out memory that has changed, and nothing else."""


class NodeAdmin(Admin, Protocol):
    """The Admin of a node."""

    @property
    def draining(self) -> bool:
        """Whether the node takes no new requests."""
        ...

    def set_draining(self, on: bool) -> None:
        """Take no new requests from fronts, or take them again."""
        ...

    def model_statuses(self) -> tuple[ModelStatus, ...]:
        """Return the models of `status`, without reading the devices."""
        ...

    def place(self, model: str, copies: int) -> ModelStatus:
        """Load a model in so many workers, if that evicts no other, without waiting for it."""
        ...


class Reporter:
    """Compares the state of a node with what was reported last."""

    def __init__(self, backend: Backend, admin: NodeAdmin, labels: tuple[str, ...]) -> None:
        self._backend = backend
        self._admin = admin
        self._labels = labels
        self._models: dict[str, ModelStatus] = {}
        self._infos: dict[str, tuple[ModelInfo, ...]] = {}
        self._loads: dict[str, tuple[int, int]] = {}
        self._devices: tuple[DeviceStatus, ...] = ()
        self._draining = False
        self._skipped = 0

    def whole(self) -> Status:
        """Return all that was reported."""
        models = (
            ModelReport(status, self._infos.get(name, ())) for name, status in self._models.items()
        )
        return Status(tuple(models), (), self._devices, self._labels, self._draining)

    def beat(self) -> tuple[dict[str, tuple[int, int]], Status | None]:
        """Return the running and waiting requests of the models where they have changed.

        And what else has changed, or None; memory alone is reported now and then.
        """
        models = {model.id: model for model in self._admin.model_statuses()}
        loads = {name: (model.running, model.queued) for name, model in models.items()}
        changed = {name: load for name, load in loads.items() if load != self._loads.get(name)}
        self._loads = loads
        return changed, self._changes(models)

    def _changes(self, models: dict[str, ModelStatus]) -> Status | None:
        infos = _by_model(self._backend.models())
        draining = self._admin.draining
        removed = tuple(name for name in self._models if name not in models)
        changed = [name for name, model in models.items() if self._differs(name, model, infos)]
        self._skipped += 1
        if self._skipped >= _MOST_SKIPPED:
            changed = [name for name, model in models.items() if model != self._models.get(name)]
        elif not changed and not removed and draining == self._draining:
            return None
        self._skipped = 0
        reports = tuple(
            ModelReport(models[name], None if _same(infos, self._infos, name) else infos.get(name))
            for name in changed
        )
        self._models, self._infos = models, infos
        self._devices, self._draining = self._admin.status().devices, draining
        return Status(reports, removed, self._devices, self._labels, draining)

    def _differs(
        self, name: str, model: ModelStatus, infos: Mapping[str, tuple[ModelInfo, ...]]
    ) -> bool:
        before = self._models.get(name)
        if before is None or not _same(infos, self._infos, name):
            return True
        return model is not before and _steady(model) != _steady(before)


def _steady(model: ModelStatus) -> ModelStatus:
    replicas = tuple(map(_steady_replica, model.replicas))
    moving = {"running": 0, "queued": 0, "places": 0, "done": 0}
    return msgspec.structs.replace(
        model, replicas=replicas, memory={}, until=None, last_used=None, **moving
    )


def _steady_replica(replica: ReplicaStatus) -> ReplicaStatus:
    return msgspec.structs.replace(replica, memory={}, running=0)


def _by_model(infos: Sequence[ModelInfo]) -> dict[str, tuple[ModelInfo, ...]]:
    grouped: dict[str, tuple[ModelInfo, ...]] = {}
    for info in infos:
        owner = info.base or info.id
        grouped[owner] = (*grouped.get(owner, ()), info)
    return grouped


def _same(
    infos: Mapping[str, tuple[ModelInfo, ...]],
    before: Mapping[str, tuple[ModelInfo, ...]],
    name: str,
) -> bool:
    now, earlier = infos.get(name, ()), before.get(name, ())
    return len(now) == len(earlier) and all(map(_is_same, now, earlier))


def _is_same(info: ModelInfo, before: ModelInfo) -> bool:
    if info.memory == before.memory:
        return info == before
    return msgspec.structs.replace(info, memory=before.memory) == before
