"""Attributes of spans: their names (OpenTelemetry's if there is one) and their values."""

from __future__ import annotations

from headrace.core.metrics import DeviceUse, InferenceMetrics
from headrace.core.model import ModelInfo
from headrace.core.record import Attribute
from headrace.core.request import AnyRequest, EmbedRequest, GenerateRequest
from headrace.core.sampling import Sampling, SamplingFields
from headrace.models.providers import PROVIDERS

Attributes = dict[str, Attribute]

OPERATION = "gen_ai.operation.name"
PROVIDER = "gen_ai.provider.name"
REQUEST_MODEL = "gen_ai.request.model"
RESPONSE_MODEL = "gen_ai.response.model"
FINISH_REASONS = "gen_ai.response.finish_reasons"
TOOL_DEFINITIONS = "gen_ai.tool.definitions"
FIRST_CHUNK = "gen_ai.response.time_to_first_chunk"
INPUT_TOKENS = "gen_ai.usage.input_tokens"
OUTPUT_TOKENS = "gen_ai.usage.output_tokens"
CACHED_TOKENS = "gen_ai.usage.cache_read.input_tokens"
REASONING_TOKENS = "gen_ai.usage.reasoning.output_tokens"
INPUT_MESSAGES = "gen_ai.input.messages"
OUTPUT_MESSAGES = "gen_ai.output.messages"
ERROR = "error.type"
SERVER_ADDRESS = "server.address"
SERVER_PORT = "server.port"

QUEUE, LOAD = "headrace.queue", "headrace.load"
ATTEMPT, PREFILL, DECODE = "headrace.generate", "headrace.prefill", "headrace.decode"
START = "headrace.worker.start"

REQUEST_ID = "headrace.request.id"
CLIENT = "headrace.client"
BATCH = "headrace.batch"
OUTCOME = "headrace.outcome"
ENGINE = "headrace.engine"
WORKER_PID = "headrace.worker.pid"
NODE = "headrace.node"

HERE = "headrace"
"""The provider of models on this machine."""

_LONGEST = 256
_CONVENTIONAL = frozenset(
    {
        *("max_tokens", "temperature", "top_p", "top_k", "presence_penalty"),
        *("frequency_penalty", "seed"),
    }
)
"""Sampling parameters for which the conventions have a name."""

_LARGEST_INTEGER = (1 << 63) - 1
"""OpenTelemetry's integers are signed, with 64 bits."""

_ELSEWHERE = frozenset(
    {
        *("started_at", "total_ms"),  # the span's own times
        *("usage", "time_to_first_token_ms", "engine", "model", "worker", "outcome"),
        *("inter_token_ms", "devices"),  # parts of them are attributes
    }
)
_FIGURES = tuple(name for name in InferenceMetrics.declared() if name not in _ELSEWHERE)
_AT_THE_END = frozenset({"name", "total", "used", "worker_used"})
_USE = tuple(name for name in DeviceUse.declared() if name not in _AT_THE_END)


def provider(info: ModelInfo) -> str:
    """Return the provider of a model, by its name in the conventions."""
    name = info.source.partition(":")[0]
    return (PROVIDERS[name].otel_name or name) if name in PROVIDERS else HERE


def request_attributes(request: AnyRequest, provider_name: str) -> Attributes:
    """Return the attributes of a request that are known before it runs; no content."""
    attributes: Attributes = {OPERATION: request.operation, PROVIDER: provider_name}
    if request.model:
        attributes[REQUEST_MODEL] = request.model[:_LONGEST]
    if isinstance(request, EmbedRequest):
        if request.dimensions is not None:
            attributes["gen_ai.embeddings.dimension.count"] = request.dimensions
    elif isinstance(request, GenerateRequest):
        attributes |= _sampling(request.sampling)
        if request.n != 1:
            attributes["gen_ai.request.choice.count"] = request.n
        is_json = request.constraint is not None and request.constraint.form == "json_schema"
        attributes["gen_ai.output.type"] = "json" if is_json else "text"
    return attributes


def _sampling(sampling: Sampling) -> Attributes:
    attributes: Attributes = {}
    for name in SamplingFields.__struct_fields__:
        if (value := getattr(sampling, name)) is not None:
            space = "gen_ai" if name in _CONVENTIONAL else "headrace"
            attributes[f"{space}.request.{name}"] = (
                value if value <= _LARGEST_INTEGER else str(value)
            )
    if sampling.stop:
        attributes["gen_ai.request.stop_sequences"] = sampling.stop
    return attributes


def usage(metrics: InferenceMetrics) -> Attributes:
    """Return the token counts, and the time to the first token in seconds."""
    used = metrics.usage
    attributes: Attributes = {
        INPUT_TOKENS: used.prompt_tokens,
        OUTPUT_TOKENS: used.completion_tokens,
    }
    if used.cached_tokens:
        attributes[CACHED_TOKENS] = used.cached_tokens
    if used.reasoning_tokens:
        attributes[REASONING_TOKENS] = used.reasoning_tokens
    if used.drafted_tokens:
        attributes["headrace.drafted_tokens"] = used.drafted_tokens
        attributes["headrace.accepted_tokens"] = used.accepted_tokens
    if metrics.time_to_first_token_ms is not None:
        attributes[FIRST_CHUNK] = metrics.time_to_first_token_ms / 1000
    return attributes


def figures(metrics: InferenceMetrics) -> Attributes:
    """Return the defined figures of a request for which the conventions have no name."""
    attributes: Attributes = {
        f"headrace.{name}": value
        for name in _FIGURES
        if (value := getattr(metrics, name)) not in (None, "")
    }
    if (gaps := metrics.inter_token_ms) is not None:
        attributes |= {
            "headrace.inter_token_p50_ms": gaps.p50,
            "headrace.inter_token_p99_ms": gaps.p99,
        }
    for device in metrics.devices:
        key = device.name.partition(" ")[0]
        for name in _USE:
            if (value := getattr(device, name)) is not None:
                attributes[f"headrace.device.{key}.{name}"] = value
    return attributes
