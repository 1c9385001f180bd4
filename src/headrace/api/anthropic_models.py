"""What a model can do, in Anthropic's form: each ability, and whether it is there."""

from __future__ import annotations

import msgspec

from headrace.core.model import Capabilities


class Support(msgspec.Struct, frozen=True):
    """Whether an ability is there."""

    supported: bool


class EffortSupport(msgspec.Struct, frozen=True, kw_only=True):
    """The levels of thinking."""

    supported: bool
    low: Support
    medium: Support
    high: Support
    xhigh: Support
    max: Support


class ThinkingTypes(msgspec.Struct, frozen=True, kw_only=True):
    """The types of `thinking` that a request may have; `disabled` is always accepted."""

    adaptive: Support
    enabled: Support
    disabled: Support = Support(supported=True)
    between_tools: Support = Support(supported=False)


class ThinkingSupport(msgspec.Struct, frozen=True):
    """Thinking."""

    supported: bool
    types: ThinkingTypes


class ServerToolsSupport(msgspec.Struct, frozen=True):
    """Tools that Anthropic runs: none."""

    supported: bool = False
    code_execution: Support = Support(supported=False)
    web_search: Support = Support(supported=False)


class ModelAbilities(msgspec.Struct, frozen=True, kw_only=True):
    """What a model can do; what Anthropic's service does beside it is not there."""

    image_input: Support
    structured_outputs: Support
    thinking: ThinkingSupport
    effort: EffortSupport
    batch: Support = Support(supported=False)
    citations: Support = Support(supported=False)
    code_execution: Support = Support(supported=False)
    pdf_input: Support = Support(supported=False)
    context_management: Support = Support(supported=False)
    server_tools: ServerToolsSupport = ServerToolsSupport()


def abilities(able: Capabilities) -> ModelAbilities:
    """Return what a model can do."""
    thinks = Support(able.thinking != "none")
    return ModelAbilities(
        image_input=Support(able.vision),
        structured_outputs=Support(able.json_schema),
        # Any request may ask for it; a model that does not think answers all the same.
        thinking=ThinkingSupport(thinks.supported, ThinkingTypes(adaptive=thinks, enabled=thinks)),
        effort=EffortSupport(
            supported=thinks.supported,
            low=thinks,
            medium=thinks,
            high=thinks,
            xhigh=thinks,
            max=thinks,
        ),
    )
