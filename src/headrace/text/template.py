"""Chat templates: render a conversation as the text that a model was trained on."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol

import msgspec

from headrace.core.errors import ConfigError, GenerationFailed, HeadraceError, InvalidRequest
from headrace.core.media import Content, joined
from headrace.core.model import check_template
from headrace.core.request import Message, Role
from headrace.text.renderer import Fault, Rendered, Work, render

_MAX_SOURCE = 1024 * 1024
_RESERVED = frozenset({"messages", "tools", "bos_token", "eos_token"})
_PROBE = "probe"
_PROBES: dict[Role, tuple[Role, ...]] = {
    "system": ("system", "user"),
    "user": ("user",),
    "assistant": ("user", "assistant", "user"),
    "tool": ("user", "assistant", "tool"),
}


_JOINED = {("system", "system"), ("user", "user"), ("tool", "user")}
"""Turns that become one if a template refuses them one after the other."""
_OF_THINKING = ("think", "reason", "analysis")

Turns = Sequence[Mapping[str, Any]]
Tools = Sequence[Mapping[str, Any]] | None


class Render(Protocol):
    """Renders a conversation in OpenAI's form."""

    def __call__(self, messages: Turns, tools: Tools = None, **options: Any) -> str:
        """Return the prompt."""
        ...


class ChatTemplate:
    """A template. Rendering blocks for `deadline_s` seconds at most; it is thread-safe.

    `special_tokens` are texts by their names, as `bos_token`; they are variables of the template.

    Raises:
        ConfigError: the source is not a template.
    """

    def __init__(
        self, source: str, special_tokens: Mapping[str, str], *, deadline_s: float = 2.0
    ) -> None:
        self.source = source
        self._deadline_s = deadline_s
        self._tokens = {"bos_token": "", "eos_token": "", **special_tokens}
        self._check_source()

    @cached_property
    def roles(self) -> tuple[Role, ...]:
        """The roles whose content the template renders, determined by trials. Blocking."""
        roles: list[Role] = []
        for role, others in _PROBES.items():
            turns = [
                {"role": other, "content": _PROBE if other == role else "x"} for other in others
            ]
            answer = self._answer(turns, {})
            if isinstance(answer, Rendered):
                if _PROBE in answer.text:
                    roles.append(role)
            elif answer.kind == "limit":
                # One trial of an endless template takes long enough.
                break
        return tuple(roles)

    def render(
        self,
        messages: Sequence[Message],
        options: Mapping[str, Any] | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        text_arguments: bool = False,
        short_ids: bool = False,
    ) -> str:
        """Return the prompt. Blocking.

        `tools` are in OpenAI's form. With `text_arguments` the template takes the arguments of
        calls as text, with `short_ids` it takes only ids of nine letters and digits.

        `options` are variables of the template; the generation prompt is added unless
        `add_generation_prompt` is false. If the template has no system role, or none after the
        beginning, a system message joins the user turn next to it. If it refuses turns that do not
        alternate, the user's turns that follow one another are joined.

        Raises:
            InvalidRequest: the template refuses the conversation or the options.
            GenerationFailed: the template fails or exceeds its limits.
        """
        options = options or {}
        _check_options(options)

        def rendered(messages: Sequence[Message]) -> str:
            turns = [
                openai_turn(message, text_arguments=text_arguments, short_ids=short_ids)
                for message in messages
            ]
            return self._rendered(turns, options, tools or None)

        adapted = self._adapted(messages)
        try:
            return rendered(adapted)
        except InvalidRequest:
            alternating = _alternating(adapted)
            if len(alternating) == len(adapted):
                raise
            with contextlib.suppress(HeadraceError):
                return rendered(alternating)
            raise

    def _rendered(self, turns: Turns, options: Mapping[str, Any], tools: Tools) -> str:
        """Return the prompt; if the template fails because of the options, they are wrong."""
        try:
            return self._render(turns, options, tools)
        except GenerationFailed as error:
            if options and self._renders(turns):
                raise InvalidRequest(
                    "The chat template fails with these options.",
                    param="template_options",
                    detail=error.detail,
                ) from error
            raise

    @cached_property
    def mentions_thinking(self) -> bool:
        """Whether the source may be that of a model that thinks."""
        source = self.source.lower()
        return any(word in source for word in _OF_THINKING)

    def writes_image(self, marker: str) -> bool:
        """Whether it writes this text for an image of a message, determined by a trial."""
        if "image" not in self.source:
            return False
        parts = [{"type": "image"}, {"type": "text", "text": _PROBE}]
        answer = self._answer([{"role": "user", "content": parts}], {})
        return isinstance(answer, Rendered) and answer.text.count(marker) == 1

    def trial(self) -> Render:
        """Return a function that renders a conversation in OpenAI's form, or raises.

        Once a rendering has exceeded its limits, it raises at once.
        """
        has_failed = False

        def rendered(messages: Turns, tools: Tools = None, **options: Any) -> str:
            nonlocal has_failed
            if not has_failed:
                answer = self._answer(messages, options, tools)
                if isinstance(answer, Rendered):
                    return answer.text
                has_failed = answer.kind == "limit"
            raise GenerationFailed("The chat template failed.")

        return rendered

    def _check_source(self) -> None:
        if len(self.source) > _MAX_SOURCE:
            raise ConfigError(f"The chat template is longer than {_MAX_SOURCE} characters.")
        try:
            check_template(self.source)
        except ValueError as error:
            raise ConfigError(f"The chat template {error}.") from None
        answer = render(Work(self.source, None, self._deadline_s))
        if not isinstance(answer, Fault):
            return
        if answer.kind == "syntax":
            raise ConfigError(f"The chat template is wrong in line {answer.line}: {answer.reason}")
        raise ConfigError("The chat template cannot be compiled.", detail=answer.reason)

    def _answer(
        self, messages: Turns, options: Mapping[str, Any], tools: Tools = None
    ) -> Rendered | Fault:
        variables: dict[str, Any] = {
            "tools": tools,
            "documents": None,
            "add_generation_prompt": True,
            **options,
            **self._tokens,
            "messages": messages,
        }
        return render(Work(self.source, variables, self._deadline_s))

    def _render(self, messages: Turns, options: Mapping[str, Any], tools: Tools = None) -> str:
        answer = self._answer(messages, options, tools)
        if isinstance(answer, Rendered):
            return answer.text
        if answer.kind == "refused":
            raise InvalidRequest(answer.reason, param="messages")
        if answer.kind == "limit":
            raise GenerationFailed("The chat template exceeds its limits.", detail=answer.reason)
        raise GenerationFailed("The chat template failed.", detail=answer.reason)

    def _renders(self, messages: Turns) -> bool:
        try:
            self._render(messages, {})
        except HeadraceError:
            return False
        return True

    def _adapted(self, messages: Sequence[Message]) -> Sequence[Message]:
        if "'developer'" not in self.source and '"developer"' not in self.source:
            messages = [
                msgspec.structs.replace(message, role="system")
                if message.role == "developer"
                else message
                for message in messages
            ]
        if all(message.role != "system" for message in messages):
            return messages
        if "system" not in self.roles:
            return _without_system(messages)
        first = _leading(messages)
        rest = messages[first:]
        if all(message.role != "system" for message in rest) or self._takes_late_system:
            return messages
        return [*messages[:first], *_without_system(rest)]

    @cached_property
    def _takes_late_system(self) -> bool:
        turns = [{"role": "user", "content": "x"}, {"role": "system", "content": _PROBE}]
        answer = self._answer(turns, {})
        return isinstance(answer, Rendered) and _PROBE in answer.text


def _leading(messages: Sequence[Message]) -> int:
    """Return how many system messages are at the beginning."""
    return next((i for i, message in enumerate(messages) if message.role != "system"), 0)


def _check_options(options: Mapping[str, Any]) -> None:
    if reserved := _RESERVED & options.keys():
        raise InvalidRequest(
            f"Template options cannot set {', '.join(sorted(reserved))}.", param="template_options"
        )


def _alternating(messages: Sequence[Message]) -> list[Message]:
    """Return the messages with one system message, and user turns joined to what they follow."""
    first = _leading(messages)
    turns: list[Message] = []
    for message in (*messages[:first], *_without_system(messages[first:])):
        if turns and (turns[-1].role, message.role) in _JOINED:
            turns[-1] = _with(turns[-1], message)
        else:
            turns.append(message)
    return turns


def _without_system(messages: Sequence[Message]) -> list[Message]:
    """Return the messages with system messages merged into the user turns next to them."""
    turns: list[Message] = []
    joins = False
    for message in messages:
        system = message.role == "system"
        if turns and turns[-1].role == "user" and (system or (joins and message.role == "user")):
            turns[-1] = _with(turns[-1], message)
        else:
            turns.append(msgspec.structs.replace(message, role="user") if system else message)
        joins = system
    return turns


def _with(turn: Message, later: Message) -> Message:
    return msgspec.structs.replace(turn, content=joined(turn.content, later.content))


def openai_turn(
    message: Message, *, text_arguments: bool = False, short_ids: bool = False
) -> dict[str, Any]:
    """Return a turn in OpenAI's form, as templates take it; arguments as an object, or as text."""
    turn: dict[str, Any] = {"role": message.role, "content": _typed(message.content)}
    if message.name is not None:
        turn["name"] = message.name
    if message.reasoning:
        turn["reasoning_content"] = message.reasoning
    if message.tool_call_id is not None:
        turn["tool_call_id"] = _id(message.tool_call_id, short=short_ids)
    if message.tool_calls:
        turn["tool_calls"] = [
            {
                "id": _id(call.id, short=short_ids),
                "type": "function",
                "function": {
                    "name": call.name,
                    "arguments": call.arguments
                    if text_arguments
                    else msgspec.json.decode(call.arguments),
                },
            }
            for call in message.tool_calls
        ]
    return turn


def _typed(content: Content) -> Any:
    if isinstance(content, str):
        return content
    return [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"}
        for part in content
    ]


def _id(identity: str, *, short: bool) -> str:
    return hashlib.blake2b(identity.encode(), digest_size=8).hexdigest()[:9] if short else identity
