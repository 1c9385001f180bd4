"""Models: their configuration (ModelSpec), file (ModelFile) and metadata (ModelInfo)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, NamedTuple, get_origin, get_type_hints

import msgspec

from headrace.core.adapter import Adapter, adapters_by_name, checked_adapters, names_of
from headrace.core.constraint import TextForm
from headrace.core.device import device_text
from headrace.core.sampling import checked_defaults
from headrace.core.values import seconds, variables

State = Literal["created", "loading", "ready", "draining", "stopped", "failed"]
Origin = Literal["default", "file", "environment", "flag", "argument"]
Continuation = Literal["exact", "fast", "off"]
Task = Literal["generate", "embed", "rerank"]
InputType = Literal["query", "document", "classification", "clustering", "similarity"]
Format = Literal["gguf", "safetensors", "openvino", "remote", "none"]


class Setting(NamedTuple):
    """The description of a model's setting, beside its type and default.

    `ge`, `gt`, `le` and `min_length` bound its values. A change of a `live` setting is applied to
    running workers; any other needs new ones. `traced` settings are attributes of the span of a
    load. `single` ones are set for a named model, never for all. `parse` converts text and numbers
    before their type is checked; it raises ValueError.
    """

    help: str
    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    min_length: int | None = None
    live: bool = False
    traced: bool = False
    single: bool = False
    parse: Callable[[object], object] | None = None


def _engine(value: object) -> object:
    return None if value == "auto" else value


def _duration(value: object) -> object:
    return seconds(value) if isinstance(value, str | float | int) else value


def check_template(source: str) -> str:
    """Return a chat template's source.

    Raises:
        ValueError: it is none, as the name of a template: a model would see the same few words
            whatever the messages are.
    """
    if "{{" in source or "{%" in source:
        return source
    raise ValueError(
        f"{source[:40]!r} is not a Jinja template, as it has neither {{{{ nor {{%. "
        "Give its source, or @ and the path of a file"
    )


def _template(value: object) -> object:
    # A path is replaced by the content of its file, and nothing resets the setting.
    return value if not value or str(value).startswith("@") else check_template(str(value))


def _switch(value: object) -> object:
    if isinstance(value, bool):
        return "on" if value else "off"
    return value.lower() if isinstance(value, str) else value


class Preset(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What requests to a name have that they do not set themselves."""

    system: Annotated[
        str | None, Setting("system message of conversations without one", live=True, single=True)
    ] = None
    defaults: Annotated[
        dict[str, Any],
        Setting(
            "sampling parameters: {temperature = 0.2, stop = [...]}",
            live=True,
            parse=checked_defaults,
        ),
    ] = {}
    thinking: Annotated[
        Literal["on", "off", "minimal", "low", "medium", "high", "xhigh", "max"] | None,
        Setting("on, off, or how much: minimal to max", live=True, parse=_switch),
    ] = None
    thinking_budget: Annotated[int | None, Setting("most tokens of thinking", ge=0, live=True)] = (
        None
    )
    prompt_name: Annotated[
        str | None, Setting("which of the model's prompts precedes texts to embed", min_length=1)
    ] = None

    def over(self, base: Preset) -> Preset:
        """Return the preset with what it does not set taken from another."""
        return Preset(
            system=base.system if self.system is None else self.system,
            defaults={**base.defaults, **self.defaults},
            thinking=self.thinking or base.thinking,
            thinking_budget=(
                base.thinking_budget if self.thinking_budget is None else self.thinking_budget
            ),
            prompt_name=self.prompt_name or base.prompt_name,
        )


class ModelSpec(Preset, frozen=True, kw_only=True, omit_defaults=True):
    """A model as it is configured: its source, its engine and how it is served.

    `name` is the name in requests. The other fields are the keys of `[models.NAME]`: the
    configuration, the pool and the traces read their `Setting`. None leaves a value to the model's
    header, the engine or the device. The engine's own Options check `options`. `presets` are
    further names with presets of their own: the tables whose `base` is this one.
    """

    name: str
    presets: dict[str, Preset] = {}
    model: Annotated[
        str,
        Setting("reference: path, hub:, index:, or short name", min_length=1, single=True),
    ]
    base: Annotated[
        str | None, Setting("another table whose loaded model answers", single=True)
    ] = None
    aliases: Annotated[
        tuple[str, ...], Setting("further names requests may use", live=True, single=True)
    ] = ()
    engine: Annotated[
        str | None,
        Setting("engine; auto by format, device and what is installed", parse=_engine),
    ] = None
    device: Annotated[
        str | None,
        Setting(
            "cpu, cuda, mps, rocm, sycl, vulkan, cuda:1, a list of GPUs, or their number; "
            "else the best",
            traced=True,
            parse=device_text,
        ),
    ] = None
    context_length: Annotated[
        int | None, Setting("prompt and answer, in tokens", ge=1, traced=True)
    ] = None
    chat_template: Annotated[
        str | None, Setting("Jinja source, or @path of a file", parse=_template)
    ] = None
    stop: Annotated[tuple[str, ...], Setting("stop strings of the template")] = ()
    tool_format: Annotated[
        str | None, Setting("how the model writes calls of tools; else found in its template")
    ] = None
    max_running: Annotated[int | None, Setting("requests at once", ge=1, traced=True)] = None
    max_queued: Annotated[int, Setting("requests that may wait", ge=0, live=True, traced=True)] = 64
    hang_s: Annotated[float, Setting("silence that means it hangs", gt=0)] = 120.0
    load_timeout_s: Annotated[float, Setting("how long loading may take", gt=0)] = 600.0
    revision: Annotated[
        str | None, Setting("commit of the repository", traced=True, single=True)
    ] = None
    trust_remote_code: Annotated[
        bool, Setting("run code of the model's repository", single=True)
    ] = False
    keep_alive: Annotated[
        float,
        Setting(
            "how long it stays idle: 5m, 0; -1 until its memory is needed",
            live=True,
            traced=True,
            parse=_duration,
        ),
    ] = -1.0
    preload: Annotated[bool, Setting("load when the service starts", live=True)] = True
    pinned: Annotated[bool, Setting("never give its memory to another", live=True)] = False
    enabled: Annotated[bool, Setting("answer requests", live=True)] = True
    continuation: Annotated[
        Continuation,
        Setting("how an answer goes on whose worker died: exact, fast, off", traced=True),
    ] = "fast"
    replicas: Annotated[
        int, Setting("workers of this model", ge=1, le=64, live=True, traced=True)
    ] = 1
    nodes: Annotated[
        tuple[str, ...], Setting("labels of nodes in a cluster that may run it", single=True)
    ] = ()
    weights: Annotated[
        tuple[float, ...], Setting("share of work of each replica, 1 if not set", live=True)
    ] = ()
    task: Annotated[
        Task | None,
        Setting("generate, embed or rerank; else by the model's header", traced=True),
    ] = None
    adapters: Annotated[
        dict[str, Adapter],
        Setting(
            "LoRA adapters: NAME = reference, or {source, scale, name}",
            single=True,
            parse=checked_adapters,
        ),
    ] = {}
    prompts: Annotated[
        dict[str, str],
        Setting('prompts before texts to embed, by name: {query = "query: "}'),
    ] = {}
    env: Annotated[
        dict[str, str | None],
        Setting("variables of its process beside those of all: NAME = value", parse=variables),
    ] = {}
    options: Annotated[dict[str, Any], Setting("the engine's options")] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """All names that requests may use; one that is there twice is refused."""
        adapters = self.adapters.items()
        more = (name for each in adapters for name in names_of(self.name, *each))
        return (self.name, *self.aliases, *self.presets, *more)

    @property
    def adapter_names(self) -> dict[str, str]:
        """The adapters by each name that requests may use for them."""
        return adapters_by_name(self.name, self.adapters)


class PlacedSpec(ModelSpec, frozen=True, kw_only=True):
    """A model on the devices that were chosen for one worker."""

    placed: tuple[str, ...]

    @classmethod
    def of(cls, spec: ModelSpec, placed: tuple[str, ...]) -> PlacedSpec:
        """Return the specification with these devices."""
        values = {name: getattr(spec, name) for name in ModelSpec.__struct_fields__}
        return cls(**values, placed=placed)


SETTINGS: Mapping[str, Setting] = {
    name: hint.__metadata__[0]
    for name, hint in get_type_hints(ModelSpec, include_extras=True).items()
    if get_origin(hint) is Annotated
}
"""The settings of a model: all of its fields but `name`."""

LIVE_SETTINGS = tuple(name for name, setting in SETTINGS.items() if setting.live)
TRACED_SETTINGS = tuple(name for name, setting in SETTINGS.items() if setting.traced)
PRESET_SETTINGS = tuple(Preset.__struct_fields__)
SINGLE_SETTINGS = tuple(name for name, setting in SETTINGS.items() if setting.single)


def needs_new_worker(old: ModelSpec, new: ModelSpec) -> bool:
    """Whether a change of settings needs a new worker."""
    return any(
        getattr(old, name) != getattr(new, name)
        for name in ModelSpec.__struct_fields__
        if name not in LIVE_SETTINGS and name != "presets"
    )


class ModelFile(msgspec.Struct, frozen=True, kw_only=True):
    """A model on disk whose header has been checked.

    `path` is a GGUF file or a directory, or the name of a remote model at its upstream, the
    `provider`. `parameters` counts weights; `size` is in bytes. `tokenizer` is the kind of a GGUF's
    tokenizer, and `special_ids` are its tokens by their names in templates (`bos_token`), and
    `infill_ids` those before a prefix, a suffix and the gap between them. A token is at most
    `max_token_bytes` of text (None: without a limit, or not known). `vocabulary` is how many tokens
    there are; 0 is not known, as it is of `layers`. `projector` is the file for images or sounds
    that belongs to it; `vision` and `audio` are what it takes. `prompts` precede texts to embed, by
    name; `default_prompt` is that of requests without.
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
    tokenizer: str | None = None
    max_token_bytes: int | None = None
    special_ids: dict[str, int] = {}
    infill_ids: tuple[int, ...] = ()
    size: int = 0
    layers: int = 0
    vocabulary: int = 0
    kv_bytes_per_token: int | None = None
    projector: str | None = None
    vision: bool = False
    audio: bool = False
    prompts: dict[str, str] = {}
    default_prompt: str | None = None


class Capabilities(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine supports with this model. Sampling fields that are not listed are refused.

    `forms`: constraints that it enforces, beside `json_schema`.
    `batch_invariant`: greedy and seeded answers do not depend on other running requests.
    `resume`: an answer can be continued after given tokens. `dimensions`: of its embeddings.
    `tools`: calls of tools, in a `generic` form where the chat template has none of its own.
    `thinking`: whether the model thinks before its answer, and requests can switch that.
    `prompt_logprobs`: of the tokens of a prompt. `infill`: it fills the gap before a suffix.
    `vision`: messages may have images. `audio`: they may have sounds.
    `adapters`: it can be loaded with LoRA adapters.
    `speculation`: how tokens are drafted; empty if none are.
    """

    sampling: frozenset[str] = frozenset()
    chat: bool = False
    json_schema: bool = False
    forms: frozenset[TextForm] = frozenset()
    token_prompts: bool = True
    batch_invariant: bool = False
    resume: bool = False
    tools: Literal["none", "generic", "native"] = "none"
    thinking: Literal["none", "always", "switchable"] = "none"
    prompt_logprobs: bool = False
    infill: bool = False
    vision: bool = False
    audio: bool = False
    speculation: str = ""
    adapters: bool = False
    tasks: frozenset[Task] = frozenset({"generate"})
    dimensions: int | None = None

    @property
    def names(self) -> list[str]:
        """The names of what it can do."""
        return sorted(name for name in self.__struct_fields__ if getattr(self, name) is True)

    @property
    def abilities(self) -> frozenset[str]:
        """Those of `ABILITIES` that it has."""
        return frozenset(
            name for name in ABILITIES if name in self.sampling or getattr(self, name, False)
        )


ABILITIES: Mapping[str, str] = {
    "json_schema": "JSON schemas, required calls",
    "forms": "regex, choice, grammar",
    "logprobs": "log probabilities",
    "prompt_logprobs": "those of the prompt",
    "infill": "fill in the middle",
    "vision": "images",
    "audio": "audio input",
    "resume": "continues an answer",
    "speculation": "drafts tokens",
    "adapters": "LoRA adapters",
}
"""What some engines can do and others cannot: flags of Capabilities and fields of Sampling."""


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True):
    """The metadata of a served model (contract W22). Sizes are bytes; `memory` is resident.

    `tool_format` describes how the model writes calls and thinking, once it is loaded. `base` is
    the model that answers for a name with a preset or an adapter of its own; `adapter` is where
    the adapter is from. `prompts` precede texts to embed.
    """

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
    tool_format: dict[str, str] = {}
    capabilities: Capabilities = Capabilities()
    options: dict[str, Any] = {}
    notes: tuple[str, ...] = ()
    load_ms: float | None = None
    created: int = 0
    base: str | None = None
    adapter: str | None = None
    preset: dict[str, Any] = {}
    prompts: dict[str, str] = {}
