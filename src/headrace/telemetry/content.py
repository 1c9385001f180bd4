"""What was asked and answered, redacted: as it is kept, and as the conventions write it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, cast

import msgspec

from headrace.core.events import Delta
from headrace.core.record import Attribute, Content
from headrace.core.request import AnyRequest, GenerateRequest
from headrace.telemetry import names


class Capture(Protocol):
    """Says that content is kept, and what of it is not."""

    def redact(self, text: str) -> str:
        """Return a text that may be kept."""
        ...


def content(request: AnyRequest, said: Mapping[int, Sequence[str]], capture: Capture) -> Content:
    """Return the content of a request. Token ids are left out: they cannot be redacted."""
    answered = tuple(capture.redact("".join(parts)) for _, parts in sorted(said.items()))
    return Content(asked=_redacted(request.content(), capture), answered=answered)


def say(said: dict[int, list[str]], delta: Delta) -> None:
    """Note what an answer goes on with."""
    said.setdefault(delta.index, []).append(delta.text)


def parameters(request: AnyRequest, capture: Capture | None) -> dict[str, Any]:
    """Return the settings that a request gave, as builtins.

    A schema and a template's options may hold content: it is kept as content is, and without
    `capture` it is only told that there were some.
    """
    kept = request.settings()
    for name in _LIKE_CONTENT & kept.keys():
        kept[name] = True if capture is None else _redacted(kept[name], capture)
    return kept


_LIKE_CONTENT = frozenset({"json_schema", "template_options"})


def attributes(
    request: AnyRequest, kept: Content, finish_reasons: Sequence[str]
) -> dict[str, Attribute]:
    """Return content as attributes of a span, of requests that the conventions have a form for."""
    if not isinstance(request, GenerateRequest):
        return {}
    asked: list[dict[str, Any]] = (
        kept.asked if request.messages is not None else [{"role": "user", "content": kept.asked}]
    )
    messages = [_message(one["role"], one["content"] or "") for one in asked]
    reasons = [*finish_reasons, *["error"] * len(kept.answered)]
    answers = [
        _message("assistant", text) | {"finish_reason": reason}
        for text, reason in zip(kept.answered, reasons, strict=False)
    ]
    return {names.INPUT_MESSAGES: _json(messages), names.OUTPUT_MESSAGES: _json(answers)}


def _message(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "parts": [{"type": "text", "content": text}]}


def _json(value: Any) -> str:
    return msgspec.json.encode(value).decode()


def _redacted(value: Any, capture: Capture) -> Any:
    if isinstance(value, str):
        return capture.redact(value)
    if isinstance(value, dict):
        told = cast("dict[str, Any]", value)
        return {key: _redacted(one, capture) for key, one in told.items()}
    if isinstance(value, list | tuple):
        return [_redacted(one, capture) for one in cast("list[Any]", value)]
    return value
