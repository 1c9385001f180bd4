"""Images by llama.cpp, with a projector of random weights; and by the echo engine."""

from __future__ import annotations

import io
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from PIL import Image
from tests.pictures_made import broken, jpeg, png, projector, question
from tests.tiny_gguf import WIDTH, tiny_gguf

from headrace import engines
from headrace.core.errors import (
    ContextOverflow,
    InvalidRequest,
    LoadFailed,
    Unsupported,
)
from headrace.core.events import Delta, Finish, Progress
from headrace.engines.base import OpenRequest
from headrace.model_worker import AsyncModelWorker
from headrace.models.inspect import inspect

GREEDY: dict[str, Any] = {"temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def folder(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of one layer with a projector beside it."""
    folder = tmp_path_factory.mktemp("seeing")
    tiny_gguf(folder / "tiny.gguf", smollm2_path)
    projector(folder / "mmproj-tiny-f16.gguf", width=WIDTH)
    return folder


@pytest.fixture(scope="module")
async def worker(folder: Path) -> AsyncIterator[AsyncModelWorker]:
    model = AsyncModelWorker(str(folder), engine="llamacpp", context_length=512, max_running=2)
    async with model:
        yield model


async def test_images_are_seen_counted_and_cached(worker: AsyncModelWorker) -> None:
    """Issue 13.5: the projector beside the model is taken, the engine's count is the usage."""
    assert worker.metadata.capabilities.vision

    async def ask(*parts: Any) -> Any:
        return await worker.generate(messages=[question(*parts)], max_tokens=6, **GREEDY)

    none, first = await ask("What is it?"), await ask("What is ", png(), "it?")
    again, other = await ask("What is ", png(), "it?"), await ask("What is ", jpeg(), "it?")
    three = await ask("What is ", png(), png(2, 3), png(), "it?")
    per_image = first.usage.prompt_tokens - none.usage.prompt_tokens
    assert 4 <= per_image <= 24
    assert abs(three.usage.prompt_tokens - none.usage.prompt_tokens - 3 * per_image) <= 3
    assert again.text == first.text
    assert again.usage.prompt_tokens == other.usage.prompt_tokens == first.usage.prompt_tokens
    assert again.usage.cached_tokens == first.usage.prompt_tokens - 1
    assert other.usage.cached_tokens < first.usage.prompt_tokens - per_image


async def test_the_same_answers_as_without_a_projector(
    worker: AsyncModelWorker, folder: Path
) -> None:
    """With a projector all requests take another way through the library."""
    request: Any = {"max_tokens": 24, "logprobs": 3, "seed": 1, **GREEDY}
    spec = replace(worker.spec, options={"mmproj": "off", "batch_size": 512})
    async with AsyncModelWorker(spec) as plain:
        assert not plain.metadata.capabilities.vision
        with pytest.raises(Unsupported, match="takes no images") as caught:
            await plain.generate(messages=[question("a", png())])
        assert caught.value.param == "messages[0].content[1]"
        expected = await plain.generate("One 世界 two", **request)
    result = await worker.generate("One 世界 two", **request)
    assert result.choices == expected.choices
    assert result.usage == expected.usage


async def test_bounds_of_the_context(worker: AsyncModelWorker) -> None:
    message = question(png(), png(), "a")
    wrong: list[Any] = [{"max_tokens": 505}, {"context_length": 20}]
    for options in wrong:
        with pytest.raises(ContextOverflow):
            await worker.generate(messages=[message], **GREEDY, **options)
    prompt = (await worker.generate(messages=[message], max_tokens=1)).usage.prompt_tokens
    result = await worker.generate(messages=[message], context_length=prompt + 5, **GREEDY)
    assert (result.usage.prompt_tokens, result.usage.completion_tokens) == (prompt, 5)
    assert result.choices[0].finish_reason == "length"
    with pytest.raises(Unsupported, match="Log-probabilities"):
        await worker.generate(messages=[message], logprobs=1)


async def test_a_schema_and_several_choices(worker: AsyncModelWorker) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}
    result = await worker.generate(
        messages=[question("a", png())], json_schema=schema, n=2, max_tokens=60, temperature=0
    )
    assert {choice.text.replace(" ", "")[:5] for choice in result.choices} == {'{"a":'}


async def test_other_formats(worker: AsyncModelWorker) -> None:
    for kind in ("WEBP", "GIF", "JPEG"):
        out = io.BytesIO()
        Image.new("RGB", (90, 60), (9, 99, 200)).save(out, kind)
        message = question("a", out.getvalue())
        assert (await worker.generate(messages=[message], max_tokens=1)).usage.prompt_tokens > 8


async def test_a_closed_stream_frees_the_slot(worker: AsyncModelWorker) -> None:
    """Issue 13.5: cancelled in the prefill of images, and in the answer; all slots twice."""
    many = question(*[png(300, 200, seed=seed) for seed in range(4)], "a")
    for kind in (Progress, Delta, Progress):
        stream = worker.generate_stream(messages=[many], **GREEDY)
        async for event in stream:
            if isinstance(event, kind):
                break
        await stream.aclose()
    result = await worker.generate(messages=[question("a", png())], max_tokens=2, **GREEDY)
    assert result.usage.completion_tokens == 2


async def test_broken_images_are_errors(worker: AsyncModelWorker) -> None:
    """Issue 13.5: 50 broken files, a clear error for each, and the process lives."""
    refused = 0
    for data in broken():
        try:
            await worker.generate(messages=[question("a", data)], max_tokens=1)
        except InvalidRequest as error:
            assert "image" in error.message.lower() or "JPEG" in error.message
            assert (error.param or "").startswith("messages")
            refused += 1
    # Its decoder shows what there is of a file that was cut.
    assert refused >= 20
    result = await worker.generate(messages=[question("a", png())], max_tokens=2, **GREEDY)
    assert result.metrics.continuations == 0
    assert worker.state == "ready"


def test_the_projector_counts_in_the_estimate(folder: Path) -> None:
    request = OpenRequest(model=inspect(folder), context_length=512, device="cpu")
    seen = engines.footprint("llamacpp", request)
    off = engines.footprint("llamacpp", replace(request, options={"mmproj": "off"}))
    size = (folder / "mmproj-tiny-f16.gguf").stat().st_size
    assert seen.parts["weights"] - off.parts["weights"] == size
    assert seen.devices["cpu"] > off.devices["cpu"] + size


def test_which_projector_belongs_to_a_model(folder: Path, tmp_path: Path) -> None:
    model = tmp_path / "a-Q8_0.gguf"
    model.write_bytes((folder / "tiny.gguf").read_bytes())
    assert inspect(model).projector is None
    projector(tmp_path / "mmproj-other.gguf", width=2 * WIDTH)
    assert inspect(model).projector is None
    mine = projector(tmp_path / "a-mmproj-f16.gguf", width=WIDTH)
    (tmp_path / "mmproj-other.gguf").unlink()
    assert inspect(model).projector == str(mine)
    (tmp_path / "a-Q4_K_M.gguf").write_bytes(b"")
    assert inspect(model).projector == str(mine)
    (tmp_path / "b-Q8_0.gguf").write_bytes(b"")
    (tmp_path / "mmproj.gguf").write_bytes(mine.read_bytes())
    assert inspect(model).projector == str(mine)
    mine.unlink()
    assert inspect(model).projector is None


@pytest.mark.parametrize("content", [b"", b"GGUF", b"text"])
def test_a_projector_that_is_none(folder: Path, tmp_path: Path, content: bytes) -> None:
    wrong = tmp_path / "mmproj.gguf"
    wrong.write_bytes(content)
    request = OpenRequest(model=inspect(folder), device="cpu", options={"mmproj": str(wrong)})
    with pytest.raises(LoadFailed, match=r"mmproj\.gguf"):
        engines.footprint("llamacpp", request)
    request = replace(request, options={"mmproj": str(folder / "tiny.gguf")})
    with pytest.raises(LoadFailed, match="not a projector"):
        engines.footprint("llamacpp", request)


async def test_an_answer_with_an_image_is_repeated(tmp_path: Path, home: Path) -> None:
    """After a crash a greedy answer is computed again: it is not continued after its tokens."""
    trigger = tmp_path / "trigger"
    options: Any = {"images": True, "tokens_per_second": 500, "trigger": str(trigger)}
    echo = AsyncModelWorker("echo", fault="crash", **options)
    async with echo:
        plain = await echo.generate(messages=[question("see ", png())])
        assert plain.text.startswith("see [png 64x48 ")
        assert plain.usage.prompt_tokens == len("see <image>") + 100
        deltas, finish = await crashed(echo, trigger, temperature=0)
        assert "".join(deltas) == plain.text
        assert finish.metrics.continued == "exact"


async def crashed(
    worker: AsyncModelWorker, trigger: Path, **options: Any
) -> tuple[list[str], Finish]:
    """Return the deltas of an answer whose process crashes after the first one."""
    deltas: list[str] = []
    stream = worker.generate_stream(messages=[question("see ", png())], **options)
    async for event in stream:
        if isinstance(event, Delta):
            if not deltas:
                trigger.write_text("")
            deltas.append(event.text)
        elif isinstance(event, Finish):
            return deltas, event
    raise AssertionError
