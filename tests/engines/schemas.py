"""Random JSON schemas of the ordinary kind, and few that cannot be enforced."""

from __future__ import annotations

import random
from typing import Any

Schema = dict[str, Any]

_FORMATS = ("uri", "date-time", "email", "uuid", "date", "time", "ipv4", "duration", "hostname")
_PATTERNS = ("^[a-z]{1,8}$", "^[A-Z]{2}-[0-9]{3}$", "^(yes|no)$", r"^\d{4}$", "^#[0-9a-f]{6}$")
_NAMES = ("name", "age", "tags", "city", "kind", "a/b", "größe", "x y")
_REFUSED: tuple[Schema, ...] = (
    {"not": {"type": "string"}},
    {"type": "array", "uniqueItems": True},
    {"type": "string", "format": "regex"},
    {"if": {"type": "string"}, "then": {"minLength": 2}},
)

# The names of SmolLM2's special tokens, as text.
SPECIAL: tuple[Schema, ...] = (
    {"enum": ["<|im_start|>", "a<|im_end|>b"]},
    {"const": {"<|endoftext|>": ["<|im_end|>", "<|im_start|>"]}},
    {"type": "string", "pattern": r"^<\|im_start\|>[a-z]{2}\x3c\|im_end\|>$"},
    {"type": "object", "required": ["<|im_end|>"], "additionalProperties": False}
    | {"properties": {"<|im_end|>": {"type": "boolean"}}},
)


class Maker:
    """Makes one schema; the same seed makes the same one."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def schema(self) -> Schema:
        made = self._any(3)
        if self._random.random() < 0.4:
            made = self._object(3)
        if self._random.random() < 0.25:
            shared = self._any(1)
            reference = {"$ref": "#/$defs/shared"}
            made = {
                "$defs": {"shared": shared},
                "type": "object",
                "properties": {"first": reference, "second": reference, "third": made},
                "required": ["first", "third"],
                "additionalProperties": False,
            }
        return made

    def _any(self, depth: int) -> Schema:
        scalar = (self._string, self._integer, self._number, self._constant, self._simple)
        composed = (self._object, self._array, self._choice)
        if self._random.random() < 0.04:
            return self._random.choice(_REFUSED)
        if depth and self._random.random() < 0.5:
            return self._random.choice(composed)(depth - 1)
        return self._random.choice(scalar)()

    def _string(self) -> Schema:
        draw = self._random.random()
        if draw < 0.35:
            return {"type": "string", "format": self._random.choice(_FORMATS), "maxLength": 60}
        if draw < 0.55:
            return {"type": "string", "pattern": self._random.choice(_PATTERNS)}
        low = self._random.randrange(4)
        return {"type": "string", "minLength": low, "maxLength": low + self._random.randrange(20)}

    def _integer(self) -> Schema:
        low = self._random.randrange(-1000, 1000)
        made: Schema = {"type": "integer", "minimum": low, "maximum": low + 5000}
        if self._random.random() < 0.3:
            made["multipleOf"] = self._random.choice((2, 5, 7, 25, 100))
        return made

    def _number(self) -> Schema:
        low = round(self._random.uniform(-10, 10), 2)
        kind = self._random.choice(("minimum", "exclusiveMinimum"))
        return {"type": "number", kind: low, "maximum": low + 100}

    def _constant(self) -> Schema:
        values: list[Any] = ["red", "grün", 1, -2.5, True, None, [1, 2], {"a": "b"}, 'a"\\\n']
        if self._random.random() < 0.5:
            return {"const": self._random.choice(values)}
        return {"enum": self._random.sample(values, 3)}

    def _simple(self) -> Schema:
        return {"type": self._random.choice(("boolean", "null", ["boolean", "null"]))}

    def _array(self, depth: int) -> Schema:
        low = self._random.randrange(3)
        made: Schema = {"type": "array", "items": self._any(depth), "maxItems": low + 2}
        if low:
            made["minItems"] = low
        if self._random.random() < 0.2:
            made["prefixItems"] = [self._any(0)]
        return made

    def _object(self, depth: int) -> Schema:
        names = self._random.sample(_NAMES, self._random.randrange(1, 5))
        made: Schema = {"type": "object", "properties": {name: self._any(depth) for name in names}}
        made["required"] = self._random.sample(names, self._random.randrange(len(names) + 1))
        if self._random.random() < 0.8:
            made["additionalProperties"] = False
        return made

    def _choice(self, depth: int) -> Schema:
        kind = self._random.choice(("anyOf", "anyOf", "oneOf"))
        if kind == "anyOf":
            return {kind: [self._any(depth), self._any(0)]}
        tagged = [
            {
                "type": "object",
                "properties": {"kind": {"const": name}, name: self._any(0)},
                "required": ["kind"],
                "additionalProperties": False,
            }
            for name in ("cat", "dog")
        ]
        return {kind: tagged}
