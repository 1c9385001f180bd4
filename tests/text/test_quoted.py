"""Issue 13, custom tools: grammars as those of text inside a JSON string."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from headrace.core.constraint import Constraint
from headrace.text.grammar import HEADER, grammar
from headrace.text.lark import normalised
from headrace.worker.compiling import Refused, in_string
from headrace.worker.matchers import from_package

PATCH = Path(__file__).with_name("patch.lark").read_text()
PATCHED = """*** Begin Patch
*** Update File: a"b\\c.py
@@ def <f>():
-\told "x"
+é\x01
*** End Patch
"""
IGNORING = r"""start: A+
A: /[^x]/ | "\"Q\n"i | "a".."c"
%ignore WS
%import common (WS, INT)
"""
QUOTES = r"""start: "\"" /[^"]*/ "\"" X "\""
X: /[^"a-f]{1,3}/i
%ignore " "
"""
GRAMMARS = {
    PATCH: (
        [PATCHED, "*** Begin Patch\n*** Delete File: x\n*** End Patch"],
        ["*** Begin Patch\n*** End Patch\n", PATCHED + "x", PATCHED.replace("+", "=")],
    ),
    IGNORING: (["a\tb", '"q\n', "\x7f\x80", "\\", "\n"], ["x", '"x']),
    QUOTES: (['"a\\b"z\\"', '"" \n"', '"a"zx"'], ['"a"', '""a"b"', '""zzzz"']),
    "start: ESCAPED_STRING\n%import common.ESCAPED_STRING\n": (['"a\\"b"'], ['"a"b"', "a"]),
    'root ::= [^a]+ "\\n"': (['b"\\\n'], ["a\n", "b"]),
}
REGEXES = {
    r"(?s:.)*": (['\n"\\a\x00', ""], []),
    ".*": (['a"b\\'], ["a\n"]),
    r"[\s\S]+": (["\n x"], [""]),
    r"(?i)a\nb\"(?-i)c": (['A\nB"c'], ['a\nb"C']),
    r"[[:space:]]|[^[:^cntrl:]]": (["\n", "\x01"], ["a"]),
    r"\x22\u{5c}\x0a": (['"\\\n'], ["a"]),
    r"\p{L}+[\p{P}&&[^!]]": (['ab"', "é\\"], ["ab!"]),
    r'([^"]|""){2}': (['a""', "\n\\"], ['a"']),
    r'[]"]+': ([']"'], ["["]),
    r'"+\\*': (['"""\\'], ["a"]),
    r'[a-z--["]]|[!-#--"]|/\/': (["a", "!", "#", "//"], ['"']),
}


def accepted(body: str, text: str, also: str) -> bool:
    wrapped = f'{HEADER}\nstart: "\\"" %lark {{\n{body}\n}} "\\""\n'
    quoted = text.replace("\\", "\\\\").replace('"', '\\"')
    for sign in also:
        quoted = quoted.replace(sign, f"\\u{ord(sign):04x}")
    assert json.loads(f'"{quoted}"', strict=False) == text
    matcher = from_package(wrapped)
    assert not matcher.error
    return matcher.accepts(f'"{quoted}"'.encode())


@pytest.mark.parametrize("also", ["", "<"])
@pytest.mark.parametrize("given", [*GRAMMARS, *REGEXES])
def test_the_same_texts(given: str, also: str) -> None:
    """Issue 13: what it accepts is what the grammar accepts, escaped."""
    plain = normalised(given) if given in GRAMMARS else grammar(Constraint(regex=given))
    body = in_string(given if given in GRAMMARS else plain, also, from_package)
    good, bad = (GRAMMARS | REGEXES)[given]
    for text in (*good, *bad):
        expected = from_package(plain).accepts(text.encode())
        assert expected == (text in good), text
        assert accepted(body, text, also) == expected, text


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ('start: %json {"type": "string"}', "a JSON schema at line 1, column 8"),
        ("start: A\nA: ~/x/ & /../\n", "the operator ~ at line 2, column 4"),
        ("start: /(?x) a/", "the flags 'x'"),
        (f"start: {'/.*/ ' * 16_000}", "too much"),
    ],
)
def test_what_cannot_be_in_a_string(given: str, reason: str) -> None:
    """Issue 13: refused by name, with the place."""
    with pytest.raises(Refused, match=re.escape(reason)):
        in_string(given, "", from_package)
