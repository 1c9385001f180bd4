"""POST /v1/score, compatible with vLLM: scores of pairs of texts."""

from __future__ import annotations

import time
from typing import Annotated, ClassVar, Literal

import msgspec
from msgspec import Meta

from headrace.api import fields, limits
from headrace.api.answers import ReadUsage
from headrace.api.exchange import Call, Exchange, Service
from headrace.api.fields import Body, Peers
from headrace.api.limits import ApiSettings
from headrace.api.wire import KeepAlive, ModelName, request_fields, truncates
from headrace.core import events
from headrace.core.errors import InvalidRequest
from headrace.core.metrics import InferenceMetrics
from headrace.core.request import ScoreRequest
from headrace.core.stream import result

_Text = Annotated[str, Meta(min_length=1)]
_Texts = _Text | Annotated[list[_Text], Meta(min_length=1, max_length=limits.MAX_DOCUMENTS)]


class ScoreBody(Body, frozen=True, kw_only=True):
    """Two texts, one text and a list, or two lists of equal length, which are scored in pairs.

    Texts that do not fit into the context are refused; with `truncate` they are cut, or with vLLM's
    `truncate_prompt_tokens` of -1.
    """

    text_1: _Texts
    text_2: _Texts
    model: ModelName | None = None
    truncate: bool | None = None
    truncate_prompt_tokens: int | None = None
    keep_alive: KeepAlive | None = None

    peers: ClassVar[Peers] = fields.SCORE


class PairScore(msgspec.Struct, frozen=True, kw_only=True):
    """The score of one pair; `index` is its position in the request."""

    index: int
    object: Literal["score"] = "score"
    score: float


class ScoreList(msgspec.Struct, frozen=True, kw_only=True):
    """A score for each pair, in order; a higher score is better."""

    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[PairScore]
    usage: ReadUsage
    metrics: InferenceMetrics


_DECODER = msgspec.json.Decoder(ScoreBody)


async def score(service: Service, exchange: Exchange) -> None:
    """Score pairs of texts."""
    wire = await exchange.read(_DECODER)
    request = to_request(wire, exchange.settings, exchange.call)
    made, finish = await exchange.unless_gone(result(service.backend.ask(request), events.Scores))
    tokens = finish.usage.prompt_tokens
    scores = ScoreList(
        id=exchange.call.id,
        created=int(time.time()),
        model=service.model_name(wire.model),
        data=[PairScore(index=index, score=value) for index, value in enumerate(made.scores)],
        usage=ReadUsage(tokens, tokens),
        metrics=finish.metrics,
    )
    await exchange.answer(scores, finish.metrics)


def to_request(wire: ScoreBody, settings: ApiSettings, call: Call) -> ScoreRequest:
    """Build the core request.

    Raises:
        InvalidRequest: two lists have different lengths, text_1 is a list and text_2 is not, or
            the pairs are too long.
    """
    first = [wire.text_1] if isinstance(wire.text_1, str) else wire.text_1
    second = [wire.text_2] if isinstance(wire.text_2, str) else wire.text_2
    if len(first) == 1:
        limits.check_pairs(first[0], second, "text_1")
        first = first * len(second)
    if len(first) != len(second):
        raise InvalidRequest(
            f"text_1 has {len(first)} texts and text_2 {len(second)}.", param="text_2"
        )
    return ScoreRequest(
        pairs=tuple(zip(first, second, strict=True)),
        truncate=bool(truncates(wire)),
        **request_fields(wire, settings, call),
    )
