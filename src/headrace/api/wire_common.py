"""What the requests and answers of several routes have in common on the wire."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import Meta

from headrace.core.metrics import InferenceMetrics, Usage

ModelName = Annotated[str, Meta(max_length=512)]
TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Count = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Unit = Annotated[float, Meta(ge=0, le=1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
StopText = Annotated[str, Meta(min_length=1, max_length=1024)]
Bias = Annotated[float, Meta(ge=-100, le=100)]
Nothing = Annotated[list[Any], Meta(max_length=0)]
KeepAlive = float | Annotated[str, Meta(max_length=64)]


class StreamOptions(msgspec.Struct, frozen=True):
    """`include_usage` adds a last chunk with the token counts."""

    include_usage: bool | None = None


class JsonSchema(msgspec.Struct, frozen=True):
    """A named JSON schema for the answer."""

    name: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, frozen=True):
    """What the text of the answer must be."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class GenerateFields(msgspec.Struct, frozen=True, kw_only=True):
    """Fields of every request that generates. null means absent; unknown fields are ignored.

    The fields named in REFUSED would change the answer and are not supported: each is accepted
    only with the value that changes nothing.
    """

    REFUSED: ClassVar[frozenset[str]] = frozenset(
        {
            "allowed_token_ids", "best_of", "grammar", "guided_choice", "guided_grammar",
            "guided_json", "guided_regex", "min_tokens", "prediction", "structured_outputs",
        }
    )  # fmt: skip

    model: ModelName | None = None
    max_tokens: Count | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Unit | None = None
    n: Annotated[int, Meta(ge=1, le=128)] | None = None
    stop: StopText | list[StopText] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: dict[TokenId, Bias] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    min_p: Unit | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=10)] | None = None
    stop_token_ids: list[TokenId] | None = None
    ignore_eos: bool | None = None
    context_length: Count | None = None
    keep_alive: KeepAlive | None = None

    allowed_token_ids: None = None
    grammar: None = None
    guided_choice: None = None
    guided_grammar: None = None
    guided_json: None = None
    guided_regex: None = None
    min_tokens: Literal[0] | None = None
    prediction: None = None
    structured_outputs: None = None

    @property
    def wants_usage(self) -> bool:
        """Tell whether the stream ends with a usage chunk."""
        return bool(self.stream_options and self.stream_options.include_usage)


class PromptDetails(msgspec.Struct, frozen=True):
    """Tokens of the prompt that were taken from a cache."""

    cached_tokens: int


class CompletionDetails(msgspec.Struct, frozen=True):
    """Tokens of the completion that were thinking."""

    reasoning_tokens: int


class UsageBody(msgspec.Struct, frozen=True):
    """OpenAI's `usage`."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    completion_tokens_details: CompletionDetails


def usage_body(usage: Usage) -> UsageBody:
    """Say it in OpenAI's words."""
    return UsageBody(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        total_tokens=usage.total_tokens,
        prompt_tokens_details=PromptDetails(usage.cached_tokens),
        completion_tokens_details=CompletionDetails(usage.reasoning_tokens),
    )


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """The head of every generated answer."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    usage: UsageBody | None
    metrics: InferenceMetrics


class ChunkHead(msgspec.Struct, frozen=True, kw_only=True):
    """The head of every streamed chunk; `metrics` is on the last one alone."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    usage: UsageBody | None = None
    metrics: InferenceMetrics | None = None
