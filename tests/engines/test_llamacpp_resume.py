"""The real model, going on with an answer."""

from __future__ import annotations

from typing import Any

import pytest

from headrace.core.errors import InvalidRequest
from headrace.core.sampling import Sampling
from headrace.engines.base import Admitted, EngineRequest, RawDelta, RawFinish
from headrace.engines.llamacpp.engine import Engine

POEM = "<|im_start|>user\nWrite a short poem about rivers.<|im_end|>\n<|im_start|>assistant\n"
SIGNS = "<|im_start|>user\nRepeat: 🌍🌍 né 日本語<|im_end|>\n<|im_start|>assistant\n🌍🌍 né 日本語 "


async def say(
    llama: Engine, prompt: str, answered: tuple[int, ...] = (), most: int = 20, **sampling: Any
) -> tuple[str, tuple[int, ...], RawFinish]:
    request = EngineRequest(
        token_ids=tuple(llama.tokenize(prompt, add_special=True)),
        max_tokens=most - len(answered),
        answered=answered,
        sampling=Sampling(temperature=0, **sampling),
    )
    events = [event async for event in llama.generate(request)]
    deltas = [event for event in events if isinstance(event, RawDelta)]
    finish = events[-1]
    assert isinstance(events[0], Admitted)
    assert isinstance(finish, RawFinish)
    text = b"".join(delta.data for delta in deltas).decode()
    return text, tuple(token for delta in deltas for token in delta.token_ids), finish


async def test_it_goes_on_after_what_was_answered(llama: Engine) -> None:
    """W15, W19: only what is new is yielded and counted."""
    text, ids, _ = await say(llama, POEM)
    for cut in (1, 7, 19):
        rest, new, finish = await say(llama, POEM, ids[:cut])
        assert llama.shown(ids[:cut]) + rest == text
        assert ids[:cut] + new == ids
        assert (finish.reason, finish.completion_tokens) == ("length", 20 - cut)


async def test_every_token_of_a_character_has_its_id(llama: Engine) -> None:
    """W13, W19: or the beginning of an answer could not be given back to the model."""
    text, ids, finish = await say(llama, SIGNS, most=24)
    assert "🌍" in text
    assert len(ids) == finish.completion_tokens
    assert llama.detokenize(ids) == text == llama.shown(ids)
    cut = next(place for place in range(len(ids)) if "\ufffd" in llama.shown(ids[:place]))
    assert llama.shown(ids[:cut]).endswith("\ufffd")


async def test_control_tokens_are_not_shown(llama: Engine) -> None:
    """W12, W13: neither by a stream nor when it is taken up again; their text in plain is."""
    text, ids, _ = await say(llama, POEM, most=4, logit_bias={1: 60.0})
    assert (text, ids) == ("", (1, 1, 1, 1))
    assert llama.shown(ids) == ""
    plain = tuple(llama._split("see <|im_start|>"))
    assert 1 not in plain
    assert llama.shown((*plain, 1, *plain)) == "see <|im_start|>" * 2
    assert llama.detokenize((1, *plain[:1])) == "<|im_start|>see"


async def test_a_penalty_counts_the_tokens_of_both_parts(llama: Engine) -> None:
    """W11: a repetition that was answered before is a repetition."""
    given: dict[str, Any] = {"frequency_penalty": 1.5, "most": 16, "ignore_eos": True}
    text, ids, _ = await say(llama, "one two one two one two", **given)
    rest, *_ = await say(llama, "one two one two one two", ids[:8], **given)
    assert llama.shown(ids[:8]) + rest == text


async def test_an_unknown_id_is_refused(llama: Engine) -> None:
    """W11: before the library cuts it to 32 bits."""
    with pytest.raises(InvalidRequest, match="vocabulary"):
        await say(llama, POEM, (1 << 32,))
