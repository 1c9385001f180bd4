"""llama.cpp through xllamacpp: any GGUF, continuous batching over slots, CPU or GPU."""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import msgspec
from pydantic import Field

from headrace import machine
from headrace.core.errors import LoadFailed
from headrace.core.model import ModelFile
from headrace.core.status import Footprint
from headrace.core.values import expanded
from headrace.engines import plan
from headrace.engines.base import About, OpenRequest
from headrace.engines.llamacpp import widening
from headrace.engines.openmp import physical_cores
from headrace.engines.plan import CachePlan
from headrace.engines.speculation import SpeculationOptions
from headrace.models import projector
from headrace.models.gguf import Skipped as Skipped
from headrace.models.gguf import read_header as read_header
from headrace.models.gguf_model import EMBEDDERS
from headrace.models.projector import Projector
from headrace.models.transfer import Progress

ABOUT = About(
    formats=("gguf",),
    devices=("cpu", "cuda", "mps", "rocm", "vulkan"),
    confined=True,
    spreads=True,
    requires="xllamacpp",
    tasks=("generate", "embed", "rerank"),
    able=frozenset(
        {"adapters", "forms", "infill", "json_schema", "logprobs", "resume", "speculation"}
        | {"vision", "audio"}
    ),
)

_DEFAULT_SLOTS = 4
_CPU_BATCH, _GPU_BATCH, _IMAGE_BATCH = 128, 2048, 512
_EMBED_CONTEXT = 8192
_MIB = 1 << 20
# Measured on a CPU, of lengths from 3 to 16, by benchmarks/speculation.py.
_NGRAM = 5
# Of models with fewer weights, wider ones are worth measuring.
_WIDE_WEIGHTS = 4_000_000_000
# Where Headrace's name of a kind of device is not llama.cpp's.
_KINDS = {"mtl": "mps", "metal": "mps"}
# In the names of libraries that a build brings for a GPU.
_LIBRARIES = {
    "cuda": "cuda",
    "cublas": "cuda",
    "amdhip": "rocm",
    "rocblas": "rocm",
    "vulkan": "vulkan",
}
_KV_SHARE = {"f16": 1.0, "bf16": 1.0, "q8_0": 34 / 64, "q4_0": 18 / 64}

# Measured with SmolLM2-135M. A process with the library (Python, the code, buffers, warm-up) and
# the one that renders chat templates.
_PROCESS = 96 * _MIB
_PER_WORD, _PER_SLOT = 400, 2 * _MIB
# Activations of a token grow with the width, which grows with the root of the size.
_PER_ACTIVATION = 2.6
# Not measured with this library yet: memory of CUDA itself, on the host and on the GPU.
_CUDA_HOST, _CUDA_DEVICE = 400 * _MIB, 500 * _MIB


class Options(SpeculationOptions):
    """Settings of llama.cpp. All are fixed once the model is loaded."""

    of_ngrams: ClassVar[int] = _NGRAM
    slots: int | None = Field(
        None, ge=1, le=256, description="Requests in one batch; by default 4, or fewer."
    )
    threads: int | None = Field(
        None, ge=1, le=1024, description="CPU threads; by default one for each core it may use."
    )
    batch_size: int | None = Field(
        None,
        ge=32,
        le=16384,
        description="Prompt tokens computed at once, after which a cancelled request ends; "
        "by default 128 on a CPU and 2048 on a GPU.",
    )
    gpu_layers: int = Field(-1, ge=-1, description="Layers on the GPU; -1 is all of them.")
    flash_attention: Literal["auto", "on", "off"] = Field("auto", description="Flash attention.")
    kv_type: Literal["f16", "bf16", "q8_0", "q4_0"] | None = Field(
        None,
        description="Type of the KV cache; f16, or bf16 where answers have to be reproducible.",
    )
    prefix_cache: bool = Field(True, description="Keep a prompt's KV cache for the next one.")
    mmap: bool = Field(True, description="Map the file instead of reading it.")
    rope_scaling: Literal["model", "none", "linear", "yarn"] = Field(
        "model", description="RoPE scaling; `model` takes what the file says."
    )
    pooling: Literal["model", "mean", "cls", "last"] = Field(
        "model", description="How the embeddings of the tokens are pooled into one."
    )
    mmproj: str | None = Field(
        None,
        description="Projector file for images and audio; by default the mmproj*.gguf beside the "
        "model, `off` for none.",
    )
    weight_type: Literal["file", "q8_0"] = Field(
        "file",
        description="Type of the weights: that of the file, or 8 bits in a copy that is made once, "
        "which some CPUs compute faster. `headrace tune` measures both.",
    )
    rope_scale: float = Field(0, ge=0, description="Factor by which the context is stretched.")


def device_kind(name: str) -> str:
    """Return the kind of a device that llama.cpp names (`CUDA0`): cuda, mps, rocm, vulkan ..."""
    word = name.rstrip("0123456789").lower()
    return _KINDS.get(word, word)


def devices() -> tuple[str, ...]:
    """Return the kinds of devices that the installed library was built for."""
    return "cpu", *_built_for()


def looked_up(options: Options) -> int:
    """Return how many tokens at the end of a text are looked up in it, for an n-gram's draft.

    The library drafts at least as many.
    """
    return min(_NGRAM, options.most_drafted)


AnyOptions = TypeVar("AnyOptions", bound=Options)


def footprint(request: OpenRequest) -> Footprint:
    """Estimate what loading takes, from the file's header and the options.

    Raises:
        LoadFailed: the header cannot be read.
    """
    return footprint_on(request, settled(request), expected_device(request.device))


def footprint_on(request: OpenRequest, options: Options, device: str) -> Footprint:
    """Estimate what loading takes on a device: `cpu` or `cuda:N`.

    Raises:
        LoadFailed: the header cannot be read.
    """
    gpus = plan.expected_gpus(request, device)
    planned = plan_slots(request, options, on_cpu=device == "cpu")
    if request.task == "generate":
        need = estimate(request.model, planned, options, gpus)
        batch = batch_size(options, planned.slots, on_cpu=not gpus)
        if request.draft is None:
            return need
        return _with_draft(need, request.draft, planned, options, batch)
    whole = max(planned.context_length, 512)
    need = estimate(request.model, planned, options, gpus, whole=whole)
    return msgspec.structs.replace(need, max_running=plan.encoder_requests(request))


def _with_draft(
    need: Footprint, draft: ModelFile, planned: CachePlan, options: Options, batch: int
) -> Footprint:
    """Return an estimate with the draft model, on the same devices, and a cache of its own."""
    cache = planned.tokens * _kv_bytes(draft, options)
    activations = _PER_ACTIVATION * math.sqrt(draft.parameters or 0) * batch
    more = int(draft.size + cache + activations + draft.vocabulary * _PER_WORD)
    gpus = [name for name in need.devices if name != "cpu"] or ["cpu"]
    devices = {name: need.devices[name] + more // len(gpus) for name in gpus}
    return msgspec.structs.replace(
        need, devices=need.devices | devices, parts=need.parts | {"draft": more}
    )


def tune_options(request: OpenRequest) -> Sequence[dict[str, Any]]:
    """Return options worth trying: wider weights, a smaller cache, larger batches, more slots."""
    most = request.max_running or 1
    slots = {"slots": most} if most > _DEFAULT_SLOTS else {}
    small = {"kv_type": "q8_0", "flash_attention": "on"}
    logical = machine.usable_cpus()
    more = [{**slots, "threads": logical}] if logical > physical_cores() else []
    alone = {**small, "batch_size": 256}
    # Where memory is the limit, twice the bytes take twice the time.
    is_small = (request.model.parameters or _WIDE_WEIGHTS) < _WIDE_WEIGHTS
    kind = {"weight_type": "q8_0"}
    is_wider = is_small and widening.is_narrow(request.model)
    wide = [{**slots, **kind}, kind] if is_wider else []
    batches = {**slots, "batch_size": 512}
    # A step that checks a draft gains the more from what is fast for several tokens.
    drafting = {"speculation": "ngram", **(kind if is_wider else {})}
    ahead = [drafting, {**slots, **drafting}]
    # Without more slots some of these are the same; `tune` measures them once.
    return [*wide, slots, alone, batches, {**slots, **small}, *more, *ahead]


def prepared(
    file: ModelFile, home: Path, options: dict[str, Any], progress: Progress | None
) -> ModelFile:
    """Return the file to load: the model's own, or its copy with wider weights.

    Raises:
        HeadraceError: as `widening.widened`.
    """
    wide = options.get("weight_type") == "q8_0"
    return widening.widened(file, home, progress) if wide else file


def settled(request: OpenRequest, kind: type[AnyOptions] = Options) -> AnyOptions:
    """Return the options, with defaults for reproducible answers where the request needs them."""
    options = kind(**request.options)
    if not request.repeatable:
        return options
    flash = "on" if options.flash_attention == "auto" else options.flash_attention
    kv_type = options.kv_type or "bf16"
    return options.model_copy(update={"flash_attention": flash, "kv_type": kv_type})


def batch_size(options: Options, slots: int, *, on_cpu: bool, sees: bool = False) -> int:
    """Return how many tokens are computed at once; all of an image have to fit in.

    So have the next tokens of all slots with their drafts: the library would end the process.
    """
    default = _CPU_BATCH if on_cpu else _GPU_BATCH
    size = options.batch_size or (max(default, _IMAGE_BATCH) if sees else default)
    return max(size, slots * (1 + options.most_drafted))


def projector_of(model: ModelFile, options: Options) -> Projector | None:
    """Return the projector that the options name, or that belongs to the model.

    Raises:
        LoadFailed: the file is damaged, or is none.
    """
    if options.mmproj == "off":
        return None
    path = options.mmproj or model.projector
    return None if path is None else _projector(expanded(path), _stamp(path))


def plan_slots(request: OpenRequest, options: Options, *, on_cpu: bool) -> CachePlan:
    """Choose slots and context of a load; what is embedded or ranked is computed in one batch."""
    memory = request.memory
    if memory is None and on_cpu:
        memory = machine.host_memory()
    if request.task != "generate" and request.context_length is None:
        context = min(request.model.context_length or _EMBED_CONTEXT, _EMBED_CONTEXT)
        # The longest input is one batch, which takes a quarter of the memory at most too.
        fits = memory and plan.tokens_in(memory / 4, 2 * _output_bytes(request.model))
        context = min(context, max(512, fits // plan.PAGE * plan.PAGE)) if fits else context
        request = msgspec.structs.replace(request, context_length=context)
    return plan_context(request, options, memory)


def plan_context(request: OpenRequest, options: Options, memory: int | None) -> CachePlan:
    """Choose slots and context so that the KV cache takes at most a quarter of `memory` bytes."""
    slots = options.slots or min(_DEFAULT_SLOTS, request.max_running or _DEFAULT_SLOTS)
    fits = None if memory is None else plan.tokens_in(memory / 4, _kv_bytes(request.model, options))
    return plan.plan_cache(
        request,
        slots,
        fits,
        limit="a quarter of the memory for models",
        kind="fixed" if options.slots else "divided",
    )


def check_memory(model: ModelFile, planned: CachePlan, options: Options, device: str) -> None:
    """Check that the KV cache could fit the host at all; the library would take what there is.

    Raises:
        LoadFailed: it could not.
    """
    needed, total = planned.tokens * _kv_bytes(model, options), machine.host_memory()
    if device == "cpu" and needed > total:
        raise LoadFailed(
            f"A context of {planned.context_length} tokens for {planned.slots} requests takes "
            f"{needed / 1e9:.1f} GB of KV cache, and this machine has {total / 1e9:.1f} GB. Set a "
            "smaller context_length."
        )


def _kv_bytes(model: ModelFile, options: Options) -> float:
    """Return the bytes of a token in the KV cache."""
    return (model.kv_bytes_per_token or 0) * _KV_SHARE[options.kv_type or "f16"]


def _output_bytes(model: ModelFile) -> int:
    """Return the bytes that the output layer makes for a token; 0 for a model without one."""
    if model.architecture in EMBEDDERS:
        return 0
    return 4 * model.vocabulary


def estimate(
    model: ModelFile, planned: CachePlan, options: Options, gpus: tuple[str, ...], *, whole: int = 0
) -> Footprint:
    """Return the memory that the model takes of the host, and of the GPUs that share its layers.

    An embedder computes its longest input, of `whole` tokens, in one batch, and the output layer of
    each of them, which is kept twice.

    Raises:
        LoadFailed: the header of its projector cannot be read.
    """
    words = model.vocabulary
    seen = None if whole else projector_of(model, options)
    sees = seen is not None
    batch = whole or batch_size(options, planned.slots, on_cpu=not gpus, sees=sees)
    batch = batch if sees or whole else min(batch, 512)
    size, seeing = model.size + (seen.size if seen else 0), seen.computed if seen else 0
    kv_cache = int(planned.tokens * _kv_bytes(model, options))
    activations = _PER_ACTIVATION * math.sqrt(model.parameters or 0) * batch
    outputs = whole * _output_bytes(model)
    computed = int(activations) + outputs + seeing
    overhead = _PROCESS + words * _PER_WORD + computed + outputs + planned.slots * _PER_SLOT
    devices = {"cpu": size + kv_cache + overhead}
    if gpus:
        share = _share(options.gpu_layers, model.layers)
        computed = max(computed, int(activations) + seeing + words * batch * 4)
        moved = int(share * (size + kv_cache)) + computed
        on_host = int((1 - share) * (size + kv_cache))
        devices = {"cpu": on_host + overhead + _CUDA_HOST}
        devices |= plan.divided(moved, gpus, _CUDA_DEVICE)
    return plan.footprint(devices, planned, weights=size, kv_cache=kv_cache)


def expected_device(wanted: str) -> str:
    """Return the device that a load will most likely take; many builds are without CUDA."""
    if wanted == "auto" and "cuda" not in _built_for():
        return "cpu"
    return plan.expected_device(wanted)


def _share(gpu_layers: int, layers: int) -> float:
    # The layer after the last, the output's, counts as one too.
    return 1.0 if gpu_layers < 0 else min(1.0, gpu_layers / (layers + 1))


def _stamp(path: str) -> tuple[int, int]:
    try:
        status = Path(path).stat()
    except OSError:
        return 0, 0
    return status.st_size, status.st_mtime_ns


@lru_cache(maxsize=64)
def _projector(path: Path, stamp: tuple[int, int]) -> Projector:
    del stamp
    return projector.read(path)


@lru_cache(maxsize=1)
def _built_for() -> tuple[str, ...]:
    """Return the kinds of GPUs that the library is built for, by the files that it brings."""
    spec = importlib.util.find_spec("xllamacpp")
    places = [Path(place) for place in (spec.submodule_search_locations or ())] if spec else []
    beside = [place.with_name("xllamacpp.libs") for place in places]
    names = [file.name for place in (*places, *beside) for file in place.glob("*")]
    kinds = {kind for word, kind in _LIBRARIES.items() if any(word in name for name in names)}
    metal = {"mps"} if spec and sys.platform == "darwin" else set[str]()
    return tuple(sorted(kinds | metal))
