"""Tools and thinking of workers in Python."""

from __future__ import annotations

from typing import Any

import pytest

from headrace import (
    Delta,
    InvalidRequest,
    ModelWorker,
    Thinking,
    Tool,
    ToolCallDelta,
    ToolChoice,
    arguments,
)

ADD = {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
MESSAGES = [{"role": "user", "content": "x"}]


def asked(**options: Any) -> Any:
    return arguments.request("m", None, MESSAGES, options)


def test_tools_have_several_forms() -> None:
    """Issue 13: a Tool, a function, or as over HTTP."""
    tool = Tool("add", parameters=ADD["parameters"])  # pyright: ignore[reportArgumentType]
    for form in (tool, ADD, {"type": "function", "function": ADD}):
        assert asked(tools=[form]).tools == (tool,)
    named = {"type": "function", "function": {"name": "add"}}
    assert asked(tools=[ADD], tool_choice=named).tool_choice.names == ("add",)
    assert asked(tools=[ADD], tool_choice=ToolChoice("required")).tool_choice.mode == "required"
    assert not asked(tools=[ADD], parallel_tool_calls=False).tool_choice.parallel


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (True, Thinking(enabled=True)),
        ("off", Thinking(enabled=False)),
        ("low", Thinking(enabled=True, effort="low")),
        (100, Thinking(budget=100)),
        (Thinking(budget=3), Thinking(budget=3)),
    ],
)
def test_thinking_has_several_forms(given: Any, expected: Thinking) -> None:
    """Issue 13, thinking."""
    assert asked(thinking=given).thinking == expected


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"tools": [{"nam": "add"}]}, "tools["),
        ({"tools": [ADD], "tool_choice": "maybe"}, "tool_choice"),
        ({"tools": [ADD], "tool_choice": ToolChoice("auto", ("sub",))}, "tool_choice"),
    ],
)
def test_what_is_wrong_is_refused_by_its_place(options: Any, param: str) -> None:
    """Issue 13."""
    with pytest.raises(InvalidRequest) as refused:
        asked(**options)
    assert (refused.value.param or "").startswith(param)


def test_a_worker_gives_calls() -> None:
    """Issue 13, tool calls: whole, and as events."""
    with ModelWorker("builtin:echo", isolate=False) as worker:
        messages = [{"role": "user", "content": f"So: {CALL}"}]
        result = worker.generate(messages=messages, tools=[ADD])
        assert [(c.name, c.arguments) for c in result.tool_calls] == [("add", '{"a": 1}')]
        assert (result.text, result.reasoning) == ("So: ", "")
        assert result.finish_reason == "tool_calls"
        events = list(worker.generate_stream(messages=messages, tools=[ADD]))
        parts = [e for e in events if isinstance(e, ToolCallDelta)]
        assert "".join(e.arguments for e in parts) == '{"a": 1}'
        assert "".join(e.text for e in events if isinstance(e, Delta)) == "So: "
