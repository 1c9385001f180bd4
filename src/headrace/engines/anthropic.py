"""Anthropic's models, through its own library."""

from __future__ import annotations

import base64
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any, Literal

import msgspec
from pydantic import Field

from headrace.core.constraint import Constraint
from headrace.core.errors import HeadraceError, InvalidRequest, Unsupported, UpstreamError
from headrace.core.events import Delta, FinishReason, TokenCount
from headrace.core.media import Part, images_of, text_of
from headrace.core.metrics import Usage
from headrace.core.model import Capabilities
from headrace.core.request import (
    CountRequest,
    EmbedRequest,
    GenerateRequest,
    Message,
    RerankRequest,
)
from headrace.engines import remote
from headrace.engines.base import About, OpenRequest, RemoteEvent, RemoteFinish
from headrace.engines.remote import Access, RemoteOptions, Shared, SilenceTimer

ABOUT = About(
    formats=("remote",),
    devices=("remote",),
    requires="anthropic",
    extra="anthropic",
    remote=True,
)

_REASONS: dict[str, FinishReason] = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "refusal": "content_filter",
    "tool_use": "tool_calls",
}
_OLD_VERSION = "2023-06-01"
_OLD_SAMPLING = frozenset({"temperature", "top_p", "top_k"})
_CLIENTS: Shared[Any] = Shared(lambda client: client.close())


class Options(RemoteOptions):
    """Options of a model of Anthropic."""

    api_version: Literal["2023-06-01", "2026-10-21"] | None = Field(
        None,
        description="Version of the API, the library's if not set. The older one still takes "
        "temperature, top_p and top_k.",
    )
    max_tokens: int = Field(
        4096, ge=1, le=1 << 20, description="Limit of an answer whose request has none."
    )


footprint = remote.footprint


class Engine:
    """A model of Anthropic."""

    def __init__(self, request: OpenRequest) -> None:
        import anthropic
        import httpx2

        self._library = anthropic
        # After the start of a stream, the library does not wrap its transport's errors.
        self._errors = (anthropic.APIError, httpx2.HTTPError)
        self._options = options = Options(**request.options)
        provider = remote.provider_of(request, "anthropic")
        if options.api_version == _OLD_VERSION:
            sampling = provider.sampling | _OLD_SAMPLING
            provider = msgspec.structs.replace(provider, sampling=sampling)
        self._provider = provider
        self._access = remote.access(provider, options)
        self._model = request.model.path
        self._client: Any = None
        self._shared_key = (
            self._access.base_url,
            self._access.key,
            options.connect_s,
            options.max_retries,
            options.api_version,
        )
        capabilities = Capabilities(
            sampling=provider.sampling, json_schema=True, token_prompts=False, images=True
        )
        self.facts = remote.facts(request, provider, capabilities)

    def __repr__(self) -> str:
        """Name the model and where it is."""
        return f"<anthropic.Engine {self._model} at {self._access.base_url}>"

    async def answer(self, request: GenerateRequest) -> AsyncGenerator[RemoteEvent, None]:
        """Yield the upstream's deltas, then its finish."""
        remote.check_supported(request, self._provider, self._provider.sampling)
        if request.tools:
            raise Unsupported("Tools are not supported by Anthropic.", param="tools")
        body = self._body(request)
        timer, reader = SilenceTimer(self._options), _AnswerReader()
        stream: Any = None
        try:
            create = self._connected().messages.create(
                stream=True, extra_headers=remote.trace_headers(request), **body
            )
            stream = await timer.wait(create)
            while (event := await timer.wait(_next(stream))) is not None:
                delta = reader.take(event)
                timer.reset(token=delta is not None)
                if delta is not None:
                    yield delta
        except self._errors as error:
            raise _failure(self._access, error) from None
        except ValueError:
            # From the library, when a chunk is not JSON.
            raise UpstreamError("The upstream sent a malformed chunk.") from None
        finally:
            if stream is not None:
                await stream.close()
        yield reader.finish()

    async def embed(self, request: EmbedRequest) -> tuple[Sequence[bytes], Usage]:
        """Raise Unsupported: there are no such models."""
        raise Unsupported("Anthropic has no embeddings.", param="model")

    async def rerank(self, request: RerankRequest) -> tuple[Sequence[tuple[int, float]], Usage]:
        """Raise Unsupported: there are no such models."""
        raise Unsupported("Anthropic has no reranking.", param="model")

    async def count_tokens(self, request: CountRequest) -> TokenCount:
        """Return the upstream's count, which is an estimate by its own description.

        A text is counted as a message: the endpoint takes nothing else.
        """
        messages = request.messages or (Message("user", request.text or ""),)
        has_images = any(True for turn in messages for _ in images_of(turn.content))
        if has_images or (request.messages is None and not (request.text or "").strip()):
            return remote.estimated_count(request)
        try:
            count = await self._connected().messages.count_tokens(
                model=self._model, **_conversation(messages, {})
            )
        except self._errors as error:
            raise _failure(self._access, error) from None
        return TokenCount(count=count.input_tokens, estimated=True)

    async def aclose(self) -> None:
        """Release the connections."""
        client, self._client = self._client, None
        if client is not None:
            await _CLIENTS.release(self._shared_key)

    def _connected(self) -> Any:
        if self._client is None:
            self._client = _CLIENTS.acquire(self._shared_key, self._connect)
        return self._client

    def _connect(self) -> Any:
        options, key = self._options, self._access.key
        return self._library.AsyncAnthropic(
            api_key=key.get_secret_value() if key else "none",
            base_url=self._access.base_url,
            max_retries=options.max_retries,
            default_headers=(
                {"anthropic-version": options.api_version} if options.api_version else None
            ),
            timeout=self._library.Timeout(None, connect=options.connect_s),
            http_client=self._library.DefaultAsyncHttpxClient(follow_redirects=False),
        )

    def _body(self, request: GenerateRequest) -> dict[str, Any]:
        if request.messages is None:
            raise Unsupported("Anthropic takes messages, not plain prompts.", param="prompt")
        fields: dict[str, Any] = msgspec.to_builtins(request.sampling)
        fields.pop("stop", None)
        old = {name: fields.pop(name) for name in _OLD_SAMPLING & fields.keys()}
        # Blank stop strings are refused there; the worker applies those that are not sent.
        stops = [stop for stop in request.sampling.stop if stop.strip()]
        return {
            "model": self._model,
            "max_tokens": self._options.max_tokens,
            **_conversation(request.messages, request.media),
            **fields,
            **({"stop_sequences": stops[: self._provider.stops]} if stops else {}),
            **({"extra_body": old} if old else {}),
            **_format(request.constraint),
        }


class _AnswerReader:
    """Reads the events of an answer."""

    def __init__(self) -> None:
        self._reason: str | None = None
        self._input: Any = None
        self._output_tokens = self._thinking_tokens = 0
        self._ended = False

    def take(self, event: Any) -> Delta | None:
        """Return what an event adds to the answer, if anything."""
        if event.type == "message_start":
            self._input = event.message.usage
        elif event.type == "message_delta":
            self._reason = event.delta.stop_reason or self._reason
            self._output_tokens = event.usage.output_tokens or self._output_tokens
            details = event.usage.output_tokens_details
            self._thinking_tokens = details.thinking_tokens if details else self._thinking_tokens
        elif event.type == "message_stop":
            self._ended = True
        elif event.type == "content_block_delta":
            if event.delta.type == "text_delta":
                return Delta(event.delta.text) if event.delta.text else None
            if event.delta.type == "thinking_delta":
                return Delta(reasoning=event.delta.thinking) if event.delta.thinking else None
        return None

    def finish(self) -> RemoteFinish:
        """Return the finish of an answer whose stream has ended."""
        if not self._ended or self._reason is None:
            raise UpstreamError("The upstream's stream is truncated: it has no end.")
        if self._reason not in _REASONS:
            raise UpstreamError(f"The upstream broke off, for the reason {self._reason!r}.")
        return RemoteFinish(finish_reasons=(_REASONS[self._reason],), usage=self._usage())

    def _usage(self) -> Usage | None:
        usage = self._input
        if usage is None:
            return None
        cached = usage.cache_read_input_tokens or 0
        written = usage.cache_creation_input_tokens or 0
        return Usage(
            prompt_tokens=(usage.input_tokens or 0) + cached + written,
            cached_tokens=cached,
            completion_tokens=self._output_tokens,
            reasoning_tokens=self._thinking_tokens,
        )


async def _next(stream: Any) -> Any:
    return await anext(stream, None)


def _conversation(messages: Sequence[Message], media: Mapping[str, bytes]) -> dict[str, Any]:
    """Return the messages, with those of the system joined in a field of their own."""
    first = (text_of(turn.content) for turn in messages if turn.role in ("system", "developer"))
    system = "\n\n".join(first)
    turns: list[dict[str, Any]] = []
    for turn in messages:
        if turn.role == "tool" or turn.tool_calls or turn.name:
            field = "Names of participants" if turn.name else "Messages of tools"
            raise Unsupported(f"{field} are not supported by Anthropic.", param="messages")
        if turn.role in ("user", "assistant"):
            content = turn.content
            if not isinstance(content, str):
                content = [_part(part, media) for part in content if part]
            turns.append({"role": turn.role, "content": content})
    if not turns:
        raise InvalidRequest("There is no user message.", param="messages")
    return {"messages": turns, **({"system": system} if system else {})}


def _part(part: Part, media: Mapping[str, bytes]) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    data = base64.b64encode(media[part.digest]).decode()
    source = {"type": "base64", "media_type": f"image/{part.format}", "data": data}
    return {"type": "image", "source": source}


def _format(constraint: Constraint | None) -> dict[str, Any]:
    if constraint is None:
        return {}
    schema = constraint.json_schema
    if "properties" not in schema:
        raise Unsupported(
            "Anthropic generates JSON only by a schema with properties.", param="response_format"
        )
    return {"output_config": {"format": {"type": "json_schema", "schema": schema}}}


def _failure(access: Access, error: Any) -> HeadraceError:
    """Return the error for the library's exception, whose text may contain the request."""
    status = getattr(error, "status_code", None)
    if status is None:
        name = type(error).__name__
        return UpstreamError("The connection to the upstream broke off.", detail=name)
    if status == 200:
        return remote.stream_error(access, error.body)
    after_s = remote.retry_after_s(error.response.headers)
    return remote.status_error(access, status, error.body, after_s)
