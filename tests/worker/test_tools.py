"""Tools and thinking in a worker: what is rendered, parsed, enforced and refused."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from tests.worker.rig import worker

from headrace.core.constraint import Constraint
from headrace.core.errors import ConstraintViolated, InvalidRequest, Unsupported
from headrace.core.events import Delta, ToolCall, ToolCallDelta
from headrace.core.model import ModelFile
from headrace.core.request import GenerateRequest, Message
from headrace.core.sampling import Sampling
from headrace.core.stream import collect
from headrace.core.tools import Thinking, Tool, ToolChoice
from headrace.engines.base import OpenRequest
from headrace.engines.echo import Engine
from headrace.text.calls.families import FAMILIES
from headrace.text.calls.parts import Reading
from headrace.text.calls.splitter import Splitter
from headrace.text.template import ChatTemplate
from headrace.worker.chat import Chat
from headrace.worker.parts import Output, PartsPipeline

SCHEMA: dict[str, Any] = {"type": "object", "properties": {"a": {"type": "integer"}}}
PLATE = Tool(
    "plate",
    parameters={
        "type": "object",
        "properties": {"input": {"type": "string"}},
        "required": ["input"],
        "additionalProperties": False,
    },
    strict=True,
    input=Constraint(regex="[A-Z]-[0-9]"),
)
TOOLS = (Tool("one", "First.", SCHEMA), Tool("two"))
HERMES = """\
{%- if tools %}TOOLS{% for tool in tools %}{{ tool | tojson }}{% endfor %}
{% endif -%}
{%- for m in messages -%}
<|{{ m.role }}|>
{%- if m.reasoning_content %}<think>
{{ m.reasoning_content }}
</think>

{% endif -%}
{{ m.content }}
{%- for call in m.tool_calls or [] %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>
{%- endfor %}<|end|>
{% endfor -%}
{%- if add_generation_prompt %}<|assistant|>
{%- if enable_thinking is defined and not enable_thinking %}<think>

</think>

{% endif %}{% endif -%}
"""


def call(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


def pipeline(*stops: str, single: bool = False) -> PartsPipeline:
    splitter = Splitter(
        FAMILIES["hermes"], {"one": SCHEMA}, Reading(calls=True), thinking_open=False
    )
    return PartsPipeline(splitter, stops, "request", 0, single=single)


def answered(events: list[Output]) -> tuple[str, list[str]]:
    text = "".join(event.text for event in events if isinstance(event, Delta))
    return text, [event.name for event in events if isinstance(event, ToolCallDelta) and event.name]


def asked(content: str, **given: Any) -> GenerateRequest:
    given = {"tools": TOOLS} | given
    return GenerateRequest(messages=(Message("user", content),), **given)


def chat(source: str = HERMES) -> Chat:
    engine = Engine(OpenRequest(model=ModelFile(path="", format="none")))
    return Chat(ChatTemplate(source, {}), engine)


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_nothing_comes_after_a_stop_string(size: int) -> None:
    """Issue 13: also not a call in the same piece; what was held back comes before a call."""
    text = f"ab STOP {call('one', '{}')}".encode()
    pieces = [text[at : at + size] for at in range(0, len(text), size)]
    parts = pipeline("STOP")
    events = [event for piece in pieces for event in parts.feed(piece)] + parts.flush()
    assert (answered(events), parts.calls, parts.stopped) == (("ab ", []), [], True)
    parts = pipeline("STOP")
    events = parts.feed(f"ab ST{call('one', '{}')}".encode()) + parts.flush()
    assert isinstance(events[0], Delta)
    assert answered(events) == ("ab ST", ["one"])
    first_call = next(n for n, event in enumerate(events) if isinstance(event, ToolCallDelta))
    assert answered(events[:first_call])[0] == "ab ST"


def test_an_answer_without_parallel_calls_ends_with_its_first() -> None:
    """Issue 13, parallel_tool_calls."""
    two = (call("one", '{"a": 1}') + call("two", "{}")).encode()
    parts = pipeline(single=True)
    assert answered(parts.feed(two) + parts.flush()) == ("", ["one"])
    assert (parts.calls, parts.stopped) == ([("one", '{"a": 1}')], True)
    assert answered(pipeline().feed(two)) == ("", ["one", "two"])


async def test_one_call_or_several_of_a_worker() -> None:
    """Issue 13: the model's stream is left after the first."""
    two = call("one", '{"a": 1}') + call("two", "{}")
    async with worker() as one:
        several = await collect(one.ask(asked(two)))
        single = await collect(one.ask(asked(two, tool_choice=ToolChoice(parallel=False))))
    assert [made.name for made in several.choices[0].tool_calls] == ["one", "two"]
    assert [made.name for made in single.choices[0].tool_calls] == ["one"]
    assert several.finish_reason == single.finish_reason == "tool_calls"


async def test_a_call_that_is_cut_is_no_call() -> None:
    """Issue 13: a whole answer has complete calls only, and ends with `length`."""
    two = call("one", '{"a": 1}') + call("two", '{"b": 12345678}')
    sampling = Sampling(max_tokens=len(two) - 24)
    async with worker() as one:
        result = await collect(one.ask(asked(two, sampling=sampling)))
    assert [made.name for made in result.choices[0].tool_calls] == ["one"]
    assert result.finish_reason == "length"
    # What was cut is not lost.
    assert result.text.strip() == two[len(call("one", '{"a": 1}')) : -24].strip()


async def test_a_broken_call_is_text() -> None:
    """Issue 13: of a whole answer; a stream has its beginning, which cannot be taken back."""
    broken = call("one", '{"a": maybe}')
    async with worker() as one:
        result = await collect(one.ask(asked(f"Hm. {broken} Yes.")))
        events = [event async for event in one.ask(asked(broken))]
    assert (result.text, result.choices[0].tool_calls) == (f"Hm. {broken} Yes.", ())
    assert result.finish_reason == "stop"
    parts = [event for event in events if isinstance(event, ToolCallDelta)]
    assert [part.cut for part in parts if part.cut]
    assert parts[0].name == "one"


@pytest.mark.parametrize(
    "given",
    [
        {"tool_choice": ToolChoice("required")},
        {"constraint": Constraint(json_schema={})},
        {"tools": (PLATE,), "tool_choice": ToolChoice("required")},
    ],
)
async def test_what_cannot_be_enforced_is_refused(given: Any) -> None:
    """Issue 13, 11.4: never free text where a call or a format was demanded."""
    async with worker() as one:
        with pytest.raises(Unsupported):
            await collect(one.ask(asked("x", **given)))


async def test_what_cannot_be_enforced_of_a_free_call_is_checked() -> None:
    """Issue 13: Codex sends the grammar of patches with auto; no call that breaks it passes."""
    form = "<tool_call>{ %s }</tool_call>"
    swapped = form % '"arguments": {"input": "A-1"}, "name": "plate"'
    async with worker(context_length=1024) as one:
        for content in (call("plate", '{"input": "A-1"}'), swapped):
            result = await collect(one.ask(asked(content, tools=(*TOOLS, PLATE))))
            assert [made.name for made in result.choices[0].tool_calls] == ["plate"]
        free = await collect(one.ask(asked("No call.", tools=(PLATE,))))
        assert free.text == "No call."
        for arguments in ('{"input": "A-12"}', '{"input": 1}', "{}"):
            with pytest.raises(ConstraintViolated):
                await collect(one.ask(asked(call("plate", arguments), tools=(PLATE,))))
        with pytest.raises(InvalidRequest, match="The input of the tool plate"):
            bad = msgspec.structs.replace(PLATE, input=Constraint(grammar="start: a\na: b\n"))
            await collect(one.ask(asked("x", tools=(bad,))))


@pytest.mark.parametrize("cities", [["Zürich"], ["Ł", "€", "😀"]])
async def test_a_character_of_several_tokens_is_one(cities: list[str]) -> None:
    """Issue 13, strict: echo's tokens are bytes; what was checked had U+FFFD for each of them."""
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {"city": {"enum": cities}},
        "required": ["city"],
    }
    tool = Tool("one", parameters=schema, strict=True)
    for city in cities:
        content = call("one", json.dumps({"city": city}, ensure_ascii=False))
        request = GenerateRequest(messages=(Message("user", content),), tools=(tool,))
        async with worker(context_length=1024) as echo:
            (made,) = (await collect(echo.ask(request))).choices[0].tool_calls
        assert json.loads(made.arguments) == {"city": city}


def test_a_response_format_beside_tools() -> None:
    """Issue 13: one grammar of calls and of the form; without tools it is the form alone."""
    form = Constraint(json_schema=SCHEMA)
    both = chat().constraint(asked("x", constraint=form), "")
    assert both is not None
    assert "headrace_answer" in both.lark
    forced = asked("x", constraint=form, tool_choice=ToolChoice("required"))
    required = chat().constraint(forced, "")
    assert required is not None
    assert "headrace_answer" not in required.lark
    none = asked("x", constraint=form, tool_choice=ToolChoice("none"))
    assert chat().constraint(none, "") == form
    grammar = asked("x", constraint=Constraint(grammar='start: "a"'))
    with pytest.raises(Unsupported, match="cannot be combined with tools"):
        chat().constraint(grammar, "")


def test_only_enforced_schemas_are_limited() -> None:
    """Issue 13, 11.5: the error names the tool, and `auto` renders any schema."""
    bomb = Tool("bomb", parameters={"type": "object", "properties": {"a": {"format": "secret"}}})
    strict = Tool("strict", parameters=SCHEMA, strict=True)
    free = GenerateRequest(messages=(Message("user", "x"),), tools=(bomb, strict))
    assert chat().constraint(free, "") is not None
    forced = GenerateRequest(
        messages=free.messages, tools=free.tools, tool_choice=ToolChoice("required")
    )
    with pytest.raises(InvalidRequest, match="The tool bomb") as refused:
        chat().constraint(forced, "")
    assert refused.value.param == "tools"


def test_the_history_is_rendered_by_the_model() -> None:
    """Issue 13: calls, results and thinking, in the template's own form."""
    made = ToolCall("call_1", "one", '{"a": 1}')
    messages = (
        Message("user", "go"),
        Message("assistant", "", tool_calls=(made,), reasoning="Hm."),
        Message("tool", "result", tool_call_id="call_1"),
    )
    text = chat().render(GenerateRequest(messages=messages, tools=TOOLS))
    assert call("one", '{"a": 1}') in text
    assert "<think>\nHm.\n</think>" in text
    assert "<|tool|>result" in text
    assert '"name": "two"' in text
    bare = "{% for m in messages %}[{{ m.role }}: {{ m.content }}]{% endfor %}"
    generic = chat(bare).render(GenerateRequest(messages=messages, tools=TOOLS))
    assert "<tool_response>\nresult\n</tool_response>" in generic
    assert call("one", '{"a": 1}') in generic
    assert "[tool:" not in generic


def test_thinking_is_switched_by_what_the_template_knows() -> None:
    """Issue 13, thinking: one policy; a budget of 0 is none."""
    off = chat().render(asked("x", thinking=Thinking(enabled=False)))
    assert off.endswith("<think>\n\n</think>\n\n")
    assert "<think>" not in chat().render(asked("x", thinking=Thinking(enabled=True)))
    assert chat().render(asked("x", thinking=Thinking(budget=0))) == off
    assert chat().render(asked("x", thinking=Thinking(budget=5))) == chat().render(asked("x"))
    plain = "{{ messages[-1].content }}"
    assert chat(plain).render(
        GenerateRequest(messages=(Message("user", "x"),), thinking=Thinking(budget=5))
    )


def test_a_client_cannot_replace_the_tools() -> None:
    """Issue 13: template options set no variable of the conversation."""
    with pytest.raises(InvalidRequest, match="tools"):
        chat().render(asked("x", template_options={"tools": []}))
