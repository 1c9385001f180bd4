"""Conversations on the wire: messages and tools; and their translation to the core."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated, Any, ClassVar, Literal, Protocol

import msgspec
from msgspec import Meta

from headrace.api import fields, limits, parts
from headrace.api.custom_tools import CustomCall, CustomTool, ToolName, to_tool
from headrace.api.fields import Body, Peers
from headrace.api.images import ImageReader
from headrace.api.parts import ContentPart
from headrace.core.errors import InvalidRequest
from headrace.core.events import ToolCall
from headrace.core.media import Content
from headrace.core.request import Message, Role
from headrace.core.tools import Tool, ToolChoice

CallId = Annotated[str, Meta(max_length=256)]

TEMPLATE_NAMES = {
    "continue_final": "continue_final_message",
    "template_options": "chat_template_kwargs",
}
"""The client's names for fields of the core."""

_EMPTY_ARGUMENTS = "{}"


class CalledFunction(Body, frozen=True):
    """The function of a call; `arguments` is the text of a JSON object."""

    name: ToolName
    arguments: str | dict[str, Any] = _EMPTY_ARGUMENTS


class WireToolCall(Body, frozen=True):
    """A call in an assistant's turn."""

    function: CalledFunction | None = None
    custom: CustomCall | None = None
    id: CallId = ""
    type: Literal["function", "custom"] = "function"

    peers: ClassVar[Peers] = fields.TOOL_CALL


class ChatMessage(Body, frozen=True):
    """One turn of a conversation.

    An assistant's turn can have `tool_calls` and no content; `reasoning_content` (also
    `reasoning`) is the thinking before it. A tool's turn answers the call with its id.
    """

    role: Role | Literal["function"]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: Annotated[list[WireToolCall], Meta(max_length=limits.MAX_TOOLS)] | None = None
    tool_call_id: CallId | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    refusal: str | None = None

    peers: ClassVar[Peers] = fields.MESSAGE


Messages = Annotated[list[ChatMessage], Meta(min_length=1, max_length=limits.MAX_MESSAGES)]


class Function(Body, frozen=True):
    """A function that the model may call; `parameters` is the JSON schema of its arguments."""

    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class WireTool(Body, frozen=True):
    """A function, or a custom tool."""

    type: Literal["function", "custom"]
    function: Function | None = None
    custom: CustomTool | None = None

    peers: ClassVar[Peers] = fields.TOOL


Tools = Annotated[list[WireTool], Meta(max_length=limits.MAX_TOOLS)]


class FunctionName(Body, frozen=True):
    """The name of a tool's function."""

    name: ToolName


class ToolReference(Body, frozen=True):
    """A tool, by name."""

    function: FunctionName | None = None
    custom: FunctionName | None = None
    type: Literal["function", "custom"] = "function"


class AllowedTools(Body, frozen=True):
    """Some of the tools, of which the model may (`auto`) or must (`required`) call one."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[ToolReference], Meta(min_length=1, max_length=limits.MAX_TOOLS)]


class NamedChoice(Body, frozen=True):
    """One tool that the model must call, or the tools that it may call."""

    type: Literal["function", "custom", "allowed_tools"]
    function: FunctionName | None = None
    custom: FunctionName | None = None
    allowed_tools: AllowedTools | None = None


WireChoice = Literal["none", "auto", "required"] | NamedChoice


class Templated(Protocol):
    """A request on the wire whose messages go through a template."""

    @property
    def chat_template_kwargs(self) -> dict[str, Any] | None:
        """Variables of the template."""
        ...

    @property
    def add_generation_prompt(self) -> bool | None:
        """Whether the model's turn is begun after the messages."""
        ...

    @property
    def continue_final_message(self) -> bool | None:
        """Whether the last message, an assistant's, is continued."""
        ...


def image_urls(wire: Sequence[ChatMessage]) -> list[tuple[str, str]]:
    """Return the URLs of the images and sounds, each with its place."""
    return [
        url
        for index, message in enumerate(wire)
        if isinstance(message.content, list)
        for url in parts.image_urls(message.content, f"messages[{index}]")
    ]


def to_template(wire: Templated) -> dict[str, Any]:
    """Return the fields of a core request.

    Raises:
        InvalidRequest: the last message is to be continued, and another to be begun.
    """
    options, begins = wire.chat_template_kwargs or {}, wire.add_generation_prompt
    if wire.continue_final_message and (begins or options.get("add_generation_prompt")):
        raise InvalidRequest(
            "continue_final_message needs add_generation_prompt to be false.",
            param="add_generation_prompt",
        )
    if begins is False:
        options = {**options, "add_generation_prompt": False}
    return {
        "template_options": options,
        "continue_final": bool(wire.continue_final_message),
    }


def to_messages(
    wire: Sequence[ChatMessage], first: int = 0, *, reader: ImageReader | None = None
) -> tuple[Message, ...]:
    """Return the turns of a conversation, each with its texts joined where there is nothing else.

    `first` is the number of the first in errors. `reader` has the images and sounds afterwards.

    Raises:
        InvalidRequest: a turn has no content where its role needs it, or its media are damaged.
        Unsupported: a part is neither text, nor an image or a sound.
    """
    reader = reader or ImageReader()
    turns: list[Message] = []
    names: dict[str, str] = {}
    for index, message in enumerate(wire, first):
        place = f"messages[{index}]"
        content: Content = message.refusal or ""
        if isinstance(message.content, str):
            content = message.content or content
        elif message.content is not None:
            role = message.role
            content = parts.to_content(message.content, role, place, reader)
        turn = _turn(message, content, place, names)
        names |= {call.id: call.name for call in turn.tool_calls}
        turns.append(turn)
    return tuple(turns)


def to_tools(wire: Sequence[WireTool] | None) -> tuple[Tool, ...]:
    """Return the tools.

    Raises:
        InvalidRequest: two have the same name, or a schema is not that of an object.
    """
    return tools_of(_wired(tool, f"tools[{index}]") for index, tool in enumerate(wire or ()))


def custom_names(wire: Sequence[WireTool] | None) -> frozenset[str]:
    """Return the names of the custom tools."""
    return frozenset(tool.custom.name for tool in wire or () if tool.custom is not None)


def tools_of(functions: Iterable[tuple[Function | Tool, str]]) -> tuple[Tool, ...]:
    """Return functions, each with its place in the request, as tools; raises as `to_tools`."""
    tools = tuple(_tool(function, place) for function, place in functions)
    names = [tool.name for tool in tools]
    if len(set(names)) < len(names):
        raise InvalidRequest("Two tools have the same name.", param="tools")
    return tools


def to_choice(wire: WireChoice | None, *, parallel: bool | None) -> ToolChoice:
    """Return which tools may be called.

    Raises:
        InvalidRequest: the choice names no tool.
    """
    several = parallel is not False
    if wire is None or isinstance(wire, str):
        return ToolChoice(mode=wire or "auto", parallel=several)
    if (named := wire.custom if wire.type == "custom" else wire.function) is not None:
        return ToolChoice("required", (named.name,), parallel=False)
    if wire.type == "allowed_tools" and (allowed := wire.allowed_tools) is not None:
        names = tuple(
            named.name for tool in allowed.tools if (named := tool.function or tool.custom)
        )
        if len(names) == len(allowed.tools):
            return ToolChoice(allowed.mode, names, parallel=several)
    raise InvalidRequest(f"{wire.type} is missing.", param=f"tool_choice.{wire.type}")


def _turn(message: ChatMessage, content: Content, place: str, names: dict[str, str]) -> Message:
    role: Role = "tool" if message.role == "function" else message.role
    calls = tuple(
        _called(call, f"{place}.tool_calls[{i}]") for i, call in enumerate(message.tool_calls or ())
    )
    if calls and role != "assistant":
        raise InvalidRequest("Only an assistant's turn has calls.", param=f"{place}.tool_calls")
    if message.content is None and role != "assistant":
        raise InvalidRequest(f"{place}.content is missing.", param=f"{place}.content")
    return Message(
        role,
        content,
        message.name or names.get(message.tool_call_id or ""),
        tool_calls=calls,
        tool_call_id=message.tool_call_id if role == "tool" else None,
        reasoning=message.reasoning_content or message.reasoning or "",
    )


def _called(call: WireToolCall, place: str) -> ToolCall:
    if call.custom is not None:
        arguments: dict[str, Any] = {"input": call.custom.input}
        return to_call(call.id, CalledFunction(call.custom.name, arguments), f"{place}.custom")
    if call.function is None:
        where = f"{place}.{call.type}"
        raise InvalidRequest(f"{where}: This field is required.", param=where)
    return to_call(call.id, call.function, f"{place}.function")


def to_call(identity: str, function: CalledFunction, place: str) -> ToolCall:
    """Return a call of an earlier answer.

    Raises:
        InvalidRequest: its arguments are not those of a function.
    """
    arguments = function.arguments
    text = arguments if isinstance(arguments, str) else msgspec.json.encode(arguments).decode()
    limits.check_depth(text.encode(), f"{place}.arguments")
    try:
        is_object = isinstance(msgspec.json.decode(text or _EMPTY_ARGUMENTS), dict)
    except msgspec.DecodeError:
        is_object = False
    if not is_object:
        raise InvalidRequest(
            "arguments is not the text of a JSON object.", param=f"{place}.arguments"
        )
    return ToolCall(identity, function.name, text or _EMPTY_ARGUMENTS)


def _wired(tool: WireTool, place: str) -> tuple[Function | Tool, str]:
    """Return a tool of chat completions, with its place."""
    where = f"{place}.{tool.type}"
    if tool.type == "function" and tool.function is not None:
        return tool.function, where
    if tool.type == "function" or (custom := tool.custom) is None:
        raise InvalidRequest(f"{where} is missing.", param=where)
    return to_tool(custom, where), where


def _tool(function: Function | Tool, place: str) -> Tool:
    if isinstance(function, Tool):
        return function
    schema = function.parameters
    if schema and schema.get("type", "object") != "object":
        raise InvalidRequest("parameters is the schema of an object.", param=f"{place}.parameters")
    return Tool(function.name, function.description, schema or None, strict=bool(function.strict))
