"""Requests from the keyword arguments of a worker in Python, and numbers from its results."""

from __future__ import annotations

import difflib
import struct
from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeVar

import msgspec

from headrace.api import fields
from headrace.api.images import ImageReader
from headrace.api.messages import (
    ChatMessage,
    WireChoice,
    WireTool,
    to_choice,
    to_messages,
    to_tools,
)
from headrace.core.adapter import SEPARATOR
from headrace.core.constraint import ANY_FORM, AnyForm, Constraint, constraint_of
from headrace.core.errors import InvalidRequest
from headrace.core.events import EmbedResult
from headrace.core.options import GenerateOptions
from headrace.core.request import GenerateRequest, Message
from headrace.core.sampling import Sampling
from headrace.core.tools import Thinking, Tool, ToolChoice
from headrace.core.wording import refusal

Messages = Sequence[Message | Mapping[str, Any]]
Prompt = str | Sequence[int]
Numbers = list[list[float]]

T = TypeVar("T", bound=msgspec.Struct)

_SAMPLING = frozenset(Sampling.__struct_fields__)


def request(
    model: str, prompt: Prompt | None, messages: Messages | None, options: Mapping[str, Any]
) -> GenerateRequest:
    """Build a request from keyword arguments.

    Raises:
        InvalidRequest: an option is unknown, or a value has the wrong type or range.
    """
    arguments = given(options, GenerateOptions.__annotations__)
    if adapter := arguments.pop("adapter", None):
        model = f"{model}{SEPARATOR}{adapter}"
    sampling = {name: arguments.pop(name) for name in _SAMPLING & arguments.keys()}
    if isinstance(sampling.get("stop"), str):
        sampling["stop"] = (sampling["stop"],)
    forms: list[AnyForm] = [form for form in ANY_FORM if arguments.get(form) is not None]
    if forms:
        if len(forms) > 1:
            raise InvalidRequest(f"{forms[0]} and {forms[1]} are both given.", param=forms[1])
        arguments["constraint"] = _constraint(forms[0], arguments.pop(forms[0]))
    arguments |= _conversation(arguments)
    text = prompt if prompt is None or isinstance(prompt, str) else tuple(prompt)
    reader = ImageReader()
    body = {"model": model, "prompt": text, "messages": turns(messages, reader), **arguments}
    checked = built(Sampling, sampling)
    return built(GenerateRequest, {**body, "sampling": checked, "media": reader.pictures.data})


def _conversation(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return tools, their choice and thinking as the core has them."""
    values: dict[str, Any] = {}
    if "tools" in arguments:
        tools = enumerate(arguments["tools"])
        values["tools"] = tuple(_tool(tool, f"tools[{index}]") for index, tool in tools)
    parallel = arguments.pop("parallel_tool_calls", None)
    if "tool_choice" in arguments or parallel is not None:
        values["tool_choice"] = _choice(arguments.get("tool_choice"), parallel=parallel)
    if "thinking" in arguments:
        values["thinking"] = _thinking(arguments["thinking"])
    return values


def _tool(item: Tool | Mapping[str, Any], place: str) -> Tool:
    """Return a tool; a mapping is the function, or as over HTTP."""
    if isinstance(item, Tool):
        return item
    body = dict(item) if "function" in item else {"type": "function", "function": dict(item)}
    return to_tools([_read(body, WireTool, place)])[0]


def _choice(
    item: ToolChoice | str | Mapping[str, Any] | None, *, parallel: bool | None
) -> ToolChoice:
    if isinstance(item, ToolChoice):
        return item if parallel is None else msgspec.structs.replace(item, parallel=parallel)
    wire = _read({"tool_choice": item}, _Choice, "")
    return to_choice(wire.tool_choice, parallel=parallel)


def _thinking(item: Thinking | bool | str | int) -> Thinking:
    if isinstance(item, Thinking):
        return item
    if isinstance(item, bool):
        return Thinking(enabled=item)
    if isinstance(item, int):
        return built(Thinking, {"budget": item})
    if item in ("on", "off"):
        return Thinking(enabled=item == "on")
    return built(Thinking, {"effort": item, "enabled": True})


class _Choice(fields.Body, frozen=True):
    tool_choice: WireChoice | None


def _read(data: Any, kind: type[T], place: str) -> T:
    """Return a part of a request, checked as over HTTP.

    Raises:
        InvalidRequest, Unsupported: it is wrong, with its place.
    """
    known, unknown = fields.known(data, kind, place)
    fields.check(unknown)
    try:
        return msgspec.convert(known, kind)
    except msgspec.ValidationError as error:
        raise refusal(error, kind, place) from error


def _constraint(form: AnyForm, value: Any) -> Constraint:
    checked = built(Constraint, {form: value})
    return constraint_of(form, getattr(checked, form))


def turns(
    messages: Messages | None, reader: ImageReader | None = None
) -> tuple[Message, ...] | None:
    """Return messages as the core has them; `reader` has their pictures afterwards.

    Raises:
        InvalidRequest, Unsupported: one is wrong, with its place.
    """
    if messages is None:
        return None
    if isinstance(messages, str | Mapping):
        raise InvalidRequest("messages: expected a list of messages.", param="messages")
    reader = reader or ImageReader()
    return tuple(_message(item, index, reader) for index, item in enumerate(messages))


def _message(item: Message | Mapping[str, Any], index: int, reader: ImageReader) -> Message:
    place = f"messages[{index}]"
    if isinstance(item, Message):
        return item
    if not isinstance(item, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InvalidRequest(f"{place}: expected a mapping or a Message.", param=place)
    wire = _read(dict(item), ChatMessage, place)
    return to_messages([wire], int(place[9:-1]), reader=reader)[0]


def vectors(embedded: EmbedResult) -> Numbers:
    """Return the vectors as lists of numbers."""
    form = struct.Struct(f"<{embedded.dimensions}f")
    return [list(form.unpack(vector)) for vector in embedded.vectors]


def given(options: Mapping[str, Any], known: Collection[str]) -> dict[str, Any]:
    """Return the options that are given; None is as if one were not.

    Raises:
        InvalidRequest: an option is unknown.
    """
    for name in options.keys() - known:
        matches = difflib.get_close_matches(name, known, 1)
        hint = f"; did you mean {matches[0]}?" if matches else "."
        raise InvalidRequest(f"There is no option {name!r}{hint}", param=name)
    return {name: value for name, value in options.items() if value is not None}


def built(kind: type[T], body: Mapping[str, Any]) -> T:
    """Return a request, or a part of one, of checked values.

    Raises:
        InvalidRequest: a value has the wrong type or range.
    """
    try:
        return msgspec.convert(body, kind)
    except msgspec.ValidationError as error:
        raise refusal(error, kind) from error
