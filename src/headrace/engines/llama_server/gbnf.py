"""Constraints in llama.cpp's own grammars, for builds without llguidance.

Those keep to a JSON schema as far as llama.cpp converts it, and to a choice; a regex and a grammar
need llguidance. The worker checks each answer, so nothing that was not enforced passes.
"""

from __future__ import annotations

from typing import Any

from headrace.core.constraint import Constraint, TextForm
from headrace.text.grammar import without_formats

FORMS: tuple[TextForm, ...] = ("choice",)

_ESCAPED = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t"}


def in_gbnf(constraint: Constraint) -> dict[str, Any]:
    """Return the fields of a request's body that enforce a constraint.

    Raises:
        InvalidRequest: the schema has a format that cannot be enforced; names its path.
    """
    if constraint.choice:
        texts = " | ".join(map(_literal, constraint.choice))
        return {"grammar": f"root ::= {texts}\n"}
    return {"json_schema": without_formats(constraint.json_schema)}


def _literal(text: str) -> str:
    return f'"{"".join(map(_character, text))}"'


def _character(sign: str) -> str:
    if sign in _ESCAPED:
        return _ESCAPED[sign]
    return sign if sign.isprintable() else f"\\U{ord(sign):08X}"
