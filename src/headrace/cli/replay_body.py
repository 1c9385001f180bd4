"""The body of a recorded request, to be sent again."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from headrace.api.custom_tools import as_wire
from headrace.core.errors import InvalidRequest
from headrace.core.media import Audio, Media, Part, openai_part
from headrace.core.record import Content, RequestRecord
from headrace.core.request import Message
from headrace.core.sampling import SamplingFields
from headrace.core.tools import Thinking, Tool, ToolChoice
from headrace.text.template import openai_turn

PATHS = {"chat": "/v1/chat/completions", "text_completion": "/v1/completions"}
"""Where the operations that can be replayed are sent to."""

# The parameters that have the same name in a record and on the wire.
_SAME = {
    *("n", "echo", "context_length", "stop", "stop_token_ids", "ignore_eos", "logit_bias"),
    *("prompt_logprobs", *SamplingFields.__struct_fields__),
}


def replay_body(
    record: RequestRecord, model: str | None = None, images: Sequence[bytes] = ()
) -> dict[str, Any]:
    """Return the body of the request to send; `images` are the files of its images and sounds.

    Raises:
        InvalidRequest: its content was not kept, the operation is not one of text, or an image or a
            sound is missing.
    """
    if record.operation not in PATHS:
        raise InvalidRequest(f"{record.id} is of {record.operation}; only texts are replayed.")
    if record.content is None or record.content.input is None:
        raise InvalidRequest(
            f"No content of {record.id} was kept. The service keeps it where"
            " telemetry.trace_content is true, from then on.",
            param="telemetry.trace_content",
        )
    given = {**record.parameters, **record.parameters.get("sampling", {})}
    sent = {name: value for name, value in given.items() if name in _SAME and value is not None}
    sent |= _constraint(given.get("constraint"))
    count = given.get("logprobs")
    if record.operation == "chat":
        files = {hashlib.sha256(data).hexdigest(): data for data in images}
        sent |= {"messages": _messages(record, files)} | _template(given)
        sent |= _tools(record.content, given)
        if count is not None:
            sent |= {"logprobs": True, "top_logprobs": count}
    else:
        sent |= {"prompt": record.content.input}
        if record.content.suffix is not None:
            sent["suffix"] = record.content.suffix
    if name := model or record.model:
        sent["model"] = name
    return sent | {"stream": True}


def _constraint(constraint: Mapping[str, Any] | None) -> dict[str, Any]:
    if constraint is None:
        return {}
    if not constraint.keys() <= {"json_schema"}:
        return {"structured_outputs": constraint}
    named = {"name": "answer", "schema": constraint.get("json_schema", {})}
    return {"response_format": {"type": "json_schema", "json_schema": named}}


def _template(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of the template and of the thinking."""
    thinking = msgspec.convert(given.get("thinking", {}), Thinking)
    fields = {
        "chat_template_kwargs": given.get("template_options"),
        "enable_thinking": thinking.enabled,
        "reasoning_effort": thinking.effort,
        "thinking_token_budget": thinking.budget,
        "include_reasoning": False if thinking.hidden else None,
    }
    if given.get("continue_final"):
        fields |= {"continue_final_message": True, "add_generation_prompt": False}
    return {name: value for name, value in fields.items() if value is not None}


def _tools(content: Content, given: Mapping[str, Any]) -> dict[str, Any]:
    if not content.tools:
        return {}
    tools = msgspec.convert(content.tools, tuple[Tool, ...])
    choice = msgspec.convert(given.get("tool_choice", {}), ToolChoice)
    named = [{"type": "function", "function": {"name": name}} for name in choice.names]
    wire: Any = choice.mode
    if len(named) == 1 and choice.mode == "required" and not choice.parallel:
        wire = named[0]
    elif named:
        wire = {"type": "allowed_tools", "allowed_tools": {"mode": choice.mode, "tools": named}}
    return {
        "tools": [as_wire(tool) for tool in tools],
        "tool_choice": wire,
        "parallel_tool_calls": choice.parallel,
    }


def _messages(record: RequestRecord, files: Mapping[str, bytes]) -> list[dict[str, Any]]:
    assert record.content is not None
    turns: list[dict[str, Any]] = []
    for message in msgspec.convert(record.content.input, tuple[Message, ...]):
        turn = openai_turn(message, text_arguments=True)
        if not isinstance(message.content, str):
            turn["content"] = [_part(record.id, part, files) for part in message.content]
        turns.append(turn)
    return turns


def _part(name: str, part: Part, files: Mapping[str, bytes]) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if part.digest not in files:
        raise InvalidRequest(_missing(name, part), param="image")
    return openai_part(part, files)


def _missing(name: str, part: Media) -> str:
    if isinstance(part, Audio):
        size, kind = f"{part.format}, {part.seconds:g} s, {part.size} bytes", "a sound"
    else:
        size = f"{part.format}, {part.width}x{part.height}, {part.size} bytes"
        kind = "an image"
    return (
        f"{name} has {kind} ({size}, sha256 {part.digest[:12]}), whose bytes are not kept:"
        f" give its file with --image."
    )
