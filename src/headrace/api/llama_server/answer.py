"""Answers of /completion and /infill, whole and as the events of a stream."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, cast

import msgspec

from headrace.api.problems import Problem
from headrace.api.stream import EVENTS, comment, encode
from headrace.core.events import (
    Delta,
    Finish,
    FinishReason,
    GenerateResult,
    Progress,
    PromptTokens,
    TokenLogprob,
    ToolCallDelta,
    TopLogprob,
)
from headrace.core.metrics import InferenceMetrics

StopType = Literal["none", "eos", "limit", "word"]


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """A token, with its log probability."""

    id: int
    token: str
    bytes: list[int]
    logprob: float


class Probability(Candidate, frozen=True, kw_only=True):
    """The chosen token, and the candidates beside it."""

    top_logprobs: list[Candidate]


class Timings(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens, times and speeds of the prompt (without what was cached) and of the answer."""

    cache_n: int
    prompt_n: int
    prompt_ms: float
    prompt_per_token_ms: float
    prompt_per_second: float
    predicted_n: int
    predicted_ms: float
    predicted_per_token_ms: float
    predicted_per_second: float


class CompletionPart(msgspec.Struct, frozen=True, kw_only=True):
    """An addition to an answer that is streamed."""

    index: int = 0
    content: str = ""
    tokens: list[int] = []
    stop: bool = False
    id_slot: int = -1
    tokens_predicted: int = 0
    tokens_evaluated: int = 0
    completion_probabilities: list[Probability] | msgspec.UnsetType = msgspec.UNSET


class LlamaCompletion(CompletionPart, frozen=True, kw_only=True):
    """A whole answer, or the last part of one; `metrics` are the figures of Headrace.

    With `response_fields` it has some of these fields only.
    """

    model: str = ""
    generation_settings: dict[str, Any] = {}
    prompt: str = ""
    has_new_line: bool = False
    truncated: bool = False
    stop_type: StopType = "none"
    stopping_word: str = ""
    tokens_cached: int = 0
    timings: Timings | None = None
    metrics: InferenceMetrics | None = None


class CompletionHead(NamedTuple):
    """What is known of an answer at its beginning.

    `fields` are those that the client wants; `shows` is whether it wants text.
    """

    model: str
    settings: dict[str, Any]
    fields: Sequence[str]
    shows: bool


class _End(NamedTuple):
    """The end of an answer: its last text, and how it ended."""

    text: str
    tokens: Sequence[int]
    logprobs: Sequence[TokenLogprob]
    has_new_line: bool
    reason: FinishReason
    stop: str | None
    metrics: InferenceMetrics


def whole(head: CompletionHead, result: GenerateResult) -> LlamaCompletion:
    """Return a collected answer."""
    choice = result.choices[0]
    text = choice.text if head.shows else ""
    tokens = choice.token_ids if head.shows else ()
    end = _End(
        text,
        tokens,
        choice.logprobs,
        "\n" in text,
        choice.finish_reason,
        choice.stop,
        result.metrics,
    )
    return _completion(head, end)


def selected(answer: LlamaCompletion, fields: Sequence[str]) -> dict[str, Any]:
    """Return the fields of an answer that are wanted: all if none are named."""
    values: dict[str, Any] = msgspec.to_builtins(answer)
    if not fields:
        return values
    chosen = ((name, _nested(values, name.split("/"))) for name in fields)
    return {name: value for name, value in chosen if value is not msgspec.UNSET}


class CompletionEncoder:
    """Writes an answer as server-sent events. Only text and tokens of a delta are encoded."""

    start = EVENTS

    def __init__(self, head: CompletionHead) -> None:
        self._head = head
        self._prompt_tokens = 0
        self._count = 0
        self._tokens: list[int] = []
        self._has_new_line = False

    def waiting(self, progress: Progress | None) -> bytes:
        """Return a comment."""
        return comment(progress)

    def opening(self, progress: Progress | None) -> bytes:
        """Return nothing; note the number of the prompt's tokens."""
        if progress is not None and progress.stage == "prefill":
            self._prompt_tokens = progress.total
        return b""

    def delta(self, delta: Delta) -> bytes:
        """Return the event of an addition; empty if it has no text."""
        self._count += len(delta.token_ids)
        if not self._head.shows:
            return b""
        if delta.logprobs or delta.reasoning:
            return self._rare(delta)
        if not delta.text:
            self._tokens += delta.token_ids
            return b""
        self._has_new_line = self._has_new_line or "\n" in delta.text
        tokens: Sequence[int] = delta.token_ids
        if self._tokens:
            tokens, self._tokens = (*self._tokens, *tokens), []
        return (
            b'data: {"index":0,"content":%b,"tokens":[%b],"stop":false,"id_slot":-1,'
            b'"tokens_predicted":%d,"tokens_evaluated":%d}\n\n'
        ) % (
            encode(delta.text),
            ",".join(map(str, tokens)).encode(),
            self._count,
            self._prompt_tokens,
        )

    def rare(self, event: ToolCallDelta | PromptTokens) -> bytes:
        """Return nothing: a prompt has no calls, and is not scored."""
        del event
        return b""

    def finish(self, finish: Finish) -> bytes:
        """Return the last event, with the figures."""
        stop = finish.stops[0] if finish.stops else None
        end = _End(
            "",
            self._tokens,
            (),
            self._has_new_line,
            finish.finish_reason,
            stop,
            finish.metrics,
        )
        return _event(selected(_completion(self._head, end), self._head.fields))

    def failure(self, problem: Problem, request_id: str) -> bytes:
        """Return the error as an event; it is the last one."""
        del request_id
        return b"data: " + problem.body() + b"\n\n"

    def _rare(self, delta: Delta) -> bytes:
        # A prompt has no thinking of its own.
        text = delta.reasoning + delta.text
        self._has_new_line = self._has_new_line or "\n" in text
        tokens, self._tokens = [*self._tokens, *delta.token_ids], []
        part = CompletionPart(
            content=text,
            tokens=tokens,
            tokens_predicted=self._count,
            tokens_evaluated=self._prompt_tokens,
            completion_probabilities=_probabilities(delta.logprobs),
        )
        return _event(part)


def _event(value: Any) -> bytes:
    return b"data: " + encode(value) + b"\n\n"


def _completion(head: CompletionHead, end: _End) -> LlamaCompletion:
    usage, word = end.metrics.usage, end.stop if end.reason == "stop" else None
    kinds: dict[str, StopType] = {"length": "limit", "stop": "word" if word else "eos"}
    return LlamaCompletion(
        content=end.text,
        tokens=[*end.tokens],
        stop=True,
        tokens_predicted=usage.completion_tokens,
        tokens_evaluated=usage.prompt_tokens,
        completion_probabilities=_probabilities(end.logprobs),
        model=head.model,
        generation_settings=head.settings,
        has_new_line=end.has_new_line,
        stop_type=kinds.get(end.reason, "eos"),
        stopping_word=word or "",
        tokens_cached=usage.cached_tokens,
        timings=_timings(end.metrics),
        metrics=end.metrics,
    )


def _timings(metrics: InferenceMetrics) -> Timings:
    usage, first_ms = metrics.usage, metrics.time_to_first_token_ms
    prompt, prompt_ms = usage.prompt_tokens - usage.cached_tokens, metrics.prefill_ms or 0.0
    answer_ms = 0.0 if first_ms is None else max(metrics.total_ms - first_ms, 0.0)
    answer = usage.completion_tokens
    return Timings(
        cache_n=usage.cached_tokens,
        prompt_n=prompt,
        prompt_ms=prompt_ms,
        prompt_per_token_ms=prompt_ms / prompt if prompt else 0.0,
        prompt_per_second=prompt / prompt_ms * 1000 if prompt_ms else 0.0,
        predicted_n=answer,
        predicted_ms=answer_ms,
        predicted_per_token_ms=answer_ms / answer if answer else 0.0,
        predicted_per_second=answer / answer_ms * 1000 if answer_ms else 0.0,
    )


def _nested(value: Any, path: Sequence[str]) -> Any:
    for name in path:
        if not isinstance(value, dict) or name not in value:
            return msgspec.UNSET
        value = cast("dict[str, Any]", value)[name]
    return value


def _probabilities(tokens: Sequence[TokenLogprob]) -> list[Probability] | msgspec.UnsetType:
    return [
        Probability(**_fields(token), top_logprobs=[Candidate(**_fields(top)) for top in token.top])
        for token in tokens
    ] or msgspec.UNSET


def _fields(token: TokenLogprob | TopLogprob) -> dict[str, Any]:
    text = token.data.decode(errors="replace")
    data = list(token.data)
    return {"id": token.token_id, "token": text, "bytes": data, "logprob": token.logprob}
