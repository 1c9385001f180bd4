"""Markers that are control tokens of the model, which engines leave out of the text."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest
from tests import models_made
from tests.worker.rig import finish, listed

from headrace import AsyncModelWorker
from headrace.core.events import Delta, Event
from headrace.core.request import GenerateRequest, Message
from headrace.core.sampling import Sampling
from headrace.core.stream import collect
from headrace.core.tools import Thinking, Tool, ToolChoice

# All of them are control tokens of SmolLM2.
OPEN, CLOSE, THINK, THOUGHT = "<file_sep>", "<filename>", "<issue_start>", "<issue_closed>"
IDS = {OPEN: 5, CLOSE: 6, THINK: 8, THOUGHT: 10}
TEMPLATE = """\
{%- if tools %}{% for tool in tools %}{{ tool | tojson }}{% endfor %}{% endif -%}
{%- for m in messages -%}
<|im_start|>{{ m.role }}
{% if m.reasoning_content %}<issue_start>{{ m.reasoning_content }}<issue_closed>{% endif -%}
{{ m.content or '' }}
{%- for call in m.tool_calls or [] -%}
<file_sep>{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
{#- #}<filename>
{%- endfor %}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif -%}
"""
TOOL = Tool(
    "add",
    "Adds two numbers.",
    {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
        "required": ["a", "b"],
        "additionalProperties": False,
    },
)


def asked(**given: Any) -> GenerateRequest:
    sampling = {"temperature": 0.0, "max_tokens": 60, **given.pop("sampling", {})}
    return GenerateRequest(
        messages=(Message("user", "What is 2 and 3?"),), sampling=Sampling(**sampling), **given
    )


@pytest.fixture(
    scope="module",
    params=["llamacpp", pytest.param("transformers", marks=pytest.mark.engines)],
)
async def model(
    request: pytest.FixtureRequest, smollm2_path: Path
) -> AsyncGenerator[AsyncModelWorker, None]:
    path = smollm2_path if request.param == "llamacpp" else models_made.smollm2(smollm2_path)
    given: Any = {"engine": request.param, "context_length": 512, "chat_template": TEMPLATE}
    async with AsyncModelWorker(str(path), **given) as worker:
        yield worker


def ask(model: AsyncModelWorker, request: GenerateRequest) -> AsyncGenerator[Event, None]:
    return model._ask(request)


def ids(events: list[Event]) -> tuple[int, ...]:
    return tuple(token for e in events if isinstance(e, Delta) for token in e.token_ids)


async def test_a_call_between_control_tokens(model: AsyncModelWorker) -> None:
    """Issue 13, tool calls: enforced by the tokens themselves, and seen by the parser."""
    request = asked(
        tools=(TOOL,),
        tool_choice=ToolChoice("required", parallel=False),
        # Without it the model thinks to the end.
        thinking=Thinking(budget=5),
    )
    result = await collect(ask(model, request))
    (choice,) = result.choices
    assert (choice.finish_reason, choice.text) == ("tool_calls", "")
    assert choice.tool_calls[0].name == "add"
    assert IDS[OPEN] in choice.token_ids
    assert choice.reasoning
    assert THOUGHT not in choice.reasoning
    assert result.usage.reasoning_tokens <= 5
    assert CLOSE not in choice.tool_calls[0].arguments


async def test_markers_are_shown_to_the_parser_alone(model: AsyncModelWorker) -> None:
    """Issue 13: text of an answer that calls nothing, as before."""
    marker = {"logit_bias": {IDS[OPEN]: 100.0}, "max_tokens": 3}
    plain = await listed(ask(model, asked(sampling=marker)))
    assert ids(plain) == (IDS[OPEN],) * 3
    assert not [e for e in plain if isinstance(e, Delta) and e.text]
    tools = await listed(ask(model, asked(sampling=marker, tools=(TOOL,))))
    assert ids(tools) == ids(plain)
    # No call has begun, so that nothing of it is lost.
    text = "".join(e.text for e in tools if isinstance(e, Delta))
    assert text == OPEN * 3


async def test_thinking_between_control_tokens(model: AsyncModelWorker) -> None:
    """Issue 13, thinking: its markers are read without tools, and a budget closes it."""
    begun = {"logit_bias": {IDS[THINK]: 100.0}, "max_tokens": 1}
    (opened,) = ids(await listed(ask(model, asked(sampling=begun))))
    assert opened == IDS[THINK]
    request = asked(sampling={"max_tokens": 12}, thinking=Thinking(budget=4), answered=(opened,))
    events = await listed(ask(model, request))
    made, usage = ids(events), finish(events).usage
    assert usage.reasoning_tokens == 4 or finish(events).finish_reason == "stop"
    assert IDS[THOUGHT] in made
    deltas = [e for e in events if isinstance(e, Delta)]
    assert not [e for e in deltas if THINK in e.reasoning or THOUGHT in e.text + e.reasoning]


async def test_an_answer_with_markers_goes_on(model: AsyncModelWorker) -> None:
    """W13, W19: the text of the tokens is the same when they are given back."""
    marker = {"logit_bias": {IDS[OPEN]: 100.0}, "max_tokens": 4}
    whole = await listed(ask(model, asked(sampling=marker, tools=(TOOL,))))
    again = await listed(ask(model, asked(sampling=marker, tools=(TOOL,), answered=ids(whole)[:2])))
    assert ids(again) == ids(whole)
    texts = ["".join(e.text for e in events if isinstance(e, Delta)) for events in (whole, again)]
    assert texts[0] == texts[1]
