"""The settings themselves: what there is, what each accepts, and its default."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
)

from headrace.core.duration import seconds
from headrace.core.model import Continuation, Task

PER_MODEL = frozenset({"model", "aliases", "revision", "trust_remote_code"})
"""What is set for one named model and never for all of them."""

# A device and its amount: what it means, the machine knows.
_AMOUNT = re.compile(
    r"(?:([a-z]+(?::\d+)?)=)?(?:\d+(?:\.\d+)? ?(?i:[kmgt]i?b?|b)|(?:100|\d{1,2}(?:\.\d+)?) ?%)"
)


def words(value: object) -> object:
    """Read text as JSON or as words between commas; the environment knows no lists."""
    if not isinstance(value, str):
        return value
    if value.lstrip().startswith(("[", "{")):
        return json.loads(value)
    return [word.strip() for word in value.split(",") if word.strip()]


def _lower(value: object) -> object:
    return value.lower() if isinstance(value, str) else value


def hash_key(key: str) -> str:
    """Return `sha256:<hex>` of a plain API key; one that is hashed already stays as it is.

    Raises:
        ValueError: the key is empty, or its hash is not 64 hexadecimal digits.
    """
    kind, colon, digest = key.partition(":")
    if kind == "sha256" and colon:
        if not re.fullmatch(r"[0-9a-fA-F]{64}", digest):
            raise ValueError("a hashed key is sha256: and 64 hexadecimal digits")
        return key.lower()
    if not key.strip():
        raise ValueError("an API key is not empty")
    return f"sha256:{hashlib.sha256(key.encode()).hexdigest()}"


def _hash_keys(value: object) -> object:
    found = words(value)
    if not isinstance(found, list | tuple):
        return found
    keys = cast("Iterable[object]", found)
    return [hash_key(key) if isinstance(key, str) else key for key in keys]


def _duration(value: object) -> object:
    return seconds(value) if isinstance(value, str | int | float) else value


def _unless_auto(value: object) -> object:
    return None if value == "auto" else value


def _amounts(value: object) -> object:
    found = words(value)
    if not isinstance(found, list | tuple):
        return found
    amounts = [str(one).strip() for one in cast("Iterable[object]", found)]
    devices = [match[1] or "" for match in map(_AMOUNT.fullmatch, amounts) if match]
    if len(devices) < len(amounts):
        raise ValueError("each amount is like 16GiB, 80%, cpu=16GiB or cuda:0=90%")
    if len(set(devices)) < len(devices):
        raise ValueError("a device has two amounts")
    return amounts


Words = Annotated[tuple[str, ...], BeforeValidator(words)]
Keys = Annotated[tuple[str, ...], BeforeValidator(_hash_keys)]


class _Frozen(BaseModel):
    # Inputs stay out of error texts: one of them may be a key.
    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, hide_input_in_errors=True
    )


class ServerSettings(_Frozen):
    """Where `headrace serve` listens, whom it answers and what it accepts."""

    host: str = Field(default="127.0.0.1", description="address to listen on")
    port: int = Field(default=11511, ge=0, le=65535, description="port; 0 takes a free one")
    api_keys: Keys = Field(
        default=(), repr=False, description="keys that may ask, plain or as sha256:<hex>"
    )
    admin_keys: Keys = Field(
        default=(), repr=False, description="keys that may also load, stop and change models"
    )
    allow_public: bool = Field(default=False, description="listen beyond loopback without a key")
    allowed_hosts: Words = Field(default=(), description="further names to be reached by (Host)")
    allowed_origins: Words = Field(default=(), description="web origins that may ask (Origin)")
    max_body_bytes: int = Field(default=8 * 2**20, ge=1024, description="largest request body")
    drain_s: float = Field(default=30.0, ge=0, description="how long answers may finish at the end")
    deadline_s: float | None = Field(
        default=None, gt=0, description="longest time from a request's arrival to its end"
    )
    headers_after_s: float = Field(
        default=5.0,
        gt=0,
        description="wait for a first token before a stream's headers go out",
    )
    memory: Annotated[tuple[str, ...], BeforeValidator(_amounts)] = Field(
        default=(), description="what models may take: 16GiB, 80%, cpu=16GiB, cuda:0=90%"
    )
    max_loading: int = Field(default=1, ge=1, description="models that load at a time")
    min_residence_s: float = Field(
        default=1.0, ge=0, description="how long a loaded model stays at least"
    )
    longest_wait_s: float = Field(
        default=20.0, gt=0, description="wait for room after which busy models take no more"
    )
    load_wait_s: float = Field(
        default=30.0, gt=0, description="how long a request waits for its model to load"
    )
    crashes: int = Field(default=3, ge=1, description="crashes in 60 s that make a model failed")
    spare: bool = Field(
        default=True, description="keep a process ready for the next load, of about 50 MB"
    )
    state: Path | None = Field(
        default=None, description="file of what was done by hand; HOME/services/PORT.json"
    )


class TelemetrySettings(_Frozen):
    """What is kept and told of requests; OpenTelemetry is set up by its own OTEL_ variables."""

    metrics: bool = Field(default=True, description="tell figures at /metrics, for Prometheus")
    metrics_port: int | None = Field(
        default=None, ge=0, le=65535, description="port for /metrics alone; 0 takes a free one"
    )
    metrics_keys: Keys = Field(
        default=(), repr=False, description="keys that may read /metrics and nothing else"
    )
    traces: bool = Field(default=True, description="keep a record of each request in HOME/traces")
    trace_bytes: int = Field(
        default=64 * 2**20, ge=2**16, description="how much of them is kept; the oldest go"
    )
    trace_content: bool = Field(
        default=False, description="keep prompts and answers in traces too, redacted"
    )
    redact: Words = Field(
        default=(), description="regular expressions of what else is redacted in content"
    )
    usage: bool = Field(default=True, description="count tokens and time by key, model and day")

    @property
    def is_on(self) -> bool:
        """Whether anything is kept or told."""
        return self.metrics or self.traces or self.usage

    @field_validator("redact")
    @classmethod
    def _patterns(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is no regular expression: {error}") from None
        return patterns


class ModelSettings(_Frozen):
    """One model; the fields of `headrace.core.model.ModelSpec` without its name."""

    model: str = Field(min_length=1, description="reference: path, hub:, index:, or short name")
    aliases: Words = Field(default=(), description="further names requests may use")
    engine: Annotated[str | None, BeforeValidator(_unless_auto)] = Field(
        default=None, description="engine; auto by format, device and what was measured"
    )
    device: str | None = Field(default=None, description="device; else cuda, mps, cpu")
    context_length: int | None = Field(
        default=None, ge=1, description="prompt and answer, in tokens"
    )
    chat_template: str | None = Field(default=None, description="Jinja source, or @path of a file")
    stop: Words = Field(default=(), description="stop strings of the template")
    max_running: int | None = Field(default=None, ge=1, description="requests at once")
    max_queued: int = Field(default=64, ge=0, description="requests that may wait")
    hang_s: float = Field(default=120.0, gt=0, description="silence that means it hangs")
    load_timeout_s: float = Field(default=600.0, gt=0, description="how long loading may take")
    revision: str | None = Field(default=None, description="commit of the repository")
    trust_remote_code: bool = Field(default=False, description="run code of the model's repository")
    keep_alive: Annotated[float, BeforeValidator(_duration)] = Field(
        default=-1.0, description="how long it stays idle: 5m, 0; -1 until its memory is needed"
    )
    preload: bool = Field(default=True, description="load when the service starts")
    pinned: bool = Field(default=False, description="never give its memory to another")
    enabled: bool = Field(default=True, description="answer requests")
    continuation: Annotated[Continuation, BeforeValidator(_lower)] = Field(
        default="fast", description="how an answer goes on whose worker died: exact, fast, off"
    )
    replicas: int = Field(default=1, ge=1, le=64, description="workers of this model")
    weights: Annotated[tuple[Annotated[float, Field(gt=0)], ...], BeforeValidator(words)] = Field(
        default=(), description="share of work of each replica, 1 if not set"
    )
    task: Annotated[Task | None, BeforeValidator(_lower)] = Field(
        default=None, description="generate, embed or rerank; else by the model's header"
    )
    options: dict[str, Any] = Field(default={}, description="the engine's options")

    @field_validator("weights")
    @classmethod
    def _one_each(cls, weights: tuple[float, ...], info: ValidationInfo) -> tuple[float, ...]:
        # Without `replicas` it was refused already.
        if len(weights) > info.data.get("replicas", len(weights)):
            raise ValueError("more weights than replicas")
        return weights

    @field_validator("trust_remote_code")
    @classmethod
    def _pinned(cls, trusted: bool, info: ValidationInfo) -> bool:
        revision = info.data.get("revision") or info.data.get("model", "").rpartition("@")[2]
        if trusted and not re.fullmatch(r"[0-9a-f]{40}", revision):
            raise ValueError("needs `revision`, a commit of 40 digits")
        return trusted


class Config(_Frozen):
    """All settings of one run."""

    home: Path = Field(description="where models and state are kept")
    default_model: str = Field(
        default="smollm2", min_length=1, description="model when none is named"
    )
    log_level: Annotated[Literal["debug", "info", "warning", "error"], BeforeValidator(_lower)] = (
        Field(default="info", description="least level that is logged, on stderr")
    )
    log_format: Annotated[Literal["text", "json"], BeforeValidator(_lower)] = Field(
        default="text", description="one line of text or of JSON for each record"
    )
    log_content: bool = Field(default=False, description="log prompts and answers too")
    server: ServerSettings = ServerSettings()
    telemetry: TelemetrySettings = TelemetrySettings()
    models: dict[str, ModelSettings] = {}

    @property
    def state_file(self) -> Path | None:
        """Where a service remembers what was done by hand; None when its port is not its own."""
        if self.server.state is not None or self.server.port == 0:
            return self.server.state
        return self.home / "services" / f"{self.server.port}.json"


TABLES: dict[str, type[BaseModel]] = {"server": ServerSettings, "telemetry": TelemetrySettings}
"""The tables of the file beside the models."""
