"""Issue 13.2: the parser of calls and thinking, for every family."""

from __future__ import annotations

import json
import re
import time
import tracemalloc
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.text.calls.parse import calls_in, joined, pieces, split, text_in
from tests.text.calls.writers import WRITERS

from headrace.text.calls.families import FAMILIES
from headrace.text.calls.format import Format
from headrace.text.calls.parts import CallArguments, CallStart, Content, Cut, Reading, Thought
from headrace.text.calls.splitter import Splitter
from headrace.text.calls.values import kind_of

BARE = ("llama3", "llama4", "functionary-v3.2")  # an answer with calls has no text before them
ONE_OF_EACH_STYLE = ("hermes", "mistral-args", "qwen-xml", "lfm2", "gemma-4", "harmony")
ALONE = (*BARE, "harmony")
THINKING = [name for name in WRITERS if FAMILIES[name].think_close and name not in ALONE]

CALLS = Reading(calls=True)
PARIS = ("get_weather", {"city": "Paris", "days": 3})
NOW = ("now", dict[str, Any]())


def markers(form: Format) -> str:
    """A text of all closing markers."""
    ends = (form.call_close, form.section_close, form.think_close, form.call_open, "</tool_call>")
    return " ".join(end.strip() for end in ends)


def arguments(form: Format) -> dict[str, tuple[str, dict[str, Any]]]:
    inner = f"see {markers(form)} and go on"
    return {
        "one": PARIS,
        "marker in a string": ("get_weather", {"city": inner, "note": inner}),
        "nested": (
            "get_weather",
            {
                "city": "a",
                "where": {"at": [1, {"b": [2.5, None, True]}], "e": {}},
                "tags": ["x", "y"],
            },
        ),
        "unicode": ("get_weather", {"city": "Zürich 東京 🦉", "tags": ["é", "🏔"]}),
        "empty": NOW,
        "empty string": ("get_weather", {"city": ""}),
        "quotes": ("get_weather", {"city": "say \"hi\" \\ 'yo'\n\ttwo\nlines", "days": -1}),
        "number as a string": ("get_weather", {"city": "42", "wet": False}),
        "null": ("get_weather", {"city": "null", "note": None}),
        "unknown tool": ("mystery", {"anything": {"goes": 1}}),
        "long": ("get_weather", {"city": "word " * 999}),
        "code": ("get_weather", {"city": "if a < b and [x] {y}: </p>\n<b>`z`</b>\n\n"}),
    }


CASES = list(arguments(Format()))
families = pytest.mark.parametrize("family", WRITERS)


@families
@pytest.mark.parametrize("case", CASES)
def test_a_call(family: str, case: str) -> None:
    """Issue 13.2: the arguments are those that were written, cut anywhere or not at all."""
    form = FAMILIES[family]
    call = arguments(form)[case]
    if family.startswith(("gemma", "functiongemma")) and form.quote in markers(form):
        pytest.skip("the quote ends a string")
    text = WRITERS[family]([call])
    whole = split(form, [text])
    assert calls_in(whole) == [call]
    assert text_in(whole, Content) == ""
    assert split(form, list(text)) == whole
    for size in (2, 3, 5, 7):
        assert split(form, [text[at : at + size] for at in range(0, len(text), size)]) == whole


@families
def test_several_calls(family: str) -> None:
    """Issue 13.2: each call has its index, its name once, and arguments that are an object."""
    form = FAMILIES[family]
    several = [PARIS, NOW, ("mystery", {"a": [1]}), PARIS]
    parts = split(form, list(WRITERS[family](several)))
    assert calls_in(parts) == several
    starts = [part for part in parts if isinstance(part, CallStart)]
    assert [part.index for part in starts] == [0, 1, 2, 3]
    assert text_in(parts, Content) == ""


@pytest.mark.parametrize("family", [name for name in WRITERS if name not in ALONE])
def test_text_around_calls(family: str) -> None:
    """Issue 13.2: the text before and after is content, to the last character."""
    form = FAMILIES[family]
    text = "First a < b, [c].\n\n" + WRITERS[family]([PARIS, NOW]) + "And so on."
    parts = split(form, list(text))
    assert calls_in(parts) == [PARIS, NOW]
    assert text_in(parts, Content).replace("\n", "") == "First a < b, [c].And so on."
    assert isinstance(parts[0], Content)
    assert isinstance(parts[-1], Content)


@families
def test_cut_at_every_place(family: str) -> None:
    """Issue 13.2: what max_tokens cut off is a cut call or text, and nothing is lost."""
    form = FAMILIES[family]
    call = ("get_weather", {"city": "Paris", "where": {"x": [1]}, "note": "n"})
    text = WRITERS[family]([call])
    for end in range(len(text)):
        parts = split(form, [text[:end]])
        assert calls_in(parts) in ([], [call]), text[:end]
        cuts = [part for part in parts if isinstance(part, Cut)]
        assert len(cuts) <= 1
        if cuts:
            assert text[:end].startswith(cuts[0].text)
            assert len(cuts[0].text) == end
        elif not calls_in(parts) and family != "harmony":
            assert text_in(parts, Content) == text[:end]


@pytest.mark.parametrize("family", THINKING)
def test_thinking_before_calls(family: str) -> None:
    """Issue 13.2: trimmed thinking, with markers in it that are text; then the calls."""
    form = FAMILIES[family]
    thought = f"First.\n\n {form.call_open.strip()} is a marker, {form.think_open.strip()} too."
    text = f"{form.think_close.strip()}\n\n" + WRITERS[family]([PARIS, NOW])
    opened = f"{form.think_open.strip()}\n\n {thought}\n\n{text}"
    for thinking_open, answer in ((False, opened), (True, opened), (True, f"\n{thought} \n{text}")):
        parts = split(form, list(answer), thinking_open=thinking_open)
        assert parts[0] == Thought(thought)
        assert calls_in(parts) == [PARIS, NOW]
        assert text_in(parts, Content) == ""
        assert split(form, [answer], thinking_open=thinking_open) == parts


@pytest.mark.parametrize("family", THINKING)
def test_a_call_at_a_line_start_ends_the_thinking(family: str) -> None:
    """Issue 13.2: a model that forgets to close its thinking can call."""
    form = FAMILIES[family]
    text = "I should look.\n" + WRITERS[family]([PARIS])
    parts = split(form, list(text), thinking_open=True)
    assert parts[0] == Thought("I should look.")
    assert calls_in(parts) == [PARIS]
    marker = form.section_open.strip() or form.call_open.strip()
    verbatim = f"a\n{marker} is how one calls"
    parts = split(form, [*f"{verbatim} {form.think_close.strip()} yes"], thinking_open=True)
    assert parts == [Thought(verbatim), Content("yes")]


@families
def test_without_calls_markers_are_text(family: str) -> None:
    """Issue 13.2: with tool_choice none nothing is a call."""
    form = FAMILIES[family]
    parts = split(form, list(WRITERS[family]([PARIS])), calls=False)
    assert not [part for part in parts if isinstance(part, CallStart)]
    assert "Paris" in text_in(parts, Content)


@families
def test_other_tools_than_some_are_text(family: str) -> None:
    """Issue 13: where a request allows some tools only, a call of another one is none."""
    form = FAMILIES[family]
    parts = split(form, list(WRITERS[family]([PARIS])), tools={"now": None}, only=True)
    assert calls_in(parts) == []
    assert "Paris" in text_in(parts, Content)
    parts = split(form, list(WRITERS[family]([NOW])), tools={"now": None}, only=True)
    assert calls_in(parts) == [NOW]


@families
def test_plain_text(family: str) -> None:
    """Issue 13.2: text stays as it is."""
    form = FAMILIES[family]
    for text in (
        "Hi.",
        "a < b [0] {x} `y` >>> z\n\n",
        "1. [x](y) <b>",
        " \n",
        "{",
        "[",
        "<",
        "f",
        "",
    ):
        parts = split(form, list(text))
        assert text_in(parts, Content) == text
        assert len(parts) <= 1
        assert split(form, [text]) == parts


# Text that is made of the pieces of all that families write.
def fragments(form: Format) -> list[str]:
    written = WRITERS[form.name]([PARIS, NOW]) + markers(form) + form.think_open
    words = re.findall(r"</?[^<>]+>|\[/?[A-Z_]+\]|\w+|[^\w<>]", written)
    return sorted({*words, "{", "}", '"', "\\", "\n", " ", "[", "]", "(", ")", ",", ":", "=", "'"})


@settings(max_examples=30, deadline=None)
@given(st.data())
@families
def test_random_text_cut_anywhere(family: str, data: st.DataObject) -> None:
    """Issue 13.2: the parts do not depend on how the text is cut; without calls nothing is lost."""
    form = FAMILIES[family]
    parts = st.lists(st.sampled_from(fragments(form)), max_size=40)
    base = data.draw(st.sampled_from(["", WRITERS[family]([PARIS, NOW])]))
    at = data.draw(st.integers(0, len(base)))
    noise = "".join(data.draw(parts))
    text = base[:at] + noise + base[at + data.draw(st.integers(0, 3)) :]
    opened, calls = data.draw(st.booleans()), data.draw(st.booleans())
    whole = split(form, [text], thinking_open=opened, calls=calls)
    cuts = data.draw(st.lists(st.integers(0, 10_000), max_size=8))
    assert split(form, pieces(text, cuts), thinking_open=opened, calls=calls) == whole
    assert split(form, list(text), thinking_open=opened, calls=calls) == whole
    calls_in(whole)
    plain = not opened and form.style not in ("harmony", "recipient") and not form.hidden
    if plain and all(isinstance(part, Content) for part in whole):
        kept = text_in(whole, Content)
        thinking = [marker for marker in (form.think_open, form.think_close) if marker]
        assert kept == text or any(marker.strip() in text for marker in thinking)


def hostile(form: Format, size: int) -> list[str]:
    """Answers that try to be slow."""
    call = WRITERS[form.name]([PARIS])
    head = call[: call.find("get_weather")]
    start = call[: call.find("Paris") + 2]
    texts = [call, head, start[:-1], form.think_open + "\n", markers(form), "\n ", "<", "[", "{"]
    repeated = [(text or "x") * (size // len(text or "x")) for text in texts]
    pairs = (
        '{"a":',
        "[[",
        '\\"',
        "\\",
        "\n</",
        form.value_close or "```",
        "' '",
        form.quote or "(",
    )
    return repeated + [start + pair * (size // len(pair)) for pair in pairs]


def seconds(form: Format, text: str, chunk: int, thinking_open: bool) -> float:
    splitter = Splitter(form, {}, CALLS, thinking_open=thinking_open)
    began = time.process_time()
    for at in range(0, len(text), chunk):
        splitter.feed(text[at : at + chunk])
    splitter.flush()
    return time.process_time() - began


@pytest.mark.parametrize("family", ONE_OF_EACH_STYLE)
def test_time_is_linear(family: str) -> None:
    """Issue 13.2: twice the text takes about twice the time, however hostile."""
    form = FAMILIES[family]
    size = 10_000
    # Doubled twice: the noise of a busy machine is well below 16 over 4.
    for short, long in zip(hostile(form, size), hostile(form, 4 * size), strict=True):
        for chunk in (7, 1 << 30):
            if seconds(form, long, chunk, chunk == 7) < 0.05:
                continue
            # In turns, as the machine may be slower for a while.
            pairs = [
                [seconds(form, text, chunk, chunk == 7) for text in (short, long)] for _ in range(4)
            ]
            low, high = map(min, zip(*pairs, strict=True))
            assert high < 2.5**2 * low


@pytest.mark.slow
@families
def test_time_is_linear_to_a_megabyte(family: str) -> None:
    """Issue 13.2: t(2n)/t(n) < 2.5 at 1 MB."""
    form = FAMILIES[family]
    for short, long in zip(hostile(form, 500_000), hostile(form, 1_000_000), strict=True):
        for chunk in (7, 1 << 30):
            low = min(seconds(form, short, chunk, False) for _ in range(2))
            assert seconds(form, long, chunk, False) < max(2.5 * low, 0.1)


@families
def test_little_is_held_back(family: str) -> None:
    """Issue 13.2: a string argument comes as it is written; outside of calls a marker is held."""
    form = FAMILIES[family]
    text = WRITERS[family]([("get_weather", {"city": "word " * 400})])
    splitter = Splitter(
        form,
        {"get_weather": {"properties": {"city": {"type": "string"}}}},
        CALLS,
        thinking_open=False,
    )
    inside = text.find("word ") + 1000
    parts = joined([part for char in text[:inside] for part in splitter.feed(char)])
    got = text_in(parts, CallArguments)
    assert len(got) > 900, got[-50:]
    splitter = Splitter(form, {}, CALLS, thinking_open=False)
    noise = "a < b [c] {d} <t <|x ｜ >> " * 20
    for end in range(1, len(noise)):
        parts = [*parts, *splitter.feed(noise[end - 1])]
    shown = len(text_in(parts, Content)) + len(text_in(parts, Thought))
    assert shown > len(noise) - 64


def test_memory_is_bounded_by_the_answer() -> None:
    """Issue 13.2: a megabyte of arguments is not kept more than once or twice."""
    text = '<tool_call>\n{"name": "f", "arguments": {"a": "' + "x" * 1_000_000
    splitter = Splitter(FAMILIES["hermes"], {}, CALLS, thinking_open=False)
    tracemalloc.start()
    for at in range(0, len(text), 4096):
        splitter.feed(text[at : at + 4096])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4_000_000


def test_arguments_pass_byte_for_byte() -> None:
    """Issue 13.2: JSON is not read and written again."""
    written = '{ "a" :1e5,"a":  "\\u00e9\\/" , "b":[ ]}'
    for family, text in {
        "hermes": f'<tool_call>{{"name":"f","arguments": {written}}}</tool_call>',
        "mistral-args": f"[TOOL_CALLS]f[ARGS]{written}",
        "kimi-k2": "<|tool_calls_section_begin|><|tool_call_begin|>functions.f:0"
        f"<|tool_call_argument_begin|>{written}<|tool_call_end|>",
        "harmony": f"<|channel|>commentary to=functions.f<|message|>{written}<|call|>",
    }.items():
        assert text_in(split(FAMILIES[family], list(text)), CallArguments) == written


QUIRKS: dict[str, tuple[str, str, object]] = {
    "qwen-xml without the outer tag": (
        "qwen-xml",
        "<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n</function>",
        [("get_weather", {"city": "Paris"})],
    ),
    "qwen-xml without the end of a value": (
        "qwen-xml",
        "<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n<parameter=days>\n3\n"
        "</function>\n</tool_call>",
        [PARIS],
    ),
    "qwen-xml with words of Python": (
        "qwen-xml",
        "<tool_call>\n<function=f>\n<parameter=a>\nTrue\n</parameter>\n<parameter=b>\nNone\n"
        "</parameter>\n</function>\n</tool_call>",
        [("f", {"a": True, "b": None})],
    ),
    "hermes without newlines and with a missing brace": (
        "hermes",
        '<tool_call>{"name": "now", "arguments": {}</tool_call>',
        [NOW],
    ),
    "hermes with the arguments first": (
        "hermes",
        '<tool_call>{"arguments": {"city": "Paris", "days": 3}, "name": "get_weather"}</tool_call>',
        [PARIS],
    ),
    "hermes with arguments in a string": (
        "hermes",
        '<tool_call>{"name": "get_weather", "arguments": "{\\"city\\": \\"Paris\\", \\"days\\": 3}"}'  # noqa: E501
        "</tool_call>",
        [PARIS],
    ),
    "hermes with two in one tag": (
        "hermes",
        f"<tool_call>\n{json.dumps({'name': 'now', 'arguments': {}})}\n"
        f"{json.dumps({'name': 'now'})}\n</tool_call>",
        [NOW, NOW],
    ),
    "hermes with characters that it forgets to escape": (
        "hermes",
        '<tool_call>{"name": "f", "arguments": {"a": "\\d+\\\n\t", "b": "\\"}"}}</tool_call>',
        [("f", {"a": "\\d+\\\n\t", "b": '"}'})],
    ),
    "hermes with another name for the arguments": (
        "hermes",
        '<tool_call>{"name": "f", "input": {"a": 1}}</tool_call>',
        '<tool_call>{"name": "f", "input": {"a": 1}}</tool_call>',
    ),
    "hermes in OpenAI's own form": (
        "hermes",
        '<tool_call>{"type": "function", "function": {"name": "now", "arguments": null}}</tool_call>',  # noqa: E501
        [NOW],
    ),
    "llama3 after its tag": (
        "llama3",
        '<|python_tag|>{"type": "function", "name": "now", "parameters": {}}',
        [NOW],
    ),
    "llama3's own tools": (
        "llama3",
        '<|python_tag|>brave_search.call(query="a \\"b\\"")',
        [("brave_search", {"query": 'a "b"'})],
    ),
    "llama3 with other JSON": ("llama3", '{"name": "Ann", "age": 3}', '{"name": "Ann", "age": 3}'),
    "llama3 with code": ("llama3", "<|python_tag|>print(1)", "<|python_tag|>print(1)"),
    "a list is no call": ("llama4", "[1, 2] and [f(x)]", "[1, 2] and [f(x)]"),
    "mistral with an id": (
        "mistral-args",
        "[TOOL_CALLS]now[CALL_ID]abc123def[ARGS]{}",
        [NOW],
    ),
    "kimi without a section": (
        "kimi-k2",
        "<|tool_call_begin|>functions.now:0<|tool_call_argument_begin|>{}<|tool_call_end|>",
        [NOW],
    ),
    "deepseek-v4 in one tag": (
        "deepseek-v4",
        '<｜DSML｜tool_calls>\n<｜DSML｜invoke name="now"/>\n</｜DSML｜tool_calls>',
        [NOW],
    ),
    "qwen-xml with markers in a string of an object": (
        "qwen-xml",
        "<tool_call>\n<function=get_weather>\n<parameter=where>\n"
        '{"a": "</parameter>\n</function>\n</tool_call>\n<parameter=days>\\""}\n'
        "</parameter>\n</function>\n</tool_call>",
        [
            (
                "get_weather",
                {"where": {"a": '</parameter>\n</function>\n</tool_call>\n<parameter=days>"'}},
            )
        ],
    ),
    "glm with markers in a string of a list": (
        "glm-4.7",
        "<tool_call>get_weather<arg_key>tags</arg_key>"
        '<arg_value>["</arg_value></tool_call>"]</arg_value></tool_call>',
        [("get_weather", {"tags": ["</arg_value></tool_call>"]})],
    ),
    "deepseek-v4 with markers in a string of JSON": (
        "deepseek-v4",
        '<｜DSML｜tool_calls>\n<｜DSML｜invoke name="f">\n<｜DSML｜parameter name="a" '
        'string="false">{"b": "</｜DSML｜parameter>\n</｜DSML｜invoke>"}'
        "</｜DSML｜parameter>\n</｜DSML｜invoke>\n"
        "</｜DSML｜tool_calls>",
        [("f", {"a": {"b": "</｜DSML｜parameter>\n</｜DSML｜invoke>"}})],
    ),
    "qwen-xml with an object that is none": (
        "qwen-xml",
        '<tool_call>\n<function=get_weather>\n<parameter=where>\n{"a": say "hi"\n</parameter>\n'
        "</function>\n</tool_call>",
        [("get_weather", {"where": '{"a": say "hi"'})],
    ),
    "llama4 with numbers of Python": (
        "llama4",
        "[f(a=0x10, b=1_000, c=+1, d=.5, e=1., g=-2e3)]",
        [("f", {"a": 16, "b": 1000, "c": 1, "d": 0.5, "e": 1.0, "g": -2000.0})],
    ),
    "glm in one line": ("glm-4.5", "<tool_call>now</tool_call>", [NOW]),
    "gemma's scalars": (
        "gemma-4",
        "<|tool_call>call:f{a:null,b:1e5,c:-2,d:true,e:word}<tool_call|>",
        [("f", {"a": None, "b": 1e5, "c": -2, "d": True, "e": "word"})],
    ),
    "harmony with the recipient first": (
        "harmony",
        " to=functions.now<|channel|>commentary json<|message|>{}<|call|>",
        [NOW],
    ),
    "harmony with a preamble": (
        "harmony",
        "<|channel|>commentary<|message|>I look.<|end|><|start|>assistant<|channel|>final<|message|>"  # noqa: E501
        "Done.<|return|>",
        "I look.Done.",
    ),
    "command's answer": ("command", "<|START_RESPONSE|>Hi.<|END_RESPONSE|>", "Hi."),
    "functionary's answer": ("functionary-v3.2", "all\nHi >>> a\n", "Hi >>> a\n"),
    "functionary's call after text": ("functionary-v3.2", "all\nHi.>>>now\n{}", [NOW]),
    "functionary's first call": ("functionary-v3.2", "now\n{}", [NOW]),
}


@pytest.mark.parametrize("quirk", QUIRKS)
def test_a_quirk(quirk: str) -> None:
    """Issue 13.2: what models write beside what their templates say."""
    family, text, expected = QUIRKS[quirk]
    parts = split(FAMILIES[family], list(text))
    assert split(FAMILIES[family], [text]) == parts
    if isinstance(expected, str):
        assert parts == [Content(expected)]
    else:
        assert calls_in(parts) == expected


BROKEN = (
    '<tool_call>{"name": "f", "arguments": {"a": yes}}</tool_call>',
    '<tool_call>{"name": "f", "arguments": {"a": 1,}}</tool_call>',
    '<tool_call>{"name": "f", "arguments": {"a" 1}}</tool_call>',
    '<tool_call>{"name": "f", "arguments": "no"}</tool_call>',
)


@pytest.mark.parametrize("text", BROKEN)
def test_a_broken_call_is_none(text: str) -> None:
    """Issue 13.2: a call that ends has an object as its arguments, and what is none is not lost."""
    parts = split(FAMILIES["hermes"], list(f"Hi. {text} Bye."))
    assert split(FAMILIES["hermes"], [f"Hi. {text} Bye."]) == parts
    assert calls_in(parts) == []
    shown = "".join(part.text for part in parts if isinstance(part, Content | Cut))
    assert shown == f"Hi. {text} Bye."


def test_the_ids_that_models_write() -> None:
    """Issue 13.2: an id that is written is kept."""
    text = WRITERS["kimi-k2"]([PARIS])
    starts = [part for part in split(FAMILIES["kimi-k2"], [text]) if isinstance(part, CallStart)]
    assert starts == [CallStart(0, "get_weather", "functions.get_weather:0")]


def test_analysis_is_thinking() -> None:
    """Issue 13.2: harmony's channels."""
    text = "<|channel|>analysis<|message|>\n Hm <|end|><|start|>assistant" + WRITERS["harmony"](
        [PARIS]
    )
    parts = split(FAMILIES["harmony"], list(text))
    assert parts[0] == Thought("Hm")
    assert calls_in(parts) == [PARIS]


def test_alternatives_of_a_call_that_is_not_enforced_do_not_multiply() -> None:
    """Issue 11.5, 7: 120 alternatives on each of four levels, which nothing has refused before."""
    levels = {
        f"L{level}": {"anyOf": [{"$ref": f"#/$defs/L{level + 1}"} for _ in range(120)]}
        for level in range(4)
    }
    schema = {
        "$defs": {**levels, "L4": {"type": "string"}, "circle": {"$ref": "#/$defs/circle"}},
        "properties": {"a": {"anyOf": [*levels["L1"]["anyOf"]]}, "b": {"$ref": "#/$defs/circle"}},
    }
    began = time.process_time()
    assert (kind_of(schema, "a"), kind_of(schema, "b")) == ("string", "any")
    assert time.process_time() - began < 0.5


def test_the_price_of_a_token() -> None:
    """Issue 13.4: a token of plain text takes some microseconds at most with the parser on."""
    splitter = Splitter(FAMILIES["hermes"], {}, CALLS, thinking_open=False)
    tokens = [" word", "\n", " it's", ",", " a"] * 4000
    splitter.feed("Start")
    best = min(_seconds(splitter, tokens) for _ in range(5))
    assert best / len(tokens) < 3e-6


def _seconds(splitter: Splitter, tokens: list[str]) -> float:
    began = time.process_time()
    for token in tokens:
        splitter.feed(token)
    return time.process_time() - began
