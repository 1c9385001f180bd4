"""The settings, with their accepted values and defaults.

Those of a model are declared in headrace.core.model, and get their validators here.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, cast, get_args, get_origin

import msgspec
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    create_model,
    field_validator,
)

from headrace.config.cluster import ClusterSettings
from headrace.config.dbgpt import DbgptSettings
from headrace.config.fields import FIXED, Fixed, Frozen, Words, host_text, lower, words
from headrace.core.model import SETTINGS, ModelSpec, Setting

# A device and its amount, which headrace.machine turns into bytes.
_AMOUNT = re.compile(
    r"(?:([a-z]+(?::\d+)?)=)?(?:\d+(?:\.\d+)? ?(?i:[kmgt]i?b?|b)|(?:100|\d{1,2}(?:\.\d+)?) ?%)"
)


def hash_key(key: str) -> str:
    """Return `sha256:<hex>` of a plain API key; a hashed key is returned unchanged.

    Raises:
        ValueError: the key is empty, or its hash is malformed.
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
    items = words(value)
    if not isinstance(items, list | tuple):
        return items
    keys = cast("Iterable[object]", items)
    return [hash_key(key) if isinstance(key, str) else key for key in keys]


def _amounts(value: object) -> object:
    items = words(value)
    if not isinstance(items, list | tuple):
        return items
    amounts = [str(item).strip() for item in cast("Iterable[object]", items)]
    devices = [match[1] or "" for match in map(_AMOUNT.fullmatch, amounts) if match]
    if len(devices) < len(amounts):
        raise ValueError("each amount is like 16GiB, 80%, cpu=16GiB or cuda:0=90%")
    if len(set(devices)) < len(devices):
        raise ValueError("a device has two amounts")
    return amounts


def _database(address: str | None) -> str | None:
    scheme, colon, _ = (address or "").partition("://")
    if colon and scheme not in {"postgresql", "postgres", "sqlite"}:
        raise ValueError("it is the path of an SQLite file, or postgresql://HOST/NAME")
    return address


Keys = Annotated[tuple[str, ...], BeforeValidator(_hash_keys)]


_MOST_FRONTS = 8


def _fronts(value: object) -> object:
    text = str(value).lower()
    if text == "auto" or (text.isdecimal() and 1 <= int(text) <= _MOST_FRONTS):
        return text if text == "auto" else int(text)
    raise ValueError(f"must be a number from 1 to {_MOST_FRONTS}, or auto")


class HttpSettings(Frozen):
    """The address of `headrace serve`, its keys, and what it accepts."""

    host: Fixed[Annotated[str, AfterValidator(host_text)]] = Field(
        default="127.0.0.1", description="address to listen on; `::` is every one, IPv4 too"
    )
    port: Fixed[int] = Field(default=11511, ge=0, le=65535, description="port; 0 takes a free one")
    ollama_port: Fixed[int | None] = Field(
        default=None,
        ge=0,
        le=65535,
        description="a second port, for clients that look for Ollama on 11434",
    )
    fronts: Fixed[Annotated[int | Literal["auto"], BeforeValidator(_fronts)]] = Field(
        default="auto", description="processes for connections; auto: 1 below 16 cores, at most 4"
    )
    api_keys: Keys = Field(
        default=(), repr=False, description="keys of clients, plain or as sha256:<hex>"
    )
    admin_keys: Keys = Field(
        default=(), repr=False, description="keys that may also load, stop and change models"
    )
    allow_public: bool = Field(default=False, description="listen beyond loopback without a key")
    allowed_hosts: Words = Field(default=(), description="further names of this server (Host)")
    allowed_origins: Words = Field(default=(), description="allowed web origins (Origin)")
    max_idle_connections: Fixed[int] = Field(
        default=1024, ge=1, description="connections of one address without a running request"
    )
    max_body_bytes: int = Field(default=8 * 2**20, ge=1024, description="largest request body")
    max_image_body_bytes: int = Field(
        default=32 * 2**20, ge=1024, description="largest body of a chat with images or audio"
    )
    media_hosts: Words = Field(
        default=(), description="hosts that media are fetched from: example.org, *.example.org, *"
    )
    deadline_s: float | None = Field(
        default=None, gt=0, description="longest time from a request's arrival to its end"
    )
    headers_after_s: float = Field(
        default=5.0,
        gt=0,
        description="wait for a first token before a stream's headers go out",
    )
    load_wait_s: float = Field(
        default=30.0, gt=0, description="how long a request waits for its model to load"
    )
    max_keep_alive_s: float = Field(
        default=3600.0,
        ge=0,
        le=366 * 86400,
        description="longest keep_alive of a request, once there are keys, without an admin's",
    )
    reasoning_field: Annotated[
        Literal["reasoning_content", "reasoning", "both"], BeforeValidator(lower)
    ] = Field(
        default="reasoning_content",
        description="field of the thinking in chat answers: reasoning_content, reasoning, both",
    )
    unknown_fields: Annotated[Literal["ignore", "warn", "refuse"], BeforeValidator(lower)] = Field(
        default="warn", description="unknown fields of a request: ignore, warn, refuse"
    )
    list_aliases: bool = Field(
        default=False, description="list each alias as a model of its own at /v1/models"
    )
    console: bool = Field(default=True, description="serve the console at / and the page /docs")
    max_batch_bytes: int = Field(
        default=4 * 2**30, ge=0, description="files of batches in all; 0 switches batches off"
    )


class Rules(Frozen):
    """The rules that the pool of models applies.

    A loaded model stays for `min_residence_s`, or as long as its load took if that is longer,
    unless another has waited for `longest_wait_s`. A model whose worker dies `crashes` times
    within `crash_window_s` has failed until it is reset.
    """

    crash_window_s: ClassVar[float] = 60.0

    max_loading: int = Field(default=1, ge=1, description="models that load at a time")
    min_residence_s: float = Field(
        default=1.0, ge=0, description="how long a loaded model stays at least"
    )
    longest_wait_s: float = Field(
        default=20.0, gt=0, description="wait for memory after which busy models accept no more"
    )
    crashes: int = Field(default=3, ge=1, description="crashes in 60 s that make a model failed")
    spare: bool = Field(
        default=True, description="keep a process ready for the next load, of about 50 MB"
    )


class ServerSettings(Rules, HttpSettings):
    """The table `[server]`."""

    drain_s: float = Field(default=30.0, ge=0, description="time for answers to finish at the end")
    memory: Annotated[tuple[str, ...], BeforeValidator(_amounts)] = Field(
        default=(), description="memory for models: 16GiB, 80%, cpu=16GiB, cuda:0=90%"
    )
    confine: Fixed[Annotated[Literal["auto", "off"], BeforeValidator(lower)]] = Field(
        default="auto", description="take from models' processes what they do not need"
    )
    state: Fixed[Path | None] = Field(
        default=None, description="file of changes at run time; HOME/services/PORT.json"
    )
    database: Fixed[Annotated[str | None, AfterValidator(_database)]] = Field(
        default=None,
        repr=False,
        description="keys with limits: an SQLite file (HOME/keys.sqlite3), or postgresql://...",
    )
    database_down: Fixed[Annotated[Literal["refuse", "cached"], BeforeValidator(lower)]] = Field(
        default="refuse",
        description="requests with its keys while the database is down: refuse, cached",
    )


class TelemetrySettings(Frozen):
    """The records of requests; OpenTelemetry is configured by its own OTEL_ variables."""

    metrics: Fixed[bool] = Field(
        default=True, description="serve metrics at /metrics, for Prometheus"
    )
    metrics_port: Fixed[int | None] = Field(
        default=None, ge=0, le=65535, description="port for /metrics only; 0 takes a free one"
    )
    # The keys are looked up for each request, so they can change.
    metrics_keys: Keys = Field(
        default=(), repr=False, description="keys that may read /metrics and nothing else"
    )
    traces: Fixed[bool] = Field(
        default=True, description="keep a record of each request in HOME/traces"
    )
    trace_bytes: Fixed[int] = Field(
        default=64 * 2**20, ge=2**16, description="size of the traces; the oldest are deleted"
    )
    trace_content: Fixed[bool] = Field(
        default=False, description="keep prompts and answers in traces too, redacted"
    )
    redact: Fixed[Words] = Field(
        default=(), description="regular expressions of further text to redact"
    )
    usage: Fixed[bool] = Field(
        default=True, description="count tokens and time by key, model and day"
    )

    @property
    def is_on(self) -> bool:
        """Whether anything is recorded."""
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


class _ModelRules(Frozen):
    """Rules between the settings of a model."""

    @field_validator("weights", check_fields=False)
    @classmethod
    def _one_each(cls, weights: tuple[float, ...], info: ValidationInfo) -> tuple[float, ...]:
        # Without `replicas` it was refused already.
        if len(weights) > info.data.get("replicas", len(weights)):
            raise ValueError("more weights than replicas")
        if not all(weight > 0 for weight in weights):
            raise ValueError("a weight is greater than 0")
        return weights

    @field_validator("trust_remote_code", check_fields=False)
    @classmethod
    def _pinned(cls, trusted: bool, info: ValidationInfo) -> bool:
        revision = info.data.get("revision") or info.data.get("model", "").rpartition("@")[2]
        if trusted and not re.fullmatch(r"[0-9a-f]{40}", revision):
            raise ValueError("needs `revision`, a commit of 40 digits")
        return trusted


def is_collection(hint: Any) -> bool:
    """Whether a type is a list, a tuple, a mapping or the like, or may be one."""
    return _may_be(hint, (list, tuple, set, frozenset, dict, Sequence, Mapping))


def _may_be(hint: Any, kinds: Iterable[object]) -> bool:
    parts = get_args(hint)
    return (get_origin(hint) or hint) in kinds or any(_may_be(part, kinds) for part in parts)


def _parser(hint: Any, setting: Setting) -> Callable[[object], object]:
    if setting.parse is not None:
        return setting.parse
    if _may_be(hint, (tuple,)):
        return words
    return lower if _may_be(hint, (Literal,)) else lambda value: value


def _field(field: msgspec.structs.FieldInfo) -> tuple[Any, Any]:
    """Return a setting of a model as pydantic declares a field."""
    setting = SETTINGS[field.name]
    plain = get_args(field.type)[0]
    names = ("ge", "gt", "le", "min_length")
    bounds = {name: bound for name in names if (bound := getattr(setting, name)) is not None}
    checked = Annotated[plain, BeforeValidator(_parser(plain, setting)), Field(**bounds)]
    if field.default_factory is not msgspec.NODEFAULT:
        return checked, Field(default_factory=field.default_factory)
    return checked, ... if field.default is msgspec.NODEFAULT else field.default


_FIELDS: dict[str, Any] = {
    field.name: _field(field)
    for field in msgspec.structs.fields(ModelSpec)
    if field.name in SETTINGS
}
ModelSettings: type[BaseModel] = create_model("ModelSettings", __base__=_ModelRules, **_FIELDS)
"""Checks the settings of a model, which are those of `ModelSpec`."""


class Config(Frozen):
    """All settings of one run."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    home: Fixed[Path] = Field(description="where models and state are kept")
    default_model: str = Field(
        default="smollm2", min_length=1, description="model when none is named"
    )
    log_level: Annotated[Literal["debug", "info", "warning", "error"], BeforeValidator(lower)] = (
        Field(default="info", description="lowest level that is logged, to stderr")
    )
    log_format: Annotated[Literal["text", "json"], BeforeValidator(lower)] = Field(
        default="text", description="one line of text or of JSON for each record"
    )
    log_content: bool = Field(default=False, description="log prompts and answers too")
    server: ServerSettings = ServerSettings()
    telemetry: TelemetrySettings = TelemetrySettings()
    dbgpt: DbgptSettings = DbgptSettings()
    cluster: ClusterSettings = ClusterSettings()
    models: dict[str, ModelSpec] = Field(default={})

    @property
    def state_file(self) -> Path | None:
        """File of the changes made at run time; None when the port is any free one."""
        if self.server.state is not None or self.server.port == 0:
            return self.server.state
        return self.home / "services" / f"{self.server.port}.json"

    @property
    def batch_folder(self) -> Path:
        """Folder of the batches of this service."""
        return self.home / "batches" / str(self.server.port)


TABLES: dict[str, type[Frozen]] = {
    "server": ServerSettings,
    "telemetry": TelemetrySettings,
    "dbgpt": DbgptSettings,
    "cluster": ClusterSettings,
}
"""The tables of the file other than the models."""


def fixed_keys() -> Iterator[str]:
    """Yield the keys that a running service cannot change."""
    for prefix, table in [("", Config), *((f"{name}.", kind) for name, kind in TABLES.items())]:
        fields = table.model_fields.items()
        yield from (prefix + name for name, field in fields if FIXED in field.metadata)
