"""Finds out how a chat template writes thinking and calls, by rendering it and comparing."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import msgspec

from headrace.core.errors import HeadraceError
from headrace.text.calls.derive import Sample, common, derived
from headrace.text.calls.families import FAMILIES
from headrace.text.calls.format import Format, TemplateFacts

_ID = "Call9Id00"
_LONG_ID = "call_0123456789abcdef01234567"
_THOUGHT = "Quokka thoughts"
_ANSWER = "Zebra answer"
_PAIRS = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("◁think▷", "◁/think▷"),
    ("<seed:think>", "</seed:think>"),
    ("<mm:think>", "</mm:think>"),
    ("<|channel>thought", "<channel|>"),
)
_LONGEST = 1 << 16
_OPENING = re.compile(r"(<[^<>]*>|\[[^\[\]]*\]|◁[^▷]*▷)(thought)?\s*$")
_CLOSING = re.compile(r"\s*(<[^<>]*>|\[[^\[\]]*\]|◁[^▷]*▷)\s*")
_VARIABLES: Mapping[str, tuple[object, ...]] = {
    "enable_thinking": (False, True),
    "thinking": (True, False),
    "reasoning_effort": ("low", "high"),
}
_PYTHON_EXAMPLE = re.compile(r"\[\w+\(\w+=")

Messages = Sequence[Mapping[str, Any]]
Tools = Sequence[Mapping[str, Any]] | None


class Render(Protocol):
    """Renders a conversation in OpenAI's form; raises what the template raises."""

    def __call__(self, messages: Messages, tools: Tools = None, **options: Any) -> str:
        """Return the prompt."""
        ...


def probe(render: Render) -> Format:
    """Return the format of a chat template. Renders it 30 times at most. Blocking."""
    return _Probe(render).format()


def _tool(name: str) -> dict[str, Any]:
    properties = {"kite_one": {"type": "string"}, "kite_two": {"type": "integer"}}
    parameters = {"type": "object", "properties": properties}
    function = {"name": name, "description": "Does it.", "parameters": parameters}
    return {"type": "function", "function": function}


_USER = {"role": "user", "content": "Hello there"}
_TOOLS = [_tool("probe_alpha"), _tool("probe_beta")]


def _call(name: str, arguments: dict[str, Any], *, text: bool, identity: str) -> dict[str, Any]:
    written = msgspec.json.encode(arguments).decode() if text else arguments
    return {"id": identity, "type": "function", "function": {"name": name, "arguments": written}}


class _Probe:
    def __init__(self, render: Render) -> None:
        self._render = render
        self._identity = _ID
        self._keeps = False
        self._memory: dict[str, str | None] = {}
        self._plain = self._try([_USER]) or ""
        self._prefix = self._try([_USER], _TOOLS, add_generation_prompt=False) or ""
        self._with_tools = self._try([_USER], _TOOLS) or ""
        self._answered = self._region({"role": "assistant", "content": _ANSWER})
        self._text = False
        self._null = False

    def _try(self, messages: Messages, tools: Tools = None, **options: Any) -> str | None:
        key = repr((messages, tools is None, options))
        if key not in self._memory:
            self._memory[key] = self._rendered(messages, tools, options)
        return self._memory[key]

    def _rendered(self, messages: Messages, tools: Tools, options: dict[str, Any]) -> str | None:
        try:
            return self._render(messages, tools, **options)
        except (HeadraceError, ArithmeticError, LookupError, TypeError, ValueError):
            # A template refuses in any way; that is the answer.
            return None

    def _region(self, *turns: Mapping[str, Any]) -> str:
        """Return what the turns add to the prompt, without the turn's beginning and end."""
        text = self._try([_USER, *turns], _TOOLS, add_generation_prompt=False) or ""
        return text[len(common(text, self._prefix)) :][:_LONGEST]

    def _calls(self, *calls: dict[str, Any]) -> str:
        content = None if self._null else ""
        return self._region({"role": "assistant", "content": content, "tool_calls": list(calls)})

    def format(self) -> Format:
        form = self._call_format()
        opening, closing = self._thinking(form)
        facts = self._facts(form)
        # Markers of their own are tokens of the vocabulary: a family that has them thinks.
        if closing or form.think_open.strip() == "<think>":
            form = _merged(form, think_open=opening, think_close=closing)
        turn = self._turn(form.think_open.strip(), form.think_close.strip())
        return _merged(form, template=msgspec.structs.replace(facts, turn=turn))

    # Calls.

    def _call_format(self) -> Format:
        if "<|channel|>final<|message|>" in self._answered:
            return FAMILIES["harmony"]
        if ">>>all\n" in self._answered:
            self._text = True
            return FAMILIES["functionary-v3.2"]
        sample = self._sample()
        form = derived(sample) if sample else None
        if form is not None:
            return self._known(form)
        return self._by_signature()

    def _sample(self) -> Sample | None:
        for self._null in (True, False):
            for self._text in (False, True):
                if sample := self._trial():
                    return sample
        self._null = self._text = False
        return None

    def _trial(self) -> Sample | None:
        arguments = {"kite_one": "violet", "kite_two": 7}
        region = self._calls(self._first(arguments))
        if "probe_alpha" not in region and self._identity in region:
            # Kimi's ids have the name in them.
            self._identity = "functions.probe_alpha:0"
            region = self._calls(self._first(arguments))
        sample = Sample(*self._trimmed(region))
        if not sample.whole or (self._null and "None" in sample.text):
            return None
        first = self._first(arguments)
        second = _call("probe_beta", arguments, text=self._text, identity=self._second_id())
        two = self._calls(first, second)
        return sample._replace(two=two if "probe_beta" in two else "", identity=self._identity)

    def _first(self, arguments: dict[str, Any]) -> dict[str, Any]:
        return _call("probe_alpha", arguments, text=self._text, identity=self._identity)

    def _second_id(self) -> str:
        kimi = self._identity != _ID
        return "functions.probe_beta:1" if kimi else "Call9Id01"

    def _trimmed(self, region: str) -> tuple[str, str]:
        """Return the calls without the end of the turn, and the beginning that was left out."""
        answer = self._answered
        head = common(region, answer.partition(_ANSWER)[0])
        opened = max(head.rfind("<"), head.rfind("["))
        if opened >= 0 and not re.search(r"[>\]]", head[opened:]):
            head = head[:opened]
        tail = common(region[::-1], answer.rpartition(_ANSWER)[2][::-1])[::-1]
        if (closed := tail.find(">")) >= 0 and "<" not in tail[:closed]:
            tail = tail[closed + 1 :]
        return region[len(head) : len(region) - len(tail)], head

    def _known(self, form: Format) -> Format:
        """Return the family with these markers, which has what a trial cannot show."""
        families = [
            family for family in FAMILIES.values() if _signature(family) == _signature(form)
        ]
        return max(families, key=lambda family: _likeness(family, form), default=form)

    def _by_signature(self) -> Format:
        text = self._with_tools
        if "probe_alpha" not in text:
            return FAMILIES["generic" if self._plain else "none"]
        if "｜DSML｜" in text:
            for name, section in (("deepseek-v4", "tool_calls"), ("deepseek-v4.1", " calls")):
                if f"<｜DSML｜{section}>" in text:
                    return FAMILIES[name]
            return FAMILIES["deepseek-v3.2"]
        for mark, name in _SIGNATURES:
            if mark in text:
                return FAMILIES[name]
        if _PYTHON_EXAMPLE.search(text):
            return FAMILIES["llama4"]
        if re.search(r'"name": ?[^{}]*"parameters":', text) and "<|start_header_id|>" in text:
            return FAMILIES["llama3"]
        return FAMILIES["generic"]

    # Thinking.

    def _thinking(self, form: Format) -> tuple[str, str]:
        """Return the markers of thinking, as they are rendered."""
        if form.style == "harmony":
            return "", ""
        turn = {"role": "assistant", "content": _ANSWER, "reasoning_content": _THOUGHT}
        region = self._region(turn)
        self._keeps = _THOUGHT in region
        if not self._keeps:
            call = self._first({"kite_one": "violet"})
            region = self._region(turn | {"tool_calls": [call]})
            self._keeps = _THOUGHT in region
        before, _, behind = region.partition(_THOUGHT)
        opening, closing = _OPENING.search(before), _CLOSING.match(behind)
        if self._keeps and opening and closing:
            return opening[0], closing[0]
        return self._thinking_by_prompt()

    def _thinking_by_prompt(self) -> tuple[str, str]:
        off = self._try([_USER], enable_thinking=False) or ""
        for opening, closing in _PAIRS:
            tail = self._plain.rstrip()
            if tail.endswith(opening) or re.search(
                f"{re.escape(opening)}\\s*{re.escape(closing)}", off
            ):
                return opening, closing
        opening, closing = _PAIRS[0]
        content = f"{opening}\n{_THOUGHT}\n{closing}\n\n{_ANSWER}"
        history = [_USER, {"role": "assistant", "content": content}, _USER]
        text = self._try(history) or ""
        if _ANSWER in text and (_THOUGHT not in text):
            return opening, closing
        return "", ""

    def _turn(self, *thinking: str) -> str:
        """Return the text that begins the model's turn, without thinking."""
        before = self._try([_USER], add_generation_prompt=False) or ""
        if not self._plain.startswith(before):
            return ""
        turn = self._plain[len(before) :]
        for marker in filter(None, thinking):
            turn = turn.partition(marker)[0]
        return turn

    # What else it can do.

    def _facts(self, form: Format) -> TemplateFacts:
        result = {"role": "tool", "tool_call_id": self._identity, "name": "probe_alpha"}
        call = self._first({"kite_one": "violet"})
        asking = {"role": "assistant", "content": None if self._null else "", "tool_calls": [call]}
        results = self._try([_USER, asking, result | {"content": "Walrus result"}], _TOOLS) or ""
        other = _call("probe_beta", {}, text=self._text, identity=self._second_id())
        calls = self._calls(call, other)
        system = self._try([{"role": "system", "content": "Badger rules"}, _USER]) or ""
        return TemplateFacts(
            tools="probe_alpha" in self._with_tools,
            calls="violet" in self._calls(call),
            results="Walrus result" in results,
            parallel="probe_alpha" in calls and "probe_beta" in calls,
            arguments="string" if self._text else "object",
            system="Badger rules" in system,
            null_content=self._null,
            reasoning=self._keeps if form.style != "harmony" else True,
            call_ids=self._ids(call),
            thinking=tuple(name for name in _VARIABLES if self._mentions(name)),
        )

    def _ids(self, call: dict[str, Any]) -> Any:
        return "any" if self._calls(call | {"id": _LONG_ID}) or not self._calls(call) else "nine"

    def _mentions(self, name: str) -> bool:
        trials = (self._try([_USER], None, **{name: value}) for value in _VARIABLES[name])
        return any(text is not None and text != self._plain for text in trials)


_SIGNATURES = (
    ("<|tool_list_start|>", "lfm2"),
    ("<|tool_call_start|>", "lfm2"),
    ("<minimax:tool_call>", "minimax-m2"),
    ("<arg_key>", "glm-4.5"),
    ("<function=", "qwen-xml"),
    ("<|tool_call>", "gemma-4"),
    ("<start_function_call>", "functiongemma"),
    ("<tool_call>", "hermes"),
    ("[TOOL_CALLS]", "mistral"),
)


def _merged(form: Format, **changes: Any) -> Format:
    return msgspec.structs.replace(form, **changes)


def _likeness(family: Format, form: Format) -> int:
    pairs = zip(msgspec.structs.astuple(family), msgspec.structs.astuple(form), strict=True)
    return sum(left == right for left, right in pairs)


def _signature(form: Format) -> tuple[object, ...]:
    texts = (form.section_open, form.call_open, form.name_end, form.key_open, form.call_close)
    names = (form.name_key, form.arguments_key) if form.style == "json" else ()
    return (form.style, form.array, form.typed, form.quote, *names, *map(str.strip, texts))
