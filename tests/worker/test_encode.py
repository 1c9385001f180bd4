"""Embeddings and rankings of a worker, in this process and in its own, on the echo engine."""

from __future__ import annotations

import asyncio
import math
import os
import signal
from array import array
from collections.abc import Sequence
from typing import Any

import pytest
from tests.worker.rig import ask, process, until, worker

from headrace.core.errors import (
    ContextOverflow,
    DeadlineExceeded,
    Draining,
    InvalidRequest,
    Unsupported,
    WorkerDied,
)
from headrace.core.events import Scores
from headrace.core.request import EmbedRequest, RerankRequest, ScoreRequest
from headrace.core.stream import collect, collect_ranking, collect_vectors, result
from headrace.engines.echo import Engine


def embedding(*inputs: Any, **given: Any) -> EmbedRequest:
    return EmbedRequest(inputs=inputs or ("hello",), **given)


def length(vector: bytes) -> float:
    return math.hypot(*array("f", vector))


@pytest.mark.parametrize("place", [worker, process])
async def test_embeddings(place: Any) -> None:
    """W22: vectors, exact usage and figures, the same in both places."""
    async with place(task="embed", dimensions=6) as one:
        request = embedding("hello", tuple(b"hello"), "é")
        result = await collect_vectors(one.ask(request))
        assert result.dimensions == 6
        assert result.vectors[0] == result.vectors[1] != result.vectors[2]
        assert [length(vector) for vector in result.vectors] == pytest.approx([1, 1, 1], abs=1e-6)
        assert result.usage.prompt_tokens == result.usage.total_tokens == 5 + 5 + 2
        figures = result.metrics
        assert (figures.engine, figures.model, figures.outcome) == ("echo", "echo", "stop")
        assert figures.usage == result.usage
        assert figures.queue_ms is not None
        assert 0 < figures.total_ms >= (figures.prefill_ms or 0)
        raw = await collect_vectors(one.ask(embedding("hello", normalize=False)))
        assert length(raw.vectors[0]) != pytest.approx(1, abs=1e-3)
        info = one.models()[0]
        assert info.capabilities.tasks == {"embed"}
        assert (info.capabilities.dimensions, info.capabilities.chat) == (6, False)


@pytest.mark.parametrize("place", [worker, process])
async def test_prompts_come_before_the_texts(place: Any) -> None:
    """Issue 17.6: by name, by what the texts are for, or by the model's setting."""
    prompts = {"query": "query: ", "passage": "passage: "}
    async with place(task="embed") as plain:
        texts = ("query: hi", "passage: hi", "hi", "query: query: hi")
        query, passage, bare, _ = (await collect_vectors(plain.ask(embedding(*texts)))).vectors
        with pytest.raises(InvalidRequest, match="has no prompt for query; it has none"):
            await collect_vectors(plain.ask(embedding("hi", input_type="query")))
    async with place(task="embed", prompts=prompts) as one:
        named = await collect_vectors(one.ask(embedding("hi", prompt_name="query")))
        assert named.vectors == (query,)
        assert named.usage.prompt_tokens == len("query: hi")
        meant = await collect_vectors(one.ask(embedding("hi", "hi", input_type="document")))
        assert meant.vectors == (passage, passage)
        ids = await collect_vectors(one.ask(embedding(tuple(b"hi"), "hi", prompt_name="query")))
        assert ids.vectors == (bare, query), "token ids are left as they are"
        assert (await collect_vectors(one.ask(embedding("hi")))).vectors == (bare,)
        with pytest.raises(InvalidRequest, match=r"no prompt 'q'; it has passage, query\."):
            await collect_vectors(one.ask(embedding("hi", prompt_name="q")))
        assert one.models()[0].prompts == prompts
    async with place(task="embed", prompts=prompts, prompt_name="query") as one:
        assert (await collect_vectors(one.ask(embedding("hi")))).vectors == (query,)


@pytest.mark.parametrize("place", [worker, process])
async def test_rankings(place: Any) -> None:
    async with place(task="rerank") as one:
        documents = ("xyz", "abx", "abc", "")
        result = await collect_ranking(one.ask(RerankRequest(query="abc", documents=documents)))
        assert [ranked.index for ranked in result.ranking] == [2, 1, 0, 3]
        assert result.ranking[0].score == 1.0
        assert result.usage.prompt_tokens == 4 * 4 + 9
        best = await collect_ranking(
            one.ask(RerankRequest(query="abc", documents=documents, top_n=1))
        )
        assert best.ranking == result.ranking[:1]


async def test_dimensions_are_cut_and_scaled_again() -> None:
    async with worker(task="embed", dimensions=6) as one:
        whole = await collect_vectors(one.ask(embedding(normalize=False)))
        short = await collect_vectors(one.ask(embedding(dimensions=3)))
        assert (short.dimensions, len(short.vectors[0])) == (3, 12)
        expected = array("f", whole.vectors[0])[:3]
        scale = math.hypot(*expected)
        assert list(array("f", short.vectors[0])) == pytest.approx([x / scale for x in expected])
        with pytest.raises(InvalidRequest, match="has 6") as caught:
            await collect_vectors(one.ask(embedding(dimensions=7)))
        assert caught.value.param == "dimensions"
        assert caught.value.metrics is not None


async def test_each_model_does_what_it_is_for() -> None:
    """W4, issue 12.32: what it is not for is refused with what it is, and the way to it."""
    async with worker(task="embed") as embedder, worker() as speaker:
        with pytest.raises(
            Unsupported, match=r"makes embeddings: use /v1/embeddings or embed\(\)\."
        ):
            await collect(embedder.ask(ask()))
        with pytest.raises(Unsupported, match="makes embeddings"):
            await collect_ranking(embedder.ask(RerankRequest(query="a", documents=("b",))))
        with pytest.raises(Unsupported, match="generates text: use /v1/chat/completions or"):
            await collect_vectors(speaker.ask(embedding()))
        assert embedder.load == speaker.load == (0, 0)


async def test_the_context_is_kept_by_name_or_on_request() -> None:
    """W12: nothing is cut that was not asked to be."""
    async with worker(task="embed", context_length=4) as one:
        assert await collect_vectors(one.ask(embedding("abcd")))
        with pytest.raises(ContextOverflow, match="Input 1 has 5") as caught:
            await collect_vectors(one.ask(embedding("a", "abcde")))
        assert caught.value.param == "input"
        cut = await collect_vectors(
            one.ask(embedding("abcdefgh", tuple(b"abcdefgh"), "abcd", truncate=True))
        )
        assert len(set(cut.vectors)) == 1
        assert cut.usage.prompt_tokens == 12
    async with worker(task="rerank", context_length=6) as one:
        request = RerankRequest(query="ab", documents=("b" * 20,), truncate=False)
        with pytest.raises(ContextOverflow, match="document 0"):
            await collect_ranking(one.ask(request))
        assert (
            await collect_ranking(one.ask(RerankRequest(query="ab", documents=("b" * 20,))))
        ).usage
        with pytest.raises(ContextOverflow) as caught:
            await collect_ranking(one.ask(RerankRequest(query="a" * 9, documents=("b",))))
        assert caught.value.param == "query"


async def test_what_follows_an_input_that_is_too_long_is_not_tokenized(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Issue 11: 2,048 inputs that are too long were tokenized for 7.8 s before the refusal."""
    tokenized, tokenize = list[int](), Engine.tokenize

    def counted(engine: Engine, text: str, *, add_special: bool) -> Sequence[int]:
        tokenized.append(len(text))
        return tokenize(engine, text, add_special=add_special)

    monkeypatch.setattr(Engine, "tokenize", counted)
    async with worker(task="embed", context_length=4) as one:
        tokenized.clear()
        with pytest.raises(ContextOverflow, match="Input 0 has 8000 tokens"):
            await collect_vectors(one.ask(embedding(*["a" * 8000] * 2048)))
    # As many as are tokenized at a time.
    assert len(tokenized) < 40


async def test_unknown_tokens_fail_one_request_alone() -> None:
    async with worker(task="embed", prefill_tokens_per_second=200) as one:
        first = asyncio.ensure_future(collect_vectors(one.ask(embedding("a" * 20))))
        await until(lambda: one.load == (1, 0))
        others = [
            collect_vectors(one.ask(embedding("abc"))),
            collect_vectors(one.ask(embedding((1, 999)))),
        ]
        good, bad = await asyncio.gather(*others, return_exceptions=True)
        assert not isinstance(good, BaseException)
        assert isinstance(bad, InvalidRequest)
        assert (await first).usage.prompt_tokens == 20


async def test_slots_queue_and_deadline() -> None:
    """W20: one at a time; a deadline ends what runs."""
    slow = {"task": "embed", "prefill_tokens_per_second": 20, "max_running": 1}
    async with worker(**slow) as one:
        tasks = [
            asyncio.ensure_future(collect_vectors(one.ask(embedding("abcd")))) for _ in range(2)
        ]
        await until(lambda: one.load == (1, 1))
        await asyncio.gather(*tasks)
        with pytest.raises(DeadlineExceeded):
            await collect_vectors(one.ask(embedding("abcdefgh", deadline_s=0.1)))
        assert one.load == (0, 0)


async def test_a_stop_ends_the_rest() -> None:
    """W8: the batch under way ends first, and the engine is closed after it."""
    async with worker(task="embed", prefill_tokens_per_second=10) as one:
        running = asyncio.ensure_future(collect_vectors(one.ask(embedding("abcd"))))
        await until(lambda: one.load == (1, 0))
        await one.aclose()
        with pytest.raises(Draining):
            await running
        assert one.state == "stopped"


async def test_a_cancelled_call_frees_its_slot_in_the_child() -> None:
    """W9: across the process as well."""
    async with process(task="embed", prefill_tokens_per_second=20, max_running=1) as one:
        task = asyncio.ensure_future(collect_vectors(one.ask(embedding("abcdefgh"))))
        await until(lambda: one.open_streams == 1)
        await asyncio.sleep(0.1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert one.open_streams == 0
        assert (await collect_vectors(one.ask(embedding("a")))).dimensions == 8


async def test_a_child_that_dies_or_hangs_is_told() -> None:
    """W18: by a typed error, and soon."""
    async with process(task="embed", prefill_tokens_per_second=1) as one:
        task = asyncio.ensure_future(collect_vectors(one.ask(embedding("abcdefgh"))))
        await until(lambda: one.open_streams == 1)
        assert one.pid is not None
        os.kill(one.pid, signal.SIGKILL)
        with pytest.raises(WorkerDied, match="SIGKILL"):
            await task
    async with process(task="embed", hang_after=0, hang_s=0.5) as one:
        with pytest.raises(WorkerDied, match="hung"):
            await collect_vectors(one.ask(embedding()))


@pytest.mark.parametrize("place", [worker, process])
async def test_scores_of_a_reranker_are_those_of_its_ranking(place: Any) -> None:
    """W23: in the order of the pairs."""
    documents = ("xyz", "abx", "abc")
    async with place(task="rerank") as one:
        pairs = tuple(("abc", document) for document in documents)
        made, finish = await result(one.ask(ScoreRequest(pairs=pairs)), Scores)
        ranked = await collect_ranking(one.ask(RerankRequest(query="abc", documents=documents)))
        assert dict(enumerate(made.scores)) == {item.index: item.score for item in ranked.ranking}
        assert finish.usage == ranked.usage
    async with place(task="rerank", context_length=8) as one:
        long = ScoreRequest(pairs=(("abc", "x" * 20),))
        with pytest.raises(ContextOverflow):
            await result(one.ask(long), Scores)
        cut = ScoreRequest(pairs=long.pairs, truncate=True)
        assert len((await result(one.ask(cut), Scores))[0].scores) == 1


async def test_scores_of_an_embedding_model_are_cosines() -> None:
    """W23: of the two texts of each pair."""
    async with worker(task="embed") as one:
        pairs = (("hello", "hello"), ("hello", "a river"))
        made, finish = await result(one.ask(ScoreRequest(pairs=pairs)), Scores)
        first, second = (await collect_vectors(one.ask(embedding("hello", "a river")))).vectors
        cosine = sum(a * b for a, b in zip(array("f", first), array("f", second), strict=True))
        assert made.scores == pytest.approx((1.0, cosine), abs=1e-6)
        # Each text is read once.
        assert finish.usage.prompt_tokens == 5 + 7


async def test_a_model_for_text_scores_nothing() -> None:
    """W22: refused by a typed error."""
    async with worker() as one:
        with pytest.raises(Unsupported, match="generates text"):
            await result(one.ask(ScoreRequest(pairs=(("a", "b"),))), Scores)
