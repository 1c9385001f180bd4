"""Conversations on the wire: messages, tools, thinking; and their translation to the core."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import Meta

from headrace.api import fields, limits
from headrace.api.fields import Body, Peers
from headrace.api.images import Fetched, read_image
from headrace.api.wire import GenerateFields
from headrace.core.errors import InvalidRequest, Unsupported
from headrace.core.events import ToolCall
from headrace.core.media import Content, Image, Pictures
from headrace.core.request import Message, Role
from headrace.core.tools import Thinking, Tool, ToolChoice

ToolName = Annotated[str, Meta(pattern="^[a-zA-Z0-9_.-]{1,64}$")]
CallId = Annotated[str, Meta(max_length=256)]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]

_EMPTY_ARGUMENTS = "{}"


class ImageUrl(Body, frozen=True):
    """The URL of a picture: `data:image/png;base64,...`, or of a host that is allowed."""

    url: str
    detail: Literal["auto", "low", "high"] | None = None


class ContentPart(Body, frozen=True):
    """A part of a message: text, or a picture. A refusal is text that a model has written.

    Parts of the other types are refused by name.
    """

    type: Literal["text", "refusal", "image_url", "input_audio", "video_url", "file"]
    text: str | None = None
    refusal: str | None = None
    image_url: ImageUrl | str | None = None

    peers: ClassVar[Peers] = fields.PART


class CalledFunction(Body, frozen=True):
    """The function of a call; `arguments` is the text of a JSON object."""

    name: ToolName
    arguments: str | dict[str, Any] = _EMPTY_ARGUMENTS


class WireToolCall(Body, frozen=True):
    """A call in an assistant's turn."""

    function: CalledFunction
    id: CallId = ""
    type: Literal["function"] = "function"

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
    """A tool."""

    type: Literal["function"]
    function: Function

    peers: ClassVar[Peers] = fields.TOOL


Tools = Annotated[list[WireTool], Meta(max_length=limits.MAX_TOOLS)]


class FunctionName(Body, frozen=True):
    """The name of a tool's function."""

    name: ToolName


class ToolReference(Body, frozen=True):
    """A tool, by name."""

    function: FunctionName
    type: Literal["function"] = "function"


class AllowedTools(Body, frozen=True):
    """Some of the tools, of which the model may (`auto`) or must (`required`) call one."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[ToolReference], Meta(min_length=1, max_length=limits.MAX_TOOLS)]


class NamedChoice(Body, frozen=True):
    """One tool that the model must call, or the tools that it may call."""

    type: Literal["function", "allowed_tools"]
    function: FunctionName | None = None
    allowed_tools: AllowedTools | None = None


WireChoice = Literal["none", "auto", "required"] | NamedChoice


class ThinkingSwitch(Body, frozen=True):
    """Thinking as some APIs have it: on or off, and the most tokens of it."""

    type: Literal["enabled", "disabled", "auto", "adaptive"] | None = None
    budget_tokens: Annotated[int, Meta(ge=0)] | None = None


class ReasoningSwitch(Body, frozen=True):
    """Thinking as routers have it."""

    effort: Effort | None = None
    enabled: bool | None = None
    max_tokens: Annotated[int, Meta(ge=0)] | None = None

    peers: ClassVar[Peers] = fields.REASONING


class ThinkingFields(GenerateFields, frozen=True, kw_only=True):
    """The names under which clients control the thinking; all mean one policy."""

    reasoning_effort: Effort | None = None
    reasoning: ReasoningSwitch | None = None
    thinking: ThinkingSwitch | None = None
    think: bool | Effort | None = None
    enable_thinking: bool | None = None
    thinking_token_budget: Annotated[int, Meta(ge=0)] | None = None


def image_urls(wire: Sequence[ChatMessage]) -> list[tuple[str, str]]:
    """Return the URLs of the pictures, each with its place."""
    return [
        (_url(part.image_url), f"messages[{index}].content[{number}]")
        for index, message in enumerate(wire)
        if isinstance(message.content, list)
        for number, part in enumerate(message.content)
        if part.type == "image_url" and part.image_url is not None
    ]


def to_messages(
    wire: Sequence[ChatMessage],
    first: int = 0,
    *,
    pictures: Pictures | None = None,
    fetched: Fetched | None = None,
) -> tuple[Message, ...]:
    """Return the turns of a conversation, each with its texts joined where there are no pictures.

    `first` is the number of the first in errors. The pictures are added to `pictures`; `fetched`
    are those of other hosts.

    Raises:
        InvalidRequest: a turn has no content where its role needs it, an unknown call is
            answered, or a picture is damaged or beyond a bound.
        Unsupported: a part is neither text nor a picture.
    """
    pictures = pictures or Pictures()
    turns: list[Message] = []
    names: dict[str, str] = {}
    for index, message in enumerate(wire, first):
        place = f"messages[{index}]"
        content = _content(message, place, pictures, fetched or {})
        turn = _turn(message, content, place, names)
        names |= {call.id: call.name for call in turn.tool_calls}
        turns.append(turn)
    return tuple(turns)


def to_tools(wire: Sequence[WireTool] | None) -> tuple[Tool, ...]:
    """Return the tools.

    Raises:
        InvalidRequest: two have the same name, or a schema is not that of an object.
    """
    tools = tuple(_tool(tool.function, f"tools[{i}].function") for i, tool in enumerate(wire or ()))
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
    if wire.type == "function" and wire.function is not None:
        return ToolChoice("required", (wire.function.name,), parallel=False)
    if wire.type == "allowed_tools" and (allowed := wire.allowed_tools) is not None:
        names = tuple(tool.function.name for tool in allowed.tools)
        return ToolChoice(allowed.mode, names, parallel=several)
    raise InvalidRequest(f"{wire.type} is missing.", param=f"tool_choice.{wire.type}")


def to_thinking(wire: ThinkingFields) -> Thinking:
    """Return the one policy behind the fields; the first that says something wins."""
    switch, routed = wire.thinking or ThinkingSwitch(), wire.reasoning or ReasoningSwitch()
    think = wire.think
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
    budgets = (wire.thinking_token_budget, switch.budget_tokens, routed.max_tokens)
    return Thinking(
        enabled=enabled,
        effort=None if effort == "none" else effort,
        budget=next((value for value in budgets if value is not None), None),
    )


def _turn(message: ChatMessage, content: Content, place: str, names: dict[str, str]) -> Message:
    role: Role = "tool" if message.role == "function" else message.role
    calls = tuple(_call(call, place, i) for i, call in enumerate(message.tool_calls or ()))
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


def _content(message: ChatMessage, place: str, pictures: Pictures, fetched: Fetched) -> Content:
    if message.content is None or isinstance(message.content, str):
        return message.content or message.refusal or ""
    parts = [
        _part(part, f"{place}.content[{number}]", pictures, fetched)
        for number, part in enumerate(message.content)
    ]
    for number, part in enumerate(parts):
        if isinstance(part, Image) and message.role not in ("user", "tool"):
            raise Unsupported(
                f"Only turns of the user and of tools have images, not of {message.role}.",
                param=f"{place}.content[{number}]",
            )
    texts = [part for part in parts if isinstance(part, str)]
    return "".join(texts) if len(texts) == len(parts) else tuple(parts)


def _part(part: ContentPart, place: str, pictures: Pictures, fetched: Fetched) -> str | Image:
    if part.type in ("text", "refusal"):
        return part.text or part.refusal or ""
    if part.type != "image_url":
        raise Unsupported(f"{place}: {part.type} is not supported here.", param=place)
    if part.image_url is None:
        raise InvalidRequest(f"{place}.image_url is missing.", param=place)
    return read_image(_url(part.image_url), place, pictures, fetched)


def _url(image: ImageUrl | str) -> str:
    return image if isinstance(image, str) else image.url


def _call(call: WireToolCall, place: str, index: int) -> ToolCall:
    arguments = call.function.arguments
    text = arguments if isinstance(arguments, str) else msgspec.json.encode(arguments).decode()
    try:
        is_object = isinstance(msgspec.json.decode(text or _EMPTY_ARGUMENTS), dict)
    except msgspec.DecodeError:
        is_object = False
    if not is_object:
        raise InvalidRequest(
            "arguments is not the text of a JSON object.",
            param=f"{place}.tool_calls[{index}].function.arguments",
        )
    return ToolCall(call.id, call.function.name, text or _EMPTY_ARGUMENTS)


def _tool(function: Function, place: str) -> Tool:
    schema = function.parameters
    if schema and schema.get("type", "object") != "object":
        raise InvalidRequest("parameters is the schema of an object.", param=f"{place}.parameters")
    return Tool(function.name, function.description, schema or None, strict=bool(function.strict))
