"""Patterns of schemas: what a grammar allows has to keep to them as validators read them."""

from __future__ import annotations

import json

import pytest

from headrace.core.schema import Schema
from headrace.text.grammar import schema_grammar, without_formats
from headrace.worker.compiling import Refused, checked
from headrace.worker.matchers import from_package

TEXTS = ('"', "\\", "\n", "\x01", "\x1f", " ", "\x85", "\ufeff", "\x1c", "[", ":", "]", "a", "p]")
PATTERNS = {
    '^[^"]$': "\\ \n\x01[",
    r"^[^\\]$": '"\n\x01 ',
    r'^[^<>:"/\\|?*]$': "\n\x01a[",
    r"^[\x00-\x1f]$": "\n\x01\x1f",
    r"^[\u0000- ]$": "\n\x01 ",
    r"^\s$": "\n ",
    r"^\S$": '"\\a',
    r"^[\s:]$": "\n :",
    r"^[^\s:]$": '"\\a',
    "^[[:alpha:]]$": ("p]", ":]"),
    "^[a[b]$": "a[",
    r"^[^[\]]$": '"a',
}
"""Each with texts that it allows."""


@pytest.mark.parametrize("pattern", PATTERNS)
def test_what_the_grammar_allows_is_kept(pattern: str) -> None:
    """Issue 11.4: with all control characters llguidance allowed quotation marks; that was a 500.

    The same was the case with brackets in brackets, and with white space that is none elsewhere.
    """
    schema = {"type": "string", "pattern": pattern}
    matched = {text for text in TEXTS if _allows(schema, text)}
    for text in matched:
        checked(schema, json.dumps(text), None)
    assert matched >= {*PATTERNS[pattern]} & {*TEXTS}
    keys = {"type": "object", "patternProperties": {pattern: {}}, "additionalProperties": False}
    grammar = from_package(schema_grammar(keys))
    assert {text for text in TEXTS if grammar.accepts(b"{%s: 1}" % _json(text))} == matched


@pytest.mark.parametrize("name", ["hostname", "email"])
def test_names_of_hosts_have_the_length_of_dns(name: str) -> None:
    """Issue 11.4: 253 characters in all, and 254 for an address."""
    before = "a@" if name == "email" else ""
    schema = without_formats({"type": "string", "format": name})
    assert _allows(schema, f"{before}mail.a-b.example.co.uk")
    assert not _allows(schema, before + "a.b" * 100)
    assert not _allows(schema, f"{before}a--b.example")


def test_items_beyond_a_tuple_are_said_by_items() -> None:
    """Issue 11.4: with `additionalItems`, which means nothing there, `prefixItems` was left out."""
    schema = {"type": "array", "prefixItems": [{"const": 7}], "additionalItems": False}
    grammar = from_package(schema_grammar(schema))
    assert grammar.accepts(b"[7, true]")
    assert not grammar.accepts(b"[8]")
    with pytest.raises(Refused):
        checked(schema, "[8]", None)


def _allows(schema: Schema, text: str) -> bool:
    return from_package(schema_grammar(schema)).accepts(_json(text))


def _json(text: str) -> bytes:
    return json.dumps(text, ensure_ascii=False).encode()
