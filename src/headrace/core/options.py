"""The keyword arguments in Python, typed for editors and type checkers.

Each is declared elsewhere, with its range and help: `headrace.core.sampling`,
`headrace.core.request`, `headrace.core.model`, and the Options of the engines. A test compares.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict

from headrace.core.model import InputType
from headrace.core.tools import Thinking, Tool, ToolChoice


class GenerateOptions(TypedDict, total=False):
    """Arguments of `generate` and `generate_stream`: sampling, and fields of the request.

    None is as if the argument were not given.
    """

    max_tokens: int | None
    min_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    repetition_penalty: float | None
    seed: int | None
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    ignore_eos: bool | None
    logprobs: int | None
    logit_bias: Mapping[int, float] | None
    n: int | None
    adapter: str | None
    echo: bool | None
    context_length: int | None
    json_schema: Mapping[str, Any] | None
    tools: Sequence[Tool | Mapping[str, Any]] | None
    tool_choice: ToolChoice | str | Mapping[str, Any] | None
    parallel_tool_calls: bool | None
    thinking: Thinking | bool | str | int | None
    regex: str | None
    choice: Sequence[str] | None
    grammar: str | None
    template_options: Mapping[str, Any] | None
    suffix: str | None
    continue_final: bool | None
    prompt_logprobs: int | None
    deadline_s: float | None


class EmbedOptions(TypedDict, total=False):
    """Arguments of `embed`."""

    dimensions: int | None
    normalize: bool | None
    truncate: bool | None
    prompt_name: str | None
    input_type: InputType | None
    deadline_s: float | None


class RerankOptions(TypedDict, total=False):
    """Arguments of `rerank`."""

    top_n: int | None
    truncate: bool | None
    deadline_s: float | None


class ModelOptions(TypedDict, total=False):
    """Arguments of a worker: settings of the model, then options of the engines.

    An engine refuses an option that it does not have. Options of other engines go into `options`.
    """

    aliases: Sequence[str] | None
    engine: str | None
    device: str | None
    context_length: int | None
    chat_template: str | None
    stop: Sequence[str] | None
    system: str | None
    defaults: Mapping[str, Any] | None
    thinking: Literal["on", "off", "minimal", "low", "medium", "high", "xhigh", "max"] | None
    thinking_budget: int | None
    tool_format: str | None
    base: str | None
    max_running: int | None
    max_queued: int | None
    hang_s: float | None
    load_timeout_s: float | None
    revision: str | None
    trust_remote_code: bool | None
    keep_alive: float | str | None
    preload: bool | None
    pinned: bool | None
    enabled: bool | None
    continuation: Literal["exact", "fast", "off"] | None
    adapters: Mapping[str, Any] | None
    nodes: Sequence[str] | None
    replicas: int | None
    weights: Sequence[float] | None
    task: Literal["generate", "embed", "rerank"] | None
    options: Mapping[str, Any] | None

    api_key: str | None
    api_key_env: str | None
    api_version: str | None
    arguments: Sequence[str] | None
    attention: str | None
    audio: bool | None
    base_url: str | None
    batch_invariant: bool | None
    batch_items: int | None
    batch_size: int | None
    batch_tokens: int | None
    batching: str | None
    cache_tokens: int | None
    connect_s: float | None
    crash_after: int | None
    crash_signal: int | None
    device_map: str | None
    dimensions: int | None
    draft_model: str | None
    draft_tokens: int | None
    dtype: str | None
    eager: bool | None
    engine_args: Mapping[str, Any] | None
    env: Mapping[str, Any] | None
    executable: str | None
    fail_after: int | None
    fail_load: str | None
    fault: str | None
    first_token_s: float | None
    flash_attention: str | None
    forms: bool | None
    gpu_layers: int | None
    gpu_memory: float | None
    hang_after: int | None
    images: bool | None
    in_step: bool | None
    kv_cache_bytes: int | None
    kv_type: str | None
    load_format: str | None
    load_s: float | None
    max_memory: Mapping[str, Any] | None
    max_retries: int | None
    max_tokens: int | None
    memory: int | None
    mmap: bool | None
    mmproj: str | None
    oom_after: int | None
    pipeline_parallel: int | None
    pooling: str | None
    precision: str | None
    prefill_tokens_per_second: float | None
    prefix_cache: bool | None
    prompt_name: str | None
    prompts: Mapping[str, str] | None
    properties: Mapping[str, Any] | None
    quantization: str | None
    rope_scale: float | None
    rope_scaling: str | None
    sampling: Sequence[str] | None
    slots: int | None
    speculation: str | None
    stall_s: float | None
    step_tokens: int | None
    tensor_parallel: int | None
    text: str | None
    threads: int | None
    tokens_per_delta: int | None
    tokens_per_second: float | None
    trigger: str | None
    weight_type: str | None
