"""Rules of a grammar in the language of llguidance, while it is put together."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from headrace.core.constraint import Constraint
from headrace.text.calls.raw import ANY_TEXT
from headrace.text.grammar import json_rule

Schema = Mapping[str, Any]


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

    def _json(self, schema: Schema) -> str:
        # Equal keys: the last one counts.
        return self._rule("json", json_rule(schema))

    def _text(self, grammar: Constraint) -> str:
        """Return a JSON string whose text is that of a grammar, which `text.quoted` has made."""
        return self._rule("text", f'"\\"" %lark {{\n{grammar.lark}\n}} "\\""')

    def _members(self, schema: Schema, write: Callable[[str], str], comma: str = "") -> str:
        """Return the keys of an object in order, as `write` does: the required ones, and others.

        What may follow depends on how many there are already, up to the number that matters.
        """
        keys, required = list(schema["properties"]), schema.get("required", ())
        least, most = schema.get("minProperties", 0), schema.get("maxProperties", len(keys))
        least = 0 if least <= len({*required}) else least
        bounded = most < len(keys)
        last = most if bounded else max(least, 1 if comma else 0)
        after: list[str | None] = [None if n < least else "" for n in range(last + 1)]
        for key in reversed(keys):
            member, here = self._rule("member", write(key)), list[str | None]()
            for count, rest in enumerate(after):
                full = bounded and count == last
                there = None if full else after[min(count + 1, last)]
                ways = [] if there is None else [f"{comma if count else ''} {member} {there}"]
                if key not in required and rest is not None:
                    ways.append(rest)
                here.append(self._either(ways))
            after = here
        return after[0] or ""

    def _either(self, ways: list[str]) -> str | None:
        """Return a rule of alternatives; None without any, empty if there is only empty text."""
        if not any(ways):
            return "" if ways else None
        body = " | ".join(way for way in ways if way)
        return self._rule("members", body if all(ways) else f"({body})?")
