from __future__ import annotations

import base64
import math
from array import array
from typing import Any

import pytest
from tests.engines.remote.rig import KEY, started
from tests.fakes.upstream import Play, Seen, answered, refused, upstream

from headrace.core.errors import DeadlineExceeded, Unsupported, UpstreamError
from headrace.core.events import Scores
from headrace.core.request import EmbedRequest, RerankRequest, ScoreRequest
from headrace.core.stream import collect_ranking, collect_vectors, result


def floats(vector: bytes) -> list[float]:
    return list(array("f", vector))


def vectors(*rows: list[float], packed: bool = False, tokens: int = 5) -> Play:
    data = [
        {"index": place, "embedding": base64.b64encode(array("f", row)).decode() if packed else row}
        for place, row in enumerate(rows)
    ]
    # Not in order, as some upstreams give them.
    return answered({"data": data[::-1], "usage": {"prompt_tokens": tokens, "total_tokens": 5}})


@pytest.mark.parametrize("packed", [False, True])
async def test_vectors_come_in_order_and_of_length_1(packed: bool) -> None:
    """W23: batched, normalised on request, usage counted."""
    plays = [vectors([3.0, 4.0], [0.0, 2.0], packed=packed) for _ in range(2)]
    async with upstream(*plays) as server, started(server.url, task="embed") as worker:
        unit = await collect_vectors(worker.ask(EmbedRequest(inputs=("a", "b"))))
        plain = await collect_vectors(
            worker.ask(EmbedRequest(inputs=("a", "b"), normalize=False, dimensions=2))
        )
        assert [seen.path for seen in server.requests] == ["/embeddings"] * 2
        assert server.requests[1].body == {
            "model": "gpt-x",
            "input": ["a", "b"],
            "encoding_format": "base64",
            "dimensions": 2,
        }
    assert floats(unit.vectors[0]) == pytest.approx([0.6, 0.8])
    assert floats(plain.vectors[1]) == [0.0, 2.0]
    assert (unit.dimensions, unit.usage.prompt_tokens) == (2, 5)
    assert (unit.metrics.engine, unit.metrics.outcome) == ("openai", "stop")
    assert math.hypot(*floats(unit.vectors[1])) == pytest.approx(1.0)


@pytest.mark.parametrize(
    "play",
    [
        answered({"data": []}),
        answered({"nothing": 1}),
        answered({"data": [{"index": 0, "embedding": "***"}]}),
        answered({"data": [{"index": 0, "embedding": []}]}),
        answered({"data": [{"index": 5, "embedding": [1.0]}]}),
        answered({"data": [{"index": 0, "embedding": [1.0]}, {"index": 0, "embedding": [1.0]}]}),
        Play([b"oops"], kind="application/json", framing="length"),
        Play([b"\xff"], kind="application/json", framing="length"),
        Play([b"<html>"], kind="text/html", framing="length"),
        Play([b"{", "drop"], kind="application/json"),
        refused(401, {"message": KEY}),
    ],
)
async def test_broken_answers_are_errors(play: Play) -> None:
    """W17: never a wrong vector."""
    async with (
        upstream(play) as server,
        started(server.url, task="embed", max_retries=0) as worker,
    ):
        with pytest.raises(UpstreamError) as broken:
            await collect_vectors(worker.ask(EmbedRequest(inputs=("a",))))
        assert worker.load == (0, 0)
    assert KEY not in f"{broken.value.message} {broken.value.detail}"


async def test_what_is_not_honoured_is_refused() -> None:
    async with upstream() as server:
        async with started(server.url, task="embed") as worker:
            for request, param in (
                (EmbedRequest(inputs=("a",), truncate=True), "truncate"),
                (EmbedRequest(inputs=((1, 2),)), "input"),
            ):
                with pytest.raises(Unsupported) as refusal:
                    await collect_vectors(worker.ask(request))
                assert refusal.value.param == param
            with pytest.raises(Unsupported):
                await collect_ranking(worker.ask(RerankRequest(query="q", documents=("d",))))
        assert server.requests == []


@pytest.mark.parametrize(
    ("extra", "tokens"),
    [
        ({"usage": {"total_tokens": 11}}, 11),
        ({"meta": {"tokens": {"input_tokens": 9}}}, 9),
        ({}, 3),
    ],
)
async def test_documents_are_put_in_order(extra: dict[str, Any], tokens: int) -> None:
    """W23: the Jina and the Cohere form of the account."""
    rows = [{"index": 1, "relevance_score": 0.1}, {"index": 0, "relevance_score": 0.9}]
    async with upstream(answered({"results": rows, **extra})) as server:
        async with started(server.url, "siliconflow", task="rerank") as worker:
            found = await collect_ranking(
                worker.ask(RerankRequest(query="q", documents=("d", "e"), top_n=2))
            )
        assert server.requests[0].path == "/rerank"
        assert server.requests[0].body["top_n"] == 2
    assert [(one.index, one.score) for one in found.ranking] == [(0, 0.9), (1, 0.1)]
    assert found.usage.prompt_tokens == tokens


async def test_pairs_are_scored_by_one_ranking_for_each_first_text() -> None:
    """W23: in the order of the pairs, with the tokens of all rankings."""

    def script(seen: Seen) -> Play:
        values = {"q": [0.5, 0.25], "p": [0.75]}[seen.body["query"]]
        rows = [{"index": i, "relevance_score": value} for i, value in enumerate(values)]
        return answered({"results": rows[::-1], "usage": {"total_tokens": 10}})

    async with (
        upstream(script=script) as server,
        started(server.url, "siliconflow", task="rerank") as worker,
    ):
        pairs = (("q", "a"), ("p", "b"), ("q", "c"))
        made, finish = await result(worker.ask(ScoreRequest(pairs=pairs)), Scores)
    assert [seen.body["documents"] for seen in server.requests] == [["a", "c"], ["b"]]
    assert made.scores == (0.5, 0.75, 0.25)
    assert finish.usage.prompt_tokens == 20


async def test_a_text_without_a_score_is_an_error() -> None:
    """W17: a score that the upstream left out is not 0."""
    rows = [{"index": 0, "relevance_score": 0.5}]
    async with (
        upstream(answered({"results": rows})) as server,
        started(server.url, "siliconflow", task="rerank") as worker,
    ):
        with pytest.raises(UpstreamError):
            await result(worker.ask(ScoreRequest(pairs=(("q", "a"), ("q", "b")))), Scores)


async def test_a_deadline_holds() -> None:
    def script(seen: Seen) -> Play:
        return Play([5.0])

    async with upstream(script=script) as server, started(server.url, task="embed") as worker:
        with pytest.raises(DeadlineExceeded):
            await collect_vectors(worker.ask(EmbedRequest(inputs=("a",), deadline_s=0.1)))
        assert worker.load == (0, 0)
