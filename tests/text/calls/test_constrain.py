"""Issue 13: tool calls as a grammar of llguidance."""

from __future__ import annotations

import random
import re
from typing import Any, Literal

import jsonschema_rs
import pytest
from llguidance import LLMatcher
from tests.text.calls.enforce import BYTES, Tool, accepts, answer
from tests.text.calls.parse import SCHEMA, calls_in, split, text_in
from tests.text.calls.writers import WRITERS

from headrace.core.constraint import Constraint
from headrace.text.calls.constrain import constraint_for
from headrace.text.calls.families import FAMILIES
from headrace.text.calls.format import Format
from headrace.text.calls.parts import Content, Thought
from headrace.text.grammar import answer_rules, without_formats
from headrace.worker import compiling
from headrace.worker.matchers import from_package

STRICT = SCHEMA | {"additionalProperties": False}
TOOLS = [Tool("get_weather", STRICT), Tool("now", None)]
PARIS = ("get_weather", {"city": "Paris", "days": 3})
FULL = {
    "city": "Zürich",
    "note": "n",
    "days": -2,
    "where": {},
    "tags": ["a", "b"],
    "wet": True,
}
# What the writers leave out or add, so that the text is as the model's template has it.
EXACT = [name for name in WRITERS if name not in ("mistral", "kimi-k3")]
families = pytest.mark.parametrize("family", WRITERS)


def written(family: str, several: list[tuple[str, dict[str, Any]]]) -> str:
    """What the grammar prescribes, white space included."""
    text = WRITERS[family](several)
    if family == "command":
        return text.replace("[\n    ", "[").replace("    {", "{").replace("\n]", "]")
    if FAMILIES[family].style == "tagged" and FAMILIES[family].call_open.startswith("<tool"):
        return text.removesuffix("\n")
    if family == "deepseek-v3":
        return text.replace("｜>\n<｜tool▁calls▁end", "｜><｜tool▁calls▁end")
    if FAMILIES[family].style == "python":  # values inside of values are JSON
        return text.replace("['a', 'b']", '["a", "b"]').replace("note='n'", 'note="n"')
    if family == "harmony":
        return text.removesuffix("<|call|>")
    return text.removesuffix("\n")


@families
@pytest.mark.parametrize("mode", ["required", "auto"])
def test_the_grammar_is_valid(family: str, mode: Literal["required", "auto"]) -> None:
    """Issue 13: with and without control tokens, thinking and several calls."""
    form = FAMILIES[family]
    control = {marker: 1000 + number for number, marker in enumerate(form.visible)}
    for thinking in ("none", "open", "optional"):
        for parallel in (False, True):
            options: dict[str, Any] = {"thinking": thinking, "parallel": parallel}
            grammar = constraint_for(form, TOOLS, mode, **options)
            assert LLMatcher.validate_grammar(grammar, BYTES) == ""
            grammar = constraint_for(form, TOOLS, mode, **options, control=control)
            assert LLMatcher.validate_grammar(grammar) == ""
            assert not [marker for marker in control if f'"{marker}"' in grammar]


@pytest.mark.parametrize("family", EXACT)
def test_a_required_call(family: str) -> None:
    """Issue 13: what the model writes is taken: all keys, some keys, no arguments."""
    grammar = constraint_for(FAMILIES[family], TOOLS, "required")
    for call in (PARIS, ("get_weather", FULL), ("now", dict[str, Any]())):
        text = written(family, [call])
        assert accepts(grammar, text), text
        assert calls_in(split(FAMILIES[family], [text])) == [call]


@pytest.mark.parametrize("family", EXACT)
def test_what_is_refused(family: str) -> None:
    """Issue 13: another tool, another type, a missing key, text, an end before the end."""
    grammar = constraint_for(FAMILIES[family], TOOLS, "required")
    wrong: list[tuple[str, dict[str, Any]]] = [
        ("mystery", {}),
        ("get_weather", {"city": "Paris", "days": "x"}),
        ("get_weather", {"days": 3}),
        ("get_weather", {"city": "Paris", "wet": 1}),
        ("get_weather", {"city": "Paris", "tags": {"a": 1}}),
    ]
    for call in wrong:
        assert not accepts(grammar, written(family, [call])), call
    for text in ("", "Hi.", written(family, [PARIS])[:-2]):
        assert not accepts(grammar, text)


@pytest.mark.parametrize("family", [name for name in EXACT if name not in ("harmony",)])
def test_several_calls(family: str) -> None:
    """Issue 13: as many as the model likes, or one."""
    form, text = FAMILIES[family], written(family, [PARIS, ("now", {})])
    assert accepts(constraint_for(form, TOOLS, "required"), text)
    assert not accepts(constraint_for(form, TOOLS, "required", parallel=False), text)


@pytest.mark.parametrize("family", [name for name in EXACT if name != "harmony"])
def test_auto(family: str) -> None:
    """Issue 13: text is free; what begins as a call has to be one, and strict as it should be."""
    form = FAMILIES[family]
    loose = [Tool("get_weather", STRICT), Tool("now", None, strict=False)]
    grammar = constraint_for(form, loose, "auto")
    good, bad = (
        written(family, [PARIS]),
        written(family, [("get_weather", {"city": "a", "wet": 1})]),
    )
    assert accepts(grammar, "Just text, a < b.\n")
    assert accepts(grammar, good)
    assert not accepts(grammar, bad)
    assert not accepts(grammar, good[:-1].rstrip("\n")[:-9])
    if form.call_open and form.style != "recipient":
        assert accepts(grammar, "First. " + good + " Then.")
        assert not accepts(grammar, "First. " + bad)


@pytest.mark.parametrize(
    "family", [name for name in EXACT if FAMILIES[name].think_close and name != "harmony"]
)
def test_thinking_is_not_constrained(family: str) -> None:
    """Issue 13: the call is what comes after the thinking."""
    form, call = FAMILIES[family], written(family, [PARIS])
    thought = f"I {form.call_open.strip()} am.{form.think_close}"
    grammar = constraint_for(form, TOOLS, "required", thinking="open")
    assert accepts(grammar, thought + call)
    assert not accepts(grammar, call)
    grammar = constraint_for(form, TOOLS, "required", thinking="optional")
    assert accepts(grammar, form.think_open + thought + call)
    assert accepts(grammar, call)
    parts = split(form, [thought + call], thinking_open=True)
    assert isinstance(parts[0], Thought)
    assert calls_in(parts) == [PARIS]


SMALL = {
    "type": "object",
    "properties": {
        "where": {"enum": ["here", "<there>", 'say "so"']},
        "size": {"type": "integer", "minimum": 0, "maximum": 20},
        "sure": {"type": "boolean"},
    },
    "required": ["size"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("family", [name for name in WRITERS if name != "harmony"])
def test_the_splitter_reads_what_the_grammar_allows(family: str) -> None:
    """Issue 13: an answer that the grammar lets pass is calls and nothing else."""
    form, dice = FAMILIES[family], random.Random(7)
    tools = [Tool("get_weather", SMALL), Tool("now", None)]
    grammar = constraint_for(form, tools, "required")
    for _ in range(8):
        text = answer(grammar, dice)
        parts = split(form, [text], tools={"get_weather": SMALL, "now": None})
        assert text_in(parts, Content).strip() == "", text
        assert calls_in(parts), text
        for name, arguments in calls_in(parts):
            assert name in ("get_weather", "now")
            if name == "get_weather":
                assert 0 <= arguments["size"] <= 20
                assert arguments.get("where", "here") in SMALL["properties"]["where"]["enum"]
                assert isinstance(arguments.get("sure", True), bool)


RICH = {
    "type": "object",
    "properties": {
        "code": {"type": "string", "pattern": "^[A-C]{2}/[0-9]$"},
        "found": {"type": "string", "pattern": "^a|b$", "maxLength": 3},
        "name": {"$ref": "#/$defs/name"},
        "when": {"type": "string", "format": "date"},
        "note": {"anyOf": [{"type": "string", "maxLength": 2}, {"type": "null"}]},
        "gone": {"type": ["string", "null"], "enum": ["x", None]},
        "kind": {"enum": ["a", 1, None]},
        "size": {"type": ["integer", "string"], "maximum": 9, "minimum": 0, "maxLength": 2},
        "inner": {
            "type": "object",
            "properties": {"i j": {"type": "string", "minLength": 1, "maxLength": 3}},
            "required": ["i j"],
            "additionalProperties": False,
        },
        "none": {"type": "object", "properties": {}, "additionalProperties": False},
        "two": {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 2},
    },
    "additionalProperties": False,
    "$defs": {"name": {"type": "string", "minLength": 1, "allOf": [{"maxLength": 4}]}},
}
RICH["required"] = list(RICH["properties"])


@pytest.mark.parametrize("family", [name for name in WRITERS if name != "harmony"])
def test_all_of_a_schema_is_enforced(family: str) -> None:
    """Issue 13: also of texts that are no JSON, in tags and in Gemma's notation."""
    form, dice = FAMILIES[family], random.Random(11)
    grammar = constraint_for(form, [Tool("f", without_formats(RICH))], "required", parallel=False)
    for _ in range(4):
        text = answer(grammar, dice)
        parts = split(form, [text], tools={"f": RICH}, exact=True)
        ((name, arguments),) = calls_in(parts)
        assert name == "f"
        jsonschema_rs.validate(RICH, arguments, validate_formats=True)
        assert split(form, list(text), tools={"f": RICH}, exact=True) == parts


CODE = r"""start: "say " /[^"\n-,]{0,4}/ "\"" LF WORD{1,5}
WORD: /[<\\&-z]/
%import common.LF
"""
CODE_TEXT = re.compile(r'say [^"\n-,]{0,4}"\n[<\\&-z]{1,5}')


@pytest.mark.parametrize("family", WRITERS)
@pytest.mark.parametrize("control", [False, True])
def test_the_text_of_a_grammar(family: str, control: bool) -> None:
    """Issue 13, custom tools: in each form of calls the parser reads a text of the grammar."""
    form, dice = FAMILIES[family], random.Random(3)
    made = compiling.in_string(CODE, form.escaped, from_package)
    tool = Tool(
        "code", {"type": "object", "properties": {"input": {}}}, input=Constraint(lark=made)
    )
    if control or family == "harmony":
        ids = {marker: 1000 + number for number, marker in enumerate(form.visible)}
        grammar = constraint_for(form, [tool], "auto", control=ids)
        assert LLMatcher.validate_grammar(grammar) == ""
        return
    grammar = constraint_for(form, [tool], "required", parallel=False)
    for _ in range(6):
        text = answer(grammar, dice)
        parts = split(form, [text], tools={"code": None})
        ((name, arguments),) = calls_in(parts)
        assert (name, arguments.keys()) == ("code", {"input"})
        assert CODE_TEXT.fullmatch(arguments["input"]), text


def test_definitions_reach_the_parts() -> None:
    """Issue 13: a reference in a tagged argument is resolved in the whole schema."""
    schema = {
        "type": "object",
        "$defs": {"Point": {"type": "object", "properties": {"x": {"type": "integer"}}}},
        "properties": {"at": {"$ref": "#/$defs/Point"}},
        "required": ["at"],
    }
    for family in ("qwen-xml", "glm-4.5", "minimax-m2", "llama4", "gemma-4"):
        grammar = constraint_for(FAMILIES[family], [Tool("now", schema)], "required")
        assert LLMatcher.validate_grammar(grammar, BYTES) == "", family


def test_the_generic_form_of_a_probed_format() -> None:
    """Issue 13: a format needs no name for its grammar."""
    form = Format(style="named", call_open="<do:", name_end="|", call_close="</do>")
    grammar = constraint_for(form, TOOLS, "required")
    assert accepts(grammar, '<do:get_weather|{"city": "x"}</do><do:now|{}</do>')


FORMS = {
    '{"name": "now", "age": 3}': Constraint(
        json_schema={
            "type": "object",
            "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
            "required": ["name", "age"],
            "additionalProperties": False,
        }
    ),
    '["<tool_call>[now()]", "a"]': Constraint(
        json_schema={"type": "array", "items": {"type": "string"}}
    ),
    "AB-12": Constraint(regex="[A-Z]{2}-[0-9]{2}"),
    "nein": Constraint(choice=("ja", "nein")),
}


@pytest.mark.parametrize("family", EXACT)
@pytest.mark.parametrize("text", FORMS)
def test_calls_or_a_form(family: str, text: str) -> None:
    """Issue 13, tools with `response_format`: calls alone, or content that keeps to the form."""
    form = FAMILIES[family]
    rules = answer_rules(FORMS[text])
    grammar = constraint_for(form, TOOLS, "auto", content=rules)
    call = written(family, [PARIS])
    assert accepts(grammar, call)
    assert calls_in(split(form, [call])) == [PARIS]
    answer = {"harmony": "<|channel|>final<|message|>"}.get(form.style, "") + text
    if form.style == "recipient":
        opened = form.template.turn.endswith(form.call_open)
        answer = f"{'' if opened else form.call_open}all\n{text}"
    assert accepts(grammar, answer)
    for pieces in ([answer], list(answer)):
        parts = split(form, pieces, apart=True)
        assert (text_in(parts, Content), calls_in(parts)) == (text, [])
    assert not accepts(grammar, "Sure!" + call)
    assert not accepts(grammar, answer + "!")
    assert not accepts(grammar, "Sure!")
