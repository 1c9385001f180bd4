"""One GGUF in a llama.cpp server that is called in process."""

from __future__ import annotations

import asyncio
import base64
import ctypes
import gc
from collections.abc import AsyncGenerator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import msgspec
import xllamacpp
import xllamacpp.xllamacpp as library

from headrace.core.constraint import FORMS
from headrace.core.errors import GenerationFailed, InvalidRequest, LoadFailed, Unsupported
from headrace.core.model import Capabilities
from headrace.engines import base, plan, threaded
from headrace.engines.abilities import longest_text
from headrace.engines.base import EngineFacts, EngineRequest, OpenRequest, RawEvent
from headrace.engines.llamacpp import (
    ABOUT,
    Options,
    batch_size,
    check_memory,
    plan_slots,
    projector_of,
    settled,
)
from headrace.engines.llamacpp.call import HONOURED, Call, error_from
from headrace.engines.llamacpp.native import NativeCall
from headrace.engines.llamacpp.pieces import SENTINEL, SIZE, Pieces
from headrace.engines.llamacpp.server import Server
from headrace.engines.openmp import SpinGuard, physical_cores
from headrace.engines.plan import CachePlan
from headrace.engines.tokenizer import without_markers

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
        self._inbox: threaded.Inbox | None = None
        self._server: Server | None = None
        self._threads: ThreadPoolExecutor | None = None
        self._guard = SpinGuard(self._options.threads or physical_cores())
        self._vocabulary = 0
        self._texts: dict[int, str] = {}
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
        library, threads = self._opened().library, self._threads
        if library is None or threads is None:
            raise GenerationFailed("The engine is closed.")
        self._check((*request.token_ids, *request.answered))
        self._check(request.sampling.logit_bias, param="logit_bias")
        visible = [self._text(token) for token in request.visible]
        if request.media:
            request = self._with_text(request)
        return threaded.stream(
            lambda emit: self._call(request, emit, visible).run(library),
            inbox=self._inbox,
            executor=threads,
        )

    def _call(
        self, request: EngineRequest, emit: threaded.Emit[RawEvent], visible: Sequence[str]
    ) -> Call:
        if self.facts.capabilities.vision:
            return NativeCall(request, emit, self._split, self._opened(), visible)
        return Call(request, emit, self._split, visible)

    def _with_text(self, request: EngineRequest) -> EngineRequest:
        if request.sampling.logprobs is not None:
            raise Unsupported("Log-probabilities do not go with images here.", param="logprobs")
        # The library puts it before each text.
        bos = self.facts.bos_token
        return msgspec.structs.replace(request, text=request.text.removeprefix(bos))

    def embed(self, batch: Sequence[Sequence[int]]) -> Sequence[bytes]:
        """Return the pooled vectors, not normalised."""
        library = self._opened().library
        if library is None:
            raise GenerationFailed("The engine is closed.")
        for token_ids in batch:
            self._check(token_ids, param="input")
        body = {"input": [list(token_ids) for token_ids in batch], "encoding_format": "base64"}
        answer = library.handle_embeddings(body)
        if "error" in answer:
            raise error_from(answer["error"])
        rows = sorted(answer["data"], key=lambda row: row["index"])
        return [base64.b64decode(row["embedding"]) for row in rows]

    def tokenize(self, text: str, *, add_special: bool) -> Sequence[int]:
        """Return token ids, markers included."""
        return [*chain.from_iterable(self.tokenize_pieces(text, add_special=add_special))]

    def tokenize_pieces(self, text: str, *, add_special: bool) -> Iterator[Sequence[int]]:
        """Yield what `tokenize` returns, piece after piece: of long texts it takes long."""
        if len(text) <= SIZE:
            yield self._tokens(text, add_special=add_special)
            return
        before, after = self._around if add_special else ((), ())
        yield before
        yield from self._cut(text)
        yield after

    def _cut(self, text: str, *, markers: bool = True) -> Iterator[Sequence[int]]:
        pieces = (text,) if len(text) <= SIZE else self._pieces.cut(text)
        for number, piece in enumerate(pieces):
            self._check_length(piece)
            ids = self._tokens(piece, markers=markers)
            continues = number and piece.startswith(SENTINEL)
            yield ids[len(self._sentinel) :] if continues else ids

    def _check_length(self, piece: str) -> None:
        most = longest_text(self.facts)
        if len(piece) * 4 > most and len(piece.encode()) > most:
            raise InvalidRequest(
                f"More than {most} bytes of the text have no place where it can be cut into words.",
                param="prompt",
            )

    def plain_pieces(self, text: str, markers: Sequence[str]) -> Iterator[Sequence[int]]:
        """Yield the token ids of a text in which markers are text, piece after piece."""
        for part in without_markers(text, markers):
            yield from self._cut(part, markers=False)

    def detokenize(self, token_ids: Sequence[int]) -> str:
        """Return text.

        Raises:
            InvalidRequest: an id is outside of the vocabulary.
        """
        self._check(token_ids)
        return self._ask("/detokenize", {"tokens": list(token_ids)})["content"]

    def shown(self, token_ids: Sequence[int], visible: frozenset[int] = frozenset()) -> str:
        """Return the text of token ids without control tokens, which a stream leaves out."""
        text = self.detokenize(token_ids)
        # Only the text of a control token has other ids when markers are parsed.
        differing = {*self._split(text, markers=True)}.difference(self._split(text), visible)
        control = set(filter(self._is_control, differing.intersection(token_ids)))
        if not control:
            return text
        return self.detokenize([token for token in token_ids if token not in control])

    def _text(self, token: int) -> str:
        if token not in self._texts:
            self._texts[token] = self.detokenize((token,))
        return self._texts[token]

    def _is_control(self, token: int) -> bool:
        text = self.detokenize((token,))
        return self._split(text, markers=True) == (token,) != self._split(text)

    def _split(self, text: str, *, markers: bool = False) -> tuple[int, ...]:
        return self._tokens(text, markers=markers)

    def _tokens(
        self, text: str, *, add_special: bool = False, markers: bool = True
    ) -> tuple[int, ...]:
        body = {"content": text, "add_special": add_special, "parse_special": markers}
        return tuple(self._ask("/tokenize", body)["tokens"])

    @cached_property
    def _pieces(self) -> Pieces:
        # Read when the first long text comes: it takes a moment.
        longest = longest_text(self.facts)
        return Pieces(Path(self._model.path), self._model.tokenizer or "", longest)

    @cached_property
    def _sentinel(self) -> tuple[int, ...]:
        return self._tokens(SENTINEL)

    @cached_property
    def _around(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The tokens that are put before and after a text."""
        plain, full = self._tokens("a"), self._tokens("a", add_special=True)
        size = len(plain)
        at = next(n for n in range(len(full)) if full[n : n + size] == plain)
        return full[:at], full[at + size :]

    def close(self) -> None:
        """Free the model and remove the private directory."""
        server, self._server = self._server, None
        self._guard.close()
        if self._threads is not None:
            self._threads.shutdown(wait=False)
        if server is not None:
            server.close()
        # The traceback of a failed request can hold the library's server in a cycle.
        gc.collect()

    def _load(self, request: OpenRequest) -> None:
        device = _device(request.device, xllamacpp.get_device_info())
        planned = plan_slots(request, self._options, on_cpu=device == "cpu")
        check_memory(request.model, planned, self._options, device)
        seen = None if self._embeds else projector_of(request.model, self._options)
        params = self._params(request, xllamacpp.CommonParams(), planned, device)
        if seen is not None:
            self._prepare_images(params, seen.path, planned, on_cpu=device == "cpu")
        if device == "cpu":
            self._guard.start()
        streams = planned.slots if seen else 0
        self._server = Server(params, Path(self._model.path).name, streams)
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
        # It would parse and run the file's own template while it loads. Ours renders.
        params.chat_template = "chatml"
        return params

    def _prepare_images(self, params: Any, path: str, planned: CachePlan, *, on_cpu: bool) -> None:
        params.mmproj.path = path
        params.mmproj_use_gpu = not on_cpu
        # An image that looks at all of itself has to fit in one batch.
        size = max(batch_size(self._options, on_cpu=on_cpu, sees=True), planned.slots)
        params.n_batch = params.n_ubatch = size

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

    def _facts(self, request: OpenRequest, planned: CachePlan, device: str) -> EngineFacts:
        props = self._ask("/props")
        granted = props["default_generation_settings"]["n_ctx"]
        sees = bool(props.get("modalities", {}).get("vision"))
        plan.granted_context(request, granted)
        grammar_library = _grammar_library()
        return EngineFacts(
            device=device,
            context_length=min(granted, planned.context_length),
            max_running=planned.slots,
            chat_template=self._model.chat_template,
            special_tokens=self._special_tokens(),
            max_token_bytes=self._model.max_token_bytes,
            notes=planned.notes,
            grammar_library=grammar_library,
            image_marker=props.get("media_marker", "") if sees else "",
            infill_ids=tuple(n for n in self._model.infill_ids if n < self._vocabulary),
            capabilities=Capabilities(
                sampling=HONOURED,
                json_schema=bool(grammar_library),
                forms=frozenset(FORMS if grammar_library else ()),
                batch_invariant=device == "cpu" and _is_reproducible(self._options),
                resume=True,
                vision=sees,
            ),
        )

    def _special_tokens(self) -> dict[str, str]:
        # The library's own defaults are other tokens where the file names none.
        ids = self._model.special_ids.items()
        return {name: self.detokenize((n,)) for name, n in ids if n < self._vocabulary}

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
        return self._opened().ask(path, body)

    def _opened(self) -> Server:
        if self._server is None:
            raise GenerationFailed("The engine is closed.")
        return self._server


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
