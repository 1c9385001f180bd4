"""Limits: the end of the context, and continuing an answer."""

from __future__ import annotations

from headrace.core.errors import ContextOverflow, RequestError
from headrace.lab.cases.answers import sound
from headrace.lab.cases.case import case
from headrace.lab.cases.subject import TOKENS, Declared, Reply, Subject, check, refusal

_LARGEST = 8192
_LEFT = 6


def _limit(subject: Subject) -> int:
    limit = subject.info.context_length
    if limit is None:
        raise Declared("Its context length is not known.")
    return limit


@case("W6")
async def context_at_its_end(subject: Subject) -> None:
    """A prompt up to one token of the limit is answered, and an answer fills it to its end."""
    own = _limit(subject)
    if own <= _LARGEST:
        await _to_its_end(subject, own)
    if not subject.is_remote:
        await _to_its_end(subject, min(own, 96), context_length=min(own, 96))


async def _to_its_end(subject: Subject, limit: int, **fields: int) -> None:
    single = subject.able(max_tokens=1, ignore_eos=True)
    edge = await subject.short(await subject.noise(limit - 1, seed=limit), **single, **fields)
    sound(subject, edge, limit - 1)
    tokens = edge.finish.usage.completion_tokens
    check(tokens == 1, f"At the limit it generated {tokens} tokens.")
    prompt = await subject.noise(limit - _LEFT, seed=limit + 1)
    # Without max_tokens an answer fills the context; another service may not do that.
    capped = {"max_tokens": _LEFT} if subject.is_remote else {}
    rest = subject.able(ignore_eos=True, temperature=0.0, **capped)
    full = await subject.ask(prompt, **rest, **fields)
    sound(subject, full, len(prompt))
    if "ignore_eos" in subject.capabilities.sampling:
        tokens = full.finish.usage.completion_tokens
        check(tokens == _LEFT, f"{_LEFT} tokens fitted, and it generated {tokens}.")
        check(full.reason == "length", f"At the end of the context: {full.reason!r}.")


@case("W6 W17")
async def context_overflow(subject: Subject) -> None:
    """One token over the limit is refused, and so is ten times the limit; then it still serves."""
    limit = _limit(subject)
    if subject.is_remote:
        request = subject.request("river " * limit * 10)
        await refusal(subject.backend.ask(request), RequestError)
    else:
        few = subject.able(max_tokens=1)
        for length in (limit, limit * 10):
            request = subject.request(await subject.noise(length), **few)
            await refusal(subject.backend.ask(request), ContextOverflow)
        prompt = await subject.noise(limit - 10)
        request = subject.request(prompt, **subject.able(max_tokens=11))
        error = await refusal(subject.backend.ask(request), ContextOverflow)
        check(error.param == "max_tokens", f"It names {error.param}, not max_tokens.")
        request = subject.request(prompt[:20], context_length=20, **few)
        await refusal(subject.backend.ask(request), ContextOverflow)
    sound(subject, await subject.short())


@case("W11 W17")
async def resume(subject: Subject) -> str | None:
    """An answer continues from tokens that it already has; or that is refused by its name."""
    whole = await subject.greedy()
    kept = whole.ids[: TOKENS // 2] or (1,)
    if not subject.capabilities.resume:
        request = subject.request(answered=kept, **subject.able(max_tokens=TOKENS))
        error = await refusal(subject.backend.ask(request), RequestError)
        check(error.param == "answered", f"It names {error.param}, not answered.")
        raise Declared("Refused by its name.")
    reply = await subject.short(answered=kept)
    _continued(whole, reply, kept)
    sound(subject, reply, whole.finish.usage.prompt_tokens)
    if reply.text != whole.text:
        return f"Undisturbed it is {whole.text!r}, continued {reply.text!r}."
    return None


def _continued(whole: Reply, reply: Reply, kept: tuple[int, ...]) -> None:
    opening = reply.deltas[0]
    length = len(opening.token_ids)
    # Tokens that end inside of a character are generated again.
    check(
        len(kept) - 3 <= length <= len(kept), f"It continues from {length} of {len(kept)} tokens."
    )
    check(
        opening.token_ids == kept[:length],
        "It does not begin with the tokens that it continues from.",
    )
    check(whole.text.startswith(opening.text), f"It begins with {opening.text!r}.")
    over = reply.reason == "length" and len(reply.ids) != TOKENS
    check(not over, f"With those it continues from, it has {len(reply.ids)} tokens of {TOKENS}.")


CASES = (context_at_its_end, context_overflow, resume)
