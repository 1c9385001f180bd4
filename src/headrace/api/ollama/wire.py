"""What the routes of Ollama's API share: names with tags, options, times, and figures."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from msgspec import Meta

from headrace.api import fields, limits
from headrace.api.exchange import Exchange, Service
from headrace.api.fields import Body, Peers
from headrace.api.wire import KeepAlive, ModelName, StopText, request_fields
from headrace.core.constraint import Constraint
from headrace.core.errors import InvalidRequest
from headrace.core.metrics import InferenceMetrics
from headrace.core.sampling import Sampling
from headrace.core.tools import Thinking

Effort = Literal["low", "medium", "high", "max"]
Logprobs = Annotated[int, Meta(ge=0, le=20)]

_LATEST = ":latest"
_NS = 1_000_000


class Options(Body, frozen=True, kw_only=True):
    """Ollama's `options`: parameters of the answer. Those of the load are the server's own."""

    num_predict: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None
    repeat_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    stop: StopText | Annotated[list[StopText], Meta(max_length=limits.MAX_STOP)] | None = None

    peers: ClassVar[Peers] = fields.OLLAMA_OPTIONS


class Addressed(Body, frozen=True, kw_only=True):
    """A request for a model, which older clients give as `name`."""

    model: ModelName | None = None
    name: ModelName | None = None
    keep_alive: KeepAlive | None = None


class GenerateFields(Addressed, frozen=True, kw_only=True):
    """Fields of every request that generates; its answer is streamed unless `stream` is false."""

    stream: bool | None = None
    think: bool | Effort | Literal[""] | None = None
    format: dict[str, Any] | Literal["", "json"] | None = None
    options: Options | None = None
    logprobs: bool | None = None
    top_logprobs: Logprobs | None = None


class _Target(NamedTuple):
    model: str
    keep_alive: float | str | None


def core_name(service: Service, wire: Addressed) -> str:
    """Return the name of a served model: as given, or without `:latest`.

    Raises:
        InvalidRequest: there is no name.
    """
    name = wire.model or wire.name or ""
    if not name:
        raise InvalidRequest("model is missing.", param="model")
    if name.endswith(_LATEST) and not any(
        name == info.id or name in info.aliases for info in service.backend.models()
    ):
        return name.removesuffix(_LATEST)
    return name


def tagged(name: str) -> str:
    """Return a name with a tag, which Ollama's clients expect of every name."""
    return name if ":" in name.rpartition("/")[2] else name + _LATEST


def envelope(service: Service, exchange: Exchange, wire: Addressed) -> dict[str, Any]:
    """Return the fields that every core request has.

    Raises:
        InvalidRequest: there is no model, or keep_alive is not a duration.
    """
    target = _Target(core_name(service, wire), wire.keep_alive)
    return request_fields(target, exchange.settings, exchange.call)


def to_sampling(wire: GenerateFields) -> Sampling:
    """Build the core's parameters.

    Raises:
        InvalidRequest: a value is out of its range.
    """
    given = wire.options or Options()
    if wire.top_logprobs and not wire.logprobs:
        raise InvalidRequest("top_logprobs needs logprobs to be true.", param="top_logprobs")
    most = given.num_predict
    return Sampling(
        # -1 and -2 are without limit.
        max_tokens=None if most is None or most < 0 else max(most, 1),
        temperature=given.temperature,
        top_k=None if given.top_k is None else max(given.top_k, 0),
        top_p=given.top_p,
        min_p=given.min_p,
        # -1 is a random one.
        seed=None if given.seed is None or given.seed < 0 else given.seed,
        repetition_penalty=given.repeat_penalty,
        presence_penalty=given.presence_penalty,
        frequency_penalty=given.frequency_penalty,
        stop=(given.stop,) if isinstance(given.stop, str) else tuple(given.stop or ()),
        logprobs=(wire.top_logprobs or 0) if wire.logprobs else None,
    )


def to_constraint(wire: GenerateFields) -> Constraint | None:
    """Return the required form of an answer: any JSON object, or what a schema says."""
    if not wire.format:
        return None
    return Constraint(json_schema={"type": "object"} if wire.format == "json" else wire.format)


def to_thinking(wire: GenerateFields) -> Thinking:
    """Return what the request asks of the thinking."""
    if isinstance(wire.think, str):
        return Thinking(enabled=True, effort=wire.think) if wire.think else Thinking()
    return Thinking(enabled=wire.think)


def timings(metrics: InferenceMetrics) -> dict[str, int]:
    """Return Ollama's figures of an answer: durations in nanoseconds, and tokens."""
    first_ms = metrics.time_to_first_token_ms
    decode_ms = 0.0 if first_ms is None else metrics.total_ms - first_ms
    return {
        "total_duration": _ns(metrics.total_ms),
        "load_duration": _ns(metrics.load_ms),
        "prompt_eval_count": metrics.usage.prompt_tokens,
        "prompt_eval_duration": _ns(metrics.prefill_ms or 0.0),
        "eval_count": metrics.usage.completion_tokens,
        "eval_duration": _ns(decode_ms),
    }


def timestamp(seconds: float | None = None) -> str:
    """Return a Unix time, or the current one, in RFC 3339."""
    time = datetime.now(UTC) if seconds is None else datetime.fromtimestamp(seconds, UTC)
    return time.isoformat(timespec="microseconds").replace("+00:00", "Z")


def digest(*parts: object) -> str:
    """Return 64 hex digits that stand for a model; Headrace keeps no digests of its files."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _ns(ms: float) -> int:
    return max(round(ms * _NS), 0)
