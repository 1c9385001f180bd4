"""DB-GPT's requests to a worker, and their translation to the core."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from headrace.api import limits
from headrace.api.edge import dbgpt_traceparent
from headrace.api.exchange import Exchange, Service
from headrace.api.images import ImageReader
from headrace.api.wire import ModelName, TokenId, envelope
from headrace.core.errors import InvalidRequest, Unsupported
from headrace.core.media import Content, Image
from headrace.core.model import Task
from headrace.core.request import GenerateRequest, Message, Role
from headrace.core.sampling import Sampling

NAMES = {"max_tokens": "max_new_tokens"}
"""DB-GPT's names for fields of the core."""

WORKER_TYPES: dict[Task, str] = {"generate": "llm", "embed": "text2vec", "rerank": "reranker"}
"""What DB-GPT calls a worker with a task."""

_ROLES: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "ai": "assistant",
    "assistant": "assistant",
    "system": "system",
}
# For people: what was shown of an answer. DB-GPT keeps it from models too.
_UNSENT = frozenset({"view"})

_Stop = Annotated[str, Meta(max_length=1024)]

# Unknown fields are ignored, and null is absent: DB-GPT's parts send whatever they have.


class MediaObject(msgspec.Struct, frozen=True, kw_only=True):
    """The data of a part; `format` is text, url or base64, for media with a type (`base64@...`)."""

    data: str | None = None
    format: str | None = None


class MediaContent(msgspec.Struct, frozen=True, kw_only=True):
    """A part of a message."""

    type: str | None = None
    object: MediaObject | None = None


class ModelMessage(msgspec.Struct, frozen=True, kw_only=True):
    """One turn; `view` is not for models."""

    role: str
    content: str | list[MediaContent] | None = None


class Addressed(msgspec.Struct, frozen=True, kw_only=True):
    """A request for a model; `span_id` is the caller's span."""

    model: ModelName | None = None
    span_id: str | None = None


class PromptRequest(Addressed, frozen=True, kw_only=True):
    """A conversation, or a text to go on with (`prompt`, without messages)."""

    messages: Annotated[list[ModelMessage], Meta(max_length=limits.MAX_MESSAGES)] | None = None
    prompt: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    max_new_tokens: int | None = None
    stop: str | Annotated[list[_Stop | None], Meta(max_length=limits.MAX_STOP)] | None = None
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=limits.MAX_STOP)] | None = None
    echo: bool | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    chat_model: bool | None = None


class EmbeddingsRequest(Addressed, frozen=True, kw_only=True):
    """Texts for vectors; for the worker type `reranker`, candidates for a query."""

    input: str | Annotated[list[str], Meta(max_length=limits.MAX_INPUTS)]
    worker_type: str | None = None
    query: str | None = None


class CountTokenRequest(Addressed, frozen=True, kw_only=True):
    """A text to be counted; DB-GPT's client does not name a model."""

    prompt: str


def core_fields(
    service: Service, exchange: Exchange, wire: Addressed, task: Task
) -> dict[str, Any]:
    """Return the fields that every core request has; clients wait for a load without a limit.

    Without a name it is the first model with this task.
    """
    if wire.span_id and not exchange.call.traceparent:
        exchange.call.traceparent = dbgpt_traceparent(wire.span_id)
    model = wire.model or next(
        (info.id for info in service.backend.models() if task in info.capabilities.tasks), ""
    )
    return envelope(model, exchange.settings, exchange.call) | {"load_wait_s": None}


def image_urls(wire: PromptRequest) -> Iterator[tuple[str, str]]:
    """Yield the URL of each image, with its place."""
    for index, message in enumerate(wire.messages or ()):
        parts = message.content if isinstance(message.content, list) else ()
        for number, part in enumerate(parts):
            if part.type == "image":
                yield _image_url(part), f"messages[{index}].content[{number}]"


def to_request(wire: PromptRequest, common: dict[str, Any], reader: ImageReader) -> GenerateRequest:
    """Build the core request. Its tokens are cut to what the context has left.

    Raises:
        InvalidRequest: a value is out of its range, a role is unknown, or there is no content.
        Unsupported: a part is neither text nor an image.
    """
    common = common | {"sampling": to_sampling(wire), "fit_max_tokens": True}
    if wire.messages and wire.chat_model is not False:
        messages = to_messages(wire.messages, reader)
        return GenerateRequest(messages=messages, media=reader.pictures.data, **common)
    if not wire.prompt:
        raise InvalidRequest("There are neither messages nor a prompt.", param="messages")
    return GenerateRequest(
        prompt=wire.prompt, echo=bool(wire.echo) and wire.chat_model is False, **common
    )


def to_sampling(wire: PromptRequest) -> Sampling:
    """Build the core's parameters.

    DB-GPT's API server sends every one, if only with the value that has no effect: those are left
    to the model and its engine.

    Raises:
        InvalidRequest: a value is out of its range.
    """
    stops = [wire.stop] if isinstance(wire.stop, str) else wire.stop or []
    return Sampling(
        max_tokens=wire.max_new_tokens,
        temperature=wire.temperature,
        top_p=None if wire.top_p == 1 else wire.top_p,
        top_k=None if wire.top_k == -1 else wire.top_k,
        presence_penalty=wire.presence_penalty or None,
        frequency_penalty=wire.frequency_penalty or None,
        stop=tuple(stop for stop in stops if stop),
        stop_token_ids=tuple(wire.stop_token_ids or ()),
    )


def to_messages(wire: Sequence[ModelMessage], reader: ImageReader) -> tuple[Message, ...]:
    """Return the turns that are for the model.

    Raises:
        InvalidRequest: a role is unknown, or an image is damaged or beyond a bound.
        Unsupported: a part is neither text nor an image, or an image is not the user's.
    """
    turns: list[Message] = []
    for index, message in enumerate(wire):
        place = f"messages[{index}]"
        if message.role in _UNSENT:
            continue
        if (role := _ROLES.get(message.role)) is None:
            known = ", ".join((*_ROLES, *_UNSENT))
            raise InvalidRequest(f"{place}.role is none of {known}.", param=f"{place}.role")
        turns.append(Message(role, _to_content(message.content, role, place, reader)))
    return tuple(turns)


def _to_content(
    wire: str | Sequence[MediaContent] | None, role: Role, place: str, reader: ImageReader
) -> Content:
    if wire is None or isinstance(wire, str):
        return wire or ""
    parts: list[str | Image] = []
    for number, part in enumerate(wire):
        inner = f"{place}.content[{number}]"
        kind, data = part.type or "text", (part.object and part.object.data) or ""
        if kind == "text":
            parts.append(data)
        elif kind == "image" and role == "user":
            parts.append(reader.read(_image_url(part), inner))
        elif kind != "thinking":
            reason = "images go with the user" if kind == "image" else f"{kind} is not supported"
            raise Unsupported(f"{inner}: {reason}.", param=inner)
    texts = [part for part in parts if isinstance(part, str)]
    return "".join(texts) if len(texts) == len(parts) else tuple(parts)


def _image_url(part: MediaContent) -> str:
    """Return the URL of an image, whose data is one or base64 of a media type."""
    media = part.object or MediaObject()
    form, _, media_type = (media.format or "url").partition("@")
    data = media.data or ""
    return f"data:{media_type};base64,{data}" if form == "base64" else data
