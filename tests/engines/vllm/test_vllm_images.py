"""Images by vLLM: a LLaVA of random weights, on a CPU or a GPU."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest
from tests import models_made
from tests.pictures_made import broken, png, question

from headrace.core.errors import InvalidRequest
from headrace.core.sampling import Sampling
from headrace.engines.base import EngineRequest, OpenRequest, RawDelta, RawEvent, RawFinish
from headrace.engines.vllm.engine import Engine
from headrace.model_worker import AsyncModelWorker
from headrace.models.inspect import inspect

pytestmark = [
    pytest.mark.engines,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    # vLLM and what it imports warn of one another.
    pytest.mark.filterwarnings("default"),
]

OPTIONS = {"eager": True, "kv_cache_bytes": 64 << 20, "dtype": "float32"}
TEXT = "<|im_start|>user\nWhat is <image>?<|im_end|>\n<|im_start|>assistant\n"
PER_IMAGE = 4 + 1


@pytest.fixture(scope="module")
def folder(smollm2_path: Path) -> Path:
    return models_made.tiny_llava(smollm2_path)


@pytest.fixture(scope="module")
async def engine(folder: Path) -> AsyncIterator[Engine]:
    request = OpenRequest(model=inspect(folder), context_length=256, max_running=4, options=OPTIONS)
    engine = await asyncio.to_thread(Engine, request)
    yield engine
    await asyncio.to_thread(engine.close)


async def ask(engine: Engine, *media: bytes, text: str = TEXT) -> Sequence[RawEvent]:
    request = EngineRequest(
        token_ids=tuple(engine.tokenize(text, add_special=False)),
        max_tokens=6,
        sampling=Sampling(temperature=0, ignore_eos=True),
        text=text,
        media=media,
    )
    return [event async for event in engine.generate(request)]


def tokens(events: Sequence[RawEvent]) -> list[int]:
    deltas = [event for event in events if isinstance(event, RawDelta)]
    return [token for delta in deltas for token in delta.token_ids]


async def test_the_answer_depends_on_the_image(engine: Engine) -> None:
    """Issue 13.5: one marker becomes the tokens of an image, which are counted."""
    assert engine.facts.capabilities.vision
    assert engine.facts.image_marker == "<image>"
    first, again = await ask(engine, png()), await ask(engine, png())
    other = await ask(engine, png(200, 90, seed=5))
    finish = first[-1]
    assert isinstance(finish, RawFinish)
    assert finish.prompt_tokens == len(engine.tokenize(TEXT, add_special=False)) - 1 + PER_IMAGE
    assert tokens(first) == tokens(again)
    assert tokens(first) != tokens(other)
    assert len(tokens(await ask(engine, text=TEXT.replace("<image>", "it")))) == 6


async def test_several_at_once_and_broken_ones(engine: Engine) -> None:
    """Issue 13.5: 50 broken files, a clear error for each, and the engine goes on."""
    alone = tokens(await ask(engine, png()))
    answers = await asyncio.gather(*(ask(engine, png()) for _ in range(4)))
    assert [len(tokens(answer)) for answer in answers] == [len(alone)] * 4
    refused = 0
    for data in broken():
        try:
            await ask(engine, data)
        except InvalidRequest:
            refused += 1
    assert refused >= 40
    assert tokens(await ask(engine, png())) == alone


async def test_a_cancelled_request_leaves(engine: Engine) -> None:
    for _ in range(8):
        stream = engine.generate(
            EngineRequest(
                token_ids=tuple(engine.tokenize(TEXT, add_special=False)),
                max_tokens=200,
                sampling=Sampling(ignore_eos=True),
                text=TEXT,
                media=(png(),),
            )
        )
        await anext(stream)
        await stream.aclose()
    assert len(tokens(await ask(engine, png()))) == 6


async def test_a_conversation(folder: Path, home: Path) -> None:
    """From the message to the answer, in a process of its own."""
    async with AsyncModelWorker(
        str(folder), engine="vllm", context_length=256, options=OPTIONS
    ) as worker:
        message = question("What is ", png(), " and ", png(9, 9), "?")
        result = await worker.generate(messages=[message], max_tokens=3, temperature=0)
        text = await worker.generate(messages=[question("What is  and ?")], max_tokens=3)
        assert result.usage.prompt_tokens >= text.usage.prompt_tokens + 2 * PER_IMAGE - 2
