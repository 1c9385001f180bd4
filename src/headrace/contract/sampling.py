"""Sampling: each field changes what it should, or is refused by its name."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Annotated, Any

import msgspec

from headrace.contract.case import Case, case
from headrace.contract.subject import TOKENS, Declared, Heard, Subject, check, refusal
from headrace.core.errors import InvalidRequest, Unsupported
from headrace.core.sampling import Sampling

PROBES: dict[str, Any] = {
    "max_tokens": 4,
    "temperature": 0.5,
    "top_p": 0.5,
    "top_k": 5,
    "min_p": 0.5,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.5,
    "repetition_penalty": 1.5,
    "seed": 7,
    "stop_token_ids": (5,),
    "ignore_eos": True,
    "logprobs": 1,
    "logit_bias": {5: 1.0},
}
"""A value for each field, so that a refusal of it can be seen."""

LOOPS = (
    "one two three one two three one two three one two",
    "la la la la la la la la",
    "The river, the river, the river, the",
)
SCHEMA = {
    "type": "object",
    "properties": {"age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["age"],
    "additionalProperties": False,
}


class _Aged(msgspec.Struct, forbid_unknown_fields=True):
    age: Annotated[int, msgspec.Meta(ge=0, le=99)]


_NARROW: dict[str, Any] = {"top_k": 1, "min_p": 1.0, "top_p": 1e-6}
_PENALTIES = {"presence_penalty": 2.0, "frequency_penalty": 2.0, "repetition_penalty": 1.8}
_WIDE = {"temperature": 2.0, "top_k": 0, "min_p": 0.0, "top_p": 1.0}
_LONGEST = 48


async def _wide(subject: Subject, seed: int, **given: Any) -> Heard:
    fields = subject.able(max_tokens=TOKENS, seed=seed, **_WIDE)
    return await subject.ask(**(fields | given))


async def _max_tokens(subject: Subject) -> None:
    for most in (1, 5):
        heard = await subject.say(**subject.able(max_tokens=most, ignore_eos=True))
        tokens = heard.finish.usage.completion_tokens
        check(tokens == most, f"max_tokens {most} gave {tokens}.")
        check(heard.reason == "length", f"The reason is {heard.reason!r}, not length.")


async def _temperature(subject: Subject) -> None:
    if await subject.certain():
        return
    texts = {(await _wide(subject, seed)).text for seed in range(4)}
    check(len(texts) > 1, "Temperature 2 always gives the same text.")


async def _seed(subject: Subject) -> None:
    one, again = await _wide(subject, 1), await _wide(subject, 1)
    check(one.text == again.text, f"One seed gave {one.text!r}, then {again.text!r}.")
    if not await subject.certain():
        others = {(await _wide(subject, seed)).text for seed in (2, 3)}
        check(others - {one.text}, "Other seeds give the same text.")


async def _narrow(subject: Subject, name: str) -> None:
    greedy, narrow = await subject.greedy(), {name: _NARROW[name]}
    heard = await _wide(subject, 3, **narrow)
    check(heard.text == greedy.text, f"{narrow} gave {heard.text!r}, not {greedy.text!r}.")
    if not await subject.certain():
        free = {(await _wide(subject, seed)).text for seed in (3, 4)}
        check(free != {greedy.text}, f"Without {name} the text is the same.")


async def _penalty(subject: Subject, name: str) -> None:
    for prompt in LOOPS:
        plain = await subject.say(prompt, raw=True)
        heard = await subject.say(prompt, raw=True, **{name: _PENALTIES[name]})
        if heard.text != plain.text:
            return
    check(await subject.certain(), f"{name} {_PENALTIES[name]} changes no text that repeats.")


async def _stop_token_ids(subject: Subject) -> None:
    # A small model may say one token for ever, unless it is drawn.
    for fields in ({}, subject.able(seed=5, **_WIDE)):
        plain = await subject.say(**fields)
        ids = plain.ids or await subject.tokens(plain.text)
        place = next((at for at in range(2, len(ids)) if ids[at] not in ids[:at]), 0)
        if place:
            await _stopped_at(subject, plain, ids, place, fields)
            return
    check(False, "All tokens of its answers are the same.")


async def _stopped_at(
    subject: Subject, plain: Heard, ids: tuple[int, ...], place: int, fields: dict[str, Any]
) -> None:
    heard = await subject.say(stop_token_ids=(ids[place],), **fields)
    told = heard.finish.usage.completion_tokens
    check(heard.ids == plain.ids[:place], f"It ends at {place} of {ids}, and said {heard.ids}.")
    check(plain.text.startswith(heard.text), f"{heard.text!r} is no beginning of {plain.text!r}.")
    check(heard.reason == "stop", f"The reason is {heard.reason!r}, not stop.")
    check(told == place, f"Usage counts {told} tokens of {place}.")


async def _ignore_eos(subject: Subject) -> None:
    plain = await subject.say("Say hi.", **subject.able(max_tokens=_LONGEST))
    told = plain.finish.usage.completion_tokens
    most = told + 4 if plain.reason == "stop" else told
    heard = await subject.say("Say hi.", ignore_eos=True, **subject.able(max_tokens=most))
    check(heard.reason == "length", f"With ignore_eos the reason is {heard.reason!r}.")
    tokens = heard.finish.usage.completion_tokens
    check(tokens == most, f"With ignore_eos it said {tokens} tokens of {most}.")
    check(heard.text.startswith(plain.text), "Up to the end token the text differs.")


async def _logprobs(subject: Subject) -> None:
    plain = await subject.greedy()
    for most in (0, 3):
        try:
            heard = await subject.say(logprobs=most)
        except Unsupported as error:
            check(most and error.param == "logprobs", f"logprobs={most}: {error.message}")
            raise Declared("Candidates beside the chosen token are refused.") from error
        check(heard.text == plain.text, "Asking for logprobs changes the text.")
        if not subject.is_remote:
            ids = tuple(one.token_id for one in heard.logprobs)
            check(ids == heard.ids, f"Logprobs are of {ids}, the tokens are {heard.ids}.")
        check(heard.logprobs, "There are no logprobs.")
        for one in heard.logprobs:
            tops = [top.logprob for top in one.top]
            check(one.logprob <= 1e-6, f"A logarithm of a probability is {one.logprob}.")
            check(len(tops) in (0, most), f"{len(tops)} candidates are not {most}.")
            check(tops == sorted(tops, reverse=True), f"Candidates are not in order: {tops}.")
            check(sum(map(math.exp, tops)) <= 1 + 1e-4, f"More than certain: {tops}.")


async def _logit_bias(subject: Subject) -> None:
    word, plain = (await subject.tokens(" river"))[-1], await subject.greedy()
    forced = await subject.say(logit_bias={word: 100.0}, **subject.able(max_tokens=3))
    check(forced.text.count("river") == 3, f"Token {word} was forced: {forced.text!r}.")
    first = (plain.ids or await subject.tokens(plain.text))[0]
    barred = await subject.say(logit_bias={first: -100.0})
    check(first not in barred.ids, f"Token {first} was forbidden and said.")
    check(barred.text != plain.text, f"Token {first} was forbidden, and the text is the same.")
    unknown = subject.request(logit_bias={1 << 40: 1.0})
    await refusal(subject.backend.ask(unknown), InvalidRequest)


_EFFECTS: dict[str, Callable[[Subject], Awaitable[None]]] = {
    "max_tokens": _max_tokens,
    "temperature": _temperature,
    "seed": _seed,
    **{name: partial(_narrow, name=name) for name in _NARROW},
    **{name: partial(_penalty, name=name) for name in _PENALTIES},
    "stop_token_ids": _stop_token_ids,
    "ignore_eos": _ignore_eos,
    "logprobs": _logprobs,
    "logit_bias": _logit_bias,
}


async def _field(subject: Subject, name: str) -> None:
    if name in subject.capabilities.sampling:
        await _EFFECTS[name](subject)
        return
    asked = subject.request(**{name: PROBES[name]})
    error = await refusal(subject.backend.ask(asked), Unsupported)
    check(error.param == name, f"It is refused, but the error names {error.param}.")
    raise Declared("Refused by its name.")


def _case(name: str) -> Case:
    about = f"{name} changes what it should, or is refused by its name."
    run = partial(_field, name=name)
    return Case(name=f"sampling_{name}", rows="W11", about=about, run=run, task="generate")


@case("W11")
async def json_schema(subject: Subject) -> None:
    """An answer keeps to a JSON schema; one that is no schema is refused."""
    asked = subject.request(json_schema=SCHEMA, **subject.able(max_tokens=40, temperature=0.0))
    if not subject.capabilities.json_schema:
        error = await refusal(subject.backend.ask(asked), Unsupported)
        check(error.param == "response_format", f"The error names {error.param}.")
        raise Declared("Refused by its name.")
    heard = await subject.say(json_schema=SCHEMA, **subject.able(max_tokens=40))
    try:
        msgspec.json.decode(heard.text, type=_Aged)
    except msgspec.ValidationError as error:
        check(False, f"{heard.text!r} does not keep to the schema: {error}.")
    except msgspec.DecodeError as error:
        check(False, f"{heard.text!r} is no JSON: {error}.")
    if not subject.is_remote:
        wrong = subject.request(json_schema={"type": "nothing"}, **subject.able(max_tokens=4))
        await refusal(subject.backend.ask(wrong), InvalidRequest)


@case("W11")
async def sampling_is_declared(subject: Subject) -> None:
    """What is declared are fields that there are."""
    known = {*Sampling.__struct_fields__}
    unknown = subject.capabilities.sampling - known
    check(not unknown, f"It declares {sorted(unknown)}, which nobody can ask for.")
    check("max_tokens" in subject.capabilities.sampling, "It does not honour max_tokens.")


CASES = (sampling_is_declared, *map(_case, PROBES), json_schema)
