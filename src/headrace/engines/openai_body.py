"""What an upstream is asked, in its own words."""

from __future__ import annotations

from typing import Any

import msgspec

from headrace.core.errors import Unsupported
from headrace.core.request import (
    CountRequest,
    EmbedRequest,
    GenerateRequest,
    Message,
    RerankRequest,
)
from headrace.models.providers import Provider

_ANY_OBJECT: tuple[dict[str, Any], ...] = ({}, {"type": "object"})


def generate(request: GenerateRequest, model: str, provider: Provider) -> tuple[str, bytes]:
    """Return path and body of a request for an answer.

    Raises:
        Unsupported: the upstream cannot be asked that.
    """
    chat = request.messages is not None
    body: dict[str, Any] = {"model": model, "stream": True, **provider.extra}
    if provider.asks_usage:
        body["stream_options"] = {"include_usage": True}
    if request.n > 1:
        body["n"] = request.n
    if stops := request.sampling.stop[: provider.stops]:
        # Those for which there is no place are found by the worker.
        body["stop"] = stops
    body |= _sampling(request, provider, chat=chat) | _format(request, provider)
    if chat:
        body["messages"] = _messages(request.messages or (), provider)
        if request.template_options:
            body["chat_template_kwargs"] = request.template_options
        return "/chat/completions", msgspec.json.encode(body)
    if not provider.completions:
        raise Unsupported(f"{provider.title} answers chats, no plain prompts.", param="prompt")
    body["prompt"] = request.prompt
    return "/completions", msgspec.json.encode(body)


def _sampling(request: GenerateRequest, provider: Provider, *, chat: bool) -> dict[str, Any]:
    given: dict[str, Any] = msgspec.to_builtins(request.sampling)
    given.pop("stop", None)
    logprobs = given.pop("logprobs", None)
    if bias := given.pop("logit_bias", None):
        given["logit_bias"] = {str(token): value for token, value in bias.items()}
    if chat:
        given = {provider.renamed.get(name, name): value for name, value in given.items()}
    if logprobs is not None:
        given |= {"logprobs": True, "top_logprobs": logprobs} if chat else {"logprobs": logprobs}
    return given


def _format(request: GenerateRequest, provider: Provider) -> dict[str, Any]:
    schema = request.json_schema
    if schema is None:
        return {}
    if schema in _ANY_OBJECT:
        return {"response_format": {"type": "json_object"}}
    if provider.json != "schema":
        raise Unsupported(
            f"{provider.title} gives JSON, but keeps to no schema.", param="response_format"
        )
    named = {"name": "answer", "schema": schema, "strict": True}
    return {"response_format": {"type": "json_schema", "json_schema": named}}


def _messages(messages: tuple[Message, ...], provider: Provider) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = []
    for message in messages:
        role = message.role
        if role == "tool":
            raise Unsupported("Messages of tools are not supported.", param="messages")
        if role == "developer" and not provider.developer:
            role = "system"
        named = {"name": message.name} if message.name else {}
        made.append({"role": role, "content": message.content, **named})
    return made


def embed(request: EmbedRequest, model: str, provider: Provider) -> bytes:
    """Return the body of a request for vectors.

    Raises:
        Unsupported: the upstream cannot be asked that.
    """
    if request.truncate:
        raise Unsupported(f"{provider.title} cannot be asked to truncate.", param="truncate")
    if not provider.token_prompts and not all(isinstance(one, str) for one in request.inputs):
        raise Unsupported(f"{provider.title} takes no token ids.", param="input")
    body: dict[str, Any] = {
        "model": model,
        "input": request.inputs,
        "encoding_format": "base64" if provider.base64 else "float",
    }
    if request.dimensions is not None:
        body["dimensions"] = request.dimensions
    return msgspec.json.encode(body)


def rerank(request: RerankRequest, model: str) -> bytes:
    """Return the body of a request for an order."""
    body: dict[str, Any] = {
        "model": model,
        "query": request.query,
        "documents": request.documents,
        "return_documents": False,
    }
    if request.top_n is not None:
        body["top_n"] = request.top_n
    return msgspec.json.encode(body)


def count(request: CountRequest, model: str) -> bytes:
    """Return the body of a request for the tokens of a text or of messages."""
    body: dict[str, Any] = {"model": model}
    if request.messages is None:
        body |= {"prompt": request.text, "add_special_tokens": request.add_special}
    else:
        body["messages"] = request.messages
    if request.template_options:
        body["chat_template_kwargs"] = request.template_options
    return msgspec.json.encode(body)
