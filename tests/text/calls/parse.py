"""Runs a splitter and joins what it returns."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from headrace.text.calls.format import Format
from headrace.text.calls.parts import (
    CallArguments,
    CallStart,
    Content,
    Cut,
    Part,
    Reading,
    Thought,
)
from headrace.text.calls.splitter import Splitter

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "note": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "days": {"type": "integer"},
        "where": {"type": "object"},
        "tags": {"type": "array", "items": {"type": "string"}},
        "wet": {"type": "boolean"},
    },
    "required": ["city"],
}
TOOLS: dict[str, dict[str, Any] | None] = {"get_weather": SCHEMA, "now": None}


def joined(parts: Iterable[Part]) -> list[Part]:
    """Joins adjacent parts of one kind."""
    result: list[Part] = []
    for part in parts:
        last = result[-1] if result else None
        texts = isinstance(part, Thought | Content | CallArguments) and type(last) is type(part)
        if texts:
            text = getattr(last, "text", "") + getattr(part, "text", "")
            result[-1] = msgspec.structs.replace(part, text=text)
        else:
            result.append(part)
    return result


def split(
    form: Format,
    chunks: Sequence[str],
    *,
    thinking_open: bool = False,
    calls: bool = True,
    apart: bool = False,
    only: bool = False,
    exact: bool = False,
    tools: dict[str, dict[str, Any] | None] = TOOLS,
) -> list[Part]:
    reading = Reading(calls=calls, apart=apart, only=only, exact=exact)
    splitter = Splitter(form, tools, reading, thinking_open=thinking_open)
    parts = [part for chunk in chunks for part in splitter.feed(chunk)]
    return joined([*parts, *splitter.flush()])


def calls_in(parts: Iterable[Part]) -> list[tuple[str, Any]]:
    names, texts = dict[int, str](), dict[int, str]()
    for part in parts:
        if isinstance(part, CallStart):
            names[part.index] = part.name
        elif isinstance(part, CallArguments):
            texts[part.index] = texts.get(part.index, "") + part.text
        elif isinstance(part, Cut):
            names.pop(part.index)
    return [(name, json.loads(texts[index])) for index, name in names.items()]


def text_in(parts: Iterable[Part], kind: type[Part]) -> str:
    return "".join(part.text for part in parts if isinstance(part, kind))  # type: ignore[attr-defined]


def pieces(text: str, cuts: Iterable[int]) -> list[str]:
    edges = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(edges)]
