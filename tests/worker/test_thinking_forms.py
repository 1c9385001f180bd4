"""A budget of thinking together with what is enforced, on the real model, and after a crash."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from tests.test_model_worker import worker_pid
from tests.worker.test_thinking import OPENED

from headrace.core.events import Delta, Finish, ToolCallDelta
from headrace.core.tools import Thinking, Tool, ToolChoice
from headrace.model_worker import AsyncModelWorker

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
WHO: dict[str, Any] = {"messages": [{"role": "user", "content": "Who?"}]}
BUDGET = 5
ASKED: dict[str, Any] = {"thinking": Thinking(budget=BUDGET), "max_tokens": 80, "temperature": 0}


@pytest.fixture(scope="module")
async def model(smollm2_path: Path) -> AsyncIterator[AsyncModelWorker]:
    options = {"threads": 1}
    async with AsyncModelWorker(
        str(smollm2_path), chat_template=OPENED, context_length=512, max_running=2, options=options
    ) as worker:
        yield worker


def whole(schema: dict[str, Any], text: str) -> dict[str, Any]:
    value = json.loads(text)
    assert value.keys() == set(schema["required"])
    assert 0 <= value["age"] <= 99
    return value


async def test_a_schema_with_several_choices(model: AsyncModelWorker) -> None:
    """Issue 13, exact form: with n and with a budget of thinking, which comes before it."""
    request: Any = {**ASKED, "temperature": 0.9, "seed": 3, "n": 2}
    result = await model.generate(**WHO, json_schema=SCHEMA, **request)
    for choice in result.choices:
        whole(SCHEMA, choice.text)
        assert choice.finish_reason == "stop"
        assert choice.reasoning
    assert result.usage.reasoning_tokens == 2 * BUDGET


@pytest.mark.parametrize(
    ("form", "pattern"),
    [
        ({"regex": "[A-Z]{3}-[0-9]{2}"}, "[A-Z]{3}-[0-9]{2}"),
        ({"choice": ["ja", "nein"]}, "ja|nein"),
    ],
)
async def test_other_forms(model: AsyncModelWorker, form: Any, pattern: str) -> None:
    """Issue 13, exact form: the constraint begins after the thinking."""
    result = await model.generate(**WHO, **form, **ASKED)
    assert re.fullmatch(pattern, result.text)
    assert result.usage.reasoning_tokens == BUDGET


@pytest.mark.parametrize("parallel", [False, True])
async def test_a_required_call(model: AsyncModelWorker, parallel: bool) -> None:
    """Issue 13, tool calls: what enforces a call goes on after the thinking was closed."""
    tools = (Tool("meet", parameters=SCHEMA), Tool("leave"))
    choice = ToolChoice("required", () if parallel else ("meet",), parallel=parallel)
    result = await model.generate(**WHO, tools=tools, tool_choice=choice, **ASKED)
    calls = result.choices[0].tool_calls
    assert result.usage.reasoning_tokens == BUDGET
    assert result.choices[0].finish_reason in {"tool_calls", "length"}
    assert calls or result.choices[0].finish_reason == "length"
    for call in calls:
        if call.name == "meet":
            whole(SCHEMA, call.arguments)


@pytest.mark.parametrize("form", ["json_schema", pytest.param("tools", marks=pytest.mark.slow)])
async def test_after_a_crash_it_is_the_same_answer(model: AsyncModelWorker, form: str) -> None:
    """W13, issue 13: with thinking, a budget and what is enforced, wherever the worker dies."""
    given: Any = {"json_schema": SCHEMA}
    if form == "tools":
        choice = ToolChoice("required", parallel=False)
        given = {"tools": (Tool("meet", parameters=SCHEMA),), "tool_choice": choice}
    expected = (await model.generate(**WHO, **given, **ASKED)).choices[0]
    text, thinking, arguments = "", "", ""
    killed = finish = None
    async for event in model.generate_stream(**WHO, **given, **ASKED):
        if isinstance(event, Delta):
            text, thinking = text + event.text, thinking + event.reasoning
        elif isinstance(event, ToolCallDelta):
            arguments += event.arguments
        elif isinstance(event, Finish):
            finish = event
        if killed is None and len(text + arguments) > 6:
            killed = worker_pid(model)
            assert killed is not None
            os.kill(killed, signal.SIGKILL)
    assert killed is not None
    assert finish is not None
    assert finish.metrics.continuations == 1
    assert (text, thinking) == (expected.text, expected.reasoning)
    assert arguments == "".join(call.arguments for call in expected.tool_calls)
    assert finish.usage.reasoning_tokens == BUDGET
