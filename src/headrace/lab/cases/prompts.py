"""Prompts: their log probabilities, gaps that are filled, and messages that are continued."""

from __future__ import annotations

from typing import Any

from headrace.core.errors import Unsupported
from headrace.core.events import PromptToken, PromptTokens
from headrace.core.request import CountRequest, DetokenizeRequest, Message
from headrace.core.stream import collect_count, collect_text
from headrace.lab.cases.case import case
from headrace.lab.cases.subject import Declared, Subject, check, refusal

_BEGUN = "It was a clear "
_NEAR = 0.05


async def _scored(subject: Subject, token_ids: tuple[int, ...]) -> tuple[PromptToken, ...]:
    given = subject.able(max_tokens=0)
    reply = await subject.ask(token_ids, prompt_logprobs=1, **given)
    parts = [event.tokens for event in reply.events if isinstance(event, PromptTokens)]
    tokens = [token for part in parts for token in part]
    ids = tuple(token.token_id for token in tokens)
    check(ids == token_ids, f"The prompt is {token_ids}, the tokens are {ids}.")
    return tuple(tokens)


@case("W11")
async def prompt_logprobs(subject: Subject) -> None:
    """The tokens of a prompt have the log probabilities that they have in an answer."""
    if not subject.capabilities.prompt_logprobs:
        request = subject.request(prompt_logprobs=0, **subject.able(max_tokens=1))
        error = await refusal(subject.backend.ask(request), Unsupported)
        check(error.param == "prompt_logprobs", f"The error names {error.param}.")
        raise Declared("Refused by its name.")
    reply = await subject.short(await subject.noise(24), logprobs=1)
    prompt = await subject.noise(24)
    first, *rest = await _scored(subject, (*prompt, *reply.ids))
    check(first.logprob is None, f"Nothing precedes the first token: {first.logprob}.")
    for token in rest:
        check(token.logprob is not None and token.logprob <= 1e-6, f"{token} has no probability.")
        check(len(token.top) == 1, f"{len(token.top)} candidates are not 1.")
        best = token.top[0].logprob
        check((token.logprob or 0.0) <= best + 1e-6, f"{token.logprob} is above the best, {best}.")
    scored = rest[len(prompt) - 1 :]
    for chosen, token in zip(reply.logprobs, scored, strict=False):
        distance = abs(chosen.logprob - (token.logprob or 0.0))
        check(distance < _NEAR, f"{chosen.logprob} in an answer is {token.logprob} in a prompt.")


@case("W11")
async def infill(subject: Subject) -> None:
    """A suffix is part of the prompt, or is refused by its name."""
    sides: dict[str, Any] = {"prompt": await subject.noise(8), "suffix": "x y z"}
    request = subject.request(**sides, **subject.able(max_tokens=2))
    if not subject.capabilities.infill:
        error = await refusal(subject.backend.ask(request), Unsupported)
        check(error.param == "suffix", f"The error names {error.param}.")
        raise Declared("Refused by its name.")
    reply = await subject.ask(**sides, **subject.able(max_tokens=2))
    tokens, least = reply.finish.usage.prompt_tokens, 8 + len(await subject.tokens("x y z"))
    check(tokens > least, f"Both sides and their marks are more than {least} tokens: {tokens}.")


@case("W25")
async def continued(subject: Subject) -> None:
    """A last assistant message that is continued ends the prompt."""
    if subject.is_remote or not subject.capabilities.chat:
        raise Declared("Its prompts cannot be read.")
    messages = (Message("user", "How was the weather?"), Message("assistant", _BEGUN))
    counted = await collect_count(
        subject.backend.ask(CountRequest(messages=messages, continue_final=True))
    )
    request = DetokenizeRequest(token_ids=counted.token_ids or ())
    prompt = await collect_text(subject.backend.ask(request))
    check(prompt.endswith(_BEGUN), f"The prompt ends with {prompt[-40:]!r}.")


CASES = (prompt_logprobs, infill, continued)
