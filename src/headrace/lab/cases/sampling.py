"""Sampling: each field changes what it should, or is refused by its name."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Annotated, Any

import jsonschema_rs
import msgspec

from headrace.core.errors import (
    ConstraintViolated,
    InvalidRequest,
    RequestError,
    Unsupported,
    UpstreamError,
)
from headrace.core.sampling import Sampling
from headrace.lab.cases.case import Case, case
from headrace.lab.cases.subject import TOKENS, Broken, Declared, Reply, Subject, check, refusal

PROBES: dict[str, Any] = {
    "max_tokens": 4,
    "min_tokens": 1,
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
"""A value for each field, to test its refusal."""

NEUTRAL: dict[str, Any] = {
    "min_tokens": 0,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "logit_bias": {5: 0.0},
}
"""Values that change nothing."""

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


async def _wide(subject: Subject, seed: int, **given: Any) -> Reply:
    fields = subject.able(max_tokens=TOKENS, seed=seed, **_WIDE)
    return await subject.ask(**(fields | given))


async def _max_tokens(subject: Subject) -> None:
    for limit in (1, 5):
        reply = await subject.short(**subject.able(max_tokens=limit, ignore_eos=True))
        tokens = reply.finish.usage.completion_tokens
        check(tokens == limit, f"max_tokens {limit} gave {tokens}.")
        check(reply.reason == "length", f"The reason is {reply.reason!r}, not length.")


async def _temperature(subject: Subject) -> None:
    if await subject.certain():
        return
    texts = {(await _wide(subject, seed)).text for seed in range(4)}
    check(len(texts) > 1, "Temperature 2 always gives the same text.")


async def _seed(subject: Subject) -> None:
    first, again = await _wide(subject, 1), await _wide(subject, 1)
    check(first.text == again.text, f"One seed gave {first.text!r}, then {again.text!r}.")
    if not await subject.certain():
        others = {(await _wide(subject, seed)).text for seed in (2, 3)}
        check(others - {first.text}, "Other seeds give the same text.")


async def _narrow(subject: Subject, name: str) -> None:
    greedy, narrow = await subject.greedy(), {name: _NARROW[name]}
    reply = await _wide(subject, 3, **narrow)
    check(reply.text == greedy.text, f"{narrow} gave {reply.text!r}, not {greedy.text!r}.")
    if not await subject.certain():
        free = {(await _wide(subject, seed)).text for seed in (3, 4)}
        check(free != {greedy.text}, f"Without {name} the text is the same.")


async def _penalty(subject: Subject, name: str) -> None:
    for prompt in LOOPS:
        plain = await subject.short(prompt, raw=True)
        reply = await subject.short(prompt, raw=True, **{name: _PENALTIES[name]})
        if reply.text != plain.text:
            return
    check(await subject.certain(), f"{name} {_PENALTIES[name]} changes no text that repeats.")


async def _stop_token_ids(subject: Subject) -> None:
    # A small model may repeat one token endlessly, unless it is sampled.
    for fields in ({}, subject.able(seed=5, **_WIDE)):
        plain = await subject.short(**fields)
        ids = plain.ids or await subject.tokens(plain.text)
        place = next((at for at in range(2, len(ids)) if ids[at] not in ids[:at]), 0)
        if place:
            await _stopped_at(subject, plain, ids, place, fields)
            return
    check(False, "All tokens of its answers are the same.")


async def _stopped_at(
    subject: Subject, plain: Reply, ids: tuple[int, ...], place: int, fields: dict[str, Any]
) -> None:
    reply = await subject.short(stop_token_ids=(ids[place],), **fields)
    tokens = reply.finish.usage.completion_tokens
    check(reply.ids == plain.ids[:place], f"It ends at {place} of {ids}, with {reply.ids}.")
    check(plain.text.startswith(reply.text), f"{reply.text!r} is no beginning of {plain.text!r}.")
    check(reply.reason == "stop", f"The reason is {reply.reason!r}, not stop.")
    check(tokens == place, f"Usage counts {tokens} tokens of {place}.")


async def _min_tokens(subject: Subject) -> None:
    if "stop_token_ids" not in subject.capabilities.sampling:
        return
    plain = await subject.greedy()
    ids = plain.ids or await subject.tokens(plain.text)
    try:
        reply = await subject.short(stop_token_ids=ids[:1], min_tokens=3)
    except (Unsupported, UpstreamError) as error:
        check(subject.is_remote, f"It is declared, and refused: {error.message}")
        raise Declared("The engine of the upstream refuses it.") from error
    tokens = reply.finish.usage.completion_tokens
    check(tokens >= 3, f"min_tokens 3 gave {tokens}.")


async def _ignore_eos(subject: Subject) -> None:
    plain = await subject.short("Say hi.", **subject.able(max_tokens=_LONGEST))
    tokens = plain.finish.usage.completion_tokens
    limit = tokens + 4 if plain.reason == "stop" else tokens
    reply = await subject.short("Say hi.", ignore_eos=True, **subject.able(max_tokens=limit))
    check(reply.reason == "length", f"With ignore_eos the reason is {reply.reason!r}.")
    tokens = reply.finish.usage.completion_tokens
    check(tokens == limit, f"With ignore_eos it has {tokens} tokens of {limit}.")
    check(reply.text.startswith(plain.text), "Up to the end token the text differs.")


async def _logprobs(subject: Subject) -> None:
    plain = await subject.greedy()
    for count in (0, 3):
        try:
            reply = await subject.short(logprobs=count)
        except Unsupported as error:
            check(count and error.param == "logprobs", f"logprobs={count}: {error.message}")
            raise Declared("Candidates beside the chosen token are refused.") from error
        check(reply.text == plain.text, "Requesting logprobs changes the text.")
        if not subject.is_remote:
            ids = tuple(token.token_id for token in reply.logprobs)
            check(ids == reply.ids, f"Logprobs are of {ids}, the tokens are {reply.ids}.")
        check(reply.logprobs, "There are no logprobs.")
        for token in reply.logprobs:
            tops = [top.logprob for top in token.top]
            check(token.logprob <= 1e-6, f"A log probability is {token.logprob}.")
            check(len(tops) in (0, count), f"{len(tops)} candidates are not {count}.")
            check(tops == sorted(tops, reverse=True), f"Candidates are not in order: {tops}.")
            check(
                sum(map(math.exp, tops)) <= 1 + 1e-4,
                f"The probabilities sum to more than 1: {tops}.",
            )


async def _logit_bias(subject: Subject) -> None:
    word, plain = (await subject.tokens(" river"))[-1], await subject.greedy()
    forced = await subject.short(logit_bias={word: 100.0}, **subject.able(max_tokens=3))
    check(forced.text.count("river") == 3, f"Token {word} was forced: {forced.text!r}.")
    first = (plain.ids or await subject.tokens(plain.text))[0]
    barred = await subject.short(logit_bias={first: -100.0})
    check(first not in barred.ids, f"Token {first} was forbidden, and was generated.")
    check(barred.text != plain.text, f"Token {first} was forbidden, and the text is the same.")
    unknown = subject.request(logit_bias={1 << 40: 1.0})
    await refusal(subject.backend.ask(unknown), InvalidRequest)


_EFFECTS: dict[str, Callable[[Subject], Awaitable[None]]] = {
    "max_tokens": _max_tokens,
    "min_tokens": _min_tokens,
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
    request = subject.request(**{name: PROBES[name]})
    error = await refusal(subject.backend.ask(request), Unsupported)
    check(error.param == name, f"It is refused, but the error names {error.param}.")
    raise Declared("Refused by its name.")


def _case(name: str) -> Case:
    about = f"{name} changes what it should, or is refused by its name."
    run = partial(_field, name=name)
    return Case(name=f"sampling_{name}", rows="W11", about=about, run=run, task="generate")


@case("W11")
async def json_schema(subject: Subject) -> None:
    """An answer keeps to a JSON schema; one that is no schema is refused."""
    request = subject.request(json_schema=SCHEMA, **subject.able(max_tokens=40, temperature=0.0))
    if not subject.capabilities.json_schema:
        error = await refusal(subject.backend.ask(request), Unsupported)
        check(error.param == "response_format", f"The error names {error.param}.")
        raise Declared("Refused by its name.")
    reply = await subject.short(json_schema=SCHEMA, **subject.able(max_tokens=40))
    try:
        msgspec.json.decode(reply.text, type=_Aged)
    except msgspec.ValidationError as error:
        check(False, f"{reply.text!r} does not keep to the schema: {error}.")
    except msgspec.DecodeError as error:
        check(False, f"{reply.text!r} is no JSON: {error}.")
    if not subject.is_remote:
        wrong = subject.request(json_schema={"type": "nothing"}, **subject.able(max_tokens=4))
        await refusal(subject.backend.ask(wrong), InvalidRequest)


_HARD: tuple[dict[str, Any], ...] = (
    {"type": "array", "items": {"type": "string", "format": "uri"}, "minItems": 1, "maxItems": 1},
    {"type": "integer", "multipleOf": 9973, "minimum": 1, "maximum": 10**15},
    {"type": "array", "items": {"type": "integer"}, "maxItems": 4096},
    {"type": "string", "not": {"const": "x"}},
    {"type": "array", "items": {"enum": [1, 2]}, "minItems": 2, "uniqueItems": True},
    {"type": "string", "format": "no-such-format"},
    {"type": "string", "pattern": "^(?=x)"},
)


@case("W11")
async def json_schema_fails_closed(subject: Subject) -> None:
    """An answer to a schema that is hard to enforce keeps to it, or the schema is refused."""
    if not subject.capabilities.json_schema:
        raise Declared("JSON schemas are refused.")
    for schema in _HARD:
        try:
            reply = await subject.short(json_schema=schema, **subject.able(max_tokens=24))
        except RequestError as error:
            check(error.param == "response_format", f"The error names {error.param}.")
            continue
        except (ConstraintViolated, UpstreamError):
            # Only an upstream may find that out too late.
            if subject.is_remote:
                continue
            raise
        if reply.reason == "length":
            check(reply.text[:1] in '["123456789', f"{reply.text!r} is free text.")
        else:
            _check_kept(reply.text, schema)


def _check_kept(text: str, schema: dict[str, Any]) -> None:
    try:
        value = msgspec.json.decode(text)
    except msgspec.DecodeError as error:
        raise Broken(f"{text!r} is no JSON: {error}.") from error
    kept = jsonschema_rs.is_valid(schema, value)
    check(kept, f"{text!r} does not keep to {schema}.")


@case("W11")
async def sampling_neutral(subject: Subject) -> None:
    """Values that change nothing are accepted, also of fields that it does not have."""
    neutral = {k: v for k, v in NEUTRAL.items() if k not in subject.capabilities.sampling}
    for given in (neutral, neutral | {"top_k": -1} if "top_k" in neutral else neutral):
        reply = await subject.short(**given, **subject.able(max_tokens=4))
        check(bool(reply.finish.usage.completion_tokens), "There is no answer.")


@case("W11")
async def sampling_is_declared(subject: Subject) -> None:
    """Only fields that exist are declared."""
    known = {*Sampling.__struct_fields__}
    unknown = subject.capabilities.sampling - known
    check(not unknown, f"It declares {sorted(unknown)}, which do not exist.")
    check("max_tokens" in subject.capabilities.sampling, "It does not honour max_tokens.")


CASES = (
    sampling_is_declared,
    sampling_neutral,
    *map(_case, PROBES),
    json_schema,
    json_schema_fails_closed,
)
