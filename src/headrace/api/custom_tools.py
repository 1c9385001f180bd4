"""Custom tools, which take text and not arguments: functions with one argument, that text."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Literal

from msgspec import Meta

from headrace.api.fields import Body
from headrace.core import schema
from headrace.core.errors import InvalidRequest
from headrace.core.tools import Tool

Syntax = Literal["lark", "regex"]

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
    """What a custom tool takes: any text, or that of a grammar; a regex is enforced."""

    type: Literal["text", "grammar"]
    grammar: CustomGrammar | None = None


class CustomTool(Body, frozen=True):
    """A tool that takes text, and no arguments."""

    name: ToolName
    description: str | None = None
    format: CustomFormat | None = None


def to_tool(custom: CustomTool, place: str) -> Tool:
    """Return a custom tool of chat completions; raises as `custom_tool`."""
    grammar = custom.format.grammar if custom.format else None
    syntax, definition = (grammar.syntax, grammar.definition) if grammar else (None, None)
    where = f"{place}.format.grammar.definition"
    return custom_tool(custom.name, custom.description, syntax, definition, where)


def custom_tool(
    name: str, description: str | None, syntax: Syntax | None, definition: str | None, place: str
) -> Tool:
    """Return a tool that takes text; a grammar is described, and a regex is enforced too.

    Raises:
        InvalidRequest: the regex is beyond a limit; names its place.
    """
    text: dict[str, Any] = {"type": "string"}
    if definition:
        kind = "regular expression" if syntax == "regex" else "grammar (lark)"
        how = f"The input is written by this {kind}:\n{definition}"
        description = f"{description or ''}\n\n{how}".strip()
    if definition and syntax == "regex":
        text["pattern"] = f"^(?:{definition})$"
        try:
            schema.check(text)
        except InvalidRequest as error:
            reason = error.message.partition(" in the JSON schema ")[2]
            raise InvalidRequest(f"{place} {reason}", param=place) from None
    parameters = {
        "type": "object",
        "properties": {"input": text},
        "required": ["input"],
        "additionalProperties": False,
    }
    return Tool(name, description, parameters, strict="pattern" in text)


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
