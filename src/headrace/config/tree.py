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

PER_MODEL = frozenset({"model", "aliases", "revision", "trust_remote_code"})
"""What is set for one named model and never for all of them."""

_SECRET_WORDS = frozenset({"key", "keys", "token", "secret", "password"})


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


Words = Annotated[tuple[str, ...], BeforeValidator(words)]


class _Frozen(BaseModel):
    # Inputs stay out of error texts: one of them may be a key.
    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, hide_input_in_errors=True
    )


class ServerSettings(_Frozen):
    """Where `headrace serve` listens, whom it answers and what it accepts."""

    host: str = Field(default="127.0.0.1", description="address to listen on")
    port: int = Field(default=11511, ge=0, le=65535, description="port; 0 takes a free one")
    api_keys: Annotated[tuple[str, ...], BeforeValidator(_hash_keys)] = Field(
        default=(), repr=False, description="keys that may ask, plain or as sha256:<hex>"
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


class ModelSettings(_Frozen):
    """One model; the fields of `headrace.core.model.ModelSpec` without its name."""

    model: str = Field(min_length=1, description="reference: path, hub:, index:, or short name")
    aliases: Words = Field(default=(), description="further names requests may use")
    engine: str | None = Field(default=None, description="engine; by format if not set")
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
    options: dict[str, Any] = Field(default={}, description="the engine's options")

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
    models: dict[str, ModelSettings] = {}


def masked(key: str, value: Any) -> Any:
    """Return a value as JSON to be printed; of a secret the first digits of its hash, if any."""
    if isinstance(value, list | tuple):
        return [masked(key, item) for item in cast("Iterable[Any]", value)]
    if not value or key.rpartition(".")[2].rpartition("_")[2] not in _SECRET_WORDS:
        return str(value) if isinstance(value, Path) else value
    text = str(value)
    return f"{text[:11]}…" if text.startswith("sha256:") else "…"
