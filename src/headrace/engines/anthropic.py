"""Anthropic's models, through its own library."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any, Literal

import msgspec
from pydantic import Field

from headrace.core.constraint import Constraint
from headrace.core.errors import HeadraceError, InvalidRequest, Unsupported, UpstreamError
from headrace.core.events import Delta, FinishReason, TokenCount, ToolCallDelta
from headrace.core.media import text_of
from headrace.core.metrics import Usage
from headrace.core.model import Capabilities
from headrace.core.request import (
    CountRequest,
    EmbedRequest,
    GenerateRequest,
    Message,
    RerankRequest,
)
from headrace.core.tools import Thinking, Tool, ToolChoice
from headrace.engines import remote
from headrace.engines.base import About, OpenRequest, RemoteEvent, RemoteFinish
from headrace.engines.remote import Access, RemoteOptions, Shared, SilenceTimer

ABOUT = About(
    formats=("remote",),
    devices=("remote",),
    requires="anthropic",
    extra="anthropic",
    remote=True,
    able=frozenset({"json_schema", "vision"}),
)

_REASONS: dict[str, FinishReason] = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "refusal": "content_filter",
    "tool_use": "tool_calls",
}
_CHOICES = {"none": "none", "auto": "auto", "required": "any"}
_EFFORTS = {"minimal": "low"}
_LEAST_BUDGET = 1024
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
            sampling=provider.sampling, json_schema=True, token_prompts=False, vision=True
        )
        self.facts = remote.facts(request, provider, capabilities)

    def __repr__(self) -> str:
        """Name the model and where it is."""
        return f"<anthropic.Engine {self._model} at {self._access.base_url}>"

    async def answer(self, request: GenerateRequest) -> AsyncGenerator[RemoteEvent, None]:
        """Yield the upstream's deltas, then its finish."""
        remote.check_supported(request, self._provider, self._provider.sampling)
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
        is_plain = all(isinstance(turn.content, str) for turn in messages)
        if not is_plain or (request.messages is None and not (request.text or "").strip()):
            return remote.estimated_count(request)
        try:
            count = await self._connected().messages.count_tokens(
                model=self._model,
                **_conversation(messages, {}),
                **_tools(request.tools, ToolChoice()),
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
        thinking = _thinking(request)
        budget = thinking.get("budget_tokens", 0)
        output = _effort(request.thinking) | _format(request.constraint)
        return {
            "model": self._model,
            # A budget is a part of it, and has to be less.
            "max_tokens": self._options.max_tokens + budget,
            **_conversation(request.messages, request.media),
            **fields,
            **_tools(request.tools, request.tool_choice),
            **({"stop_sequences": stops[: self._provider.stops]} if stops else {}),
            **({"extra_body": old} if old else {}),
            **({"thinking": thinking} if thinking else {}),
            **({"output_config": output} if output else {}),
        }


class _AnswerReader:
    """Reads the events of an answer."""

    def __init__(self) -> None:
        self._reason: str | None = None
        self._input: Any = None
        self._output_tokens = self._thinking_tokens = 0
        self._ended = False
        self._calls = 0
        # The input of the open call as it came with its start, until a part of it follows.
        self._whole: str | None = None

    def take(self, event: Any) -> Delta | ToolCallDelta | None:
        """Return what an event adds to the answer, if anything."""
        if event.type == "content_block_delta":
            return self._delta(event.delta)
        if event.type == "content_block_start":
            return self._block(event.content_block)
        if event.type == "content_block_stop":
            return self._arguments(self._whole)
        if event.type == "message_start":
            self._input = event.message.usage
        elif event.type == "message_delta":
            self._reason = event.delta.stop_reason or self._reason
            self._output_tokens = event.usage.output_tokens or self._output_tokens
            details = event.usage.output_tokens_details
            self._thinking_tokens = details.thinking_tokens if details else self._thinking_tokens
        elif event.type == "message_stop":
            self._ended = True
        return None

    def _block(self, block: Any) -> Delta | ToolCallDelta | None:
        if block.type == "text":
            return Delta(block.text) if block.text else None
        if block.type != "tool_use":
            return None
        self._calls += 1
        self._whole = msgspec.json.encode(block.input or {}).decode()
        return ToolCallDelta(self._calls - 1, block.id, block.name)

    def _delta(self, delta: Any) -> Delta | ToolCallDelta | None:
        if delta.type == "text_delta":
            return Delta(delta.text) if delta.text else None
        if delta.type == "thinking_delta":
            return Delta(reasoning=delta.thinking) if delta.thinking else None
        if delta.type == "input_json_delta" and self._calls:
            return self._arguments(delta.partial_json)
        return None

    def _arguments(self, text: str | None) -> ToolCallDelta | None:
        if not text:
            return None
        self._whole = None
        return ToolCallDelta(self._calls - 1, arguments=text)

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
        if turn.role == "tool":
            _add_result(turns, turn, media)
            continue
        if turn.name:
            raise Unsupported(
                "Names of participants are not supported by Anthropic.", param="messages"
            )
        if turn.role in ("user", "assistant"):
            turns.append({"role": turn.role, "content": _content(turn, media)})
    if not turns:
        raise InvalidRequest("There is no user message.", param="messages")
    return {"messages": turns, **({"system": system} if system else {})}


def _content(turn: Message, media: Mapping[str, bytes]) -> str | list[dict[str, Any]]:
    # Thinking could only be given back with its signature, which OpenAI's protocol does not have.
    if not turn.tool_calls:
        return remote.blocks(turn.content, media)
    # An empty block of text is refused there.
    text = text_of(turn.content)
    blocks: list[dict[str, Any]] = [{"type": "text", "text": text}] if text else []
    for call in turn.tool_calls:
        arguments = msgspec.json.decode(call.arguments)
        blocks.append({"type": "tool_use", "id": call.id, "name": call.name, "input": arguments})
    return blocks


def _add_result(turns: list[dict[str, Any]], turn: Message, media: Mapping[str, bytes]) -> None:
    """Add the result of a call; those of one turn are one message."""
    content = remote.blocks(turn.content, media)
    result = {"type": "tool_result", "tool_use_id": turn.tool_call_id, "content": content}
    before = turns[-1]["content"] if turns and turns[-1]["role"] == "user" else ""
    if isinstance(before, list):
        turns[-1]["content"] = [*before, result]
    else:
        turns.append({"role": "user", "content": [result]})


def _tools(tools: Sequence[Tool], choice: ToolChoice) -> dict[str, Any]:
    if not tools:
        return {}
    offered = choice.allowed(tuple(tools)) or tools
    chosen: dict[str, Any] = {"type": _CHOICES[choice.mode]}
    if choice.mode == "required" and len(choice.names) == 1:
        chosen = {"type": "tool", "name": choice.names[0]}
    if choice.mode != "none" and not choice.parallel:
        chosen["disable_parallel_tool_use"] = True
    return {"tools": [_tool(tool) for tool in offered], "tool_choice": chosen}


def _tool(tool: Tool) -> dict[str, Any]:
    return {
        "name": tool.name,
        **({"description": tool.description} if tool.description else {}),
        "input_schema": {"type": "object", **(tool.parameters or {})},
        **({"strict": True} if tool.strict else {}),
    }


def _thinking(request: GenerateRequest) -> dict[str, Any]:
    """Return how the model thinks; nothing where the request leaves that to it."""
    thinking = request.thinking
    if thinking.enabled is False or thinking.budget == 0:
        return {"type": "disabled"}
    # It cannot think before a call that it has to make.
    if request.tool_choice.mode == "required" or not thinking.is_controlled:
        return {}
    if thinking.budget is None:
        return {"type": "adaptive"}
    if thinking.budget < _LEAST_BUDGET:
        raise InvalidRequest(
            f"Anthropic's least budget of thinking is {_LEAST_BUDGET} tokens.", param="thinking"
        )
    # Within a turn, each of its answers would need the thinking of the one before.
    if request.messages and request.messages[-1].role == "tool":
        return {}
    return {"type": "enabled", "budget_tokens": thinking.budget}


def _effort(thinking: Thinking) -> dict[str, Any]:
    effort = thinking.effort
    return {} if effort is None else {"effort": _EFFORTS.get(effort, effort)}


def _format(constraint: Constraint | None) -> dict[str, Any]:
    if constraint is None:
        return {}
    schema = constraint.json_schema
    if "properties" not in schema:
        raise Unsupported(
            "Anthropic generates JSON only by a schema with properties.", param="response_format"
        )
    return {"format": {"type": "json_schema", "schema": schema}}


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
