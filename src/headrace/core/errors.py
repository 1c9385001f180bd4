"""The errors of Headrace, grouped by what the caller does about them.

HeadraceError
├── RequestError          fix the request
│   ├── UnknownModel
│   ├── InvalidRequest
│   │   ├── UnknownRequest
│   │   └── UnknownKey
│   ├── ContextOverflow
│   ├── Unsupported
│   ├── Quarantined
│   ├── NotStarted
│   ├── Unauthorized
│   └── Forbidden
├── CapacityError         try later
│   ├── QueueFull
│   ├── RateLimited
│   ├── DatabaseDown
│   ├── DoesNotFit
│   ├── Loading
│   ├── Draining
│   ├── Disabled
│   ├── NoNode
│   └── DeadlineExceeded
│       └── QueueTimeout
├── EngineError           call an operator
│   ├── LoadFailed
│   ├── GenerationFailed
│   ├── ConstraintViolated
│   ├── OutOfMemory
│   ├── WorkerDied
│   │   └── NodeGone
│   └── UpstreamError
└── ConfigError           before serving
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import msgspec

from headrace.core.metrics import InferenceMetrics

if TYPE_CHECKING:
    from headrace.core.events import Choice


class HeadraceError(Exception):
    """Base of all errors that Headrace raises.

    `message` is stable and safe to show to a client; `detail` is for the log.
    `param` names the offending field of the request. `retry_after_s` is in seconds.
    `metrics` holds the figures of a request that failed after it was received. `choices` are the
    parts of a collected answer (`generate`) that came before it failed.
    """

    choices: tuple[Choice, ...] = ()

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        detail: str | None = None,
        retry_after_s: float | None = None,
        metrics: InferenceMetrics | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.detail = detail
        self.retry_after_s = retry_after_s
        self.metrics = metrics

    @property
    def text(self) -> str:
        """The text of the first choice before the answer failed."""
        return self.choices[0].text if self.choices else ""


class RequestError(HeadraceError):
    """The request is wrong; sending it again unchanged fails again."""


class UnknownModel(RequestError):
    """No model of that name is served, stored or in the catalogue."""


class InvalidRequest(RequestError):
    """A field has a wrong type, a wrong value, or contradicts another."""


class UnknownRequest(InvalidRequest):
    """No request of that id is kept."""


class UnknownKey(InvalidRequest):
    """There is no key with that id, or it was revoked."""


class ContextOverflow(RequestError):
    """The prompt, or the prompt and max_tokens together, exceed the context length."""


class Unsupported(RequestError):
    """A field that would change the answer is not supported by this engine."""


class Quarantined(RequestError):
    """Requests like it have ended the model's process; refused until `retry_after_s`."""


class NotStarted(RequestError):
    """A worker in Python was not started, or has been stopped: it answers after `start`."""


class Unauthorized(RequestError):
    """No key, or a wrong one."""


class Forbidden(RequestError):
    """A known key that may not do this."""


class CapacityError(HeadraceError):
    """The request is valid, but there is no capacity for it now."""


class QueueFull(CapacityError):
    """The bounded queue in front of the model is full."""


class RateLimited(CapacityError):
    """A limit of the key is reached: of requests, tokens, concurrent requests or crashes."""


class DatabaseDown(CapacityError):
    """The database of the keys cannot be reached."""


class DoesNotFit(CapacityError):
    """The model needs more memory than the machine can give it."""


class Loading(CapacityError):
    """The model is not ready yet."""


class Draining(CapacityError):
    """The worker or the server is stopping."""


class Disabled(CapacityError):
    """An operator has switched the model off."""


class NoNode(CapacityError):
    """No node of the cluster can take the request now."""


class DeadlineExceeded(CapacityError):
    """The deadline passed while the request was running."""


class QueueTimeout(DeadlineExceeded):
    """The deadline passed while the request was still waiting for its turn."""


class EngineError(HeadraceError):
    """An engine or a worker failed; the request may be valid."""


class LoadFailed(EngineError):
    """The model could not be loaded."""


class GenerationFailed(EngineError):
    """The engine failed while it generated."""


class ConstraintViolated(EngineError):
    """The finished text is not what its constraint (a JSON schema) demands."""


class OutOfMemory(EngineError):
    """The engine ran out of host or device memory."""


class WorkerDied(EngineError):
    """The process of the worker ended, or hung and was killed."""


class NodeGone(WorkerDied):
    """A node of the cluster is not connected any more; `was_sent` is whether it had the request."""

    was_sent = True


class UpstreamError(EngineError):
    """A remote engine, hub or index answered with an error or broke off."""


class ConfigError(HeadraceError):
    """A configuration is wrong; the message names the source, the key and what is accepted."""


class ErrorRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An error in a message between processes: the name of its class, and its fields."""

    kind: str
    message: str
    param: str | None = None
    detail: str | None = None
    retry_after_s: float | None = None
    metrics: InferenceMetrics | None = None


def kinds(root: type[HeadraceError] = HeadraceError) -> Iterator[type[HeadraceError]]:
    """Yield `root` and every class below it, in the order of the tree above."""
    yield root
    for child in root.__subclasses__():
        yield from kinds(child)


def to_record(error: BaseException) -> ErrorRecord:
    """Return the record of any exception; others than HeadraceError become GenerationFailed."""
    if not isinstance(error, HeadraceError):
        return ErrorRecord(
            kind=GenerationFailed.__name__,
            message="The engine failed.",
            detail=f"{type(error).__name__}: {error}",
        )
    return ErrorRecord(
        kind=type(error).__name__,
        message=error.message,
        param=error.param,
        detail=error.detail,
        retry_after_s=error.retry_after_s,
        metrics=error.metrics,
    )


def from_record(record: ErrorRecord) -> HeadraceError:
    """Return the exception of a record; an unknown kind becomes a GenerationFailed."""
    by_name = {kind.__name__: kind for kind in kinds()}
    return by_name.get(record.kind, GenerationFailed)(
        record.message,
        param=record.param,
        detail=record.detail,
        retry_after_s=record.retry_after_s,
        metrics=record.metrics,
    )
