"""Answers that go on after the tokens that were given before."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from tests.worker.rig import ask, finish, listed, process, text, until, worker
from tests.worker.test_prompt import prompter

from headrace.core.constraint import Constraint
from headrace.core.errors import (
    ContextOverflow,
    GenerationFailed,
    InvalidRequest,
    Unsupported,
)
from headrace.core.events import Delta, Event, Progress
from headrace.core.model import Capabilities
from headrace.core.stream import collect
from headrace.worker.worker import Worker

SAID = "né🌍 and so on"
IDS = tuple(SAID.encode())

ANY_JSON = Constraint(json_schema={})


def deltas(events: list[Event]) -> list[Delta]:
    return [event for event in events if isinstance(event, Delta)]


def ids(events: list[Event]) -> tuple[int, ...]:
    return tuple(token for delta in deltas(events) for token in delta.token_ids)


async def answered(one: Worker, **given: Any) -> list[Event]:
    return await listed(one.ask(ask(**given)))


async def test_wherever_it_was_cut_the_whole_is_the_same() -> None:
    """W12, W13, W15: at each of its tokens, inside of characters and of stop strings too."""
    async with worker(text=SAID) as one:
        for given in ({}, {"stop": ("so on!", "and so")}, {"max_tokens": 9}, {"max_tokens": 3}):
            whole = await answered(one, prompt="xyz", **given)
            for cut in range(1, len(ids(whole)) + 1):
                again = await answered(one, prompt="xyz", answered=ids(whole)[:cut], **given)
                assert text(again) == text(whole)
                assert ids(again) == ids(whole)
                assert finish(again).usage == finish(whole).usage
                assert finish(again).finish_reason == finish(whole).finish_reason
        assert one.load == (0, 0)


async def test_the_first_delta_carries_what_was_said() -> None:
    """W13: text and ids in one; after it only what is new."""
    async with worker(text=SAID) as one:
        first, second, *_ = deltas(await answered(one, answered=IDS[:9]))
        assert (first.text, first.token_ids) == (SAID[:5], IDS[:9])
        assert second == Delta("n", (ord("n"),))


@pytest.mark.parametrize("cut", [4, 5, 6])
async def test_half_a_character_is_generated_again(cut: int) -> None:
    """W13: its tokens are dropped, and no U+FFFD is shown."""
    async with worker(text=SAID) as one:
        events = await answered(one, answered=IDS[:cut])
        assert deltas(events)[0] == Delta("né", IDS[:3])
        assert text(events) == SAID
        assert finish(events).usage.completion_tokens == len(IDS) + 1


async def test_bytes_that_never_become_a_character_are_kept() -> None:
    """W13: they were shown as U+FFFD before, and are again."""
    async with worker() as one:
        prompt = (97, 0xFF, 0xFE, 0xFD, 0xFC, 98)
        events = await answered(one, prompt=prompt, answered=prompt[:5])
        assert deltas(events)[0] == Delta("a\ufffd\ufffd\ufffd\ufffd", prompt[:5])
        assert ids(events) == (*prompt, 256)


async def test_a_stop_string_is_held_back_and_found_across_the_cut() -> None:
    """W12: half of it in what was said, half in what follows."""
    async with worker(text="abSTOPcd") as one:
        events = await answered(one, answered=tuple(b"abST"), stop=("STOP",))
        assert deltas(events)[0].text == "ab"
        assert (text(events), finish(events).finish_reason) == ("ab", "stop")
        assert finish(events).usage.completion_tokens == 6


@pytest.mark.parametrize(
    ("given", "said", "reason"),
    [
        ({"answered": tuple(b"abSTOP"), "stop": ("STOP",)}, "ab", "stop"),
        ({"answered": tuple(b"abST"), "stop": ("STOP",), "max_tokens": 4}, "abST", "length"),
        ({"answered": tuple(b"abc"), "max_tokens": 3}, "abc", "length"),
        ({"answered": tuple(b"abcd"), "max_tokens": 3}, "abcd", "length"),
        ({"answered": tuple(b"abc"), "stop_token_ids": (99,)}, "abc", "stop"),
        ({"answered": tuple(b"abcde"), "stop_token_ids": (99,)}, "abc", "stop"),
    ],
)
async def test_what_was_whole_already_never_reaches_the_engine(
    given: dict[str, Any], said: str, reason: str
) -> None:
    """W12, W14, W15: nor does it wait for a slot; the prompt is counted all the same."""
    async with worker(text="abcdefSTOP", fail_after=0, max_running=1) as one:
        for _ in range(2):
            events = await answered(one, prompt="xyz", **given)
            assert (text(events), finish(events).finish_reason) == (said, reason)
            assert not [event for event in events if isinstance(event, Progress)]
            usage = finish(events).usage
            assert (usage.prompt_tokens, usage.completion_tokens) == (3, len(ids(events)))
        assert one.load == (0, 0)


async def test_after_the_end_token_there_is_no_more() -> None:
    """W14: the engine's own end, and the one it names; with ignore_eos it goes on."""
    async with worker(text="abc") as one:
        events = await answered(one, answered=(*b"abc", 256))
        assert (text(events), finish(events).finish_reason) == ("abc", "stop")
        assert finish(events).usage.completion_tokens == 4
    named = prompter(eos_token="^", capabilities=Capabilities(resume=True))
    assert named.job(ask("p", answered=(97, 1, 98))).over == "stop"
    assert named.job(ask("p", answered=(97, 1, 98))).choices[0].answered == (97, 1)
    able = Capabilities(resume=True, sampling=frozenset({"ignore_eos"}))
    deaf = prompter(eos_token="^", capabilities=able)
    assert deaf.job(ask("p", answered=(97, 1), ignore_eos=True)).over is None


async def test_figures_are_of_what_was_made_here() -> None:
    """W16: tokens that came along have no part in speed and gaps, but in the usage."""
    async with worker(text="x" * 60, tokens_per_second=100) as one:
        whole = finish(await answered(one, answered=(120,) * 40))
        assert whole.usage.completion_tokens == 61
        figures = whole.metrics
        assert figures.decode_tokens_per_second is not None
        assert 50 < figures.decode_tokens_per_second < 130
        assert figures.chunks == 21
        assert figures.inter_token_ms is not None
        assert figures.inter_token_ms.p50 < 30


async def test_an_error_afterwards_counts_them_too() -> None:
    """W16, W17: in the figures of the error."""
    async with worker(text=SAID, fail_after=2) as one:
        with pytest.raises(GenerationFailed) as caught:
            await answered(one, answered=IDS[:9])
        assert caught.value.metrics is not None
        assert caught.value.metrics.usage.completion_tokens == 11
        assert one.load == (0, 0)


@pytest.mark.parametrize(
    "given", [{"n": 2}, {"echo": True}, {"constraint": ANY_JSON}, {"n": 2, "constraint": ANY_JSON}]
)
def test_what_cannot_go_on_is_refused_by_name(given: dict[str, Any]) -> None:
    """W11: several choices, an echo, a grammar; and an engine that cannot."""
    able = prompter(capabilities=Capabilities(resume=True, json_schema=True))
    with pytest.raises(Unsupported) as caught:
        able.job(ask("p", answered=(97,), **given))
    assert caught.value.param == "answered"
    with pytest.raises(Unsupported) as unable:
        prompter().job(ask("p", answered=(97,)))
    assert unable.value.param == "answered"


async def test_the_limits_hold_for_both_parts_together() -> None:
    """W6: what was said is part of max_tokens, and so of the context; unknown ids are refused."""
    async with worker(context_length=10) as one:
        with pytest.raises(ContextOverflow, match="together 11"):
            await answered(one, prompt="abc", answered=(97,), max_tokens=8)
        with pytest.raises(InvalidRequest, match="vocabulary"):
            await answered(one, prompt="abc", answered=(999,))
        events = await answered(one, prompt="abc", answered=(97,) * 6, ignore_eos=True)
        assert (len(ids(events)), finish(events).finish_reason) == (7, "length")


async def test_one_that_goes_on_stands_in_the_queue_and_can_be_closed() -> None:
    """W18, W20: nothing is shown before its turn; closed, its slot is free."""
    async with worker(max_running=1, tokens_per_second=50, text="x" * 50) as one:
        stream = one.ask(ask(answered=(120,)))
        assert await anext(stream) == Delta("x", (120,))
        assert one.load == (1, 0)
        waiting = asyncio.ensure_future(anext(one.ask(ask(answered=(120,)))))
        await until(lambda: one.load == (1, 1))
        assert not waiting.done()
        waiting.cancel()
        await asyncio.wait({waiting})
        await stream.aclose()
        assert one.load == (0, 0)


async def test_it_goes_on_in_another_process() -> None:
    """W19: the tokens cross over."""
    async with process(text=SAID) as one:
        again = await collect(one.ask(ask(answered=IDS[:9])))
        assert (again.text, again.choices[0].token_ids) == (SAID, (*IDS, 256))
