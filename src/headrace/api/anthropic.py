"""POST /v1/messages and /v1/messages/count_tokens, as Anthropic's API has them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import Meta

from headrace.api import dialect_fields, fields, limits
from headrace.api.anthropic_answer import MessageEncoder, MessageHead, whole
from headrace.api.exchange import Call, Exchange, Service
from headrace.api.fields import Body, Peers
from headrace.api.limits import ApiSettings
from headrace.api.messages import (
    CalledFunction,
    CallId,
    Function,
    ToolName,
    to_call,
    tools_of,
)
from headrace.api.stream import send_stream
from headrace.api.turns import Turns, leave_out
from headrace.api.wire import (
    Count,
    KeepAlive,
    ModelName,
    StopText,
    answer_fields,
    envelope,
    scalars,
)
from headrace.core import events
from headrace.core.constraint import Constraint
from headrace.core.errors import InvalidRequest, Unsupported
from headrace.core.request import CountRequest, GenerateRequest, Message
from headrace.core.sampling import MaxTokens, Sampling, SamplingFields
from headrace.core.stream import collect, result
from headrace.core.tools import Thinking, Tool, ToolChoice

# Changes with each request of Claude Code, so that no prompt would have a prefix in a cache.
_BILLING = "x-anthropic-billing-header:"
# Blocks of tools that Anthropic runs, in the history of a conversation that began there.
_OF_OTHERS = re.compile(
    r"redacted_thinking|server_tool_use|mcp_tool_\w+|\w+_tool_result|compaction"
)
_HOSTED = re.compile(
    r"(web_search|web_fetch|bash|text_editor|computer|code_execution|memory|tool_search_tool\w*"
    r"|advisor)_\d{8}|mcp_toolset|tool_search_tool_(bm25|regex)"
)


class Block(Body, frozen=True):
    """A part of a message: text, thinking, a call of a tool, or its result."""

    type: str
    text: str | None = None
    thinking: str | None = None
    id: CallId | None = None
    name: ToolName | None = None
    input: dict[str, Any] | None = None
    tool_use_id: CallId | None = None
    tool_name: str | None = None
    content: str | list[Block] | None = None
    is_error: bool | None = None
    title: str | None = None

    peers: ClassVar[Peers] = dialect_fields.BLOCK


class MessagesTurn(Body, frozen=True):
    """One turn of a conversation. If the last one is the assistant's, the answer continues it."""

    role: Literal["user", "assistant", "system"]
    content: str | list[Block]

    peers: ClassVar[Peers] = fields.MESSAGE


class MessagesTool(Body, frozen=True):
    """A tool of the client; one with another `type` than custom is run by Anthropic."""

    name: ToolName | None = None
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    type: str | None = None
    strict: bool | None = None

    peers: ClassVar[Peers] = dialect_fields.MESSAGES_TOOL


class MessagesChoice(Body, frozen=True):
    """Whether the model calls tools, and which."""

    type: Literal["auto", "any", "tool", "none"]
    name: ToolName | None = None
    disable_parallel_tool_use: bool | None = None


class MessagesThinking(Body, frozen=True):
    """Thinking, which is off if this is absent; `omitted` does not send it."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Count | None = None
    display: Literal["summarized", "omitted"] | None = None


class OutputFormat(Body, frozen=True):
    """The JSON schema of the answer."""

    type: Literal["json_schema"]
    schema: dict[str, Any]


class OutputConfig(Body, frozen=True):
    """How much is thought, and the format of the answer."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None

    peers: ClassVar[Peers] = dialect_fields.OUTPUT_CONFIG


class CountTokensRequest(SamplingFields, Body, frozen=True, kw_only=True):
    """Anthropic's request to count the tokens of a conversation.

    Sampling parameters are accepted, as in the request of a message, and have no effect.
    """

    # OpenAI's seed is a signed 64-bit integer; core also takes unsigned ones.
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None

    model: ModelName | None = None
    messages: Annotated[list[MessagesTurn], Meta(min_length=1, max_length=limits.MAX_MESSAGES)]
    system: str | list[Block] | None = None
    tools: Annotated[list[MessagesTool], Meta(max_length=limits.MAX_TOOLS)] | None = None
    tool_choice: MessagesChoice | None = None
    thinking: MessagesThinking | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None
    mcp_servers: list[Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    peers: ClassVar[Peers] = dialect_fields.COUNT_TOKENS


class MessagesRequest(CountTokensRequest, frozen=True, kw_only=True):
    """Anthropic's request of a message, with common extensions.

    `max_tokens` is cut to what the context has left.
    """

    max_tokens: MaxTokens  # pyright: ignore[reportGeneralTypeIssues]  # required here
    stop_sequences: Annotated[list[StopText], Meta(max_length=limits.MAX_STOP)] | None = None
    stream: bool | None = None
    context_length: Count | None = None
    keep_alive: KeepAlive | None = None

    peers: ClassVar[Peers] = dialect_fields.MESSAGES


class MessageTokens(msgspec.Struct, frozen=True):
    """The number of tokens of a conversation."""

    input_tokens: int


_DECODER = msgspec.json.Decoder(MessagesRequest)
_COUNT_DECODER = msgspec.json.Decoder(CountTokensRequest)
_NAMES = {
    "stop": "stop_sequences",
    "response_format": "output_config.format",
    "template_options": "chat_template_kwargs",
}


async def create_message(service: Service, exchange: Exchange) -> None:
    """Answer a conversation with blocks, streamed or whole."""
    wire = await exchange.read(_DECODER)
    call = exchange.call
    call.names = _NAMES
    stream = service.backend.ask(to_request(wire, exchange.settings, call))
    thinking = wire.thinking
    shows = thinking is not None and thinking.type != "disabled" and thinking.display != "omitted"
    head = MessageHead(
        f"msg_{call.id}", service.model_name(wire.model), wire.stop_sequences or (), shows
    )
    if wire.stream:
        await exchange.unless_gone(send_stream(exchange, stream, MessageEncoder(head)))
        return
    answer = await exchange.unless_gone(collect(stream))
    await exchange.answer(whole(head, answer), answer.metrics)


async def count_tokens(service: Service, exchange: Exchange) -> None:
    """Count the tokens of a conversation with blocks."""
    wire = await exchange.read(_COUNT_DECODER)
    exchange.call.names = _NAMES
    # Checked as for an answer, which takes the same body.
    Sampling(**scalars(wire))
    request = CountRequest(
        **_conversation(wire, exchange.call),
        **envelope(wire.model, exchange.settings, exchange.call),
    )
    count, _ = await exchange.unless_gone(result(service.backend.ask(request), events.TokenCount))
    await exchange.answer(MessageTokens(count.count))


def to_request(wire: MessagesRequest, settings: ApiSettings, call: Call) -> GenerateRequest:
    """Build the core request.

    Raises:
        InvalidRequest: fields contradict each other, or a value is out of its range.
        Unsupported: the request needs what this server does not have.
    """
    values: dict[str, Any] = scalars(wire) | {"stop": tuple(wire.stop_sequences or ())}
    return GenerateRequest(
        sampling=Sampling(**values),
        fit_max_tokens=True,
        constraint=_constraint(wire),
        context_length=wire.context_length,
        tool_choice=to_choice(wire.tool_choice),
        **_conversation(wire, call),
        **answer_fields(wire, settings, call, stream=bool(wire.stream)),
    )


def to_messages(wire: CountTokensRequest) -> tuple[Message, ...]:
    """Return the turns of a conversation, the system message first.

    System turns before the first answer belong to the system message: templates know one, and a
    model answers what comes last.

    Raises:
        InvalidRequest: a block is not complete, or of an unknown type.
        Unsupported: a block is not text.
    """
    turns = Turns()
    system = wire.system or ""
    if not isinstance(system, str):
        kept = [block for block in system if not (block.text or "").startswith(_BILLING)]
        system = _content(kept, "system")
    if system:
        turns.add(Message("system", system))
    roles = [turn.role for turn in wire.messages]
    answered = roles.index("assistant") if "assistant" in roles else len(roles)
    early = [index for index in range(answered) if roles[index] == "system"]
    for index in (*early, *(index for index in range(len(roles)) if index not in early)):
        turn, place = wire.messages[index], f"messages[{index}].content"
        content = [Block("text", turn.content)] if isinstance(turn.content, str) else turn.content
        if turn.role == "assistant":
            _add_answer(turns, content, place)
        else:
            _add_turn(turns, turn.role, content, place)
    return turns.end()


def to_tools(wire: CountTokensRequest, call: Call) -> tuple[Tool, ...]:
    """Return the tools that the client runs; the others are left out, which `call` notes.

    Raises:
        InvalidRequest: a tool is wrong.
        Unsupported: a tool that is left out would have to be called.
    """
    own: list[tuple[Function, str]] = []
    hosted = ["mcp_servers"] if wire.mcp_servers else []
    for index, tool in enumerate(wire.tools or ()):
        place = f"tools[{index}]"
        if tool.type not in {None, "custom"}:
            hosted.append(_hosted(tool.type or "", place))
        elif tool.name is None:
            raise InvalidRequest(f"{place}.name is missing.", param=f"{place}.name")
        else:
            function = Function(tool.name, tool.description, tool.input_schema, tool.strict)
            own.append((function, place))
    choice = wire.tool_choice.type if wire.tool_choice else "auto"
    only_tools = bool(own) or choice == "none" or hosted == ["mcp_servers"]
    leave_out(call, hosted, kept=only_tools, forced=choice == "any")
    return tools_of(own)


def to_choice(wire: MessagesChoice | None) -> ToolChoice:
    """Return which tools may be called.

    Raises:
        InvalidRequest: the choice names no tool.
    """
    if wire is None:
        return ToolChoice()
    several = not wire.disable_parallel_tool_use
    if wire.type == "tool":
        if wire.name is None:
            raise InvalidRequest("tool_choice.name is missing.", param="tool_choice.name")
        return ToolChoice("required", (wire.name,), parallel=several)
    modes: dict[str, Literal["auto", "required", "none"]] = {"any": "required", "none": "none"}
    return ToolChoice(modes.get(wire.type, "auto"), parallel=several)


def _conversation(wire: CountTokensRequest, call: Call) -> dict[str, Any]:
    """Return the fields of the core that are those of a count too."""
    messages = to_messages(wire)
    last = messages[-1] if messages else Message("user")
    return {
        "messages": messages,
        "continue_final": last.role == "assistant" and bool(last.content) and not last.tool_calls,
        "tools": to_tools(wire, call),
        "thinking": _thinking(wire),
        "template_options": wire.chat_template_kwargs or {},
    }


def _add_answer(turns: Turns, content: Sequence[Block], place: str) -> None:
    for index, block in enumerate(content):
        where = f"{place}[{index}]"
        if block.type == "thinking":
            turns.think(block.thinking or "")
        elif block.type == "tool_use":
            name, call_id = _given(block.name, where, "name"), _given(block.id, where, "id")
            turns.call(to_call(call_id, CalledFunction(name, block.input or {}), where))
        elif not _OF_OTHERS.fullmatch(block.type):
            turns.say(_text(block, where))


def _add_turn(
    turns: Turns, role: Literal["user", "system"], content: Sequence[Block], place: str
) -> None:
    """Add the results of tools, each a turn of its own, and the text after them."""
    texts: list[str] = []
    results = False
    for index, block in enumerate(content):
        where = f"{place}[{index}]"
        if block.type == "tool_result":
            text = _content(block.content, f"{where}.content")
            call_id = _given(block.tool_use_id, where, "tool_use_id")
            turns.answer(call_id, f"Error: {text}" if block.is_error else text)
            results = True
        elif not _OF_OTHERS.fullmatch(block.type):
            texts.append(_text(block, where))
    if texts or not results:
        turns.add(Message(role, "".join(texts)))


def _content(content: str | Sequence[Block] | None, place: str) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(_text(block, f"{place}[{index}]") for index, block in enumerate(content))


def _text(block: Block, place: str) -> str:
    """Return the text of a block.

    Raises:
        Unsupported: it is a picture or a document, or unknown.
    """
    if block.type == "text":
        return block.text or ""
    if block.type == "tool_reference":
        return block.tool_name or ""
    if block.type == "search_result":
        text = _content(block.content, f"{place}.content")
        return f"{block.title or ''}\n{text}\n"
    raise Unsupported(f"{place}: {block.type[:64]!r} is not supported here.", param=place)


def _given(value: str | None, place: str, name: str) -> str:
    if not value:
        raise InvalidRequest(f"{place}.{name} is missing.", param=f"{place}.{name}")
    return value


def _hosted(kind: str, place: str) -> str:
    if _HOSTED.fullmatch(kind):
        return kind
    raise InvalidRequest(f"{place}.type: {kind[:64]!r} is unknown.", param=f"{place}.type")


def _constraint(wire: CountTokensRequest) -> Constraint | None:
    form = wire.output_format or (wire.output_config and wire.output_config.format)
    return Constraint(json_schema=form.schema) if form else None


def _thinking(wire: CountTokensRequest) -> Thinking:
    switch, effort = wire.thinking, wire.output_config and wire.output_config.effort
    if switch is None or switch.type == "disabled":
        return Thinking(enabled=False)
    return Thinking(enabled=True, effort=effort, budget=switch.budget_tokens)
