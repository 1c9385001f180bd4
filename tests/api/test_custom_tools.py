"""Custom tools of chat completions and of /v1/responses: what takes text, also of a grammar."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletion
from tests.api.fakes import FakeBackend, client, finish
from tests.service.serving import Service, served

from headrace.core.constraint import Constraint
from headrace.core.events import Delta, ToolCall, ToolCallDelta
from headrace.core.request import Message
from headrace.core.tools import ToolChoice

PATH = "/v1/chat/completions"
FUNCTION: Any = {"type": "function", "function": {"name": "f"}}
REGEX = r'[A-Z]{2}-[0-9]{3}( "ok")?'
LARK = r"""start: "run " WORD (" and " WORD)? LF /["\\]{2}/ ";"
WORD: "a" | "b\"c"i
%import common.LF
"""
LARK_TEXT = r'run (a|[bB]"[cC])( and (a|[bB]"[cC]))?\n["\\]{2};'


def custom(name: str = "code", **form: Any) -> Any:
    return {"type": "custom", "custom": {"name": name, "description": "Runs.", **form}}


def of(syntax: str, definition: str) -> Any:
    grammar = {"syntax": syntax, "definition": definition}
    return {"format": {"type": "grammar", "grammar": grammar}}


def calls(_request: Any) -> Iterator[Any]:
    yield Delta("", (1,))
    yield ToolCallDelta(0, "call_1", "code", '{"input": "x\\n')
    yield ToolCallDelta(0, arguments='\\"y\\"\\u00e9')
    yield ToolCallDelta(0, arguments='"}')
    yield ToolCallDelta(1, "call_2", "f", "{}")
    yield ToolCallDelta(2, "call_3", "code", '{"text": "odd"}')
    yield finish("tool_calls")


async def post(script: Any = None, **fields: Any) -> Any:
    backend = FakeBackend(script) if script else FakeBackend()
    given = {"model": "m", "messages": [{"role": "user", "content": "x"}], **fields}
    async with client(backend) as http:
        return await http.post(PATH, json=given), backend


async def test_calls_of_custom_tools() -> None:
    """Issue 13: text and not arguments; one that the model writes otherwise is not lost."""
    answer, backend = await post(calls, tools=[custom(), FUNCTION])
    ChatCompletion.model_validate_json(answer.text)
    (choice,) = answer.json()["choices"]
    assert choice["message"]["tool_calls"] == [
        {"id": "call_1", "type": "custom", "custom": {"input": 'x\n"y"é', "name": "code"}},
        {"id": "call_2", "type": "function", "function": {"arguments": "{}", "name": "f"}},
        {"id": "call_3", "type": "custom", "custom": {"input": '{"text": "odd"}', "name": "code"}},
    ]
    tool, function = backend.requests[0].tools
    assert (tool.name, tool.description, tool.strict) == ("code", "Runs.", False)
    assert tool.parameters["properties"] == {"input": {"type": "string"}}
    assert function.name == "f"


async def test_they_are_streamed() -> None:
    """Issue 13: index, id, type and name once, then text."""
    answer, _ = await post(calls, tools=[custom(), FUNCTION], stream=True)
    lines = [line[6:] for line in answer.text.splitlines() if line.startswith("data: {")]
    parts = [
        part
        for line in lines
        for choice in json.loads(line)["choices"]
        for part in choice["delta"].get("tool_calls", ())
    ]
    heads = [(part["index"], part["id"], part["type"]) for part in parts if "id" in part]
    assert heads == [(0, "call_1", "custom"), (1, "call_2", "function"), (2, "call_3", "custom")]
    texts: dict[int, str] = {}
    for part in parts:
        body = part.get("custom") or {"input": part["function"]["arguments"]}
        texts[part["index"]] = texts.get(part["index"], "") + body["input"]
    assert texts == {0: 'x\n"y"é', 1: "{}", 2: '{"text": "odd"}'}
    assert all("custom" in part or part["index"] == 1 for part in parts)


async def test_histories_and_choices() -> None:
    made = {"id": "c1", "type": "custom", "custom": {"name": "code", "input": 'a "b"\n'}}
    messages = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": None, "tool_calls": [made]},
        {"role": "tool", "tool_call_id": "c1", "content": "done"},
    ]
    named = {"type": "custom", "custom": {"name": "code"}}
    _, backend = await post(messages=messages, tools=[custom(), FUNCTION], tool_choice=named)
    request = backend.requests[0]
    call = ToolCall("c1", "code", '{"input":"a \\"b\\"\\n"}')
    assert request.messages[1] == Message("assistant", "", tool_calls=(call,))
    assert request.messages[2].name == "code"
    assert request.tool_choice == ToolChoice("required", ("code",), parallel=False)
    some = {"mode": "auto", "tools": [named, FUNCTION]}
    choice = {"type": "allowed_tools", "allowed_tools": some}
    _, backend = await post(tools=[custom(), FUNCTION], tool_choice=choice)
    assert backend.requests[0].tool_choice == ToolChoice("auto", ("code", "f"))


async def test_grammars() -> None:
    """Issue 13: each is enforced, and described."""
    tools = [custom(**of("regex", REGEX)), custom("b", **of("lark", LARK))]
    _, backend = await post(tools=tools)
    regex, lark = backend.requests[0].tools
    assert regex.strict
    assert regex.input == Constraint(regex=REGEX)
    assert REGEX in regex.description
    assert lark.strict
    assert lark.input == Constraint(grammar=LARK)
    assert LARK.strip() in lark.description


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "custom"}]}, "tools[0].custom"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"type": "custom", "function": {"name": "f"}}]}, "tools[0].custom"),
        (
            {"tools": [custom(**of("regex", "a{9999}"))]},
            "tools[0].custom.format.grammar.definition",
        ),
        (
            {"tools": [custom(**of("regex", "a" * 8200))]},
            "tools[0].custom.format.grammar.definition",
        ),
        (
            {"tools": [custom(**of("lark", "a" * 66_000))]},
            "tools[0].custom.format.grammar.definition",
        ),
        ({"tools": [custom(**of("lark", ""))]}, "tools[0].custom.format.grammar.definition"),
        ({"tools": [custom(**of("ebnf", "a"))]}, "tools[0].custom.format.grammar.syntax"),
        ({"tools": [custom(format={"type": "grammar"})]}, "tools[0].custom.format.grammar"),
        (
            {"tools": [custom(format=of("regex", "a")["format"] | {"type": "text"})]},
            "tools[0].custom.format.grammar",
        ),
        ({"tools": [custom(), custom()]}, "tools"),
        ({"tools": [custom()], "tool_choice": {"type": "custom"}}, "tool_choice.custom"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"id": "c", "type": "custom"}]}]},
            "messages[0].tool_calls[0].custom",
        ),
    ],
)
async def test_what_is_wrong_is_named(fields: Any, param: str) -> None:
    answer, backend = await post(**fields)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param, answer.text
    assert not backend.requests


@pytest.fixture(scope="module")
def service(smollm2_path: Path) -> Iterator[Service]:
    with served("smollm2", "--context-length", "1024", "--option", "threads=1") as running:
        yield running


def test_a_regex_on_the_real_model(service: Service) -> None:
    """Issue 13: the openai package, chat completions and responses, streamed and not."""
    tools: Any = [custom("plate", **of("regex", REGEX)), FUNCTION]
    choice: Any = {"type": "custom", "custom": {"name": "plate"}}
    with openai.OpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0) as http:
        messages: Any = [{"role": "user", "content": "Call plate with AB-123."}]
        fixed: Any = {"model": "smollm2", "temperature": 0}
        answer = http.chat.completions.create(
            messages=messages, tools=tools, tool_choice=choice, **fixed
        )
        made: Any = answer.choices[0].message.tool_calls
        (call,) = made
        assert call.type == "custom"
        assert re.fullmatch(REGEX, call.custom.input)
        flat: Any = {"type": "custom", "name": "plate", "description": "Runs."}
        form = {"type": "grammar", "syntax": "regex", "definition": REGEX}
        named: Any = {"type": "custom", "name": "plate"}
        free: Any = [{**flat, "format": form}]
        with http.responses.stream(
            input="Call plate.", tools=free, tool_choice=named, **fixed
        ) as stream:
            (item,) = stream.get_final_response().output
        assert item.type == "custom_tool_call"
        assert re.fullmatch(REGEX, item.input)
        with pytest.raises(openai.BadRequestError) as refused:
            http.chat.completions.create(
                messages=messages, tools=[custom("a", **of("regex", "(?=a)b"))], **fixed
            )
        assert refused.value.param == "tools"
        assert "The input of the tool a: The regex cannot be enforced" in str(refused.value)


def test_a_lark_grammar_on_the_real_model(service: Service) -> None:
    """Issue 13: enforced in chat completions and responses, streamed and not; else a 400."""
    form = {"type": "grammar", "syntax": "lark", "definition": LARK}
    tools: Any = [{"type": "custom", "name": "code", "format": form}]
    choice: Any = {"type": "custom", "name": "code"}
    fixed: Any = {"model": "smollm2", "temperature": 0}
    with openai.OpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0) as http:
        with http.responses.stream(
            input="Call code.", tools=tools, tool_choice=choice, **fixed
        ) as stream:
            (item,) = stream.get_final_response().output
        assert item.type == "custom_tool_call"
        assert re.fullmatch(LARK_TEXT, item.input)
        bad: Any = [{**tools[0], "format": {**form, "definition": "start: a\na: b\n"}}]
        with pytest.raises(openai.BadRequestError) as refused:
            http.responses.create(input="x", tools=bad, tool_choice=choice, **fixed)
        assert refused.value.param == "tools"
        assert "The input of the tool code: The grammar cannot be enforced" in str(refused.value)
        assert "line 2, column 4" in str(refused.value)
