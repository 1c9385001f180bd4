"""From the wire's requests to core requests: pure, no I/O."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import msgspec
from msgspec.structs import replace

from headrace.api.exchange import Call
from headrace.api.settings import ApiSettings
from headrace.api.wire_chat import ChatMessage, ChatRequest
from headrace.api.wire_common import GenerateFields, ResponseFormat
from headrace.api.wire_completions import CompletionRequest
from headrace.api.wire_embeddings import EmbeddingRequest
from headrace.api.wire_rerank import RankRequest
from headrace.api.wire_tokens import TokenizeRequest
from headrace.core.duration import seconds
from headrace.core.errors import InvalidRequest, Unsupported
from headrace.core.request import (
    CountRequest,
    EmbedRequest,
    GenerateRequest,
    Message,
    RerankRequest,
)
from headrace.core.sampling import Sampling

Prompt = str | tuple[int, ...]

LISTS = {
    "messages": "max_messages",
    "documents": "max_documents",
    "stop": "max_stop",
    "stop_token_ids": "max_stop",
    "logit_bias": "max_logit_bias",
}
"""Fields that have a limit in the settings."""

_OPENAI_COMPLETION_TOKENS = 16


def chat(wire: ChatRequest, settings: ApiSettings, call: Call) -> GenerateRequest:
    """Build the core request.

    Raises:
        InvalidRequest: fields contradict each other, or a list is too long.
    """
    _check(wire, settings, prompts=1)
    if wire.max_tokens and wire.max_completion_tokens not in {None, wire.max_tokens}:
        raise InvalidRequest("max_tokens and max_completion_tokens differ.", param="max_tokens")
    if wire.top_logprobs is not None and not wire.logprobs:
        raise InvalidRequest("top_logprobs needs logprobs to be true.", param="top_logprobs")
    logprobs = (wire.top_logprobs or 0) if wire.logprobs else None
    return GenerateRequest(
        messages=_messages(wire.messages),
        sampling=_sampling(wire, wire.max_completion_tokens or wire.max_tokens, logprobs),
        template_options=wire.chat_template_kwargs or {},
        **_common(wire, settings, call),
    )


def completions(
    wire: CompletionRequest, settings: ApiSettings, call: Call
) -> list[GenerateRequest]:
    """Build one core request for each prompt.

    Raises:
        InvalidRequest: fields contradict each other, or a list is too long or mixed.
        Unsupported: best_of differs from n.
    """
    prompts = _inputs("prompt", wire.prompt, settings.max_prompts)
    _check(wire, settings, prompts=len(prompts))
    if wire.best_of not in {None, wire.n or 1}:
        raise Unsupported("best_of is supported only where it equals n.", param="best_of")
    first = GenerateRequest(
        prompt=prompts[0],
        echo=bool(wire.echo),
        sampling=_sampling(wire, wire.max_tokens or _OPENAI_COMPLETION_TOKENS, wire.logprobs),
        **_common(wire, settings, call),
    )
    rest = enumerate(prompts[1:], 1)
    return [first, *(replace(first, prompt=one, id=f"{call.id}.{i}") for i, one in rest)]


def count(wire: TokenizeRequest, settings: ApiSettings) -> CountRequest:
    """Build the core request.

    Raises:
        InvalidRequest: not exactly one of content, prompt and messages is given.
    """
    _check_lists(wire, settings)
    texts = [text for text in (wire.content, wire.prompt) if text is not None]
    if len(texts) + (wire.messages is not None) != 1:
        raise InvalidRequest("Give one of content, prompt and messages.", param="prompt")
    special = wire.add_special if wire.add_special_tokens is None else wire.add_special_tokens
    return CountRequest(
        model=wire.model or "",
        text=texts[0] if texts else None,
        messages=None if wire.messages is None else _messages(wire.messages),
        add_special=wire.prompt is not None if special is None else special,
        template_options=wire.chat_template_kwargs or {},
    )


def embed(wire: EmbeddingRequest, settings: ApiSettings, call: Call) -> EmbedRequest:
    """Build the core request.

    Raises:
        InvalidRequest: the list of inputs is mixed, too long, or has an empty one.
    """
    inputs = _inputs("input", wire.input, settings.max_inputs)
    return EmbedRequest(
        inputs=tuple(inputs),
        dimensions=wire.dimensions,
        truncate=bool(wire.truncate),
        normalize=wire.normalized is not False,
        load_wait_s=settings.load_wait_s,
        **_asked(wire, settings, call),
    )


def rank(wire: RankRequest, settings: ApiSettings, call: Call) -> RerankRequest:
    """Build the core request.

    Raises:
        InvalidRequest: there are no documents, or too many.
    """
    _check_lists(wire, settings)
    return RerankRequest(
        query=wire.query,
        documents=tuple(one if isinstance(one, str) else one.text for one in wire.documents),
        top_n=wire.top_n,
        truncate=wire.truncate is not False,
        load_wait_s=settings.load_wait_s,
        **_asked(wire, settings, call),
    )


def _asked(
    wire: GenerateFields | EmbeddingRequest | RankRequest, settings: ApiSettings, call: Call
) -> dict[str, Any]:
    return {
        "id": call.id,
        "received": call.received,
        "deadline_s": settings.deadline_s,
        "model": wire.model or "",
        "client": call.client,
        "traceparent": call.traceparent,
        "tracestate": call.tracestate,
        "keep_alive": _keep_alive(wire.keep_alive),
    }


def _common(wire: GenerateFields, settings: ApiSettings, call: Call) -> dict[str, Any]:
    return _asked(wire, settings, call) | {
        "n": wire.n or 1,
        "json_schema": _json_schema(wire.response_format),
        "context_length": wire.context_length,
        # A stream says meanwhile how far the load is.
        "load_wait_s": None if wire.stream else settings.load_wait_s,
    }


def _sampling(wire: GenerateFields, max_tokens: int | None, logprobs: int | None) -> Sampling:
    stop = [wire.stop] if isinstance(wire.stop, str) else wire.stop or ()
    return Sampling(
        max_tokens=max_tokens,
        temperature=wire.temperature,
        top_p=wire.top_p,
        # -1 is vLLM's way to say that all tokens count.
        top_k=0 if wire.top_k == -1 else wire.top_k,
        min_p=wire.min_p,
        presence_penalty=wire.presence_penalty,
        frequency_penalty=wire.frequency_penalty,
        repetition_penalty=wire.repetition_penalty,
        seed=wire.seed,
        stop=tuple(stop),
        stop_token_ids=tuple(wire.stop_token_ids or ()),
        ignore_eos=bool(wire.ignore_eos),
        logprobs=logprobs,
        logit_bias=wire.logit_bias or {},
    )


def _json_schema(wanted: ResponseFormat | None) -> dict[str, Any] | None:
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return {"type": "object"}
    if wanted.json_schema is None:
        raise InvalidRequest("json_schema is missing.", param="response_format.json_schema")
    return wanted.json_schema.schema or {}


def _keep_alive(wanted: float | str | None) -> float | None:
    try:
        return None if wanted is None else seconds(wanted)
    except ValueError as error:
        raise InvalidRequest(f"keep_alive: {error}.", param="keep_alive") from error


def _messages(wire: Sequence[ChatMessage]) -> tuple[Message, ...]:
    return tuple(Message(one.role, _content(one), one.name) for one in wire)


def _content(message: ChatMessage) -> str:
    if isinstance(message.content, str):
        return message.content
    return "".join(part.text for part in message.content)


def _inputs(name: str, wire: str | Sequence[str | int | list[int]], most: int) -> list[Prompt]:
    if isinstance(wire, str):
        return [wire]
    kinds = {type(item) for item in wire}
    if len(kinds) != 1:
        what = "is a list of nothing" if not kinds else "mixes texts, tokens and lists"
        raise InvalidRequest(f"{name} {what}.", param=name)
    if kinds == {int}:
        return [tuple(cast("Sequence[int]", wire))]
    _check_length(wire, name, most)
    return [one if isinstance(one, str) else tuple(cast("list[int]", one)) for one in wire]


def _check(wire: GenerateFields, settings: ApiSettings, *, prompts: int) -> None:
    _check_lists(wire, settings)
    if wire.stream_options is not None and not wire.stream:
        raise InvalidRequest("stream_options needs stream to be true.", param="stream_options")
    if (wire.n or 1) * prompts > settings.max_choices:
        raise InvalidRequest(f"More than {settings.max_choices} choices are asked for.", param="n")


def _check_lists(wire: msgspec.Struct, settings: ApiSettings) -> None:
    for name, limit in LISTS.items():
        value = getattr(wire, name, None)
        if isinstance(value, list | dict):
            _check_length(cast("Sequence[Any]", value), name, getattr(settings, limit))


def _check_length(value: Sequence[Any], name: str, limit: int) -> None:
    if len(value) > limit:
        raise InvalidRequest(f"{name}: at most {limit} are accepted.", param=name)
