"""Parts of answers that several routes share."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from headrace.core.events import PromptToken
from headrace.core.metrics import InferenceMetrics, Usage


class PromptCandidate(msgspec.Struct, frozen=True):
    """A token at a place of the prompt; `rank` counts from 1, the likeliest."""

    logprob: float
    rank: int | None
    decoded_token: str


PromptPlace = dict[str, PromptCandidate] | None
"""By the id of the token: that of the prompt and the likeliest ones. The first place has none."""


class PromptDetails(msgspec.Struct, frozen=True):
    """Tokens of the prompt that were taken from a cache."""

    cached_tokens: int


class CompletionDetails(msgspec.Struct, frozen=True, omit_defaults=True):
    """Tokens of the completion that were thinking, and those of drafts."""

    reasoning_tokens: int
    accepted_prediction_tokens: int = 0
    rejected_prediction_tokens: int = 0


class UsageBody(msgspec.Struct, frozen=True):
    """OpenAI's `usage`."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    completion_tokens_details: CompletionDetails


class ReadUsage(msgspec.Struct, frozen=True):
    """Tokens that were read; nothing was generated."""

    prompt_tokens: int
    total_tokens: int


class AnswerHead(msgspec.Struct, frozen=True, kw_only=True):
    """The head of every generated answer."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    usage: UsageBody | None
    metrics: InferenceMetrics


class ChunkHead(msgspec.Struct, frozen=True, kw_only=True):
    """The head of every streamed chunk; `metrics` is on the last one alone."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    usage: UsageBody | None = None
    metrics: InferenceMetrics | None = None


def prompt_places(tokens: Sequence[PromptToken]) -> list[PromptPlace]:
    """Return the log probabilities of a prompt as vLLM has them."""
    return [_place(token) for token in tokens]


def _place(token: PromptToken) -> PromptPlace:
    if token.logprob is None:
        return None
    own = PromptCandidate(token.logprob, token.rank or None, token.data.decode(errors="replace"))
    others = {
        str(top.token_id): PromptCandidate(top.logprob, rank, top.data.decode(errors="replace"))
        for rank, top in enumerate(token.top, 1)
    }
    return {str(token.token_id): own, **others}


def usage_body(usage: Usage) -> UsageBody:
    """Return OpenAI's `usage`."""
    return UsageBody(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        total_tokens=usage.total_tokens,
        prompt_tokens_details=PromptDetails(usage.cached_tokens),
        completion_tokens_details=CompletionDetails(
            usage.reasoning_tokens,
            usage.accepted_tokens,
            max(0, usage.drafted_tokens - usage.accepted_tokens),
        ),
    )
