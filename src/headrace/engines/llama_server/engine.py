"""One GGUF in a server of llama.cpp that runs as a process of its own."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from headrace.core.constraint import FORMS, Constraint, TextForm
from headrace.core.errors import GenerationFailed, InvalidRequest, LoadFailed
from headrace.engines.base import EngineRequest, OpenRequest, RawEvent
from headrace.engines.llama_server import Options, executables, gbnf
from headrace.engines.llama_server.executables import Program
from headrace.engines.llama_server.server import Server
from headrace.engines.llamacpp import (
    batch_size,
    check_memory,
    looked_up,
    plan_slots,
    projector_of,
    settled,
)
from headrace.engines.llamacpp.call import in_lark
from headrace.engines.llamacpp.served import Served
from headrace.engines.openmp import physical_cores
from headrace.engines.plan import CachePlan
from headrace.text.grammar import grammar

_ALL_LAYERS = 999
_ERRORS = 1


class Engine(Served):
    """One GGUF in one llama-server, called over its private socket."""

    _options: Options

    def _settled(self, request: OpenRequest) -> Options:
        return settled(request, Options)

    def _load(self, request: OpenRequest) -> None:
        program = executables.chosen(self._options.executable)
        device = _device(request.device, program)
        planned = plan_slots(request, self._options, on_cpu=device == "cpu")
        check_memory(request.model, planned, self._options, device)
        if self._task == "generate" and projector_of(self._model, self._options) is not None:
            planned = self._undrafted(planned)
        arguments = [*self._arguments(request, planned, program, device)]
        command = [str(program.path), *arguments, *self._options.arguments]
        self._link = server = Server(command, Path(self._model.path).name)
        self._settle(request, planned, device)
        server.shows_log = True

    def generate(self, request: EngineRequest) -> AsyncGenerator[RawEvent, None]:
        """Return the events of a request; what the build cannot enforce is refused before."""
        if request.constraint is not None:
            self._constrained(request.constraint)
        return super().generate(request)

    def _forms(self) -> frozenset[TextForm]:
        return frozenset(FORMS if self._has_llguidance else gbnf.FORMS)

    def _constrained(self, constraint: Constraint) -> dict[str, Any]:
        return in_lark(constraint) if self._has_llguidance else gbnf.in_gbnf(constraint)

    @cached_property
    def _has_llguidance(self) -> bool:
        """Whether the executable was built with llguidance, which it refuses to use otherwise."""
        body = {"prompt": [0], "n_predict": 1, "grammar": grammar(Constraint(choice=("a",)))}
        with contextlib.suppress(InvalidRequest, GenerationFailed):
            self._ask("/completion", body)
            return True
        return False

    def _arguments(
        self, request: OpenRequest, planned: CachePlan, program: Program, device: str
    ) -> Iterator[str]:
        options, on_cpu = self._options, device == "cpu"
        threads = str(options.threads or physical_cores())
        yield from ("--model", self._model.path, "--alias", Path(self._model.path).name)
        yield from ("--ctx-size", str(planned.tokens), "--parallel", str(planned.slots))
        yield from ("--threads", threads, "--threads-batch", threads)
        yield from ("--threads-http", str(planned.slots + 2))
        yield from ("--flash-attn", options.flash_attention)
        for name in ("--cache-type-k", "--cache-type-v"):
            yield from (name, options.kv_type or "f16")
        yield from _placed(request, options, program, on_cpu=on_cpu)
        yield from self._batches(planned, on_cpu=on_cpu)
        for file in self._adapters:
            yield from ("--lora", _plain_path(file.path))
        if self._adapters:
            yield "--lora-init-without-apply"
        if options.rope_scaling != "model":
            yield from ("--rope-scaling", options.rope_scaling)
        if options.rope_scale:
            yield from ("--rope-scale", str(options.rope_scale))
        if not options.prefix_cache and self._task == "generate":
            yield "--no-cache-prompt"
        if not options.mmap:
            yield from ("--load-mode", "none") if program.knows("--load-mode") else ("--no-mmap",)
        if self._drafts:
            yield from _drafting(request, options, program)
        yield from _quiet(program)

    def _batches(self, planned: CachePlan, *, on_cpu: bool) -> Iterator[str]:
        seen = None if self._task != "generate" else projector_of(self._model, self._options)
        size = batch_size(self._options, planned.slots, on_cpu=on_cpu, sees=seen is not None)
        part = size if seen else min(size, 512)
        if seen is not None:
            yield from ("--mmproj", seen.path)
            if on_cpu:
                yield "--no-mmproj-offload"
        if self._task != "generate":
            # An input has to fit in one batch.
            size = part = max(planned.context_length, 512)
            yield from ("--kv-unified", "--embd-normalize", "-1")
            yield "--embedding" if self._task == "embed" else "--reranking"
            if self._options.pooling != "model":
                yield from ("--pooling", self._options.pooling)
        yield from ("--batch-size", str(size), "--ubatch-size", str(part))


def _plain_path(path: str) -> str:
    """Return the path of an adapter, of which the executable takes a list.

    Raises:
        LoadFailed: it would be taken for several.
    """
    if "," in path or '"' in path:
        raise LoadFailed(f"{path}: llama-server takes no path with a comma or a quote.")
    return path


def _placed(
    request: OpenRequest, options: Options, program: Program, *, on_cpu: bool
) -> Iterator[str]:
    if on_cpu:
        if program.devices:
            yield from ("--device", "none", "--n-gpu-layers", "0")
        return
    layers = _ALL_LAYERS if options.gpu_layers < 0 else options.gpu_layers
    yield from ("--n-gpu-layers", str(layers))
    names = [f"CUDA{gpu.partition(':')[2]}" for gpu in request.gpus]
    if names and "cuda" in program.kinds:
        yield from ("--device", ",".join(names))


def _drafting(request: OpenRequest, options: Options, program: Program) -> Iterator[str]:
    if not program.knows("--spec-type"):
        raise LoadFailed(f"{program.path} has no --spec-type: speculation needs a newer build.")
    most = str(options.most_drafted)
    if request.draft is None:
        yield from ("--spec-type", "ngram-simple", "--spec-ngram-simple-size-m", most)
        yield from ("--spec-ngram-simple-size-n", str(looked_up(options)))
        return
    yield from ("--spec-type", "draft-simple", "--spec-draft-model", request.draft.path)
    yield from ("--spec-draft-n-max", most)
    for name in ("--spec-draft-type-k", "--spec-draft-type-v"):
        yield from (name, options.kv_type or "f16")


def _quiet(program: Program) -> Iterator[str]:
    """Yield arguments for what Headrace does itself; builds differ in which they have."""
    # The server would parse and run the file's own template while it loads. Ours renders.
    yield from ("--chat-template", "chatml")
    wanted = {
        "--verbosity": (str(_ERRORS),),
        "--cache-ram": ("0",),
        "--fit": ("off",),
        "--no-slots": (),
        "--offline": (),
    }
    for name, values in wanted.items():
        if program.knows(name):
            yield from (name, *values)
    if interface := next(filter(program.knows, ("--no-ui", "--no-webui")), None):
        yield interface


def _device(wanted: str, program: Program) -> str:
    if wanted == "auto":
        return next(iter(program.kinds), "cpu")
    kind = wanted.partition(":")[0]
    if kind != "cpu" and kind not in program.kinds:
        names = ", ".join(device.name for device in program.devices) or "no GPU"
        raise LoadFailed(f"{program.path} has no device {wanted}; it has {names}.")
    return kind
