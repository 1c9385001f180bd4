"""Embedders and cross-encoders on OpenVINO: one graph, token ids in, vectors or scores out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from headrace.core.errors import InvalidRequest, LoadFailed, OutOfMemory
from headrace.core.model import Capabilities
from headrace.engines import plan
from headrace.engines.base import Embedder, EngineFacts, OpenRequest, Pair
from headrace.engines.openvino import ENCODER_BATCH, ENCODER_CONTEXT
from headrace.engines.openvino.vocabulary import Vocabulary
from headrace.models import folder, openvino

Array = Any  # of numpy
_POOLINGS = ("mean", "cls", "max", "lasttoken")
# Models like RoBERTa have two separators between the texts of a pair.
_TWO_SEPARATORS = ("roberta", "camembert")


class _GraphEngine:
    """A graph that is compiled for batches of any length."""

    def __init__(self, request: OpenRequest, properties: dict[str, Any]) -> None:
        import openvino as ov
        import openvino_genai as genai

        self._folder = path = Path(request.model.path)
        self._config = folder.read_json(path / "config.json")
        # Vectors are compared with those of other engines, made in full precision.
        properties = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"} | properties
        graph = str(path / openvino.MODEL)
        try:
            self._graph: Any = ov.Core().compile_model(graph, "CPU", properties)
        except RuntimeError as error:
            raise LoadFailed("OpenVINO could not load the model.", detail=str(error)) from error
        self._inputs = {tensor.get_any_name() for tensor in self._graph.inputs}
        self._vocabulary = Vocabulary(genai.Tokenizer(str(path)))
        self._context = plan.granted_context(
            request, request.model.context_length or ENCODER_CONTEXT
        )
        self._requests = plan.encoder_requests(request)

    def tokenize(self, text: str, *, add_special: bool) -> Sequence[int]:
        """Return token ids, markers included."""
        return self._vocabulary.tokenize(text, add_special=add_special)

    def detokenize(self, token_ids: Sequence[int]) -> str:
        """Return the text of token ids, as the tokenizer has it.

        Raises:
            InvalidRequest: an id is outside of the vocabulary.
        """
        return self._vocabulary.decoded(token_ids)

    def close(self) -> None:
        """Free the model."""
        self._graph = None

    def _facts(self, capabilities: Capabilities) -> EngineFacts:
        return EngineFacts(
            device="cpu",
            context_length=self._context,
            max_running=self._requests,
            batch=ENCODER_BATCH,
            special_tokens=self._vocabulary.special_tokens,
            capabilities=capabilities,
        )

    def _run(
        self, batch: Sequence[Sequence[int]], seconds: Sequence[int] = ()
    ) -> tuple[Array, Array]:
        """Run the graph on padded token ids; return its output and the mask."""
        import numpy as np

        for row in batch:
            self._vocabulary.check(row)
        shape = (len(batch), max(map(len, batch)))
        names = ("input_ids", "attention_mask", "token_type_ids")
        ids, mask, types = (np.zeros(shape, dtype=np.int64) for _ in names)
        ids += self._vocabulary.pad
        for at, row in enumerate(batch):
            ids[at, : len(row)] = row
            mask[at, : len(row)] = 1
        for at, second in enumerate(seconds):
            types[at, second : len(batch[at])] = 1
        arrays = dict(zip(names, (ids, mask, types), strict=True))
        try:
            outputs = self._graph({name: arrays[name] for name in self._inputs})
        except RuntimeError as error:
            if "alloc" in str(error):
                raise OutOfMemory("OpenVINO ran out of memory.", detail=str(error)) from error
            raise
        return outputs[0], mask


class VectorEngine(_GraphEngine, Embedder):
    """An embedder: the graph's last layer, pooled as in the model's own modules."""

    def __init__(self, request: OpenRequest, properties: dict[str, Any]) -> None:
        super().__init__(request, properties)
        self._pooling, self._normalized = modules_of(self._folder)
        size = self._graph.output(0).get_partial_shape()[-1].get_length()
        self.facts = self._facts(Capabilities(tasks=frozenset({"embed"}), dimensions=size))

    def embed(self, batch: Sequence[Sequence[int]]) -> Sequence[bytes]:
        """Return one vector for each list of token ids."""
        import numpy as np

        if not all(batch):
            raise InvalidRequest("An input is empty.", param="input")
        hidden, mask = self._run(batch)
        vectors = pooled(hidden, mask, self._pooling) if hidden.ndim == 3 else hidden
        if self._normalized:
            vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        return [row.tobytes() for row in vectors.astype("<f4")]


class ScoreEngine(_GraphEngine):
    """A cross-encoder with one score."""

    def __init__(self, request: OpenRequest, properties: dict[str, Any]) -> None:
        super().__init__(request, properties)
        size = self._graph.output(0).get_partial_shape()[-1].get_length()
        if size != 1:
            raise LoadFailed(f"A model that ranks has one score; this one has {size}.")
        self._plain = _activation(self._config).endswith("Identity")
        self.facts = self._facts(Capabilities(tasks=frozenset({"rerank"})))

    def pair(self, query: str, document: str) -> Pair:
        """Return the ids of both as the model was trained on them."""
        marked, bare = (self.tokenize("a", add_special=special) for special in (True, False))
        at = next(i for i in range(len(marked)) if marked[i : i + len(bare)] == bare)
        first, last = marked[:at], marked[at + len(bare) :]
        kind = str(self._config.get("model_type", ""))
        between = [*last, *last] if any(name in kind for name in _TWO_SEPARATORS) else last
        before = (*first, *self.tokenize(query, add_special=False), *between)
        return Pair((*before, *self.tokenize(document, add_special=False), *last), len(before))

    def score(self, batch: Sequence[Pair]) -> Sequence[float]:
        """Return the score of each pair, between 0 and 1 unless the model has no activation."""
        rows = [pair.token_ids for pair in batch]
        scores, _ = self._run(rows, [pair.second for pair in batch])
        return [self._shaped(float(score)) for score in scores.reshape(-1)]

    def _shaped(self, score: float) -> float:
        if self._plain:
            return score
        return 1 / (1 + math.exp(-score)) if score > -700 else 0.0


def pooled(hidden: Array, mask: Array, pooling: str) -> Array:
    """Pool the vectors of all tokens, without padding, into one."""
    import numpy as np

    seen = mask[:, :, None].astype(np.float32)
    if pooling == "mean":
        return (hidden * seen).sum(axis=1) / np.maximum(seen.sum(axis=1), 1e-9)
    if pooling == "max":
        return np.where(seen > 0, hidden, -np.inf).max(axis=1).astype(np.float32)
    at = mask.sum(axis=1) - 1 if pooling == "lasttoken" else np.zeros(len(mask), np.int64)
    return hidden[np.arange(len(mask)), at]


def modules_of(path: Path) -> tuple[str, bool]:
    """Return how a model pools, and whether it normalises.

    Raises:
        LoadFailed: it has an unsupported module.
    """
    names = openvino.module_types(path)
    unknown = [name for name in names if name not in {"Transformer", "Pooling", "Normalize"}]
    if unknown:
        raise LoadFailed(f"{path}: modules that OpenVINO's engine does not have: {unknown}.")
    files = path.glob("*_Pooling/config.json")
    poolings = [name for file in files for name in _poolings(file)]
    if len(poolings) > 1:
        raise LoadFailed(f"{path}: it joins several poolings: {poolings}.")
    return poolings[0] if poolings else "mean", "Normalize" in names


def _poolings(file: Path) -> list[str]:
    config = folder.read_json(file)
    if (named := config.get("pooling_mode")) in _POOLINGS:
        return [str(named)]
    keys = {"mean": "mean_tokens", "cls": "cls_token", "max": "max_tokens"}
    return [name for name in _POOLINGS if config.get(f"pooling_mode_{keys.get(name, name)}")]


def _activation(config: dict[str, Any]) -> str:
    own = config.get("sentence_transformers")
    table = cast("dict[str, Any]", own) if isinstance(own, dict) else {}
    named = table.get("activation_fn") or config.get("sbert_ce_default_activation_function")
    return str(named or "")
