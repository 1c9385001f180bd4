"""Speculation: drafts change how long an answer takes, and nothing else."""

from __future__ import annotations

from contextlib import aclosing
from dataclasses import replace

from headrace import engines
from headrace.core.errors import ConfigError
from headrace.core.metrics import Usage
from headrace.lab.cases.case import case
from headrace.lab.cases.subject import Broken, Declared, Reply, Subject, check, first_delta

LOOP = "one two three four five six seven eight nine ten "
"""A text that repeats itself: what follows its last words has been in it before."""
_PROMPT = LOOP * 4
_TOKENS = 32
_NEAR = 0.05
"""Log probabilities of two tokens that are so near may change places by rounding."""
_SAME = 0.02
_WINDOW = 16
_OF_DRAFTS = ("draft_model", "draft_tokens")


async def drafting(subject: Subject) -> Subject:
    """Return the model with drafts: those of its options, or else by n-grams. Loaded once.

    Raises:
        Declared: the engine has no speculation, and refuses the option, or none for this model,
            which takes images.
    """
    if "speculation" not in engines.options(subject.engine).model_fields:
        try:
            engines.check_options(subject.engine, {"speculation": "ngram"})
        except ConfigError as error:
            check("speculation" in error.message, "The error does not name the option.")
            raise Declared("It drafts no tokens.") from error
        raise Broken("It accepts speculation as an option that it does not have.")
    drafted = subject if subject.capabilities.speculation else await _with(subject, "ngram")
    able = drafted.capabilities
    if (able.vision or able.audio) and not able.speculation:
        check(any("speculation" in note for note in drafted.info.notes), "No note says why.")
        raise Declared("It drafts no tokens for models that take images or audio.")
    return drafted


async def _with(subject: Subject, way: str) -> Subject:
    if way not in subject.known:
        kept = {key: value for key, value in subject.info.options.items() if key not in _OF_DRAFTS}
        options = {**(kept if way == "off" else subject.info.options), "speculation": way}
        backend = await subject.held.enter_async_context(subject.reopen(options=options))
        subject.known[way] = replace(subject, backend=backend, known={})
    return subject.known[way]


async def _without(subject: Subject) -> Subject:
    """Return the model without drafts."""
    return await _with(subject, "off") if subject.capabilities.speculation else subject


async def _greedy(subject: Subject, tokens: int = _TOKENS, **given: object) -> Reply:
    fixed = subject.able(max_tokens=tokens, temperature=0.0, ignore_eos=True)
    return await subject.ask(_PROMPT, raw=True, **(fixed | given))


async def _plain(subject: Subject) -> Reply:
    if "undrafted" not in subject.known:
        without = await _without(subject)
        subject.known["undrafted"] = await _greedy(without, **without.able(logprobs=2))
    return subject.known["undrafted"]


def _tie(plain: Reply, other: Reply) -> str | None:
    """Return None for the same tokens, and a remark if they part at two equally likely ones.

    Raises:
        Broken: they part elsewhere.
    """
    if plain.ids == other.ids:
        return None
    pairs = enumerate(zip(plain.ids, other.ids, strict=False))
    at = next((place for place, (mine, its) in pairs if mine != its), None)
    check(at is not None, f"{len(other.ids)} tokens with drafts, {len(plain.ids)} without.")
    assert at is not None
    likely = [top.logprob for token in plain.logprobs[at : at + 1] for top in token.top]
    check(len(likely) > 1, f"With drafts token {at} is {other.ids[at]}, not {plain.ids[at]}.")
    apart = likely[0] - likely[1]
    check(apart < _NEAR, f"With drafts token {at} is another, which is {apart:.2f} less likely.")
    return f"Token {at} is one of two that are equally likely."


def _repeats(answer: str) -> bool:
    """Whether an answer repeats its prompt; that of a model with random weights does not."""
    windows = (answer[end - _WINDOW : end] for end in range(_WINDOW, len(answer)))
    return any(window in _PROMPT for window in windows)


def _counted(usage: Usage) -> None:
    check(usage.drafted_tokens > 0, "Of a text that repeats itself it drafts nothing.")
    message = f"{usage.accepted_tokens} of {usage.drafted_tokens} drafted tokens are accepted."
    check(0 < usage.accepted_tokens <= usage.drafted_tokens, message)
    check(usage.accepted_tokens < usage.completion_tokens, "All tokens are of drafts.")


@case("W11 W20")
async def speculation_keeps_the_text(subject: Subject) -> str | None:
    """With drafts, greedy text is the same as without; drafted and accepted tokens are counted.

    Or a note of the model says that the library does not report its drafted tokens.
    """
    drafted = await drafting(subject)
    check(drafted.capabilities.speculation, "It does not declare that it drafts.")
    without = (await _without(subject)).capabilities
    check(not without.speculation, "It declares drafts that it does not make.")
    plain, reply = await _plain(subject), await _greedy(drafted)
    usage, before = reply.finish.usage, plain.finish.usage
    check(not before.drafted_tokens, "Without speculation there are drafted tokens.")
    if _repeats(plain.text) and not any("drafted" in note for note in drafted.info.notes):
        _counted(usage)
    message = f"{usage.completion_tokens} tokens with drafts, {before.completion_tokens} without."
    check(usage.completion_tokens == before.completion_tokens, message)
    remark = _tie(plain, reply)
    invariant = drafted.capabilities.batch_invariant
    check(not (remark and invariant), f"Greedy text depends on drafts. {remark}")
    return remark


@case("W11 W12 W15")
async def speculation_ends_exactly(subject: Subject) -> None:
    """An answer with drafts ends at max_tokens, a stop string and a stop token, within a draft."""
    drafted = await drafting(subject)
    whole = await _greedy(drafted)
    for tokens in range(3, 12, 2):
        reply = await _greedy(drafted, tokens)
        check(len(reply.ids) == tokens, f"{len(reply.ids)} tokens, where {tokens} are allowed.")
        check(reply.finish.usage.completion_tokens == tokens, "The usage counts others.")
        check(reply.ids == whole.ids[:tokens], "The first tokens of a shorter answer are others.")
    half = len(whole.text) // 2
    stop = whole.text[half : half + 5]
    reply = await _greedy(drafted, stop=(stop,))
    expected = whole.text[: whole.text.index(stop)]
    check(reply.text == expected, f"Stopped at {stop!r}: {reply.text!r}, not {expected!r}.")
    usage = reply.finish.usage
    check(usage.accepted_tokens <= usage.completion_tokens, "More are accepted than written.")
    if "stop_token_ids" in drafted.capabilities.sampling:
        token = whole.ids[len(whole.ids) // 2]
        reply = await _greedy(drafted, stop_token_ids=(token,))
        check(reply.ids == whole.ids[: whole.ids.index(token)], "It runs over a stop token.")


@case("W8 W14")
async def speculation_is_cancelled(subject: Subject) -> None:
    """An answer that is left within a draft frees its slot; all slots answer together after it."""
    drafted = await drafting(subject)
    whole = await _greedy(drafted)
    for _ in range(2 * (drafted.info.max_running or 1)):
        stream = drafted.backend.ask(drafted.long(_PROMPT))
        async with aclosing(stream):
            await first_delta(stream)
    check((await _greedy(drafted)).ids == whole.ids, "After cancelled ones the text is another.")


@case("W11 W30")
async def speculation_and_constraints(subject: Subject) -> None:
    """Constraints hold with drafts, and each token has its log probability."""
    drafted = await drafting(subject)
    able = drafted.capabilities
    if "logprobs" in able.sampling:
        plain, reply = await _plain(subject), await _greedy(drafted, logprobs=2)
        check(len(reply.logprobs) == len(reply.ids), "Tokens of drafts have no log probabilities.")
        for mine, its in zip(plain.logprobs, reply.logprobs, strict=True):
            if mine.token_id != its.token_id:
                break
            apart = abs(mine.logprob - its.logprob)
            check(apart < _SAME, f"{its.data!r} has {its.logprob:.3f}, not {mine.logprob:.3f}.")
            check(bool(its.top) == bool(mine.top), f"{its.data!r} has no candidates.")
    if "regex" in able.forms:
        pattern = "(one two three four five, ){4}end"
        reply = await _greedy(drafted, ignore_eos=False, regex=pattern)
        right = "one two three four five, " * 4 + "end"
        check(right.startswith(reply.text), f"{reply.text!r} does not match {pattern!r}.")


@case("W11 W17")
async def speculation_resumes(subject: Subject) -> str | None:
    """An answer with drafts continues from tokens that it already has, with the same text."""
    drafted = await drafting(subject)
    if not drafted.capabilities.resume:
        return None
    whole = await _greedy(drafted)
    for kept in (1, _TOKENS // 2, _TOKENS - 1):
        reply = await _greedy(drafted, answered=whole.ids[:kept])
        if remark := _tie(await _plain(subject), reply):
            return remark
        check(reply.finish.usage.completion_tokens == _TOKENS, "The usage counts other tokens.")
    return None


CASES = (
    speculation_keeps_the_text,
    speculation_ends_exactly,
    speculation_resumes,
    speculation_is_cancelled,
    speculation_and_constraints,
)
