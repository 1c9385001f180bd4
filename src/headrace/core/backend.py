"""Backend, the interface of everything that answers requests, and Admin, that of operators."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from headrace.core.events import Event
from headrace.core.library import LibraryEntry, LibraryFilter
from headrace.core.measurement import Curve
from headrace.core.model import ModelInfo
from headrace.core.request import AnyRequest
from headrace.core.status import (
    ModelStatus,
    NodeStatus,
    Plan,
    PoolEvent,
    PoolStatus,
    Reloaded,
    StoredModel,
)


class Backend(Protocol):
    """Answers requests with streams of events.

    Worker, WorkerProcess and Pool implement it, so that no layer above depends on which it has.
    """

    def ask(self, request: AnyRequest) -> AsyncGenerator[Event, None]:
        """Yield progress, then the result, then one Finish.

        The result is deltas for a GenerateRequest, and one event for any other. Closing the
        generator releases all its resources.

        Raises:
            HeadraceError: of any family, at any time before the Finish; Unsupported if the model
                does not support the request.
        """
        ...

    def models(self) -> Sequence[ModelInfo]:
        """Return the metadata of the served models, without waiting."""
        ...

    async def aclose(self) -> None:
        """Stop, and release all resources. Idempotent."""
        ...


class Admin(Protocol):
    """Operations on a set of models while it serves. `model` is a name or an alias.

    Every method raises UnknownModel for an unknown name, and changes nothing then.
    """

    def status(self) -> PoolStatus:
        """Return the status of all models and devices, without waiting."""
        ...

    async def describe(self, model: str) -> None:
        """Read the header of a model that was not loaded yet, which `models()` have then.

        Raises:
            HeadraceError: its file cannot be read.
        """
        ...

    async def load(self, model: str, changes: Mapping[str, Any] | None = None) -> ModelStatus:
        """Load a model that is not ready, and wait for it.

        A reference that is not served yet is added under its short name, with `changes` as its
        settings. A model that has failed is reset, and one that is disabled is enabled.

        Raises:
            ConfigError: a setting is unknown or wrong.
            HeadraceError: the load failed.
        """
        ...

    async def unload(self, model: str) -> ModelStatus:
        """Let running requests end, unload, and wait until the memory is free."""
        ...

    async def restart(self, model: str) -> ModelStatus:
        """Unload and load again, with the same settings; resets a model that has failed."""
        ...

    async def update(self, model: str, changes: Mapping[str, Any]) -> ModelStatus:
        """Change settings of a model (`pinned`, `enabled`, `keep_alive`, `options.threads`, ...).

        A change that needs a new process is applied as in a reload: no request fails.

        Raises:
            ConfigError: a setting is unknown or wrong; nothing has changed.
        """
        ...

    async def plan(self, model: str) -> Plan:
        """Return what a load would need and do. A reference that is not served is accepted."""
        ...

    def stored(self) -> Sequence[StoredModel]:
        """Return the models that were downloaded, by name. Blocking."""
        ...

    def measurements(self) -> Sequence[Curve]:
        """Return what `bench` and `tune` have measured here, the newest first. Blocking."""
        ...

    async def library(self, wanted: LibraryFilter) -> Sequence[LibraryEntry]:
        """Return the models of the library that match, with what each would need here.

        Raises:
            Unsupported: there is no library.
            HeadraceError: it is damaged, or no engine can run its models.
        """
        ...

    async def reload(self) -> Reloaded:
        """Read the configuration again and apply the changes, without failing a request.

        Raises:
            ConfigError: it is wrong; nothing has changed.
        """
        ...

    def events(self) -> AsyncGenerator[PoolEvent, None]:
        """Yield events of the models from now on."""
        ...


@runtime_checkable
class ClusterAdmin(Admin, Protocol):
    """Operations on a cluster: those of an Admin, and on its nodes."""

    async def drain(self, node: str, on: bool) -> NodeStatus:
        """Send nothing new to a node, or send requests to it again.

        Raises:
            UnknownModel: there is no such node.
        """
        ...
