"""Tools and thinking with the official client, on the echo engine and on the real model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from tests.service.serving import Service, served

WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 20},
                "days": {"type": "integer", "minimum": 1, "maximum": 9},
            },
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}
TIME: Any = {"type": "function", "function": {"name": "get_time"}}
# The marker that closes a call is part of an argument, which must not end it.
ARGUMENTS = '{"city": "Paris </tool_call>", "days": 3}'
CALL = f'Let me see. <tool_call>\n{{"name": "get_weather", "arguments": {ARGUMENTS}}}\n</tool_call>'


@pytest.fixture(scope="module")
def service(smollm2_path: Path) -> Iterator[Service]:
    flags = ("--context-length", "1024")
    with served("smollm2", "builtin:echo", *flags) as running:
        yield running


@pytest.fixture
def client(service: Service) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def user(text: str) -> Any:
    return [{"role": "user", "content": text}]


def test_a_call_its_result_and_the_answer(client: openai.OpenAI) -> None:
    """Issue 13, tool calls: a loop of an agent, whole."""
    messages = user(CALL)
    first = client.chat.completions.create(model="echo", messages=messages, tools=[WEATHER])
    choice = first.choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Let me see. "
    calls: Any = choice.message.tool_calls
    assert [(call.function.name, call.function.arguments) for call in calls] == [
        ("get_weather", ARGUMENTS)
    ]
    messages += [
        choice.message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": calls[0].id, "content": "22 degrees"},
    ]
    second = client.chat.completions.create(model="echo", messages=messages, tools=[WEATHER])
    assert "22 degrees" in (second.choices[0].message.content or "")
    assert second.choices[0].finish_reason == "stop"


def test_calls_are_streamed(client: openai.OpenAI) -> None:
    """Issue 13: index, id and name once, then arguments; the role comes first."""
    text = CALL + '<tool_call>\n{"name": "get_time", "arguments": {}}\n</tool_call>'
    stream = client.chat.completions.create(
        model="echo", messages=user(text), tools=[WEATHER, TIME], stream=True
    )
    calls: dict[int, list[Any]] = {}
    content, reasons = "", []
    for chunk in stream:
        for choice in chunk.choices:
            content += choice.delta.content or ""
            reasons += [choice.finish_reason] if choice.finish_reason else []
            for part in choice.delta.tool_calls or ():
                calls.setdefault(part.index, []).append(part)
    assert (content, reasons) == ("Let me see. ", ["tool_calls"])
    assert sorted(calls) == [0, 1]
    for parts in calls.values():
        assert [bool(part.id) for part in parts] == [True] + [False] * (len(parts) - 1)
        assert [bool(part.function.name) for part in parts] == [bool(part.id) for part in parts]
    texts = ["".join(part.function.arguments for part in calls[index]) for index in (0, 1)]
    assert texts == [ARGUMENTS, "{}"]


@pytest.mark.parametrize("choice", ["none", None])
def test_without_tools_a_call_is_text(client: openai.OpenAI, choice: Any) -> None:
    """Issue 13: nothing is lost where no call is possible."""
    more: Any = {} if choice is None else {"tools": [WEATHER], "tool_choice": choice}
    answer = client.chat.completions.create(model="echo", messages=user(CALL), **more)
    assert answer.choices[0].message.content == CALL
    assert answer.choices[0].message.tool_calls is None


@pytest.mark.parametrize(
    "choice",
    ["required", {"type": "function", "function": {"name": "get_weather"}}],
    ids=["required", "named"],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_required_call_of_the_real_model(
    client: openai.OpenAI, choice: Any, stream: bool
) -> None:
    """Issue 13: enforced by a grammar, so that the arguments keep to the schema."""
    request: Any = {
        "model": "smollm2",
        "messages": user("What is the weather in Paris for the next 3 days?"),
        "tools": [WEATHER],
        "tool_choice": choice,
        "parallel_tool_calls": False,
        "temperature": 0,
        "max_tokens": 100,
    }
    if stream:
        with client.chat.completions.stream(
            **{k: v for k, v in request.items() if k != "stream"}
        ) as events:
            message: Any = events.get_final_completion().choices[0]
    else:
        message = client.chat.completions.create(**request).choices[0]
    assert message.finish_reason == "tool_calls"
    (call,) = message.message.tool_calls
    arguments = json.loads(call.function.arguments)
    assert call.function.name == "get_weather"
    assert arguments.keys() == {"city", "days"}
    assert 1 <= arguments["days"] <= 9


def test_strict_arguments_are_checked(client: openai.OpenAI) -> None:
    """Issue 13: also of an engine without grammars, where a wrong call is an error."""
    strict: Any = {"type": "function", "function": {**WEATHER["function"], "strict": True}}
    request: Any = {"model": "echo", "tools": [strict]}
    good = client.chat.completions.create(messages=user(CALL), **request).choices[0]
    assert good.message.tool_calls
    wrong = user(CALL.replace('"days": 3', '"days": "three"'))
    with pytest.raises(openai.InternalServerError) as failed:
        client.chat.completions.create(messages=wrong, **request)
    assert failed.value.status_code == 500
    assert failed.value.param == "tools"
    assert "get_weather does not keep to its JSON schema" in failed.value.message
    with pytest.raises(openai.APIError):
        list(client.chat.completions.create(messages=wrong, stream=True, **request))


def test_only_allowed_tools_are_called(client: openai.OpenAI) -> None:
    """Issue 13: a call of another tool is text; the model sees all tools, for its prefix cache."""
    allowed: Any = {"mode": "auto", "tools": [TIME | {"function": {"name": "get_time"}}]}
    choice: Any = {"type": "allowed_tools", "allowed_tools": allowed}
    time = '<tool_call>\n{"name": "get_time", "arguments": {}}\n</tool_call>'
    request: Any = {"model": "echo", "tools": [WEATHER, TIME], "tool_choice": choice}
    answer = client.chat.completions.create(messages=user(CALL + time), **request).choices[0]
    assert [call.function.name for call in answer.message.tool_calls or ()] == ["get_time"]  # type: ignore[union-attr]
    assert answer.message.content == CALL


def test_strict_and_parallel_calls_of_the_real_model(client: openai.OpenAI) -> None:
    """Issue 13, shown 1: each of several calls keeps to its schema, and has its own id."""
    strict: Any = {"type": "function", "function": {**WEATHER["function"], "strict": True}}
    choice = client.chat.completions.create(
        model="smollm2",
        messages=user("What is the weather in Paris and in Rome for the next 3 days?"),
        tools=[strict, TIME],
        tool_choice="required",
        parallel_tool_calls=True,
        temperature=0,
        max_tokens=120,
    ).choices[0]
    calls: Any = choice.message.tool_calls
    assert len(calls) > 1
    assert len({call.id for call in calls}) == len(calls)
    for call in calls:
        arguments = json.loads(call.function.arguments)
        expected = {"city", "days"} if call.function.name == "get_weather" else arguments.keys()
        assert arguments.keys() == expected


@pytest.mark.parametrize(
    ("more", "param"),
    [
        (
            {"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "x"}}},
            None,
        ),
        ({"tools": [WEATHER, WEATHER]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, None),
    ],
)
def test_wrong_tools_are_refused(client: openai.OpenAI, more: Any, param: str | None) -> None:
    """Issue 13: a 400 that names the field."""
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="echo", messages=user("a"), **more)
    assert param is None or refused.value.param == param


@pytest.mark.parametrize(
    "more",
    [
        {"reasoning_effort": "low"},
        {"thinking": False},
        {"thinking": {"type": "enabled"}},
        {"think": "high"},
        {"reasoning": {"effort": "none"}},
        {"chat_template_kwargs": {"enable_thinking": False}},
    ],
)
def test_thinking_is_noted_where_a_model_has_none(client: openai.OpenAI, more: Any) -> None:
    """Issue 13, thinking: accepted, and the header of warnings says that it has no effect."""
    create = client.chat.completions.with_raw_response.create
    answer = create(model="echo", messages=user("a"), extra_body=more)
    assert answer.headers["x-headrace-warning"] == (
        "not supported here, left out: thinking, as echo does not think"
    )
    assert answer.parse().choices[0].message.content == "a"
    assert "x-headrace-warning" not in create(model="echo", messages=user("a")).headers
