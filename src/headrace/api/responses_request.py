"""Requests of /v1/responses."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from msgspec import Meta

from headrace.api import dialect_fields, limits
from headrace.api.custom_tools import Syntax
from headrace.api.fields import Body, Peers
from headrace.api.messages import CallId, ToolName
from headrace.api.parts import AudioData
from headrace.api.thinking import Effort
from headrace.api.wire import Count, KeepAlive, ModelName, StreamOptions
from headrace.core.request import Role
from headrace.core.sampling import SamplingFields


class InputPart(Body, frozen=True):
    """A part of a message, of thinking or of a tool's output: text, a picture or a sound."""

    type: str
    text: str | None = None
    refusal: str | None = None
    image_url: str | None = None
    file_id: str | None = None
    input_audio: AudioData | None = None

    peers: ClassVar[Peers] = dialect_fields.INPUT_PART


class InputItem(Body, frozen=True, kw_only=True):
    """A part of the conversation: a message, thinking, a call of a tool, or its output."""

    type: str = "message"
    role: Role | None = None
    content: str | list[InputPart] | None = None
    call_id: CallId | None = None
    name: ToolName | None = None
    arguments: str | None = None
    input: str | None = None
    output: str | list[InputPart] | None = None
    encrypted_content: str | None = None

    peers: ClassVar[Peers] = dialect_fields.INPUT_ITEM


class FreeFormat(Body, frozen=True):
    """What a tool takes: any text, or that of a grammar, which is enforced."""

    type: Literal["text", "grammar"]
    syntax: Syntax | None = None
    definition: str | None = None


class ResponseTool(Body, frozen=True, omit_defaults=True):
    """A function, a custom tool (which takes free text), or one that the provider runs."""

    type: str
    name: ToolName | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    format: FreeFormat | None = None

    peers: ClassVar[Peers] = dialect_fields.RESPONSE_TOOL


class ToolOfType(Body, frozen=True, omit_defaults=True):
    """A tool, by name."""

    type: str
    name: ToolName | None = None

    peers: ClassVar[Peers] = dialect_fields.RESPONSE_TOOL


class ResponseChoice(Body, frozen=True, omit_defaults=True):
    """One tool that the model must call, or the tools that it may call."""

    type: str
    name: ToolName | None = None
    mode: Literal["auto", "required"] | None = None
    tools: Annotated[list[ToolOfType], Meta(min_length=1, max_length=limits.MAX_TOOLS)] | None = (
        None
    )

    peers: ClassVar[Peers] = dialect_fields.RESPONSE_TOOL


class TextFormat(Body, frozen=True, omit_defaults=True):
    """The required format of the answer."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None


class TextFields(Body, frozen=True, omit_defaults=True):
    """The required format of the answer; `verbosity` has no effect."""

    format: TextFormat | None = None
    verbosity: str | None = None


class Reasoning(Body, frozen=True):
    """The control of the thinking. There are no summaries."""

    effort: Effort | None = None
    summary: str | None = None

    peers: ClassVar[Peers] = dialect_fields.RESPONSE_REASONING


class ResponsesRequest(SamplingFields, Body, frozen=True, kw_only=True):
    """OpenAI's request of a response, with common extensions.

    `max_tokens` is another name of `max_output_tokens`, and both are cut to what the context has
    left. `store` and `truncation` have no effect: no response is kept, and nothing is truncated.
    So no `previous_response_id` is known.
    """

    # OpenAI's seed is a signed 64-bit integer; core also takes unsigned ones.
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None

    model: ModelName | None = None
    input: str | Annotated[list[InputItem], Meta(max_length=limits.MAX_ITEMS)] | None = None
    instructions: str | None = None
    max_output_tokens: Count | None = None
    max_tool_calls: Count | None = None
    tools: Annotated[list[ResponseTool], Meta(max_length=limits.MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ResponseChoice | None = None
    parallel_tool_calls: bool | None = None
    text: TextFields | None = None
    reasoning: Reasoning | None = None
    include: list[str] | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    truncation: Literal["auto", "disabled"] | None = None
    store: bool | None = None
    previous_response_id: str | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    context_length: Count | None = None
    keep_alive: KeepAlive | None = None

    peers: ClassVar[Peers] = dialect_fields.RESPONSES

    def names(self) -> dict[str, str]:
        """Return the client's names for fields of the core."""
        names = {
            "messages": "input",
            "response_format": "text.format",
            "template_options": "chat_template_kwargs",
        }
        return names | ({} if self.max_tokens is not None else {"max_tokens": "max_output_tokens"})
