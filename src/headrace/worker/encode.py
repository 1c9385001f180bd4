"""Embeddings and rankings on a loaded engine: tokens, context, batches, figures."""

from __future__ import annotations

import asyncio
import logging
import math
import sys
import time
from array import array
from collections.abc import Callable, Sequence
from typing import TypeVar, cast

import msgspec

from headrace.core.errors import (
    ContextOverflow,
    GenerationFailed,
    HeadraceError,
    InvalidRequest,
    from_record,
    to_record,
)
from headrace.core.events import FinishReason
from headrace.core.metrics import InferenceMetrics, Usage
from headrace.core.request import EmbedRequest, EmbedResult, Ranked, RerankRequest, RerankResult
from headrace.engines.base import Embedder, Engine, Pair, Reranker
from headrace.worker.answer import Loaded, check_task, failure_of, too_late
from headrace.worker.batching import Batcher, OnStep
from headrace.worker.meter import Meter, figures, trace_of

log = logging.getLogger("headrace.worker")

Item = TypeVar("Item")
Result = TypeVar("Result")

# Letters or bytes up to which a thread costs more than the work in it.
_SMALL = 4096


async def embed(loaded: Loaded, request: EmbedRequest, on_step: OnStep) -> EmbedResult:
    """Return a vector for each input.

    Raises:
        HeadraceError: with the figures up to then in its `metrics`.
    """
    turn = _Turn(loaded, request, on_step)
    try:
        check_task(loaded, "embed")
        dimensions = _dimensions(loaded, request)
        large = sum(map(len, request.inputs)) > _SMALL
        token_ids = await _made(large, lambda: _token_ids(loaded, request))
        raw = await turn.take(loaded.embeddings, token_ids, sum(map(len, token_ids)))
        large = sum(map(len, raw)) > _SMALL
        vectors = await _made(large, lambda: _shaped(raw, dimensions, request.normalize))
        usage, metrics = turn.finish()
        return EmbedResult(
            vectors=vectors, dimensions=len(vectors[0]) // 4, usage=usage, metrics=metrics
        )
    except Exception as error:  # a library can raise anything; see failure_of
        raise turn.failed(error) from error
    finally:
        turn.close()


async def rerank(loaded: Loaded, request: RerankRequest, on_step: OnStep) -> RerankResult:
    """Put documents in order.

    Raises:
        HeadraceError: with the figures up to then in its `metrics`.
    """
    turn = _Turn(loaded, request, on_step)
    try:
        check_task(loaded, "rerank")
        pairs = await asyncio.to_thread(_pairs, loaded, request)
        tokens = sum(len(pair.token_ids) for pair in pairs)
        scores = await turn.take(loaded.scores, pairs, tokens)
        if not all(map(math.isfinite, scores)):
            raise GenerationFailed("The model gave a score that is no number.")
        ranking = sorted(map(Ranked, range(len(scores)), scores), key=lambda one: -one.score)
        usage, metrics = turn.finish()
        return RerankResult(ranking=tuple(ranking[: request.top_n]), usage=usage, metrics=metrics)
    except Exception as error:  # a library can raise anything; see failure_of
        raise turn.failed(error) from error
    finally:
        turn.close()


async def _made(large: bool, make: Callable[[], Result]) -> Result:
    return await asyncio.to_thread(make) if large else make()


class _Turn:
    """The slot and the figures of one request."""

    def __init__(
        self, loaded: Loaded, request: EmbedRequest | RerankRequest, on_step: OnStep
    ) -> None:
        self._loaded = loaded
        self._request = request
        self._on_step = on_step
        self._meter = Meter(request)
        self._watch = loaded.sampler.watch()
        self._tokens = 0
        self._began: float | None = None
        self._outcome: FinishReason = "cancelled"
        limit = request.deadline_s
        self._deadline = None if limit is None else request.received + limit

    async def take(
        self, batcher: Batcher[Item, Result], items: Sequence[Item], tokens: int
    ) -> list[Result]:
        """Wait for a slot, and have the items computed."""
        self._tokens = tokens
        admission = self._loaded.admission
        entered = await admission.enter(self._deadline)
        try:
            left = None if self._deadline is None else self._deadline - time.monotonic()
            limit = asyncio.timeout(left)
            try:
                async with limit:
                    return await batcher.submit(items, self._step)
            except TimeoutError as error:
                if limit.expired():
                    raise too_late() from error
                raise
        finally:
            admission.leave(entered)

    def finish(self) -> tuple[Usage, InferenceMetrics]:
        """Return the account of a request that is answered."""
        self._outcome = "stop"
        return self._meter.usage, self._metrics()

    def failed(self, error: Exception) -> HeadraceError:
        """Return the error with the figures up to now."""
        self._outcome = "error"
        record = to_record(failure_of(error, self._request.id))
        return from_record(msgspec.structs.replace(record, metrics=self._metrics()))

    def close(self) -> None:
        """Write the record of the request."""
        request = self._request
        record = {"id": request.id, **trace_of(request), **figures(self._metrics())}
        log.info("headrace.request", extra={"data": record})

    def _step(self, done: int, total: int) -> None:
        if self._began is None:
            self._began = time.monotonic()
            self._meter.admitted(self._tokens, 0)
        self._on_step(done, total)

    def _metrics(self) -> InferenceMetrics:
        devices, loaded = self._loaded.sampler.release(self._watch), self._loaded
        taken_ms = None if self._began is None else (time.monotonic() - self._began) * 1000
        return msgspec.structs.replace(
            self._meter.finish(self._outcome, devices),
            prefill_ms=taken_ms,
            prefill_tokens_per_second=self._tokens / taken_ms * 1000 if taken_ms else None,
            engine=loaded.engine_name,
            model=loaded.name,
            worker=loaded.name,
        )


def _dimensions(loaded: Loaded, request: EmbedRequest) -> int | None:
    most, wanted = loaded.engine.facts.capabilities.dimensions, request.dimensions
    if wanted is not None and most is not None and wanted > most:
        raise InvalidRequest(
            f"dimensions is {wanted}, and {loaded.name} has {most}.", param="dimensions"
        )
    return wanted


def _token_ids(loaded: Loaded, request: EmbedRequest) -> list[tuple[int, ...]]:
    engine = cast("Embedder", loaded.engine)
    most = engine.facts.context_length
    made: list[tuple[int, ...]] = []
    texts = [given for given in request.inputs if isinstance(given, str)]
    tokenized = iter(engine.tokenize_all(texts))
    for place, given in enumerate(request.inputs):
        is_text = isinstance(given, str)
        ids = tuple(next(tokenized)) if is_text else given
        if not ids:
            raise InvalidRequest(f"Input {place} has no tokens.", param="input")
        if len(ids) > most and not request.truncate:
            raise ContextOverflow(
                f"Input {place} has {len(ids)} tokens and the context length of {loaded.name} is "
                f"{most}; `truncate` would cut it.",
                param="input",
            )
        if len(ids) > most:
            ids = _cut(engine, given, ids, most) if is_text else ids[:most]
        made.append(ids)
    return made


def _cut(engine: Engine, text: str, ids: tuple[int, ...], most: int) -> tuple[int, ...]:
    """Shorten a text's tokens, and leave what the tokenizer puts around them."""
    plain = tuple(engine.tokenize(text, add_special=False))
    around = len(ids) - len(plain)
    before = next((n for n in range(around + 1) if ids[n : n + len(plain)] == plain), around)
    after = ids[before + len(plain) :]
    return ids[: most - len(after)] + after


def _pairs(loaded: Loaded, request: RerankRequest) -> list[Pair]:
    engine, most = cast("Reranker", loaded.engine), loaded.engine.facts.context_length
    made: list[Pair] = []
    for place, document in enumerate(request.documents):
        pair = engine.pair(request.query, document)
        if len(pair.token_ids) > most:
            # The last token closes the sequence: it stays.
            short = pair.token_ids[: most - 1] + pair.token_ids[-1:]
            if not request.truncate or pair.second >= most - 1:
                raise ContextOverflow(
                    f"The query and document {place} have {len(pair.token_ids)} tokens and the "
                    f"context length of {loaded.name} is {most}.",
                    param="documents" if pair.second < most - 1 else "query",
                )
            pair = Pair(short, pair.second)
        made.append(pair)
    return made


def _shaped(raw: Sequence[bytes], dimensions: int | None, normalize: bool) -> tuple[bytes, ...]:
    cut = raw if dimensions is None else [vector[: 4 * dimensions] for vector in raw]
    return tuple(map(_normal, cut, _lengths(cut)) if normalize else cut)


def _lengths(vectors: Sequence[bytes]) -> list[float]:
    # Where the engine has brought numpy, which is no dependency here, one call does for all.
    if (numpy := sys.modules.get("numpy")) is None:
        return [math.hypot(*_floats(vector)) for vector in vectors]
    rows = numpy.frombuffer(b"".join(vectors), "<f4").reshape(len(vectors), -1)
    return numpy.sqrt(numpy.einsum("ij,ij->i", rows, rows, dtype="f8")).tolist()


def _normal(vector: bytes, length: float) -> bytes:
    if not math.isfinite(length):
        raise GenerationFailed("The model gave a vector that is not made of numbers.")
    # What the model has scaled itself stays as it is.
    if length == 0.0 or abs(length - 1.0) < 1e-6:
        return vector
    return _bytes(array("f", [value / length for value in _floats(vector)]))


def _floats(vector: bytes) -> array[float]:
    values = array("f", vector)
    if sys.byteorder == "big":
        values.byteswap()
    return values


def _bytes(values: array[float]) -> bytes:
    if sys.byteorder == "big":
        values.byteswap()
    return values.tobytes()
