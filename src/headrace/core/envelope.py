"""What every request has: the client, the deadline, the trace context and how long it waits."""

from __future__ import annotations

import secrets
import time
from functools import cache
from typing import Any, ClassVar, Literal

import msgspec

from headrace.core.model import Task
from headrace.core.sampling import Sampling

Operation = Literal[
    "chat", "text_completion", "embeddings", "rerank", "score", "tokenize", "detokenize"
]
"""What was asked for, as traces and metrics name it; OpenTelemetry's names where it has any."""


def new_id() -> str:
    """Return an unguessable id for a request."""
    return secrets.token_hex(12)


class Request(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The envelope of every request.

    `received` is monotonic seconds, on a clock that all processes of the machine share.
    `deadline_s` counts from `received`. `load_ms` is how long the request has waited for its
    model, `load_wait_s` how long it waits for a load at most; None is without limit.

    `client` identifies the caller, for fairness between clients. A request of a `batch` gives way
    to others, and its tokens are charged at half their number. `keep_alive` in seconds replaces
    that of the model from the end of this request on; with `lengthens`, only if it is longer.

    `traceparent` and `tracestate` are the W3C context of the caller's span; each layer that makes
    a span passes on its own.

    `adapter` is that of the model which `model` names, set where the name is looked up.

    A request that `continues` an answer, of which the client has a part already, is from a front
    of a cluster: it goes first in the queue, and always fits.
    """

    model: str = ""
    deadline_s: float | None = None
    load_ms: float = 0.0
    load_wait_s: float | None = None
    client: str = ""
    batch: bool = False
    keep_alive: float | None = None
    lengthens: bool = False
    traceparent: str = ""
    tracestate: str = ""
    adapter: str = ""
    continues: bool = False
    id: str = msgspec.field(default_factory=new_id)
    received: float = msgspec.field(default_factory=time.monotonic)

    task: ClassVar[Task] = "generate"
    """The task that the model must support."""
    queues: ClassVar[bool] = True
    """Whether it waits for a slot; other requests are answered at once (M9)."""
    content_fields: ClassVar[frozenset[str]] = frozenset()
    """Fields with content of the client: kept and logged only if that is enabled."""

    @property
    def deadline(self) -> float | None:
        """The deadline in monotonic seconds."""
        return None if self.deadline_s is None else self.received + self.deadline_s

    @property
    def slots(self) -> int:
        """How many of the engine's slots it takes."""
        return 1

    def cost(self) -> float:
        """Return an estimate of its tokens."""
        return 0.0

    def prompt_cost(self) -> float:
        """Return an estimate of those that are computed before its first event."""
        return self.cost()

    def opening(self) -> str:
        """Return the beginning of the prompt; requests with equal ones share a prefix cache."""
        return ""

    def content(self) -> Any:
        """Return the content of the client, as builtins. Token ids are left out."""
        return None

    def settings(self) -> dict[str, Any]:
        """Return the fields that were set, as builtins, without content and envelope."""
        given: dict[str, Any] = {}
        for name, default in _settings(type(self)):
            value = getattr(self, name)
            if value in (default, {}):
                continue
            built = msgspec.to_builtins(value)
            given |= built if isinstance(value, Sampling) else {name: built}
        return given


@cache
def _settings(kind: type[Request]) -> tuple[tuple[str, Any], ...]:
    """Return name and default of the fields that are neither content nor envelope."""
    left_out = _ENVELOPE | kind.content_fields
    fields = msgspec.structs.fields(kind)
    return tuple((field.name, field.default) for field in fields if field.name not in left_out)


_ENVELOPE = frozenset(Request.__struct_fields__) - {"deadline_s", "keep_alive"}
