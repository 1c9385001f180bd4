"""Regexes, choices and grammars: compiled or refused in a process of its own, and checked after."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
import xllamacpp.xllamacpp

from headrace.core.constraint import Constraint, constraint_of
from headrace.core.errors import ConstraintViolated, InvalidRequest
from headrace.worker.compiler import Compiler


@pytest.fixture(scope="module", params=["", str(xllamacpp.xllamacpp.__file__)], ids=["own", "cpp"])
async def compiler(request: pytest.FixtureRequest) -> AsyncIterator[Compiler]:
    made = Compiler(request.param)
    yield made
    await made.aclose()


CHAIN = "".join(f"r{at}: r{at + 1}? r{at + 1}?\n" for at in range(200)) + 'r200: "a"?'

REFUSED: list[tuple[str, Any, str]] = [
    ("regex", "a/b(", "unclosed group at character 4"),
    ("regex", "(?=a)", "look-around, .* is not supported at character 1"),
    ("regex", "a^b", "lookarounds not supported"),
    ("regex", "(a{1000}){1000}", "repeats to more than 4096 elements"),
    ("regex", "((((a{50}){50}){50}){50}){50}", "repeats to more than 4096 elements"),
    ("regex", "a" * 9000, "more than 8192 characters"),
    ("regex", "(" * 600 + ")" * 600, "nested .* at character 251"),
    ("regex", "[a&&b]", "allows no text"),
    ("regex", "\ud800", "not text in UTF-8"),
    ("choice", ("a",) * 4097, "more than 4096 texts"),
    ("choice", ("a" * 40_000,) * 2, "more than 65536 characters"),
    ("grammar", 'start: "a', "unexpected '\"' at line 1, column 8"),
    ("grammar", 'start: x\nx: "a" foo', 'unknown name: "foo" at line 2, column 4'),
    ("grammar", "start: /(/", "unclosed group at line 1, column 8"),
    ("grammar", 'start: start "a"', "allows no text"),
    ("grammar", 'begin: "a"', "has no rule start"),
    ("grammar", "start: <[65]>", "names a token at line 1, column 8"),
    ("grammar", 'start: "a" <|im_end|>', "names a token at line 1, column 12"),
    ("grammar", "start: x\nx[max_tokens=5]: /.*/", "sets max_tokens, which is not supported"),
    ("grammar", 'start: %lark { start: "a" }', "has %lark at line 1, column 8"),
    ("grammar", 'start: "x"\n%llguidance {}', "has %llguidance at line 2, column 1"),
    ("grammar", 'start: %json {"minItems": 100000}', "line 1, column 14: /minItems in .* at most"),
    ("grammar", 'start: %json {"type": "str"}', "Invalid type: str at line 1, column 8"),
    ("grammar", 'start: %json {"format": "no"}', "cannot be enforced"),
    ("grammar", "start: %json {", "line 1, column 14 that is no JSON"),
    ("grammar", 'start: (("a"{1000}){1000})', "more than 4096 elements in the rule start"),
    ("grammar", 'start: "a"~1000000', "more than 4096 elements in the rule start"),
    ("grammar", 'A: (B{60}){60}\nB: "x"{60}\nstart: A', "more than 4096 elements in the rule A"),
    ("grammar", "start: /(a{100}){100}/", "more than 4096 elements in the rule start"),
    ("grammar", "root ::= root root | [a-z ]", "takes too much to compile"),
    ("grammar", f"start: r0\n{CHAIN}", "takes too much to compile"),
    ("grammar", "start: x x x\nx: y? y? y?\ny: start? /[a-z]/", "takes too much to compile"),
    ("grammar", 'start: A\nA: A "x" | "x"', "circular reference in token"),
    ("grammar", "x" * 70_000, "more than 65536 characters"),
    ("grammar", "root ::= a-b", "Rule 'a-b' not found at line 1, column 10"),
    ("grammar", 'root ::= "a', "Unexpected end of input at line 1"),
    ("grammar", "root ::= " + "(" * 3000, "nested too deeply"),
    ("grammar", 'a ::= "x"', "No 'root' rule found"),
    ("grammar", 'root ::= root "a"', "allows no text"),
]


@pytest.mark.parametrize(("form", "value", "problem"), REFUSED)
async def test_what_cannot_be_enforced_is_refused(
    compiler: Compiler, form: Any, value: Any, problem: str
) -> None:
    """Issue 13, exact form: a 400 that names the field, and the place where there is one."""
    began = time.monotonic()
    with pytest.raises(InvalidRequest, match=problem) as caught:
        await compiler.compile(constraint_of(form, value))
    assert caught.value.param == form
    assert len(caught.value.message) < 400
    assert time.monotonic() - began < 5


TEXTS: list[tuple[str, Any, tuple[str, ...], tuple[str, ...]]] = [
    ("regex", "a/b+", ("a/b", "a/bbb"), ("a/", "a/bc", "xa/b", "")),
    ("regex", "^[0-9]{3}-é$", ("123-é",), ("123-e", "12-é", "123-é\n")),
    ("regex", "(?i)ab|c\nd", ("AB", "c\nd"), ("ABc", "c")),
    ("regex", r"a\/b[/\"]", ('a/b"', "a/b/"), ("a/b",)),
    ("choice", ("yes", "a\nb", 'a"\\', "\x01é"), ("yes", "a\nb", 'a"\\', "\x01é"), ("y", "yesa")),
    ("grammar", 'start: "a"+ b\nb: "x" | /[0-9]{2}/', ("aax", "a12"), ("a", "x", "a1")),
    ("grammar", '%llguidance {"no_forcing": false}\nstart: "a" start?', ("aaa",), ("", "ab")),
    ("grammar", '?start: ["-"] INT\nINT: "1".."9"\n', ("-1", "9"), ("-", "0")),
    ("grammar", 'start: "<" %json {"type": "integer"} ">" # c', ("<12>",), ("<a>", "<1.5>")),
    ("grammar", 'start: %json {"type": "string", "format": "date"}', ('"2024-02-29"',), ('"x"',)),
    ("grammar", 'root ::= "a" [b-d]* ("," root)?', ("a", "abc,ad"), ("", "a,", "ae")),
    ("grammar", '# x\nroot ::= x-y | "no"\nx-y ::= "\\x41" [^"\\\\\\n]', ("Ab", "no"), ('A"', "A")),
    ("grammar", 'root ::= "\\u00e9" [\\u00e9-\\u00ff&&--] "\\[/"', ("éé[/", "é&[/"), ("éa[/",)),
    ("grammar", 'root ::= "start:" | "start"', ("start:",), ("root",)),
]  # fmt: skip


@pytest.mark.parametrize(("form", "value", "whole", "wrong"), TEXTS)
async def test_a_finished_answer_is_checked(
    compiler: Compiler, form: Any, value: Any, whole: tuple[str, ...], wrong: tuple[str, ...]
) -> None:
    """Issue 13, exact form: the whole text has to match, and of one that was cut its beginning."""
    constraint = constraint_of(form, value)
    await compiler.compile(constraint)
    for text in whole:
        await compiler.check(constraint, text, cut=False)
        for end in range(len(text)):
            await compiler.check(constraint, text[:end], cut=True)
    for text in wrong:
        with pytest.raises(ConstraintViolated) as caught:
            await compiler.check(constraint, text, cut=False)
        assert caught.value.param == form
    with pytest.raises(ConstraintViolated):
        await compiler.check(constraint, "~", cut=True)


async def test_the_longest_ones_are_compiled(compiler: Compiler) -> None:
    """Issue 13, exact form: at the limits it takes a fraction of a second."""
    for constraint in (
        Constraint(choice=tuple(f"{number:06}" for number in range(4096))),
        Constraint(regex=r"(\w{1,64}\W{1,64}){30}"),
        Constraint(grammar="start: " + " ".join(f'"{number}"?' for number in range(60))),
    ):
        began = time.monotonic()
        await compiler.compile(constraint)
        assert time.monotonic() - began < 5


@pytest.mark.parametrize("form", ["regex", "choice", "grammar"])
def test_an_empty_one_is_no_mistake_for_any_json(form: Any) -> None:
    """Issue 13, exact form: it is refused by name."""
    with pytest.raises(InvalidRequest, match=f"^{form} is empty"):
        constraint_of(form, "")
    with pytest.raises(InvalidRequest, match="both given"):
        Constraint(regex="a", grammar="b")
