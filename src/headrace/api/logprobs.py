"""Log probabilities of tokens in OpenAI's form."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from headrace.core.events import TokenLogprob, TopLogprob


class TopTokenBody(msgspec.Struct, frozen=True):
    """A candidate for a position."""

    token: str
    logprob: float
    bytes: list[int]


class TokenBody(msgspec.Struct, frozen=True):
    """A chosen token, and the candidates beside it."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopTokenBody]


def token_bodies(tokens: Sequence[TokenLogprob]) -> list[TokenBody]:
    """Return tokens with their log probabilities."""
    return [
        TokenBody(_text(token.data), token.logprob, list(token.data), [*map(_top, token.top)])
        for token in tokens
    ]


def _top(top: TopLogprob) -> TopTokenBody:
    return TopTokenBody(_text(top.data), top.logprob, list(top.data))


def _text(data: bytes) -> str:
    return data.decode("utf-8", "replace")
