"""What a model is, and what a loaded one tells about itself."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

State = Literal["created", "loading", "ready", "draining", "stopped", "failed"]
Origin = Literal["default", "file", "environment", "flag", "argument"]
Continuation = Literal["exact", "fast", "off"]
Task = Literal["generate", "embed", "rerank"]
Format = Literal["gguf", "safetensors", "openvino", "remote", "none"]


class ModelSpec(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A model as it is configured: its source, its engine and how it is served.

    `name` is what requests ask for. `model` is the reference it comes from (see
    headrace.models.reference). `options` go to the engine's own Options model, which checks them.
    `chat_template` overrides the model's own, as Jinja source. `max_running` None means what the
    engine can batch. `stop` are the stop strings of its template.
    `hang_s` is how long a running request may go without any sign of life.

    `keep_alive` is how many seconds an idle model stays loaded: 0 not at all, negative until its
    memory is needed. `preload` loads it when the service starts. `continuation` says what becomes
    of an answer whose worker dies: `exact` generates it again and goes on where it was cut, `fast`
    goes on from the tokens that were sent, `off` breaks it off. `weights` are those of the
    replicas, in order; 1 where none is given. `task` is what the model is for, where its header
    does not say so or can do several.
    """

    name: str
    model: str
    aliases: tuple[str, ...] = ()
    engine: str | None = None
    device: str | None = None
    context_length: int | None = None
    chat_template: str | None = None
    max_running: int | None = None
    max_queued: int = 64
    hang_s: float = 120.0
    load_timeout_s: float = 600.0
    trust_remote_code: bool = False
    revision: str | None = None
    stop: tuple[str, ...] = ()
    keep_alive: float = -1.0
    preload: bool = True
    pinned: bool = False
    enabled: bool = True
    continuation: Continuation = "fast"
    replicas: int = 1
    weights: tuple[float, ...] = ()
    task: Task | None = None
    options: dict[str, Any] = {}


class ModelFile(msgspec.Struct, frozen=True, kw_only=True):
    """A model on disk whose header has been checked.

    `path` is a GGUF file or a directory; of a remote model it is what the upstream calls it.
    `provider` is the upstream. `parameters` counts weights; `size` is in bytes.
    """

    path: str
    format: Format
    task: Task = "generate"
    provider: str | None = None
    architecture: str | None = None
    parameters: int | None = None
    quantization: str | None = None
    context_length: int | None = None
    chat_template: str | None = None
    size: int = 0
    kv_bytes_per_token: int | None = None


class Capabilities(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine can do with this model. A sampling field not listed is refused by name.

    `batch_invariant`: greedy and seeded answers repeat themselves, whatever runs beside them.
    `resume`: it can go on after tokens of an answer that it is given. `tasks`: what it answers.
    `dimensions`: of its embeddings.
    """

    sampling: frozenset[str] = frozenset()
    chat: bool = False
    json_schema: bool = False
    token_prompts: bool = True
    batch_invariant: bool = False
    resume: bool = False
    tasks: frozenset[Task] = frozenset({"generate"})
    dimensions: int | None = None


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True):
    """The metadata of a served model (contract W22). Sizes are bytes; `memory` is resident."""

    id: str
    source: str
    engine: str
    engine_reason: str = ""
    state: State = "created"
    reason: str | None = None
    aliases: tuple[str, ...] = ()
    device: str = "cpu"
    format: str = "none"
    architecture: str | None = None
    parameters: int | None = None
    quantization: str | None = None
    size: int = 0
    memory: int | None = None
    context_length: int | None = None
    max_running: int | None = None
    roles: tuple[str, ...] = ()
    chat_template: str | None = None
    capabilities: Capabilities = Capabilities()
    options: dict[str, Any] = {}
    notes: tuple[str, ...] = ()
    load_ms: float | None = None
    created: int = 0
