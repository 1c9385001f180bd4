"""The events of a stream: progress, the result, and one Finish at its end."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable
from typing import Literal

import msgspec

from headrace.core.metrics import InferenceMetrics, Usage

FinishReason = Literal["stop", "length", "tool_calls", "content_filter", "cancelled", "error"]
"""Why a choice ended. `cancelled` and `error` appear in figures and logs, not on a Finish."""

Stage = Literal["queued", "loading", "prefill"]

MAX_TOKEN_IDS = 1 << 20
"""Ids of counted tokens: whatever reads or writes them stops the answers of others meanwhile."""


class TopLogprob(msgspec.Struct, frozen=True, array_like=True):
    """One candidate for a position; `data` is the token's bytes, natural logarithm."""

    token_id: int
    data: bytes
    logprob: float


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """The chosen token and the best candidates beside it, most likely first."""

    token_id: int
    data: bytes
    logprob: float
    top: tuple[TopLogprob, ...] = ()


class PromptToken(msgspec.Struct, frozen=True, array_like=True):
    """A token of a prompt, and the best candidates for its place, most likely first.

    `logprob` is None for the first token, which nothing precedes. `rank` is its place among all
    tokens, from 1; 0 where the engine does not report it.
    """

    token_id: int
    data: bytes
    logprob: float | None = None
    top: tuple[TopLogprob, ...] = ()
    rank: int = 0


class Delta(msgspec.Struct, frozen=True, array_like=True, tag="d"):
    """An addition to choice `index`; never cumulative.

    `token_ids` are the tokens behind it. While text is held back (a stop string may still
    match, a character is incomplete) a delta can carry tokens and no text.
    """

    text: str = ""
    token_ids: tuple[int, ...] = ()
    index: int = 0
    reasoning: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()


class PromptTokens(msgspec.Struct, frozen=True, array_like=True, tag="o"):
    """The tokens of the prompt of choice `index`, before its first delta.

    `text` is what is put before the answer, empty without an echo.
    """

    tokens: tuple[PromptToken, ...]
    text: str = ""
    index: int = 0


class ToolCallDelta(msgspec.Struct, frozen=True, array_like=True, tag="k"):
    """An addition to call `call` of choice `index`; calls count from 0.

    The first of a call has its id and name, and each a further part of the text of its arguments,
    which is a JSON object when the call is complete. Its tokens are those of the Delta before it.
    With `cut` the call ended before it was complete, and is none: `cut` is its text, which is
    content of a whole answer.
    """

    call: int = 0
    id: str = ""
    name: str = ""
    arguments: str = ""
    index: int = 0
    cut: str = ""


class Progress(msgspec.Struct, frozen=True, array_like=True, tag="p"):
    """The request is alive but has no token yet; `done` of `total` in tokens or bytes.

    The total of `prefill` is the number of the prompt's tokens, an estimate with an upstream.
    """

    stage: Stage
    done: int = 0
    total: int = 0


class ChoicesLeft(msgspec.Struct, frozen=True, array_like=True, tag="l"):
    """One of several choices has ended; `count` have not. The pool gives its slot to others.

    It is not passed on to clients.
    """

    count: int


class Vectors(msgspec.Struct, frozen=True, array_like=True, tag="v"):
    """One vector for each input, in order: little-endian 32-bit floats."""

    vectors: tuple[bytes, ...]

    @property
    def dimensions(self) -> int:
        """How many numbers each vector has."""
        return len(self.vectors[0]) // 4


def floats_of(vector: bytes) -> array[float]:
    """Return the numbers of a vector."""
    values = array("f", vector)
    if sys.byteorder == "big":
        values.byteswap()
    return values


def bytes_of(values: Iterable[float]) -> bytes:
    """Return numbers as a vector: little-endian 32-bit floats on any machine."""
    vector = array("f", values)
    if sys.byteorder == "big":
        vector.byteswap()
    return vector.tobytes()


class Ranked(msgspec.Struct, frozen=True, array_like=True):
    """How well document `index` answers the query; a higher score is better."""

    index: int
    score: float


class Ranking(msgspec.Struct, frozen=True, array_like=True, tag="r"):
    """The best documents, best first."""

    ranking: tuple[Ranked, ...]


class Scores(msgspec.Struct, frozen=True, array_like=True, tag="s"):
    """One score for each pair, in order; a higher score is better."""

    scores: tuple[float, ...]


class TokenCount(msgspec.Struct, frozen=True, array_like=True, kw_only=True, tag="c"):
    """A number of tokens, and their ids if the engine has them. `estimated` marks an estimate.

    Of more than `MAX_TOKEN_IDS` tokens there are no ids.
    """

    count: int
    token_ids: tuple[int, ...] | None = None
    estimated: bool = False


class Text(msgspec.Struct, frozen=True, array_like=True, tag="t"):
    """The text of token ids."""

    text: str


class Finish(msgspec.Struct, frozen=True, array_like=True, tag="f"):
    """The last event of a stream that ended well: one reason for each choice, in order.

    `stops` are the stop strings that ended the choices, None where none did; () if none did at all.
    """

    finish_reasons: tuple[FinishReason, ...]
    usage: Usage
    metrics: InferenceMetrics
    stops: tuple[str | None, ...] = ()

    @property
    def finish_reason(self) -> FinishReason:
        """The reason of the first choice."""
        return self.finish_reasons[0]


Event = (
    Progress
    | PromptTokens
    | Delta
    | ToolCallDelta
    | ChoicesLeft
    | Vectors
    | Ranking
    | Scores
    | TokenCount
    | Text
    | Finish
)
"""`Progress*`, then deltas or one event with the result, then one Finish."""


class ToolCall(msgspec.Struct, frozen=True, omit_defaults=True):
    """A call that a model has made. `arguments` is the text of a JSON object."""

    id: str
    name: str
    arguments: str


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """One complete answer. `stop` is the stop string that ended it.

    `prompt_tokens` are those of the prompt, if they were asked for.
    """

    text: str
    finish_reason: FinishReason
    stop: str | None = None
    index: int = 0
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_tokens: tuple[PromptToken, ...] = ()


class GenerateResult(msgspec.Struct, frozen=True, kw_only=True):
    """A collected stream. `text` and `finish_reason` are those of the first choice."""

    choices: tuple[Choice, ...]
    usage: Usage
    metrics: InferenceMetrics

    @property
    def text(self) -> str:
        """Text of the first choice."""
        return self.choices[0].text

    @property
    def reasoning(self) -> str:
        """The thinking before the first choice."""
        return self.choices[0].reasoning

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        """The calls of tools of the first choice."""
        return self.choices[0].tool_calls

    @property
    def finish_reason(self) -> FinishReason:
        """Why the first choice ended."""
        return self.choices[0].finish_reason


class EmbedResult(msgspec.Struct, frozen=True, kw_only=True):
    """One vector for each input, in order: little-endian 32-bit floats."""

    vectors: tuple[bytes, ...]
    dimensions: int
    usage: Usage
    metrics: InferenceMetrics


class RerankResult(msgspec.Struct, frozen=True, kw_only=True):
    """The best documents, best first."""

    ranking: tuple[Ranked, ...]
    usage: Usage
    metrics: InferenceMetrics
