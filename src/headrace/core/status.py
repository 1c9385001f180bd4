"""The status of a set of models, for operators."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from headrace.core.model import Continuation, State

EventKind = Literal[
    "loading",
    "ready",
    "load_failed",
    "not_loaded",
    "unloaded",
    "evicted",
    "expired",
    "died",
    "restarted",
    "failed",
    "continued",
    "updated",
    "added",
    "removed",
    "draining",
    "reloaded",
    "node_joined",
    "node_left",
]

NodeState = Literal["connected", "draining", "gone"]


class Footprint(msgspec.Struct, frozen=True, kw_only=True):
    """The memory of a model: bytes by device (`cpu`, `cuda:0`), estimated or measured.

    `parts` are the terms of an estimate in bytes (`weights`, `kv_cache`, `batch`, `overhead`); a
    `batch` is taken by requests, so that a load does not show it. `load_s` is the time of a load in
    seconds. It holds for `context_length`, `max_running` and `engine`.
    `choices` are the bytes for each set of devices on which the model could be placed.
    """

    devices: dict[str, int]
    how: Literal["estimated", "measured"] = "estimated"
    parts: dict[str, int] = {}
    load_s: float | None = None
    context_length: int | None = None
    max_running: int | None = None
    engine: str = ""
    choices: tuple[dict[str, int], ...] = ()


class DeviceStatus(msgspec.Struct, frozen=True, kw_only=True):
    """Memory of a device in bytes. `budget` is what models may take, `booked` what they take.

    `free` is the free memory as the machine reports it.
    """

    name: str
    total: int
    budget: int
    booked: int
    free: int


class ReplicaStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One worker of a model. `memory` is measured, in bytes by device; empty when not loaded.

    `node` is the node of the cluster that it runs on. `drafting` is whether its engine drafts
    tokens now: False while it does not, as that was slower; None if it never changes by itself.
    """

    number: int
    state: State
    node: str = ""
    pid: int | None = None
    weight: float = 1.0
    running: int = 0
    memory: dict[str, int] = {}
    drafting: bool | None = None
    load_ms: float | None = None
    reason: str | None = None


class ModelStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One model. `until`, `last_used` and `retry_at` are Unix time; `until` None is without limit.

    Until `retry_at`, requests are refused as the model has failed; the next one after it is a try.
    `progress` is the stage of a load (`downloading`, `queued`, ...), with `done` of `total`.
    `restarts`, `evictions` and `continuations` count since the service started. `copies` is how
    many workers are configured, `nodes` the labels of the nodes that may run them. `places` is how
    many more requests may wait, without those of batches.
    """

    id: str
    source: str
    state: State
    aliases: tuple[str, ...] = ()
    engine: str = ""
    engine_reason: str = ""
    device: str = ""
    quantization: str | None = None
    context_length: int | None = None
    enabled: bool = True
    pinned: bool = False
    keep_alive: float = -1.0
    continuation: Continuation = "fast"
    estimated: Footprint | None = None
    memory: dict[str, int] = {}
    running: int = 0
    max_running: int | None = None
    queued: int = 0
    max_queued: int = 0
    places: int = 0
    until: float | None = None
    last_used: float | None = None
    restarts: int = 0
    evictions: int = 0
    continuations: int = 0
    last_error: str | None = None
    retry_at: float | None = None
    progress: str | None = None
    done: int = 0
    total: int = 0
    replicas: tuple[ReplicaStatus, ...] = ()
    options: dict[str, Any] = {}
    preload: bool = True
    copies: int = 1
    nodes: tuple[str, ...] = ()


class NodeStatus(msgspec.Struct, frozen=True, kw_only=True):
    """A node of a cluster. `since` is Unix time of the state, `reason` why the node has gone.

    `models` are those that are loaded there. `clock_s` is how many seconds its clock is ahead.
    `placed` is what Ray, if it places the nodes, reports of this one.
    """

    name: str
    address: str
    state: NodeState
    since: float
    version: str = ""
    labels: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    running: int = 0
    queued: int = 0
    clock_s: float = 0.0
    reason: str | None = None
    placed: str | None = None


class PoolStatus(msgspec.Struct, frozen=True, kw_only=True):
    """All models and all devices; `nodes` of a cluster."""

    models: tuple[ModelStatus, ...]
    devices: tuple[DeviceStatus, ...]
    nodes: tuple[NodeStatus, ...] = ()


class StoredModel(msgspec.Struct, frozen=True, kw_only=True):
    """A model that was downloaded: bytes on the disk, and when it was added (Unix time)."""

    name: str
    reference: str
    size: int
    added: int = 0
    revision: str | None = None


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What loading a model would need and do.

    `fits` is whether it can be loaded at all; `evict` are the models that would be evicted first.
    `largest_context` is how many tokens would fit into the whole budget, None if unknown.
    `reason` explains it, with the numbers.
    """

    model: str
    engine: str
    need: Footprint
    fits: bool
    loaded: bool = False
    evict: tuple[str, ...] = ()
    largest_context: int | None = None
    reason: str = ""
    devices: tuple[DeviceStatus, ...] = ()


class Reloaded(msgspec.Struct, frozen=True, kw_only=True):
    """The changes of a reload, by model; `needs_restart` are settings of the server itself."""

    added: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    needs_restart: tuple[str, ...] = ()


class PoolEvent(msgspec.Struct, frozen=True, kw_only=True):
    """An event of a model. `time` is Unix time."""

    time: float
    kind: EventKind
    model: str = ""
    replica: int = 0
    data: dict[str, Any] = {}
