"""Chat templates: render a conversation as the text that a model was trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import msgspec

from headrace.core.errors import ConfigError, GenerationFailed, HeadraceError, InvalidRequest
from headrace.core.model import check_template
from headrace.core.request import Message, Role
from headrace.text.renderer import Fault, Rendered, Work, render

_MAX_SOURCE = 1024 * 1024
_RESERVED = frozenset({"messages", "bos_token", "eos_token"})
_PROBE = "probe"
_PROBES: dict[Role, tuple[Role, ...]] = {
    "system": ("system", "user"),
    "user": ("user",),
    "assistant": ("user", "assistant", "user"),
    "tool": ("user", "assistant", "tool"),
}


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
            turns = [Message(other, _PROBE if other == role else "x") for other in others]
            answer = self._answer(turns, {})
            if isinstance(answer, Rendered):
                if _PROBE in answer.text:
                    roles.append(role)
            elif answer.kind == "limit":
                # One trial of an endless template takes long enough.
                break
        return tuple(roles)

    def render(self, messages: Sequence[Message], options: Mapping[str, Any] | None = None) -> str:
        """Return the prompt. Blocking.

        `options` are variables of the template; the generation prompt is added unless
        `add_generation_prompt` is false. If the template has no system role, a system message is
        prepended to the user turn next to it.

        Raises:
            InvalidRequest: the template refuses the conversation or the options.
            GenerationFailed: the template fails or exceeds its limits.
        """
        options = options or {}
        if reserved := _RESERVED & options.keys():
            raise InvalidRequest(
                f"Template options cannot set {', '.join(sorted(reserved))}.",
                param="template_options",
            )
        turns = self._adapted(messages)
        try:
            return self._render(turns, options)
        except GenerationFailed as error:
            if options and self._renders(turns):
                raise InvalidRequest(
                    "The chat template fails with these options.",
                    param="template_options",
                    detail=error.detail,
                ) from error
            raise

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

    def _answer(self, messages: Sequence[Message], options: Mapping[str, Any]) -> Rendered | Fault:
        variables: dict[str, Any] = {
            "tools": None,
            "documents": None,
            "add_generation_prompt": True,
            **options,
            **self._tokens,
            "messages": [msgspec.to_builtins(message) for message in messages],
        }
        return render(Work(self.source, variables, self._deadline_s))

    def _render(self, messages: Sequence[Message], options: Mapping[str, Any]) -> str:
        answer = self._answer(messages, options)
        if isinstance(answer, Rendered):
            return answer.text
        if answer.kind == "refused":
            raise InvalidRequest(answer.reason, param="messages")
        if answer.kind == "limit":
            raise GenerationFailed("The chat template exceeds its limits.", detail=answer.reason)
        raise GenerationFailed("The chat template failed.", detail=answer.reason)

    def _renders(self, messages: Sequence[Message]) -> bool:
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
        if all(message.role != "system" for message in messages) or "system" in self.roles:
            return messages
        return _without_system(messages)


def _without_system(messages: Sequence[Message]) -> list[Message]:
    """Return the messages with system messages merged into the user turns next to them."""
    turns: list[Message] = []
    joins = False
    for message in messages:
        system = message.role == "system"
        if turns and turns[-1].role == "user" and (system or (joins and message.role == "user")):
            before = turns.pop()
            content = f"{before.content}\n\n{message.content}"
            turns.append(msgspec.structs.replace(before, content=content))
        else:
            turns.append(msgspec.structs.replace(message, role="user") if system else message)
        joins = system
    return turns
