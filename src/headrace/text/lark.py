"""Grammars of clients, in Lark or in GBNF, as the Lark of llguidance that engines get.

What a grammar may hold is bounded here: the elements of each rule with its repetitions written
out, and the JSON schemas in it. What only an engine could check is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

from llguidance.gbnf_to_lark import gbnf_to_lark

from headrace.core import schema
from headrace.core.errors import InvalidRequest
from headrace.text.grammar import HEADER, json_rule, without_formats

MAX_ELEMENTS = 16_384
"""Elements of all rules together; of one they are at most those of a regex."""

_TEXT = 16
_START = "hr__s"
"""The name of a client's first rule, as long as `start`: places in errors are the client's."""
TERMINAL = re.compile(r"_*[A-Z][A-Z0-9_]*")
TOKENS = re.compile(
    r"""(?P<space>\s+|//[^\n]*|\#[^\n]*)
    | (?P<text>"(?:\\.|[^"\\\n])*"i?)
    | (?P<regex>/(?:\\.|[^/\\])+/[a-z]*)
    | (?P<directive>%[a-z_]+)
    | (?P<token><[^>\n]*>)
    | (?P<name>[A-Za-z_][\w-]*)
    | (?P<open>[(\[]) | (?P<close>[)\]])
    | (?P<repeat>(?:\{|~)\s*(?P<low>\d*)\s*(?:(?:,|\.\.)\s*(?P<high>\d*)\s*)?\}?)
    | (?P<mark>[:|?!*+=,.&>0-9-])""",
    re.VERBOSE | re.DOTALL,
)
_HEADER = re.compile(r"\s*%llguidance\b[ \t]*(\{[^}\n]*\})?")
_RULE = re.compile(r"^\s*[\w-]+\s*::=", re.MULTILINE)
_SEEN_BY_ENGINES = frozenset({"max_tokens", "temperature"})

Token = re.Match[str]
"""A token of a grammar, by the groups of `TOKENS`."""


class Unenforceable(ValueError):
    """Why a grammar cannot be enforced."""


def normalised(grammar: str) -> str:
    """Return a client's grammar in Lark, checked; its lines are one further down.

    Raises:
        Unenforceable: it is beyond a limit, or has something that is not supported.
    """
    pieces: list[str] = []
    tokens: list[Token] = []
    for part in _parts(plain(grammar)):
        if isinstance(part, str):
            pieces.append(part)
            continue
        pieces.append(_START if part[0] == "start" else part[0])
        if not part["space"]:
            tokens.append(part)
    _Definitions(tokens).check()
    return f"{HEADER}\n{''.join(pieces)}\nstart: {_START}\n"


def plain(grammar: str) -> str:
    """Return a client's grammar in Lark, as it is and without its header.

    Raises:
        Unenforceable: it is GBNF that is not valid.
    """
    if not _HEADER.match(grammar) and _RULE.search(grammar):
        grammar = _converted(grammar)
    if header := _HEADER.match(grammar):
        grammar = grammar[: header.start()] + " " * len(header[0]) + grammar[header.end() :]
    return grammar


def place(text: str, at: int) -> str:
    """Return where a position is, for people."""
    return f"line {text.count(chr(10), 0, at) + 1}, column {at - text.rfind(chr(10), 0, at)}"


def _converted(gbnf: str) -> str:
    try:
        return gbnf_to_lark(_PIECES.sub(_plain, gbnf))
    except RecursionError:
        raise Unenforceable("is nested too deeply") from None
    except Exception as error:  # noqa: BLE001  # the library has no type of its own for most
        raise Unenforceable(f"is not valid GBNF: {error}{_of_rule(str(error), gbnf)}") from None


def _of_rule(error: str, gbnf: str) -> str:
    """Return the place of the rule that is missing, which the library leaves out."""
    missing = re.search(r"'([\w-]+)' not found", error)
    used = missing and re.search(rf"(?<![\w-]){missing[1]}(?![\w-])", gbnf)
    return f" at {place(gbnf, used.start())}" if used else ""


_PIECES = re.compile(r'"(?:\\.|[^"\\])*"|\[(?:\\.|[^\]\\])*\]|#[^\n]*', re.DOTALL)
_ESCAPES = re.compile(r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|(.))|[&~]|--")


def _plain(piece: Token) -> str:
    """Return a literal or a class with the escapes that Lark has too."""
    text, is_class = piece[0], piece[0].startswith("[")

    def escape(match: Token) -> str:
        if not match[0].startswith("\\"):
            # Doubled, these are operators in classes of Rust.
            return f"{match[0][:-1]}\\x{ord(match[0][-1]):02x}" if is_class else match[0]
        if code := match[1] or match[2] or match[3]:
            number = int(code, 16)
            if number < 0x80:
                return f"\\x{number:02x}" if is_class else json.dumps(chr(number))[1:-1]
            return match[0] if number > 0x10FFFF or 0xD800 <= number < 0xE000 else chr(number)
        return match[4] if match[4] in "[]" and not is_class else match[0]

    return text if text.startswith("#") else _ESCAPES.sub(escape, text)


def _parts(grammar: str) -> Iterator[Token | str]:
    """Yield the tokens of a grammar; of a JSON schema in it, its text as engines get it."""
    at = 0
    while at < len(grammar):
        token = TOKENS.match(grammar, at)
        if token is None:
            where = place(grammar, at)
            raise Unenforceable(f"has an unexpected {grammar[at]!r} at {where}")
        at = token.end()
        if token["token"]:
            raise Unenforceable(f"names a token at {place(grammar, token.start())}: not supported")
        if token["directive"] == "%json":
            text, at = _schema(grammar, at)
            yield text
        elif token["directive"] in {None, "%ignore", "%import"}:
            yield token
        else:
            where = place(grammar, token.start())
            raise Unenforceable(f"has {token[0]} at {where}, which is not supported")


def _schema(grammar: str, at: int) -> tuple[str, int]:
    start = at + len(grammar[at:]) - len(grammar[at:].lstrip())
    where = place(grammar, start)
    try:
        value, end = json.JSONDecoder().raw_decode(grammar, start)
        if not isinstance(value, dict):
            raise Unenforceable(f"has a schema at {where} that is no object")
        part = cast("dict[str, Any]", value)
        schema.check(part)
        return json_rule(without_formats(part)) + "\n" * grammar.count("\n", start, end), end
    except InvalidRequest as error:
        raise Unenforceable(f"has a schema at {where}: {error.message.rstrip('.')}") from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, Unenforceable):
            raise
        raise Unenforceable(f"has a schema at {where} that is no JSON") from None


class _Definitions:
    """The rules and terminals of a grammar, and how large they are."""

    def __init__(self, tokens: Sequence[Token]) -> None:
        self._bodies = dict(definitions(tokens))
        self._sizes: dict[str, int] = {}

    def check(self) -> None:
        """Check the size of each, and of all together.

        Raises:
            Unenforceable: it is beyond a limit.
        """
        if "start" not in self._bodies:
            raise Unenforceable("has no rule start")
        total = 0
        for name in self._bodies:
            size = self._size(name, 0)
            total += size
            if size > schema.MAX_REPETITIONS:
                most = schema.MAX_REPETITIONS
                raise Unenforceable(f"has more than {most} elements in the rule {name[:64]}")
            if total > MAX_ELEMENTS:
                raise Unenforceable(f"has more than {MAX_ELEMENTS} elements")

    def _size(self, name: str, depth: int) -> int:
        if name not in self._sizes:
            if depth > schema.MAX_LEVELS:
                raise Unenforceable(f"is more than {schema.MAX_LEVELS} terminals deep")
            self._sizes[name] = 1
            measured = schema.elements(self._bodies.get(name, ()), self._element(depth))
            self._sizes[name] = measured
        return self._sizes[name]

    def _element(self, depth: int) -> Callable[[str], int]:
        def size(text: str) -> int:
            if text.startswith("/"):
                return schema.regex_elements(text)
            # Terminals are written out where they are used, rules are not.
            if TERMINAL.fullmatch(text):
                return self._size(text, depth + 1)
            return 1 + len(text) // _TEXT

        return size


def definitions(tokens: Sequence[Token]) -> Iterator[tuple[str, list[Token]]]:
    """Yield the name and the body of each rule and terminal; a body begins with its head."""
    body: list[Token] = []
    for at, token in enumerate(tokens):
        if token["name"] and (end := _head_end(tokens, at)):
            for attribute in tokens[at + 1 : end]:
                if attribute[0] in _SEEN_BY_ENGINES:
                    raise Unenforceable(f"sets {attribute[0]}, which is not supported")
            body = []
            yield token["name"], body
        body.append(token)


def _head_end(tokens: Sequence[Token], at: int) -> int | None:
    """Return where the colon of a definition is that begins with this name; None if none does."""
    end = at + 1
    if end < len(tokens) and tokens[end][0] == "[":
        while end < len(tokens) and tokens[end][0] != "]":
            end += 1
        end += 1
    return end if end < len(tokens) and tokens[end][0] == ":" else None
