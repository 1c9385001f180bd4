"""Bounds of numbers: what a grammar allows has to keep to its schema when it is read as floats."""

from __future__ import annotations

import random
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from headrace.core.errors import InvalidRequest
from headrace.core.schema import Schema, check
from headrace.text.grammar import schema_grammar
from headrace.worker.compiling import checked, compiled
from headrace.worker.exact import Refused
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


class _Digits:
    """A vocabulary with all numbers of up to three digits as tokens, as that of Llama 3."""

    def __init__(self) -> None:
        longer = [f"{number:0{size}}".encode() for size in (2, 3) for number in range(10**size)]
        self.tokens = [bytes([byte]) for byte in range(256)] + longer + [b"<|end|>"]
        self.eos_token_id = len(self.tokens) - 1
        self.bos_token_id = self.unk_token_id = None
        self.special_token_ids = [self.eos_token_id]

    def __call__(self, text: str) -> list[int]:
        return [*text.encode()]


@pytest.fixture(scope="module")
def digits() -> LLTokenizer:
    return LLTokenizer(TokenizerWrapper(_Digits()))


def _multiple(factor: float, **bounds: float) -> dict[str, Any]:
    kind = "integer" if isinstance(factor, int) else "number"
    return {"type": kind, "multipleOf": factor, **bounds}


@pytest.mark.parametrize(
    "schema",
    [
        _multiple(997),
        _multiple(1000),
        _multiple(997, minimum=1, maximum=99_999),
        _multiple(300, minimum=1, maximum=10**15),
        _multiple(0.01, minimum=0, maximum=1_000_000),
        _multiple(0.125),
    ],
)
def test_multiples_are_enforced_to_the_last_digit(schema: Schema, digits: LLTokenizer) -> None:
    """Issue 13: with tokens of three digits, of which a compiler has to foresee a thousand."""
    check(schema)
    compiled(schema, from_package)
    grammar, chance = schema_grammar(schema), random.Random(1)
    for _ in range(5):
        matcher = LLMatcher(digits, grammar)
        for _ in range(6):
            allowed = matcher.compute_logit_bias()
            assert not matcher.is_error(), matcher.get_error()
            tokens = [token for token in range(356, 1356) if allowed[token]]
            if not tokens:
                break
            assert matcher.consume_token(chance.choice(tokens))


@pytest.mark.parametrize(
    "schema",
    [
        _multiple(499, minimum=1, maximum=10**15),
        _multiple(797, minimum=1, maximum=10**7),
        _multiple(997, minimum=-(10**6), maximum=0),
        _multiple(99.99),
        _multiple(0.3337),
    ],
)
def test_multiples_at_which_compilers_give_up_are_refused(schema: Schema) -> None:
    """Issue 13: when the request comes in, by the path; the answer ended with an error."""
    check(schema)
    with pytest.raises(Refused, match="smaller multipleOf") as refused:
        compiled({"properties": {"a": schema}}, from_package)
    assert refused.value.path == ("properties", "a", "multipleOf")


def test_larger_multiples_are_refused_at_once() -> None:
    """Issue 13: compilers give up at them within numbers of any length."""
    with pytest.raises(InvalidRequest, match="multipleOf"):
        check(_multiple(1001))
