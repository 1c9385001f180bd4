"""Bounds of numbers: what a grammar allows has to keep to its schema when it is read as floats."""

from __future__ import annotations

import random
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer

from headrace.core.errors import InvalidRequest
from headrace.core.schema import Schema, check
from headrace.text.grammar import schema_grammar
from headrace.worker.compiling import checked, compiled
from headrace.worker.matchers import from_package

TINY = {"exclusiveMinimum": 0, "exclusiveMaximum": 1e-9}
FLOATS: dict[str, tuple[dict[str, Any], str, str]] = {
    "above 0": (TINY, f"0.{'0' * 400}1", "0.0000000003"),
    "below 1e-9": (TINY, f"0.000000000{'9' * 30}", "0.00000000090"),
    "below 1": ({"exclusiveMaximum": 1}, f"0.{'9' * 30}", "0.990"),
    "above -1": ({"exclusiveMinimum": -1}, f"-0.{'9' * 30}", "-0.990"),
    "below 0": ({"exclusiveMaximum": 0}, f"-0.{'0' * 400}1", "-0.0000000001"),
    "more digits than are compiled": ({"maximum": 0.9999999999999999}, "1.0", "0.990"),
    "beside integers": ({"maximum": 999999999999999.9}, "1000000000000000", "999999999999.0"),
    "both bounds": ({"minimum": 1, "exclusiveMinimum": 2}, f"2.{'0' * 30}1", "2.0001"),
    "above 2^53": ({"exclusiveMaximum": 2**60}, str(2**60 - 1), "1"),
    "below the least float": ({"exclusiveMaximum": 5e-324}, f"0.{'0' * 323}4", "0"),
    "an integer for a float": ({"multipleOf": 1000.0}, f"1{'0' * 400}", "3000"),
    "a multiple": ({"exclusiveMaximum": -0.001, "multipleOf": 0.3}, f"-{'9' * 38}.9", "-0.9"),
}
"""Bounds, a text that keeps to them as a decimal alone, and one that does in any case."""


@pytest.mark.parametrize("name", FLOATS)
def test_what_the_grammar_allows_is_kept_as_a_float(name: str) -> None:
    """Issue 11.4: such an answer was a 500: its float is the bound that is not part of it."""
    bounds, only_as_decimal, kept = FLOATS[name]
    schema = {"type": "number", **bounds}
    for nested in (schema, {"allOf": [{"type": ["number", "null"]}, bounds]}):
        compiled(nested, from_package)
        assert not _allows(nested, only_as_decimal)
        assert _allows(nested, kept)
    checked(schema, kept, None)


@pytest.mark.parametrize("kind", ["integer", ["integer", "null"]])
def test_bounds_of_integers_stay_exact(kind: Any) -> None:
    schema = {"type": kind, "exclusiveMinimum": 0, "exclusiveMaximum": 2**53}
    assert not _allows(schema, "0")
    assert _allows(schema, "1")
    assert _allows(schema, str(2**53 - 1))
    untyped = {"allOf": [{"type": "integer"}, {"exclusiveMinimum": 0, "maximum": 4.5}]}
    assert [_allows(untyped, text) for text in ("0", "1", "4", "5")] == [False, True, True, False]


@pytest.mark.parametrize("text", ["1e999", "-1e999", "1e-999"])
def test_a_number_beyond_floats_is_a_number(text: str) -> None:
    """Issue 11.4: the grammar of numbers has exponents of any size; such an answer was a 500."""
    assert _allows({"type": "number"}, text)
    checked({"type": "number"}, text, None)


def _allows(schema: Schema, text: str) -> bool:
    return from_package(schema_grammar(schema)).accepts(text.encode())


@pytest.mark.parametrize("factor", [997, 1000])
@pytest.mark.parametrize("kind", ["integer", "number"])
def test_large_multiples_are_enforced_to_the_last_digit(kind: str, factor: int) -> None:
    """Issue 13: the compiler gives up within numbers of larger multiples, which are refused."""
    schema: Any = {"type": kind, "multipleOf": factor, "minimum": 1, "maximum": 10**15}
    check(schema)
    grammar = schema_grammar(schema)
    chance = random.Random(1)
    for _ in range(20):
        matcher = LLMatcher(LLTokenizer("byte"), grammar)
        for _ in range(15):
            allowed = matcher.compute_logit_bias()
            assert not matcher.is_error(), matcher.get_error()
            digits = [code for code in b"0123456789" if allowed[code]]
            if not digits:
                break
            assert matcher.consume_token(chance.choice(digits))
    with pytest.raises(InvalidRequest, match="multipleOf"):
        check({**schema, "multipleOf": 1001})
