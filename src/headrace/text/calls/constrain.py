"""The grammar of a model's calls, in the language of llguidance."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, Protocol, cast

from headrace.core.constraint import Constraint
from headrace.core.errors import Unsupported
from headrace.text.calls.format import Format
from headrace.text.calls.raw import (
    ANY_TEXT,
    NOTES,
    below,
    keywords,
    part_of,
    plain_text,
    raw_text,
    variants_of,
)
from headrace.text.calls.rules import Rules
from headrace.text.calls.shapes import reading_of, shapes_of
from headrace.text.calls.values import declared_kind, kind_of, options_in
from headrace.text.grammar import ANSWER, HEADER

_ANY_OBJECT: dict[str, Any] = {"type": "object"}
_OF_OBJECTS = frozenset({"properties", "required", "additionalProperties"})
_PLAIN = re.compile(r"[\w.\-]+")

Schema = Mapping[str, Any]


class Callable_(Protocol):  # noqa: N801
    """A tool."""

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def parameters(self) -> Schema | None: ...  # noqa: D102
    @property
    def strict(self) -> bool: ...  # noqa: D102
    @property
    def input(self) -> Constraint | None: ...  # noqa: D102


def constraint_for(
    form: Format,
    tools: Sequence[Callable_],
    mode: Literal["auto", "required"],
    *,
    parallel: bool = True,
    thinking: Literal["none", "open", "optional"] = "none",
    control: Mapping[str, int] | None = None,
    content: str = "",
) -> str:
    """Return the grammar of an answer that calls one of the tools, or several with `parallel`.

    With `auto` the answer is free up to the beginning of a call; the arguments of tools that are
    not strict are any object there. With `content`, the rules of `text.grammar.answer_rules`, it is
    either calls alone or what those describe. Thinking comes first: `open` where the prompt has
    begun it, `optional` where the model may. `control` has the ids of the markers that are control
    tokens: their text, in quotes, would match nothing. A check of an answer is made without it.

    In tags, strings are free unless the schema lists them. The schemas themselves are not checked.
    The text of a tool's grammar, its `input`, is a JSON string in all forms of calls.

    Raises:
        Unsupported: this form of calls does not take a tool's grammar beside `content`, or a
            keyword of its schema.
    """
    made = _Grammar(form, control or {}, content)
    return made.text(tools, mode, parallel=parallel, thinking=thinking)


def thinking_before(form: Format, thinking: Literal["none", "open", "optional"]) -> tuple[str, str]:
    """Return what comes before an answer in its grammar, and the rules of that; empty if nothing.

    The modes of thinking are those of `constraint_for`.
    """
    made = _Grammar(form, {})
    prefix = made.thinking(thinking)
    return prefix, "\n".join(made.rules)


class _Grammar(Rules):
    def __init__(self, form: Format, control: Mapping[str, int], content: str = "") -> None:
        super().__init__(control)
        self._format, self._content = form, ANSWER if content else ""
        self._reading: Schema = {}
        self.rules += [content] if content else []
        self._styles: Mapping[str, Callable[[Callable_, Schema], str]] = {
            "json": self._object,
            "generic": self._object,
            "named": self._named,
            "recipient": self._named,
            "tagged": self._tagged,
            "python": self._python,
            "gemma": self._gemma,
            "harmony": self._message,
        }

    def text(self, tools: Sequence[Callable_], mode: str, *, parallel: bool, thinking: str) -> str:
        """Return the whole grammar."""
        call = self._rule("call", " | ".join(self._call(tool, mode) for tool in tools))
        harmony = self._format.style == "harmony"
        prefix = "" if harmony else self.thinking(thinking)
        if harmony:
            body = self._messages(call, mode, thinking)
        elif mode == "required":
            body = self._calls(call, parallel=parallel)
        elif self._content:
            body = f"({self._calls(call, parallel=parallel)} | {self._recipient()} {self._content})"
        else:
            body = self._free(call, parallel=parallel)
        lines = [f"start: {prefix} {body}", f"TEXT: {ANY_TEXT}", *self.rules]
        return "\n".join((HEADER, *lines, ""))

    # The answer.

    def thinking(self, thinking: str) -> str:
        """Return what the thinking before an answer is; empty if there is none."""
        opening, closing = self._format.think_open.strip(), self._format.think_close.strip()
        if thinking == "none" or not closing:
            return ""
        spaces = self._rule("spaces", "/[ \\n]*/")
        thought = f"{self._until(closing)} {spaces}"
        if thinking == "optional":
            return f"({self._literal(opening)} {thought})?"
        return thought

    def _call(self, tool: Callable_, mode: str) -> str:
        schema = tool.parameters or {
            "type": "object",
            "properties": {},
            "additionalProperties": False,
        }
        if mode == "auto" and not tool.strict:
            schema = _ANY_OBJECT
        style, write = self._format.style, self._styles[self._format.style]
        if style not in ("tagged", "python", "gemma") or schema is _ANY_OBJECT or tool.input:
            return self._rule("tool", write(tool, schema))
        self._reading, shapes = reading_of(tool.name, schema), shapes_of(tool.name, schema)
        return self._rule("tool", " | ".join(write(tool, shape) for shape in shapes))

    def _calls(self, call: str, *, parallel: bool) -> str:
        opening, more, closing = self._around()
        repeated = f"({self._literal(more)} {call})*" if parallel else ""
        return f"{self._literal(opening)} {call} {repeated} {self._literal(closing)}"

    def _around(self) -> tuple[str, str, str]:
        """Return what comes before the first call, between calls, and after the last one."""
        form = self._format
        if form.style in ("json", "generic") and (form.joined or form.array):
            brackets = ("[", "]") if form.array else ("", "")
            return form.call_open + brackets[0], form.separator, brackets[1] + form.call_close
        if form.style == "python":
            return form.call_open + "[", form.separator, "]" + form.call_close
        closing = "" if form.style == "recipient" else form.call_close
        more = closing + form.separator + form.call_open
        opening = form.section_open + form.call_open
        if form.style == "recipient" and form.template.turn.endswith(form.call_open):
            opening = ""
        return opening, more, closing + form.section_close

    def _recipient(self) -> str:
        """Return what comes before content."""
        if self._format.style != "recipient":
            return ""
        return self._literal(f"{self._around()[0]}all\n")

    def _free(self, call: str, *, parallel: bool) -> str:
        """Return free text; where a call begins, what it has to be."""
        opening, more, closing = self._around()
        trigger = self._trigger(opening)
        if not trigger:
            first = (opening or "{")[0]
            free = self._rule("free", f"/([^\\{first}](.|\\n)*)?/")
            return f"({self._calls(call, parallel=parallel)} | {free})"
        rest = opening[len(trigger) :]
        repeated = f"({self._literal(more)} {call})*" if parallel else ""
        body = f"{self._literal(rest)} {call} {repeated} {self._literal(closing)}"
        if trigger in self._control:
            head = f"TEXT {self._literal(trigger)}"
        else:
            head = self._rule("head", f"TEXT {self._literal(trigger)}", "[lazy]")
        shown = [self._literal(marker) for marker in self._format.hidden if marker in self._control]
        also = f"(({' | '.join(shown)}) TEXT)*" if shown else ""
        return f"({head} {body}){'*' if parallel else '?'} TEXT {also}"

    def _trigger(self, opening: str) -> str:
        form = self._format
        if form.style == "recipient":
            return form.call_open if opening else ""
        trigger = (form.section_open or form.call_open).strip()
        first = self._words.match(trigger) if self._words else None
        return first[0] if first else trigger

    # Calls. What is before and after each is `_around`.

    def _arguments(self, tool: Callable_, schema: Schema) -> str:
        """Return an object of JSON."""
        if tool.input is None:
            return self._json(schema)
        return f'"{{\\"input\\": " {self._text(tool.input)} "}}"'

    def _object(self, tool: Callable_, schema: Schema) -> str:
        form = self._format
        if self._content and not self._around()[0]:
            if tool.input is not None:
                problem = f"The input of the tool {tool.name} cannot be enforced beside a format."
                raise Unsupported(problem, param="tools")
            return self._json(_whole_call(form, tool, schema))
        head = (
            "{"
            + self._identity()
            + json.dumps(form.name_key)
            + ": "
            + json.dumps(tool.name, ensure_ascii=False)
        )
        head += f", {json.dumps(form.arguments_key)}: "
        written = self._literal(head)
        if form.id_key and form.ids == "key":
            left, _, right = head.partition("\0")
            digits = self._rule("digits", "/[0-9]+/")
            written = f"{self._literal(left)} {digits} {self._literal(right)}"
        return f'{written} {self._arguments(tool, schema)} "}}"'

    def _identity(self) -> str:
        form = self._format
        return f'"{form.id_key}": "\0", ' if form.id_key and form.ids == "key" else ""

    def _named(self, tool: Callable_, schema: Schema) -> str:
        form, name = self._format, self._literal(tool.name)
        if form.ids == "name":
            digits = self._rule("digits", "/[0-9]+/")
            name = f"{self._literal(f'functions.{tool.name}:')} {digits}"
        return f"{name} {self._literal(form.name_end)} {self._arguments(tool, schema)}"

    def _tagged(self, tool: Callable_, schema: Schema) -> str:
        form = self._format
        name_end = self._attributes(form.name_end)
        if tool.input is not None:
            arguments = self._value("input", "object", self._text(tool.input))
        elif schema is _ANY_OBJECT:
            arguments = f"({self._any_argument()})*"
        else:
            arguments = self._members(schema, partial(self._argument, schema))
        return " ".join((self._literal(tool.name), name_end, arguments))

    def _attributes(self, end: str) -> str:
        if 'index="' not in end:
            return self._literal(end)
        before, _, after = re.split(r"(\d+)", end, maxsplit=1)
        digits = self._rule("digits", "/[0-9]+/")
        return f"{self._literal(before)} {digits} {self._literal(after)}"

    def _argument(self, schema: Schema, key: str) -> str:
        part, typed = part_of(schema, key), bool(self._format.typed)
        kind = kind_of(schema if typed else self._reading, key)
        text = plain_text(schema, key, kind, typed=typed)
        if not text:
            return self._value(key, declared_kind(part) or "object", self._json(part))
        if options := options_in(part):
            return self._value(key, "string", f"({' | '.join(map(self._literal, options))})")
        head, close, after = self._value_marks(key, "string")
        return f"{self._literal(head)} {self._until(close, text)} {self._literal(after)}"

    def _value(self, key: str, kind: str, value: str) -> str:
        head, close, after = self._value_marks(key, kind)
        return f"{self._literal(head)} {value} {self._literal(close + after)}"

    def _value_marks(self, key: str, kind: str) -> tuple[str, str, str]:
        """Return what comes before the value of an argument, its end, and what follows that."""
        form = self._format
        frame, close = "\n" if form.framed else "", form.value_close.strip()
        head = form.key_open + key + self._key_end(kind) + form.value_open + frame
        after = form.value_close[form.value_close.find(close) + len(close) :]
        return head, frame + close, after

    def _any_argument(self) -> str:
        form = self._format
        close = form.value_close.strip()
        after = form.value_close[form.value_close.find(close) + len(close) :]
        key = self._rule("key", '/[^<>"\\n]+/')
        end = self._literal(self._key_end("string") + form.value_open)
        if form.typed:
            end = f"({end} | {self._literal(self._key_end('number') + form.value_open)})"
        opening = self._literal(form.key_open)
        return f"{opening} {key} {end} {self._until(close)} {self._literal(after)}"

    def _key_end(self, kind: str) -> str:
        form = self._format
        if form.typed == "string":
            return form.key_end.replace("true", "true" if kind == "string" else "false")
        return form.key_end.replace('"string"', f'"{kind}"') if form.typed else form.key_end

    def _python(self, tool: Callable_, schema: Schema) -> str:
        if tool.input is not None:
            return f'{self._literal(f"{tool.name}(input=")} {self._text(tool.input)} ")"'
        return self._pairs(tool.name + "(", schema, "=", ", ", self._python_value) + ' ")"'

    def _python_value(self, schema: Schema) -> str:
        if schema.get("type") == "boolean":
            return '("True" | "False")'
        if schema.get("type") == "string" and schema.keys() <= NOTES:
            quoted = self._rule("quoted", r"/'([^'\\\n]|\\[\\'\"nrt])*'/")
            return f"({self._json(schema)} | {quoted})"
        return self._json(schema)

    def _gemma(self, tool: Callable_, schema: Schema) -> str:
        if tool.input is not None:
            return f'{self._literal(f"{tool.name}{{input:")} {self._text(tool.input)} "}}"'
        return self._pairs(tool.name + "{", schema, ":", ",", self._gemma_value) + ' "}"'

    def _gemma_value(self, schema: Schema) -> str:
        """Return a value, in JSON if Gemma's own notation cannot be restricted like it."""
        kind, quote, keys = declared_kind(schema), self._format.quote, keywords(schema)
        if options := options_in(schema):
            quoted = (self._literal(quote + option + quote) for option in options)
            return "(" + " | ".join(quoted) + ")"
        if "enum" in keys or "const" in keys:
            return self._json(schema)
        if variants := variants_of(schema):
            return f"({' | '.join(map(self._gemma_value, variants))})"
        if kind == "string":
            return f"{self._literal(quote)} {self._until(quote, raw_text(schema, schema))}"
        items: object = schema.get("items")
        if kind == "array" and keys == {"items"} and isinstance(items, dict):
            item = self._rule("item", self._gemma_value(below(schema, cast("Schema", items))))
            return f'"[" ({item} ("," {item})*)? "]"'
        declared = {*schema.get("required", ())} <= {*schema.get("properties", ())}
        if kind == "object" and schema.get("properties") and keys <= _OF_OBJECTS and declared:
            return self._pairs("{", schema, ":", ",", self._gemma_value) + ' "}"'
        return self._json(schema) if keys or kind else self._gemma_any()

    def _gemma_any(self) -> str:
        """Return a value of any type, with the rules that it needs."""
        if not any(rule.startswith("gany:") for rule in self.rules):
            quote = self._format.quote
            text = f"{self._literal(quote)} {self._until(quote)}"
            number = self._rule("scalar", "/-?[0-9]+(\\.[0-9]+)?|true|false|null/")
            key = self._rule("key", "/[A-Za-z_][A-Za-z0-9_]*/")
            pair = f'{key} ":" gany'
            objects = f'"{{" ({pair} ("," {pair})*)? "}}"'
            lists = '"[" (gany ("," gany)*)? "]"'
            self.rules.append(f"gany: {text} | {number} | {objects} | {lists}")
        return "gany"

    def _pairs(
        self, opening: str, schema: Schema, equal: str, comma: str, value: Callable[[Schema], str]
    ) -> str:
        """Return keys and values as `_members` does."""
        if not schema.get("properties"):
            if schema is _ANY_OBJECT and self._format.style == "gemma":
                return self._any_pairs(opening)
            return self._literal(opening)

        def pair(key: str) -> str:
            name = key if _PLAIN.fullmatch(key) else json.dumps(key, ensure_ascii=False)
            return f"{self._literal(name + equal)} {value(part_of(schema, key))}"

        return f"{self._literal(opening)} {self._members(schema, pair, self._literal(comma))}"

    def _any_pairs(self, opening: str) -> str:
        value, key = self._gemma_any(), self._rule("key", "/[A-Za-z_][A-Za-z0-9_]*/")
        return f'{self._literal(opening)} ({key} ":" {value} ("," {key} ":" {value})*)?'

    # Harmony.

    def _message(self, tool: Callable_, schema: Schema) -> str:
        kind = f"({self._literal(' <|constrain|>json')} | {self._literal(' json')})?"
        message = f"{kind} {self._literal('<|message|>')} {self._arguments(tool, schema)}"
        to = f" to=functions.{tool.name}"
        header = self._literal(f"{to}<|channel|>commentary")
        return f"({header} | {self._literal('<|channel|>commentary' + to)}) {message}"

    def _messages(self, call: str, mode: str, thinking: str) -> str:
        text, again = self._until("<|end|>"), self._literal("<|start|>assistant")
        thought = f"{self._literal('<|channel|>analysis<|message|>')} {text} {again}"
        preamble = f"{self._literal('<|channel|>commentary<|message|>')} {text} {again}"
        before = f"{text} {again}" if thinking == "open" else ""
        answer = call
        if mode == "auto":
            final = self._literal("<|channel|>final<|message|>")
            answer = f"({call} | {final} {self._content or 'TEXT'})"
        return f"{before} ({thought} | {preamble})* {answer}"


def _whole_call(form: Format, tool: Callable_, schema: Schema) -> Schema:
    """Return the schema of a call that JSON of another kind can take the place of.

    The lexer takes the longest text, so that a call's beginning would hide that of other JSON.
    """
    keys = {form.name_key: {"const": tool.name}, form.arguments_key: schema}
    call = {"properties": keys, "required": list(keys), "additionalProperties": False}
    return below(schema, {"type": "object", **call})
