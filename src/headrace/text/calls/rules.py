"""Rules of a grammar in the language of llguidance, while it is put together."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from headrace.core.constraint import Constraint
from headrace.text.calls.raw import ANY_TEXT
from headrace.text.grammar import json_rule


class Rules:
    """The rules so far, and what they are made of.

    `control` has the ids of the markers that are control tokens.
    """

    def __init__(self, control: Mapping[str, int]) -> None:
        self.rules: list[str] = []
        self._control = control
        words = sorted(control, key=len, reverse=True)
        self._words = re.compile(f"({'|'.join(map(re.escape, words))})") if words else None

    def _rule(self, name: str, body: str, mark: str = "") -> str:
        name = f"{name}_{len(self.rules)}"
        self.rules.append(f"{name}{mark}: {body}")
        return name

    def _literal(self, text: str) -> str:
        """Return text in quotes, and control tokens by their ids."""
        if not text:
            return ""
        parts = self._words.split(text) if self._words else [text]
        return " ".join(
            f"<[{self._control[part]}]>"
            if part in self._control
            else json.dumps(part, ensure_ascii=False)
            for part in parts
            if part
        )

    def _until(self, marker: str, text: str = ANY_TEXT) -> str:
        """Return text, which is free or of a terminal, with the marker after it."""
        if text != ANY_TEXT:
            text = self._rule("RAW", text)
        if marker in self._control:
            return f"{'TEXT' if text == ANY_TEXT else text} {self._literal(marker)}"
        suffix = json.dumps(marker, ensure_ascii=False)
        return self._rule("until", text, f"[suffix={suffix}]")

    def _json(self, schema: Mapping[str, Any]) -> str:
        # Equal keys: the last one counts.
        return self._rule("json", json_rule(schema))

    def _text(self, grammar: Constraint) -> str:
        """Return a JSON string whose text is that of a grammar, which `text.quoted` has made."""
        return self._rule("text", f'"\\"" %lark {{\n{grammar.lark}\n}} "\\""')
