"""Tools and thinking of upstreams that speak OpenAI's protocol, on a fake upstream."""

from __future__ import annotations

from typing import Any

import pytest
from tests.engines.remote.rig import started
from tests.fakes.upstream import DONE, Play, chunk, event, upstream, usage

from headrace.core.constraint import Constraint
from headrace.core.errors import ConstraintViolated, UpstreamError
from headrace.core.events import Delta, GenerateResult, ToolCallDelta
from headrace.core.request import GenerateRequest, Message
from headrace.core.sampling import Sampling
from headrace.core.stream import collect
from headrace.core.tools import Thinking, Tool, ToolChoice

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
}
WEATHER, TIME = Tool("get_weather", "The weather.", SCHEMA), Tool("get_time")


def part(index: int | None, arguments: str, name: str | None = None, id: str | None = None) -> Any:
    call: dict[str, Any] = {"function": {"arguments": arguments}}
    if index is not None:
        call["index"] = index
    if name is not None:
        call["function"]["name"] = name
    if id is not None:
        call |= {"id": id, "type": "function"}
    return call


def calling(*parts: Any, reason: str = "tool_calls", **delta: Any) -> Play:
    """One chunk for each part of a call, after one with other fields."""
    chunks = [chunk(role="assistant", content=None, **delta)]
    chunks += [chunk(tool_calls=each if isinstance(each, list) else [each]) for each in parts]
    steps = [event(each) for each in (*chunks, chunk(reason=reason), usage(9, 30, 2, 5))]
    return Play([*steps, DONE])


def loop(**more: Any) -> GenerateRequest:
    own: dict[str, Any] = {"tools": (WEATHER, TIME), **more}
    return GenerateRequest(messages=(Message("user", "Rain?"),), **own)


async def answer(play: Play, request: GenerateRequest | None = None) -> GenerateResult:
    async with upstream(play) as server, started(server.url) as worker:
        return await collect(worker.ask(request or loop()))


def calls_of(result: GenerateResult) -> list[tuple[str, str, str]]:
    return [(call.id, call.name, call.arguments) for call in result.choices[0].tool_calls]


PARIS, ROME = '{"city": "Paris"}', '{"city": "Rome"}'
BOTH = [("a", "get_weather", PARIS), ("b", "get_weather", ROME)]
FORMS: dict[str, Play] = {
    "in parts": calling(
        part(0, "", "get_weather", "a"),
        part(0, '{"city": '),
        part(0, '"Paris"}'),
        part(1, "", "get_weather", "b"),
        part(1, ROME),
    ),
    "interleaved": calling(
        part(0, "", "get_weather", "a"),
        part(1, "", "get_weather", "b"),
        [part(0, PARIS[:5]), part(1, ROME[:7])],
        [part(0, PARIS[5:]), part(1, ROME[7:])],
    ),
    "whole, in one chunk, without an index": calling(
        [part(None, PARIS, "get_weather", "a"), part(None, ROME, "get_weather", "b")]
    ),
    "whole, in two chunks, without an index": calling(
        part(None, PARIS, "get_weather", "a"), part(None, ROME, "get_weather", "b")
    ),
    "whole, with one index": calling(
        part(0, PARIS, "get_weather", "a"), part(0, ROME, "get_weather", "b")
    ),
    "with the head in each part": calling(
        part(0, PARIS[:5], "get_weather", "a"),
        part(0, PARIS[5:], "get_weather", "a"),
        part(1, ROME[:5], "get_weather", "b"),
        part(1, ROME[5:], "", ""),
    ),
    "counted from one": calling(
        part(1, PARIS, "get_weather", "a"), part(2, ROME, "get_weather", "b")
    ),
}


@pytest.mark.parametrize("form", FORMS)
async def test_parallel_calls(form: str) -> None:
    """Issue 13: in each form that upstreams write, they are numbered from 0."""
    async with upstream(FORMS[form]) as server, started(server.url) as worker:
        events = [each async for each in worker.ask(loop())]
    heads = [each.call for each in events if isinstance(each, ToolCallDelta) and each.name]
    assert heads == [0, 1]
    result = await answer(FORMS[form])
    assert calls_of(result) == BOTH
    assert result.finish_reason == "tool_calls"


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
async def test_thinking_and_its_tokens(field: str) -> None:
    """Issue 13: both names; what the upstream counts, or an estimate where it counts nothing."""
    thought: dict[str, Any] = {field: "Hm. "}
    result = await answer(calling(part(0, PARIS, "get_weather", "a"), **thought))
    assert result.choices[0].reasoning == "Hm. "
    assert result.usage.reasoning_tokens == 5
    uncounted = [chunk(**thought), chunk(**thought), chunk(content="Yes."), chunk(reason="stop")]
    result = await answer(Play([*map(event, uncounted), DONE]))
    assert (result.choices[0].reasoning, result.usage.reasoning_tokens) == ("Hm. Hm. ", 2)


@pytest.mark.parametrize(
    ("provider", "off", "on"),
    [
        ("openai", {"reasoning_effort": "none"}, {}),
        ("deepseek", {"thinking": {"type": "disabled"}}, {"thinking": {"type": "enabled"}}),
        ("dashscope", {"enable_thinking": False}, {"enable_thinking": True}),
        ("openrouter", {"reasoning": {"enabled": False}}, {"reasoning": {"enabled": True}}),
        (
            "vllm",
            {"chat_template_kwargs": {"enable_thinking": False, "thinking": False, "a": 1}},
            {"chat_template_kwargs": {"enable_thinking": True, "thinking": True, "a": 1}},
        ),
    ],
)
async def test_the_policy_of_thinking(provider: str, off: Any, on: Any) -> None:
    """Issue 13, thinking: in the field that the upstream has for it."""
    options: dict[str, Any] = {"a": 1} if provider == "vllm" else {}
    effort = {"reasoning_effort": "low"} | ({"chat_template_kwargs": options} if options else {})
    policies = {
        Thinking(enabled=False): off,
        Thinking(enabled=True): on,
        Thinking(enabled=True, effort="low"): effort,
    }
    fields = {"reasoning_effort", "thinking", "enable_thinking", "reasoning"}
    fields |= {"chat_template_kwargs"}
    for policy, expected in policies.items():
        async with upstream(TEXT) as server, started(server.url, provider) as worker:
            request = loop(tools=(), thinking=policy, template_options=options)
            await collect(worker.ask(request))
            body = server.requests[0].body
        assert {name: body[name] for name in fields & body.keys()} == expected


async def test_a_named_call_has_the_reason_of_calls() -> None:
    """Issue 13: OpenAI itself says that the answer has stopped."""
    named = loop(tool_choice=ToolChoice("required", ("get_weather",), parallel=False))
    result = await answer(calling(part(0, PARIS, "get_weather", "a"), reason="stop"), named)
    assert result.finish_reason == "tool_calls"


async def test_one_call_at_a_time() -> None:
    """Issue 13: also of an upstream that does not know the field."""
    result = await answer(FORMS["in parts"], loop(tool_choice=ToolChoice(parallel=False)))
    assert calls_of(result) == BOTH[:1]


TEXT = Play([event(chunk(content="No.")), event(chunk(reason="stop")), DONE])
STRICT = (Tool("get_weather", None, SCHEMA, strict=True),)
CUSTOM = Tool("code", None, {"type": "object"}, strict=True, input=Constraint(grammar='start: "y"'))


@pytest.mark.parametrize(
    ("play", "given"),
    [
        (TEXT, {"tool_choice": ToolChoice("required")}),
        (
            calling(part(0, "{}", "get_time", "a")),
            {"tool_choice": ToolChoice("required", ("get_weather",))},
        ),
        (calling(part(0, "{}", "get_weather", "a")), {"tool_choice": ToolChoice("required")}),
        (calling(part(0, "{}", "get_weather", "a")), {"tools": STRICT}),
        (calling(part(0, '{"city": ', "get_weather", "a")), {"tools": STRICT}),
        (calling(part(0, '{"input": "no"}', "code", "a")), {"tools": (CUSTOM,)}),
    ],
    ids=["no call", "another", "required arguments", "strict arguments", "no object", "input"],
)
async def test_what_an_upstream_does_not_enforce(play: Play, given: Any) -> None:
    """Issue 13: an upstream that ignores `required` or `strict` gives no answer that passes."""
    with pytest.raises(ConstraintViolated):
        await answer(play, loop(**given))


async def test_a_call_that_is_cut() -> None:
    """Issue 13: with the reason `length` half a call is none."""
    half = calling(
        part(0, PARIS, "get_weather", "a"), part(1, '{"ci', "get_weather", "b"), reason="length"
    )
    result = await answer(half, loop(tools=STRICT))
    assert (calls_of(result), result.finish_reason) == (BOTH[:1], "length")


async def test_a_stop_string_before_a_call() -> None:
    """Issue 13: what could have begun one comes before the call, and nothing after a whole one."""
    request = loop(sampling=Sampling(stop=("STOP",)))
    held = calling(part(0, PARIS, "get_weather", "a"), reasoning_content="Hm.")
    before = event(chunk(content="ab ST"))
    play = Play([before, *held.steps])
    async with upstream(play) as server, started(server.url) as worker:
        events = [each async for each in worker.ask(request)]
    shown = [each for each in events if isinstance(each, Delta) and each.text]
    assert [each.text for each in shown] == ["ab ", "ST"]
    assert events.index(shown[1]) < next(
        place for place, each in enumerate(events) if isinstance(each, ToolCallDelta)
    )
    stopped = Play([event(chunk(content="ab STOP")), *held.steps])
    result = await answer(stopped, request)
    assert (result.text, calls_of(result), result.finish_reason) == ("ab ", [], "stop")


async def test_an_error_within_a_call() -> None:
    """W17: no half call passes for an answer."""
    half = [event(chunk(tool_calls=[part(0, '{"ci', "get_weather", "a")]))]
    for rest, match in (([event({"error": {"message": "no"}})], "error"), ([DONE], "truncated")):
        with pytest.raises(UpstreamError, match=match) as raised:
            await answer(Play([*half, *rest]))
        assert raised.value.choices


@pytest.mark.parametrize("arguments", ["", PARIS[:7]])
async def test_a_call_that_the_limit_has_cut_is_none(arguments: str) -> None:
    """Issue 13: the stream says so; a call that was whole before stays one."""
    parts = part(0, ROME, "get_weather", "a"), part(1, arguments, "get_weather", "b")
    play, whole = calling(*parts, reason="length"), calling(parts[0], reason="length")
    for steps, cut in ((play, [(1, arguments or "get_weather")]), (whole, [])):
        async with upstream(steps) as server, started(server.url) as worker:
            events = [event async for event in worker.ask(loop())]
        deltas = [event for event in events if isinstance(event, ToolCallDelta)]
        assert [(delta.call, delta.cut) for delta in deltas if delta.cut] == cut


async def test_tools_with_a_form() -> None:
    """Issue 13: both are passed on; calls, or content that keeps to the form, are the answer."""
    request = loop(constraint=Constraint(json_schema=SCHEMA))
    called = calling(part(0, PARIS, "get_weather", "a"))
    whole = Play([event(chunk(content=PARIS)), event(chunk(reason="stop")), DONE])
    free = Play([event(chunk(content="Sunny.")), event(chunk(reason="stop")), DONE])
    async with upstream(called) as server, started(server.url) as worker:
        result = await collect(worker.ask(request))
        assert calls_of(result) == BOTH[:1]
        body = server.requests[0].body
        assert body["response_format"]["json_schema"]["schema"] == SCHEMA
        assert len(body["tools"]) == 2
    assert (await answer(whole, request)).text == PARIS
    with pytest.raises(ConstraintViolated, match="JSON schema"):
        await answer(free, request)
