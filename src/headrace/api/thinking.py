"""The control of thinking on the wire, and its translation to the core."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from msgspec import Meta

from headrace.api import fields
from headrace.api.fields import Body, Peers
from headrace.api.wire import GenerateFields
from headrace.core.errors import InvalidRequest
from headrace.core.tools import Thinking

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
Budget = Annotated[int, Meta(ge=-1, le=2**31 - 1)]

_BUDGETS = (
    "thinking_token_budget", "thinking_budget_tokens", "thinking_budget", "reasoning_budget",
)  # fmt: skip


class ThinkingSwitch(Body, frozen=True):
    """Thinking as some APIs have it: on or off, and the most tokens of it."""

    type: Literal["enabled", "disabled", "auto", "adaptive"] | None = None
    budget_tokens: Budget | None = None


class ReasoningSwitch(Body, frozen=True):
    """Thinking as routers have it; with `exclude` it is not sent."""

    effort: Effort | None = None
    enabled: bool | None = None
    max_tokens: Budget | None = None
    exclude: bool | None = None

    peers: ClassVar[Peers] = fields.REASONING


class ThinkingFields(GenerateFields, frozen=True, kw_only=True):
    """The names under which clients control the thinking; all mean one policy.

    With `include_reasoning` false, or a `reasoning_format` that is `hidden`, the model thinks, and
    the thinking is not sent.
    """

    reasoning_effort: Effort | None = None
    reasoning: ReasoningSwitch | None = None
    thinking: ThinkingSwitch | bool | None = None
    think: bool | Effort | None = None
    enable_thinking: bool | None = None
    thinking_token_budget: Budget | None = None
    thinking_budget_tokens: Budget | None = None
    thinking_budget: Budget | None = None
    reasoning_budget: Budget | None = None
    include_reasoning: bool | None = None
    reasoning_format: Literal["auto", "parsed", "deepseek", "hidden"] | None = None

    def names(self) -> dict[str, str]:
        """Return the client's names for fields of the core, where they differ."""
        budgets = _budgets(self)
        return super().names() | ({"thinking_budget": budgets[0][0]} if budgets else {})


def to_thinking(wire: ThinkingFields) -> Thinking:
    """Return the one policy behind the fields; the first that says something wins.

    Raises:
        InvalidRequest: one asks for the thinking, and another for none of it.
    """
    switch, routed, think = _switch(wire), wire.reasoning or ReasoningSwitch(), wire.think
    efforts = (wire.reasoning_effort, routed.effort, think if isinstance(think, str) else None)
    effort = next(filter(None, efforts), None)
    switches = (
        wire.enable_thinking,
        {"enabled": True, "disabled": False}.get(switch.type or ""),
        routed.enabled,
        think if isinstance(think, bool) else None,
        None if effort is None else effort != "none",
    )
    enabled = next((value for value in switches if value is not None), None)
    return Thinking(
        enabled=enabled,
        effort=None if effort == "none" else effort,
        budget=next((tokens for _, tokens in _budgets(wire)), None),
        hidden=_hides(wire),
    )


def _hides(wire: ThinkingFields) -> bool:
    exclude, form = wire.reasoning and wire.reasoning.exclude, wire.reasoning_format
    is_sent = {
        "include_reasoning": wire.include_reasoning,
        "reasoning.exclude": None if exclude is None else not exclude,
        "reasoning_format": None if form in (None, "auto") else form != "hidden",
    }
    given = {name: value for name, value in is_sent.items() if value is not None}
    if len({*given.values()}) > 1:
        first, *others = given
        other = next(name for name in others if given[name] != given[first])
        raise InvalidRequest(f"{first} and {other} contradict each other.", param=other)
    return False in given.values()


def _switch(wire: ThinkingFields) -> ThinkingSwitch:
    if isinstance(wire.thinking, bool):
        return ThinkingSwitch("enabled" if wire.thinking else "disabled")
    return wire.thinking or ThinkingSwitch()


def _budgets(wire: ThinkingFields) -> list[tuple[str, int]]:
    """Return the limits of the thinking by the names of their fields; -1 is none."""
    budgets = {name: getattr(wire, name) for name in _BUDGETS}
    budgets["thinking.budget_tokens"] = _switch(wire).budget_tokens
    budgets["reasoning.max_tokens"] = wire.reasoning and wire.reasoning.max_tokens
    return [(name, value) for name, value in budgets.items() if value is not None and value >= 0]
