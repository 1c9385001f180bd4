"""The chunks of OpenAI's streams, as engines and measuring tools read them.

What does not bear on the answer is read leniently: counts written as `5.0` or `"5"`, halves of
characters, fields of other types. Its text, choices, reasons and errors are not guessed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any, cast

import msgspec

from headrace.core.metrics import Usage

_DONE = b"[DONE]"


class Malformed(ValueError):
    """A chunk is no JSON object of the expected form."""


class Message(msgspec.Struct, frozen=True):
    """The addition of a chunk to a message; `content` may be in parts."""

    content: str | list[Any] | None = None
    refusal: Any = None
    reasoning_content: Any = None
    reasoning: Any = None
    tool_calls: Any = None


class Candidate(msgspec.Struct, frozen=True):
    """A token and its log-probability."""

    token: str
    logprob: float
    bytes: list[int] | None = None


class Token(Candidate, frozen=True):
    """A chosen token, and the candidates beside it."""

    top_logprobs: list[Candidate] | None = None


class Logprobs(msgspec.Struct, frozen=True):
    """Log-probabilities of a chat (`content`) or of a completion."""

    content: list[Token] | None = None
    tokens: list[str] | None = None
    token_logprobs: list[float | None] | None = None
    top_logprobs: list[dict[str, float] | None] | None = None


class Choice(msgspec.Struct, frozen=True):
    """The addition of a chunk to a choice."""

    index: float | None = 0
    delta: Message | None = None
    text: str | None = None
    finish_reason: str | None = None
    logprobs: Logprobs | None = None
    usage: Any = None

    @property
    def content(self) -> str:
        """The text that it adds to the answer."""
        content = self.delta.content if self.delta else None
        if isinstance(content, list):
            content = "".join(_text(part, "text") for part in content)
        return (self.text or "") + (content or (_string(self.delta.refusal) if self.delta else ""))

    @property
    def thinking(self) -> str:
        """The text that it adds to the thinking."""
        delta = self.delta
        if delta is None:
            return ""
        thinking = _string(delta.reasoning_content) or _string(delta.reasoning)
        if isinstance(delta.content, list):
            thinking += "".join(_text(part, "thinking") for part in delta.content)
        return thinking

    @property
    def calls(self) -> Iterator[str]:
        """The text that it adds to calls, each of which begins with a line feed and its name."""
        calls = self.delta.tool_calls if self.delta else None
        for call in cast("list[Any]", calls) if isinstance(calls, list) else ():
            parts = _dict(_dict(call).get("function"))
            name = _string(parts.get("name"))
            yield (f"\n{name} " if name else "") + _string(parts.get("arguments"))


class Chunk(msgspec.Struct, frozen=True):
    """One chunk; `metrics` are the figures of a Headrace service."""

    choices: list[Choice] | None = None
    usage: Any = None
    metrics: dict[str, Any] | None = None
    error: Any = None


_DECODER = msgspec.json.Decoder(Chunk)


def is_end(data: bytes) -> bool:
    """Whether the data of an event is the mark of the stream's end."""
    return data.strip() == _DONE


def read(data: bytes) -> Chunk:
    """Return a chunk.

    Raises:
        Malformed: it is not one.
    """
    try:
        return _DECODER.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        pass
    try:
        return msgspec.convert(loads(data), Chunk, strict=False)
    except msgspec.ValidationError as error:
        raise Malformed(str(error)) from None


def loads(data: bytes) -> Any:
    """Return JSON as builtins; half a surrogate pair becomes U+FFFD.

    Raises:
        Malformed: it is not JSON in UTF-8.
    """
    try:
        return msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        pass
    try:
        # The standard library keeps lone surrogates, and numbers that are not finite.
        return _whole(json.loads(data.decode()))
    except (ValueError, RecursionError) as error:
        raise Malformed(str(error)) from None


def usage_of(data: object) -> Usage | None:
    """Return `usage` of a service, None without counts; the cached tokens have several names."""
    if not isinstance(data, dict):
        return None
    fields = cast("dict[str, Any]", data)
    prompt, completion = _count(fields, "prompt_tokens"), _count(fields, "completion_tokens")
    total = _count(fields, "total_tokens")
    if not (prompt or completion or (prompt is None and total)):
        return None
    cached = (
        _count(fields.get("prompt_tokens_details"), "cached_tokens")
        or _count(fields, "prompt_cache_hit_tokens")
        or _count(fields, "cached_tokens")
    )
    details = fields.get("completion_tokens_details")
    accepted = _count(details, "accepted_prediction_tokens") or 0
    return Usage(
        prompt_tokens=(total or 0) if prompt is None else prompt,
        cached_tokens=cached or 0,
        completion_tokens=completion or 0,
        reasoning_tokens=_count(details, "reasoning_tokens") or 0,
        drafted_tokens=accepted + (_count(details, "rejected_prediction_tokens") or 0),
        accepted_tokens=accepted,
    )


def _count(fields: object, name: str) -> int | None:
    value = cast("dict[str, Any]", fields).get(name) if isinstance(fields, dict) else None
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return int(number) if math.isfinite(number) and number >= 0 else None


def _whole(value: Any) -> Any:
    """Return JSON with every string in well-formed Unicode."""
    if isinstance(value, str):
        return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    if isinstance(value, list):
        return [_whole(item) for item in cast("list[Any]", value)]
    if isinstance(value, dict):
        items = cast("dict[str, Any]", value).items()
        return {_whole(name): _whole(item) for name, item in items}
    return value


def _dict(value: object) -> dict[str, Any]:
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}


def _string(value: object) -> str:
    return value if isinstance(value, str) else ""


def _text(part: object, name: str) -> str:
    """Return the text of a part of a message, which may have parts itself."""
    value = _dict(part).get(name)
    if isinstance(value, list):
        return "".join(_text(inner, "text") for inner in cast("list[Any]", value))
    return _string(value)
