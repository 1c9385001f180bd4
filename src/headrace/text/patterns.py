"""Patterns of JSON schemas, written so that compilers of grammars read them as validators do."""

from __future__ import annotations

import re

_TOKEN = re.compile(r"\\.|\[(\^?)(\]?(?:\\.|[^\]\\])*)\]", re.DOTALL)
_MEMBER = re.compile(r"\\(?:x00|u0000|0)-|\\.|\[", re.DOTALL)
# What `\s` is everywhere, and what it is in one language or another.
_SPACES = r" \t\n\x0b\f\r\u00a0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_ALL_SPACES = rf"{_SPACES}\x1c-\x1f\x85\ufeff"
_OUTSIDE = {r"\s": f"[{_SPACES}]", r"\S": f"[^{_ALL_SPACES}]"}
_FROM_NUL = dict.fromkeys(("\\x00-", "\\u0000-", "\\0-"), "\\x01-")
_MEMBERS = {"[": "\\[", r"\s": _SPACES, **_FROM_NUL}
_EXCLUDED = {"[": "\\[", r"\s": _ALL_SPACES}


def as_compiled(pattern: str) -> str:
    """Return a pattern without what compilers read in another way.

    A bracket inside of brackets is itself, where compilers begin another class. A class with all
    control characters would allow quotation marks and backslashes too, so NUL is in none.
    """
    return _TOKEN.sub(_read, pattern)


def _read(token: re.Match[str]) -> str:
    if token[1] is None:
        return _OUTSIDE.get(token[0], token[0])
    begin, changed = ("[^\\x00", _EXCLUDED) if token[1] else ("[", _MEMBERS)
    members = _MEMBER.sub(lambda member: changed.get(member[0], member[0]), token[2])
    return f"{begin}{members}]"
