"""The host or one GPU, at one moment."""

from __future__ import annotations

import msgspec

HOST = "cpu"
"""The key of the host's memory, beside `cuda:0` and its like."""


class Device(msgspec.Struct, frozen=True, kw_only=True):
    """Memory of the host or of one GPU, in bytes. `worker_used` is what one process holds.

    The host's is that of the control group, where one has a limit: more is not available. `busy` is
    from 0 to 1: of a GPU by all processes, of the host by one worker. `joules` counts
    since the driver was loaded, `watts` are drawn now; None is what is not metered.
    """

    name: str
    kind: str
    total: int
    used: int
    worker_used: int = 0
    busy: float | None = None
    joules: float | None = None
    watts: float | None = None

    @property
    def key(self) -> str:
        """The name without the product: `cpu`, `cuda:0`."""
        return self.name.partition(" ")[0]

    @property
    def energy(self) -> str:
        """How its energy is known: `counter`, `power` (of which it is the integral), `none`."""
        if self.joules is not None:
            return "counter"
        return "none" if self.watts is None else "power"
