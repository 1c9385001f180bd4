"""What an upstream says in its chunks, in our own words."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, cast

import msgspec

from headrace.core.errors import UpstreamError
from headrace.core.events import Delta, FinishReason, TokenLogprob, TopLogprob
from headrace.core.metrics import Usage
from headrace.engines.base import RemoteFinish
from headrace.engines.remote import Access, complaint

# Of a token that an upstream names by its text alone.
_NO_ID = -1
_REASONS: dict[str, FinishReason] = {
    "stop": "stop",
    "eos": "stop",
    "eos_token": "stop",
    "end_turn": "stop",
    "stop_sequence": "stop",
    "length": "length",
    "max_tokens": "length",
    "model_length": "length",
    "content_filter": "content_filter",
    "sensitive": "content_filter",
    "tool_calls": "tool_calls",
    "function_call": "tool_calls",
}


class _Details(msgspec.Struct, frozen=True):
    cached_tokens: int | None = None
    reasoning_tokens: int | None = None


class UsageSaid(msgspec.Struct, frozen=True):
    """`usage` as upstreams give it; some name the cached tokens at another place."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    total_tokens: int | None = None
    prompt_tokens_details: _Details | None = None
    completion_tokens_details: _Details | None = None
    prompt_cache_hit_tokens: int | None = None
    cached_tokens: int | None = None

    def usage(self) -> Usage:
        """Return it as ours."""
        before, after = self.prompt_tokens_details, self.completion_tokens_details
        cached = (before and before.cached_tokens) or self.prompt_cache_hit_tokens
        prompt = self.prompt_tokens
        return Usage(
            prompt_tokens=(self.total_tokens or 0) if prompt is None else prompt,
            cached_tokens=cached or self.cached_tokens or 0,
            completion_tokens=self.completion_tokens or 0,
            reasoning_tokens=(after and after.reasoning_tokens) or 0,
        )


class _Message(msgspec.Struct, frozen=True):
    content: str | list[dict[str, Any]] | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class _Candidate(msgspec.Struct, frozen=True):
    token: str
    logprob: float
    bytes: list[int] | None = None

    @property
    def data(self) -> bytes:
        return _bytes(self.token) if self.bytes is None else bytes(self.bytes)


class _Token(_Candidate, frozen=True):
    top_logprobs: list[_Candidate] | None = None


class _Logprobs(msgspec.Struct, frozen=True):
    """Those of a chat (`content`), or those of a completion."""

    content: list[_Token] | None = None
    tokens: list[str] | None = None
    token_logprobs: list[float | None] | None = None
    top_logprobs: list[dict[str, float] | None] | None = None


class _Choice(msgspec.Struct, frozen=True):
    index: int = 0
    delta: _Message | None = None
    text: str | None = None
    finish_reason: str | None = None
    logprobs: _Logprobs | None = None
    usage: UsageSaid | None = None


class _Chunk(msgspec.Struct, frozen=True):
    choices: list[_Choice] | None = None
    usage: UsageSaid | None = None
    error: Any = None


_DECODER = msgspec.json.Decoder(_Chunk)


class Reading:
    """Reads one answer of `n` choices.

    Raises:
        HeadraceError: a chunk is malformed, or it is the upstream's complaint.
    """

    def __init__(self, way: Access, n: int) -> None:
        self._way = way
        self._reasons: list[FinishReason | None] = [None] * n
        self._usage: Usage | None = None

    def deltas(self, data: bytes) -> Iterator[Delta]:
        """Yield what a chunk adds."""
        try:
            chunk = _DECODER.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise UpstreamError(
                "The upstream sent a malformed chunk.", detail=self._way.scrub(str(error))
            ) from None
        if chunk.error:
            raise complaint(self._way, {"error": chunk.error})
        for choice in chunk.choices or ():
            if not 0 <= choice.index < len(self._reasons):
                raise UpstreamError("The upstream sent a choice that nobody asked for.")
            self._note(choice.usage)
            if choice.finish_reason:
                self._reasons[choice.index] = self._reason(choice.finish_reason)
            delta = _delta(choice)
            if delta.text or delta.reasoning or delta.logprobs:
                yield delta
        self._note(chunk.usage)

    def finish(self) -> RemoteFinish:
        """Return the upstream's account of an answer whose stream has ended."""
        reasons: list[FinishReason] = [reason for reason in self._reasons if reason is not None]
        if len(reasons) < len(self._reasons):
            raise UpstreamError("The upstream's stream is truncated: a choice has no end.")
        return RemoteFinish(finish_reasons=tuple(reasons), usage=self._usage)

    def _note(self, said: UsageSaid | None) -> None:
        if said is not None and (said.prompt_tokens or said.completion_tokens):
            self._usage = said.usage()

    def _reason(self, said: str) -> FinishReason:
        known = _REASONS.get(said.lower())
        if known is None:
            shown = self._way.scrub(said)
            raise UpstreamError(f"The upstream broke off, for the reason {shown!r}.")
        return known


def _delta(choice: _Choice) -> Delta:
    message = choice.delta or _Message()
    text, thinking = choice.text or "", message.reasoning_content or message.reasoning or ""
    if isinstance(message.content, list):
        for part in message.content:
            text += str(part.get("text") or "")
            thinking += _thinking(part)
    else:
        text += message.content or message.refusal or ""
    return Delta(
        text,
        index=choice.index,
        reasoning=thinking,
        logprobs=_tokens(choice.logprobs) if choice.logprobs else (),
    )


def _thinking(part: dict[str, Any]) -> str:
    said = part.get("thinking") or ""
    if isinstance(said, list):
        return "".join(map(_thinking_text, cast("list[Any]", said)))
    return str(said)


def _thinking_text(part: Any) -> str:
    return str(cast("dict[str, Any]", part).get("text") or "") if isinstance(part, dict) else ""


def _tokens(said: _Logprobs) -> tuple[TokenLogprob, ...]:
    if said.content is not None:
        return tuple(
            TokenLogprob(_NO_ID, one.data, one.logprob, tuple(map(_top, one.top_logprobs or ())))
            for one in said.content
        )
    rows = zip(
        said.tokens or (),
        said.token_logprobs or (),
        said.top_logprobs or [None] * len(said.tokens or ()),
        strict=False,
    )
    return tuple(
        TokenLogprob(
            _NO_ID,
            _bytes(token),
            logprob or 0.0,
            tuple(TopLogprob(_NO_ID, _bytes(name), value) for name, value in (top or {}).items()),
        )
        for token, logprob, top in rows
    )


def _top(one: _Candidate) -> TopLogprob:
    return TopLogprob(_NO_ID, one.data, one.logprob)


def _bytes(token: str) -> bytes:
    """Return a token's bytes; a part of a character is named `bytes:` and its hexadecimals."""
    if re.fullmatch(r"bytes:(\\x[0-9a-f]{2})+", token):
        return bytes.fromhex(token.removeprefix("bytes:").replace("\\x", ""))
    return token.encode()
