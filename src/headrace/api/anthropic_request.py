"""Requests of /v1/messages."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from msgspec import Meta

from headrace.api import dialect_fields, fields, limits
from headrace.api.fields import Body, Peers
from headrace.api.messages import CallId, ToolName
from headrace.api.wire import Count, KeepAlive, ModelName, StopText
from headrace.core.sampling import MaxTokens, SamplingFields


class ImageSource(Body, frozen=True):
    """A picture: its `data` in base64, or its URL. Its bytes say what it is."""

    type: str = ""
    media_type: str | None = None
    data: str | None = None
    url: str | None = None
    file_id: str | None = None

    peers: ClassVar[Peers] = dialect_fields.SOURCE


class Block(Body, frozen=True):
    """A part of a message: text, a picture, thinking, a call of a tool, or its result."""

    type: str
    text: str | None = None
    thinking: str | None = None
    id: CallId | None = None
    name: ToolName | None = None
    input: dict[str, Any] | None = None
    tool_use_id: CallId | None = None
    tool_name: str | None = None
    content: str | list[Block] | None = None
    source: ImageSource | str | None = None
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
