"""What was asked and answered, redacted: as it is kept, and as the conventions write it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, cast

import msgspec

from headrace.core.events import Delta
from headrace.core.record import Attribute, Content
from headrace.core.request import EmbedRequest, GenerateRequest, RerankRequest
from headrace.telemetry import names
from headrace.telemetry.names import Request


class Capture(Protocol):
    """Says that content is kept, and what of it is not."""

    def redact(self, text: str) -> str:
        """Return a text that may be kept."""
        ...


def content(request: Request, said: Mapping[int, Sequence[str]], capture: Capture) -> Content:
    """Return the content of a request. Token ids are left out: they cannot be redacted."""
    answered = tuple(capture.redact("".join(parts)) for _, parts in sorted(said.items()))
    return Content(asked=_redacted(_asked(request), capture), answered=answered)


def say(said: dict[int, list[str]], delta: Delta) -> None:
    """Note what an answer goes on with."""
    said.setdefault(delta.index, []).append(delta.text)


def parameters(request: Request, capture: Capture | None) -> dict[str, Any]:
    """Return the settings that a request gave, as builtins.

    A schema and a template's options may hold content: it is kept as content is, and without
    `capture` it is only told that there were some.
    """
    # What was asked may be long: it is put aside before anything is copied.
    bare = msgspec.structs.replace(request, **_PUT_ASIDE[type(request)])
    given: dict[str, Any] = msgspec.to_builtins(bare)
    sampling = given.pop("sampling", {})
    kept = {name: value for name, value in given.items() if name not in _NO_SETTINGS} | sampling
    for name in _LIKE_CONTENT & kept.keys():
        kept[name] = True if capture is None else _redacted(kept[name], capture)
    return kept


_PUT_ASIDE: dict[type[Request], dict[str, Any]] = {
    GenerateRequest: {"messages": None, "prompt": ""},
    EmbedRequest: {"inputs": ("-",)},
    RerankRequest: {"query": "-", "documents": ("-",)},
}
_LIKE_CONTENT = frozenset({"json_schema", "template_options"})
_NO_SETTINGS = frozenset(
    {
        *("id", "received", "model", "messages", "prompt", "inputs", "query", "documents"),
        *("client", "traceparent", "tracestate", "load_ms", "load_wait_s", "answered"),
    }
)


def attributes(
    request: Request, kept: Content, finish_reasons: Sequence[str]
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


def _asked(request: Request) -> Any:
    if isinstance(request, GenerateRequest):
        return msgspec.to_builtins(request.messages or _text(request.prompt))
    if isinstance(request, EmbedRequest):
        return [_text(one) for one in request.inputs]
    return {"query": request.query, "documents": list(request.documents)}


def _text(given: str | tuple[int, ...] | None) -> str | None:
    return given if isinstance(given, str) else None


def _redacted(value: Any, capture: Capture) -> Any:
    if isinstance(value, str):
        return capture.redact(value)
    if isinstance(value, dict):
        told = cast("dict[str, Any]", value)
        return {key: _redacted(one, capture) for key, one in told.items()}
    if isinstance(value, list | tuple):
        return [_redacted(one, capture) for one in cast("list[Any]", value)]
    return value
