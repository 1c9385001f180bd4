"""Audio by llama.cpp, with a projector of random weights; and by the echo engine."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from tests.models.builders import BOOL, STRING, U32, Pair, gguf
from tests.pictures_made import png, projector, question
from tests.sounds_made import audio_projector, broken, counted_mp3, flac, mp3, spoken, wav
from tests.tiny_gguf import WIDTH, tiny_gguf

from headrace import engines
from headrace.core.errors import ContextOverflow, InvalidRequest, Unsupported
from headrace.core.events import Delta, Finish, Progress
from headrace.engines.base import OpenRequest
from headrace.model_worker import AsyncModelWorker
from headrace.models import projector as projectors
from headrace.models.inspect import inspect

GREEDY: dict[str, Any] = {"temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def folder(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of one layer with a projector of audio beside it."""
    folder = tmp_path_factory.mktemp("hearing")
    tiny_gguf(folder / "tiny.gguf", smollm2_path)
    audio_projector(folder / "mmproj-tiny-f16.gguf", width=WIDTH)
    return folder


@pytest.fixture(scope="module")
async def worker(folder: Path) -> AsyncIterator[AsyncModelWorker]:
    model = AsyncModelWorker(str(folder), engine="llamacpp", context_length=512, max_running=2)
    async with model:
        yield model


async def test_sounds_are_heard_counted_and_cached(worker: AsyncModelWorker) -> None:
    """Issue 13, audio input: the engine's count is the usage, and the answer depends on it."""
    able = worker.metadata.capabilities
    assert (able.vision, able.audio) == (False, True)

    async def ask(*parts: Any) -> Any:
        return await worker.generate(messages=[spoken(*parts)], max_tokens=6, **GREEDY)

    none, first = await ask("What is it?"), await ask("What is ", wav(), "it?")
    again, other = await ask("What is ", wav(), "it?"), await ask("What is ", wav(seed=2), "it?")
    two = await ask("What is ", wav(), wav(0.3, 48000, channels=2), "it?")
    # 30 s of 50 frames, 16 to a token.
    per_sound = first.usage.prompt_tokens - none.usage.prompt_tokens
    assert 90 <= per_sound <= 98
    assert abs(two.usage.prompt_tokens - none.usage.prompt_tokens - 2 * per_sound) <= 3
    assert again.text == first.text != other.text
    assert again.usage.cached_tokens == first.usage.prompt_tokens - 1
    assert other.usage.cached_tokens < first.usage.prompt_tokens - per_sound
    with pytest.raises(Unsupported, match="takes no images") as caught:
        await worker.generate(messages=[question("a", png())])
    assert caught.value.param == "messages[0].content[1]"


async def test_other_formats(worker: AsyncModelWorker) -> None:
    """A length that a file claims, and that its decoder would believe, has no effect."""
    texts: list[str] = []
    for data in (flac(), mp3(), counted_mp3(2_000_000_000)):
        result = await worker.generate(messages=[spoken("a", data)], max_tokens=4, **GREEDY)
        assert result.usage.prompt_tokens > 90
        texts.append(result.text)
    assert texts[1] == texts[2]


async def test_bounds_of_the_context(worker: AsyncModelWorker) -> None:
    message = spoken(wav(), "a")
    with pytest.raises(ContextOverflow):
        await worker.generate(messages=[message], context_length=60, **GREEDY)
    with pytest.raises(Unsupported, match="Log-probabilities"):
        await worker.generate(messages=[message], logprobs=1)


async def test_a_closed_stream_frees_the_slot(worker: AsyncModelWorker) -> None:
    """Cancelled in the prefill of sounds, and in the answer; all slots twice."""
    for seed, kind in enumerate((Progress, Delta, Progress, Progress)):
        message = spoken(wav(0.3, seed=seed), wav(0.3, seed=seed + 9), "a")
        stream = worker.generate_stream(messages=[message], **GREEDY)
        async for event in stream:
            if isinstance(event, kind):
                break
        await stream.aclose()
    result = await worker.generate(messages=[spoken("a", wav())], max_tokens=2, **GREEDY)
    assert result.usage.completion_tokens == 2


async def test_broken_sounds_are_errors(worker: AsyncModelWorker) -> None:
    """20 broken files, a clear error for each, and the process lives."""
    for data in broken():
        with pytest.raises(InvalidRequest, match=r"audio|sound|MP3|FLAC|WAV") as caught:
            await worker.generate(messages=[spoken("a", data)], max_tokens=1)
        assert (caught.value.param or "").startswith("messages")
    result = await worker.generate(messages=[spoken("a", wav())], max_tokens=2, **GREEDY)
    assert result.metrics.continuations == 0
    assert worker.state == "ready"


def test_a_projector_says_what_it_takes(folder: Path, tmp_path: Path) -> None:
    """Any projector was announced as vision before the load."""
    file = inspect(folder)
    assert (file.vision, file.audio) == (False, True)
    images = projectors.read(projector(tmp_path / "mmproj-a.gguf", width=WIDTH))
    sounds = projectors.read(folder / "mmproj-tiny-f16.gguf")
    assert (images.vision, images.audio) == (True, False)
    assert (sounds.vision, sounds.audio, sounds.width) == (False, True, WIDTH)


def test_the_projector_counts_in_the_estimate(folder: Path) -> None:
    request = OpenRequest(model=inspect(folder), context_length=512, device="cpu")
    heard = engines.footprint("llamacpp", request)
    off = engines.footprint("llamacpp", replace(request, options={"mmproj": "off"}))
    size = (folder / "mmproj-tiny-f16.gguf").stat().st_size
    assert heard.parts["weights"] - off.parts["weights"] == size
    # Samples and spectra of 300 s.
    assert heard.devices["cpu"] > off.devices["cpu"] + size + (70 << 20)


def test_a_projector_of_both(tmp_path: Path) -> None:
    """The keys of its two encoders are not mixed."""
    pairs: list[Pair] = [
        ("general.architecture", STRING, "clip"),
        ("clip.has_audio_encoder", BOOL, True),
        ("clip.has_vision_encoder", BOOL, True),
        ("clip.audio.embedding_length", U32, 1 << 12),
        ("clip.audio.projection_dim", U32, 64),
        ("clip.vision.embedding_length", U32, 32),
        ("clip.vision.image_size", U32, 560),
        ("clip.vision.patch_size", U32, 14),
        ("clip.vision.projection_dim", U32, 64),
    ]
    made: list[projectors.Projector] = []
    for chosen in (pairs, [pair for pair in pairs if "vision" not in pair[0]]):
        path = tmp_path / "mmproj.gguf"
        path.write_bytes(gguf(chosen, [("a", (1,), 0)]))
        made.append(projectors.read(path))
    both, sounds = made
    assert (both.vision, both.audio, both.width) == (True, True, 64)
    assert both.computed == sounds.computed > 8 * 4096 * 4 * 1500


async def test_an_answer_with_a_sound_is_repeated(tmp_path: Path, home: Path) -> None:
    """After a crash a greedy answer is computed again; an engine without audio refuses it."""
    trigger = tmp_path / "trigger"
    options: Any = {"audio": True, "tokens_per_second": 500, "trigger": str(trigger)}
    async with AsyncModelWorker("echo", fault="crash", **options) as echo:
        messages = [spoken("hear ", wav(0.5))]
        plain = await echo.generate(messages=messages)
        assert plain.text.startswith("hear [wav 0.5s ")
        text, finish = "", None
        async for event in echo.generate_stream(messages=messages, temperature=0):
            if isinstance(event, Delta):
                if not text:
                    trigger.write_text("")
                text += event.text
            elif isinstance(event, Finish):
                finish = event
        assert text == plain.text
        assert finish is not None
        assert finish.metrics.continued == "exact"
        with pytest.raises(Unsupported, match="takes no images"):
            await echo.generate(messages=[question("a", png())])
    async with AsyncModelWorker("echo", images=True) as echo:
        with pytest.raises(Unsupported, match="takes no audio") as caught:
            await echo.generate(messages=messages)
        assert caught.value.param == "messages[0].content[1]"
