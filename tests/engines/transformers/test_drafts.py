"""Issue 17.3: n-grams in continuous batching; a model of random weights, made to repeat itself."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from tests.engines.transformers.conftest import opened

from headrace.core.sampling import Sampling
from headrace.engines.base import EngineRequest, RawDelta, RawDraft, RawFinish

if TYPE_CHECKING:
    from headrace.engines.transformers.engine import Engine

pytestmark = pytest.mark.engines

PROMPT = tuple(range(40, 60)) * 2
# An answer has these tokens alone, so that most of its n-grams come again.
BIAS: dict[int, float] = dict.fromkeys((41, 42, 43), 100.0)


class Answered(NamedTuple):
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    drafted: int
    accepted: int
    finish: RawFinish


async def answer(engine: Engine, prompt: Sequence[int] = PROMPT, **given: Any) -> Answered:
    sampling: dict[str, Any] = {"temperature": 0, "ignore_eos": True, "logit_bias": BIAS}
    tokens = given.pop("max_tokens", 48)
    request = EngineRequest(
        token_ids=tuple(prompt), max_tokens=tokens, sampling=Sampling(**sampling | given)
    )
    events = [event async for event in engine.generate(request)]
    deltas = [event for event in events if isinstance(event, RawDelta)]
    drafts = [event for event in events if isinstance(event, RawDraft)]
    finish = events[-1]
    assert isinstance(finish, RawFinish)
    return Answered(
        tuple(token for delta in deltas for token in delta.token_ids),
        tuple(round(entry.logprob, 2) for delta in deltas for entry in delta.logprobs),
        sum(draft.drafted for draft in drafts),
        sum(draft.accepted for draft in drafts),
        finish,
    )


@pytest.fixture(scope="module")
async def plain(tiny_folder: Path) -> AsyncIterator[Engine]:
    engine = opened(tiny_folder, slots=4, threads=1)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
async def drafting(tiny_folder: Path) -> AsyncIterator[Engine]:
    engine = opened(tiny_folder, slots=4, threads=1, speculation="ngram")
    # Whether drafts pay depends on the machine.
    gain: Any = engine._drafting and engine._drafting._gain
    gain._judge = lambda *_: None
    yield engine
    engine.close()


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"temperature": 1.0, "seed": 7},
        {"temperature": 1.0, "seed": 8, "top_p": 0.9},
        {"repetition_penalty": 1.3, "frequency_penalty": 0.2},
        {"logprobs": 2},
        {"max_tokens": 1},
        {"max_tokens": 7},
        {"stop_token_ids": (42,), "temperature": 1.0, "seed": 3},
        {"min_tokens": 20, "stop_token_ids": (42,), "temperature": 1.0, "seed": 3},
    ],
)
async def test_the_answer_is_that_without(
    plain: Engine, drafting: Engine, given: dict[str, Any]
) -> None:
    """Greedy and seeded: a draft is accepted where the model itself chooses the same."""
    expected, got = await answer(plain, **given), await answer(drafting, **given)
    assert got.tokens == expected.tokens
    assert got.logprobs == pytest.approx(expected.logprobs, abs=0.02)
    assert got.finish.reason == expected.finish.reason
    assert got.finish.completion_tokens == expected.finish.completion_tokens
    assert got.accepted <= got.drafted
    assert expected.drafted == 0


async def test_drafts_are_accepted(drafting: Engine) -> None:
    got = await answer(drafting, logit_bias={41: 100.0})
    assert got.tokens == (41,) * 48
    assert 0 < got.accepted <= got.drafted
    assert drafting.facts.capabilities.speculation == "ngram"
    assert drafting.drafting is True


async def test_several_at_once_and_the_cache_behind_them(plain: Engine, drafting: Engine) -> None:
    """Blocks of the cache are shared by their tokens: wrong tokens of drafts are never in them."""
    prompts = [(PROMPT * 7)[begin:] for begin in range(4)]
    expected = [await answer(plain, prompt) for prompt in prompts]
    got = await asyncio.gather(*(answer(drafting, prompt) for prompt in prompts))
    assert [each.tokens for each in got] == [each.tokens for each in expected]
    whole = (*prompts[0], *expected[0].tokens)
    again = await answer(drafting, whole)
    assert again.finish.cached_tokens >= 256
    assert again.tokens == (await answer(plain, whole)).tokens


async def test_a_left_answer_frees_its_place(drafting: Engine) -> None:
    request = EngineRequest(
        token_ids=PROMPT, max_tokens=400, sampling=Sampling(ignore_eos=True, logit_bias=BIAS)
    )
    for _ in range(6):
        async with aclosing(drafting.generate(request)) as events:
            async for event in events:
                if isinstance(event, RawDelta):
                    break
    assert len((await answer(drafting)).tokens) == 48


async def test_drafts_that_lose_switch_themselves_off(tiny_folder: Path) -> None:
    """Issue 17.3: off by itself where it loses; the engine, and so `ps`, reports it."""
    engine = opened(tiny_folder, slots=4, threads=1, speculation="ngram")
    try:
        expected = (await answer(engine)).tokens
        gain: Any = engine._drafting and engine._drafting._gain
        note = gain.note
        # As if a step took the time of its tokens one by one: a draft that is wrong loses.
        gain.note = lambda requests, tokens, drafted, _: note(
            requests, tokens, drafted, float(requests + drafted)
        )
        gain._plain.clear()
        seeds = iter(range(10))
        while engine.drafting:
            got = await answer(engine, temperature=1.0, seed=next(seeds))
            assert got.drafted > got.accepted
        got = await answer(engine)
        assert (got.drafted, got.tokens) == (0, expected)
    finally:
        engine.close()
