"""Limits: the context at its end, and going on with an answer."""

from __future__ import annotations

from headrace.contract.answers import sound
from headrace.contract.case import case
from headrace.contract.subject import TOKENS, Declared, Heard, Subject, check, refusal
from headrace.core.errors import ContextOverflow, RequestError

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


async def _to_its_end(subject: Subject, limit: int, **asked: int) -> None:
    one = subject.able(max_tokens=1, ignore_eos=True)
    edge = await subject.say(await subject.noise(limit - 1, seed=limit), **one, **asked)
    sound(subject, edge, limit - 1)
    said = edge.finish.usage.completion_tokens
    check(said == 1, f"At the limit it said {said} tokens.")
    prompt = await subject.noise(limit - _LEFT, seed=limit + 1)
    # Without max_tokens an answer fills the context; somebody else's server may think otherwise.
    most = {"max_tokens": _LEFT} if subject.is_remote else {}
    rest = subject.able(ignore_eos=True, temperature=0.0, **most)
    full = await subject.ask(prompt, **rest, **asked)
    sound(subject, full, len(prompt))
    if "ignore_eos" in subject.capabilities.sampling:
        said = full.finish.usage.completion_tokens
        check(said == _LEFT, f"{_LEFT} tokens fitted, and it said {said}.")
        check(full.reason == "length", f"At the end of the context: {full.reason!r}.")


@case("W6 W17")
async def context_overflow(subject: Subject) -> None:
    """One token over the limit is refused, and ten times the limit is, and it serves on."""
    limit = _limit(subject)
    if subject.is_remote:
        asked = subject.request("river " * limit * 10)
        await refusal(subject.backend.ask(asked), RequestError)
    else:
        few = subject.able(max_tokens=1)
        for length in (limit, limit * 10):
            asked = subject.request(await subject.noise(length), **few)
            await refusal(subject.backend.ask(asked), ContextOverflow)
        prompt = await subject.noise(limit - 10)
        asked = subject.request(prompt, **subject.able(max_tokens=11))
        error = await refusal(subject.backend.ask(asked), ContextOverflow)
        check(error.param == "max_tokens", f"It names {error.param}, not max_tokens.")
        asked = subject.request(prompt[:20], context_length=20, **few)
        await refusal(subject.backend.ask(asked), ContextOverflow)
    sound(subject, await subject.say())


@case("W11 W17")
async def resume(subject: Subject) -> str | None:
    """An answer goes on from tokens that it has already; or that is refused by its name."""
    whole = await subject.greedy()
    kept = whole.ids[: TOKENS // 2] or (1,)
    if not subject.capabilities.resume:
        asked = subject.request(answered=kept, **subject.able(max_tokens=TOKENS))
        error = await refusal(subject.backend.ask(asked), RequestError)
        check(error.param == "answered", f"It names {error.param}, not answered.")
        raise Declared("Refused by its name.")
    heard = await subject.say(answered=kept)
    _gone_on(whole, heard, kept)
    sound(subject, heard, whole.finish.usage.prompt_tokens)
    if heard.text != whole.text:
        return f"Undisturbed it says {whole.text!r}, gone on with {heard.text!r}."
    return None


def _gone_on(whole: Heard, heard: Heard, kept: tuple[int, ...]) -> None:
    opening = heard.deltas[0]
    length = len(opening.token_ids)
    # What ends inside of a character is generated again.
    check(len(kept) - 3 <= length <= len(kept), f"It goes on from {length} of {len(kept)} tokens.")
    check(opening.token_ids == kept[:length], "It begins with other tokens than it was given.")
    check(whole.text.startswith(opening.text), f"It begins with {opening.text!r}.")
    over = heard.reason == "length" and len(heard.ids) != TOKENS
    check(not over, f"With what it had it said {len(heard.ids)} tokens of {TOKENS}.")


CASES = (context_at_its_end, context_overflow, resume)
