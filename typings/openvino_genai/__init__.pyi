"""The part of openvino-genai that is used here; it may not be installed."""

from typing import Any

from openvino import Tensor

class SchedulerConfig:
    num_kv_blocks: int
    max_num_seqs: int
    max_num_batched_tokens: int
    dynamic_split_fuse: bool
    enable_prefix_caching: bool

class StructuredOutputConfig:
    def __init__(self, *, json_schema: str) -> None: ...

class GenerationConfig:
    apply_chat_template: bool
    do_sample: bool
    ignore_eos: bool
    logprobs: int
    max_new_tokens: int
    min_p: float
    rng_seed: int
    stop_token_ids: set[int]
    structured_output_config: StructuredOutputConfig
    temperature: float
    top_k: int
    top_p: float

class GenerationStatus:
    name: str

class GenerationOutput:
    generated_ids: list[int]
    generated_log_probs: list[float]

class GenerationHandle:
    def can_read(self) -> bool: ...
    def read(self) -> dict[int, GenerationOutput]: ...
    def get_status(self) -> GenerationStatus: ...
    def cancel(self) -> None: ...

class Tokenizer:
    def __init__(self, path: str, **properties: Any) -> None: ...
    def get_eos_token_id(self) -> int: ...
    def get_bos_token_id(self) -> int: ...
    def get_pad_token_id(self) -> int: ...
    def get_eos_token(self) -> str: ...
    def get_bos_token(self) -> str: ...
    def get_pad_token(self) -> str: ...
    def get_vocab(self) -> dict[bytes, int]: ...
    def encode(self, text: str, *, add_special_tokens: bool) -> Any: ...
    def decode(self, tokens: Any, *, skip_special_tokens: bool) -> Any: ...

class ContinuousBatchingPipeline:
    def __init__(
        self,
        path: str,
        tokenizer: Tokenizer | None,
        scheduler: SchedulerConfig,
        device: str,
        **properties: Any,
    ) -> None: ...
    def add_request(
        self, number: int, prompt: Tensor, config: GenerationConfig
    ) -> GenerationHandle: ...
    def get_config(self) -> GenerationConfig: ...
    def has_non_finished_requests(self) -> bool: ...
    def step(self) -> None: ...
