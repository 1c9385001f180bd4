"""Tools that a model may call, and what a request asks of its thinking."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from headrace.core.constraint import Constraint
from headrace.core.errors import InvalidRequest

SWITCHES = ("enable_thinking", "thinking")
"""The variables of chat templates that switch the thinking."""
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
"""How much of it, in the words of OpenAI's API."""


class Tool(msgspec.Struct, frozen=True, omit_defaults=True):
    """A function that the model may call. `parameters` is a JSON schema; None takes no arguments.

    `strict` enforces the schema also where the model is free to call or not. `input` is what the
    text of the one argument of that name has to be, for a tool that takes text of a grammar.
    """

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool = False
    input: Constraint | None = None


class ToolChoice(msgspec.Struct, frozen=True, omit_defaults=True):
    """Whether the model calls tools, and which: `names` restricts it to some, () is all.

    `parallel` allows several calls in one answer.
    """

    mode: Literal["none", "auto", "required"] = "auto"
    names: tuple[str, ...] = ()
    parallel: bool = True

    def allowed(self, tools: tuple[Tool, ...]) -> tuple[Tool, ...]:
        """Return the tools that may be called.

        Raises:
            InvalidRequest: a name is not that of a tool, or a call is required without any tool.
        """
        if self.mode == "required" and not tools:
            raise InvalidRequest("tool_choice needs tools.", param="tool_choice")
        known = {tool.name for tool in tools}
        if unknown := [name for name in self.names if name not in known]:
            raise InvalidRequest(f"There is no tool {unknown[0]!r}.", param="tool_choice")
        if self.mode == "none":
            return ()
        return tuple(tool for tool in tools if not self.names or tool.name in self.names)

    def enforced(self, tools: tuple[Tool, ...], name: str) -> tuple[dict[str, Any], ...]:
        """Return the schema that the arguments of a call of `name` have to keep to, if any."""
        tool = next((tool for tool in tools if tool.name == name), None)
        if tool is None or not (tool.strict or self.mode == "required"):
            return ()
        return (tool.parameters or {"type": "object"},)


class Thinking(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a request asks of the thinking before an answer; models that do not think ignore it.

    None leaves a setting to the model. `budget` is the most tokens of thinking: after them it is
    closed and the answer begins. `hidden` thinking is not sent to the client.
    """

    enabled: bool | None = None
    effort: str | None = None
    budget: int | None = None
    hidden: bool = False

    @property
    def is_controlled(self) -> bool:
        """Whether something is not left to the model."""
        return (self.enabled, self.effort, self.budget) != (None, None, None)

    def switched(self, options: Mapping[str, Any]) -> Thinking:
        """Return it with what variables of a chat template say, where it says nothing itself."""
        if not options or self.enabled is not None or self.effort is not None:
            return self
        effort = options.get("reasoning_effort")
        effort = effort if effort in EFFORTS else None
        switches = (options.get(name) for name in SWITCHES)
        enabled = next((value for value in switches if isinstance(value, bool)), None)
        if enabled is None and effort is not None:
            enabled = effort != "none"
        effort = None if effort == "none" else effort
        return Thinking(enabled, effort, self.budget, self.hidden)
