"""POST /api/chat and /api/generate: lines of JSON, streamed unless `stream` is false."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple

import msgspec
from msgspec.structs import replace

from headrace.api import fields
from headrace.api.edge import check_admin
from headrace.api.exchange import Exchange, Service
from headrace.api.fields import Peers
from headrace.api.images import ImageReader, body_limit, held
from headrace.api.logprobs import TokenBody, token_bodies
from headrace.api.messages import Tools, to_tools
from headrace.api.ollama.messages import Images, Messages, to_content, to_messages
from headrace.api.ollama.wire import (
    GenerateFields,
    envelope,
    timestamp,
    timings,
    to_constraint,
    to_sampling,
    to_thinking,
)
from headrace.api.problems import OLLAMA, Problem
from headrace.api.stream import encode, send_stream
from headrace.core.errors import Unsupported
from headrace.core.events import (
    Delta,
    Finish,
    Progress,
    PromptTokens,
    TokenCount,
    ToolCall,
    ToolCallDelta,
)
from headrace.core.metrics import InferenceMetrics
from headrace.core.request import CountRequest, GenerateRequest, Message
from headrace.core.stream import collect, result

_NAMES = {
    "max_tokens": "num_predict",
    "repetition_penalty": "repeat_penalty",
    "response_format": "format",
}


class OllamaChatRequest(GenerateFields, frozen=True, kw_only=True):
    """Ollama's chat request; without messages it loads the model, or unloads it."""

    messages: Messages | None = None
    tools: Tools | None = None

    peers: ClassVar[Peers] = fields.OLLAMA_CHAT


class OllamaGenerateRequest(GenerateFields, frozen=True, kw_only=True):
    """Ollama's request for one turn; without a prompt it loads the model, or unloads it.

    The prompt goes through the model's template unless `raw` is true. With a `suffix` the answer is
    what comes between the prompt and it.
    """

    prompt: str | None = None
    images: Images | None = None
    suffix: str | None = None
    system: str | None = None
    raw: bool | None = None

    peers: ClassVar[Peers] = fields.OLLAMA_GENERATE


class Function(msgspec.Struct, frozen=True, kw_only=True):
    """The function of a call, with its arguments as an object."""

    index: int
    name: str
    arguments: dict[str, Any]


class CallBody(msgspec.Struct, frozen=True, kw_only=True):
    """A call of a tool, always whole."""

    id: str
    function: Function


class AssistantMessage(msgspec.Struct, frozen=True, kw_only=True):
    """An answer or the addition of a line to it."""

    role: Literal["assistant"] = "assistant"
    content: str
    thinking: str | msgspec.UnsetType = msgspec.UNSET
    tool_calls: list[CallBody] | msgspec.UnsetType = msgspec.UNSET


class AnswerLine(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The head of an answer or a line; the figures are on the last line.

    `metrics` are all of Headrace's own.
    """

    model: str
    created_at: str
    done: bool
    done_reason: Literal["stop", "length", "load", "unload"] | None = None
    logprobs: list[TokenBody] = []
    total_duration: int | None = None
    load_duration: int | None = None
    prompt_eval_count: int | None = None
    prompt_eval_duration: int | None = None
    eval_count: int | None = None
    eval_duration: int | None = None
    metrics: InferenceMetrics | None = None


class OllamaChatLine(AnswerLine, frozen=True, kw_only=True, omit_defaults=True):
    """A line of a chat, or the whole answer."""

    message: AssistantMessage


class OllamaGenerateLine(AnswerLine, frozen=True, kw_only=True, omit_defaults=True):
    """A line of one turn, or the whole answer."""

    response: str
    thinking: str = ""
    context: list[int] | msgspec.UnsetType = msgspec.UNSET


class Layout(NamedTuple):
    """How a route writes its lines: `fields` are those of a text, its thinking and its calls.

    `text` and `after` enclose the text of a plain line.
    """

    line: type[AnswerLine]
    fields: Callable[[str, str, list[CallBody]], dict[str, Any]]
    text: bytes
    after: bytes


def _chat_fields(text: str, thinking: str, calls: list[CallBody]) -> dict[str, Any]:
    unset = msgspec.UNSET
    message = AssistantMessage(content=text, thinking=thinking or unset, tool_calls=calls or unset)
    return {"message": message}


def _generate_fields(text: str, thinking: str, calls: list[CallBody]) -> dict[str, Any]:
    del calls
    return {"response": text, "thinking": thinking}


class _Job(NamedTuple):
    """What makes the core request, the size of the images in base64, and how it is answered."""

    request: Callable[[Any, dict[str, Any], ImageReader], GenerateRequest]
    images: int
    layout: Layout


_CHAT = msgspec.json.Decoder(OllamaChatRequest)
_GENERATE = msgspec.json.Decoder(OllamaGenerateRequest)
_CHAT_LAYOUT = Layout(
    OllamaChatLine, _chat_fields, b'"message":{"role":"assistant","content":', b"}"
)
_GENERATE_LAYOUT = Layout(OllamaGenerateLine, _generate_fields, b'"response":', b"")


async def chat(service: Service, exchange: Exchange) -> None:
    """Answer a conversation, as Ollama does."""
    wire = await exchange.read(_CHAT, body_limit(service, exchange.settings))
    if not wire.messages:
        await _load(service, exchange, wire, _CHAT_LAYOUT)
        return
    images = sum(len(image) for message in wire.messages for image in message.images or ())
    await _answer(service, exchange, wire, _Job(_chat_request, images, _CHAT_LAYOUT))


async def generate(service: Service, exchange: Exchange) -> None:
    """Answer one prompt, as Ollama does."""
    wire = await exchange.read(_GENERATE, body_limit(service, exchange.settings))
    if not wire.prompt:
        await _load(service, exchange, wire, _GENERATE_LAYOUT)
        return
    images = sum(map(len, wire.images or ()))
    await _answer(service, exchange, wire, _Job(_generate_request, images, _GENERATE_LAYOUT))


def _chat_request(
    wire: OllamaChatRequest, common: dict[str, Any], reader: ImageReader
) -> GenerateRequest:
    return GenerateRequest(
        messages=to_messages(wire.messages or (), reader),
        media=reader.pictures.data,
        tools=to_tools(wire.tools),
        thinking=to_thinking(wire),
        **common,
    )


def _generate_request(
    wire: OllamaGenerateRequest, common: dict[str, Any], reader: ImageReader
) -> GenerateRequest:
    prompt = wire.prompt or ""
    if wire.raw or wire.suffix:
        if wire.images:
            raise Unsupported("Images go without raw and suffix.", param="images")
        return GenerateRequest(prompt=prompt, suffix=wire.suffix or None, **common)
    system = (Message("system", wire.system),) if wire.system else ()
    content = to_content(prompt, wire.images, "", reader)
    return GenerateRequest(
        messages=(*system, Message("user", content)),
        media=reader.pictures.data,
        thinking=to_thinking(wire),
        **common,
    )


def _common(service: Service, exchange: Exchange, wire: GenerateFields) -> dict[str, Any]:
    exchange.call.names = _NAMES
    common = envelope(service, exchange, wire)
    if wire.stream is not False:
        common["load_wait_s"] = None
    return common | {"sampling": to_sampling(wire), "constraint": to_constraint(wire)}


async def _answer(service: Service, exchange: Exchange, wire: GenerateFields, job: _Job) -> None:
    common = _common(service, exchange, wire)
    async with held(exchange, (), job.images) as translation:
        request = await translation.run(partial(job.request, wire, common))
        await _reply(service, exchange, wire, request, job.layout)


async def _reply(
    service: Service,
    exchange: Exchange,
    wire: GenerateFields,
    request: GenerateRequest,
    layout: Layout,
) -> None:
    stream = service.ask(request, exchange.call)
    model = wire.model or wire.name or ""
    if wire.stream is not False:
        await exchange.unless_gone(send_stream(exchange, stream, LineEncoder(model, layout)))
        return
    answer = await exchange.unless_gone(collect(stream))
    choice = answer.choices[0]
    calls = [_call(index, call) for index, call in enumerate(choice.tool_calls)]
    body = layout.fields(choice.text, choice.reasoning, calls)
    line = _last(layout, model, body, choice.finish_reason, answer.metrics)
    if choice.logprobs:
        line = replace(line, logprobs=token_bodies(choice.logprobs))
    await exchange.answer(line, answer.metrics)


async def _load(service: Service, exchange: Exchange, wire: GenerateFields, layout: Layout) -> None:
    """Load a model and answer when it is ready; with a `keep_alive` of 0, unload it.

    Raises:
        Forbidden: it is to be unloaded, and the request is not an operator's.
    """
    common: dict[str, Any] = envelope(service, exchange, wire) | {"load_wait_s": None}
    if common.get("keep_alive") == 0 or wire.keep_alive in {0, "0"}:
        check_admin(exchange.scope, exchange.settings, is_admin=exchange.call.is_admin)
        if service.unload is None:
            raise Unsupported("Models cannot be unloaded here.", param="keep_alive")
        await service.unload(common["model"])
        reason = "unload"
    else:
        # Counting needs the model, and nothing else does less.
        request = CountRequest(text="", **common)
        await exchange.unless_gone(result(service.backend.ask(request), TokenCount))
        reason = "load"
    model = wire.model or wire.name or ""
    line = layout.line(
        model=model,
        created_at=timestamp(),
        done=True,
        done_reason=reason,
        **layout.fields("", "", []),
    )
    await exchange.answer(line)


class LineEncoder:
    """Writes an answer as lines of JSON. Calls are written whole, each when it is complete."""

    start = ((b"content-type", b"application/x-ndjson"), (b"cache-control", b"no-cache"))

    def __init__(self, model: str, layout: Layout) -> None:
        self._model = model
        self._layout = layout
        self._head = b'{"model":' + encode(model) + b',"created_at":"'
        self._text = b'",' + layout.text
        self._after = layout.after + b',"done":false}\n'
        self._call: ToolCallDelta | None = None
        self._arguments: list[str] = []
        self._calls = 0

    def waiting(self, progress: Progress | None) -> bytes:
        """Return nothing: lines of JSON have no comments."""
        del progress
        return b""

    def opening(self, progress: Progress | None) -> bytes:
        """Return nothing: every line is whole."""
        del progress
        return b""

    def delta(self, delta: Delta) -> bytes:
        """Return a line with the addition to the text or the thinking."""
        if delta.logprobs or delta.reasoning:
            line = self._line(delta.text, delta.reasoning, [])
            if delta.logprobs:
                line = replace(line, logprobs=token_bodies(delta.logprobs))
            return encode(line) + b"\n"
        if not delta.text:
            return b""
        stamp = timestamp().encode()
        return self._head + stamp + self._text + encode(delta.text) + self._after

    def rare(self, event: ToolCallDelta | PromptTokens) -> bytes:
        """Keep the addition to a call; return the line of the one before it."""
        if isinstance(event, PromptTokens):
            return b""
        if event.cut:
            # Only a whole call is sent, so that the text of this one can still be content.
            self._call = None
            self._arguments.clear()
            return encode(self._line(event.cut, "", [])) + b"\n"
        before = b""
        if event.name:
            before, self._call = self._complete(), event
        self._arguments.append(event.arguments)
        return before

    def finish(self, finish: Finish) -> bytes:
        """Return the line of the last call, and the one with the figures."""
        body = self._layout.fields("", "", [])
        line = _last(self._layout, self._model, body, finish.finish_reason, finish.metrics)
        return self._complete() + encode(line) + b"\n"

    def failure(self, problem: Problem, request_id: str) -> bytes:
        """Return the error as a line; it is the last one."""
        return OLLAMA.write(problem, request_id) + b"\n"

    def _complete(self) -> bytes:
        """Return the line of the call that has ended; none if it was cut."""
        call, arguments = self._call, "".join(self._arguments)
        self._call = None
        self._arguments.clear()
        if call is None:
            return b""
        try:
            body = _call(self._calls, ToolCall(call.id, call.name, arguments))
        except msgspec.DecodeError:
            return b""
        self._calls += 1
        return encode(self._line("", "", [body])) + b"\n"

    def _line(self, text: str, thinking: str, calls: list[CallBody]) -> AnswerLine:
        fields = self._layout.fields(text, thinking, calls)
        return self._layout.line(model=self._model, created_at=timestamp(), done=False, **fields)


def _call(index: int, call: ToolCall) -> CallBody:
    arguments = msgspec.json.decode(call.arguments, type=dict[str, Any])
    return CallBody(id=call.id, function=Function(index=index, name=call.name, arguments=arguments))


def _last(
    layout: Layout, model: str, body: dict[str, Any], reason: str, metrics: InferenceMetrics
) -> AnswerLine:
    ended = "length" if reason == "length" else "stop"
    if layout is _GENERATE_LAYOUT:
        body = {**body, "context": []}
    return layout.line(
        model=model,
        created_at=timestamp(),
        done=True,
        done_reason=ended,
        metrics=metrics,
        **timings(metrics),
        **body,
    )
