"""OpenAI's protocol: the bodies of requests, and the chunks of answers."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import msgspec

from headrace.core.envelope import new_id
from headrace.core.errors import Unsupported, UpstreamError
from headrace.core.events import (
    Delta,
    FinishReason,
    TokenLogprob,
    ToolCallDelta,
    TopLogprob,
)
from headrace.core.media import openai_part
from headrace.core.metrics import Usage
from headrace.core.request import (
    CountRequest,
    EmbedRequest,
    GenerateRequest,
    RerankRequest,
)
from headrace.core.tools import Tool
from headrace.engines.base import RemoteFinish
from headrace.engines.remote import Access, stream_error
from headrace.models.providers import Provider
from headrace.text import chunks
from headrace.text.chunks import Candidate, Choice, Logprobs
from headrace.text.template import openai_turn

# Id of a token of which the upstream gives only the text.
_NO_ID = -1
_LEAST = -9999.0
_REASONS: dict[str, FinishReason] = {
    "stop": "stop",
    "eos": "stop",
    "eos_token": "stop",
    "end_turn": "stop",
    "stop_sequence": "stop",
    "length": "length",
    "max_tokens": "length",
    "model_length": "length",
    "content_filter": "content_filter",
    "sensitive": "content_filter",
    "tool_calls": "tool_calls",
    "function_call": "tool_calls",
}
_SWITCHES: Mapping[str, Callable[[bool], dict[str, Any]]] = {
    "effort": lambda on: {} if on else {"reasoning_effort": "none"},
    "template": lambda on: {"chat_template_kwargs": {"enable_thinking": on, "thinking": on}},
    "type": lambda on: {"thinking": {"type": "enabled" if on else "disabled"}},
    "flag": lambda on: {"enable_thinking": on},
    "router": lambda on: {"reasoning": {"enabled": on}},
}
_ANY_OBJECT: tuple[dict[str, Any], ...] = ({}, {"type": "object"})


def generate_body(request: GenerateRequest, model: str, provider: Provider) -> tuple[str, bytes]:
    """Return path and body of a request for an answer.

    Raises:
        Unsupported: the upstream does not support a field.
    """
    chat = request.messages is not None
    body: dict[str, Any] = {"model": model, "stream": True, **provider.extra}
    if provider.asks_usage:
        body["stream_options"] = {"include_usage": True}
    if request.n > 1:
        body["n"] = request.n
    if stops := request.sampling.stop[: provider.stops]:
        # The worker applies the others.
        body["stop"] = stops
    body |= _sampling(request, provider, chat=chat) | _format(request, provider)
    if chat:
        body["messages"] = _messages(request, provider)
        body |= _tools(request) | _thinking(request, provider)
        if options := body.get("chat_template_kwargs", {}) | request.template_options:
            body["chat_template_kwargs"] = options
        if request.continue_final:
            body |= _continued(provider)
        return "/chat/completions", msgspec.json.encode(body)
    if not provider.completions:
        raise Unsupported(f"{provider.title} takes messages, not plain prompts.", param="prompt")
    body["prompt"] = request.prompt
    return "/completions", msgspec.json.encode(body)


def _continued(provider: Provider) -> dict[str, Any]:
    # Servers that take options of a template know these fields too.
    if not provider.template_options:
        raise Unsupported(f"{provider.title} does not continue a message.", param="continue_final")
    return {"continue_final_message": True, "add_generation_prompt": False}


def _sampling(request: GenerateRequest, provider: Provider, *, chat: bool) -> dict[str, Any]:
    fields: dict[str, Any] = msgspec.to_builtins(request.sampling)
    fields.pop("stop", None)
    logprobs = fields.pop("logprobs", None)
    if bias := fields.pop("logit_bias", None):
        fields["logit_bias"] = {str(token): value for token, value in bias.items()}
    if chat:
        fields = {provider.renamed.get(name, name): value for name, value in fields.items()}
    if logprobs is not None:
        fields |= {"logprobs": True, "top_logprobs": logprobs} if chat else {"logprobs": logprobs}
    return fields


def _format(request: GenerateRequest, provider: Provider) -> dict[str, Any]:
    if (constraint := request.constraint) is None:
        return {}
    if constraint.form != "json_schema":
        return {"structured_outputs": {constraint.form: getattr(constraint, constraint.form)}}
    schema = constraint.json_schema
    if schema in _ANY_OBJECT:
        return {"response_format": {"type": "json_object"}}
    if provider.json != "schema":
        raise Unsupported(
            f"{provider.title} generates JSON, but not by a schema.", param="response_format"
        )
    named = {"name": "answer", "schema": schema, "strict": True}
    return {"response_format": {"type": "json_schema", "json_schema": named}}


def _thinking(request: GenerateRequest, provider: Provider) -> dict[str, Any]:
    thinking, body = request.thinking, dict[str, Any]()
    if thinking.budget is not None:
        if not provider.thinking_budget:
            raise Unsupported(
                f"{provider.title} has no budget of thinking.", param="thinking_budget"
            )
        body["thinking_token_budget"] = thinking.budget
    # An effort switches it on.
    if thinking.effort is not None and thinking.enabled is not False:
        return body | {"reasoning_effort": thinking.effort}
    if thinking.enabled is None:
        return body
    return body | _SWITCHES[provider.switch](thinking.enabled)


def _tools(request: GenerateRequest) -> dict[str, Any]:
    if not request.tools:
        return {}
    body: dict[str, Any] = {}
    choice = request.tool_choice
    body["tools"] = _listed(choice.allowed(request.tools) or request.tools)
    named = [{"type": "function", "function": {"name": name}} for name in choice.names]
    body["tool_choice"] = named[0] if len(named) == 1 and choice.mode == "required" else choice.mode
    if not choice.parallel:
        body["parallel_tool_calls"] = False
    return body


def _listed(tools: Sequence[Tool]) -> list[dict[str, Any]]:
    return [{"type": "function", "function": msgspec.to_builtins(tool)} for tool in tools]


def _messages(request: GenerateRequest, provider: Provider) -> list[dict[str, Any]]:
    turns: list[dict[str, Any]] = []
    for message in request.messages or ():
        turn = openai_turn(message, text_arguments=True)
        if not isinstance(message.content, str):
            turn["content"] = [openai_part(part, request.media) for part in message.content]
        if message.role == "developer" and not provider.developer:
            turn["role"] = "system"
        if message.role == "tool":
            turn.pop("name", None)
        if message.tool_calls and not message.content:
            turn["content"] = None
        turns.append(turn)
    return turns


def embed_body(request: EmbedRequest, model: str, provider: Provider) -> bytes:
    """Return the body of a request for vectors.

    Raises:
        Unsupported: the upstream does not support a field.
    """
    if request.truncate:
        raise Unsupported(f"{provider.title} does not truncate inputs.", param="truncate")
    if not provider.token_prompts and not all(isinstance(text, str) for text in request.inputs):
        raise Unsupported(f"{provider.title} takes no token ids.", param="input")
    body: dict[str, Any] = {
        "model": model,
        "input": request.inputs,
        "encoding_format": "base64" if provider.base64 else "float",
    }
    if request.dimensions is not None:
        body["dimensions"] = request.dimensions
    return msgspec.json.encode(body)


def rerank_body(request: RerankRequest, model: str) -> bytes:
    """Return the body of a request for a ranking."""
    body: dict[str, Any] = {
        "model": model,
        "query": request.query,
        "documents": request.documents,
        "return_documents": False,
    }
    if request.top_n is not None:
        body["top_n"] = request.top_n
    return msgspec.json.encode(body)


def count_body(request: CountRequest, model: str) -> bytes:
    """Return the body of a request for the token count of a text or of messages."""
    body: dict[str, Any] = {"model": model}
    if request.messages is None:
        body |= {"prompt": request.text, "add_special_tokens": request.add_special}
    else:
        body["messages"] = [openai_turn(turn, text_arguments=True) for turn in request.messages]
    if request.tools:
        body["tools"] = _listed(request.tools)
    if request.template_options:
        body["chat_template_kwargs"] = request.template_options
    return msgspec.json.encode(body)


class _Function(msgspec.Struct, frozen=True):
    name: str | None = None
    arguments: str | None = None


class _Call(msgspec.Struct, frozen=True):
    function: _Function = _Function()
    index: int | None = None
    id: str | None = None


class _Calls:
    """The calls of a choice: how many, and the number and id of each by the upstream's index."""

    def __init__(self) -> None:
        self.count = 0
        self.places: dict[int, tuple[int, str]] = {}


class AnswerReader:
    """Reads the chunks of one answer of `n` choices.

    Raises:
        HeadraceError: a chunk is malformed, or is an error of the upstream.
    """

    def __init__(self, access: Access, n: int) -> None:
        self._access = access
        self._reasons: list[FinishReason | None] = [None] * n
        self._usage: Usage | None = None
        self._calls = [_Calls() for _ in range(n)]

    @property
    def is_complete(self) -> bool:
        """Whether every choice has its end: all that can follow is usage."""
        return None not in self._reasons

    @property
    def is_whole(self) -> bool:
        """Whether nothing more is expected."""
        return self.is_complete and self._usage is not None

    def deltas(self, data: bytes) -> Iterator[Delta | ToolCallDelta]:
        """Yield the deltas of a chunk."""
        try:
            chunk = chunks.read(data)
        except chunks.Malformed as error:
            if self.is_complete:
                return
            raise UpstreamError(
                "The upstream sent a malformed chunk.", detail=self._access.scrub(str(error))
            ) from None
        if chunk.error:
            raise stream_error(self._access, {"error": chunk.error})
        for choice in chunk.choices or ():
            index = choice.index or 0
            if index not in range(len(self._reasons)):
                raise UpstreamError("The upstream sent a choice that was not asked for.")
            self._note(choice.usage)
            if choice.finish_reason:
                self._reasons[int(index)] = self._reason(choice.finish_reason)
            delta = _delta(choice, int(index))
            if delta.text or delta.reasoning or delta.logprobs:
                yield delta
            yield from self._calls_of(choice, int(index))
        self._note(chunk.usage)

    def finish(self) -> RemoteFinish:
        """Return the finish of an answer whose stream has ended."""
        reasons: list[FinishReason] = [reason for reason in self._reasons if reason is not None]
        if len(reasons) < len(self._reasons):
            raise UpstreamError("The upstream's stream is truncated: a choice has no end.")
        return RemoteFinish(finish_reasons=tuple(reasons), usage=self._usage)

    def _calls_of(self, choice: Choice, index: int) -> Iterator[ToolCallDelta]:
        parts: Any = choice.delta.tool_calls if choice.delta else None
        for place, part in enumerate(cast("list[Any]", parts) if isinstance(parts, list) else []):
            try:
                call = msgspec.convert(part, _Call, strict=False)
            except msgspec.ValidationError:
                raise UpstreamError("The upstream sent a malformed tool call.") from None
            yield self._call(call, index, place if call.index is None else call.index)

    def _call(self, call: _Call, index: int, place: int) -> ToolCallDelta:
        calls, function = self._calls[index], call.function
        arguments = function.arguments or ""
        number, identity = calls.places.get(place, (-1, ""))
        # Some repeat the head with each part; some give all calls one index.
        if number >= 0 and (not function.name or call.id in (None, "", identity)):
            return ToolCallDelta(number, arguments=arguments, index=index)
        if not function.name:
            raise UpstreamError("The upstream sent a tool call without a name.")
        number, identity = calls.count, call.id or f"call_{new_id()}"
        calls.places[place] = (number, identity)
        calls.count += 1
        return ToolCallDelta(number, identity, function.name, arguments, index)

    def _note(self, usage: object) -> None:
        self._usage = chunks.usage_of(usage) or self._usage

    def _reason(self, reason: str) -> FinishReason:
        finish_reason = _REASONS.get(reason.lower())
        if finish_reason is None:
            shown = self._access.scrub(reason)
            raise UpstreamError(f"The upstream broke off, for the reason {shown!r}.")
        return finish_reason


def _delta(choice: Choice, index: int) -> Delta:
    logprobs = _tokens(choice.logprobs) if choice.logprobs else ()
    return Delta(choice.content, index=index, reasoning=choice.thinking, logprobs=logprobs)


def _tokens(logprobs: Logprobs) -> tuple[TokenLogprob, ...]:
    if logprobs.content is not None:
        return tuple(
            TokenLogprob(
                _NO_ID,
                _data(token),
                _finite(token.logprob),
                tuple(map(_top, token.top_logprobs or ())),
            )
            for token in logprobs.content
        )
    texts = logprobs.tokens or ()
    rows = zip(
        texts,
        logprobs.token_logprobs or (),
        logprobs.top_logprobs or [None] * len(texts),
        strict=False,
    )
    return tuple(
        TokenLogprob(
            _NO_ID,
            _bytes(token),
            _finite(logprob or 0.0),
            tuple(
                TopLogprob(_NO_ID, _bytes(name), _finite(value))
                for name, value in (top or {}).items()
            ),
        )
        for token, logprob, top in rows
    )


def _top(candidate: Candidate) -> TopLogprob:
    return TopLogprob(_NO_ID, _data(candidate), _finite(candidate.logprob))


def _finite(logprob: float) -> float:
    # Some write -Infinity, which is no JSON.
    return logprob if logprob >= _LEAST else _LEAST


def _data(candidate: Candidate) -> bytes:
    return _bytes(candidate.token) if candidate.bytes is None else bytes(candidate.bytes)


def _bytes(token: str) -> bytes:
    """Return a token's bytes; a part of a character is `bytes:` with hexadecimal escapes."""
    if re.fullmatch(r"bytes:(\\x[0-9a-f]{2})+", token):
        return bytes.fromhex(token.removeprefix("bytes:").replace("\\x", ""))
    return token.encode()
