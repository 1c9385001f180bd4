"""What a model's thinking and calls look like, as data."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Literal

import msgspec

Style = Literal[
    "none", "json", "named", "tagged", "python", "gemma", "recipient", "harmony", "generic"
]
_CONTROL = re.compile(r"</?[^<>\s\"=]+>|<\|\"\|>|\[/?[A-Z_]+\]|◁[^▷]+▷")
_WORDS = {
    "json": "an object with name and arguments",
    "named": "a name and JSON",
    "tagged": "arguments in tags",
    "python": "Python calls",
    "gemma": "Gemma's notation",
    "recipient": "messages to a function",
    "harmony": "harmony messages",
    "generic": "described in the system message",
    "none": "none",
}


class TemplateFacts(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a chat template can render, determined by trials.

    `call_ids` is `nine` where it accepts ids of nine letters and digits only. `thinking` names the
    variables that change its prompt. `turn` is the text that begins the model's turn.
    """

    tools: bool = False
    calls: bool = False
    results: bool = False
    parallel: bool = False
    arguments: Literal["object", "string"] = "object"
    system: bool = False
    null_content: bool = False
    reasoning: bool = False
    call_ids: Literal["any", "nine"] = "any"
    thinking: tuple[str, ...] = ()
    turn: str = ""


class Format(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How a model writes thinking and calls.

    Calls are `section_open (call_open NAME name_end ARGUMENTS call_close)* section_close`; literals
    are as the template renders them, with their white space, which the parser does not insist on.
    What NAME and ARGUMENTS are depends on `style`:

    - json, generic: an object with the members `name_key`, `arguments_key`, perhaps `id_key`; all
      calls in one list with `array`, between one pair of markers with `joined`.
      Without `call_open` an answer that begins with it is a call.
    - named: a name, perhaps `id_open` and an id, `name_end`, a JSON object.
    - tagged: a name, `name_end`, and for each argument `key_open KEY key_end value_open VALUE
      value_close`. A `key_open` that ends with a quote is followed by attributes; `typed` is the
      one that says whether the value is a string. `framed`: a newline on each side of VALUE.
    - python: `[name(key=value), ...]`.
    - gemma: `name{key:value, ...}` with strings in `quote`.
    - recipient: `call_open NAME newline JSON`, `all` in place of a name before content.
    - harmony: messages with a channel and a recipient.

    `also` begins calls too, `hidden` is left out of the content, `ends` are the tokens after which
    a model that has made its calls stops.
    """

    name: str = "none"
    style: Style = "none"
    think_open: str = ""
    think_close: str = ""
    section_open: str = ""
    section_close: str = ""
    call_open: str = ""
    call_close: str = ""
    separator: str = ""
    name_end: str = ""
    key_open: str = ""
    key_end: str = ""
    value_open: str = ""
    value_close: str = ""
    typed: str = ""
    framed: bool = False
    quote: str = ""
    array: bool = False
    joined: bool = False
    name_key: str = "name"
    arguments_key: str = "arguments"
    id_key: str = ""
    id_open: str = ""
    ids: Literal["none", "key", "marker", "name"] = "none"
    also: tuple[str, ...] = ()
    hidden: tuple[str, ...] = ()
    ends: tuple[str, ...] = ()
    template: TemplateFacts = TemplateFacts()

    @property
    def thinks(self) -> bool:
        """Whether the model writes thinking before its answer."""
        return self.style == "harmony" or bool(self.think_close)

    @property
    def visible(self) -> tuple[str, ...]:
        """The markers that engines must not hide, where they are tokens of the vocabulary."""
        if self.style == "harmony":
            return HARMONY
        ends = (self.name_end, self.key_open, self.key_end, self.value_open, self.value_close)
        calls = (self.section_open, self.section_close, self.call_open, self.call_close)
        others = (self.separator, self.quote, self.id_open, *self.also)
        return _markers((*self._around, *calls, *ends, *others))

    @property
    def visible_without_calls(self) -> tuple[str, ...]:
        """Those of an answer that calls no tools."""
        return HARMONY if self.style == "harmony" else _markers(self._around)

    @property
    def _around(self) -> tuple[str, ...]:
        return (self.think_open, self.think_close, *self.hidden)

    @property
    def escaped(self) -> str:
        """What a text has to be without, to be part of a call in which it is a JSON string."""
        return self.value_close.strip()[:1] if self.style == "tagged" else ""

    def closing(self, *, calls: bool) -> str:
        """Return what ends the thinking and begins the answer, which may have calls."""
        if self.style != "harmony":
            return self.think_close
        return "<|end|><|start|>assistant" + ("" if calls else "<|channel|>final<|message|>")

    @property
    def tools(self) -> Literal["none", "generic", "native"]:
        """Whether the template has a form for tools; a generic one takes its place."""
        if self.style in ("none", "generic"):
            return "generic"
        return "native" if self.template.tools else "generic"

    @property
    def thinking(self) -> Literal["none", "always", "switchable"]:
        """Whether the model thinks, and a variable of its template switches that."""
        if not self.thinks:
            return "none"
        return "switchable" if self.template.thinking else "always"

    def describe(self) -> dict[str, str]:
        """Return what `headrace show` prints of it."""
        facts, thinking = self.template, _WORDS["harmony"] if self.thinks else "none"
        if self.think_close:
            thinking = f"{self.think_open.strip()} … {self.think_close.strip()}"
        can = ("tools", "calls", "results", "parallel", "system", "null_content", "reasoning")
        return {
            "tool calls": f"{self.name}: {_WORDS[self.style]}",
            "thinking": thinking,
            "thinking variables": ", ".join(facts.thinking) or "none",
            "template renders": ", ".join(n for n in can if getattr(facts, n)) or "messages only",
            "arguments in the history": facts.arguments,
        }


HARMONY = (
    "<|start|>",
    "<|channel|>",
    "<|message|>",
    "<|constrain|>",
    "<|end|>",
    "<|call|>",
    "<|return|>",
)
_TURN_MARKS = re.compile(r"<[|｜/]|[|｜]>|\[/?INST\]|</s>|<(?:start|end)_of_turn>")


def _markers(literals: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(m for text in literals for m in _CONTROL.findall(text)))


def thinking_open_in(prompt_tail: str, format: Format) -> bool:
    """Whether the rendered prompt leaves the thinking open.

    Only what follows the beginning of the model's turn counts: a client may write markers.
    """
    if format.style == "harmony":
        return prompt_tail.rstrip().endswith("<|channel|>analysis<|message|>")
    opening, closing = format.think_open.strip(), format.think_close.strip()
    if not opening or opening not in prompt_tail:
        return False
    turn = format.template.turn
    at = prompt_tail.rfind(turn) if turn.strip() else -1
    if at >= 0:
        started = prompt_tail[at + len(turn) :]
        return started.rfind(opening) > started.rfind(closing)
    rest = prompt_tail.rpartition(opening)[2]
    return closing not in rest and not _TURN_MARKS.search(rest)
