"""One GGUF in a llama.cpp server that is called in process."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import xllamacpp
import xllamacpp.xllamacpp as library

from headrace.core.constraint import FORMS, TextForm
from headrace.core.errors import GenerationFailed, LoadFailed
from headrace.engines import threaded
from headrace.engines.base import EngineRequest, OpenRequest, RawEvent
from headrace.engines.llamacpp import (
    ABOUT,
    Options,
    batch_size,
    check_memory,
    device_kind,
    looked_up,
    plan_slots,
    projector_of,
)
from headrace.engines.llamacpp.call import Call, error_from
from headrace.engines.llamacpp.served import Served
from headrace.engines.llamacpp.server import Server
from headrace.engines.openmp import SpinGuard, physical_cores
from headrace.engines.plan import CachePlan

# The library's enumerations as numbers: its Python names for them change between releases.
_KV_TYPES = {"f16": 1, "bf16": 30, "q8_0": 8, "q4_0": 2}
_FLASH = {"auto": -1, "off": 0, "on": 1}
_ROPE = {"model": -1, "none": 0, "linear": 1, "yarn": 2}
_POOLING, _RANK = {"model": -1, "mean": 1, "cls": 2, "last": 3}, 4
_LOAD_MMAP, _LOAD_READ = 1, 0
_NO_SPLIT = 0
_DRAFTS = {"draft": 1, "ngram": 6}
_UNNORMALISED = -1


class Engine(Served):
    """One GGUF in one llama.cpp server, called in process, with its HTTP side restricted."""

    def __init__(self, request: OpenRequest) -> None:
        self._guard = SpinGuard(Options(**request.options).threads or physical_cores())
        super().__init__(request)

    def _events(
        self,
        request: EngineRequest,
        visible: Sequence[str],
        inbox: threaded.Inbox,
        threads: ThreadPoolExecutor,
    ) -> AsyncGenerator[RawEvent, None]:
        """Return the events of a request, which runs on a thread that mostly sleeps."""
        if self.facts.image_marker:
            return super()._events(request, visible, inbox, threads)

        def produce(emit: threaded.Emit[RawEvent]) -> None:
            call = Call(request, emit, self._split, visible, drafts=self._drafts)
            call.lora = self._lora(request)
            call.run(self._library())

        return threaded.stream(produce, inbox=inbox, executor=threads)

    def _vectors(self, body: dict[str, Any]) -> dict[str, Any]:
        answer = self._library().handle_embeddings(body)
        if "error" in answer:
            raise error_from(answer["error"])
        return answer

    def _ranking(self, body: dict[str, Any]) -> dict[str, Any]:
        answer = self._library().handle_rerank(body)
        if "error" in answer:
            raise error_from(answer["error"])
        return answer

    def _library(self) -> xllamacpp.Server:
        server = self._opened()
        if not isinstance(server, Server) or server.library is None:
            raise GenerationFailed("The engine is closed.")
        return server.library

    def close(self) -> None:
        """Free the model and remove the private directory."""
        self._guard.close()
        super().close()
        # The traceback of a failed request can hold the library's server in a cycle.
        gc.collect()

    def _grammar_library(self) -> str:
        return _grammar_library()

    def _takes_schemas(self) -> bool:
        return bool(_grammar_library())

    def _forms(self) -> frozenset[TextForm]:
        return frozenset(FORMS if _grammar_library() else ())

    def _load(self, request: OpenRequest) -> None:
        device = _device(request.device, xllamacpp.get_device_info())
        planned = plan_slots(request, self._options, on_cpu=device == "cpu")
        check_memory(request.model, planned, self._options, device)
        is_generator = self._task == "generate"
        seen = projector_of(request.model, self._options) if is_generator else None
        params = self._params(request, xllamacpp.CommonParams(), planned, device)
        if seen is not None:
            planned = self._undrafted(planned)
            self._prepare_images(params, seen.path, planned, on_cpu=device == "cpu")
        elif self._drafts:
            self._prepare_drafts(params, request)
        if device == "cpu":
            self._guard.start()
        streams = planned.slots if seen else 0
        self._link = Server(params, Path(self._model.path).name, streams)
        self._settle(request, planned, device)

    def _params(self, request: OpenRequest, params: Any, planned: CachePlan, device: str) -> Any:
        options, on_cpu = self._options, device == "cpu"
        params.model.path = self._model.path
        params.n_ctx = planned.tokens
        params.n_parallel = planned.slots
        params.kv_unified = params.fit_params = False
        threads = options.threads or physical_cores()
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        params.n_batch = batch_size(options, planned.slots, on_cpu=on_cpu)
        params.n_ubatch = min(params.n_batch, 512)
        if self._task != "generate":
            self._prepare_embeddings(params, planned.context_length)
        params.n_gpu_layers = 0 if on_cpu else options.gpu_layers
        if len(request.gpus) == 1:
            params.main_gpu = int(request.gpus[0].partition(":")[2])
            params.split_mode = _NO_SPLIT
        params.flash_attn_type = _FLASH[options.flash_attention]
        params.cache_type_k = params.cache_type_v = _KV_TYPES[options.kv_type or "f16"]
        params.cache_prompt = options.prefix_cache
        params.cache_ram_mib = 0
        params.lora_adapters = [
            xllamacpp.CommonAdapterLoraInfo(file.path, 0.0) for file in self._adapters
        ]
        params.lora_init_without_apply = True
        params.load_mode = _LOAD_MMAP if options.mmap else _LOAD_READ
        params.rope_scaling_type = _ROPE[options.rope_scaling]
        params.rope_freq_scale = 1 / options.rope_scale if options.rope_scale else 0.0
        params.verbosity = 0
        # It would parse and run the file's own template while it loads. Ours renders.
        params.chat_template = "chatml"
        return params

    def _prepare_images(self, params: Any, path: str, planned: CachePlan, *, on_cpu: bool) -> None:
        params.mmproj.path = path
        params.mmproj_use_gpu = not on_cpu
        # An image that looks at all of itself has to fit in one batch.
        size = batch_size(self._options, planned.slots, on_cpu=on_cpu, sees=True)
        params.n_batch = params.n_ubatch = size

    def _prepare_drafts(self, params: Any, request: OpenRequest) -> None:
        options, drafts = self._options, params.speculative
        drafts.types = [type(drafts.types[0])(_DRAFTS[options.way])]
        if request.draft is None:
            # It reads the slot's own text alone; others keep what was written for other clients.
            ngrams = drafts.ngram_simple
            ngrams.size_m = options.most_drafted
            ngrams.size_n = looked_up(options)
            return
        draft = drafts.draft
        draft.mparams.path, draft.n_max = request.draft.path, options.most_drafted
        draft.n_gpu_layers = params.n_gpu_layers
        draft.cache_type_k = draft.cache_type_v = params.cache_type_k
        for threads in (draft.cpuparams, draft.cpuparams_batch):
            threads.n_threads = params.cpuparams.n_threads

    def _prepare_embeddings(self, params: Any, context_length: int) -> None:
        params.embedding = True
        params.embd_normalize = _UNNORMALISED
        # With a cache of its own for each slot, inputs of different lengths are cut to equal
        # pieces and only the last piece is pooled: wrong vectors, and no error.
        params.kv_unified = True
        params.cache_prompt = False
        # An input has to fit in one batch.
        params.n_batch = params.n_ubatch = max(context_length, 512)
        # The library's own enumeration, of which no name is the same in all its releases.
        pooling = _RANK if self._task == "rerank" else _POOLING[self._options.pooling]
        params.pooling_type = type(params.pooling_type)(pooling)


@cache
def _grammar_library() -> str:
    """Return the file with the llguidance of this build; empty without one.

    Without it a schema could not be enforced: the library drops in silence what it cannot compile.
    """
    path = str(library.__file__)
    return path if hasattr(ctypes.CDLL(path), "llg_new_matcher") else ""


def _device(wanted: str, devices: Sequence[dict[str, Any]]) -> str:
    names = [str(device["name"]).lower() for device in devices]
    kinds = {*map(device_kind, names)}
    # The CPU is the last.
    available = [kind for kind in (*ABOUT.devices[1:], *ABOUT.devices[:1]) if kind in kinds]
    if wanted == "auto":
        return available[0] if available else "cpu"
    kind, _, number = wanted.partition(":")
    if kind not in available or (number and f"{kind}{number}" not in names):
        raise LoadFailed(f"This build of llama.cpp has no device {wanted}; it has {names}.")
    return kind
