"""Tools and thinking: calls are parsed, enforced or refused by name; thinking is kept apart."""

from __future__ import annotations

from typing import Any

import jsonschema_rs
import msgspec

from headrace.core.constraint import Constraint
from headrace.core.errors import ConstraintViolated, Unsupported
from headrace.core.events import ToolCall, ToolCallDelta
from headrace.core.request import DetokenizeRequest, GenerateRequest
from headrace.core.stream import collect, collect_text
from headrace.core.tools import Thinking, Tool, ToolChoice
from headrace.lab.cases.answers import sound
from headrace.lab.cases.case import case
from headrace.lab.cases.subject import (
    TOKENS,
    Broken,
    Declared,
    Reply,
    Subject,
    check,
    read,
    refusal,
)

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 12},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
_VERDICT: dict[str, Any] = {
    "type": "object",
    "properties": {"rain": {"type": "boolean"}},
    "required": ["rain"],
    "additionalProperties": False,
}
RAIN, TIME = Tool("rain", "Whether it will rain.", SCHEMA), Tool("time")
_TOOLS = (RAIN, TIME)
_SHORT, _CALLED, _LONGEST, _CUTS = 24, 64, 220, (1, 14, 40)
_CALL = '<tool_call>\n{"name": "rain", "arguments": %s}\n</tool_call>'

ARGUMENTS = '{"city": "</tool_call>", "days": 3}'
"""The marker that ends a call is part of a string."""
CALL, WRONG = _CALL % ARGUMENTS, _CALL % '{"city": "Rome", "days": "three"}'


def called(reply: Reply) -> list[ToolCall]:
    """Return the calls of the first choice.

    Raises:
        Broken: one is not whole, or is not streamed as it should be.
    """
    calls: list[ToolCall] = []
    parts = [event for event in reply.events if isinstance(event, ToolCallDelta)]
    broken = {part.call for part in parts if part.cut}
    for part in (part for part in parts if part.index == 0 and part.call not in broken):
        if part.name:
            check(part.call == len(calls), f"Call {part.call} follows {len(calls)} others.")
            check(part.id not in {call.id for call in calls}, f"Two calls have the id {part.id!r}.")
            calls.append(ToolCall(part.id, part.name, part.arguments))
            continue
        check(part.call == len(calls) - 1, f"A part of call {part.call} comes without its name.")
        arguments = calls[-1].arguments + part.arguments
        calls[-1] = msgspec.structs.replace(calls[-1], arguments=arguments)
    for call in calls:
        _object(call.arguments)
    expected = ("tool_calls", "length") if calls else ("stop", "length")
    check(reply.reason in expected, f"{len(calls)} calls end with {reply.reason!r}.")
    return calls


def _object(arguments: str) -> dict[str, Any]:
    try:
        return msgspec.json.decode(arguments, type=dict[str, Any])
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise Broken(f"The arguments {arguments!r} are no JSON object: {error}.") from error


def _kept(call: ToolCall) -> None:
    arguments = _object(call.arguments)
    if call.name == RAIN.name:
        kept = jsonschema_rs.is_valid(SCHEMA, arguments)
        check(kept, f"The arguments {call.arguments!r} do not keep to their schema.")


async def _answer(subject: Subject, prompt: str = CALL, **given: Any) -> Reply:
    return await read(subject.backend.ask(await _request(subject, prompt, **given)))


async def _request(subject: Subject, prompt: str = CALL, **given: Any) -> GenerateRequest:
    """Return a greedy request with tools, whose answer is long enough for a call."""
    required = given.get("tool_choice", ToolChoice()).mode == "required"
    length = _LONGEST if await _repeats(subject) else _CALLED if required else _SHORT
    sampling = {"max_tokens": length, "temperature": 0.0}
    return subject.request(prompt, **subject.able(**sampling), **({"tools": _TOOLS} | given))


async def _repeats(subject: Subject) -> bool:
    """Return whether the engine repeats its prompt, so that a call in it is made."""
    if "repeats" not in subject.known:
        reply = await subject.short(CALL)
        ids = () if subject.is_remote else await subject.tokens(CALL)
        same = CALL.startswith(reply.text) if subject.is_remote else reply.ids == ids[:TOKENS]
        subject.known["repeats"] = bool(reply.text) and same
    return subject.known["repeats"]


@case("W29")
async def tool_calls(subject: Subject) -> None:
    """With tools a model may call: streamed calls are whole, and are those of a whole answer."""
    talking = await subject.talking()
    reply = await _answer(talking)
    calls = called(reply)
    whole = (await collect(talking.backend.ask(await _request(talking)))).choices[0]
    streamed, made = (
        [(call.name, call.arguments) for call in c] for c in (calls, whole.tool_calls)
    )
    check(streamed == made, f"Streamed calls are {streamed}, and of the whole answer {made}.")
    if await _repeats(talking):
        expected = [(RAIN.name, ARGUMENTS)]
        check(made == expected, f"It writes a call, and {made} is called.")
    none = await _answer(talking, tool_choice=ToolChoice("none"))
    check(not called(none), "With tool_choice none it calls.")


def _enforces_calls(subject: Subject) -> bool:
    able = subject.capabilities
    return able.json_schema and (subject.is_remote or "grammar" in able.forms)


@case("W29")
async def tool_calls_required(subject: Subject) -> None:
    """A required call, or one of a named tool, is made and keeps to its schema, or is refused."""
    talking = await subject.talking()
    for names in ((), (RAIN.name,), (TIME.name,)):
        choice = ToolChoice("required", names, parallel=False)
        if not _enforces_calls(talking):
            request = talking.request(CALL, tools=_TOOLS, tool_choice=choice)
            error = await refusal(talking.backend.ask(request), Unsupported)
            check(error.param == "tool_choice", f"The error names {error.param}.")
            raise Declared("Refused by its name.")
        reply = await _answer(talking, "Will it rain in Rome?", tool_choice=choice)
        if reply.reason == "length" and _reasoning(reply) and not reply.text:
            continue  # it thought up to the limit
        (call, *further) = called(reply) or [ToolCall("", "nothing", "")]
        allowed = names or (RAIN.name, TIME.name)
        check(call.name in allowed, f"{call.name} is called, and not one of {allowed}.")
        check(not further, "Without parallel calls it calls twice.")
        _kept(call)


@case("W29")
async def tool_calls_parallel(subject: Subject) -> None:
    """Several calls in one answer have their own ids; without `parallel` there is one."""
    talking = await subject.talking()
    mode = "required" if _enforces_calls(talking) else "auto"
    both = f"{CALL}\n{CALL}"
    several = called(await _answer(talking, both, tool_choice=ToolChoice(mode)))
    if mode == "auto" and await _repeats(talking):
        check(len(several) == 2, f"Of two calls that it writes, {len(several)} are made.")
    reply = await _answer(talking, both, tool_choice=ToolChoice(mode, parallel=False))
    single, cut = called(reply), reply.finish.finish_reason == "length"
    check(len(single) <= 1, f"Without parallel calls there are {len(single)}.")
    check(bool(single) or cut or mode == "auto", "A required call is not made.")


@case("W29")
async def tool_calls_strict(subject: Subject) -> None:
    """The arguments of a strict tool keep to its schema; an engine without grammars may fail."""
    talking = await subject.talking()
    strict = (msgspec.structs.replace(RAIN, strict=True), TIME)
    for prompt in (CALL, WRONG):
        try:
            reply = await _answer(talking, prompt, tools=strict)
        except ConstraintViolated as error:
            if _enforces_calls(talking) or prompt == CALL:
                raise
            raise Declared("A call that does not keep to it is an error.") from error
        for call in called(reply):
            _kept(call)


@case("W29 W14")
async def tool_calls_or_form(subject: Subject) -> None:
    """With tools and a JSON schema an answer is calls, or keeps to the schema, or is refused."""
    talking, form = await subject.talking(), Constraint(json_schema=_VERDICT)
    if not _enforces_calls(talking):
        request = talking.request(CALL, tools=_TOOLS, constraint=form)
        error = await refusal(talking.backend.ask(request), Unsupported)
        check(error.param == "response_format", f"The error names {error.param}.")
        raise Declared("Refused by its name.")
    reply = await _answer(talking, "Will it rain in Rome?", constraint=form)
    if not called(reply) and reply.reason == "stop":
        kept = reply.text in ('{"rain": true}', '{"rain": false}')
        check(kept, f"The answer {reply.text!r} does not keep to its schema.")


@case("W29 W14")
async def tool_calls_cut(subject: Subject) -> None:
    """An answer that is cut within a call ends with `length`, and nothing of it is lost."""
    talking = await subject.talking()
    mode = "required" if _enforces_calls(talking) else "auto"
    for most in _CUTS:
        request = await _request(talking, tool_choice=ToolChoice(mode))
        sampling = msgspec.structs.replace(request.sampling, max_tokens=most)
        cut = msgspec.structs.replace(request, sampling=sampling)
        reply = await read(talking.backend.ask(cut))
        calls = called(reply)
        if reply.reason == "length" and not calls and not subject.is_remote:
            await _nothing_is_lost(talking, reply)


async def _nothing_is_lost(subject: Subject, reply: Reply) -> None:
    raw = await collect_text(subject.backend.ask(DetokenizeRequest(token_ids=reply.ids)))
    cut = "".join(event.cut for event in reply.events if isinstance(event, ToolCallDelta))
    thought, shown = _reasoning(reply), reply.text + cut
    thinks, _, says = raw.partition("</think>") if thought else ("", "", raw)
    thinks = thinks.strip().removeprefix("<think>")
    check(_whole(thinks) == _whole(thought), f"Of {raw!r} it thinks {thought!r}.")
    check(_whole(says) == _whole(shown), f"Of {raw!r} it shows {shown!r}.")


def _whole(text: str) -> str:
    """Return the text up to bytes that are no character, which other tokens have as well."""
    return text.partition("\ufffd")[0].strip()


@case("W24")
async def thinking(subject: Subject) -> None:
    """Thinking is kept apart and counted; it can be switched off, and models without it answer."""
    for policy in (Thinking(enabled=False), Thinking(effort="low"), Thinking(enabled=True)):
        reply = await subject.short(thinking=policy)
        sound(subject, reply)
    talking = await subject.talking()
    if subject.is_remote:
        raise Declared("Its chat template is that of the upstream.")
    free = talking.able(ignore_eos=True)
    off = await talking.short(thinking=Thinking(enabled=False), **free)
    check(not _reasoning(off), f"Switched off, it thinks {_reasoning(off)!r}.")
    check(off.finish.usage.reasoning_tokens == 0, "Switched off, tokens of thinking are counted.")
    on = await talking.short(thinking=Thinking(enabled=True), **free)
    check(not on.text, f"Of its thinking, {on.text!r} is content.")
    ids = DetokenizeRequest(token_ids=on.ids)
    raw = (await collect_text(talking.backend.ask(ids))).strip()
    shown = _reasoning(on).strip()
    check(shown or not raw, "The thinking is not shown.")
    check(shown.strip("\ufffd") in raw, f"The thinking is {raw!r}, and shown is {shown!r}.")
    usage = on.finish.usage
    counted, total = usage.reasoning_tokens, usage.completion_tokens
    # White space before the thinking need not be counted.
    check(
        total - 1 <= counted <= total,
        f"It only thinks: {total} tokens, of which {counted} are thinking.",
    )
    sound(talking, on)
    if talking.capabilities.resume:
        await _closed(talking)


async def _closed(subject: Subject) -> None:
    """Check that the thinking ends where the model closes it, in an answer that goes on."""
    answered = await subject.tokens("Hm.\n</think>\n\nYes")
    reply = await subject.short(
        thinking=Thinking(enabled=True), answered=answered, max_tokens=len(answered) + 1
    )
    check(_reasoning(reply) == "Hm.", f"The thinking is {_reasoning(reply)!r}, and not 'Hm.'.")
    check(reply.text.startswith("Yes"), f"After its thinking it says {reply.text!r}.")


def _reasoning(reply: Reply) -> str:
    return "".join(delta.reasoning for delta in reply.deltas)


CASES = (
    tool_calls,
    tool_calls_required,
    tool_calls_parallel,
    tool_calls_strict,
    tool_calls_or_form,
    tool_calls_cut,
    thinking,
)
