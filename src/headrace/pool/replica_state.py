"""The states of a replica, between which only its own methods move it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from headrace.pool.worker import PooledWorker


@dataclass(frozen=True)
class Empty:
    """Nothing is loaded, and no load is in progress."""


@dataclass(frozen=True)
class LoadingState:
    """A task loads the worker."""

    task: asyncio.Task[None]


@dataclass(frozen=True)
class Ready:
    """A worker is loaded; `Replica.is_ready` is False if it has died."""

    worker: PooledWorker


@dataclass(frozen=True)
class Unloading:
    """A task unloads the worker, or cancels its load."""

    task: asyncio.Task[None]
    worker: PooledWorker | None


ReplicaState = Empty | LoadingState | Ready | Unloading
