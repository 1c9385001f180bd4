"""Backend: the one shape of everything that answers requests. Admin: what an operator can do."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any, Protocol

from headrace.core.events import Event
from headrace.core.model import ModelInfo
from headrace.core.request import AnyRequest
from headrace.core.status import ModelStatus, Plan, PoolEvent, PoolStatus, Reloaded


class Backend(Protocol):
    """Answers requests with streams of events.

    A Worker, a WorkerProcess and a Pool are all one, so no layer above knows which it holds.
    """

    def ask(self, request: AnyRequest) -> AsyncGenerator[Event, None]:
        """Yield progress, then what was asked for, then one Finish.

        What was asked for is deltas for a GenerateRequest, and one event for any other. Closing
        the generator frees all that it holds.

        Raises:
            HeadraceError: of any family, at any time before the Finish; Unsupported if the model
                cannot do what was asked.
        """
        ...

    def models(self) -> Sequence[ModelInfo]:
        """Return the metadata of what is served here, without waiting."""
        ...

    async def aclose(self) -> None:
        """Stop, and give everything back. Idempotent."""
        ...


class Admin(Protocol):
    """What can be done to a set of models while it serves. `model` is a name or an alias.

    Every method raises UnknownModel for a name that is not there; nothing has changed then.
    """

    def status(self) -> PoolStatus:
        """Tell how all models and devices stand, without waiting."""
        ...

    async def load(self, model: str, changes: Mapping[str, Any] | None = None) -> ModelStatus:
        """Load a model and wait for it; nothing happens to one that is ready.

        A reference that is not served yet is added under its short name, with `changes` as its
        settings. Also resets a model that has failed, and enables a disabled one.

        Raises:
            ConfigError: a setting is unknown or wrong.
            HeadraceError: what the load raises.
        """
        ...

    async def unload(self, model: str) -> ModelStatus:
        """Let running requests end, unload, and wait until the memory is back."""
        ...

    async def restart(self, model: str) -> ModelStatus:
        """Unload and load again, with the same settings; resets a model that has failed."""
        ...

    async def update(self, model: str, changes: Mapping[str, Any]) -> ModelStatus:
        """Change settings of a model (`pinned`, `enabled`, `keep_alive`, `options.threads`, ...).

        What needs a new process is done as a reload does it: no request fails.

        Raises:
            ConfigError: a setting is unknown or wrong; nothing has changed.
        """
        ...

    async def plan(self, model: str) -> Plan:
        """Tell what loading a model would need and do. A reference that is not served is fine."""
        ...

    async def reload(self) -> Reloaded:
        """Read the configuration again and apply what has changed, without failing a request.

        Raises:
            ConfigError: it is wrong; nothing has changed.
        """
        ...

    def events(self) -> AsyncGenerator[PoolEvent, None]:
        """Yield what happens to the models from now on."""
        ...
