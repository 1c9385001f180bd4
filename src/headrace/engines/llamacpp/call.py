"""A request to llama.cpp: its body, its chunks, its errors."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from headrace.core.constraint import Constraint
from headrace.core.errors import (
    ContextOverflow,
    GenerationFailed,
    HeadraceError,
    InvalidRequest,
    OutOfMemory,
)
from headrace.core.events import TokenLogprob
from headrace.engines.base import (
    Admitted,
    EngineRequest,
    RawDelta,
    RawDraft,
    RawEvent,
    RawFinish,
)
from headrace.engines.llamacpp.logprobs import Candidate, Lookup, Token, finite
from headrace.text.grammar import grammar

if TYPE_CHECKING:
    from collections.abc import Sequence

    from headrace.engines.threaded import Emit

_NAMES = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "repetition_penalty": "repeat_penalty",
    "seed": "seed",
}
"""Our names of sampling parameters to those of llama.cpp."""

_BY_NAME = frozenset({"max_tokens", "stop_token_ids", "ignore_eos", "logprobs", "logit_bias"})
HONOURED = _BY_NAME | _NAMES.keys()
"""The sampling parameters that a request translates."""


class Progressed(msgspec.Struct):
    """How much of a prompt is computed."""

    total: int
    cache: int
    processed: int


class Tokens(msgspec.Struct):
    """New tokens, and how many there are in all."""

    tokens: tuple[int, ...] = ()
    tokens_predicted: int = 0


class Timings(msgspec.Struct, frozen=True):
    """How many tokens of drafts have been checked, and accepted."""

    draft_n: int = 0
    draft_n_accepted: int = 0


class _Logprobs(msgspec.Struct):
    content: list[Token]


class _Choice(msgspec.Struct):
    text: str
    finish_reason: Literal["stop", "length"] | None = None
    logprobs: _Logprobs | None = None


class _Details(msgspec.Struct, frozen=True):
    cached_tokens: int = 0


class _Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int
    prompt_tokens_details: _Details = _Details()


class _Chunk(msgspec.Struct):
    choices: tuple[_Choice, ...] = ()
    verbose: Tokens = msgspec.field(default_factory=Tokens, name="__verbose")
    prompt_progress: Progressed | None = None
    usage: _Usage | None = None
    timings: Timings | None = None
    error: dict[str, Any] | None = None


Constrained = Callable[[Constraint], dict[str, Any]]
"""Returns the fields of a request's body that enforce a constraint."""

Counts = tuple[int, int, int]
"""Tokens of the prompt, of the answer, and of the prompt from a cache."""

CERTAIN = 1e6
"""A bias by which a token is chosen."""
# The most bytes, and so tokens, of a character.
_CHARACTER = 4

_decode = msgspec.json.Decoder(_Chunk).decode


class Call:
    """A request on its own thread: llama.cpp calls back for every chunk.

    `lora` has the scale of each adapter of the server, 0 for those that are left out: only then
    does it forget a prompt that it has computed with others.
    """

    lora: Sequence[dict[str, float]] = ()

    def __init__(
        self,
        request: EngineRequest,
        emit: Emit[RawEvent],
        split: Callable[[str], tuple[int, ...]],
        visible: Sequence[str] = (),
        *,
        drafts: bool = False,
    ) -> None:
        self._request = request
        self._timings = Timings() if drafts else None
        self._visible = visible
        self._emit = emit
        self._split = split
        self._ends = frozenset(request.sampling.stop_token_ids)
        self._lookup: Lookup | None = None
        self._prompt = len(request.token_ids)
        self._sent = 0
        self._predicted = 0
        self._cached = 0
        self._ended = False
        self._failure: BaseException | None = None

    def run(self, server: Any) -> None:
        """Block until the request is answered or its stream is closed."""
        self._begin(server)
        body = msgspec.json.encode(self._fields())
        server.handle_completions(body, self._on_chunk)
        if self._failure is not None:
            raise self._failure
        if not self._ended:
            raise GenerationFailed("llama.cpp ended the stream without a reason.")

    def _begin(self, server: Any) -> None:
        if self._request.sampling.logprobs is not None:
            candidates = partial(self._candidates, server)
            self._lookup = Lookup(candidates, self._request, self._split)
        if self._request.constraint is not None:
            # The library compiles the grammar before it reports progress.
            self._emit(Admitted(0, len(self._request.token_ids)))

    def _fields(self, constrained: Constrained | None = None) -> dict[str, Any]:
        body = fields(self._request, self._visible, constrained or in_lark) | self._adapted()
        if self._timings is not None:
            body["timings_per_token"] = True
        return body

    def _adapted(self) -> dict[str, Any]:
        return {"lora": self.lora} if self.lora else {}

    def _on_chunk(self, raw: bytes) -> bool:
        # The library swallows exceptions of the callback: keep it for `run`.
        try:
            self._ended = self._take(_decode(raw)) or self._ended
        except Exception as error:  # noqa: BLE001  # raised again in run
            self._failure = error
            return True
        return self._ended

    def _take(self, chunk: _Chunk) -> bool:
        if chunk.error is not None:
            raise error_from(chunk.error)
        if chunk.prompt_progress is not None:
            return self._progress(chunk.prompt_progress)
        if chunk.timings is not None:
            self._draft(chunk.timings)
        choice = chunk.choices[0]
        if choice.finish_reason is not None:
            return self._finish(choice.finish_reason, self._counts(chunk.usage))
        token_ids = self._token_ids(chunk.verbose, choice.text)
        tokens = choice.logprobs.content if choice.logprobs else ()
        return self._take_tokens(choice.text.encode(), token_ids, tokens)

    def _take_tokens(
        self, data: bytes, token_ids: tuple[int, ...], tokens: Sequence[Token]
    ) -> bool:
        if self._lookup is not None:
            logprobs = self._lookup.completed(token_ids, self._logprobs(tokens))
            return self._take_entries(data, token_ids, logprobs)
        if not self._ends.isdisjoint(token_ids):
            return self._finish("stop", self._counts(None))
        self._sent += len(token_ids)
        return self._emit(RawDelta(data, token_ids))

    def _take_entries(
        self, data: bytes, token_ids: tuple[int, ...], logprobs: tuple[TokenLogprob, ...]
    ) -> bool:
        """Emit tokens with their entries up to the end of the answer, also within a character."""
        left = self._request.max_tokens - self._sent
        end = next((at for at, token in enumerate(token_ids[:left]) if token in self._ends), None)
        kept = left if end is None else end
        if kept < len(token_ids):
            token_ids, logprobs = token_ids[:kept], logprobs[:kept]
            data = b"".join(entry.data for entry in logprobs)
        self._sent += len(token_ids)
        stopped = bool(token_ids) and self._emit(RawDelta(data, token_ids, logprobs))
        if end is None and self._sent < self._request.max_tokens:
            return stopped
        return self._finish("length" if end is None else "stop", self._counts(None))

    def _token_ids(self, verbose: Tokens, text: str) -> tuple[int, ...]:
        # A character of several tokens comes with the id of the last one only.
        tokens, missing = verbose.tokens, verbose.tokens_predicted - self._predicted
        self._predicted = max(self._predicted, verbose.tokens_predicted)
        if missing <= len(tokens):
            return tokens
        all_ids = self._split(text)[-missing:]
        return all_ids if len(all_ids) == missing and all_ids[-len(tokens) :] == tokens else tokens

    def _draft(self, timings: Timings) -> None:
        """Report what was drafted since the last chunk."""
        before, self._timings = self._timings, timings
        if before is not None and timings != before:
            drafted = timings.draft_n - before.draft_n
            accepted = timings.draft_n_accepted - before.draft_n_accepted
            self._emit(RawDraft(drafted, accepted))

    def _progress(self, progress: Progressed) -> bool:
        self._cached = progress.cache
        return self._emit(Admitted(progress.processed, progress.total, progress.cache))

    def _counts(self, usage: _Usage | None) -> Counts:
        if usage is None:
            return self._prompt, self._sent, self._cached
        cached = usage.prompt_tokens_details.cached_tokens
        return usage.prompt_tokens, usage.completion_tokens, cached

    def _finish(self, reason: Literal["stop", "length"], counts: Counts) -> bool:
        prompt, completion, cached = counts
        self._emit(
            RawFinish(
                reason=reason,
                prompt_tokens=prompt,
                completion_tokens=completion,
                cached_tokens=cached,
            )
        )
        return True

    def _logprobs(self, tokens: Sequence[Token]) -> tuple[TokenLogprob, ...]:
        limit = self._request.sampling.logprobs or 0
        return tuple(
            TokenLogprob(
                token.id,
                bytes(token.bytes),
                finite(token.logprob),
                tuple(candidate.top() for candidate in token.top_logprobs[:limit]),
            )
            for token in tokens
            # Of the accepted tokens of a draft it has no candidates, and 0 for their own.
            if token.top_logprobs
        )

    def _candidates(
        self, server: Any, text: Sequence[int], most: int, whole: int
    ) -> Sequence[Candidate]:
        """Return the likeliest tokens after a text; `whole` is chosen, and not reported."""
        body = {
            "prompt": text,
            "max_tokens": 1,
            "temperature": 0,
            "logprobs": most,
            # It changes what is chosen, and not the probabilities that are reported.
            "logit_bias": [[whole, CERTAIN]],
            **self._adapted(),
        }
        chunks: list[_Chunk] = []

        def take(raw: bytes) -> bool:
            chunks.append(_decode(raw))
            return False

        server.handle_completions(msgspec.json.encode(body), take)
        logprobs = chunks[-1].choices[0].logprobs if chunks and chunks[-1].choices else None
        if logprobs is None:
            raise GenerationFailed("llama.cpp reported no log-probabilities.")
        return logprobs.content[0].top_logprobs


def in_lark(constraint: Constraint) -> dict[str, Any]:
    """Return the fields of a constraint for a build with llguidance."""
    return {"grammar": grammar(constraint)}


def fields(
    request: EngineRequest, visible: Sequence[str] = (), constrained: Constrained = in_lark
) -> dict[str, Any]:
    """Return the body of a request; `visible` are control tokens whose text is shown."""
    sampling, prompt = request.sampling, (*request.token_ids, *request.answered)
    body: dict[str, Any] = {
        "prompt": prompt,
        "stream": True,
        "max_tokens": request.max_tokens,
        # Token ids come only in the verbose part; progress is what makes a prefill cancellable.
        "verbose": True,
        "return_tokens": True,
        "return_progress": True,
        # The API's penalties apply to the whole text; llama.cpp's default is 64 tokens.
        "repeat_last_n": len(prompt) + request.max_tokens,
    }
    for ours, theirs in _NAMES.items():
        if (value := getattr(sampling, ours)) is not None:
            body[theirs] = value
    if sampling.seed is not None:
        # 32 bits there, and the highest number means a random seed.
        body["seed"] = sampling.seed % 0xFFFFFFFF
    if sampling.ignore_eos:
        body["ignore_eos"] = True
    if sampling.logprobs is not None:
        body["logprobs"] = max(1, sampling.logprobs)
        # The tokens of a character are reported with its last one, also if the answer ends before.
        body["max_tokens"] += _CHARACTER - 1
    if sampling.logit_bias:
        body["logit_bias"] = list(sampling.logit_bias.items())
    if visible:
        body["preserved_tokens"] = visible
    if request.constraint is not None:
        body |= constrained(request.constraint)
    return body


def error_from(error: dict[str, Any]) -> HeadraceError:
    """Return the error for an error object of llama.cpp."""
    message, kind = str(error.get("message", "")), error.get("type")
    if kind == "exceed_context_size_error":
        return ContextOverflow(message)
    if kind == "invalid_request_error":
        return InvalidRequest(message)
    if "memory" in message.lower():
        return OutOfMemory("llama.cpp ran out of memory.", detail=message)
    return GenerationFailed("llama.cpp failed.", detail=message)
