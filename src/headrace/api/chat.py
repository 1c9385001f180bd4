"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import Meta

from headrace.api import fields
from headrace.api.answers import AnswerHead, ChunkHead, PromptPlace, prompt_places
from headrace.api.custom_tools import FreeText, free_text
from headrace.api.exchange import Call, Exchange, Service
from headrace.api.fields import Peers, ReasoningField
from headrace.api.images import ImageReader, body_limit, held
from headrace.api.limits import ApiSettings
from headrace.api.logprobs import TokenBody, token_bodies
from headrace.api.messages import (
    TEMPLATE_NAMES,
    Messages,
    ThinkingFields,
    Tools,
    WireChoice,
    custom_names,
    image_urls,
    to_choice,
    to_messages,
    to_template,
    to_thinking,
    to_tools,
)
from headrace.api.stream import ChunkFormat, Reply, answer
from headrace.api.wire import Count, generate_fields, to_sampling
from headrace.core.errors import InvalidRequest
from headrace.core.events import (
    Choice,
    FinishReason,
    TokenLogprob,
    ToolCall,
    ToolCallDelta,
)
from headrace.core.request import GenerateRequest
from headrace.core.stream import without_thinking


class ChatRequest(ThinkingFields, frozen=True, kw_only=True):
    """OpenAI's chat request, with common extensions.

    With `continue_final_message` the answer continues the last message, an assistant's;
    `add_generation_prompt` is false or absent then.
    """

    messages: Messages
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    tools: Tools | None = None
    tool_choice: WireChoice | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None

    peers: ClassVar[Peers] = fields.CHAT

    def names(self) -> dict[str, str]:
        """Return the client's names for fields of the core, where they differ."""
        preferred = self.max_completion_tokens is not None and self.max_tokens is None
        names = super().names() | TEMPLATE_NAMES
        return names | ({"max_tokens": "max_completion_tokens"} if preferred else {})


class ChatLogprobs(msgspec.Struct, frozen=True):
    """Log probabilities of an answer's tokens."""

    content: list[TokenBody]
    refusal: None = None


class FunctionBody(msgspec.Struct, frozen=True, omit_defaults=True):
    """The function of a call. In a stream only the first part of a call has the name."""

    arguments: str
    name: str | None = None


class CustomBody(msgspec.Struct, frozen=True, omit_defaults=True):
    """The text of a call of a custom tool. In a stream only the first part has the name."""

    input: str
    name: str | None = None


class ToolCallBody(msgspec.Struct, frozen=True, kw_only=True):
    """A call of a tool: of a function, or of a custom tool."""

    id: str
    type: Literal["function", "custom"] = "function"
    function: FunctionBody | msgspec.UnsetType = msgspec.UNSET
    custom: CustomBody | msgspec.UnsetType = msgspec.UNSET


class ToolCallPart(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The addition of a chunk to a call; the first of a call has its id."""

    index: int
    id: str | None = None
    type: Literal["function", "custom"] | None = None
    function: FunctionBody | None = None
    custom: CustomBody | None = None


class AssistantMessage(msgspec.Struct, frozen=True, kw_only=True):
    """The answer; content is null beside calls.

    `reasoning_content` is the model's thinking, or `reasoning`, as the service is configured.
    """

    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    reasoning_content: str | msgspec.UnsetType | None = msgspec.UNSET
    reasoning: str | msgspec.UnsetType | None = msgspec.UNSET
    tool_calls: list[ToolCallBody] | msgspec.UnsetType = msgspec.UNSET


class ChatChoice(msgspec.Struct, frozen=True, kw_only=True):
    """One complete answer."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatCompletion(AnswerHead, frozen=True, kw_only=True):
    """A whole answer."""

    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]
    prompt_logprobs: list[PromptPlace] | msgspec.UnsetType = msgspec.UNSET


class ChatDelta(msgspec.Struct, frozen=True, kw_only=True):
    """The addition of a chunk to a message."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    refusal: None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[ToolCallPart] | None = None


class ChatChunkChoice(msgspec.Struct, frozen=True, kw_only=True):
    """The addition of a chunk to a choice."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None


class ChatChunk(ChunkHead, frozen=True, kw_only=True):
    """One `data:` line of a stream; `data: [DONE]` is the last line of one that ended well."""

    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[ChatChunkChoice]


_DECODER = msgspec.json.Decoder(ChatRequest)
_FORMAT = ChunkFormat(
    object="chat.completion.chunk",
    role=b'"delta":{"role":"assistant","content":"","refusal":null}',
    text=b'"delta":{"content":',
    reasoning=b'"delta":{"reasoning_content":',
    after=b"}",
    empty=b'"delta":{}',
    logprobs=lambda delta: _logprobs(delta.logprobs),
    call=lambda delta: {"tool_calls": [_call_part(delta)]},
)


_FORMATS: dict[ReasoningField, ChunkFormat] = {
    "reasoning_content": _FORMAT,
    "reasoning": replace(_FORMAT, reasoning=b'"delta":{"reasoning":'),
    "both": replace(_FORMAT, reasoning_too=b',"reasoning":'),
}


async def chat_completions(service: Service, exchange: Exchange) -> None:
    """Answer a conversation, streamed or whole."""
    wire = await exchange.read(_DECODER, body_limit(service, exchange.settings))
    exchange.call.names = wire.names()
    async with held(exchange, image_urls(wire.messages)) as translation:
        request = await translation.run(partial(to_request, wire, exchange.settings, exchange.call))
        # The texts are not kept while the answer runs.
        wire = msgspec.structs.replace(wire, messages=[])
        await _answer(service, exchange, wire, request)


async def _answer(
    service: Service, exchange: Exchange, wire: ChatRequest, request: GenerateRequest
) -> None:
    field, custom = exchange.settings.reasoning_field, custom_names(wire.tools)
    form = _FORMATS[field]
    if custom:
        parts = _CustomParts(custom)
        form = replace(form, call=parts.part, rest=parts.rest)
    reply = Reply("chatcmpl-", form, request.n, partial(_whole, field, custom))
    stream = service.ask(request, exchange.call)
    if wire.hides_thinking:
        stream = without_thinking(stream)
    await answer(service, exchange, wire, stream, reply)


def to_request(
    wire: ChatRequest, settings: ApiSettings, call: Call, reader: ImageReader | None = None
) -> GenerateRequest:
    """Build the core request; `reader` has its images afterwards.

    Raises:
        InvalidRequest: fields contradict each other, or a value is out of its range.
    """
    max_tokens, preferred = wire.max_tokens, wire.max_completion_tokens
    if max_tokens is not None and preferred not in {None, max_tokens}:
        raise InvalidRequest("max_tokens and max_completion_tokens differ.", param="max_tokens")
    if wire.top_logprobs is not None and not wire.logprobs:
        raise InvalidRequest("top_logprobs needs logprobs to be true.", param="top_logprobs")
    logprobs = (wire.top_logprobs or 0) if wire.logprobs else None
    reader = reader or ImageReader()
    return GenerateRequest(
        messages=to_messages(wire.messages, reader=reader),
        media=reader.pictures.data,
        sampling=to_sampling(
            wire, max_tokens=max_tokens if preferred is None else preferred, logprobs=logprobs
        ),
        tools=to_tools(wire.tools),
        tool_choice=to_choice(wire.tool_choice, parallel=wire.parallel_tool_calls),
        thinking=to_thinking(wire),
        **to_template(wire),
        **generate_fields(wire, settings, call),
    )


class _CustomParts:
    """Writes the parts of calls in a stream where some of the tools take text."""

    def __init__(self, custom: frozenset[str]) -> None:
        self._custom = custom
        self._texts: dict[tuple[int, int], FreeText] = {}

    def part(self, delta: ToolCallDelta) -> dict[str, Any]:
        """Return the delta of a part."""
        place = (delta.index, delta.call)
        if delta.name in self._custom:
            self._texts[place] = FreeText()
        if (text := self._texts.get(place)) is None:
            return {"tool_calls": [_call_part(delta)]}
        body = CustomBody(text.feed(delta.arguments), delta.name or None)
        head: Any = {"id": delta.id, "type": "custom"} if delta.name else {}
        return {"tool_calls": [ToolCallPart(index=delta.call, custom=body, **head)]}

    def rest(self, index: int) -> Iterator[dict[str, Any]]:
        """Yield what calls of a choice have left at its end."""
        for (choice, call), text in self._texts.items():
            if choice == index and (left := text.flush()):
                yield {"tool_calls": [ToolCallPart(index=call, custom=CustomBody(left))]}


def _whole(
    field: ReasoningField,
    custom: frozenset[str],
    head: dict[str, Any],
    choices: tuple[Choice, ...],
) -> ChatCompletion:
    scored = choices[0].prompt_tokens
    return ChatCompletion(
        **head,
        choices=[_choice(field, custom, choice) for choice in choices],
        prompt_logprobs=prompt_places(scored) if scored else msgspec.UNSET,
    )


def _choice(field: ReasoningField, custom: frozenset[str], choice: Choice) -> ChatChoice:
    thinking = choice.reasoning or msgspec.UNSET
    message = AssistantMessage(
        content=choice.text or (None if choice.tool_calls else ""),
        reasoning_content=msgspec.UNSET if field == "reasoning" else thinking,
        reasoning=msgspec.UNSET if field == "reasoning_content" else thinking,
        tool_calls=[_call(call, custom) for call in choice.tool_calls] or msgspec.UNSET,
    )
    return ChatChoice(
        index=choice.index,
        message=message,
        logprobs=_logprobs(choice.logprobs) if choice.logprobs else None,
        finish_reason=choice.finish_reason,
    )


def _call(call: ToolCall, custom: frozenset[str]) -> ToolCallBody:
    if call.name in custom:
        text = CustomBody(free_text(call.arguments), call.name)
        return ToolCallBody(id=call.id, type="custom", custom=text)
    return ToolCallBody(id=call.id, function=FunctionBody(call.arguments, call.name))


def _call_part(delta: ToolCallDelta) -> ToolCallPart:
    function = FunctionBody(delta.arguments, delta.name or None)
    if not delta.name:
        return ToolCallPart(index=delta.call, function=function)
    return ToolCallPart(index=delta.call, id=delta.id, type="function", function=function)


def _logprobs(tokens: Sequence[TokenLogprob]) -> ChatLogprobs:
    return ChatLogprobs(token_bodies(tokens))
