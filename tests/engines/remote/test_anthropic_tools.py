"""Tools and thinking of Anthropic's models, on a fake upstream whose events its library types."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
from pydantic import TypeAdapter
from tests.engines.remote.rig import started
from tests.engines.remote.test_anthropic import START, STOP, end, event, text, thought
from tests.fakes.upstream import Play, answered, upstream

from headrace.core.errors import ConstraintViolated, InvalidRequest, Unsupported, UpstreamError
from headrace.core.events import ToolCall, ToolCallDelta
from headrace.core.request import CountRequest, GenerateRequest, Message
from headrace.core.stream import collect, collect_count
from headrace.core.tools import Thinking, Tool, ToolChoice

pytestmark = pytest.mark.engines

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
}
WEATHER, TIME = Tool("get_weather", "The weather.", SCHEMA), Tool("get_time")


def block(index: int, **content: Any) -> dict[str, Any]:
    return {"type": "content_block_start", "index": index, "content_block": content}


def part(index: int, kind: str, **delta: Any) -> dict[str, Any]:
    return {"type": "content_block_delta", "index": index, "delta": {"type": kind, **delta}}


def stop(index: int) -> dict[str, Any]:
    return {"type": "content_block_stop", "index": index}


def use(index: int, name: str, *pieces: str, **given: Any) -> list[dict[str, Any]]:
    """A call in pieces of JSON; `given` is its input if it comes with the start."""
    content = {"type": "tool_use", "id": f"toolu_{index}", "name": name, "input": given}
    parts = [part(index, "input_json_delta", partial_json=piece) for piece in pieces]
    return [block(index, **content), *parts, stop(index)]


LOOK = [
    START,
    block(0, type="thinking", thinking="", signature=""),
    thought("Which city?"),
    part(0, "signature_delta", signature="c2lnbmVk"),
    stop(0),
    block(1, type="text", text=""),
    text("I look. ") | {"index": 1},
    stop(1),
    *use(2, "get_weather", "", '{"ci', 'ty": "Pa', 'ris"}'),
    *use(3, "get_time", ""),
    *use(4, "get_weather", city="Rome"),
    end("tool_use", 40),
    STOP,
]


def play(*events: dict[str, Any]) -> Play:
    """Events that the library's own types accept."""
    library: Any = importlib.import_module("anthropic.types")
    types: TypeAdapter[Any] = TypeAdapter(library.RawMessageStreamEvent)
    for made in events:
        types.validate_python(made)
    return Play([event(made) for made in events])


def loop(*further: Message, **more: Any) -> GenerateRequest:
    """A request with tools, after other turns."""
    own: dict[str, Any] = {"tools": (WEATHER, TIME), **more}
    return GenerateRequest(messages=(Message("user", "Rain?"), *further), **own)


async def body_of(request: GenerateRequest, *events: dict[str, Any]) -> Any:
    """What is sent to the upstream, which answers with events or a text."""
    answer = play(*(events or (START, text("Yes."), end("end_turn"), STOP)))
    async with upstream(answer) as server, started(server.url, "anthropic") as worker:
        await collect(worker.ask(request))
        return server.requests[0].body


async def test_calls_and_thinking_are_streamed() -> None:
    """Issue 13: id and name once, then the arguments as they come; thinking apart; the usage."""
    async with upstream(play(*LOOK)) as server, started(server.url, "anthropic") as worker:
        events = [event async for event in worker.ask(loop())]
        server.will(play(*LOOK))
        result = await collect(worker.ask(loop()))
    parts = [each for each in events if isinstance(each, ToolCallDelta)]
    assert [(each.call, each.id, each.name) for each in parts if each.name] == [
        (0, "toolu_2", "get_weather"),
        (1, "toolu_3", "get_time"),
        (2, "toolu_4", "get_weather"),
    ]
    assert [each.arguments for each in parts if each.call == 0] == ["", '{"ci', 'ty": "Pa', 'ris"}']
    choice = result.choices[0]
    assert (choice.reasoning, choice.text) == ("Which city?", "I look. ")
    assert [call.arguments for call in choice.tool_calls] == [
        '{"city": "Paris"}',
        "{}",
        '{"city":"Rome"}',
    ]
    assert result.finish_reason == "tool_calls"
    assert (result.usage.completion_tokens, result.usage.reasoning_tokens) == (40, 1)


async def test_tools_and_results_are_sent() -> None:
    """Issue 13: in Anthropic's form; the results of one turn are one message."""
    calls = (ToolCall("a", "get_weather", '{"city": "Paris"}'), ToolCall("b", "get_time", "{}"))
    body = await body_of(
        loop(
            Message("assistant", "I look.", tool_calls=calls, reasoning="Hm."),
            Message("tool", "rain", "get_weather", tool_call_id="a"),
            Message("tool", "noon", "get_time", tool_call_id="b"),
            Message("user", "And?"),
            Message("assistant", tool_calls=calls[:1]),
            Message("tool", "sun", tool_call_id="a"),
        )
    )
    assert body["tools"] == [
        {"name": "get_weather", "description": "The weather.", "input_schema": SCHEMA},
        {"name": "get_time", "input_schema": {"type": "object"}},
    ]
    assert body["tool_choice"] == {"type": "auto"}
    used = {"type": "tool_use", "id": "a", "name": "get_weather", "input": {"city": "Paris"}}
    result = {"type": "tool_result", "tool_use_id": "a"}
    assert body["messages"] == [
        {"role": "user", "content": "Rain?"},
        {
            "role": "assistant",
            "content": [
                {"type": "text", "text": "I look."},
                used,
                {"type": "tool_use", "id": "b", "name": "get_time", "input": {}},
            ],
        },
        {
            "role": "user",
            "content": [
                result | {"content": "rain"},
                {"type": "tool_result", "tool_use_id": "b", "content": "noon"},
            ],
        },
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": [used]},
        {"role": "user", "content": [result | {"content": "sun"}]},
    ]


ROME = (START, *use(0, "get_weather", '{"city": "Rome"}'), end("tool_use"), STOP)


@pytest.mark.parametrize(
    ("choice", "sent", "names"),
    [
        (ToolChoice("none"), {"type": "none"}, ["get_weather", "get_time"]),
        (
            ToolChoice(parallel=False),
            {"type": "auto", "disable_parallel_tool_use": True},
            ["get_weather", "get_time"],
        ),
        (ToolChoice("required"), {"type": "any"}, ["get_weather", "get_time"]),
        (
            ToolChoice("required", ("get_weather",)),
            {"type": "tool", "name": "get_weather"},
            ["get_weather"],
        ),
        (ToolChoice("auto", ("get_time",)), {"type": "auto"}, ["get_time"]),
    ],
)
async def test_the_choice_of_tools(choice: ToolChoice, sent: Any, names: list[str]) -> None:
    """Issue 13: none, auto, required, a named tool, some of the tools, one call at a time."""
    events = ROME if choice.mode == "required" else ()
    body = await body_of(loop(tool_choice=choice), *events)
    assert body["tool_choice"] == sent
    assert [tool["name"] for tool in body["tools"]] == names


async def test_strict_is_sent() -> None:
    """Issue 13, strict."""
    strict = Tool("get_weather", None, SCHEMA, strict=True)
    body = await body_of(loop(tools=(strict,)), *ROME)
    assert body["tools"] == [{"name": "get_weather", "input_schema": SCHEMA, "strict": True}]


@pytest.mark.parametrize(
    ("thinking", "sent", "effort"),
    [
        (Thinking(), None, None),
        (Thinking(enabled=False), {"type": "disabled"}, None),
        (Thinking(enabled=True), {"type": "adaptive"}, None),
        (Thinking(enabled=True, effort="minimal"), {"type": "adaptive"}, "low"),
        (Thinking(effort="max"), {"type": "adaptive"}, "max"),
        (Thinking(budget=0), {"type": "disabled"}, None),
        (Thinking(budget=2000), {"type": "enabled", "budget_tokens": 2000}, None),
    ],
)
async def test_the_policy_of_thinking(thinking: Thinking, sent: Any, effort: str | None) -> None:
    """Issue 13, thinking: one policy, in Anthropic's form; a budget is beside the answer's room."""
    body = await body_of(loop(thinking=thinking, tools=()))
    assert body.get("thinking") == sent
    assert body.get("output_config", {}).get("effort") == effort
    assert body["max_tokens"] == 4096 + (thinking.budget or 0)


async def test_where_it_cannot_think() -> None:
    """Issue 13: before a call that it has to make, and between calls with a budget."""
    required = loop(thinking=Thinking(budget=2000), tool_choice=ToolChoice("required"))
    assert "thinking" not in await body_of(required, *ROME)
    turns = (
        Message("assistant", tool_calls=(ToolCall("a", "get_time", "{}"),)),
        Message("tool", "noon", tool_call_id="a"),
    )
    assert "thinking" not in await body_of(loop(*turns, thinking=Thinking(budget=2000)))
    with pytest.raises(InvalidRequest, match="1024") as refused:
        await body_of(loop(thinking=Thinking(budget=100)))
    assert refused.value.param == "thinking"


TEXT = (START, text("No."), end("end_turn"), STOP)
OTHER = (START, *use(0, "get_time", "{}"), end("tool_use"), STOP)
WRONG = (START, *use(0, "get_weather", '{"town": 1}'), end("tool_use"), STOP)


@pytest.mark.parametrize(
    ("events", "names"),
    [(TEXT, ()), (OTHER, ("get_weather",)), (WRONG, ())],
    ids=["no call", "another", "arguments"],
)
async def test_what_is_required_is_checked(events: Any, names: Any) -> None:
    """Issue 13: a call that an upstream does not make, or not as it should, is no answer."""
    with pytest.raises(ConstraintViolated):
        await body_of(loop(tool_choice=ToolChoice("required", names)), *events)


async def test_an_error_within_a_call() -> None:
    """W17: no half call passes for an answer."""
    half = [START, *use(0, "get_weather", '{"city": ')[:2]]
    error = {"type": "error", "error": {"type": "api_error", "message": "no"}}
    broken = Play([*(event(made) for made in half), event(error)])
    async with upstream(broken) as server, started(server.url, "anthropic") as worker:
        with pytest.raises(UpstreamError, match="error") as raised:
            await collect(worker.ask(loop()))
        assert raised.value.choices
        server.will(Play([event(made) for made in half]))
        with pytest.raises(UpstreamError, match="truncated"):
            await collect(worker.ask(loop()))
        assert worker.load == (0, 0)


async def test_tools_are_counted() -> None:
    """W21: the upstream counts the tools too."""
    async with upstream(script=lambda seen: answered({"input_tokens": 11})) as server:
        async with started(server.url, "anthropic") as worker:
            count = CountRequest(messages=(Message("user", "x"),), tools=(TIME,))
            assert (await collect_count(worker.ask(count))).count == 11
        assert [tool["name"] for tool in server.requests[0].body["tools"]] == ["get_time"]


async def test_names_of_participants_are_refused() -> None:
    """W11: there is no place for them."""
    with pytest.raises(Unsupported, match="participants"):
        await body_of(loop(Message("user", "x", "Ann")))


def test_the_fake_is_typed() -> None:
    """A fake with a wrong event would prove nothing."""
    play(*LOOK)
    with pytest.raises(ValueError, match="delta"):
        play(part(0, "input_json_delta", wrong=1))
