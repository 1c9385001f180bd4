"""Presets: what requests to a model get that they do not set themselves."""

from __future__ import annotations

from typing import Any

import msgspec

from headrace.core.adapter import names_of
from headrace.core.model import PRESET_SETTINGS, ModelSpec, Preset
from headrace.core.request import (
    AnyRequest,
    CountRequest,
    EmbedRequest,
    GenerateRequest,
    Message,
)
from headrace.core.tools import Thinking

_SYSTEM = ("system", "developer")


def preset_of(spec: ModelSpec, name: str) -> Preset:
    """Return the preset of one of a model's names."""
    return spec.presets.get(name, spec)


def plain(preset: Preset) -> dict[str, Any]:
    """Return what a preset sets, by the names of the settings."""
    values = {name: getattr(preset, name) for name in PRESET_SETTINGS}
    return {name: value for name, value in values.items() if value not in (None, {})}


def addressed(spec: ModelSpec, request: AnyRequest) -> AnyRequest:
    """Return a request with what its name stands for: an adapter, and the preset of the name.

    Raises:
        InvalidRequest: as `applied`.
    """
    if spec.adapters and (adapter := spec.adapter_names.get(request.model)) is not None:
        name = names_of(spec.name, adapter, spec.adapters[adapter])[0]
        request = msgspec.structs.replace(request, adapter=adapter, model=name)
    return applied(preset_of(spec, request.model), request)


def applied(preset: Preset, request: AnyRequest) -> AnyRequest:
    """Return a request with what the preset has and the request does not set.

    Raises:
        InvalidRequest: the preset and the request contradict each other.
    """
    if isinstance(request, GenerateRequest):
        return _generate(preset, request)
    if isinstance(request, CountRequest):
        return _changed(request, _conversation(preset, request))
    if isinstance(request, EmbedRequest) and preset.prompt_name and not request.input_type:
        return _changed(request, {"prompt_name": request.prompt_name or preset.prompt_name})
    return request


def _generate(preset: Preset, request: GenerateRequest) -> GenerateRequest:
    changes = _conversation(preset, request)
    sampling = request.sampling
    values = {
        name: tuple(value) if name == "stop" else value
        for name, value in preset.defaults.items()
        if getattr(sampling, name) in (None, ())
    }
    if values:
        changes["sampling"] = msgspec.structs.replace(sampling, **values)
        # A limit of the model's own is no demand for so much room.
        changes["fit_max_tokens"] = request.fit_max_tokens or "max_tokens" in values
    return _changed(request, changes)


def _conversation(preset: Preset, request: GenerateRequest | CountRequest) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    messages = request.messages
    if messages is None:
        return changes
    if preset.system and not any(message.role in _SYSTEM for message in messages):
        changes["messages"] = (Message("system", preset.system), *messages)
    given = request.thinking.switched(request.template_options)
    switched = given.enabled is not None or given.effort is not None
    thinking = given if switched else _switch(preset)
    if given.budget is None and preset.thinking_budget is not None:
        thinking = msgspec.structs.replace(thinking, budget=preset.thinking_budget)
    elif thinking is not given:
        thinking = msgspec.structs.replace(thinking, budget=given.budget)
    thinking = msgspec.structs.replace(thinking, hidden=given.hidden)
    if thinking != request.thinking:
        changes["thinking"] = thinking
    return changes


def _switch(preset: Preset) -> Thinking:
    level = preset.thinking
    if level is None:
        return Thinking()
    if level in ("on", "off"):
        return Thinking(enabled=level == "on")
    return Thinking(enabled=True, effort=level)


def _changed(request: Any, changes: dict[str, Any]) -> Any:
    return msgspec.structs.replace(request, **changes) if changes else request
