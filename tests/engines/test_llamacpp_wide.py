"""llama.cpp with the weights of a file in 8 bits."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from headrace import AsyncModelWorker
from headrace.core.errors import ConfigError
from headrace.core.options import ModelOptions
from headrace.engines import llamacpp
from headrace.engines.base import OpenRequest
from headrace.engines.llamacpp import widening
from headrace.models import gguf_model
from headrace.models.converted import copies, place
from headrace.models.gguf import read_header, read_layout
from headrace.models.inspect import inspect
from headrace.models.transfer import silent


@pytest.fixture(scope="module")
def wide(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    return Path(widening.widened(inspect(smollm2_path), home, silent).path)


def q4_1(block: bytes) -> list[float]:
    scale, least = struct.unpack("<2e", block[:4])
    low, high = [byte & 15 for byte in block[4:]], [byte >> 4 for byte in block[4:]]
    return [scale * value + least for value in (*low, *high)]


def q8_0(block: bytes) -> list[float]:
    (scale,) = struct.unpack("<e", block[:2])
    return [scale * value for value in struct.unpack("<32b", block[2:])]


def test_all_weights_are_those_of_the_file(smollm2_path: Path, wide: Path) -> None:
    """Issue 17.2: to about half a step of 8 bits, in every kind of tensor."""
    before, after = read_layout(smollm2_path), read_layout(wide)
    assert set(read_header(wide).tensor_bytes) == {"F32", "Q8_0"}
    assert [t[:2] for t in before.tensors] == [t[:2] for t in after.tensors]
    data, written = smollm2_path.read_bytes(), wide.read_bytes()
    for old, new in zip(before.tensors, after.tensors, strict=True):
        if old.kind == new.kind:
            same = data[old.place : old.place + old.size]
            assert same == written[new.place : new.place + new.size]
            continue
        assert (old.kind, new.kind) == (3, 8)
        blocks = new.size // 34
        for block in {0, 1, blocks // 2, blocks - 1}:
            at, before_at = new.place + 34 * block, old.place + 20 * block
            mine, whole = q8_0(written[at : at + 34]), q4_1(data[before_at : before_at + 20])
            assert mine == pytest.approx(whole, abs=max(map(abs, whole)) / 127 * 0.6)


async def test_a_model_is_widened_once(
    smollm2_path: Path, wide: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Issue 17.2: an option; the copy is found again, and belongs to its source."""
    home = wide.parents[2]
    assert list(copies(home)) == [(wide.parent, smollm2_path.resolve())]
    made = wide.stat().st_mtime_ns
    monkeypatch.setenv("HEADRACE_HOME", str(home))
    options: ModelOptions = {
        "slots": 1,
        "context_length": 256,
        "device": "cpu",
        "weight_type": "q8_0",
    }
    async with AsyncModelWorker(str(smollm2_path), **options) as worker:
        assert worker.metadata.quantization == "Q8_0"
        answer = await worker.generate("The capital of France is", max_tokens=4, temperature=0)
        assert "Paris" in answer.text
    assert wide.stat().st_mtime_ns == made


def test_what_is_not_widened(
    smollm2_path: Path, wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = inspect(smollm2_path)
    assert not place(file, tmp_path, "q8-0").exists()
    assert widening.widened(file, tmp_path, None) is file, "`show` makes nothing"
    assert widening.widened(inspect(wide), tmp_path, silent).path == str(wide)
    assert llamacpp.prepared(file, tmp_path, {"weight_type": "file"}, silent) is file
    monkeypatch.setattr(gguf_model, "parts", lambda path: [path, path])
    with pytest.raises(ConfigError, match="several files"):
        widening.widened(file, tmp_path, silent)


def test_tune_tries_it_for_small_models(smollm2_path: Path, wide: Path) -> None:
    """Issue 17.2: first of all, with a slot for each of many streams, and with drafts."""
    request = OpenRequest(model=inspect(smollm2_path), max_running=32)
    narrow = llamacpp.tune_options(request)
    drafting = {"speculation": "ngram", "weight_type": "q8_0"}
    assert [options for options in narrow if "weight_type" in options] == [
        {"slots": 32, "weight_type": "q8_0"},
        {"weight_type": "q8_0"},
        drafting,
        {"slots": 32, **drafting},
    ]
    few = llamacpp.tune_options(OpenRequest(model=inspect(smollm2_path), max_running=4))
    assert not any("slots" in options for options in few), "there are four by default"
    assert {"weight_type": "q8_0"} not in llamacpp.tune_options(OpenRequest(model=inspect(wide)))
