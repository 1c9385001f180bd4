"""Images by transformers: a LLaVA of random weights."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests import models_made
from tests.engines.transformers.asking import deltas, events, finish, tokens
from tests.engines.transformers.conftest import opened
from tests.pictures_made import broken, png, question

from headrace.core.errors import ContextOverflow, InvalidRequest
from headrace.core.options import ModelOptions
from headrace.core.sampling import Sampling
from headrace.engines.base import Admitted, EngineRequest
from headrace.model_worker import AsyncModelWorker

if TYPE_CHECKING:
    from headrace.engines.transformers.engine import Engine

pytestmark = pytest.mark.engines

# (28 / 14)^2 patches and the class of the image, for one marker.
PER_IMAGE = 4 + 1
TEXT = "<|im_start|>user\nWhat is <image>?<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def folder(smollm2_path: Path) -> Path:
    return models_made.tiny_llava(smollm2_path)


@pytest.fixture(scope="module")
async def seeing(folder: Path) -> AsyncIterator[Engine]:
    engine = opened(folder, context_length=128)
    yield engine
    engine.close()


def asked(engine: Engine, *media: bytes, text: str = TEXT, max_tokens: int = 6) -> EngineRequest:
    return EngineRequest(
        token_ids=tuple(engine.tokenize(text, add_special=False)),
        max_tokens=max_tokens,
        sampling=Sampling(temperature=0, ignore_eos=True),
        text=text,
        media=media,
    )


async def test_the_answer_depends_on_the_image(seeing: Engine) -> None:
    """Issue 13.5: one marker becomes the tokens of an image, which are counted."""
    assert seeing.facts.capabilities.vision
    assert seeing.facts.image_marker == "<image>"
    assert seeing.facts.max_running == 1
    request = asked(seeing, png())
    made = await events(seeing, request)
    prompt = len(request.token_ids) - 1 + PER_IMAGE
    assert isinstance(made[0], Admitted)
    assert made[0].total == finish(made).prompt_tokens == prompt
    assert len(deltas(made)) == finish(made).completion_tokens == 6
    assert tokens(await events(seeing, request)) == tokens(made)
    other = await events(seeing, asked(seeing, png(200, 90, seed=5)))
    assert tokens(other) != tokens(made)
    text = asked(seeing, text=TEXT.replace("<image>", "it"))
    assert finish(await events(seeing, text)).prompt_tokens == len(text.token_ids)


async def test_too_many_tokens(seeing: Engine) -> None:
    request = asked(seeing, *[png()] * 30, text=TEXT.replace("<image>", "<image>" * 30))
    with pytest.raises(ContextOverflow, match="tokens with its images"):
        await events(seeing, request)
    last = await events(seeing, asked(seeing, png(), max_tokens=500))
    assert finish(last).prompt_tokens + finish(last).completion_tokens == 128


async def test_broken_images_are_errors(seeing: Engine) -> None:
    """Issue 13.5: 50 broken files, a clear error for each, and the engine goes on."""
    refused = 0
    for data in broken():
        try:
            await events(seeing, asked(seeing, data, max_tokens=1))
        except InvalidRequest as error:
            assert error.param == "messages"
            refused += 1
    assert refused >= 40
    assert finish(await events(seeing, asked(seeing, png()))).completion_tokens == 6


async def test_a_conversation(folder: Path, home: Path) -> None:
    """The template has the content in parts, and the text cannot have the marker."""
    options: ModelOptions = {"engine": "transformers", "context_length": 128}
    async with AsyncModelWorker(str(folder), isolate=False, **options) as worker:
        assert worker.metadata.capabilities.vision
        message = question("What is ", png(), "?")
        result = await worker.generate(messages=[message], max_tokens=3, temperature=0)
        assert result.usage.prompt_tokens > PER_IMAGE + 5
        with pytest.raises(InvalidRequest, match="marker of them, <image>"):
            await worker.generate(messages=[question("<image>", png())], max_tokens=3)
        off = await worker.count_tokens(messages=[message])
        assert off.estimated
