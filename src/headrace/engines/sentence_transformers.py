"""sentence-transformers: embeddings of its models, and rankings by its cross-encoders."""

from __future__ import annotations

import importlib
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import msgspec
from pydantic import Field

from headrace.core.errors import ConfigError, InvalidRequest, LoadFailed, OutOfMemory
from headrace.core.model import Capabilities
from headrace.core.status import Footprint
from headrace.engines import base, plan
from headrace.engines.base import (
    About,
    BatchLimits,
    EngineFacts,
    EngineOptions,
    OpenRequest,
    Pair,
)
from headrace.engines.openmp import physical_cores
from headrace.models.folder import layer_sizes
from headrace.models.inspect import PICKLES

ABOUT = About(
    formats=("safetensors",),
    devices=("cpu", "cuda", "mps", "rocm"),
    confined=True,
    requires="sentence_transformers",
    extra="embeddings",
    tasks=("embed", "rerank"),
)

_PROCESS = 450 << 20
_CONTEXT = 512
_ITEMS_CPU, _ITEMS_GPU = 64, 512
# Forward passes that are timed when a model is loaded: a short text, and four longer, in tokens.
_SHORT, _LONG_CPU, _LONG_GPU = 8, 32, 128
_TIMING_S = 0.2
_MIN_PADDING = 16


class Options(EngineOptions):
    """Settings of sentence-transformers. All are fixed once the model is loaded."""

    dtype: Literal["auto", "float32", "float16", "bfloat16"] | None = Field(
        None, description="Type of the weights; `auto` is the file's, by default float32 on a CPU."
    )
    attention: Literal["eager", "sdpa", "flash_attention_2"] | None = Field(
        None, description="Implementation of attention; by default the library's choice."
    )
    batch_items: int | None = Field(
        None, ge=1, le=4096, description="Texts in one batch, at most; by default 64, on a GPU 512."
    )
    batch_tokens: int = Field(
        16384, ge=64, le=1 << 24, description="Tokens in one batch with its padding, at most."
    )
    threads: int | None = Field(
        None, ge=1, le=1024, description="CPU threads; by default one for each core it may use."
    )


class Engine(base.Embedder):
    """One model folder, local and without pickles or code of its own."""

    def __init__(self, request: OpenRequest) -> None:
        self._options = options = Options(**request.options)
        if request.task not in ABOUT.tasks:
            raise ConfigError("sentence_transformers embeds or ranks; set `task` to one of these.")
        folder = Path(request.model.path)
        _refuse_pickles(folder)
        self._torch = torch = importlib.import_module("torch")
        torch.set_num_threads(options.threads or physical_cores())
        device = plan.torch_device(request.device, torch)
        self._model: Any = _open(folder, request.task, device, options)
        self._tokenizer = self._model.tokenizer
        # Tokens that a pooling without the prompt leaves out, as in the library's `encode`.
        self._left_out = _left_out(self._model, request.prompt)
        # Nothing is truncated here, as the worker counts. The tokenizer's file and the call above
        # set a truncation.
        self._backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if self._backend is not None:
            self._backend.no_truncation()
            self._backend.no_padding()
        self._vocabulary = len(self._tokenizer)
        self._typed = "token_type_ids" in self._tokenizer.model_input_names
        self.facts = _facts(request, self._model, device)
        batch = _batch_limits(options, device)._replace(padding=self._forward_cost())
        fixed = self._left_out is not None
        self.facts = msgspec.structs.replace(self.facts, batch=batch, fixed_prompt=fixed)

    def embed(self, batch: Sequence[Sequence[int]]) -> Sequence[bytes]:
        """Return the vectors of the model's own modules."""
        with self._computing():
            features = self._features(batch)
            if self._left_out:
                features["prompt_length"] = self._left_out
            vectors = self._model(features)["sentence_embedding"]
            rows = vectors.to(self._torch.float32).cpu().numpy().astype("<f4", copy=False)
        return [row.tobytes() for row in rows]

    def pair(self, query: str, document: str) -> Pair:
        """Return the ids of both as the tokenizer joins them."""
        if self._backend is None:
            first = self.tokenize(query, add_special=False)
            joined = self._tokenizer(query, document)["input_ids"]
            return Pair(tuple(joined), len(joined) - len(first))
        encoding = self._backend.encode(query, document)
        second = next((at for at, text in enumerate(encoding.sequence_ids) if text == 1), None)
        return Pair(tuple(encoding.ids), len(encoding.ids) if second is None else second)

    def score(self, batch: Sequence[Pair]) -> Sequence[float]:
        """Return the model's scores after its own activation."""
        with self._computing():
            features = self._features([pair.token_ids for pair in batch])
            if self._typed:
                types = self._torch.zeros_like(features["input_ids"])
                for row, pair in zip(types, batch, strict=True):
                    row[pair.second : len(pair.token_ids)] = 1
                features["token_type_ids"] = types
            scores = self._model(features)["scores"].to(self._torch.float32)
            return self._model.activation_fn(scores).reshape(len(batch)).tolist()

    def tokenize(self, text: str, *, add_special: bool) -> Sequence[int]:
        """Return token ids."""
        if self._backend is not None:
            return self._backend.encode(text, add_special_tokens=add_special).ids
        return self._tokenizer(text, add_special_tokens=add_special)["input_ids"]

    def tokenize_all(self, texts: Sequence[str]) -> Sequence[Sequence[int]]:
        """Return the ids of each text with special tokens, computed on all cores."""
        if self._backend is None or len(texts) == 1:
            return [self.tokenize(text, add_special=True) for text in texts]
        return [encoding.ids for encoding in self._backend.encode_batch_fast(list(texts))]

    def detokenize(self, token_ids: Sequence[int]) -> str:
        """Return the text, as the tokenizer has it: often in lower case.

        Raises:
            InvalidRequest: an id is outside of the vocabulary.
        """
        self._check(token_ids, param="tokens")
        return self._tokenizer.decode(list(token_ids))

    def close(self) -> None:
        """Free the model and the GPU's memory."""
        self._model = None
        if self._torch.cuda.is_available():
            self._torch.cuda.empty_cache()

    def _features(self, batch: Sequence[Sequence[int]]) -> dict[str, Any]:
        ids = list(chain.from_iterable(batch))
        self._check(ids, param="input")
        torch, device = self._torch, self._model.device
        lengths, longest = torch.tensor([[len(row)] for row in batch]), max(map(len, batch))
        positions = torch.arange(longest)
        left = self._tokenizer.padding_side == "left"
        mask = positions >= longest - lengths if left else positions < lengths
        padded = torch.full(mask.shape, self._tokenizer.pad_token_id or 0)
        padded[mask] = torch.tensor(ids)
        return {
            "input_ids": padded.to(device),
            "attention_mask": mask.long().to(device),
            "modality": "text",
        }

    def _check(self, token_ids: Sequence[int], *, param: str) -> None:
        # On a GPU, an invalid id ends the whole process.
        if token_ids and not 0 <= min(token_ids) <= max(token_ids) < self._vocabulary:
            raise InvalidRequest("A token id is outside of the vocabulary.", param=param)

    def _forward_cost(self) -> int:
        """Measure how many tokens take as long as starting a forward pass."""
        long = _LONG_CPU if self.facts.device == "cpu" else _LONG_GPU
        special = len(self.tokenize("", add_special=True))
        short, long = (min(special + n, self.facts.context_length) for n in (_SHORT, long))
        one_text, whole = self._time(1, short), self._time(4, long)
        per_token = max(whole - one_text, 1e-9) / (4 * long - short)
        return int(
            min(max(one_text / per_token - short, _MIN_PADDING), self._options.batch_tokens / 4)
        )

    def _time(self, items: int, length: int) -> float:
        """Return the seconds of the fastest of up to four forward passes."""
        times = list[float]()
        while len(times) < 4 and sum(times) < _TIMING_S:
            began = time.perf_counter()
            if "embed" in self.facts.capabilities.tasks:
                self.embed([[0] * length] * items)
            else:
                self.score([Pair((0,) * length, 1)] * items)
            times.append(time.perf_counter() - began)
        return min(times)

    @contextmanager
    def _computing(self) -> Generator[None]:
        torch = self._torch
        try:
            with torch.inference_mode():
                yield
        except RuntimeError as error:
            is_memory = isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)
            if not is_memory:
                raise
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            raise OutOfMemory("torch ran out of memory.", detail=str(error)) from error


writes = plan.torch_caches


def footprint(request: OpenRequest) -> Footprint:
    """Estimate the process, the weights, and the largest batch.

    Raises:
        LoadFailed: the model's configuration is damaged.
    """
    options = Options(**request.options)
    wide = options.dtype in {None, "auto", "float32"}
    size = request.model.size
    weights = (request.model.parameters or size // 4) * 4 if wide else size
    context = request.context_length or request.model.context_length or _CONTEXT
    sizes = layer_sizes(Path(request.model.path))
    sizes = sizes._replace(eager=sizes.eager or options.attention == "eager")
    device = plan.expected_device(request.device)
    batch = plan.encoder_batch(sizes, _batch_limits(options, device), context)
    process = _PROCESS + plan.torch_libraries()
    devices = {"cpu": process + weights + batch}
    if gpus := plan.expected_gpus(request, device):
        devices = {"cpu": process} | plan.divided(weights + batch, gpus, 0)
    return Footprint(
        devices=devices,
        parts={"weights": weights, "batch": batch, "overhead": process},
        context_length=request.context_length or request.model.context_length,
        max_running=plan.encoder_requests(request),
    )


def _batch_limits(options: Options, device: str) -> BatchLimits:
    items = options.batch_items or (_ITEMS_CPU if device == "cpu" else _ITEMS_GPU)
    return BatchLimits(items, options.batch_tokens)


def _open(folder: Path, task: str, device: str, options: Options) -> Any:
    library = importlib.import_module("sentence_transformers")
    dtype = options.dtype or ("float32" if device == "cpu" else "auto")
    weights: dict[str, Any] = {"dtype": dtype, "use_safetensors": True}
    if options.attention is not None:
        weights["attn_implementation"] = options.attention
    kind = library.SentenceTransformer if task == "embed" else library.CrossEncoder
    with _no_progress_bar():
        model = kind(
            str(folder),
            device=device,
            trust_remote_code=False,
            local_files_only=True,
            model_kwargs=weights,
        ).eval()
    known = getattr(model[0], "modality_config", {})
    if "text" not in known or "message" in known:
        raise LoadFailed("Only models that read plain text run on this engine.")
    if task == "rerank" and model.num_labels != 1:
        raise LoadFailed(f"A model that ranks has one score; this one has {model.num_labels}.")
    return model


@contextmanager
def _no_progress_bar() -> Generator[None]:
    """Keep the progress bar of the weights off stderr, and other bars as they are."""
    logging = importlib.import_module("transformers.utils.logging")
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _facts(request: OpenRequest, model: Any, device: str) -> EngineFacts:
    limit = model.max_seq_length or request.model.context_length or _CONTEXT
    embeds = request.task == "embed"
    return EngineFacts(
        device=device,
        context_length=plan.granted_context(request, limit),
        max_running=plan.encoder_requests(request),
        capabilities=Capabilities(
            tasks=frozenset({request.task}),
            dimensions=model.get_embedding_dimension() if embeds else None,
        ),
    )


def _left_out(model: Any, prompt: str) -> int | None:
    """Return how many tokens of a prompt the model's pooling leaves out; None if it never does."""
    if all(getattr(module, "include_prompt", True) for module in model):
        return None
    return model[0]._get_prompt_length(prompt) if prompt else 0  # noqa: SLF001


def _refuse_pickles(folder: Path) -> None:
    """Check that no part of a folder would be read from a pickle.

    Raises:
        LoadFailed: naming the first such file.
    """
    for part in [folder, *(path for path in folder.iterdir() if path.is_dir())]:
        kinds = {path.suffix.lower(): path for path in part.iterdir() if path.is_file()}
        pickles = [path for suffix, path in kinds.items() if suffix in PICKLES]
        if pickles and ".safetensors" not in kinds:
            raise LoadFailed(f"{pickles[0]}: a pickle, which could run any code, is not loaded.")
