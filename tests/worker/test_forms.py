"""Regexes, choices and grammars: compiled or refused in a process of its own, and checked after."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
import xllamacpp.xllamacpp
from msgspec.structs import replace
from tests.worker.rig import ask, lying

from headrace.core.constraint import Constraint, constraint_of
from headrace.core.errors import ConstraintViolated, InvalidRequest, Unsupported
from headrace.core.model import Capabilities
from headrace.core.request import GenerateRequest, Message
from headrace.core.stream import collect
from headrace.core.tools import Thinking
from headrace.text.calls.constrain import thinking_before
from headrace.text.calls.format import Format
from headrace.text.grammar import after, grammar
from headrace.worker.compiler import Compiler
from headrace.worker.prompt import check_supported


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
    ("regex", "(a|a|b)*" * 500, "takes too much to compile"),
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


THINKS = Format(think_open="<think>", think_close="</think>")


@pytest.mark.parametrize("mode", ["open", "optional"])
@pytest.mark.parametrize(
    ("given", "answer"),
    [
        ({"choice": ("yes", "no")}, "yes"),
        ({"regex": "[a-z]+\n/"}, "ab\n/"),
        ({"grammar": 'start: "start: " /[a-z]+/'}, "start: x"),
        ({"grammar": 'root ::= "a" root?'}, "aa"),
        ({"json_schema": {"type": "integer"}}, "12"),
    ],
)
async def test_it_begins_after_the_thinking(
    compiler: Compiler, mode: Any, given: Any, answer: str
) -> None:
    """Issue 13, exact form: the thinking is free, and what follows it is not."""
    constraint = await compiler.compile(Constraint(**given))
    prefix, rules = thinking_before(THINKS, mode)
    whole = Constraint(lark=after(prefix, rules, grammar(constraint)))
    await compiler.compile(whole)
    opening = "" if mode == "open" else "<think>"
    await compiler.check(whole, f"{opening}a < b: {answer}\n</think>\n\n{answer}", cut=False)
    if mode == "optional":
        await compiler.check(whole, answer, cut=False)
    for wrong in (f"{opening}a</think>~", f"{opening}a</think>", "~"):
        with pytest.raises(ConstraintViolated):
            await compiler.check(whole, wrong, cut=False)


TEMPLATE = """\
{%- for m in messages -%}
<|{{ m.role }}|>{% if m.reasoning_content %}<think>
{{ m.reasoning_content }}
</think>

{% endif %}{{ m.content }}<|end|>
{% endfor -%}
{%- if add_generation_prompt %}<|assistant|>
{%- if enable_thinking is defined and not enable_thinking %}<think>

</think>

{% endif %}{% endif -%}
"""


async def test_the_content_is_checked_without_the_thinking() -> None:
    """Issue 13, exact form: the thinking is apart, and of a model that may not think is none."""
    thought = "<think>\nno: maybe\n</think>\n\n"
    ask: dict[str, Any] = {"messages": (Message("user", "x"),)}
    yes = GenerateRequest(**ask, constraint=Constraint(choice=("yes", "no")))
    async with lying(text=f"{thought}yes", chat_template=TEMPLATE) as worker:
        choice = (await collect(worker.ask(yes))).choices[0]
        assert (choice.text, choice.reasoning) == ("yes", "no: maybe")
        several = await collect(worker.ask(replace(yes, n=2)))
        assert [choice.text for choice in several.choices] == ["yes", "yes"]
        with pytest.raises(ConstraintViolated):
            await collect(worker.ask(replace(yes, constraint=Constraint(regex="no"))))
        with pytest.raises(ConstraintViolated):
            await collect(worker.ask(replace(yes, thinking=Thinking(enabled=False))))


@pytest.mark.parametrize("form", ["regex", "choice", "grammar"])
async def test_an_engine_without_it_refuses_it_by_name(form: Any) -> None:
    """Issue 13, exact form: and with fields that forbid the end of an answer it is refused."""
    value: Any = ("a",) if form == "choice" else "a"
    request = ask("x", constraint=constraint_of(form, value))
    with pytest.raises(Unsupported, match=f"^This engine does not support {form}") as caught:
        check_supported(request, Capabilities(json_schema=True))
    assert caught.value.param == form
    able = Capabilities(forms=frozenset({form}), sampling=frozenset({"ignore_eos"}))
    with pytest.raises(InvalidRequest, match=f"cannot be combined with a {form}"):
        check_supported(ask("x", constraint=request.constraint, ignore_eos=True), able)
