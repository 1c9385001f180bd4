"""JSON schemas as grammars of llguidance, for engines that take one."""

from __future__ import annotations

import json
from typing import Any

from headrace.core.errors import InvalidRequest

# Where JSON allows any white space a small model can go on with it up to its limit.
_SPACING = {
    "x-guidance": {
        "whitespace_flexible": False,
        "item_separator": ", ",
        "key_separator": ": ",
    }
}


def grammar(schema: dict[str, Any]) -> str:
    """Return the grammar of a JSON schema.

    Raises:
        InvalidRequest: the schema is not usable.
    """
    # Native, and rarely needed. llama.cpp drops what it cannot compile without a word.
    from llguidance import LLMatcher

    text = "%llguidance {}\nstart: %json " + json.dumps(_SPACING | schema)
    if problem := LLMatcher.validate_grammar(text):
        reason = problem.partition("\n")[0].partition("JSON schema: ")[2] or problem
        raise InvalidRequest(f"The JSON schema is not usable: {reason}", param="response_format")
    return text
