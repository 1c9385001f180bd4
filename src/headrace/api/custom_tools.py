"""Custom tools, which take text and not arguments: functions with one argument, that text."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from msgspec import Meta, to_builtins

from headrace.api.fields import Body
from headrace.core.constraint import AnyForm, constraint_of
from headrace.core.errors import InvalidRequest
from headrace.core.tools import Tool

Syntax = Literal["lark", "regex"]
_FORMS: Mapping[Syntax, AnyForm] = {"lark": "grammar", "regex": "regex"}

ToolName = Annotated[str, Meta(pattern="^[a-zA-Z0-9_.-]{1,64}$")]

# The text of a string's value so far, without an escape that is not whole.
_OPENING = re.compile(r'\s*\{\s*"input"\s*:\s*"')
_HIGH, _LOW = r"\\u[dD][89abAB][0-9a-fA-F]{2}", r"\\u[dD][c-fC-F][0-9a-fA-F]{2}"
_PLAIN = r'[^"\\]|\\u(?![dD][89abAB])[0-9a-fA-F]{4}|\\["\\/bfnrt]'
_WHOLE = re.compile(f"(?:{_PLAIN}|{_HIGH}{_LOW})*")


class CustomCall(Body, frozen=True):
    """A call of a custom tool."""

    name: ToolName
    input: str = ""


class CustomGrammar(Body, frozen=True):
    """The grammar of a custom tool's text."""

    syntax: Syntax
    definition: str


class CustomFormat(Body, frozen=True):
    """What a custom tool takes: any text, or that of a grammar, which is enforced."""

    type: Literal["text", "grammar"]
    grammar: CustomGrammar | None = None


class CustomTool(Body, frozen=True):
    """A tool that takes text, and no arguments."""

    name: ToolName
    description: str | None = None
    format: CustomFormat | None = None


def to_tool(custom: CustomTool, place: str) -> Tool:
    """Return a custom tool of chat completions.

    Raises:
        InvalidRequest: as `custom_tool`, or its format and its grammar do not go together.
    """
    form, where = custom.format or CustomFormat("text"), f"{place}.format.grammar"
    check_format(form.type, where, has_grammar=form.grammar is not None)
    return custom_tool(custom.name, custom.description, form.grammar, f"{where}.definition")


def check_format(kind: Literal["text", "grammar"], place: str, *, has_grammar: bool) -> None:
    """Check that a format of the type grammar has one, and that of text has none.

    Raises:
        InvalidRequest: it is not so; names the place of the grammar.
    """
    if has_grammar != (kind == "grammar"):
        problem = "goes with the type grammar" if has_grammar else "is missing"
        raise InvalidRequest(f"{place} {problem}.", param=place)


def custom_tool(
    name: str, description: str | None, grammar: CustomGrammar | None, place: str
) -> Tool:
    """Return a tool that takes text, of a grammar if it has one, which its description names too.

    Raises:
        InvalidRequest: the grammar is empty or beyond a limit; names its place.
    """
    parameters: dict[str, Any] = {
        "type": "object",
        "properties": {"input": {"type": "string"}},
        "required": ["input"],
        "additionalProperties": False,
    }
    if grammar is None:
        return Tool(name, description, parameters)
    try:
        constraint = constraint_of(_FORMS[grammar.syntax], grammar.definition)
    except InvalidRequest as error:
        raise InvalidRequest(f"{place}: {error.message}", param=place) from None
    description = f"{description or ''}\n\n{_how(grammar)}".strip()
    return Tool(name, description, parameters, strict=True, input=constraint)


def _how(grammar: CustomGrammar) -> str:
    kind = "regular expression" if grammar.syntax == "regex" else "grammar (lark)"
    return f"The input is written by this {kind}:\n{grammar.definition}"


def as_wire(tool: Tool) -> dict[str, Any]:
    """Return a tool as chat completions take it: one with a grammar as a custom tool."""
    if tool.input is None:
        return {"type": "function", "function": to_builtins(tool)}
    syntax: Syntax = "regex" if tool.input.regex else "lark"
    grammar = CustomGrammar(syntax, tool.input.regex or tool.input.grammar)
    description = (tool.description or "").removesuffix(_how(grammar)).removesuffix("\n\n")
    form = CustomFormat("grammar", grammar)
    custom = CustomTool(tool.name, description or None, form)
    return {"type": "custom", "custom": to_builtins(custom)}


class FreeText:
    """Takes the text of a custom tool out of `{"input": "..."}`, while it is written."""

    def __init__(self) -> None:
        self._rest = ""
        self._begun = False

    def feed(self, arguments: str) -> str:
        """Return the new text."""
        self._rest += arguments
        if not self._begun:
            match = _OPENING.match(self._rest)
            if match is None:
                return ""
            self._rest, self._begun = self._rest[match.end() :], True
        match = _WHOLE.match(self._rest)
        assert match is not None
        self._rest = self._rest[match.end() :]
        # Models write line feeds in strings as they are.
        text: str = json.loads(f'"{match[0]}"', strict=False)
        return text

    def flush(self) -> str:
        """Return what is left if the model has written something else than such an object."""
        return "" if self._begun and self._rest.startswith('"') else self._rest


def free_text(arguments: str) -> str:
    """Return the text of a whole call."""
    free = FreeText()
    return free.feed(arguments) + free.flush()
