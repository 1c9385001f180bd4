"""POST /v1/completions."""

from __future__ import annotations

from typing import Any

import msgspec

from headrace.api import translate
from headrace.api.answers import Reply, answer
from headrace.api.exchange import Exchange, Service
from headrace.api.fan_out import fan_out
from headrace.api.frames import Form
from headrace.api.wire_completions import (
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
    LogprobText,
)
from headrace.core.events import Choice, Delta

_DECODER = msgspec.json.Decoder(CompletionRequest)


async def completions(service: Service, exchange: Exchange) -> None:
    """Continue one or several prompts, streamed or whole."""
    wire = await exchange.read(_DECODER)
    requests = translate.completions(wire, exchange.settings, exchange.call)
    if len(requests) == 1:
        stream = service.backend.ask(requests[0])
    else:
        stream = fan_out(service.backend, requests, exchange.settings.parallel_prompts)
    reply = Reply("cmpl-", _form(), len(requests) * requests[0].n, _whole)
    await answer(service, exchange, wire, stream, reply)


def _form() -> Form:
    written: dict[int, LogprobText] = {}

    def logprobs(delta: Delta) -> CompletionLogprobs:
        return written.setdefault(delta.index, LogprobText()).write(delta.logprobs)

    return Form(
        object="text_completion",
        role=b"",
        text=b'"text":',
        # This route has no place of its own for thinking: it is part of the text.
        reasoning=b'"text":',
        after=b"",
        empty=b'"text":""',
        logprobs=logprobs,
    )


def _whole(head: dict[str, Any], choices: tuple[Choice, ...]) -> Completion:
    return Completion(**head, choices=[_choice(one) for one in choices])


def _choice(choice: Choice) -> CompletionChoice:
    return CompletionChoice(
        index=choice.index,
        text=choice.reasoning + choice.text,
        logprobs=LogprobText().write(choice.logprobs) if choice.logprobs else None,
        finish_reason=choice.finish_reason,
    )
