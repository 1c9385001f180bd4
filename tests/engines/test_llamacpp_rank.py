"""llama.cpp ranks with a cross-encoder in a GGUF, which is made here and computed by torch too."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.engines.sentence_transformers.conftest import make_ranker
from tests.models_made import ranker_gguf

from headrace import AsyncModelWorker
from headrace.core.errors import ContextOverflow, LoadFailed
from headrace.engines.base import OpenRequest, Pair
from headrace.engines.llamacpp import footprint
from headrace.engines.llamacpp.engine import Engine
from headrace.models.inspect import inspect

pytestmark = [pytest.mark.engines, pytest.mark.filterwarnings("default")]

QUERY = "rivers of Europe"
DOCUMENTS = ("The Rhine is a river.", "x = compile(regex)", "boats, ships and the sea", "a")


@pytest.fixture(scope="module")
def folder(minilm_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_ranker(tmp_path_factory.mktemp("ranker"), minilm_path)


@pytest.fixture(scope="module")
def model(folder: Path) -> Path:
    return ranker_gguf(folder, folder / "ranker.gguf")


@pytest.fixture(scope="module")
def engine(model: Path) -> Iterator[Engine]:
    engine = Engine(OpenRequest(model=inspect(model), device="cpu", task="rerank"))
    yield engine
    engine.close()


def scored(folder: Path, engine: Engine, pair: Pair) -> float:
    """The score of torch for the sequence of llama.cpp: two separators, and one type of token."""
    import torch
    from transformers import AutoModelForSequenceClassification

    loaded: Any = AutoModelForSequenceClassification.from_pretrained(folder)
    (begin, end), (query, document) = engine.tokenize("", add_special=True), pair.texts or ("", "")
    first, second = (engine.tokenize(text, add_special=False) for text in (query, document))
    ids = torch.tensor([[begin, *first, end, end, *second, end]])
    with torch.inference_mode():
        return loaded(input_ids=ids, token_type_ids=torch.zeros_like(ids)).logits.item()


def test_its_scores_are_those_of_torch(engine: Engine, folder: Path) -> None:
    """Issue 17.6: a model made for ranking, in whatever company."""
    assert engine.facts.capabilities.tasks == {"rerank"}
    pairs = [engine.pair(QUERY, text) for text in DOCUMENTS]
    expected = [scored(folder, engine, pair) for pair in pairs]
    assert len({round(score, 3) for score in expected}) == len(DOCUMENTS)
    assert list(engine.score(pairs)) == pytest.approx(expected, abs=2e-2)
    other = engine.pair("ships", DOCUMENTS[2])
    mixed = engine.score([pairs[2], other, pairs[0]])
    wanted = [expected[2], scored(folder, engine, other), expected[0]]
    assert list(mixed) == pytest.approx(wanted, abs=2e-2)


def test_its_tokens_are_counted_as_the_server_counts(engine: Engine) -> None:
    answer = engine._ranking({"query": QUERY, "documents": list(DOCUMENTS)})
    counted = sum(len(engine.pair(QUERY, text).token_ids) for text in DOCUMENTS)
    assert answer["usage"]["prompt_tokens"] == counted


def test_markers_are_text(engine: Engine) -> None:
    """What the server does not read as one token is not counted as one."""
    text = "[SEP] [CLS] a"
    answer = engine._ranking({"query": text, "documents": [text]})
    assert answer["usage"]["prompt_tokens"] == len(engine.pair(text, text).token_ids)


async def test_it_ranks_as_a_service_does(model: Path, smollm2_path: Path) -> None:
    """Issue 17.6: found by the file's header; long documents are cut, long queries refused."""
    async with AsyncModelWorker(str(model), device="cpu") as worker:
        ranking = await worker.rerank(QUERY, [*DOCUMENTS, "river " * 500], top_n=5)
        assert sorted(item.index for item in ranking.ranking) == [0, 1, 2, 3, 4]
        assert ranking.usage.prompt_tokens <= 4 * 20 + 128
        alone = await worker.rerank(QUERY, DOCUMENTS[:1])
        (first,) = (item.score for item in ranking.ranking if item.index == 0)
        assert alone.ranking[0].score == pytest.approx(first, abs=2e-2)
        cut = await worker.rerank(QUERY, ["[SEP] " * 100])
        assert cut.usage.prompt_tokens <= 128
        with pytest.raises(ContextOverflow, match="The query has"):
            await worker.rerank("river " * 200, DOCUMENTS)
        with pytest.raises(ContextOverflow, match="context length"):
            await worker.rerank(QUERY, ["river " * 500], truncate=False)
    with pytest.raises(LoadFailed, match="no head"):
        Engine(OpenRequest(model=inspect(smollm2_path), device="cpu", task="rerank"))


def test_its_memory_is_estimated(model: Path) -> None:
    need = footprint(OpenRequest(model=inspect(model), device="cpu", task="rerank"))
    assert need.context_length == 128
    assert need.devices["cpu"] > model.stat().st_size
