"""The real model on a CPU, against the library's own `generate`."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING

import jsonschema_rs
import msgspec
import pytest
from tests.engines.schemas import SPECIAL
from tests.engines.transformers.asking import answered, asked, deltas, events, finish, tokens

from headrace.core.constraint import Constraint
from headrace.engines.base import Admitted

if TYPE_CHECKING:
    from headrace.engines.transformers.engine import Engine

pytestmark = pytest.mark.engines

QUESTIONS = ("What is the capital of France?", "Tell me of a river, né 🌍.")


def by_generate(engine: Engine, prompt: tuple[int, ...], max_tokens: int) -> tuple[int, ...]:
    import torch

    token_ids = torch.tensor([prompt])
    out = engine._model.generate(
        token_ids,
        attention_mask=torch.ones_like(token_ids),
        max_new_tokens=max_tokens,
        do_sample=False,
        eos_token_id=2,
        pad_token_id=2,
    )
    return tuple(out[0, len(prompt) :].tolist())


async def test_greedy_text_is_that_of_generate_alone_and_in_company(smol: Engine) -> None:
    """W11: temperature 0, token for token; what runs beside it does not matter."""
    requests = [asked(smol, question, 12) for question in QUESTIONS]
    expected = [await asyncio.to_thread(by_generate, smol, one.token_ids, 12) for one in requests]
    assert smol.facts.max_running == 16
    alone = [tokens(await events(smol, one)) for one in requests]
    assert alone == expected
    among = await asyncio.gather(*(events(smol, one) for one in requests * 2))
    assert [tokens(one) for one in among] == expected * 2


async def test_usage_and_bytes_are_exact(smol: Engine) -> None:
    """W13, W15: the bytes of the tokens are the text; an end token counts, without text."""
    request = asked(smol, QUESTIONS[0], 32)
    seen = await events(smol, request)
    assert seen[0] == Admitted(done=0, total=len(request.token_ids))
    account = finish(seen)
    assert account.reason == "stop"
    assert account.prompt_tokens == len(request.token_ids)
    assert account.completion_tokens == len(tokens(seen))
    assert (tokens(seen)[-1], deltas(seen)[-1].data) == (2, b"")
    text = b"".join(delta.data for delta in deltas(seen)).decode()
    assert text == smol.detokenize(tokens(seen)[:-1]) == smol.shown(tokens(seen))
    assert "Paris" in text


async def test_half_characters_are_bytes_and_never_marks_of_damage(smol: Engine) -> None:
    """W13: a token that ends inside a character."""
    token_ids = smol.tokenize("🌍é", add_special=False)
    pieces = [smol._vocabulary.data(token) for token in token_ids]
    assert b"".join(pieces).decode() == "🌍é"
    with pytest.raises(UnicodeDecodeError):
        pieces[0].decode()


async def test_each_token_of_a_character_has_its_entry(smol: Engine) -> None:
    """Issue 12.9: with its own bytes, also where the answer is cut within a character."""
    half = smol.tokenize("🌍", add_special=False)[0]
    request = asked(smol, QUESTIONS[1], 3, logprobs=1, logit_bias={half: 100.0})
    seen = await events(smol, request)
    entries = [entry for delta in deltas(seen) for entry in delta.logprobs]
    assert [(entry.token_id, entry.data) for entry in entries] == [
        (half, smol._vocabulary.data(half))
    ] * 3
    assert finish(seen).completion_tokens == 3


async def test_it_goes_on_after_tokens_that_were_answered(smol: Engine) -> None:
    """W19: from any token of a greedy answer on comes the rest of it."""
    request = asked(smol, QUESTIONS[1], 12)
    whole = tokens(await events(smol, request))
    for cut in (1, 7):
        rest = msgspec.structs.replace(request, answered=whole[:cut], max_tokens=12 - cut)
        assert tokens(await events(smol, rest)) == whole[cut:]


async def test_a_schema_is_kept_to(smol: Engine) -> None:
    """W11: json_schema."""
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 12}, "big": {"type": "boolean"}},
        "required": ["city", "big"],
        "additionalProperties": False,
    }
    request = msgspec.structs.replace(
        asked(smol, QUESTIONS[0], 40), constraint=Constraint(json_schema=schema)
    )
    seen = await events(smol, request)
    made = json.loads(b"".join(delta.data for delta in deltas(seen)))
    assert made.keys() == {"city", "big"}
    assert finish(seen).reason == "stop"


async def test_names_of_special_tokens_are_text(smol: Engine) -> None:
    """Issue 11.4: text that had to follow was taken for the token."""
    for schema in SPECIAL:
        request = asked(smol, "<|im_start|>", 60)
        request = msgspec.structs.replace(request, constraint=Constraint(json_schema=schema))
        text = b"".join(delta.data for delta in deltas(await events(smol, request)))
        assert jsonschema_rs.validator_for(schema).is_valid(json.loads(text))


async def test_a_long_beginning_is_shared(smol: Engine) -> None:
    """W15: cached tokens are told."""
    question = "Again and again the water comes down the hill. " * 28
    first = await events(smol, asked(smol, question, 2))
    second = await events(smol, asked(smol, question, 2))
    assert finish(first).cached_tokens == 0
    assert finish(second).cached_tokens == 256
    assert tokens(second) == tokens(first)


async def test_seeds_repeat_alone_and_in_company(smol: Engine) -> None:
    """W11: seed."""
    first = await answered(smol, QUESTIONS[1], 8, temperature=1, seed=7)
    assert await answered(smol, QUESTIONS[1], 8, temperature=1, seed=7) == first
    others = [answered(smol, QUESTIONS[1], 8, temperature=1, seed=seed) for seed in range(7, 11)]
    made = await asyncio.gather(*others)
    assert made[0] == first
    assert len(set(made)) == 4
