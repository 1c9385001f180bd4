"""Embeddings, rankings and scores at a local engine: tokens, context, batches."""

from __future__ import annotations

import asyncio
import math
import operator
import sys
from collections.abc import AsyncGenerator, Callable, Collection, Iterator, Sequence
from contextlib import aclosing
from typing import Any, Generic, TypeVar, cast

from headrace.core.errors import ContextOverflow, GenerationFailed, InvalidRequest
from headrace.core.events import (
    Event,
    Progress,
    Ranked,
    Ranking,
    Scores,
    Vectors,
    bytes_of,
    floats_of,
)
from headrace.core.request import EmbedRequest, RerankRequest, ScoreRequest
from headrace.core.stream import Mailbox
from headrace.engines.abilities import Piecewise, longest_text
from headrace.engines.base import Embedder, Engine, EngineFacts, Pair, Reranker
from headrace.worker.batching import Batcher
from headrace.worker.generate import Loaded
from headrace.worker.tokens import Gone, Limit, tokenized
from headrace.worker.turn import Answers, Turn, until_left

Item = TypeVar("Item")
Result = TypeVar("Result")

# Characters or bytes up to which a thread costs more than the work.
_SMALL = 4096
# Characters of the texts that a tokenizer gets at a time.
_GROUP = 1 << 18


async def embed(loaded: Loaded, request: EmbedRequest) -> AsyncGenerator[Event, None]:
    """Yield progress, a vector for each input, and the Finish.

    Raises:
        HeadraceError: with the figures up to then in its `metrics`.
    """
    with Turn(loaded, request) as turn:
        turn.require_task()
        dimensions = _dimensions(loaded, request)
        large = sum(map(len, request.inputs)) > _SMALL
        with until_left() as gone:
            token_ids = await turn.within(_run(large, lambda: _token_ids(loaded, request, gone)))
        batch = _Batch(turn, loaded.embeddings, token_ids, sum(map(len, token_ids)))
        async with aclosing(batch.steps()) as steps:
            async for progress in steps:
                yield progress
        raw = batch.results
        large = sum(map(len, raw)) > _SMALL
        yield Vectors(await _run(large, lambda: _shaped(raw, dimensions, request.normalize)))
        yield turn.finish()


async def rerank(loaded: Loaded, request: RerankRequest) -> AsyncGenerator[Event, None]:
    """Yield progress, the documents in order, and the Finish.

    Raises:
        HeadraceError: with the figures up to then in its `metrics`.
    """
    with Turn(loaded, request) as turn:
        turn.require_task()
        texts = [(request.query, document) for document in request.documents]
        batch = await _paired(turn, texts, truncate=request.truncate)
        async with aclosing(batch.steps()) as steps:
            async for progress in steps:
                yield progress
        scores = _finite(batch.results)
        ranking = sorted(map(Ranked, range(len(scores)), scores), key=lambda item: -item.score)
        yield Ranking(tuple(ranking[: request.top_n]))
        yield turn.finish()


async def score(loaded: Loaded, request: ScoreRequest) -> AsyncGenerator[Event, None]:
    """Yield progress, the score of each pair, and the Finish.

    Raises:
        HeadraceError: with the figures up to then in its `metrics`.
    """
    embeds = "embed" in loaded.facts.capabilities.tasks
    with Turn(loaded, request) as turn:
        if embeds:
            batch = await _embedded(turn, request)
        else:
            turn.require_task()
            batch = await _paired(turn, request.pairs, truncate=request.truncate)
        async with aclosing(batch.steps()) as steps:
            async for progress in steps:
                yield progress
        if embeds:
            vectors = dict(zip(_texts(request), batch.results, strict=True))
            scores = await asyncio.to_thread(_cosines, request, vectors)
        else:
            scores = _finite(batch.results)
        yield Scores(tuple(scores))
        yield turn.finish()


async def _run(large: bool, make: Callable[[], Result]) -> Result:
    return await asyncio.to_thread(make) if large else make()


class _Batch(Generic[Item, Result]):
    """The items of one request in a batcher."""

    def __init__(
        self,
        turn: Turn[Loaded, Any],
        batcher: Batcher[Item, Result],
        items: Sequence[Item],
        tokens: int,
    ) -> None:
        self.results: list[Result] = []
        self._turn = turn
        self._batcher = batcher
        self._items = items
        self._tokens = tokens

    async def steps(self) -> AsyncGenerator[Progress, None]:
        """Wait for a slot, and yield the progress until all items are done."""
        turn, mailbox = self._turn, Mailbox[Progress | None]()
        await turn.take_slot()
        work = asyncio.ensure_future(
            self._batcher.submit(
                self._items, lambda done, total: mailbox.put(Progress("prefill", done, total))
            )
        )
        work.add_done_callback(lambda _: mailbox.put(None))
        try:
            while (progress := await turn.within(mailbox.get())) is not None:
                turn.meter.admitted(self._tokens, 0, decodes=False)
                yield progress
            self.results = work.result()
        finally:
            if not work.cancel() and not work.cancelled():
                work.exception()
            turn.leave_slot()


ANSWERS: Answers = {EmbedRequest: embed, RerankRequest: rerank, ScoreRequest: score}


def _dimensions(loaded: Loaded, request: EmbedRequest) -> int | None:
    most, wanted = loaded.engine.facts.capabilities.dimensions, request.dimensions
    if wanted is not None and most is not None and wanted > most:
        raise InvalidRequest(
            f"dimensions is {wanted}, and {loaded.name} has {most}.", param="dimensions"
        )
    return wanted


def _token_ids(loaded: Loaded, request: EmbedRequest, gone: Gone) -> list[tuple[int, ...]]:
    engine = cast("Embedder", loaded.engine)
    most = engine.facts.context_length
    inputs = loaded.prompts.applied(request).inputs
    results: list[tuple[int, ...]] = []
    texts = [text for text in inputs if isinstance(text, str)]
    # As they are needed: what follows a text that is too long is not tokenized.
    tokens = _tokenized(engine, texts, gone, truncate=request.truncate)
    for place, text in enumerate(inputs):
        is_text = isinstance(text, str)
        ids = tuple(next(tokens)) if is_text else text
        if not ids:
            raise InvalidRequest(f"Input {place} has no tokens.", param="input")
        if len(ids) > most and not request.truncate:
            raise ContextOverflow(
                f"Input {place} has {len(ids)} tokens and the context length of {loaded.name} is "
                f"{most}; `truncate` would cut it.",
                param="input",
            )
        if len(ids) > most:
            short = _shortened(text, engine.facts) if is_text else ""
            ids = _cut(engine, short, ids, most) if is_text else ids[:most]
        results.append(ids)
    return results


def _tokenized(
    engine: Embedder, texts: Sequence[str], gone: Gone, *, truncate: bool
) -> Iterator[Sequence[int]]:
    """Yield the tokens of each text, and refuse what cannot fit before it has any."""
    limit = Limit(gone, None if truncate else engine.facts.context_length, "input")
    if truncate:
        texts = [_shortened(text, engine.facts) for text in texts]
    if isinstance(engine, Piecewise):
        yield from (tokenized(engine, text, limit) for text in texts)
        return
    for text in texts:
        limit.check_length(text, engine)
    for some in _groups(texts):
        limit.check(0)
        yield from engine.tokenize_all(some)


def _shortened(text: str, facts: EngineFacts) -> str:
    """Return as much of a text as has all tokens that fit, and often more."""
    most = longest_text(facts) // 4
    if facts.max_token_bytes is not None:
        most = min(most, facts.context_length * facts.max_token_bytes)
    return text[:most]


def _groups(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    """Yield the texts in order, so many at a time as take a tokenizer a short time."""
    start = size = 0
    for place, text in enumerate(texts):
        if size > _GROUP:
            yield texts[start:place]
            start, size = place, 0
        size += len(text)
    yield texts[start:]


def _cut(engine: Engine, text: str, ids: tuple[int, ...], most: int) -> tuple[int, ...]:
    """Cut the tokens of a text; the tokens that the tokenizer puts around them are kept."""
    plain = tuple(engine.tokenize(text, add_special=False))
    around = len(ids) - len(plain)
    before = next((n for n in range(around + 1) if ids[n : n + len(plain)] == plain), around)
    after = ids[before + len(plain) :]
    return ids[: most - len(after)] + after


def _texts(request: ScoreRequest) -> tuple[str, ...]:
    """Return the texts of all pairs, each once."""
    return tuple(dict.fromkeys(text for pair in request.pairs for text in pair))


async def _embedded(turn: Turn[Loaded, ScoreRequest], request: ScoreRequest) -> _Batch[Any, Any]:
    embedding = EmbedRequest(inputs=_texts(request), truncate=request.truncate)
    with until_left() as gone:
        token_ids = await turn.within(asyncio.to_thread(_token_ids, turn.served, embedding, gone))
    return _Batch(turn, turn.served.embeddings, token_ids, sum(map(len, token_ids)))


async def _paired(
    turn: Turn[Loaded, Any], texts: Sequence[tuple[str, str]], *, truncate: bool
) -> _Batch[Any, Any]:
    with until_left() as gone:
        work = asyncio.to_thread(_pairs, turn.served, texts, gone, truncate=truncate)
        pairs = await turn.within(work)
    return _Batch(turn, turn.served.scores, pairs, sum(len(pair.token_ids) for pair in pairs))


def _pairs(
    loaded: Loaded, texts: Sequence[tuple[str, str]], gone: Gone, *, truncate: bool
) -> list[Pair]:
    engine, most = cast("Reranker", loaded.engine), loaded.engine.facts.context_length
    pairs: list[Pair] = []
    _check_queries(engine, {query for query, _ in texts}, gone)
    limit = Limit(gone, None if truncate else most, "documents")
    for place, (query, whole) in enumerate(texts):
        limit.check(0)
        document = _shortened(whole, engine.facts) if truncate else whole
        limit.check_length(document, engine)
        pair = engine.pair(query, document)
        if len(pair.token_ids) > most:
            if not truncate or pair.second >= most - 1:
                raise ContextOverflow(
                    f"The query and document {place} have {len(pair.token_ids)} tokens and the "
                    f"context length of {loaded.name} is {most}.",
                    param="documents" if pair.second < most - 1 else "query",
                )
            pair = _cut_pair(engine, pair)
        pairs.append(pair)
    return pairs


def _cut_pair(engine: Reranker, pair: Pair) -> Pair:
    """Return a pair with as much of its document as fits; the query does.

    The last token closes the sequence, and is kept.
    """
    most = engine.facts.context_length
    if pair.texts is None:
        return Pair(pair.token_ids[: most - 1] + pair.token_ids[-1:], pair.second)
    # The text of token ids can become more tokens than these were.
    for spare in (1, 8, 64, most - pair.second):
        document = engine.detokenize(pair.token_ids[pair.second : most - spare])
        short = engine.pair(pair.texts[0], document)
        if len(short.token_ids) <= most:
            break
    return short


def _check_queries(engine: Reranker, queries: Collection[str], gone: Gone) -> None:
    """Check that each query leaves place for a document, before it is joined with all of them.

    Raises:
        ContextOverflow, InvalidRequest, Draining: as `tokenized`.
    """
    limit = Limit(gone, engine.facts.context_length, "query")
    for query in queries:
        tokens = len(tokenized(engine, query, limit, add_special=False))
        if tokens >= engine.facts.context_length - 1:
            raise ContextOverflow(
                f"The query has {tokens} tokens, and the context length for it and a document is "
                f"{engine.facts.context_length}.",
                param="query",
            )


def _finite(scores: Sequence[float]) -> Sequence[float]:
    if not all(map(math.isfinite, scores)):
        raise GenerationFailed("The model gave a score that is not a number.")
    return scores


def _cosines(request: ScoreRequest, vectors: dict[str, bytes]) -> list[float]:
    units = {text: floats_of(normalized(vector)) for text, vector in vectors.items()}
    return [sum(map(operator.mul, units[first], units[second])) for first, second in request.pairs]


def _shaped(raw: Sequence[bytes], dimensions: int | None, normalize: bool) -> tuple[bytes, ...]:
    cut = raw if dimensions is None else [vector[: 4 * dimensions] for vector in raw]
    return tuple(map(_normal, cut, _lengths(cut)) if normalize else cut)


def _lengths(vectors: Sequence[bytes]) -> list[float]:
    # numpy is not a dependency, but if the engine uses it, one call is enough for all vectors.
    if (numpy := sys.modules.get("numpy")) is None:
        return [math.hypot(*floats_of(vector)) for vector in vectors]
    rows = numpy.frombuffer(b"".join(vectors), "<f4").reshape(len(vectors), -1)
    return numpy.sqrt(numpy.einsum("ij,ij->i", rows, rows, dtype="f8")).tolist()


def _normal(vector: bytes, length: float) -> bytes:
    if not math.isfinite(length):
        raise GenerationFailed("The model gave a vector that is not made of numbers.")
    # A vector that the model has scaled is kept unchanged.
    if length == 0.0 or abs(length - 1.0) < 1e-6:
        return vector
    return bytes_of([value / length for value in floats_of(vector)])


def normalized(vector: bytes) -> bytes:
    """Return a vector scaled to length 1; a zero vector is returned unchanged.

    Raises:
        GenerationFailed: a number in it is not finite.
    """
    return _normal(vector, math.hypot(*floats_of(vector)))
