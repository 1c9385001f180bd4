"""Issue 13: how a model writes its calls is found by rendering its template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from jinja2.exceptions import TemplateError
from tests.text.calls.parse import SCHEMA, calls_in, split, text_in
from tests.text.test_template import SMOLLM2

from headrace.core.errors import InvalidRequest
from headrace.text.calls.families import FAMILIES
from headrace.text.calls.format import Format, thinking_open_in
from headrace.text.calls.generic import generic_messages
from headrace.text.calls.parts import CallStart, Content, Thought
from headrace.text.calls.probe import Render, probe
from headrace.text.sandbox import TemplateEnvironment

ENVIRONMENT = TemplateEnvironment()
FOLDER = Path(__file__).parent / "templates"
TEMPLATES = {path.stem: path.read_text() for path in sorted(FOLDER.glob("*.jinja"))}
NAMES = {name: name for name in TEMPLATES} | {"qwen3": "hermes"}
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": SCHEMA}}
    for name in ("get_weather", "now")
]
ASKING = {"role": "user", "content": "What does <think> mean in [TOOL_CALLS]?"}


class Counter:
    """Renders a template and counts how often."""

    def __init__(self, source: str) -> None:
        self._template = ENVIRONMENT.from_string(source)
        self.renders = 0

    def __call__(self, messages: Any, tools: Any = None, **options: Any) -> str:
        self.renders += 1
        variables = {"messages": messages, "tools": tools, "add_generation_prompt": True, **options}
        try:
            return self._template.render(variables)
        except TemplateError as error:
            raise InvalidRequest(str(error)) from error


templates = pytest.mark.parametrize("name", TEMPLATES)


@templates
def test_the_format_of_a_template(name: str) -> None:
    """Issue 13: by trials, of which there are 30 at most."""
    render = Counter(TEMPLATES[name])
    form = probe(render)
    assert form.name == NAMES[name]
    assert render.renders <= 30
    assert form.template.tools
    assert all(form.describe().values())


def call(name: str, arguments: dict[str, Any], form: Format, number: int) -> dict[str, Any]:
    import json

    text = json.dumps(arguments, ensure_ascii=False)
    written = text if form.template.arguments == "string" else arguments
    identity = f"functions.{name}:{number}" if form.ids == "name" else f"Abcdefgh{number}"
    return {"id": identity, "type": "function", "function": {"name": name, "arguments": written}}


def written(render: Render, form: Format, several: list[tuple[str, dict[str, Any]]]) -> str:
    """What the template makes of calls, from the beginning of the model's turn."""
    calls = [call(*each, form, number) for number, each in enumerate(several)]
    content = None if form.template.null_content else ""
    turn = {"role": "assistant", "content": content, "tool_calls": calls}
    before = render([ASKING], TOOLS, add_generation_prompt=False)
    text = render([ASKING, turn], TOOLS, add_generation_prompt=False)
    assert text.startswith(before)
    return text[len(before) :].removeprefix(form.template.turn)


@templates
def test_that_the_splitter_reads_what_the_template_writes(name: str) -> None:
    """Issue 13: the calls of the history, as rendered, are parsed to themselves."""
    render = Counter(TEMPLATES[name])
    form = probe(render)
    if not form.template.calls:
        pytest.skip("the template does not render calls")
    several = [("get_weather", {"city": "Zürich </tool_call>", "days": 3, "tags": ["a"]})]
    if form.template.parallel:
        several.append(("get_weather", {"city": "}", "where": {"x": [1]}}))
    if form.style == "gemma":  # its small template writes nested values as JSON
        several = [("get_weather", {"city": "Zürich", "days": 3})]
    parts = split(form, [written(render, form, several)])
    assert calls_in(parts) == several


@pytest.mark.parametrize(
    ("name", "opening", "variables"),
    [
        ("qwen3", "<think>", ("enable_thinking",)),
        ("qwen-xml", "<think>", ("enable_thinking",)),
        ("deepseek-v3", "<think>", ()),
        ("deepseek-v3.1", "<think>", ("thinking",)),
        ("glm-4.5", "<think>", ("enable_thinking",)),
        ("harmony", "", ("reasoning_effort",)),
        ("gemma-4", "<|channel>thought", ()),
        ("mistral-args", "[THINK]", ()),
        ("command", "<|START_THINKING|>", ()),
        ("hermes", "", ()),
        ("llama3", "", ()),
    ],
)
def test_thinking(name: str, opening: str, variables: tuple[str, ...]) -> None:
    """Issue 13: the markers of thinking, and the variables that switch it."""
    form = probe(Counter(TEMPLATES[name]))
    assert form.think_open.strip() == opening
    assert form.template.thinking == variables
    assert form.thinks == (bool(opening) or name == "harmony")


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("qwen3", {}, False),
        ("qwen3", {"enable_thinking": False}, False),
        ("qwen-xml", {}, True),
        ("qwen-xml", {"enable_thinking": False}, False),
        ("deepseek-v3", {}, True),
        ("deepseek-v3.1", {"thinking": True}, True),
        ("deepseek-v3.1", {}, False),
        ("glm-4.7", {}, True),
        ("glm-4.7", {"enable_thinking": False}, False),
        ("minimax-m2", {}, True),
        ("mistral-args", {}, False),
        ("harmony", {}, False),
        ("hermes", {}, False),
    ],
)
def test_whether_the_prompt_leaves_thinking_open(
    name: str, options: dict[str, Any], expected: bool
) -> None:
    """Issue 13: by the end of the prompt; a marker that the client wrote does not count."""
    render = Counter(TEMPLATES[name])
    form = probe(render)
    for content in (ASKING["content"], "<think>", "a<think>\n", "</think>", "[THINK]"):
        prompt = render([{"role": "user", "content": content}], **options)
        assert thinking_open_in(prompt, form) is expected
    if expected:
        assert thinking_open_in(prompt + "I was thinking", form)
        assert not thinking_open_in(prompt + f"a{form.think_close}b", form)


def test_what_a_template_can() -> None:
    """Issue 13: ids, null content, strings or objects, system, several calls."""
    facts = {name: probe(Counter(source)).template for name, source in TEMPLATES.items()}
    assert [name for name, fact in facts.items() if fact.call_ids == "nine"] == [
        "mistral-args",
        "mistral",
    ]
    assert [name for name, fact in facts.items() if not fact.system] == ["llama4", "mistral"]
    assert {name for name, fact in facts.items() if fact.arguments == "string"} == {
        "deepseek-v3",
        "deepseek-v3.1",
        "functionary-v3.1",
        "functionary-v3.2",
    }
    assert not facts["llama3"].parallel
    assert facts["hermes"].parallel
    assert facts["qwen3"].reasoning
    assert not facts["hermes"].reasoning


def test_smollm2() -> None:
    """Issue 13: a template without tools gets the generic form, and none of it is guessed."""
    form = probe(Counter(SMOLLM2))
    assert (form.name, form.think_close, form.template.tools) == ("generic", "", False)
    assert form.template.system
    assert form.template.turn == "<|im_start|>assistant\n"


UNKNOWN = """
{%- for t in tools or [] %}{{ t | tojson }}{% endfor %}
{%- for m in messages %}
{{- '[' + m.role + ']' }}
{%- if m.tool_calls %}{{ '<<calls>>' }}
{%- for c in m.tool_calls %}CALL{% endfor %}{{ '<</calls>>' }}{% else %}{{ m.content }}{% endif %}
{{- '[end]' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '[assistant]' }}{% endif %}
"""


@pytest.mark.parametrize(
    "source",
    [
        "{{ '<do:' + c.function.name + '|' + (c.function.arguments | tojson) + '</do>' }}",
        "{{ '{\"fn\": \"' + c.function.name + '\", \"args\": ' + (c.function.arguments | tojson) + '}' }}"  # noqa: E501
        "{{ '; ' if not loop.last }}",
        "{{ '<use tool=\"' + c.function.name + '\">' }}{% for k, v in c.function.arguments.items() %}"  # noqa: E501
        "{{ '<arg key=\"' + k + '\">' + (v if v is string else v | tojson) + '</arg>' }}{% endfor %}"  # noqa: E501
        "{{ '</use>' }}",
    ],
)
def test_a_format_that_no_family_has(source: str) -> None:
    """Issue 13: what no family writes is read off the template."""
    render = Counter(UNKNOWN.replace("CALL", source))
    form = probe(render)
    several = [("get_weather", {"city": "x", "days": 1}), ("now", {"city": "</arg> <</calls>>"})]
    parts = split(form, list("Well. " + written(render, form, several)))
    assert calls_in(parts) == several
    assert parts[0] == Content("Well. ")


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('no') }}",
        "",
        "{{ messages[0].content }}",
        "{% for m in messages %}{{ m.tool_calls }}{{ m.content }}{% endfor %}{{ tools }}",
        "{% for m in messages %}{{ m | tojson }}{% endfor %}{{ tools | tojson }}",
        "{{ tools | tojson }}{% for i in range(3000) %}{{ '[{' }}{% endfor %}{{ messages | tojson }}",  # noqa: E501
    ],
)
def test_a_template_that_makes_no_sense(source: str) -> None:
    """Issue 13: it gets a format all the same, and quickly."""
    form = probe(Counter(source))
    assert split(form, ["Hi."]) == [Content("Hi.")]


def test_generic_messages() -> None:
    """Issue 13: a history with tools for a template that has none."""
    form = probe(Counter(SMOLLM2))
    history = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                call("get_weather", {"city": "Zürich"}, form, 0),
                call("now", {}, form, 1),
            ],
        },
        {"role": "tool", "tool_call_id": "a", "content": "Rain"},
        {"role": "tool", "tool_call_id": "b", "content": "Noon"},
    ]
    turns = generic_messages(history, TOOLS)
    assert [turn["role"] for turn in turns] == ["system", "user", "assistant", "user"]
    assert turns[0]["content"].startswith("Be brief.\n\n")
    assert '"get_weather"' in turns[0]["content"]
    assert calls_in(split(form, [turns[2]["content"]])) == [
        ("get_weather", {"city": "Zürich"}),
        ("now", {}),
    ]
    assert turns[3]["content"].count("<tool_response>") == 2
    assert set(turns[3]) == {"role", "content"}
    assert generic_messages(history[1:2], TOOLS)[0]["role"] == "system"
    assert generic_messages(history[:2], []) == history[:2]
    assert text_in(split(form, ["<think>a</think>b"]), Thought) == ""


def test_the_markers_that_engines_must_show() -> None:
    """Issue 13: the pieces of a format that may be control tokens."""
    assert FAMILIES["gemma-4"].visible == (
        "<|channel>",
        "<channel|>",
        "<|tool_call>",
        "<tool_call|>",
        '<|"|>',
    )
    assert "[TOOL_CALLS]" in FAMILIES["mistral"].visible
    assert "<|python_tag|>" in FAMILIES["llama3"].visible
    assert "<|message|>" in FAMILIES["harmony"].visible
    assert "<｜tool▁sep｜>" in FAMILIES["deepseek-v3"].visible
    assert FAMILIES["none"].visible == ()
    assert not [
        part for part in split(FAMILIES["none"], ["<tool_call>"]) if isinstance(part, CallStart)
    ]
