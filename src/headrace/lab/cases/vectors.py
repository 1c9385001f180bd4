"""Vectors and rankings: the tasks `embed` and `rerank`."""

from __future__ import annotations

import asyncio
import math

from headrace.core.errors import ContextOverflow, InvalidRequest, RequestError, Unsupported
from headrace.core.events import EmbedResult, RerankResult, floats_of
from headrace.core.request import CountRequest, EmbedRequest, RerankRequest
from headrace.core.stream import collect_count, collect_ranking, collect_vectors
from headrace.lab.cases.case import case
from headrace.lab.cases.subject import Subject, check

TEXTS = (
    "The Danube flows through Vienna, Budapest and Belgrade.",
    "A short one.",
    "Rivers carry water from the mountains to the sea, and with it sand, leaves and stories.",
    "数えきれない川が海へ流れる。",
    "🙂 e\u0301",
)
QUERY = "Which river flows through Vienna?"
CLOSE = 1e-4


def _distance(first: bytes, second: bytes) -> float:
    pairs = zip(floats_of(first), floats_of(second), strict=True)
    return max(abs(left - right) for left, right in pairs)


async def _embed(subject: Subject, *inputs: str | tuple[int, ...], **given: object) -> EmbedResult:
    request = EmbedRequest(inputs=inputs, **given)  # type: ignore[arg-type]
    return await collect_vectors(subject.backend.ask(request))


async def _count(subject: Subject, text: str) -> int:
    counted = await collect_count(subject.backend.ask(CountRequest(text=text, add_special=True)))
    return counted.count


@case("W23", task="embed")
async def vectors_alone_and_together(subject: Subject) -> None:
    """A text has the same vector alone, in a batch and among others, and the order is kept."""
    alone = [(await _embed(subject, text)).vectors[0] for text in TEXTS]
    batch = (await _embed(subject, *TEXTS)).vectors
    back = (await _embed(subject, *reversed(TEXTS))).vectors[::-1]
    many = await asyncio.gather(*(_embed(subject, text) for text in TEXTS * 4))
    crowd = [result.vectors[0] for result in many]
    check(len(batch) == len(TEXTS), f"{len(TEXTS)} texts have {len(batch)} vectors.")
    for number, vector in enumerate(alone):
        others = (batch[number], back[number], *crowd[number :: len(TEXTS)])
        far = max(_distance(vector, other) for other in others)
        check(far <= CLOSE, f"{TEXTS[number]!r} is {far:g} away from itself.")
    far = min(_distance(alone[0], other) for other in alone[1:])
    check(far > CLOSE, "Texts that differ have the same vector.")


@case("W23", task="embed")
async def vectors_have_their_shape(subject: Subject) -> None:
    """Dimensions are those declared; normalised, the length is 1; fewer dimensions or a refusal."""
    declared = subject.capabilities.dimensions
    result = await _embed(subject, *TEXTS)
    sizes = {len(vector) // 4 for vector in result.vectors}
    check(sizes == {result.dimensions}, f"Vectors have {sizes} numbers, not {result.dimensions}.")
    check(declared == result.dimensions, f"{declared} are declared, {result.dimensions} given.")
    for vector in result.vectors:
        length = math.sqrt(sum(number * number for number in floats_of(vector)))
        check(abs(length - 1) < 1e-3, f"Normalised, a vector has the length {length}.")
        check(all(map(math.isfinite, floats_of(vector))), "A number is not finite.")
    await _fewer(subject, result)


async def _fewer(subject: Subject, whole: EmbedResult) -> None:
    wanted = max(1, whole.dimensions // 2)
    try:
        less = await _embed(subject, TEXTS[0], dimensions=wanted)
    except (Unsupported, InvalidRequest) as error:
        check(error.param == "dimensions", f"It names {error.param}, not dimensions.")
        return
    check(len(less.vectors[0]) == wanted * 4, f"{wanted} dimensions were requested.")
    check(less.dimensions == wanted, f"It reports {less.dimensions} dimensions.")


@case("W15 W23", task="embed")
async def embedding_usage(subject: Subject) -> None:
    """Usage is the tokenizer's count of all inputs; token ids have the vector of their text."""
    counts = [await _count(subject, text) for text in TEXTS]
    result = await _embed(subject, *TEXTS)
    tokens = result.usage.prompt_tokens
    if not subject.is_remote:
        check(tokens == sum(counts), f"Usage has {tokens} tokens of {sum(counts)}.")
        ids = await subject.tokens(TEXTS[0], special=True)
        both = await _embed(subject, TEXTS[0], ids)
        far = _distance(*both.vectors)
        check(far <= CLOSE, f"As token ids a text is {far:g} away from itself.")
    check(tokens > 0, "Usage has no tokens.")
    check(result.usage.completion_tokens == 0, "An embedding has no answer.")
    check(result.metrics.usage == result.usage, "The usage of the figures is another.")
    check(result.metrics.total_ms > 0, "It took no time.")
    check(result.metrics.engine == subject.engine, f"{result.metrics.engine!r} made it.")


@case("W6 W23", task="embed")
async def embedding_too_long(subject: Subject) -> None:
    """A text over the context is refused, or cut if that is requested; the next one is served."""
    limit = subject.info.context_length
    if limit is None:
        return
    text = "river " * limit * 2
    try:
        await _embed(subject, text)
    except ContextOverflow:
        cut = await _embed(subject, text, truncate=True)
        used = cut.usage.prompt_tokens
        check(used <= limit, f"Cut, it has {used} tokens of {limit}.")
    except RequestError as error:
        check(subject.is_remote, f"{type(error).__name__}, not ContextOverflow.")
    else:
        check(False, "A text over the context is embedded.")
    check((await _embed(subject, TEXTS[0])).vectors, "Afterwards nothing is embedded.")


async def _rerank(subject: Subject, *documents: str, **given: object) -> RerankResult:
    request = RerankRequest(query=QUERY, documents=documents, **given)  # type: ignore[arg-type]
    return await collect_ranking(subject.backend.ask(request))


@case("W23", task="rerank")
async def ranking(subject: Subject) -> None:
    """All documents are ranked, best first, with scores that do not depend on the others."""
    result = await _rerank(subject, *TEXTS)
    scores = {ranked.index: ranked.score for ranked in result.ranking}
    order = [ranked.score for ranked in result.ranking]
    check(sorted(scores) == [*range(len(TEXTS))], f"{sorted(scores)} are ranked.")
    check(order == sorted(order, reverse=True), f"The best is not first: {order}.")
    back = await _rerank(subject, *reversed(TEXTS))
    for ranked in back.ranking:
        far = abs(ranked.score - scores[len(TEXTS) - 1 - ranked.index])
        check(far < 1e-3, f"In another order a score differs by {far:g}.")
    alone = (await _rerank(subject, TEXTS[0])).ranking[0].score
    check(abs(alone - scores[0]) < 1e-3, f"Alone the score is {alone}, not {scores[0]}.")


@case("W15 W23", task="rerank")
async def ranking_of_the_best(subject: Subject) -> None:
    """`top_n` keeps the best; usage and figures are there; many at once are ranked alike."""
    whole = await _rerank(subject, *TEXTS)
    best = await _rerank(subject, *TEXTS, top_n=2)
    indices = [ranked.index for ranked in whole.ranking[:2]]
    check([ranked.index for ranked in best.ranking] == indices, "top_n does not keep the best.")
    check(whole.usage.prompt_tokens > len(TEXTS), f"Usage is {whole.usage}.")
    check(whole.metrics.usage == whole.usage, "The usage of the figures is another.")
    check(whole.metrics.engine == subject.engine, f"{whole.metrics.engine!r} made it.")
    many = await asyncio.gather(*(_rerank(subject, *TEXTS) for _ in range(8)))
    for result in many:
        order = [ranked.index for ranked in result.ranking]
        check(order == [ranked.index for ranked in whole.ranking], f"Among others: {order}.")


CASES = (
    vectors_alone_and_together,
    vectors_have_their_shape,
    embedding_usage,
    embedding_too_long,
    ranking,
    ranking_of_the_best,
)
