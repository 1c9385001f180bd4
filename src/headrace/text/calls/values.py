"""Values of arguments that are not written as JSON, made into JSON as they come."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from typing import Any, cast

import msgspec

from headrace.text.calls.cursor import Cursor, Emit, Need, NotACallError, markers_of
from headrace.text.calls.scan import JsonScanner

_MAX_DEPTH = 64
_NAME = re.compile(r"[\w.\-]*")
_SCALAR = re.compile(r"[-+.\w]*")
_NUMBER = re.compile(r"[+-]?(0[xob][0-9a-fA-F_]+|[0-9_]*\.?[0-9_]*(e[+-]?[0-9]+)?)")
_HEX = re.compile(r"[0-9A-Fa-f]+")
_WORDS = {"True": "true", "False": "false", "None": "null"}
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "a": "\a", "v": "\v", "0": "\0"}
_ESCAPES.update({"\\": "\\", "'": "'", '"': '"', "/": "/", "\n": ""})
_QUOTES = ('"""', "'''", '"', "'")


def escaped(text: str) -> str:
    """Return text as it is inside a JSON string."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


def is_json(text: str) -> bool:
    """Whether the text is one JSON value."""
    try:
        msgspec.json.decode(text.encode())
    except (ValueError, RecursionError):
        return False
    return True


class Literals:
    """Translates values to JSON: those of Python, or Gemma's with its own quote and bare keys."""

    def __init__(self, cursor: Cursor, emit: Emit, quote: str = "") -> None:
        self._cursor = cursor
        self._emit = emit
        self._quote = quote
        self._quotes = (quote, '"') if quote else _QUOTES

    def key(self, end: str) -> Need[str]:
        """Consume the name of an argument and `end`."""
        cursor = self._cursor
        yield from cursor.spaces()
        if quote := (yield from cursor.accept(*self._quotes)):
            key, _ = yield from cursor.until(markers_of((quote,)), 256)
        else:
            key = yield from cursor.run(_NAME, 256)
        yield from cursor.expect(end)
        if not key:
            raise NotACallError
        return key

    def value(self, depth: int = 0) -> Need[None]:
        """Consume a value and emit it as JSON."""
        if depth > _MAX_DEPTH:
            raise NotACallError
        opening = yield from self._cursor.accept(*self._quotes, "[", "(", "{")
        if not opening:
            yield from self._scalar()
        elif opening == "{":
            yield from self._object(depth)
        elif opening in "[(":
            yield from self._list("]" if opening == "[" else ")", depth)
        else:
            self._emit('"')
            yield from self._string(opening)
            self._emit('"')

    def _scalar(self) -> Need[None]:
        yield from self._cursor.spaces()
        word = yield from self._cursor.run(_SCALAR, 4096)
        if plain := _scalar(word):
            self._emit(plain)
        elif self._quote and word:
            self._emit(json.dumps(word, ensure_ascii=False))
        else:
            raise NotACallError

    def _list(self, end: str, depth: int) -> Need[None]:
        cursor, comma = self._cursor, ""
        self._emit("[")
        while not (yield from cursor.accept(end)):
            self._emit(comma)
            yield from self.value(depth + 1)
            comma = ", "
            if (yield from cursor.expect(",", end)) == end:
                break
        self._emit("]")

    def _object(self, depth: int) -> Need[None]:
        cursor, comma = self._cursor, ""
        self._emit("{")
        while not (yield from cursor.accept("}")):
            self._emit(comma + '"')
            quote = yield from cursor.accept(*self._quotes)
            if quote:
                yield from self._string(quote)
                yield from cursor.expect(":")
            else:
                self._emit((yield from self.key(":")))
            self._emit('": ')
            yield from self.value(depth + 1)
            comma = ", "
            if (yield from cursor.expect(",", "}")) == "}":
                break
        self._emit("}")

    def _string(self, quote: str) -> Need[None]:
        cursor = self._cursor
        markers = markers_of((quote,) if quote == self._quote else (quote, "\\"))
        while True:
            marker = yield from cursor.find(markers, lambda text: self._emit(escaped(text)))
            if not marker:
                raise NotACallError
            cursor.skip(len(marker))
            if marker == quote:
                return
            yield from self._escape()

    def _escape(self) -> Need[None]:
        letter = yield from self._cursor.take(1)
        size = {"x": 2, "u": 4, "U": 8}.get(letter, 0)
        if not size:
            self._emit(escaped(_ESCAPES.get(letter, "\\" + letter)))
            return
        digits = yield from self._cursor.take(size)
        if not _HEX.fullmatch(digits) or int(digits, 16) > 0x10FFFF:
            raise NotACallError
        if size < 8:
            self._emit(f"\\u{digits:0>4}")
        else:
            self._emit(json.dumps(chr(int(digits, 16)))[1:-1])


def _scalar(word: str) -> str:
    """Return a word or a number of JSON or Python as JSON; "" if it is none."""
    word = _WORDS.get(word, word)
    if is_json(word) or not _NUMBER.fullmatch(word):
        return word if is_json(word) else ""
    try:
        number = json.dumps(ast.literal_eval(word))
    except (ValueError, SyntaxError):
        return ""
    return number if is_json(number) else ""


def _mended(text: str) -> str:
    """Return a JSON string, in which control characters may be as they are; "" if it is none."""
    try:
        return json.dumps(json.loads(text, strict=False), ensure_ascii=False)
    except ValueError:
        return ""


def _from_python(text: str) -> str | None:
    """Return a list or object as Python writes it as JSON; None if it is not one."""
    cursor, parts = Cursor(), list[str]()
    cursor.push(text)
    cursor.ended = True
    try:
        for _ in Literals(cursor, parts.append).value():
            pass
    except NotACallError:
        return None
    return "".join(parts) if cursor.exhausted else None


class TypedValue:
    """The text of one tagged argument as JSON: a string, or what it says if that is JSON.

    `kind` is `string`, `nullable` (a string, or null), `structured` (of other types, or of
    several) or `any`. Strings are emitted as they come, anything else when it is complete.
    """

    def __init__(self, kind: str, emit: Emit) -> None:
        self._emit = emit
        self._kind = kind
        self._texts: list[str] = []
        self._begun = False
        self._scanner = JsonScanner() if kind == "structured" else None

    @property
    def in_string(self) -> bool:
        """Whether the text so far ends within a string of JSON, where no marker ends the value."""
        return self._scanner is not None and self._scanner.in_string

    def feed(self, text: str) -> None:
        """Add text."""
        if self._begun:
            self._emit(escaped(text))
            return
        self._texts.append(text)
        if self._scanner is not None:
            self._scanner.feed(text, 0, len(text))
        if self._is_free:
            return
        held = "".join(self._texts)
        if self._kind == "string" or not "null".startswith(held):
            self._begun = True
            self._emit('"' + escaped(held))

    def finish(self) -> None:
        """End the value."""
        if self._begun:
            self._emit('"')
            return
        text = "".join(self._texts)
        plain = _WORDS.get(text.strip(), text.strip())
        if self._is_free and plain.startswith('"') and (string := _mended(plain)):
            plain = string
        is_plain = plain == "null" if self._kind == "nullable" else self._is_free
        if is_plain and is_json(plain):
            self._emit(plain)
            return
        listed = _from_python(plain) if self._is_free and plain[:1] in ("[", "{") else None
        self._emit(listed or json.dumps(text, ensure_ascii=False))

    @property
    def _is_free(self) -> bool:
        return self._kind in ("any", "structured")


def kind_of(schema: Mapping[str, Any] | None, key: str) -> str:
    """Return the `kind` of an argument by the schema of the arguments."""
    properties = (schema or {}).get("properties")
    if not isinstance(properties, dict):
        return "any"
    types = _types(schema or {}, cast("dict[str, Any]", properties).get(key), 0, set())
    if types - {"null"} != {"string"}:
        return "any" if "any" in types or not types else "structured"
    return "nullable" if "null" in types else "string"


def _types(root: Mapping[str, Any], schema: object, depth: int, seen: set[int]) -> set[str]:
    """Return the types that a schema allows, without those `seen`; `any` where it does not say.

    Nothing else has looked at the schema of a call that is not enforced, and alternatives multiply.
    """
    if not isinstance(schema, dict) or depth > 8:
        return {"any"}
    node = cast("dict[str, Any]", schema)
    if id(node) in seen:
        return set()
    seen.add(id(node))
    if isinstance(reference := node.get("$ref"), str):
        return _types(root, resolved(root, reference), depth + 1, seen)
    for name in ("anyOf", "oneOf"):
        if isinstance(node.get(name), list):
            parts: list[object] = node[name]
            return set[str]().union(*(_types(root, part, depth + 1, seen) for part in parts))
    if isinstance(node.get("allOf"), list) and len(node["allOf"]) == 1:
        return _types(root, node["allOf"][0], depth + 1, seen)
    kinds = node.get("type")
    if isinstance(kinds, str):
        return {kinds}
    if isinstance(kinds, list):
        return {str(kind) for kind in cast("list[Any]", kinds)}
    values = node["enum"] if isinstance(node.get("enum"), list) else [node.get("const")]
    names: dict[type, str] = {str: "string", type(None): "null"}
    if "enum" in node or "const" in node:
        return {names.get(type(value), "any") for value in cast("list[object]", values)}
    return {"any"}


def resolved(root: Mapping[str, Any], reference: str) -> object:
    """Return what a reference within a schema refers to, None if there is nothing."""
    node: Any = root
    for name in reference.removeprefix("#/").split("/"):
        node = cast("dict[str, Any]", node).get(name) if isinstance(node, dict) else None
    return node


def options_in(schema: Mapping[str, Any]) -> list[str]:
    """Return the texts that a schema lists; none if it lists other values too."""
    options = schema.get("enum", [schema["const"]] if "const" in schema else [])
    return options if all(isinstance(option, str) for option in options) else []


def declared_kind(schema: Mapping[str, Any]) -> str:
    """Return the type of a schema, "" where it has none or several."""
    kind = schema.get("type")
    if isinstance(kind, str):
        return kind
    compound = any(name in schema for name in ("$ref", "anyOf", "oneOf", "allOf"))
    return "object" if compound else ""
