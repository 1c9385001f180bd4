"""POST /v1/messages and /v1/messages/count_tokens, as Anthropic's API has them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Literal

import msgspec
from msgspec.structs import replace

from headrace.api.anthropic_answer import MessageEncoder, MessageHead, whole
from headrace.api.anthropic_request import (
    Block,
    CountTokensRequest,
    ImageSource,
    MessagesChoice,
    MessagesRequest,
    MessagesTurn,
)
from headrace.api.exchange import Call, Exchange, Service
from headrace.api.images import ImageReader, body_limit, held
from headrace.api.limits import ApiSettings
from headrace.api.messages import (
    CalledFunction,
    Function,
    to_call,
    tools_of,
)
from headrace.api.parts import check_role
from headrace.api.stream import send_stream
from headrace.api.turns import Turns, leave_out
from headrace.api.wire import (
    answer_fields,
    envelope,
    scalars,
)
from headrace.core import events
from headrace.core.constraint import Constraint
from headrace.core.errors import InvalidRequest, Unsupported
from headrace.core.media import Content, Part, content_of
from headrace.core.request import CountRequest, GenerateRequest, Message, Role
from headrace.core.sampling import Sampling
from headrace.core.stream import collect, result, without_thinking
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
    wire = await exchange.read(_DECODER, body_limit(service, exchange.settings))
    call = exchange.call
    call.names = _NAMES
    async with held(exchange, image_urls(wire.messages), _encoded(wire.messages)) as translation:
        request = await translation.run(partial(to_request, wire, exchange.settings, call))
        # The texts are not kept while the answer runs.
        await _answer(service, exchange, replace(wire, messages=[]), request)


async def _answer(
    service: Service, exchange: Exchange, wire: MessagesRequest, request: GenerateRequest
) -> None:
    stream = service.ask(request, exchange.call)
    thinking = wire.thinking
    shows = thinking is not None and thinking.type != "disabled" and thinking.display != "omitted"
    if not shows:
        stream = without_thinking(stream)
    stops = wire.stop_sequences or ()
    head = MessageHead(f"msg_{exchange.call.id}", service.model_name(wire.model), stops)
    if wire.stream:
        await exchange.unless_gone(send_stream(exchange, stream, MessageEncoder(head)))
        return
    answer = await exchange.unless_gone(collect(stream))
    await exchange.answer(whole(head, answer), answer.metrics)


async def count_tokens(service: Service, exchange: Exchange) -> None:
    """Count the tokens of a conversation with blocks."""
    wire = await exchange.read(_COUNT_DECODER, body_limit(service, exchange.settings))
    exchange.call.names = _NAMES
    # Checked as for an answer, which takes the same body.
    Sampling(**scalars(wire))
    async with held(exchange, image_urls(wire.messages), _encoded(wire.messages)) as translation:
        conversation = await translation.run(partial(_conversation, wire, exchange.call))
    request = CountRequest(
        **conversation,
        **envelope(wire.model, exchange.settings, exchange.call),
    )
    count, _ = await exchange.unless_gone(result(service.backend.ask(request), events.TokenCount))
    await exchange.answer(MessageTokens(count.count))


def to_request(
    wire: MessagesRequest, settings: ApiSettings, call: Call, reader: ImageReader
) -> GenerateRequest:
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
        **_conversation(wire, call, reader),
        media=reader.pictures.data,
        **answer_fields(wire, settings, call, stream=bool(wire.stream)),
    )


def image_urls(turns: Sequence[MessagesTurn]) -> Iterator[tuple[str, str]]:
    """Yield the URL of each image that is sent by one, with its place."""
    for source, place in _sources(turns):
        if source.type == "url" and source.url:
            yield source.url, place


def to_messages(wire: CountTokensRequest, reader: ImageReader) -> tuple[Message, ...]:
    """Return the turns of a conversation, the system message first.

    System turns before the first answer belong to the system message: templates know one, and a
    model answers what comes last.

    Raises:
        InvalidRequest: a block is not complete, or of an unknown type; an image is damaged.
        Unsupported: a block is neither text nor an image.
    """
    turns = Turns()
    system = wire.system or ""
    if not isinstance(system, str):
        kept = [block for block in system if not (block.text or "").startswith(_BILLING)]
        system = _content(kept, "system", "system", reader)
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
            _add_turn(turns, Message(turn.role), content, place, reader)
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


def _encoded(turns: Sequence[MessagesTurn]) -> int:
    """Return the size of the images that are sent in base64."""
    return sum(len(source.data or "") for source, _ in _sources(turns))


def _sources(turns: Sequence[MessagesTurn]) -> Iterator[tuple[ImageSource, str]]:
    """Yield the source of each image, with its place."""
    blocks = [
        (block, f"messages[{index}].content[{number}]")
        for index, turn in enumerate(turns)
        for number, block in enumerate(turn.content if isinstance(turn.content, list) else ())
    ]
    for block, place in blocks:
        inner = block.content if isinstance(block.content, list) else ()
        within = ((part, f"{place}.content[{number}]") for number, part in enumerate(inner))
        for part, where in ((block, place), *within):
            if part.type == "image" and isinstance(part.source, ImageSource):
                yield part.source, where


def _conversation(wire: CountTokensRequest, call: Call, reader: ImageReader) -> dict[str, Any]:
    """Return the fields of the core that are those of a count too."""
    messages = to_messages(wire, reader)
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
    turns: Turns, turn: Message, content: Sequence[Block], place: str, reader: ImageReader
) -> None:
    """Add the results of tools, each a turn of its own, and after them `turn` with the others."""
    parts: list[Part] = []
    results = False
    for index, block in enumerate(content):
        where = f"{place}[{index}]"
        if block.type == "tool_result":
            output = _content(block.content, "tool", f"{where}.content", reader)
            call_id = _given(block.tool_use_id, where, "tool_use_id")
            turns.answer(call_id, _failed(output) if block.is_error else output)
            results = True
        elif not _OF_OTHERS.fullmatch(block.type):
            parts.append(_part(block, turn.role, where, reader))
    if parts or not results:
        turns.add(replace(turn, content=content_of(parts)))


def _failed(output: Content) -> Content:
    return f"Error: {output}" if isinstance(output, str) else ("Error: ", *output)


def _content(
    content: str | Sequence[Block] | None, role: Role, place: str, reader: ImageReader
) -> Content:
    if content is None or isinstance(content, str):
        return content or ""
    places = ((block, f"{place}[{index}]") for index, block in enumerate(content))
    return content_of([_part(block, role, where, reader) for block, where in places])


def _part(block: Block, role: Role, place: str, reader: ImageReader) -> Part:
    if block.type != "image":
        return _text(block, place)
    check_role(role, place)
    source = block.source if isinstance(block.source, ImageSource) else ImageSource()
    if source.type == "base64" and source.data:
        return reader.read(f"data:;base64,{source.data}", place)
    if source.type == "url" and source.url:
        return reader.read(source.url, place)
    if source.type == "file":
        message = f"{place}: This server keeps no files: send the image in base64."
        raise Unsupported(message, param=place)
    raise InvalidRequest(
        f"{place}.source is base64 with its data, or url with its url.", param=f"{place}.source"
    )


def _text(block: Block, place: str) -> str:
    """Return the text of a block.

    Raises:
        Unsupported: it is a document, or unknown.
    """
    if block.type == "text":
        return block.text or ""
    if block.type == "tool_reference":
        return block.tool_name or ""
    if block.type == "search_result":
        inner = [] if isinstance(block.content, str) else block.content or []
        texts = [_text(part, f"{place}.content[{index}]") for index, part in enumerate(inner)]
        return f"{block.title or ''}\n{''.join(texts) or block.content or ''}\n"
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
