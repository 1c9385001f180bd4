"""MiniLM in a process of its own, over HTTP, beside a model that chats."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import httpx
import pytest
from tests.conftest import MODEL_HOME
from tests.engines.sentence_transformers.conftest import make_ranker
from tests.engines.sentence_transformers.test_engine import TEXTS

from headrace import ModelWorker, engines, runtime
from headrace.api.app import create_app
from headrace.api.limits import ApiSettings
from headrace.core.errors import ContextOverflow
from headrace.core.model import ModelFile, ModelSpec
from headrace.core.options import ModelOptions
from headrace.core.request import EmbedRequest, RerankRequest
from headrace.engines.openvino import convert
from headrace.models.inspect import inspect
from headrace.worker.process import WorkerProcess
from headrace.worker.spec import WorkerSpec, open_request

pytestmark = [pytest.mark.engines, pytest.mark.filterwarnings("default")]


@pytest.mark.slow
async def test_it_serves_many_clients(minilm_path: Path, home: Path) -> None:
    """E: single texts of many clients get the vectors that one list gets; chat is refused."""
    spec = ModelSpec(name="m", model=str(minilm_path), engine="sentence_transformers", device="cpu")
    pool = runtime.open_pool(runtime.load_settings(), [spec])
    try:
        await pool.start()
        transport = httpx.ASGITransport(create_app(pool, ApiSettings()))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:

            async def post(given: object) -> list[list[float]]:
                answer = await http.post("/v1/embeddings", json={"input": given})
                assert answer.status_code == 200, answer.text
                return [one["embedding"] for one in answer.json()["data"]]

            together = await post(list(TEXTS))
            alone = await asyncio.gather(*(post(text) for text in TEXTS * 6))
            for place, vector in enumerate(alone):
                assert vector[0] == pytest.approx(together[place % len(TEXTS)], abs=1e-5)
            chat = {"messages": [{"role": "user", "content": "hi"}]}
            refused = await http.post("/v1/chat/completions", json=chat)
            assert refused.status_code == 400
            assert "makes embeddings" in refused.json()["error"]["message"]
            card = (await http.get("/v1/models")).json()["data"][0]
            assert card["tasks"] == ["embed"]
    finally:
        await pool.aclose()


async def _measured(
    model: ModelFile, engine: str, request: EmbedRequest | RerankRequest
) -> tuple[int, int]:
    """Return the estimate for a model, and the most that its process took for a request."""
    spec = ModelSpec(name="m", model="m", task=model.task, device="cpu")
    resolved = WorkerSpec(model=spec, file=model, engine=engine)
    need = engines.footprint(engine, open_request(resolved)).devices["cpu"]
    worker = WorkerProcess(spec, lambda spec, report: resolved)
    await worker.start()
    try:
        async for _ in worker.ask(request):
            pass
        status = Path(f"/proc/{worker.pid}/status").read_text()
    finally:
        await worker.aclose()
    return need, int(re.findall(r"VmHWM:\s+(\d+)", status)[0]) << 10


@pytest.mark.parametrize("engine", ["sentence_transformers", "openvino"])
async def test_its_estimate_counts_the_largest_batch(minilm_path: Path, engine: str) -> None:
    """Issue 11.8: 64 texts of 256 tokens took 1,050 MB of 831 estimated; OpenVINO 564 of 454."""
    model = inspect(minilm_path)
    model = convert(model, MODEL_HOME) if engine == "openvino" else model
    inputs = [(100,) * (256 - place % 2) for place in range(64)]
    need, peak = await _measured(model, engine, EmbedRequest(inputs=tuple(inputs)))
    assert peak <= need <= 1.3 * peak


@pytest.mark.parametrize(
    ("kind", "engine"), [("mpnet", "sentence_transformers"), ("deberta-v2", "openvino")]
)
async def test_its_estimate_counts_attention_that_is_kept_whole(
    kind: str, engine: str, minilm_path: Path, tmp_path: Path
) -> None:
    """Issue 11.8: MPNet took 2,000 MiB of 1,014 estimated, DeBERTa on OpenVINO 1,890 of 316."""
    model = inspect(make_ranker(tmp_path, minilm_path, kind=kind, length=258))
    model = convert(model, tmp_path / "home") if engine == "openvino" else model
    documents = tuple("word " * (250 - place % 2) for place in range(32))
    need, peak = await _measured(model, engine, RerankRequest(query="a", documents=documents))
    assert peak <= need <= 1.8 * peak


def test_the_python_face(minilm_path: Path, ranker_path: Path, home: Path) -> None:
    """W22: `embed` and `rerank` without a server."""
    with ModelWorker(str(minilm_path), engine="sentence_transformers", device="cpu") as worker:
        vectors = worker.embed(TEXTS[:2], dimensions=8)
        assert [len(vector) for vector in vectors] == [8, 8]
        with pytest.raises(ContextOverflow):
            worker.embed(["word " * 400])
        raw = worker.embed_raw(["word " * 400], truncate=True)
        assert raw.usage.prompt_tokens == 256
    options: ModelOptions = {"engine": "sentence_transformers", "device": "cpu"}
    with ModelWorker(str(ranker_path), isolate=False, **options) as worker:
        ranking = worker.rerank("rivers", TEXTS).ranking
        assert sorted(one.index for one in ranking) == list(range(len(TEXTS)))
        assert [one.score for one in ranking] == sorted(
            (one.score for one in ranking), reverse=True
        )
