"""POST /v1/chat/completions."""

from __future__ import annotations

from typing import Any

import msgspec

from headrace.api import translate
from headrace.api.answers import Reply, answer
from headrace.api.exchange import Exchange, Service
from headrace.api.frames import Form
from headrace.api.wire_chat import (
    AssistantMessage,
    ChatChoice,
    ChatCompletion,
    ChatRequest,
    chat_logprobs,
)
from headrace.core.events import Choice

_DECODER = msgspec.json.Decoder(ChatRequest)
_FORM = Form(
    object="chat.completion.chunk",
    role=b'"delta":{"role":"assistant","content":"","refusal":null}',
    text=b'"delta":{"content":',
    reasoning=b'"delta":{"reasoning_content":',
    after=b"}",
    empty=b'"delta":{}',
    logprobs=lambda delta: chat_logprobs(delta.logprobs),
)


async def chat_completions(service: Service, exchange: Exchange) -> None:
    """Answer a conversation, streamed or whole."""
    wire = await exchange.read(_DECODER)
    request = translate.chat(wire, exchange.settings, exchange.call)
    reply = Reply("chatcmpl-", _FORM, request.n, _whole)
    await answer(service, exchange, wire, service.backend.ask(request), reply)


def _whole(head: dict[str, Any], choices: tuple[Choice, ...]) -> ChatCompletion:
    return ChatCompletion(**head, choices=[_choice(one) for one in choices])


def _choice(choice: Choice) -> ChatChoice:
    message = AssistantMessage(
        content=choice.text, reasoning_content=choice.reasoning or msgspec.UNSET
    )
    return ChatChoice(
        index=choice.index,
        message=message,
        logprobs=chat_logprobs(choice.logprobs) if choice.logprobs else None,
        finish_reason=choice.finish_reason,
    )
