"""Chat templates: render a conversation as the text that a model was trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import msgspec
from jinja2.exceptions import TemplateSyntaxError

from headrace.core.errors import ConfigError, GenerationFailed, HeadraceError, InvalidRequest
from headrace.core.request import Message, Role
from headrace.text.sandbox import LimitExceeded, Refusal, TemplateEnvironment, within

_environment = TemplateEnvironment()
_MAX_SOURCE = 1024 * 1024
_MAX_REFUSAL = 500
_RESERVED = frozenset({"messages", "bos_token", "eos_token"})
_PROBE = "probe"
_PROBES: dict[Role, tuple[Role, ...]] = {
    "system": ("system", "user"),
    "user": ("user",),
    "assistant": ("user", "assistant", "user"),
    "tool": ("user", "assistant", "tool"),
}


class ChatTemplate:
    """A compiled template. Rendering blocks for `deadline_s` seconds at most; it is thread-safe.

    Raises:
        ConfigError: the source is not a template.
    """

    def __init__(
        self, source: str, *, bos_token: str, eos_token: str, deadline_s: float = 2.0
    ) -> None:
        self.source = source
        self._deadline_s = deadline_s
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}
        self._template = self._compile(source)

    @cached_property
    def roles(self) -> tuple[Role, ...]:
        """The roles whose content the template renders, determined by trials. Blocking."""
        return tuple(role for role in _PROBES if self._keeps(role))

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

    def _compile(self, source: str) -> Any:
        if len(source) > _MAX_SOURCE:
            raise ConfigError(f"The chat template is longer than {_MAX_SOURCE} characters.")
        try:
            return within(self._deadline_s, lambda: _environment.from_string(source))
        except TemplateSyntaxError as error:
            raise ConfigError(
                f"The chat template is wrong in line {error.lineno}: {error.message}"
            ) from error
        except Exception as error:
            # A hostile source can break the compiler in any way.
            raise ConfigError(
                "The chat template cannot be compiled.", detail=f"{type(error).__name__}: {error}"
            ) from error

    def _render(self, messages: Sequence[Message], options: Mapping[str, Any]) -> str:
        variables: dict[str, Any] = {
            "tools": None,
            "documents": None,
            "add_generation_prompt": True,
            **options,
            **self._tokens,
            "messages": [msgspec.to_builtins(message) for message in messages],
        }
        try:
            return within(self._deadline_s, lambda: self._template.render(variables))
        except Refusal as error:
            raise InvalidRequest(str(error)[:_MAX_REFUSAL], param="messages") from error
        except LimitExceeded as error:
            raise GenerationFailed(
                "The chat template exceeds its limits.", detail=str(error)
            ) from error
        except Exception as error:
            # The template is code: it can raise anything.
            raise GenerationFailed(
                "The chat template failed.", detail=f"{type(error).__name__}: {error}"
            ) from error

    def _renders(self, messages: Sequence[Message]) -> bool:
        try:
            self._render(messages, {})
        except HeadraceError:
            return False
        return True

    def _keeps(self, role: Role) -> bool:
        turns = [Message(other, _PROBE if other == role else "x") for other in _PROBES[role]]
        try:
            return _PROBE in self._render(turns, {})
        except HeadraceError:
            return False

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
