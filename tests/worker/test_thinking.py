"""Budgets of thinking, its figures, and markers that are control tokens."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
from tests.worker.rig import finish, listed, until, worker

from headrace.core.errors import Unsupported
from headrace.core.events import Delta, Event, ToolCallDelta
from headrace.core.model import ModelFile
from headrace.core.request import GenerateRequest, Message
from headrace.core.sampling import Sampling
from headrace.core.stream import collect
from headrace.core.tools import Thinking, Tool
from headrace.engines.base import OpenRequest
from headrace.engines.echo import Engine
from headrace.text.template import ChatTemplate
from headrace.worker.chat import Chat

OPENED = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
)
OPTIONAL = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
    "{% endif %}"
)
CLOSE = "</think>"
# The script goes on behind what the worker has put in.
SKIPPED = "#" * len(CLOSE)


def asked(budget: int | None, **given: Any) -> GenerateRequest:
    thinking = Thinking(budget=budget)
    return GenerateRequest(messages=(Message("user", "x"),), thinking=thinking, **given)


def parts(events: Sequence[Event], index: int = 0) -> tuple[str, str]:
    deltas = [e for e in events if isinstance(e, Delta) and e.index == index]
    return "".join(e.reasoning for e in deltas), "".join(e.text for e in deltas)


def ids(events: Sequence[Event]) -> tuple[int, ...]:
    return tuple(token for e in events if isinstance(e, Delta) for token in e.token_ids)


@pytest.mark.parametrize("size", [1, 3, 100])
async def test_the_thinking_is_closed_at_its_budget(size: int) -> None:
    """Issue 13, thinking: exact also where tokens come in groups; usage counts all tokens."""
    async with worker(
        text=f"abcd{SKIPPED}answer", chat_template=OPENED, tokens_per_delta=size
    ) as echo:
        events = await listed(echo.ask(asked(4)))
    assert parts(events) == ("abcd", "answer")
    assert ids(events) == (*b"abcd", *CLOSE.encode(), *b"answer", 256)
    usage, metrics = finish(events).usage, finish(events).metrics
    assert (usage.reasoning_tokens, usage.completion_tokens) == (4, 4 + len(CLOSE) + 7)
    assert usage.cached_tokens == 0
    assert finish(events).finish_reason == "stop"
    assert metrics.time_to_first_token_ms is not None
    assert metrics.time_to_first_content_ms is not None
    assert metrics.time_to_first_token_ms < metrics.time_to_first_content_ms


async def test_thinking_alone_has_no_first_content() -> None:
    """Issue 13, thinking: not even where its last white space is held back to the end."""
    async with worker(text="hm\n\n", chat_template=OPENED) as echo:
        metrics = finish(await listed(echo.ask(asked(None)))).metrics
    assert metrics.time_to_first_token_ms is not None
    assert metrics.time_to_first_content_ms is None


async def test_a_budget_that_is_not_reached_changes_nothing() -> None:
    """Issue 13, thinking."""
    text = f"abc{CLOSE}answer"
    async with worker(text=text, chat_template=OPENED) as echo:
        plain = await listed(echo.ask(asked(None)))
        limited = await listed(echo.ask(asked(100)))
    assert parts(plain) == parts(limited) == ("abc", "answer")
    assert ids(plain) == ids(limited)
    assert finish(plain).usage == finish(limited).usage


async def test_a_model_that_begins_to_think_by_itself() -> None:
    """Issue 13, thinking: the tokens of the marker that opens it are not counted."""
    text = f"<think>abcd{SKIPPED}answer"
    async with worker(text=text, chat_template=OPTIONAL) as echo:
        events = await listed(echo.ask(asked(4)))
    assert parts(events)[1].endswith("answer")
    assert parts(events)[0] == "abcd"[: len(parts(events)[0])]
    assert finish(events).usage.reasoning_tokens == 4


async def test_a_budget_of_nothing_is_closed_at_once() -> None:
    """Issue 13, thinking: where the template cannot switch it off."""
    async with worker(text=f"{SKIPPED}answer", chat_template=OPENED) as echo:
        events = await listed(echo.ask(asked(0)))
    assert parts(events) == ("", "answer")
    assert finish(events).usage.reasoning_tokens == 0


@pytest.mark.parametrize("room", [3, 5, 4 + len(CLOSE)])
async def test_max_tokens_count_the_thinking(room: int) -> None:
    """Issue 13, thinking: without room for an answer the thinking is not closed."""
    async with worker(text=f"abcd{SKIPPED}answer", chat_template=OPENED) as echo:
        sampling = Sampling(max_tokens=room)
        events = await listed(echo.ask(asked(4, sampling=sampling)))
    assert parts(events) == ("abcd"[:room], "")
    assert finish(events).finish_reason == "length"
    assert finish(events).usage.completion_tokens <= room


async def test_each_choice_has_the_budget() -> None:
    """Issue 13, thinking: n above 1."""
    async with worker(text=f"abcd{SKIPPED}answer", chat_template=OPENED) as echo:
        result = await collect(echo.ask(asked(4, n=3)))
    assert [(c.reasoning, c.text) for c in result.choices] == [("abcd", "answer")] * 3
    assert result.usage.reasoning_tokens == 12


async def test_a_call_follows_the_thinking() -> None:
    """Issue 13: tools and a budget."""
    call = '<tool_call>\n{"name": "one", "arguments": {}}\n</tool_call>'
    async with worker(text=f"abcd{SKIPPED}{call}", chat_template=OPENED) as echo:
        events = await listed(echo.ask(asked(4, tools=(Tool("one"),))))
    assert [e.name for e in events if isinstance(e, ToolCallDelta) and e.name] == ["one"]
    assert parts(events) == ("abcd", "")
    assert finish(events).finish_reason == "tool_calls"


async def test_wherever_it_was_cut_it_goes_on() -> None:
    """W13, issue 13: after a worker's death too, with the same tokens and the same usage.

    The tokens that close the thinking travel together.
    """
    async with worker(text=f"abcd{SKIPPED}answer", chat_template=OPENED) as echo:
        whole = await listed(echo.ask(asked(4)))
        deltas = [e for e in whole if isinstance(e, Delta)]
        for number in range(1, len(deltas)):
            cut = len(ids(deltas[:number]))
            again = await listed(echo.ask(asked(4, answered=ids(whole)[:cut])))
            assert (parts(again), ids(again)) == (parts(whole), ids(whole))
            assert finish(again).usage == finish(whole).usage


async def test_closing_the_stream_after_the_budget_frees_the_slot() -> None:
    """W20: also between the two requests of the engine."""
    async with worker(
        text=f"abcd{SKIPPED}{'y' * 500}", chat_template=OPENED, max_running=1, tokens_per_second=200
    ) as echo:
        stream = echo.ask(asked(4))
        async for event in stream:
            if isinstance(event, Delta) and event.text:
                break
        assert echo.load == (1, 0)
        await stream.aclose()
        assert echo.load == (0, 0)
        waiting = asyncio.ensure_future(collect(echo.ask(asked(0))))
        await until(lambda: echo.load == (1, 0))
        waiting.cancel()
        await asyncio.wait({waiting})
        assert echo.load == (0, 0)


async def test_an_engine_that_cannot_go_on_refuses_a_budget() -> None:
    """Issue 13, thinking: by name; a model that does not think ignores it."""
    engine = Engine(OpenRequest(model=ModelFile(path="", format="none")))
    unable = msgspec.structs.replace(engine.facts.capabilities, resume=False)
    engine.facts = msgspec.structs.replace(engine.facts, capabilities=unable)
    chat = Chat(ChatTemplate(OPENED, {}), engine)
    with pytest.raises(Unsupported) as refused:
        chat.parsing(asked(4), chat.render(asked(4)))
    assert refused.value.param == "thinking_budget"
    async with worker() as plain:
        assert (await collect(plain.ask(asked(4)))).text == "x"
