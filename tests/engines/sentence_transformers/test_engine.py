"""sentence-transformers: its vectors and scores are those of the library itself."""

from __future__ import annotations

import json
import shutil
import sys
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.engines.sentence_transformers.conftest import make_ranker, opening

from headrace import AsyncModelWorker
from headrace.core.errors import (
    ConfigError,
    InvalidRequest,
    LoadFailed,
    OutOfMemory,
    Unsupported,
)
from headrace.core.options import EmbedOptions, ModelOptions
from headrace.engines import plan
from headrace.engines.sentence_transformers import Engine, footprint
from headrace.worker.encode import _shaped

pytestmark = [pytest.mark.engines, pytest.mark.filterwarnings("default")]

TEXTS = (
    "The river runs to the sea.",
    "x",
    "Ein Fluss, é, 日本語, and an emoji 🙂",
    "a much longer text about the rivers of Europe, and the boats on them, " * 8,
    "A river flows into the ocean.",
)


@pytest.fixture(scope="module")
def engine(minilm_path: Path) -> Iterator[Engine]:
    engine = Engine(opening(minilm_path))
    yield engine
    engine.close()


def vectors(engine: Engine, texts: tuple[str, ...]) -> Any:
    import numpy as np

    raw = engine.embed([engine.tokenize(text, add_special=True) for text in texts])
    return np.frombuffer(b"".join(raw), "<f4").reshape(len(texts), -1)


def test_vectors_are_those_of_the_library(engine: Engine, minilm_path: Path) -> None:
    """E: equal to 1e-5, in whatever company."""
    import numpy as np
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(minilm_path), device="cpu", local_files_only=True)
    expected = model.encode(list(TEXTS))
    assert np.abs(vectors(engine, TEXTS) - expected).max() < 1e-5
    for place, text in enumerate(TEXTS):
        assert np.abs(vectors(engine, (text,))[0] - expected[place]).max() < 1e-5
    facts = engine.facts
    assert (facts.context_length, facts.max_running, facts.device) == (256, 256, "cpu")
    assert facts.capabilities.tasks == {"embed"}
    assert facts.capabilities.dimensions == 384


def test_tokens_are_those_of_the_tokenizer(engine: Engine, minilm_path: Path) -> None:
    """W12: nothing is cut or padded here."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(minilm_path)
    for text in (*TEXTS, "long " * 600):
        expected = tokenizer(text, truncation=False)["input_ids"]
        assert list(engine.tokenize(text, add_special=True)) == expected
        assert list(engine.tokenize(text, add_special=False)) == expected[1:-1]
    many = [*TEXTS, "", "long " * 600]
    assert engine.tokenize_all(many) == [engine.tokenize(text, add_special=True) for text in many]
    assert engine.tokenize_all([]) == []
    ids = engine.tokenize("hello world", add_special=True)
    assert engine.detokenize(ids) == "[CLS] hello world [SEP]"
    for unknown in (1 << 20, 1 << 64, -1):
        with pytest.raises(InvalidRequest):
            engine.embed([[1, 2], [1, unknown]])
    with pytest.raises(InvalidRequest):
        engine.detokenize([-1])


def test_scores_are_those_of_the_library(ranker_path: Path) -> None:
    """E: with the token types of the pair, and cut where the library cuts."""
    from sentence_transformers import CrossEncoder

    model = CrossEncoder(str(ranker_path), device="cpu", local_files_only=True)
    expected = model.predict([("rivers", text) for text in TEXTS])
    engine = Engine(opening(ranker_path))
    pairs = [engine.pair("rivers", text) for text in TEXTS]
    assert engine.facts.capabilities.tasks == {"rerank"}
    assert engine.facts.context_length == 128
    short = [0, 1, 2, 4]
    scores = engine.score([pairs[place] for place in short])
    assert scores == pytest.approx([expected[place] for place in short], abs=1e-5)
    assert len(set(scores)) == 4
    assert engine.score([pairs[1]])[0] == pytest.approx(expected[1], abs=1e-5)
    assert all(0 < pair.second < len(pair.token_ids) for pair in pairs)
    engine.close()


def with_prompts(model: Path, path: Path, default: str | None = None, **pooling: Any) -> Path:
    """Copy a model to a folder, with prompts of its own."""
    shutil.copytree(model, path)
    changed = {"prompts": {"query": "query: "}, "default_prompt_name": default}
    for name, values in (
        ("config_sentence_transformers.json", changed),
        ("1_Pooling/config.json", pooling),
    ):
        file = path / name
        file.write_text(json.dumps(json.loads(file.read_text()) | values))
    return path


async def test_prompts_of_the_model_come_before_the_text(minilm_path: Path, tmp_path: Path) -> None:
    """Issue 17.6: vectors are those of the library's encode, encode_query and encode_document."""
    import numpy as np
    from sentence_transformers import SentenceTransformer

    path = with_prompts(minilm_path, tmp_path / "model")
    model = SentenceTransformer(str(path), device="cpu", local_files_only=True)
    texts = [*map(str, TEXTS[:2])]
    async with AsyncModelWorker(str(path), device="cpu", isolate=False) as worker:
        cases: list[tuple[EmbedOptions, Any]] = [
            ({"prompt_name": "query"}, model.encode(texts, prompt_name="query")),
            ({"input_type": "query"}, model.encode_query(texts)),
            ({"input_type": "document"}, model.encode_document(texts)),
            ({}, model.encode(texts)),
        ]
        for options, expected in cases:
            assert np.abs(np.array(await worker.embed(texts, **options)) - expected).max() < 1e-5
        with pytest.raises(InvalidRequest, match="it has document, query"):
            await worker.embed(texts, prompt_name="nobody")
    unknown: ModelOptions = {"device": "cpu", "prompt_name": "nobody"}
    with pytest.raises(ConfigError, match="it has document, query"):
        await AsyncModelWorker(str(path), isolate=False, **unknown).start()


async def test_a_pooling_without_the_prompt(minilm_path: Path, tmp_path: Path) -> None:
    """E: the model's default prompt is read, and left out of the mean, as `encode` has it."""
    import numpy as np
    from sentence_transformers import SentenceTransformer

    path = with_prompts(minilm_path, tmp_path / "model", "query", include_prompt=False)
    expected = SentenceTransformer(str(path), device="cpu", local_files_only=True).encode(["a b"])
    async with AsyncModelWorker(str(path), device="cpu", isolate=False) as worker:
        assert np.abs(np.array(await worker.embed(["a b"])) - expected).max() < 1e-5
        with pytest.raises(Unsupported, match="setting prompt_name"):
            await worker.embed(["a b"], prompt_name="document")


def test_what_beginning_a_forward_costs_is_measured(engine: Engine, ranker_path: Path) -> None:
    """E: batches are divided as this machine has it, and padding is a quarter of one at most."""
    assert 16 <= engine.facts.batch.padding <= engine.facts.batch.tokens / 4
    ranker = Engine(opening(ranker_path, batch_tokens=64, batch_items=3))
    assert ranker.facts.batch == (3, 64, 16)


def test_lengths_are_the_same_with_and_without_numpy(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """E: vectors are scaled to length 1; what the model has scaled stays as it is."""
    raw = engine.embed([engine.tokenize(text, add_special=True) for text in TEXTS])
    assert _shaped(raw, None, True) == tuple(raw)
    short = _shaped(raw, 200, True)
    monkeypatch.delitem(sys.modules, "numpy")
    for one, other in zip(_shaped(raw, 200, True), short, strict=True):
        assert array("f", one) == pytest.approx(array("f", other), abs=1e-7)


def test_what_is_not_sound_is_refused(minilm_path: Path, ranker_path: Path, tmp_path: Path) -> None:
    """W28: no pickles; and no settings that the model does not have."""
    path = tmp_path / "model"
    shutil.copytree(minilm_path, path)
    (path / "2_Dense").mkdir()
    (path / "2_Dense" / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(LoadFailed, match="pickle"):
        Engine(opening(path))
    with pytest.raises(LoadFailed, match="256"):
        Engine(opening(minilm_path, context_length=257))
    with pytest.raises(LoadFailed, match="no device cuda"):
        Engine(opening(minilm_path, device="cuda"))
    with pytest.raises(LoadFailed, match="this one has 3"):
        Engine(opening(make_ranker(tmp_path / "three", minilm_path, scores=3)))


def test_loading_is_silent(ranker_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The library's bars stay off stderr, and are as they were afterwards."""
    import transformers

    logging = transformers.utils.logging
    logging.enable_progress_bar()
    Engine(opening(ranker_path)).close()
    assert logging.is_progress_bar_enabled()
    assert capfd.readouterr() == ("", "")


def test_memory_that_runs_out_is_told(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """W17: torch's own error becomes ours, and the engine goes on."""

    def full(features: Any) -> Any:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    with monkeypatch.context() as patch:
        patch.setattr(engine, "_model", _Full(engine._model, full))
        with pytest.raises(OutOfMemory):
            engine.embed([[101, 102]])
    assert len(engine.embed([[101, 102]])) == 1


class _Full:
    def __init__(self, model: Any, call: Any) -> None:
        self.device = model.device
        self._call = call

    def __call__(self, features: Any) -> Any:
        return self._call(features)


def test_its_footprint_is_of_the_right_size(minilm_path: Path) -> None:
    expected = footprint(opening(minilm_path))
    assert expected.parts["weights"] == pytest.approx(90.9e6, rel=0.01)
    assert 500e6 < expected.devices["cpu"] - plan.torch_libraries() < 1.2e9
    assert expected.max_running == 256
