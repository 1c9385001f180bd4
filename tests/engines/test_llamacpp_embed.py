"""llama.cpp as an embedder: a model that generates embeds as well, when it is asked to."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator
from pathlib import Path

import pytest

from headrace.core.errors import InvalidRequest, LoadFailed
from headrace.core.model import ModelSpec
from headrace.core.request import EmbedRequest
from headrace.core.stream import collect_vectors
from headrace.engines.base import OpenRequest
from headrace.engines.llamacpp import footprint
from headrace.engines.llamacpp.engine import Engine
from headrace.models.inspect import inspect
from headrace.worker import computing
from headrace.worker.process import WorkerProcess
from headrace.worker.spec import WorkerSpec


@pytest.fixture(scope="module")
def request_(smollm2_path: Path) -> OpenRequest:
    options = {"pooling": "mean", "slots": 4}
    return OpenRequest(
        model=inspect(smollm2_path), device="cpu", context_length=256, task="embed", options=options
    )


@pytest.fixture(scope="module")
def engine(request_: OpenRequest) -> Iterator[Engine]:
    engine = Engine(request_)
    yield engine
    engine.close()


def cosine(one: bytes, other: bytes) -> float:
    a, b = array("f", one), array("f", other)
    together = sum(x * y for x, y in zip(a, b, strict=True))
    return together / math.hypot(*a) / math.hypot(*b)


def test_it_embeds_a_batch_in_order(engine: Engine) -> None:
    """E: vectors of the model's width, those of a text alike in whatever company."""
    assert engine.facts.capabilities.tasks == {"embed"}
    assert engine.facts.capabilities.dimensions == 576
    assert (engine.facts.max_running, engine.facts.context_length) == (256, 256)
    texts = ("The river runs to the sea.", "A river flows into the ocean.", "x = compile(regex)")
    ids = [engine.tokenize(text, add_special=True) for text in texts]
    together = engine.embed([*ids, ids[0], *ids])
    assert {len(vector) for vector in together} == {576 * 4}
    for place, one in enumerate(ids):
        alone = engine.embed([one])[0]
        assert cosine(alone, together[place]) > 0.999
        assert cosine(alone, together[place + 4]) > 0.999
    river, flows, code = together[:3]
    assert cosine(river, flows) > cosine(river, code)


def test_it_takes_a_whole_context_and_no_unknown_token(engine: Engine) -> None:
    assert len(engine.embed([[7] * 256])[0]) == 576 * 4
    with pytest.raises(InvalidRequest):
        engine.embed([[1, 1 << 20]])


def test_it_ranks_nothing(request_: OpenRequest, smollm2_path: Path) -> None:
    expected = footprint(request_)
    assert (expected.max_running, expected.context_length) == (256, 256)
    wrong = OpenRequest(model=inspect(smollm2_path), device="cpu", task="rerank")
    with pytest.raises(LoadFailed, match="ranks nothing"):
        Engine(wrong)


@pytest.mark.slow
async def test_a_long_text_may_take_longer_than_hang_s(
    request_: OpenRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Issue 11.6: a text whose batch took two minutes had its worker killed, for all others."""
    monkeypatch.setattr(computing, "_LONGEST_BATCH", 1000)
    spec = ModelSpec(
        name="m", model="m", task="embed", device="cpu", hang_s=1.2, options=request_.options
    )
    resolved = WorkerSpec(model=spec, file=request_.model, engine="llamacpp")
    worker = WorkerProcess(spec, lambda spec, report: resolved)
    await worker.start()
    try:
        pid, vectors = worker.pid, EmbedRequest(inputs=((7,) * 256,) * 4)
        assert len((await collect_vectors(worker.ask(vectors))).vectors) == 4
        assert worker.pid == pid
    finally:
        await worker.aclose()
