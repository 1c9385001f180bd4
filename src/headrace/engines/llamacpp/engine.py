"""One GGUF in a llama.cpp server that is called in process."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import ctypes
import gc
import http.client
import secrets
import shutil
import socket
import tempfile
from collections.abc import AsyncGenerator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import xllamacpp
import xllamacpp.xllamacpp as library

from headrace.core.errors import GenerationFailed, InvalidRequest, LoadFailed
from headrace.core.model import Capabilities
from headrace.engines import base, plan, threaded
from headrace.engines.base import EngineFacts, EngineRequest, OpenRequest, RawEvent
from headrace.engines.llamacpp import ABOUT, Options, batch_size, plan_slots, settled
from headrace.engines.llamacpp.call import HONOURED, Call, error_from
from headrace.engines.openmp import SpinGuard, physical_cores
from headrace.engines.plan import CachePlan

# The library's enumerations as numbers: its Python names for them change between releases.
_KV_TYPES = {"f16": 1, "bf16": 30, "q8_0": 8, "q4_0": 2}
_FLASH = {"auto": -1, "off": 0, "on": 1}
_ROPE = {"model": -1, "none": 0, "linear": 1, "yarn": 2}
_POOLING = {"model": -1, "mean": 1, "cls": 2, "last": 3}
_LOAD_MMAP, _LOAD_READ = 1, 0
_NO_SPLIT = 0
_UNNORMALISED = -1


class Engine(base.Embedder):
    """One GGUF in one llama.cpp server, called in process, with its HTTP side restricted."""

    def __init__(self, request: OpenRequest) -> None:
        self._options = settled(request)
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
        """Return the events of a request, which runs on a thread that mostly sleeps."""
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
        """Return the pooled vectors, not normalised."""
        if self._server is None:
            raise GenerationFailed("The engine is closed.")
        for token_ids in batch:
            self._check(token_ids, param="input")
        body = {"input": [list(token_ids) for token_ids in batch], "encoding_format": "base64"}
        answer = self._server.handle_embeddings(body)
        if "error" in answer:
            raise error_from(answer["error"])
        rows = sorted(answer["data"], key=lambda row: row["index"])
        return [base64.b64decode(row["embedding"]) for row in rows]

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
        # Only the text of a control token has other ids when markers are parsed.
        differing = {*self._split(text, markers=True)}.difference(self._split(text))
        control = set(filter(self._is_control, differing.intersection(token_ids)))
        if not control:
            return text
        return self.detokenize([token for token in token_ids if token not in control])

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
        device = _device(request.device, xllamacpp.get_device_info())
        planned = plan_slots(request, self._options, on_cpu=device == "cpu")
        params = self._params(request, xllamacpp.CommonParams(), planned, device)
        if device == "cpu":
            self._guard.start()
        try:
            self._server = xllamacpp.Server(params)
        except RuntimeError as error:
            raise LoadFailed(
                f"llama.cpp could not load {Path(self._model.path).name}.", detail=str(error)
            ) from error
        self._vocabulary = int(self._ask("/v1/models")["data"][0]["meta"]["n_vocab"])
        self.facts = self._facts(request, planned, device)
        if self._embeds:
            self.facts = self._embedding_facts(request)
        self._threads = ThreadPoolExecutor(planned.slots, "llamacpp")

    def _params(self, request: OpenRequest, params: Any, planned: CachePlan, device: str) -> Any:
        options, on_cpu = self._options, device == "cpu"
        params.model.path = self._model.path
        params.n_ctx = planned.tokens
        params.n_parallel = planned.slots
        params.kv_unified = params.fit_params = False
        threads = options.threads or physical_cores()
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        params.n_batch = max(batch_size(options, on_cpu=on_cpu), planned.slots)
        params.n_ubatch = min(params.n_batch, 512)
        if self._embeds:
            self._prepare_embeddings(params, planned.context_length)
        params.n_gpu_layers = 0 if on_cpu else options.gpu_layers
        if len(request.gpus) == 1:
            params.main_gpu = int(request.gpus[0].partition(":")[2])
            params.split_mode = _NO_SPLIT
        params.flash_attn_type = _FLASH[options.flash_attention]
        params.cache_type_k = params.cache_type_v = _KV_TYPES[options.kv_type or "f16"]
        params.cache_prompt = options.prefix_cache
        params.cache_ram_mib = 0
        params.load_mode = _LOAD_MMAP if options.mmap else _LOAD_READ
        params.rope_scaling_type = _ROPE[options.rope_scaling]
        params.rope_freq_scale = 1 / options.rope_scale if options.rope_scale else 0.0
        params.verbosity = 0
        self._restrict_http(params)
        return params

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
        params.pooling_type = type(params.pooling_type)(_POOLING[self._options.pooling])

    def _restrict_http(self, params: Any) -> None:
        # The library always listens, and tokenising needs it. A socket file in a directory that
        # only this user may enter, with a random key, is the most restricted way that it has.
        params.hostnames = [str(self._private / "s.sock")]
        params.api_keys = [self._key]
        params.ui = params.endpoint_slots = params.endpoint_props = params.endpoint_metrics = False
        params.n_threads_http = 2

    def _facts(self, request: OpenRequest, planned: CachePlan, device: str) -> EngineFacts:
        props = self._ask("/props")
        granted = props["default_generation_settings"]["n_ctx"]
        plan.granted_context(request, granted)
        grammar_library = _grammar_library()
        return EngineFacts(
            device=device,
            context_length=min(granted, planned.context_length),
            max_running=planned.slots,
            chat_template=self._model.chat_template,
            bos_token=props["bos_token"],
            eos_token=props["eos_token"],
            notes=planned.notes,
            grammar_library=grammar_library,
            capabilities=Capabilities(
                sampling=HONOURED,
                json_schema=bool(grammar_library),
                batch_invariant=device == "cpu" and _is_reproducible(self._options),
                resume=True,
            ),
        )

    def _embedding_facts(self, request: OpenRequest) -> EngineFacts:
        dimensions = len(self.embed([[0]])[0]) // 4
        return msgspec.structs.replace(
            self.facts,
            max_running=plan.encoder_requests(request),
            capabilities=Capabilities(tasks=frozenset({"embed"}), dimensions=dimensions),
            chat_template=None,
        )

    def _check(self, token_ids: Iterable[int], *, param: str | None = None) -> None:
        # The library truncates an id to 32 bits before it checks it.
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


def _grammar_library() -> str:
    """Return the file with the llguidance of this build; empty without one.

    Without it a schema could not be enforced: the library drops in silence what it cannot compile.
    """
    path = str(library.__file__)
    return path if hasattr(ctypes.CDLL(path), "llg_new_matcher") else ""


def _is_reproducible(options: Options) -> bool:
    # Measured, in 60 of 60 answers: with an f16 cache, rounding in prompts longer than a batch
    # depends on the concurrent requests.
    return options.kv_type in {"bf16", "q8_0"} and options.flash_attention == "on"


def _device(wanted: str, devices: Sequence[dict[str, Any]]) -> str:
    names = [str(device["name"]).lower() for device in devices]
    available = [
        ours
        for ours, theirs in (("cuda", "cuda"), ("mps", "mtl"), ("mps", "metal"), ("cpu", "cpu"))
        if any(name.startswith(theirs) for name in names)
    ]
    if wanted == "auto":
        return available[0] if available else "cpu"
    kind, _, number = wanted.partition(":")
    if kind not in available or (number and f"{kind}{number}" not in names):
        raise LoadFailed(f"This build of llama.cpp has no device {wanted}; it has {names}.")
    return kind


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=60)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)
