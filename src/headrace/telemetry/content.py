"""Content of requests and answers, redacted: for records and as attributes of spans."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

import msgspec

from headrace.core.record import Attribute, Content
from headrace.core.request import AnyRequest, GenerateRequest
from headrace.telemetry import names

_SECRETS = (
    # Keys, by the formats of their issuers.
    r"\b(?:sk|pk|rk)[-_][A-Za-z0-9_-]{16,}",
    r"\b(?:hf|gh[oprsu]|glpat|xox[abeprs])[-_][A-Za-z0-9_-]{16,}",
    r"\bgithub_pat_\w{20,}",
    r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
    r"\bAIza[0-9A-Za-z_-]{35}",
    r"\beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]*",
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)",
    # Values that are labelled as a key or a password.
    r"(?i:\bbearer\s+)[A-Za-z0-9._~+/=-]{8,}",
    r"(?i:\b(?:(?:api[-_ ]?key|password|passwd|access[-_ ]?token)[\"']?\s*(?:is\b\s*[:=]?|[:=])"
    r"|secret[\"']?\s*[:=])\s*)"
    r"(?:\"[^\"\n]+\"|'[^'\n]+'|[^\s\"',;]+)",
    r"[A-Za-z0-9._%+-]{1,64}@[A-Za-z0-9-]{1,63}(?:\.[A-Za-z0-9-]{1,63}){1,8}",
)
_CARD = re.compile(r"(?<!\d)(?<!\d\.)\d(?:[ -]?\d){12,18}(?!\.?\d)")
REDACTED = "[redacted]"
"""Replaces a secret."""


class Redactor:
    """Removes secrets, by built-in patterns and additional regular expressions."""

    def __init__(self, patterns: Sequence[str] = ()) -> None:
        secret = "|".join(f"(?:{pattern})" for pattern in _SECRETS)
        self._patterns = (re.compile(secret, re.DOTALL), *map(re.compile, patterns))

    def redact(self, text: str) -> str:
        """Return the text with each secret replaced by `[redacted]`."""
        for pattern in self._patterns:
            text = pattern.sub(REDACTED, text)
        return _CARD.sub(_card, text)


def _card(match: re.Match[str]) -> str:
    digits = [int(character) for character in match[0] if character.isdigit()]
    # Luhn's checksum: card numbers satisfy it, nine of ten other numbers do not.
    doubled = (sum(divmod(2 * digit, 10)) for digit in digits[-2::-2])
    return REDACTED if (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0 else match[0]


def content(
    request: AnyRequest, answers: Mapping[int, Sequence[str]], capture: Redactor
) -> Content:
    """Return the content of a request. Token ids are left out: they cannot be redacted."""
    answered = tuple(capture.redact("".join(parts)) for _, parts in sorted(answers.items()))
    kept = Content(input=_redacted(request.content(), capture), answered=answered)
    if not isinstance(request, GenerateRequest):
        return kept
    tools, suffix = msgspec.to_builtins((request.tools or None, request.suffix))
    return msgspec.structs.replace(
        kept, tools=_redacted(tools, capture), suffix=_redacted(suffix, capture)
    )


def parameters(request: AnyRequest, capture: Redactor | None) -> dict[str, Any]:
    """Return the settings in a request, as builtins.

    A schema and template options may hold content: they are redacted too, or replaced by True
    without `capture`.
    """
    kept = request.settings()
    for name in _LIKE_CONTENT & kept.keys():
        kept[name] = True if capture is None else _redacted(kept[name], capture)
    return kept


_LIKE_CONTENT = frozenset({"constraint", "template_options"})


def attributes(
    request: AnyRequest, kept: Content, finish_reasons: Sequence[str]
) -> dict[str, Attribute]:
    """Return content as attributes of a span, for requests that the conventions cover."""
    if not isinstance(request, GenerateRequest):
        return {}
    messages: list[dict[str, Any]] = (
        kept.input if request.messages is not None else [{"role": "user", "content": kept.input}]
    )
    prompts = [*map(_turn, messages)]
    reasons = [*finish_reasons, *["error"] * len(kept.answered)]
    answers = [
        _message("assistant", text) | {"finish_reason": reason}
        for text, reason in zip(kept.answered, reasons, strict=False)
    ]
    given: dict[str, Attribute] = {
        names.INPUT_MESSAGES: _json(prompts),
        names.OUTPUT_MESSAGES: _json(answers),
    }
    if kept.tools:
        given[names.TOOL_DEFINITIONS] = _json([{"type": "function", **t} for t in kept.tools])
    return given


def _turn(turn: Mapping[str, Any]) -> dict[str, Any]:
    """Return a turn in the form of the conventions."""
    if turn["role"] == "tool":
        answer = {"type": "tool_call_response", "response": turn.get("content") or ""}
        return {"role": "tool", "parts": [answer | {"id": turn.get("tool_call_id")}]}
    message = _message(turn["role"], turn.get("content") or "")
    if thinking := turn.get("reasoning"):
        message["parts"].insert(0, {"type": "reasoning", "content": thinking})
    message["parts"] += [{"type": "tool_call", **call} for call in turn.get("tool_calls", ())]
    return message


def _message(role: str, content: Any) -> dict[str, Any]:
    parts = cast("list[Any]", content if isinstance(content, list | tuple) else [content])
    return {"role": role, "parts": [*map(_part, parts)]}


def _part(part: Any) -> dict[str, Any]:
    # Of an image there are its format, size and digest.
    return {"type": "text", "content": part} if isinstance(part, str) else part


def _json(value: Any) -> str:
    return msgspec.json.encode(value).decode()


def _redacted(value: Any, capture: Redactor) -> Any:
    if isinstance(value, str):
        return capture.redact(value)
    if isinstance(value, dict):
        members = cast("dict[str, Any]", value)
        return {key: _redacted(member, capture) for key, member in members.items()}
    if isinstance(value, list | tuple):
        return [_redacted(item, capture) for item in cast("list[Any]", value)]
    return value
