"""The messages between a front and a node, beside those of `headrace.worker.wire`.

A connection begins with a greeting, in frames of at most `MAX_GREETING` bytes:

    front: Hello ▶   ◀ node: Hello   front: Proof ▶   ◀ node: Proof, Status

A side that does not accept the other sends Refused, and closes. Structs are arrays on the wire:
a later version of the same protocol only appends fields with defaults.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import msgspec

from headrace.core.errors import ErrorRecord
from headrace.core.model import ModelInfo
from headrace.core.request import AnyRequest
from headrace.core.status import DeviceStatus, ModelStatus, Plan, PoolEvent, Reloaded
from headrace.worker.wire import Cancel, Emitted, Ended, Message

PROTOCOL = 1
"""Both sides must have the same."""
MAX_GREETING = 4096
"""Bytes of a frame before both sides have proved who they are."""
GREETING_TIMEOUT_S = 5.0
"""How long the greeting may take."""
MAX_UNSENT = 16 << 20
"""Bytes that wait for a front to read them; beyond that the streams to it wait."""
MAX_UNSENT_EVENTS = 100_000
"""Events of generated text beyond those bytes; then its connection is ended."""

MAX_LISTING = 1 << 20
"""Bytes of the list of nodes."""

Side = Literal["front", "node"]
Action = Literal[
    "load", "unload", "restart", "update", "plan", "reload", "place", "drain", "describe"
]


class Address(NamedTuple):
    """Where a node listens."""

    host: str
    port: int

    def __str__(self) -> str:
        """Write it as HOST:PORT."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Hello(Message, frozen=True, tag="hello"):
    """Both: who this is. `instance` is new for each process; `time` is Unix time."""

    protocol: int
    version: str
    name: str
    instance: str
    nonce: bytes
    time: float


class Proof(Message, frozen=True, tag="proof"):
    """Both: the proof that this side has the token of the cluster."""

    mac: bytes


class Refused(Message, frozen=True, tag="refused"):
    """Both: why the connection is closed."""

    reason: str


class Begin(Message, frozen=True, tag="ask"):
    """Front: begin stream `id`. `age_s` is how long ago the front received the request."""

    id: int
    request: AnyRequest
    age_s: float = 0.0


class Order(Message, frozen=True, tag="order"):
    """Front: do what an operator wants; the reply is Done. `place` loads without evicting."""

    id: int
    action: Action
    model: str = ""
    changes: dict[str, Any] = {}  # noqa: RUF012 - of a msgspec struct, which copies it


class Pulse(Message, frozen=True, tag="pulse"):
    """Both, at least every `heartbeat_s`: the event loop runs.

    `loads` of a node are the running and queued requests of the models where they have changed.
    """

    loads: dict[str, tuple[int, int]] = {}  # noqa: RUF012 - as above


class ModelReport(msgspec.Struct, frozen=True, array_like=True):
    """One model at a node; `infos` are its metadata and those of its presets, None if unchanged."""

    status: ModelStatus
    infos: tuple[ModelInfo, ...] | None = None


class Status(Message, frozen=True, tag="status"):
    """Node: the models that have changed, and those that are not served any more."""

    models: tuple[ModelReport, ...] = ()
    removed: tuple[str, ...] = ()
    devices: tuple[DeviceStatus, ...] = ()
    labels: tuple[str, ...] = ()
    draining: bool = False


class Happened(Message, frozen=True, tag="event"):
    """Node: an event of its pool."""

    event: PoolEvent


class Done(Message, frozen=True, tag="done"):
    """Node: the result of order `id`."""

    id: int
    error: ErrorRecord | None = None
    status: ModelStatus | None = None
    plan: Plan | None = None
    reloaded: Reloaded | None = None


class Placed(msgspec.Struct, frozen=True, array_like=True):
    """What places nodes reports of one: `state` and `reason` are for people."""

    node: str
    address: str
    state: str
    reason: str = ""


class Listing(Message, frozen=True, tag="listing"):
    """Directory, after the greeting: all nodes that are placed."""

    nodes: tuple[Placed, ...]


Greeting = Hello | Proof | Refused
ToNode = Begin | Cancel | Order | Pulse | Refused
ToFront = Emitted | Ended | Pulse | Status | Done | Happened

GREETINGS = msgspec.msgpack.Decoder(list[Greeting])
FROM_FRONT = msgspec.msgpack.Decoder(list[ToNode])
FROM_NODE = msgspec.msgpack.Decoder(list[ToFront])
FROM_DIRECTORY = msgspec.msgpack.Decoder(list[Listing])
