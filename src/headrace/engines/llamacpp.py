"""llama.cpp through xllamacpp: any GGUF, continuous batching over slots, CPU or GPU."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import http.client
import os
import secrets
import shutil
import socket
import tempfile
from collections.abc import AsyncGenerator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec
from pydantic import Field

from headrace import machine
from headrace.core.errors import GenerationFailed, InvalidRequest, LoadFailed
from headrace.core.model import Capabilities
from headrace.core.status import Footprint
from headrace.engines import llamacpp_embed, threaded
from headrace.engines.base import (
    SAMPLING,
    About,
    EngineFacts,
    EngineOptions,
    EngineRequest,
    OpenRequest,
    RawEvent,
)
from headrace.engines.llamacpp_call import Call, error_from
from headrace.engines.llamacpp_size import (
    ContextPlan,
    Settings,
    estimate,
    expected_device,
    plan_context,
)
from headrace.engines.openmp import SpinGuard, physical_cores

if TYPE_CHECKING:
    import xllamacpp

ABOUT = About(
    formats=("gguf",),
    devices=("cpu", "cuda", "mps"),
    requires="xllamacpp",
    tasks=("generate", "embed"),
)

_CPU_BATCH = 128
_GPU_BATCH = 2048
# The library's enumerations as numbers: its Python names for them change between releases.
_KV_TYPES = {"f16": 1, "bf16": 30, "q8_0": 8, "q4_0": 2}
_FLASH = {"auto": -1, "off": 0, "on": 1}
_ROPE = {"model": -1, "none": 0, "linear": 1, "yarn": 2}
_LOAD_MMAP, _LOAD_READ = 1, 0


class Options(EngineOptions):
    """Settings of llama.cpp. All are fixed once the model is loaded."""

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
        description="Prompt tokens computed at once, after which a cancelled request is gone; "
        "by default 128 on a CPU and 2048 on a GPU.",
    )
    gpu_layers: int = Field(-1, ge=-1, description="Layers on the GPU; -1 is all of them.")
    flash_attention: Literal["auto", "on", "off"] = Field("auto", description="Flash attention.")
    kv_type: Literal["f16", "bf16", "q8_0", "q4_0"] | None = Field(
        None, description="Type of the KV cache; f16, or bf16 where answers must repeat themselves."
    )
    prefix_cache: bool = Field(True, description="Keep a prompt's KV cache for the next one.")
    mmap: bool = Field(True, description="Map the file instead of reading it.")
    rope_scaling: Literal["model", "none", "linear", "yarn"] = Field(
        "model", description="RoPE scaling; `model` takes what the file says."
    )
    pooling: Literal["model", "mean", "cls", "last"] = Field(
        "model", description="How an embedding is made of those of the tokens."
    )
    rope_scale: float = Field(0, ge=0, description="Factor by which the context is stretched.")


class Engine:
    """One GGUF in one llama.cpp server, called in process; its own HTTP side is locked away."""

    def __init__(self, request: OpenRequest) -> None:
        self._options = _settled(request)
        self._model = request.model
        self._embeds = request.task == "embed"
        self._private = Path(tempfile.mkdtemp(prefix="llamacpp-"))
        self._key = secrets.token_urlsafe(24)
        self._inbox: threaded.Inbox | None = None
        self._server: xllamacpp.Server | None = None
        self._threads: ThreadPoolExecutor | None = None
        self._guard = SpinGuard(self._options.threads or physical_cores())
        self._vocabulary = 0
        if request.task not in ABOUT.tasks:
            raise LoadFailed("This engine ranks nothing; sentence_transformers does.")
        try:
            self._load(request)
        except BaseException:
            self.close()
            raise

    def generate(self, request: EngineRequest) -> AsyncGenerator[RawEvent, None]:
        """Return what llama.cpp generates; each request has a thread that mostly sleeps."""
        if self._inbox is None:
            self._inbox = threaded.Inbox(asyncio.get_running_loop())
        server, threads = self._server, self._threads
        if server is None or threads is None:
            raise GenerationFailed("The engine is closed.")
        self._check((*request.token_ids, *request.answered))
        self._check(request.sampling.logit_bias, param="logit_bias")
        return threaded.stream(
            lambda emit: Call(request, emit, self._split).run(server),
            inbox=self._inbox,
            executor=threads,
        )

    def embed(self, batch: Sequence[Sequence[int]]) -> Sequence[bytes]:
        """Return what llama.cpp pools, as long as it is."""
        if self._server is None:
            raise GenerationFailed("The engine is closed.")
        for token_ids in batch:
            self._check(token_ids, param="input")
        return llamacpp_embed.embed(self._server, batch)

    def tokenize(self, text: str, *, add_special: bool) -> Sequence[int]:
        """Return token ids, markers included."""
        body = {"content": text, "add_special": add_special, "parse_special": True}
        return self._ask("/tokenize", body)["tokens"]

    def detokenize(self, token_ids: Sequence[int]) -> str:
        """Return text.

        Raises:
            InvalidRequest: an id is outside of the vocabulary.
        """
        self._check(token_ids)
        return self._ask("/detokenize", {"tokens": list(token_ids)})["content"]

    def shown(self, token_ids: Sequence[int]) -> str:
        """Return the text of token ids without control tokens, which a stream leaves out."""
        text = self.detokenize(token_ids)
        # Only a control token is found by its text when markers count, and not when they do not.
        unlike = {*self._split(text, markers=True)}.difference(self._split(text))
        silent = {one for one in unlike.intersection(token_ids) if self._is_control(one)}
        return self.detokenize([one for one in token_ids if one not in silent]) if silent else text

    def _is_control(self, token: int) -> bool:
        text = self.detokenize((token,))
        return self._split(text, markers=True) == (token,) != self._split(text)

    def _split(self, text: str, *, markers: bool = False) -> tuple[int, ...]:
        body = {"content": text, "add_special": False, "parse_special": markers}
        return tuple(self._ask("/tokenize", body)["tokens"])

    def close(self) -> None:
        """Free the model and remove the private directory."""
        self._server = None
        self._guard.close()
        if self._threads is not None:
            self._threads.shutdown(wait=False)
        # The traceback of a failed request can hold the server in a cycle.
        gc.collect()
        shutil.rmtree(self._private, ignore_errors=True)

    def _load(self, request: OpenRequest) -> None:
        import xllamacpp  # a native library: loaded with the model, not before

        device = _device(request.device, xllamacpp.get_device_info())
        plan = _plan(request, self._options, on_cpu=device == "cpu")
        params = self._params(xllamacpp.CommonParams(), plan, device)
        if device == "cpu":
            self._guard.start()
        try:
            self._server = xllamacpp.Server(params)
        except RuntimeError as error:
            raise LoadFailed(
                f"llama.cpp could not load {Path(self._model.path).name}.", detail=str(error)
            ) from error
        self._vocabulary = int(self._ask("/v1/models")["data"][0]["meta"]["n_vocab"])
        self.facts = self._facts(request, plan, device)
        if self._embeds:
            self.facts = self._embedding_facts(request)
        self._threads = ThreadPoolExecutor(plan.slots, "llamacpp")

    def _params(self, params: Any, plan: ContextPlan, device: str) -> Any:
        options, on_cpu = self._options, device == "cpu"
        params.model.path = self._model.path
        params.n_ctx = plan.context_length * plan.slots
        params.n_parallel = plan.slots
        params.kv_unified = params.fit_params = False
        threads = options.threads or physical_cores()
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        params.n_batch = max(_batch(options, on_cpu=on_cpu), plan.slots)
        params.n_ubatch = min(params.n_batch, 512)
        if self._embeds:
            llamacpp_embed.prepare(params, options.pooling, plan.context_length)
        params.n_gpu_layers = 0 if on_cpu else options.gpu_layers
        params.flash_attn_type = _FLASH[options.flash_attention]
        params.cache_type_k = params.cache_type_v = _KV_TYPES[options.kv_type or "f16"]
        params.cache_prompt = options.prefix_cache
        params.cache_ram_mib = 0
        params.load_mode = _LOAD_MMAP if options.mmap else _LOAD_READ
        params.rope_scaling_type = _ROPE[options.rope_scaling]
        params.rope_freq_scale = 1 / options.rope_scale if options.rope_scale else 0.0
        params.verbosity = 0
        self._lock_away(params)
        return params

    def _lock_away(self, params: Any) -> None:
        # The library always listens. A socket file in a directory that only this user may enter,
        # behind a random key, is the narrowest it offers; tokenising needs it.
        params.hostnames = [str(self._private / "s.sock")]
        params.api_keys = [self._key]
        params.ui = params.endpoint_slots = params.endpoint_props = params.endpoint_metrics = False
        params.n_threads_http = 2

    def _facts(self, request: OpenRequest, plan: ContextPlan, device: str) -> EngineFacts:
        props = self._ask("/props")
        granted = props["default_generation_settings"]["n_ctx"]
        if request.context_length is not None and granted < request.context_length:
            raise LoadFailed(
                f"context_length {request.context_length} is more than the model's {granted}."
            )
        return EngineFacts(
            device=device,
            context_length=min(granted, plan.context_length),
            max_running=plan.slots,
            chat_template=self._model.chat_template,
            bos_token=props["bos_token"],
            eos_token=props["eos_token"],
            adds_bos=bool(self.tokenize("", add_special=True)),
            notes=plan.notes,
            capabilities=Capabilities(
                sampling=SAMPLING,
                json_schema=True,
                batch_invariant=device == "cpu" and _repeats(self._options),
                resume=True,
            ),
        )

    def _embedding_facts(self, request: OpenRequest) -> EngineFacts:
        dimensions = len(self.embed([[0]])[0]) // 4
        capabilities = Capabilities(tasks=frozenset({"embed"}), dimensions=dimensions)
        most = min(llamacpp_embed.REQUESTS, request.max_running or llamacpp_embed.REQUESTS)
        return msgspec.structs.replace(
            self.facts, max_running=most, capabilities=capabilities, chat_template=None
        )

    def _check(self, token_ids: Iterable[int], *, param: str | None = None) -> None:
        # The library cuts an id to 32 bits before it looks: a wrong one can pass for another.
        if not all(0 <= token < self._vocabulary for token in token_ids):
            raise InvalidRequest("A token id is outside of the vocabulary.", param=param)

    def _ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        connection = _UnixConnection(str(self._private / "s.sock"))
        headers = {"Authorization": f"Bearer {self._key}", "Content-Type": "application/json"}
        with contextlib.closing(connection):
            content = None if body is None else msgspec.json.encode(body)
            connection.request("GET" if body is None else "POST", path, content, headers)
            response = connection.getresponse()
            answer = msgspec.json.decode(response.read())
        if "error" in answer:
            raise error_from(answer["error"])
        return answer


def footprint(request: OpenRequest) -> Footprint:
    """Estimate what loading takes, from the file's header and the options.

    Raises:
        LoadFailed: the header cannot be read.
    """
    options = _settled(request)
    device = expected_device(request.device)
    on_cpu = device == "cpu"
    settings = Settings(
        batch=_batch(options, on_cpu=on_cpu),
        kv_type=options.kv_type or "f16",
        gpu_layers=options.gpu_layers,
    )
    planned = estimate(request.model, _plan(request, options, on_cpu=on_cpu), settings, device)
    if request.task == "embed":
        most = min(llamacpp_embed.REQUESTS, request.max_running or llamacpp_embed.REQUESTS)
        return msgspec.structs.replace(planned, max_running=most)
    return planned


def tune_options(request: OpenRequest) -> Sequence[dict[str, Any]]:
    """Return what is worth a try: a smaller cache, larger batches, a slot for each request."""
    slots = {"slots": request.max_running or 1}
    small = {"kv_type": "q8_0", "flash_attention": "on"}
    logical = os.cpu_count() or 1
    more = [{**slots, "threads": logical}] if logical > physical_cores() else []
    alone = {**small, "batch_size": 256}
    return [alone, slots, {**slots, **small}, {**slots, "batch_size": 512}, *more]


def _plan(request: OpenRequest, options: Options, *, on_cpu: bool) -> ContextPlan:
    if request.task == "embed":
        request = llamacpp_embed.planned(request)
    memory = request.memory
    if memory is None and on_cpu:
        # All there is, not what is free now: the estimate and the load come to the same.
        memory = machine.host_memory()
    return plan_context(request, options.slots, options.kv_type or "f16", memory)


def _settled(request: OpenRequest) -> Options:
    """Return the options; of those that were not given, such that answers repeat if they must."""
    options = Options(**request.options)
    if not request.repeatable:
        return options
    flash = "on" if options.flash_attention == "auto" else options.flash_attention
    kv_type = options.kv_type or "bf16"
    return options.model_copy(update={"flash_attention": flash, "kv_type": kv_type})


def _repeats(options: Options) -> bool:
    # Found by trial, in 60 of 60 answers: with an f16 cache, prompts longer than a batch are
    # rounded differently in different company.
    return options.kv_type in {"bf16", "q8_0"} and options.flash_attention == "on"


def _batch(options: Options, *, on_cpu: bool) -> int:
    return options.batch_size or (_CPU_BATCH if on_cpu else _GPU_BATCH)


def _device(wanted: str, devices: Sequence[dict[str, Any]]) -> str:
    names = [str(device["name"]).lower() for device in devices]
    there = [
        ours
        for ours, theirs in (("cuda", "cuda"), ("mps", "mtl"), ("mps", "metal"), ("cpu", "cpu"))
        if any(name.startswith(theirs) for name in names)
    ]
    if wanted == "auto":
        return there[0] if there else "cpu"
    if wanted not in there:
        raise LoadFailed(f"This build of llama.cpp has no device {wanted}; it has {there}.")
    return wanted


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=60)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)
