"""Shared by the engines for upstreams: access, errors, timeouts and connections.

A key is used by the connection only. It is removed from all texts of an upstream.
"""

from __future__ import annotations

import asyncio
import math
import os
import re
import time
from collections.abc import Awaitable, Callable, Mapping
from email.utils import parsedate_to_datetime
from typing import Any, Generic, TypeVar, cast
from urllib.parse import urlsplit

import msgspec
from pydantic import ConfigDict, Field, SecretStr

from headrace.core.errors import (
    CapacityError,
    ConfigError,
    ContextOverflow,
    HeadraceError,
    InvalidRequest,
    Unsupported,
    UpstreamError,
)
from headrace.core.events import TokenCount
from headrace.core.media import Audio, Content, Part, as_base64, media_of, text_of
from headrace.core.model import Capabilities
from headrace.core.request import CountRequest, GenerateRequest, Request
from headrace.core.status import Footprint
from headrace.engines.base import EngineFacts, EngineOptions, OpenRequest, check_task
from headrace.models.providers import PROVIDERS, Provider

T = TypeVar("T")

MAX_RUNNING = 64
LONGEST_RETRY_S = 30.0
RETRIED = frozenset({408, 409, 429, 500, 502, 503, 504, 529})
_LONGEST_MESSAGE = 300
_BYTES_PER_TOKEN = 4
_TOKENS_PER_MESSAGE = 4
_VARIABLE = r"[A-Za-z_][A-Za-z0-9_]*"
_TEXTS = ("message", "error", "detail", "msg")
_TOO_LONG = ("context_length_exceeded", "exceed_context_size_error")
_UNKNOWN_FIELD = ("unsupported_parameter", "unsupported_value")
_BUSY = ("rate_limit_exceeded", "rate_limit_error", "overloaded_error", "overloaded", "429", "503")


class RemoteOptions(EngineOptions):
    """Address, key and timeouts of an upstream."""

    model_config = ConfigDict(hide_input_in_errors=True)

    base_url: str | None = Field(
        None, max_length=2048, description="Address of the API; the provider's if not set."
    )
    api_key: SecretStr | None = Field(None, description="The key; `api_key_env` is safer.")
    api_key_env: str | None = Field(
        None,
        pattern=f"^{_VARIABLE}$",
        description="Variable with the key; the provider's own where `base_url` is not set.",
    )
    max_retries: int = Field(
        2, ge=0, le=10, description="Retries before the first byte of an answer."
    )
    connect_s: float = Field(10.0, gt=0, le=600, description="Longest time to connect.")
    first_token_s: float = Field(
        120.0, gt=0, le=86400, description="Longest time to the first token, retries included."
    )
    stall_s: float = Field(
        60.0, gt=0, le=86400, description="Longest silence after the first token."
    )


class Access(msgspec.Struct, frozen=True, kw_only=True):
    """The provider, the address without a final slash, and the key."""

    provider: Provider
    base_url: str
    key: SecretStr | None

    def scrub(self, text: str) -> str:
        """Return a text on one line, shortened and without the key."""
        secret = self.key.get_secret_value() if self.key else ""
        text = text.replace(secret, "…") if secret else text
        short = " ".join(text.split())
        return f"{short[:_LONGEST_MESSAGE]}…" if len(short) > _LONGEST_MESSAGE else short


def provider_of(request: OpenRequest, engine: str) -> Provider:
    """Return the provider of a remote model.

    Raises:
        ConfigError: the engine does not support it.
    """
    provider = PROVIDERS.get(request.model.provider or "")
    if provider is None or provider.engine != engine:
        names = ", ".join(name for name, row in PROVIDERS.items() if row.engine == engine)
        raise ConfigError(f"Engine {engine} speaks to {names}.", param="engine")
    return provider


def access(provider: Provider, options: RemoteOptions) -> Access:
    """Return how to reach the upstream.

    Raises:
        ConfigError: the address is invalid, or a required key is missing.
    """
    url = options.base_url or provider.base_url
    if url is None:
        raise ConfigError(f"{provider.title} needs the option base_url.", param="base_url")
    return Access(provider=provider, base_url=_checked(url), key=_key(provider, options))


def _checked(url: str) -> str:
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        valid = False
        parts = urlsplit("")
    if not valid or not url.isprintable() or " " in url:
        raise ConfigError("base_url is an address that begins with http(s)://.", param="base_url")
    if parts.username is not None or parts.query or parts.fragment:
        raise ConfigError("base_url has no key, no ? and no # in it.", param="base_url")
    return url.rstrip("/")


def _key(provider: Provider, options: RemoteOptions) -> SecretStr | None:
    # By default, a provider's key is sent to the provider's own address only.
    default = provider.key if options.base_url is None or provider.base_url is None else None
    variable = options.api_key_env or default
    if options.api_key is not None:
        key = options.api_key.get_secret_value()
    else:
        key = os.environ.get(variable, "").strip() if variable else ""
    needed = options.api_key_env is not None or (default is not None and not provider.open)
    if not key:
        if needed:
            raise ConfigError(
                f"{provider.title}: no key. Set the variable {variable}, or name another in the "
                "option api_key_env.",
                param="api_key_env",
            )
        return None
    if not re.fullmatch(r"[!-~]+", key):
        # The HTTP library's error would contain it.
        raise ConfigError(f"{provider.title}: the key has characters that are not allowed.")
    return SecretStr(key)


def footprint(request: OpenRequest) -> Footprint:
    """Return what a remote model takes of this machine: no memory."""
    return Footprint(
        devices={},
        context_length=request.context_length,
        max_running=request.max_running or MAX_RUNNING,
    )


def facts(request: OpenRequest, provider: Provider, capabilities: Capabilities) -> EngineFacts:
    """Return what is known of a remote model; a context length of 0 is unknown.

    Raises:
        ConfigError: the provider has no models for the task.
    """
    check_task(request.task, provider.title, provider.tasks)
    notes = () if provider.checked else (f"what is known of {provider.title} was not verified",)
    return EngineFacts(
        device="remote",
        context_length=request.context_length or 0,
        max_running=request.max_running or MAX_RUNNING,
        capabilities=msgspec.structs.replace(
            capabilities, chat=request.task == "generate", tasks=frozenset({request.task})
        ),
        notes=notes,
    )


def check_supported(request: GenerateRequest, provider: Provider, sampling: frozenset[str]) -> None:
    """Check for fields that no upstream, or not this one, supports.

    Raises:
        Unsupported: naming the field.
    """
    if request.context_length is not None:
        raise Unsupported("An upstream's context cannot be shortened.", param="context_length")
    if request.n > 1 and "n" not in sampling:
        raise Unsupported(f"{provider.title} gives one choice at a time.", param="n")
    if request.template_options and not provider.template_options:
        raise Unsupported(
            f"{provider.title} takes no options of the chat template.", param="chat_template_kwargs"
        )


def blocks(content: Content, media: Mapping[str, bytes]) -> str | list[dict[str, Any]]:
    """Return a content in the form of Anthropic's API; `media` are the bytes of its images."""
    if isinstance(content, str):
        return content
    return [_block(part, media) for part in content if part]


def _block(part: Part, media: Mapping[str, bytes]) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if isinstance(part, Audio):
        raise Unsupported("Anthropic's API takes no audio.", param=part.place or "messages")
    source = {"type": "base64", "media_type": f"image/{part.format}"}
    return {"type": "image", "source": source | {"data": as_base64(part, media)}}


def trace_headers(request: Request) -> dict[str, str]:
    """Return the headers by which an upstream joins the trace of a request."""
    headers = {"traceparent": request.traceparent, "tracestate": request.tracestate}
    return {name: value for name, value in headers.items() if value and request.traceparent}


def estimate(text: str) -> int:
    """Estimate the tokens of a text."""
    return -(-len(text.encode()) // _BYTES_PER_TOKEN)


def estimated_count(request: CountRequest | GenerateRequest) -> TokenCount:
    """Estimate the tokens of a request."""
    text = request.text if isinstance(request, CountRequest) else request.prompt
    if isinstance(text, tuple):
        return TokenCount(count=len(text), token_ids=text)
    messages = request.messages or ()
    count = estimate(text or "") + sum(
        _TOKENS_PER_MESSAGE
        + estimate(text_of(message.content))
        + sum(part.tokens for part in media_of(message.content))
        for message in messages
    )
    return TokenCount(count=count, estimated=True)


class _ErrorBody(msgspec.Struct, frozen=True):
    message: Any = None
    code: Any = None
    type: Any = None
    param: Any = None


def parse_error(body: Any) -> _ErrorBody:
    """Parse an error object of OpenAI, FastAPI or a gateway; any other becomes the message."""
    value = body
    while isinstance(value, dict):
        fields = cast("dict[str, Any]", value)
        nested = next(
            (fields[key] for key in ("error", "detail") if isinstance(fields.get(key), dict)), None
        )
        if nested is None:
            text = next((fields[key] for key in _TEXTS if fields.get(key)), fields)
            return _ErrorBody(text, fields.get("code"), fields.get("type"), fields.get("param"))
        value = nested
    return _ErrorBody(value)


def status_error(
    access: Access, status: int, body: Any, retry_after_s: float | None = None
) -> HeadraceError:
    """Return the error for an upstream's status.

    The upstream's text goes to the client only where the client can correct the request.
    """
    error, title = parse_error(body), access.provider.title
    text = access.scrub(str(error.message or ""))
    if status in (400, 413, 422):
        return _request_error(error, f"{title}: {text or f'status {status}'}")
    detail = f"status {status}: {text}"
    if status in (401, 403):
        return UpstreamError(f"{title} refuses the key that is configured.", detail=detail)
    if status == 404:
        return UpstreamError(f"{title} knows no such model or address.", detail=detail)
    if status == 429:
        return CapacityError(
            f"{title} takes no more requests now.", detail=detail, retry_after_s=retry_after_s
        )
    if 300 <= status < 400:
        return UpstreamError(f"{title} redirects, which is not followed.", detail=detail)
    return UpstreamError(
        f"{title} failed with status {status}.", detail=detail, retry_after_s=retry_after_s
    )


def _request_error(error: _ErrorBody, message: str) -> HeadraceError:
    # vLLM's place for forms of an answer.
    param = str(error.param).removeprefix("structured_outputs.") if error.param else None
    if error.code in _TOO_LONG or error.type in _TOO_LONG:
        return ContextOverflow(message, param=param or "messages")
    if error.code in _UNKNOWN_FIELD:
        return Unsupported(message, param=param)
    return InvalidRequest(message, param=param)


def stream_error(access: Access, body: Any) -> HeadraceError:
    """Return the error for an error object within a stream."""
    error, title = parse_error(body), access.provider.title
    detail = access.scrub(str(error.message or ""))
    if str(error.code) in _BUSY or error.type in _BUSY:
        return CapacityError(f"{title} broke off: it is overloaded.", detail=detail)
    return UpstreamError(f"{title} broke off with an error.", detail=detail)


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Return the time in `retry-after-ms` or `Retry-After`, in seconds."""
    for name, scale in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        if text := headers.get(name, "").strip():
            return _seconds(text, scale)
    return None


def _seconds(text: str, scale: float) -> float | None:
    try:
        amount = float(text) * scale
    except ValueError:
        try:
            amount = parsedate_to_datetime(text).timestamp() - time.time()
        except (ValueError, TypeError):
            return None
    return max(0.0, amount) if math.isfinite(amount) else None


class SilenceTimer:
    """Limits the time to an answer's first token, and the pauses after it."""

    def __init__(self, options: RemoteOptions) -> None:
        self._options = options
        self._clock = asyncio.get_running_loop().time
        self._has_token = False
        self._deadline = self._clock() + options.first_token_s

    def reset(self, *, token: bool) -> None:
        """Restart the timer for an event; before the first token, only for a token."""
        self._has_token = self._has_token or token
        if self._has_token:
            self._deadline = self._clock() + self._options.stall_s

    def end_within(self, seconds: float) -> None:
        """Let the deadline be no later than this, for the rest of a complete answer."""
        self._deadline = min(self._deadline, self._clock() + seconds)

    async def wait(self, step: Awaitable[T]) -> T:
        """Wait for a step of the answer.

        Raises:
            UpstreamError: the time is over.
        """
        limit = asyncio.timeout_at(self._deadline)
        try:
            async with limit:
                return await step
        except TimeoutError:
            if not limit.expired():
                raise
        raise UpstreamError(self._message())

    def _message(self) -> str:
        options = self._options
        if self._has_token:
            return f"The upstream fell silent for {options.stall_s:g} s in its answer."
        return f"The upstream sent no token within {options.first_token_s:g} s."


class Shared(Generic[T]):
    """Connections by key, shared by the models of an upstream until the last one releases them.

    Each event loop has its own.
    """

    def __init__(self, close: Callable[[T], Awaitable[None]]) -> None:
        self._close = close
        self._open: dict[object, tuple[T, int]] = {}

    def acquire(self, key: object, make: Callable[[], T]) -> T:
        """Return the connection with a key, which is made if there is none."""
        key_in_loop = (asyncio.get_running_loop(), key)
        shared, users = self._open.get(key_in_loop) or (make(), 0)
        self._open[key_in_loop] = (shared, users + 1)
        return shared

    async def release(self, key: object) -> None:
        """Release the connection of `acquire`; close it with its last user."""
        key_in_loop = (asyncio.get_running_loop(), key)
        shared, users = self._open.pop(key_in_loop)
        if users > 1:
            self._open[key_in_loop] = (shared, users - 1)
        else:
            await self._close(shared)
