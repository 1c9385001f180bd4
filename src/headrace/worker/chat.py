"""Conversations with tools and thinking: their prompt by the model's template, and their parser."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any, Literal, cast

import msgspec

from headrace.core.constraint import Constraint
from headrace.core.errors import InvalidRequest, Unsupported
from headrace.core.media import Audio, content_of, text_of
from headrace.core.request import CountRequest, GenerateRequest, Message
from headrace.core.tools import SWITCHES, Thinking, Tool
from headrace.engines.base import Engine, Generator
from headrace.text.calls.constrain import constraint_for, thinking_before
from headrace.text.calls.families import FAMILIES
from headrace.text.calls.format import Format, thinking_open_in
from headrace.text.calls.generic import generic_messages
from headrace.text.calls.parts import Reading
from headrace.text.calls.probe import probe
from headrace.text.calls.shapes import reading_of
from headrace.text.calls.splitter import Splitter
from headrace.text.grammar import answer_rules, without_formats
from headrace.text.template import ChatTemplate, openai_turn

_TAIL = 4096

NewSplitter = Callable[[], Splitter]
Mode = Literal["none", "open", "optional"]
Before = tuple[str, str]


class Budget(msgspec.Struct, frozen=True, kw_only=True):
    """The most tokens of thinking, and how it is closed: by a text of these tokens.

    `enforced` is what the engine enforces after it.
    """

    tokens: int
    text: str
    token_ids: tuple[int, ...]
    enforced: Constraint | None = None


class Parsing(msgspec.Struct, frozen=True, kw_only=True):
    """What an answer has to be, and how it is read.

    `constraint` is what its whole text has to be, calls included, and `enforced` is the same for
    the engine. Without a `splitter` it is content alone. `visible` are the control tokens that the
    splitter reads.
    """

    constraint: Constraint | None = None
    enforced: Constraint | None = None
    splitter: NewSplitter | None = None
    visible: frozenset[int] = frozenset()
    budget: Budget | None = None


def format_of(template: ChatTemplate, family: str | None = None) -> Format:
    """Return how a model writes thinking and calls, determined by trials of its template.

    With a `family` it writes calls as that does. Blocking.
    """
    form = probe(template.trial())
    if family is None:
        return form
    changes: dict[str, Any] = {"template": form.template}
    if form.thinks:
        changes |= {"think_open": form.think_open, "think_close": form.think_close}
    return msgspec.structs.replace(FAMILIES[family], **changes)


class Chat:
    """A chat template, and how its model writes thinking and calls. Blocking; thread-safe.

    `image_marker` is what the engine takes for an image or a sound in a prompt.
    """

    def __init__(
        self, template: ChatTemplate, engine: Engine, tool_format: str | None = None
    ) -> None:
        self.template = template
        self.image_marker = engine.facts.image_marker
        self._family = tool_format
        self._engine = cast("Generator", engine)
        self._enforces = "grammar" in engine.facts.capabilities.forms

    @cached_property
    def format(self) -> Format:
        """How the model writes thinking and calls."""
        return format_of(self.template, self._family)

    def render(self, request: GenerateRequest | CountRequest) -> str:
        """Return the prompt of a conversation.

        Raises:
            InvalidRequest: the template refuses it, or leaves out a message to be continued.
            GenerationFailed: the template fails.
        """
        messages = self._with_markers(request.messages or ())
        options = {**self._switches(request.thinking), **request.template_options}
        if not request.continue_final:
            return self._rendered(request, messages, options)
        # What a template puts after the message is cut off, and it removes no white space within.
        mark = secrets.token_hex(16)
        marked = (*messages[:-1], *(_marked(message, mark) for message in messages[-1:]))
        options |= {"add_generation_prompt": False}
        text, has_mark, _ = self._rendered(request, marked, options).rpartition(mark)
        if not has_mark:
            raise InvalidRequest(
                "The chat template leaves the last message out; it cannot be continued.",
                param="continue_final",
            )
        return text

    def _rendered(
        self,
        request: GenerateRequest | CountRequest,
        messages: Sequence[Message],
        options: dict[str, Any],
    ) -> str:
        tools = request.tools
        if isinstance(request, GenerateRequest):
            tools = () if request.tool_choice.mode == "none" else tools
        if not tools and not any(m.tool_calls or m.role == "tool" for m in messages):
            return self.template.render(messages, options)
        facts = self.format.template
        if not (facts.calls and (facts.tools or not tools)):
            messages = _flat(messages, self.image_marker)
            turns = [openai_turn(message) for message in messages]
            plain = generic_messages(turns, [_openai_tool(tool) for tool in tools])
            rewritten = [Message(turn["role"], turn["content"]) for turn in plain]
            return self.template.render(rewritten, options)
        return self.template.render(
            messages,
            options,
            tools=[_openai_tool(tool) for tool in tools],
            text_arguments=facts.arguments == "string",
            short_ids=facts.call_ids == "nine",
        )

    def parsing(self, request: GenerateRequest, prompt: str) -> Parsing:
        """Return how the answer to a prompt is read, and what it has to be.

        Raises:
            InvalidRequest, Unsupported: it cannot be enforced, or its thinking not be limited.
        """
        constraint = self.constraint(request, prompt)
        enforced = constraint
        if request.enforces_calls and self._control:
            enforced = self.constraint(request, prompt, self._control)
        splitter = self.splitter(request, prompt)
        if splitter is None:
            return Parsing(constraint=constraint, enforced=enforced)
        return Parsing(
            constraint=constraint,
            enforced=enforced,
            splitter=splitter,
            visible=self._visible(request),
            budget=self._budget(request, prompt),
        )

    @cached_property
    def _control(self) -> Mapping[str, int]:
        """The markers of the format that are control tokens, with their ids."""
        engine, ids = self._engine, dict[str, int]()
        for marker in self.format.visible if engine.facts.capabilities.resume else ():
            for token in engine.tokenize(marker, add_special=False):
                if engine.detokenize((token,)).strip() == marker and not engine.shown((token,)):
                    ids[marker] = token
        return ids

    def _visible(self, request: GenerateRequest) -> frozenset[int]:
        calls, form = request.tool_choice.allowed(request.tools), self.format
        markers = form.visible if calls else form.visible_without_calls
        return frozenset(self._control[marker] for marker in markers if marker in self._control)

    def _budget(self, request: GenerateRequest, prompt: str) -> Budget | None:
        tokens = request.thinking.budget
        if tokens is None or not self.format.thinks:
            return None
        if not self._engine.facts.capabilities.resume:
            raise Unsupported(
                "This engine cannot close the thinking, as it cannot continue an answer.",
                param="thinking_budget",
            )
        if request.media:
            message = "A budget of thinking does not go with images or audio."
            raise Unsupported(message, param="thinking_budget")
        text = self.format.closing(calls=bool(request.tool_choice.allowed(request.tools)))
        return Budget(
            tokens=tokens,
            text=text,
            token_ids=tuple(self._engine.tokenize(text, add_special=False)),
            enforced=self.constraint(request, prompt, self._control, has_thought=True),
        )

    @cached_property
    def _writes_images(self) -> bool:
        return self.template.writes_image(self.image_marker)

    def _with_markers(self, messages: Sequence[Message]) -> Sequence[Message]:
        """Return the messages with images as the template takes them: as parts, or as text.

        Sounds are always text: their marker.
        """
        if all(isinstance(message.content, str) for message in messages):
            return messages
        if self._writes_images:
            return [_without_sounds(message, self.image_marker) for message in messages]
        return _flat(messages, self.image_marker)

    def splitter(self, request: GenerateRequest, prompt: str) -> NewSplitter | None:
        """Return what makes the parser of an answer; None if it is content alone."""
        tools = request.tool_choice.allowed(request.tools)
        if not tools and not self._may_think:
            return None
        has_form = request.constraint is not None
        if has_form and not tools and self._thinking(request, prompt) == "none":
            return None
        return partial(
            Splitter,
            self.format,
            # A text of a grammar is a JSON string in all forms of calls.
            {tool.name: self._read_by(tool, request) for tool in tools},
            Reading(
                calls=bool(tools),
                apart=has_form,
                only=bool(request.tool_choice.names),
                exact=request.enforces_calls and self._enforces,
            ),
            thinking_open=thinking_open_in(prompt[-_TAIL:], self.format),
        )

    def _read_by(self, tool: Tool, request: GenerateRequest) -> dict[str, Any] | None:
        """Return the schema by which arguments in tags are read."""
        enforced = tool.strict or request.tool_choice.mode == "required"
        if tool.input or not tool.parameters or not enforced or self.format.style != "tagged":
            return None if tool.input else tool.parameters
        return dict(reading_of(tool.name, tool.parameters))

    def constraint(
        self,
        request: GenerateRequest,
        prompt: str,
        control: Mapping[str, int] | None = None,
        *,
        has_thought: bool = False,
    ) -> Constraint | None:
        """Return what enforces calls: of a required one, or the arguments of strict tools.

        Beside a constraint of the request the answer is calls, or keeps to that.

        `control` has the ids of the markers that are control tokens, for the grammar of an engine;
        the text of an answer is checked by the one without. With `has_thought` it is that of what
        follows the thinking.

        Raises:
            InvalidRequest: the schema of a tool cannot be enforced.
            Unsupported: the constraint of the request is a grammar.
        """
        tools, choice = request.tool_choice.allowed(request.tools), request.tool_choice
        if not request.enforces_calls:
            return request.constraint
        mode: Literal["auto", "required"] = "required" if choice.mode == "required" else "auto"
        form = request.constraint
        thinking = "none" if has_thought else self._thinking(request, prompt)
        enforced = [
            _enforceable(tool) if tool.strict or mode == "required" else tool for tool in tools
        ]
        grammar = constraint_for(
            self.format,
            enforced,
            mode,
            parallel=choice.parallel,
            thinking=thinking,
            control=control,
            content=answer_rules(form) if form is not None and mode == "auto" else "",
        )
        return Constraint(lark=grammar)

    def thinking(self, request: GenerateRequest, prompt: str) -> Before:
        """Return what comes before an answer that has a constraint: its prefix, and the rules.

        Beside tools their grammar has it.
        """
        if request.constraint is None or request.enforces_calls or not self._may_think:
            return "", ""
        return thinking_before(self.format, self._thinking(request, prompt))

    def _thinking(self, request: GenerateRequest, prompt: str) -> Mode:
        """Return whether thinking comes first: the prompt has begun it, or the model may."""
        form = self.format
        content_alone = request.constraint is not None and not request.enforces_calls
        if not form.thinks or (content_alone and form.style == "harmony"):
            return "none"
        if thinking_open_in(prompt[-_TAIL:], form):
            return "open"
        off = request.constraint is not None and request.thinking.enabled is False
        return "none" if off else "optional"

    @property
    def _may_think(self) -> bool:
        # Most templates without thinking show it by their text, without trials.
        return self.template.mentions_thinking and self.format.thinks

    def _switches(self, thinking: Thinking) -> dict[str, Any]:
        if not thinking.is_controlled:
            return {}
        known = self.format.template.thinking
        options: dict[str, Any] = {}
        enabled = False if thinking.budget == 0 else thinking.enabled
        if enabled is not None:
            options |= {name: enabled for name in SWITCHES if name in known}
        if thinking.effort is not None and "reasoning_effort" in known:
            options["reasoning_effort"] = thinking.effort
        return options


def _flat(messages: Sequence[Message], marker: str) -> Sequence[Message]:
    return [
        message
        if isinstance(message.content, str)
        else msgspec.structs.replace(message, content=text_of(message.content, marker))
        for message in messages
    ]


def _without_sounds(message: Message, marker: str) -> Message:
    if isinstance(message.content, str):
        return message
    parts = [marker if isinstance(part, Audio) else part for part in message.content]
    return msgspec.structs.replace(message, content=content_of(parts))


def _marked(message: Message, mark: str) -> Message:
    """Return a message that is to be continued, with a mark at its end: of thinking or content."""
    if message.reasoning and not message.content:
        return msgspec.structs.replace(message, reasoning=message.reasoning + mark)
    return msgspec.structs.replace(message, content=text_of(message.content) + mark)


def _openai_tool(tool: Tool) -> dict[str, Any]:
    function: dict[str, Any] = {"name": tool.name}
    if tool.description is not None:
        function["description"] = tool.description
    function["parameters"] = tool.parameters or {"type": "object", "properties": {}}
    return {"type": "function", "function": function}


def _enforceable(tool: Tool) -> Tool:
    if tool.parameters is None:
        return tool
    try:
        Constraint(json_schema=tool.parameters)
        return msgspec.structs.replace(tool, parameters=without_formats(tool.parameters))
    except InvalidRequest as error:
        message = f"The tool {tool.name}: {error.message}"
        raise InvalidRequest(message, param="tools") from error
