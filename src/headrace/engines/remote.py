"""What engines for upstreams have in common: address and key, and what a refusal means.

Only the connection sees a key. It is removed from all that an upstream says before that goes any
further.
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
from headrace.core.model import Capabilities
from headrace.core.request import CountRequest, EmbedRequest, GenerateRequest, RerankRequest
from headrace.core.status import Footprint
from headrace.engines.base import EngineFacts, EngineOptions, OpenRequest
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
    """Where the upstream is, how one gets in, and how long it may take."""

    model_config = ConfigDict(hide_input_in_errors=True)

    base_url: str | None = Field(
        None, max_length=2048, description="Address of the API; the provider's if not set."
    )
    api_key: SecretStr | None = Field(None, description="The key; better is `api_key_env`.")
    api_key_env: str | None = Field(
        None,
        pattern=f"^{_VARIABLE}$",
        description="Variable with the key; the provider's own where `base_url` is not set.",
    )
    max_retries: int = Field(
        2, ge=0, le=10, description="Further tries before the first byte of an answer."
    )
    connect_s: float = Field(10.0, gt=0, le=600, description="Longest time to connect.")
    first_token_s: float = Field(
        120.0, gt=0, le=86400, description="Longest time to the first token, retries included."
    )
    stall_s: float = Field(
        60.0, gt=0, le=86400, description="Longest silence after the first token."
    )


class Access(msgspec.Struct, frozen=True, kw_only=True):
    """A way in: the provider, the address without a slash at its end, and the key."""

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
        ConfigError: the engine cannot speak to it.
    """
    provider = PROVIDERS.get(request.model.provider or "")
    if provider is None or provider.engine != engine:
        able = ", ".join(name for name, row in PROVIDERS.items() if row.engine == engine)
        raise ConfigError(f"Engine {engine} speaks to {able}.", param="engine")
    return provider


def access(provider: Provider, options: RemoteOptions) -> Access:
    """Return the way to the upstream.

    Raises:
        ConfigError: the address is none, or there is no key where one is needed.
    """
    url = options.base_url or provider.base_url
    if url is None:
        raise ConfigError(f"{provider.title} needs the option base_url.", param="base_url")
    return Access(provider=provider, base_url=_checked(url), key=_key(provider, options))


def _checked(url: str) -> str:
    try:
        parts = urlsplit(url)
        sound = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        sound = False
        parts = urlsplit("")
    if not sound or not url.isprintable() or " " in url:
        raise ConfigError("base_url is an address that begins with http(s)://.", param="base_url")
    if parts.username is not None or parts.query or parts.fragment:
        raise ConfigError("base_url has no key, no ? and no # in it.", param="base_url")
    return url.rstrip("/")


def _key(provider: Provider, options: RemoteOptions) -> SecretStr | None:
    # A key goes to the address that it is for: not to another one by default.
    usual = provider.key if options.base_url is None or provider.base_url is None else None
    variable = options.api_key_env or usual
    if options.api_key is not None:
        key = options.api_key.get_secret_value()
    else:
        key = os.environ.get(variable, "").strip() if variable else ""
    needed = options.api_key_env is not None or (usual is not None and not provider.open)
    if not key:
        if needed:
            raise ConfigError(
                f"{provider.title}: no key. Set the variable {variable}, or name another in the "
                "option api_key_env.",
                param="api_key_env",
            )
        return None
    if not re.fullmatch(r"[!-~]+", key):
        # The HTTP library would put it in its error.
        raise ConfigError(f"{provider.title}: the key has characters that no key has.")
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
        ConfigError: the provider has nothing for the task.
    """
    if request.task not in provider.tasks:
        raise ConfigError(
            f"{provider.title} has no models for the task {request.task}; "
            f"it has {', '.join(provider.tasks)}.",
            param="task",
        )
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


def check_plain(request: GenerateRequest, provider: Provider, sampling: frozenset[str]) -> None:
    """Refuse what no upstream, or not this one, can do.

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


def trace_headers(request: GenerateRequest | EmbedRequest | RerankRequest) -> dict[str, str]:
    """Return the headers by which an upstream joins the trace of a request."""
    headers = {"traceparent": request.traceparent, "tracestate": request.tracestate}
    return {name: value for name, value in headers.items() if value and request.traceparent}


def estimate(text: str) -> int:
    """Guess how many tokens a text has."""
    return -(-len(text.encode()) // _BYTES_PER_TOKEN)


def estimated_count(request: CountRequest | GenerateRequest) -> TokenCount:
    """Guess how many tokens a request has."""
    text = request.text if isinstance(request, CountRequest) else request.prompt
    if isinstance(text, tuple):
        return TokenCount(count=len(text), token_ids=text)
    messages = request.messages or ()
    count = estimate(text or "") + sum(
        _TOKENS_PER_MESSAGE + estimate(message.content) for message in messages
    )
    return TokenCount(count=count, estimated=True)


class _Fault(msgspec.Struct, frozen=True):
    message: Any = None
    code: Any = None
    type: Any = None
    param: Any = None


def fault_of(body: Any) -> _Fault:
    """Read an error object as OpenAI's, FastAPI's or a gateway's; take any other as text."""
    inner = body
    while isinstance(inner, dict):
        fields = cast("dict[str, Any]", inner)
        deeper = next(
            (fields[key] for key in ("error", "detail") if isinstance(fields.get(key), dict)), None
        )
        if deeper is None:
            text = next((fields[key] for key in _TEXTS if fields.get(key)), fields)
            return _Fault(text, fields.get("code"), fields.get("type"), fields.get("param"))
        inner = deeper
    return _Fault(inner)


def refusal(
    way: Access, status: int, body: Any, retry_after_s: float | None = None
) -> HeadraceError:
    """Return what an upstream's answer means for the request.

    Its text goes to the client only where the client can mend the request.
    """
    fault, title = fault_of(body), way.provider.title
    text = way.scrub(str(fault.message or ""))
    if status in (400, 413, 422):
        return _wrong_request(fault, f"{title}: {text or f'status {status}'}")
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
        return UpstreamError(f"{title} points elsewhere, which is not followed.", detail=detail)
    return UpstreamError(
        f"{title} failed with status {status}.", detail=detail, retry_after_s=retry_after_s
    )


def _wrong_request(fault: _Fault, message: str) -> HeadraceError:
    param = fault.param if isinstance(fault.param, str) else None
    if fault.code in _TOO_LONG or fault.type in _TOO_LONG:
        return ContextOverflow(message, param=param or "messages")
    if fault.code in _UNKNOWN_FIELD:
        return Unsupported(message, param=param)
    return InvalidRequest(message, param=param)


def complaint(way: Access, body: Any) -> HeadraceError:
    """Return what an error object inside of an answer that began well means."""
    fault, title = fault_of(body), way.provider.title
    detail = way.scrub(str(fault.message or ""))
    if str(fault.code) in _BUSY or fault.type in _BUSY:
        return CapacityError(f"{title} broke off: it is overloaded.", detail=detail)
    return UpstreamError(f"{title} broke off with an error.", detail=detail)


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Return what `retry-after-ms` or `Retry-After` ask for, in seconds."""
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


class Patience:
    """How long one answer may still stay silent."""

    def __init__(self, options: RemoteOptions) -> None:
        self._options = options
        self._clock = asyncio.get_running_loop().time
        self._began = False
        self.until = self._clock() + options.first_token_s

    def sign(self, *, token: bool) -> None:
        """Note a sign of life; before the first token, only a token counts."""
        self._began = self._began or token
        if self._began:
            self.until = self._clock() + self._options.stall_s

    async def wait(self, step: Awaitable[T]) -> T:
        """Wait for the next sign of life.

        Raises:
            UpstreamError: it has been silent for too long.
        """
        limit = asyncio.timeout_at(self.until)
        try:
            async with limit:
                return await step
        except TimeoutError:
            if not limit.expired():
                raise
        raise UpstreamError(self._complaint())

    def _complaint(self) -> str:
        options = self._options
        if self._began:
            return f"The upstream fell silent for {options.stall_s:g} s in its answer."
        return f"The upstream sent no token within {options.first_token_s:g} s."


class Shared(Generic[T]):
    """Connections that models of one upstream use together; the last one to leave closes them.

    Each event loop has its own.
    """

    def __init__(self, close: Callable[[T], Awaitable[None]]) -> None:
        self._close = close
        self._open: dict[object, tuple[T, int]] = {}

    def take(self, key: object, make: Callable[[], T]) -> T:
        """Return what is open under a key, or open it."""
        place = (asyncio.get_running_loop(), key)
        shared, users = self._open.get(place) or (make(), 0)
        self._open[place] = (shared, users + 1)
        return shared

    async def give_back(self, key: object) -> None:
        """Release what `take` gave."""
        place = (asyncio.get_running_loop(), key)
        shared, users = self._open.pop(place)
        if users > 1:
            self._open[place] = (shared, users - 1)
        else:
            await self._close(shared)
