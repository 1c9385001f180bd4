"""POST /v1/responses and /v1/responses/input_tokens. No response is kept."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Literal

import msgspec
from msgspec.structs import replace

from headrace.api.custom_tools import CustomGrammar, check_format, custom_tool
from headrace.api.dialect_fields import STATELESS
from headrace.api.exchange import Call, Exchange, Service
from headrace.api.images import ImageReader, body_limit, held
from headrace.api.limits import ApiSettings
from headrace.api.messages import (
    CalledFunction,
    Function,
    to_call,
    tools_of,
)
from headrace.api.parts import check_role, data_url
from headrace.api.problems import Problem, Refused
from headrace.api.responses_answer import ResponseEncoder, Settings, unseal, whole
from headrace.api.responses_body import ResponseBody
from headrace.api.responses_request import (
    FreeFormat,
    InputItem,
    InputPart,
    Reasoning,
    ResponseChoice,
    ResponsesRequest,
    ResponseTool,
    TextFields,
    TextFormat,
)
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
from headrace.core.media import Content, Part, content_of, text_of
from headrace.core.request import CountRequest, GenerateRequest, Message, Role
from headrace.core.sampling import Sampling
from headrace.core.stream import collect, result
from headrace.core.tools import Thinking, Tool, ToolChoice

_OF_OTHERS = re.compile(
    r"(local_shell|shell|apply_patch|web_search|file_search|computer|code_interpreter"
    r"|image_generation|mcp|tool_search)_(call|output|call_output|list_tools)"
)
_HOSTED = re.compile(
    r"(web_search|web_search_preview)(_\d{4}_\d\d_\d\d)?|file_search|code_interpreter|computer"
    r"|computer_use_preview|mcp|image_generation|local_shell|shell|apply_patch|tool_search"
    r"|programmatic_tool_calling|namespace"
)


class InputTokens(msgspec.Struct, frozen=True):
    """The number of tokens of an input."""

    input_tokens: int
    object: Literal["response.input_tokens"] = "response.input_tokens"


_DECODER = msgspec.json.Decoder(ResponsesRequest)


async def responses(service: Service, exchange: Exchange) -> None:
    """Answer a conversation with items, streamed or whole."""
    wire, call = await _read(service, exchange), exchange.call
    async with held(exchange, image_urls(wire)) as translation:
        request = await translation.run(partial(to_request, wire, exchange.settings, call))
        # The texts are not kept while the answer runs.
        await _answer(service, exchange, replace(wire, input=None), request)


async def _read(service: Service, exchange: Exchange) -> ResponsesRequest:
    """Read a request. One that continues a response gets OpenAI's error for one that is not kept.

    Clients that know this error send all items then.
    """
    wire = await exchange.read(_DECODER, body_limit(service, exchange.settings))
    exchange.call.names = wire.names()
    if wire.previous_response_id is None:
        return wire
    name = "previous_response_id"
    message = f"{name}: no such response is kept. {STATELESS}."
    raise Refused(
        Problem(status=400, message=message, param=name, code="previous_response_not_found")
    )


async def _answer(
    service: Service, exchange: Exchange, wire: ResponsesRequest, request: GenerateRequest
) -> None:
    call = exchange.call
    stream = service.ask(request, call)
    head = _head(wire, service, call)
    custom = [tool.name for tool in wire.tools or () if tool.type == "custom" and tool.name]
    seals = "reasoning.encrypted_content" in (wire.include or ())
    settings = Settings(frozenset(custom), seals)
    if wire.stream:
        encoder = ResponseEncoder(head, call.id, settings)
        await exchange.unless_gone(send_stream(exchange, stream, encoder))
        return
    answer = await exchange.unless_gone(collect(stream))
    await exchange.answer(whole(head, answer, call.id, settings), answer.metrics)


async def input_tokens(service: Service, exchange: Exchange) -> None:
    """Count the tokens of a conversation with items."""
    wire = await _read(service, exchange)
    # Checked as for an answer, which takes the same body.
    Sampling(**scalars(wire))
    async with held(exchange, image_urls(wire)) as translation:
        messages = await translation.run(partial(to_messages, wire))
    request = CountRequest(
        messages=messages,
        tools=to_tools(wire, exchange.call),
        thinking=_thinking(wire),
        template_options=wire.chat_template_kwargs or {},
        **envelope(wire.model, exchange.settings, exchange.call),
    )
    count, _ = await exchange.unless_gone(result(service.backend.ask(request), events.TokenCount))
    await exchange.answer(InputTokens(count.count))


def to_request(
    wire: ResponsesRequest, settings: ApiSettings, call: Call, reader: ImageReader
) -> GenerateRequest:
    """Build the core request.

    Raises:
        InvalidRequest: fields contradict each other, or a value is out of its range.
        Unsupported: the request needs what this server does not have.
    """
    most, other = wire.max_output_tokens, wire.max_tokens
    if most is not None and other not in {None, most}:
        raise InvalidRequest("max_tokens and max_output_tokens differ.", param="max_tokens")
    logprobs = wire.top_logprobs
    if logprobs is None and "message.output_text.logprobs" in (wire.include or ()):
        logprobs = 0
    values: dict[str, Any] = scalars(wire) | {"logprobs": logprobs}
    values["max_tokens"] = other if most is None else most
    return GenerateRequest(
        messages=to_messages(wire, reader),
        media=reader.pictures.data,
        sampling=Sampling(**values),
        fit_max_tokens=True,
        constraint=_constraint(wire.text and wire.text.format),
        context_length=wire.context_length,
        template_options=wire.chat_template_kwargs or {},
        tools=to_tools(wire, call),
        tool_choice=to_choice(wire),
        thinking=_thinking(wire),
        **answer_fields(wire, settings, call, stream=bool(wire.stream)),
    )


def image_urls(wire: ResponsesRequest) -> Iterator[tuple[str, str]]:
    """Yield the URL of each image and sound, with its place."""
    for index, item in enumerate(wire.input if isinstance(wire.input, list) else ()):
        for name, parts in (("content", item.content), ("output", item.output)):
            for number, part in enumerate(parts if isinstance(parts, list) else ()):
                place = f"input[{index}].{name}[{number}]"
                if part.type == "input_image" and part.image_url:
                    yield part.image_url, place
                elif part.type == "input_audio" and part.input_audio is not None:
                    yield data_url(part.input_audio.data), place


def to_messages(wire: ResponsesRequest, reader: ImageReader) -> tuple[Message, ...]:
    """Return the turns of a conversation; the instructions come first.

    Raises:
        InvalidRequest: an item is not complete, or of an unknown type; there is none; an image is
            damaged.
        Unsupported: an item is kept by OpenAI, or is neither text nor an image.
    """
    turns = Turns()
    if wire.instructions:
        turns.add(Message("system", wire.instructions))
    if isinstance(wire.input, str):
        turns.add(Message("user", wire.input))
    for index, item in enumerate(wire.input or () if not isinstance(wire.input, str) else ()):
        _add(turns, item, f"input[{index}]", reader)
    if not (messages := turns.end()):
        raise InvalidRequest("input is missing.", param="input")
    return messages


def to_tools(wire: ResponsesRequest, call: Call) -> tuple[Tool, ...]:
    """Return the tools that the client runs; the others are left out, which `call` notes.

    Raises:
        InvalidRequest: a tool is wrong.
        Unsupported: a tool that is left out would have to be called.
    """
    tools = [(tool, f"tools[{index}]") for index, tool in enumerate(wire.tools or ())]
    own = [(_function(tool, place), place) for tool, place in tools if not _is_hosted(tool, place)]
    hosted = [tool.type for tool, place in tools if _is_hosted(tool, place)]
    choice = wire.tool_choice
    leave_out(call, hosted, kept=bool(own) or choice == "none", forced=choice == "required")
    return tools_of(own)


def to_choice(wire: ResponsesRequest) -> ToolChoice:
    """Return which tools may be called.

    Raises:
        InvalidRequest: the choice names no tool.
        Unsupported: it is a tool of the provider.
    """
    choice, several = wire.tool_choice, wire.parallel_tool_calls is not False
    if choice is None or isinstance(choice, str):
        return ToolChoice(mode=choice or "auto", parallel=several)
    if choice.type in {"function", "custom"} and choice.name:
        return ToolChoice("required", (choice.name,), parallel=False)
    if choice.type == "allowed_tools" and choice.mode and choice.tools:
        own = [tool.name for tool in choice.tools if tool.type in {"function", "custom"}]
        names = [name for name in own if name]
        if len(names) == len(choice.tools):
            return ToolChoice(choice.mode, tuple(names), parallel=several)
    elif not _HOSTED.fullmatch(choice.type):
        raise InvalidRequest("tool_choice is not complete.", param="tool_choice")
    raise Unsupported("A tool that the provider runs cannot be chosen here.", param="tool_choice")


def _add(turns: Turns, item: InputItem, place: str, reader: ImageReader) -> None:
    if item.type == "message":
        _add_message(turns, item, place, reader)
    elif item.type == "reasoning":
        sealed = unseal(item.encrypted_content or "")
        thought = text_of(_content(item.content, "assistant", f"{place}.content", reader))
        turns.think(thought or sealed)
    elif item.type == "function_call":
        function = CalledFunction(_given(item, "name", place), item.arguments or "")
        turns.call(to_call(_given(item, "call_id", place), function, place))
    elif item.type == "custom_tool_call":
        arguments: dict[str, Any] = {"input": item.input or ""}
        function = CalledFunction(_given(item, "name", place), arguments)
        turns.call(to_call(_given(item, "call_id", place), function, place))
    elif item.type in {"function_call_output", "custom_tool_call_output"}:
        call_id, where = _given(item, "call_id", place), f"{place}.output"
        turns.answer(call_id, _content(item.output, "tool", where, reader))
    elif item.type == "item_reference":
        message = "This server keeps no items: send the item itself."
        raise Unsupported(message, param=place)
    elif not _OF_OTHERS.fullmatch(item.type):
        raise InvalidRequest(f"{place}.type: {item.type[:64]!r} is unknown.", param=f"{place}.type")


def _add_message(turns: Turns, item: InputItem, place: str, reader: ImageReader) -> None:
    if item.role is None or item.role == "tool":
        raise InvalidRequest(f"{place}.role is missing or unknown.", param=f"{place}.role")
    if item.content is None:
        raise InvalidRequest(f"{place}.content is missing.", param=f"{place}.content")
    content = _content(item.content, item.role, f"{place}.content", reader)
    if item.role == "assistant":
        turns.say(text_of(content))
    else:
        turns.add(Message(item.role, content))


def _content(
    content: str | Sequence[InputPart] | None, role: Role, place: str, reader: ImageReader
) -> Content:
    if content is None or isinstance(content, str):
        return content or ""
    places = ((part, f"{place}[{index}]") for index, part in enumerate(content))
    return content_of([_part(part, role, where, reader) for part, where in places])


def _part(part: InputPart, role: Role, place: str, reader: ImageReader) -> Part:
    if part.type not in ("input_image", "input_audio"):
        return _text(part, place)
    check_role(role, place)
    if part.type == "input_audio":
        return _audio(part, place, reader)
    if part.image_url is None and part.file_id is not None:
        message = f"{place}: This server keeps no files: send the image in image_url."
        raise Unsupported(message, param=place)
    if not part.image_url:
        raise InvalidRequest(f"{place}.image_url is missing.", param=place)
    return reader.read(part.image_url, place)


def _audio(part: InputPart, place: str, reader: ImageReader) -> Part:
    if part.input_audio is None:
        raise InvalidRequest(f"{place}.input_audio is missing.", param=place)
    return reader.read_audio(data_url(part.input_audio.data), place)


def _text(part: InputPart, place: str) -> str:
    if part.text is None and part.refusal is None:
        raise Unsupported(f"{place}: {part.type[:64]!r} is not supported here.", param=place)
    return part.text or part.refusal or ""


def _given(item: InputItem, name: Literal["name", "call_id"], place: str) -> str:
    value: str | None = getattr(item, name)
    if not value:
        raise InvalidRequest(f"{place}.{name} is missing.", param=f"{place}.{name}")
    return value


def _is_hosted(tool: ResponseTool, place: str) -> bool:
    if tool.type in {"function", "custom"}:
        return False
    if _HOSTED.fullmatch(tool.type):
        return True
    raise InvalidRequest(f"{place}.type: {tool.type[:64]!r} is unknown.", param=f"{place}.type")


def _function(tool: ResponseTool, place: str) -> Function | Tool:
    if not tool.name:
        raise InvalidRequest(f"{place}.name is missing.", param=f"{place}.name")
    if tool.type == "function":
        return Function(tool.name, tool.description, tool.parameters, tool.strict)
    form, where, grammar = tool.format or FreeFormat("text"), f"{place}.format.definition", None
    if form.syntax is not None and form.definition is not None:
        grammar = CustomGrammar(form.syntax, form.definition)
    check_format(form.type, where, has_grammar=grammar is not None)
    return custom_tool(tool.name, tool.description, grammar, where)


def _constraint(form: TextFormat | None) -> Constraint | None:
    if form is None or form.type == "text":
        return None
    if form.type == "json_object":
        return Constraint(json_schema={"type": "object"})
    if form.schema is None:
        raise InvalidRequest("text.format.schema is missing.", param="text.format.schema")
    return Constraint(json_schema=form.schema)


def _thinking(wire: ResponsesRequest) -> Thinking:
    effort = wire.reasoning.effort if wire.reasoning else None
    if effort is None:
        return Thinking()
    return Thinking(enabled=effort != "none", effort=None if effort == "none" else effort)


def _head(wire: ResponsesRequest, service: Service, call: Call) -> ResponseBody:
    """Return the response at its beginning, with what it repeats of the request."""
    text = wire.text or TextFields()
    form = {"name": "answer", **_plain(text.format)} if text.format else {"type": "text"}
    choice, effort = wire.tool_choice, wire.reasoning or Reasoning()
    return ResponseBody(
        id=f"resp_{call.id}",
        created_at=int(time.time()),
        model=service.model_name(wire.model),
        instructions=wire.instructions,
        max_output_tokens=wire.max_output_tokens or wire.max_tokens,
        max_tool_calls=wire.max_tool_calls,
        parallel_tool_calls=wire.parallel_tool_calls is not False,
        reasoning={"effort": effort.effort, "summary": effort.summary},
        temperature=wire.temperature,
        top_p=wire.top_p,
        presence_penalty=wire.presence_penalty or 0.0,
        frequency_penalty=wire.frequency_penalty or 0.0,
        text=_plain(text) | {"format": form},
        tool_choice=_plain(choice) if isinstance(choice, ResponseChoice) else choice or "auto",
        tools=[_plain(tool) for tool in wire.tools or () if not _HOSTED.fullmatch(tool.type)],
        top_logprobs=wire.top_logprobs or 0,
        user=wire.user,
        metadata=wire.metadata or {},
        safety_identifier=wire.safety_identifier,
        prompt_cache_key=wire.prompt_cache_key,
    )


def _plain(value: msgspec.Struct) -> dict[str, Any]:
    plain: dict[str, Any] = msgspec.to_builtins(value)
    return plain
