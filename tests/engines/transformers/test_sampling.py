"""Every parameter of sampling, on a small random model and on logits alone."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
from tests.engines.transformers.asking import answered, asked, deltas, events, finish, tokens

from headrace.core.errors import InvalidRequest

if TYPE_CHECKING:
    from headrace.engines.transformers.engine import Engine

pytestmark = pytest.mark.engines

Q = "Why?"


async def test_end_tokens_and_the_limit(tiny: Engine) -> None:
    """W11, W14: stop_token_ids, ignore_eos, max_tokens and their reasons."""
    free = await events(tiny, asked(tiny, Q, 24))
    assert finish(free).reason == "length"
    assert len(tokens(free)) == finish(free).completion_tokens == 24
    last = tokens(free)[-1]
    place = tokens(free).index(last)
    cut = await events(tiny, asked(tiny, Q, 24, stop_token_ids=(last,)))
    assert tokens(cut) == tokens(free)[:place]
    assert (finish(cut).reason, finish(cut).completion_tokens) == ("stop", place)
    # The model's own end token, forced: it counts, and has no text.
    ended = await events(tiny, asked(tiny, Q, 4, logit_bias={2: 100.0}, logprobs=0))
    assert (finish(ended).reason, finish(ended).completion_tokens) == ("stop", 1)
    (end,) = deltas(ended)
    assert (end.data, end.token_ids, end.logprobs[0].token_id) == (b"", (2,), 2)
    # Asked for besides, it is no part of the answer.
    both = await events(tiny, asked(tiny, Q, 4, logit_bias={2: 100.0}, stop_token_ids=(2,)))
    assert (finish(both).reason, finish(both).completion_tokens, deltas(both)) == ("stop", 0, [])
    ignored = await events(tiny, asked(tiny, Q, 4, logit_bias={2: 100.0}, ignore_eos=True))
    assert (finish(ignored).reason, tokens(ignored)) == ("length", (2, 2, 2, 2))
    assert b"".join(delta.data for delta in deltas(ignored)) == b""


async def test_min_tokens(tiny: Engine) -> None:
    """W11: min_tokens holds end tokens and stop_token_ids back, and nothing else."""
    bias = {2: 100.0}
    assert await answered(tiny, Q, 12, logit_bias=bias) == (2,)
    ended = await events(tiny, asked(tiny, Q, 12, logit_bias=bias, min_tokens=5))
    assert (finish(ended).reason, finish(ended).completion_tokens) == ("stop", 6)
    assert tokens(ended)[5] == 2 not in tokens(ended)[:5]
    stopped = await events(
        tiny, asked(tiny, Q, 12, logit_bias=bias, min_tokens=5, stop_token_ids=(2,))
    )
    assert (finish(stopped).reason, tokens(stopped)) == ("stop", tokens(ended)[:5])
    free = await answered(tiny, Q, 12, ignore_eos=True)
    assert await answered(tiny, Q, 12, ignore_eos=True, min_tokens=12) == free


async def test_what_leaves_one_token_is_greedy(tiny: Engine) -> None:
    """W11: top_k, top_p and min_p."""
    greedy = await answered(tiny, Q)
    only: tuple[dict[str, Any], ...] = ({"top_k": 1}, {"top_p": 0.0}, {"min_p": 1.0})
    for sampling in only:
        assert await answered(tiny, Q, temperature=1, **sampling) == greedy
    assert await answered(tiny, Q, temperature=1) != greedy


async def test_seeds(tiny: Engine) -> None:
    """W11: seed."""
    made = [await answered(tiny, Q, temperature=1, seed=seed) for seed in (1, 1, 2, -3, 2**64 - 1)]
    assert made[0] == made[1]
    assert len(set(made)) == 4


async def test_penalties_and_bias(tiny: Engine) -> None:
    """W11: repetition, presence and frequency penalty, logit_bias."""
    greedy = await answered(tiny, Q, 32, ignore_eos=True)
    # Below what is neutral they ask for more of the same.
    again: tuple[dict[str, Any], ...] = (
        {"repetition_penalty": 0.1},
        {"presence_penalty": -2.0},
        {"frequency_penalty": -2.0},
    )
    for sampling in again:
        made = await answered(tiny, Q, 32, ignore_eos=True, **sampling)
        assert len(set(made)) < len(set(greedy)), sampling
    banned = await answered(tiny, Q, logit_bias={greedy[0]: -100.0})
    assert greedy[0] not in banned


async def test_logprobs_are_those_of_the_model(tiny: Engine) -> None:
    """W11: logprobs, of the chosen token and of the likeliest, before any rule."""
    seen = deltas(await events(tiny, asked(tiny, Q, 3, logprobs=3)))
    for delta in seen:
        (one,) = delta.logprobs
        assert (one.token_id,) == delta.token_ids
        assert one.data == delta.data
        assert [top.logprob for top in one.top] == sorted(
            (top.logprob for top in one.top), reverse=True
        )
        assert (one.top[0].token_id, one.top[0].logprob) == (one.token_id, one.logprob)
        assert len(one.top) == 3
    biased = deltas(await events(tiny, asked(tiny, Q, 1, logprobs=0, logit_bias={77: 100.0})))
    assert biased[0].token_ids == (77,)
    assert biased[0].logprobs[0].logprob < -1
    assert biased[0].logprobs[0].top == ()


async def test_ids_that_are_none_are_refused(tiny: Engine) -> None:
    """W11: a 400 that names the field."""
    with pytest.raises(InvalidRequest) as caught:
        await answered(tiny, Q, logit_bias={49152: 1.0})
    assert caught.value.param == "logit_bias"
    with pytest.raises(InvalidRequest):
        tiny.detokenize((49152,))


def test_rules_rule_out_what_those_of_the_library_do() -> None:
    """W11: top_k, top_p and min_p, alone and together, over few and over many candidates."""
    import torch
    from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    from headrace.engines.transformers.answer import _floor

    torch.manual_seed(3)
    for top_k, top_p, min_p in [
        (0, 0.9, 0.0), (5, 1.0, 0.0), (2000, 0.9, 0.0), (2000, 1.0, 0.0), (0, 1.0, 0.02),
        (0, 0.999, 0.0001), (40, 0.5, 0.1), (0, 1.0, 0.0), (1, 0.1, 0.5),
    ]:  # fmt: skip
        for spread in (0.1, 3.0):
            logits = torch.randn(2, 5000) * spread
            warped = logits
            if top_k:
                warped = TopKLogitsWarper(top_k)(None, warped)
            if top_p < 1:
                warped = TopPLogitsWarper(top_p)(None, warped)
            if min_p:
                warped = MinPLogitsWarper(min_p)(None, warped)
            probs = logits.softmax(-1)
            column = [torch.tensor([[value]]) for value in (float(top_k or 5000), top_p, min_p)]
            kept = probs >= _floor(probs, *column)
            # The last of a sum of thousands may be rounded to either side.
            assert int((kept != (warped > -torch.inf)).sum()) <= 2, (top_k, top_p, min_p, spread)


def test_penalties_are_those_that_are_published() -> None:
    """W11: over the whole text; the repetition penalty first, as it looks at the sign."""
    import torch

    from headrace.engines.transformers.answer import Draw, Rules

    row, text = torch.tensor([1.0, -1.0, 2.0, 0.0]), (0, 0, 1)
    repeated = Draw(Rules(repetition_penalty=2.0), text).shape(row)
    assert repeated.tolist() == [0.5, -2.0, 2.0, 0.0]
    draw = Draw(Rules(presence_penalty=1.0, frequency_penalty=0.5), text, bias={3: 4.0})
    assert draw.shape(row).tolist() == [-1.0, -2.5, 2.0, 4.0]
    draw.take(3)
    assert draw.shape(row).tolist() == [-1.0, -2.5, 2.0, 2.5]


def test_draws_are_as_likely_as_they_should_be() -> None:
    """W11: temperature."""
    import torch

    from headrace.engines.transformers.answer import Draw, Rules, settle

    torch.manual_seed(5)
    weights = torch.tensor([0.5, 0.3, 0.15, 0.05])
    rules = Rules(temperature=0.5)
    draws = [Draw(rules, (), seed=None if row % 2 else row) for row in range(4000)]
    chosen = settle(weights.log().repeat(4000, 1), draws).argmax(-1).tolist()
    expected = weights**2 / (weights**2).sum()
    for token, count in Counter(chosen).items():
        assert abs(count / 4000 - float(expected[token])) < 0.03
