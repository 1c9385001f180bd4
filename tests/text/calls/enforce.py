"""Grammars of calls as a matcher enforces them."""

from __future__ import annotations

import random
from typing import Any

from llguidance import LLMatcher, LLTokenizer

from headrace.core.constraint import Constraint

BYTES = LLTokenizer("byte")


class Tool:
    """A function with a schema, or what takes text of a grammar."""

    def __init__(
        self,
        name: str,
        parameters: dict[str, Any] | None,
        strict: bool = True,
        input: Constraint | None = None,
    ) -> None:
        self.name = name
        self.parameters = parameters
        self.strict = strict
        self.input = input


def accepts(grammar: str, text: str) -> bool:
    """Whether the grammar takes all of the text as a whole answer."""
    assert LLMatcher.validate_grammar(grammar, BYTES) == ""
    matcher = LLMatcher(BYTES, grammar)
    tokens = BYTES.tokenize_str(text)
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


def answer(grammar: str, dice: random.Random) -> str:
    """A random answer that the grammar allows."""
    matcher, data = LLMatcher(BYTES, grammar), bytearray()
    while not matcher.is_stopped() and len(data) < 2000:
        bias = matcher.compute_logit_bias()
        choices = [token for token in range(256) if bias[token]]
        if not choices or (matcher.is_accepting() and dice.random() < 0.5):
            break
        token = dice.choice([token for token in choices if token not in (10, 32)] or choices)
        assert matcher.consume_token(token)
        data.append(token)
    return data.decode()
