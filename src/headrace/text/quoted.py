"""Grammars of clients as those of text inside a JSON string, where some characters are escaped.

Control characters are not: the parser of calls takes them as they are. A lexer does not go back, so
a terminal that may have one escape does not end before another one. Where it is a repeated
character, it becomes a rule.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Set
from itertools import takewhile

from headrace.text.lark import TERMINAL, TOKENS, Token, Unenforceable, definitions, place, plain

Matched = Callable[[str, Set[str]], Set[str]]
"""Returns which of some ASCII characters a regex of one character matches."""

_IN_JSON = frozenset('"\\')
_RANGE = re.compile(r'"((?:\\.|[^"\\\n])+)"\s*\.\.\s*"((?:\\.|[^"\\\n])+)"', re.DOTALL)
_IMPORT = re.compile(
    r"%import\s+common\s*(?:\.\s*(?P<name>\w+)(?:\s*->\s*(?P<alias>\w+))?|\((?P<names>[\w\s,]+)\))"
)
# Those of Lark's own terminals that have characters which are escaped.
_COMMON = {
    "ESCAPED_STRING": r'"([^"\\]|\\[^\n])*"',
    "WS_INLINE": r"[ \t]+",
    "WS": r"[ \t\f\r\n]+",
    "CR": r"\r",
    "LF": r"\n",
    "NEWLINE": r"(\r?\n)+",
    "SH_COMMENT": r"#[^\n]*",
    "CPP_COMMENT": r"\/\/[^\n]*",
    "C_COMMENT": r"\/\*([^*]|\*+[^*\/])*\*+\/",
    "SQL_COMMENT": r"--[^\n]*",
}
_PARTS = re.compile(
    r"""(?P<open>\((?:\?(?:P?<(?![=!])[^>]*>|(?P<flags>[A-Za-z-]*)(?P<end>[:)])))?)
    | (?P<close>\)) | (?P<plain>\{[^}]*\}|[|*+?^$])
    | (?P<class>\\(?:[dDwWsS]|[pP](?:\{[^}]*\}|.)))
    | (?P<escape>\\(?:[xuU]\{[^}]*\}|x[0-9A-Fa-f]{2}|u[0-9A-Fa-f]{4}|U[0-9A-Fa-f]{8}|.))
    | (?P<set>\[) | (?P<dot>\.) | (?P<sign>.)""",
    re.VERBOSE | re.DOTALL,
)
_FLAGS = frozenset("ims-U")


def quoted(grammar: str, matched: Matched, also: str = "") -> str:
    """Return the body of a grammar of text inside a JSON string, for a grammar that compiles.

    The characters of `also` are escaped too.

    Raises:
        Unenforceable: it has a part that cannot be inside a string.
    """
    return "".join(_Quoting(plain(grammar), matched, also).pieces())


class _Quoting:
    def __init__(self, grammar: str, matched: Matched, also: str) -> None:
        self._grammar = grammar
        self._matched = matched
        self._special = _IN_JSON | frozenset(also)
        self._rest = "".join(f"\\x{ord(sign):02x}" for sign in sorted(self._special))
        self._signs: dict[str, Set[str]] = {}
        self._tokens = list(_tokens(grammar))
        self._bodies = dict(definitions([token for token in self._tokens if not token["space"]]))
        self._heads = {body[0].start(): name for name, body in self._bodies.items()}
        self._in_rule = False

    def pieces(self) -> Iterator[str]:
        at = 0
        for token in self._tokens:
            if (start := token.start()) < at:
                continue
            if start in self._heads or token["directive"]:
                name = self._heads.get(start)
                self._in_rule = name is not None and not TERMINAL.fullmatch(name)
            match = _IMPORT.match(self._grammar, start) or _RANGE.match(self._grammar, start)
            yield self._of_several(match) if match else self._of_token(token)
            at = (match or token).end()

    def _of_several(self, match: Token) -> str:
        if match.re is _RANGE:
            first, last = (f"\\x{{{ord(_text(match, end)):x}}}" for end in match.groups())
            return f"/{self._regex(f'[{first}-{last}]', dotall=False)}/"
        names = [name.strip() for name in (match["names"] or match["name"]).split(",")]
        return "\n".join(
            f"{match['alias'] or name}: /{self._regex(_COMMON[name], dotall=False)}/"
            if name in _COMMON
            else f"%import common.{name}" + (f" -> {match['alias']}" if match["alias"] else "")
            for name in names
        )

    def _of_token(self, token: Token) -> str:
        if token["text"]:
            return self._literal(token)
        if token["regex"]:
            regex, flags = _parted(token)
            loop = self._loop(token) if self._in_rule else ""
            return loop or f"/{self._regex(regex, dotall='s' in flags)}/{flags}"
        if self._in_rule and token["name"] and token.start() not in self._heads:
            body = takewhile(lambda part: not part["directive"], self._bodies.get(token[0], ()))
            match [*body]:
                case [name, _, regex] if TERMINAL.fullmatch(name[0]) and regex["regex"]:
                    return self._loop(regex) or token[0]
                case _:
                    return token[0]
        if token["repeat"] and token[0].startswith("~") and not (token["low"] or token["high"]):
            raise _impossible(token, "the operator ~")
        return token[0]

    def _loop(self, token: Token) -> str:
        """Return the rule of a repeated character that only has some of the escapes; else ""."""
        regex, flags = _parted(token)
        parts = [pair for pair in _parts(regex) if not (pair[0]["close"] or _is_group(pair[0]))]
        if len(parts) != 2 or not (parts[1][0]["plain"] and parts[1][1][0] in "*+?{"):
            return ""
        (part, text), (_, repeat) = parts
        signs = self._of_part(part, text)
        if not signs or signs == self._special:
            return ""
        rest = self._others(part, text, dotall="s" in flags)
        either = [f"/{rest}/{flags}"] if rest else []
        either += [json.dumps(self._escape(sign)) for sign in sorted(signs)]
        return f"%lark {{\nstart: ({' | '.join(either)}){repeat}\n}}"

    def _escape(self, sign: str) -> str:
        if sign not in self._special:
            return sign
        return json.dumps(sign)[1:-1] if sign in _IN_JSON else f"\\u{ord(sign):04x}"

    def _literal(self, match: Token) -> str:
        text, folded = match[0].removesuffix("i"), match[0].endswith("i")
        signs = [self._escape(sign) for sign in _text(match, text[1:-1])]
        if not folded or all(len(sign) == 1 for sign in signs):
            return json.dumps("".join(signs), ensure_ascii=False) + ("i" if folded else "")
        # The letters of an escape are those of one case.
        return f"({' '.join(json.dumps(sign) + 'i' * (len(sign) == 1) for sign in signs)})"

    def _regex(self, regex: str, *, dotall: bool) -> str:
        pieces, open_ = list[str](), list[bool]()
        for part, text in _parts(regex):
            if part["open"]:
                if part["end"] != ")":
                    open_.append(dotall)
                dotall = _dotall(part["flags"] or "", dotall=dotall)
            elif part["close"] and open_:
                dotall = open_.pop()
            signs = self._of_part(part, text)
            pieces.append(
                self._either(self._others(part, text, dotall=dotall), signs) if signs else text
            )
        return "".join(pieces)

    def _of_part(self, part: Token, text: str) -> Set[str]:
        """Return the characters to be escaped that a part of a regex matches."""
        if part["dot"]:
            return self._special
        if part["sign"]:
            return {text} & self._special
        if not (part["set"] or part["class"] or part["escape"]):
            return frozenset()
        if text not in self._signs:
            self._signs[text] = self._matched(text, self._special)
        return self._signs[text]

    def _others(self, part: Token, text: str, *, dotall: bool) -> str:
        """Return a regex of the other characters that a part matches."""
        if part["dot"]:
            return f"[^{self._rest}]" if dotall else f"[^\\n{self._rest}]"
        return f"[{text}&&[^{self._rest}]]" if part["set"] or part["class"] else ""

    def _either(self, rest: str, signs: Set[str]) -> str:
        """Return a regex of the escapes of some characters, or of what else there is."""
        ends = "|".join(re.escape(self._escape(sign)[1:]) for sign in sorted(signs))
        escapes = f"(?-i:\\\\(?:{ends}))"
        return f"(?:{rest}|{escapes})" if rest else escapes


def _tokens(grammar: str) -> Iterator[Token]:
    at = 0
    while at < len(grammar):
        token = TOKENS.match(grammar, at)
        assert token is not None
        if token["directive"] == "%json":
            raise _impossible(token, "a JSON schema")
        yield token
        at = token.end()


def _parted(token: Token) -> tuple[str, str]:
    """Return a regex without its slashes, and its flags."""
    regex, _, flags = token[0][1:].rpartition("/")
    return regex, flags


def _parts(regex: str) -> Iterator[tuple[Token, str]]:
    at = 0
    while at < len(regex):
        part = _PARTS.match(regex, at)
        assert part is not None
        end = _end_of_set(regex, at) if part["set"] else part.end()
        yield part, regex[at:end]
        at = end


def _is_group(part: Token) -> bool:
    return part["open"] in {"(", "(?:"}


def _text(match: Token, inner: str) -> str:
    try:
        text: str = json.loads(f'"{inner}"', strict=False)
    except ValueError:
        raise _impossible(match, "a text with an unknown escape") from None
    return text


def _impossible(match: Token, part: str) -> Unenforceable:
    where = place(match.string, match.start())
    return Unenforceable(f"has {part} at {where}, which a tool's text cannot have")


def _dotall(flags: str, *, dotall: bool) -> bool:
    if not _FLAGS.issuperset(flags):
        raise Unenforceable(f"has the flags {flags!r}, which a tool's text cannot have")
    on, _, off = flags.partition("-")
    return ("s" in on or dotall) and "s" not in off


def _end_of_set(regex: str, at: int) -> int:
    """Return where a set in brackets ends, which can have others in it."""
    depth = 0
    for part in _SETS.finditer(regex, at):
        depth += {"[": 1, "]": -1}.get(part[0][:1], 0)
        if not depth:
            return part.end()
    raise Unenforceable("has a set that does not end")


# The first bracket of a set is a character if it closes.
_SETS = re.compile(r"\[\^?\]?|\]|\\.|[^\[\]\\]+", re.DOTALL)
