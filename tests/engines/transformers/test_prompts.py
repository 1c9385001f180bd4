"""Issue 13: log probabilities of a prompt's tokens, and markers that stay text."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tests.api.fakes import client
from tests.engines.transformers.asking import asked, events, tokens
from tests.evaluating import loglikelihoods

from headrace.core.events import PromptToken
from headrace.core.model import ModelSpec
from headrace.models.inspect import inspect
from headrace.worker.spec import WorkerSpec
from headrace.worker.worker import Worker

if TYPE_CHECKING:
    from headrace.engines.transformers.engine import Engine

pytestmark = pytest.mark.engines


async def scored(engine: Engine, token_ids: Sequence[int], candidates: int) -> list[PromptToken]:
    parts = engine.prompt_tokens(token_ids, candidates)
    return [token async for part in parts for token in part]


def whole(engine: Engine, token_ids: Sequence[int]) -> Any:
    """The log probabilities of all tokens after each, in one pass without a cache."""
    import torch

    with torch.inference_mode():
        logits = engine._model(torch.tensor([list(token_ids)]), use_cache=False).logits[0]
    return logits.float().log_softmax(-1)


async def test_they_are_those_of_one_pass(tiny: Engine) -> None:
    """Issue 13: also across the parts of a long prompt, in batches and alone."""
    ids = tuple(tiny.tokenize("A river né 🌍 <|im_start|> " * 40, add_special=False))
    assert len(ids) > 300
    expected = await asyncio.to_thread(whole, tiny, ids)
    first, *rest = await scored(tiny, ids, 3)
    assert first == PromptToken(ids[0], tiny.detokenize(ids[:1]).encode())
    assert tuple(token.token_id for token in rest) == ids[1:]
    for place, token in enumerate(rest):
        row = expected[place]
        assert token.logprob == pytest.approx(float(row[token.token_id]), abs=1e-3)
        assert [top.token_id for top in token.top] == row.topk(3).indices.tolist()
        better = [top for top in token.top if top.logprob > (token.logprob or 0)]
        assert token.rank > len(better)
    assert b"".join(token.data for token in (first, *rest)).decode() == tiny.detokenize(ids)


async def test_beside_answers_and_cancelled(tiny: Engine) -> None:
    """Issue 13: what is scored changes no answer, and stops with its reader."""
    request = asked(tiny, "Hello", 8)
    alone = tokens(await events(tiny, request))
    ids = request.token_ids * 30
    both = await asyncio.gather(scored(tiny, ids, 0), events(tiny, request), scored(tiny, ids, 0))
    assert tokens(both[1]) == alone
    assert both[0] == both[2]
    stream = tiny.prompt_tokens(ids, 0)
    assert len(await anext(stream)) < len(ids)
    await stream.aclose()
    assert len(await scored(tiny, ids[:5], 0)) == 5
    assert tokens(await events(tiny, request)) == alone


async def test_no_two_passes_at_a_time(tiny: Engine) -> None:
    """Issue 13: a pass of the manager changes the configuration that a mask is made by."""
    running, most = list[int](), list[int]()

    def begun(*_: Any) -> None:
        running.append(1)
        most.append(len(running))

    def ended(*_: Any) -> None:
        running.pop()

    layers = tiny._model.model.layers
    hooks = (layers[0].register_forward_pre_hook(begun), layers[-1].register_forward_hook(ended))
    request = asked(tiny, "Hello", 32)
    ids = request.token_ids * 30
    try:
        for _ in range(5):
            await asyncio.gather(events(tiny, request), *(scored(tiny, ids, 0) for _ in range(4)))
    finally:
        for hook in hooks:
            hook.remove()
    assert {*most} == {1}
    assert getattr(tiny._model.config, "is_causal", True)


async def test_markers_stay_text(tiny: Engine) -> None:
    """Issue 13: of a side of a gap no control token is made."""
    text = "a<|im_end|>b<repo_name>"
    assert 2 in tiny.tokenize(text, add_special=False)
    ids = [token for piece in tiny.plain_pieces(text, ["b"]) for token in piece]
    assert tiny.detokenize(ids) == text
    assert all(token > 16 for token in ids)


async def test_what_an_evaluation_sends(smollm2_folder: Path) -> None:
    """Issue 13: lm-eval's local-completions; the real model likes Paris better than a river."""
    file = inspect(smollm2_folder)
    spec = ModelSpec(name="m", model=str(smollm2_folder), context_length=256)
    worker: Any = Worker(spec, lambda *_: WorkerSpec(model=spec, file=file, engine="transformers"))
    await worker.start()
    async with client(worker) as http:

        async def ids(text: str) -> list[int]:
            answer = await http.post("/tokenize", json={"content": text})
            return answer.json()["tokens"]

        context = await ids("The capital of France is")
        pairs = [(context, await ids(word)) for word in (" Paris", " Lyon", " a river")]
        paris, lyon, river = await loglikelihoods(http, "m", pairs)
        assert paris[0] > max(lyon[0], river[0])
        assert (paris[1], river[1]) == (True, False)
    await worker.aclose()
