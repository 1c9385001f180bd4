"""A model in OpenVINO: a pipeline that generates, or a graph that embeds or ranks."""

from __future__ import annotations

import gc
from collections.abc import AsyncGenerator, Iterator, Sequence
from typing import TYPE_CHECKING

from headrace.core.errors import LoadFailed
from headrace.core.model import Capabilities
from headrace.engines.base import (
    Embedder,
    EngineFacts,
    EngineRequest,
    Generator,
    OpenRequest,
    RawEvent,
    Reranker,
)
from headrace.engines.openvino import BLOCK, Options, plan_cache, properties_of, settled
from headrace.engines.openvino.call import HONOURED, Stepper
from headrace.engines.openvino.conversion import needs_conversion, not_converted
from headrace.engines.openvino.vocabulary import Vocabulary, without_telemetry
from headrace.engines.plan import CachePlan
from headrace.engines.tokenizer import without_markers

if TYPE_CHECKING:
    from openvino_genai import ContinuousBatchingPipeline, SchedulerConfig, Tokenizer

_NOTE = "the library does not report how many prompt tokens came from the prefix cache: cached is 0"


class _TextEngine:
    """A model in a pipeline, which batches concurrent requests."""

    def __init__(self, request: OpenRequest) -> None:
        if needs_conversion(request.model):
            raise not_converted(request.model)
        import openvino_genai as genai  # a native library: loaded with the model, not before

        self._request = request
        self._options = options = settled(request)
        self._plan = planned = plan_cache(request, options)
        self._scheduler = _scheduler(genai.SchedulerConfig(), planned, options)
        self._tokenizer: Tokenizer | None = genai.Tokenizer(request.model.path)
        self.vocabulary = Vocabulary(self._tokenizer)
        self._stepper = Stepper(self._open, self.vocabulary)
        self.facts = self._facts()

    def generate(self, request: EngineRequest) -> AsyncGenerator[RawEvent, None]:
        """Return the events of a request."""
        self.vocabulary.check((*request.token_ids, *request.answered))
        return self._stepper.stream(request)

    def tokenize(self, text: str, *, add_special: bool) -> Sequence[int]:
        """Return token ids, markers included."""
        return self.vocabulary.tokenize(text, add_special=add_special)

    def detokenize(self, token_ids: Sequence[int]) -> str:
        """Return text.

        Raises:
            InvalidRequest: an id is outside of the vocabulary.
        """
        return self.vocabulary.text(token_ids)

    def plain_pieces(self, text: str, markers: Sequence[str]) -> Iterator[Sequence[int]]:
        """Yield the token ids of a text in which markers are text, piece after piece."""
        for piece in without_markers(text, (*self.vocabulary.control_texts, *markers)):
            yield self.vocabulary.tokenize(piece, add_special=False)

    def shown(self, token_ids: Sequence[int], visible: frozenset[int] = frozenset()) -> str:
        """Return the text of token ids without control tokens, which a stream leaves out."""
        return self.vocabulary.text(token_ids, hidden=self.vocabulary.control - visible)

    def close(self) -> None:
        """Free the model."""
        self._stepper.close()
        gc.collect()

    def _open(self) -> ContinuousBatchingPipeline:
        import openvino_genai as genai

        path, properties = self._request.model.path, properties_of(self._options)
        try:
            return genai.ContinuousBatchingPipeline(
                path, self._tokenizer, self._scheduler, "CPU", **properties
            )
        except RuntimeError as error:
            raise LoadFailed("OpenVINO could not load the model.", detail=str(error)) from error

    def _facts(self) -> EngineFacts:
        vocabulary = self.vocabulary
        return EngineFacts(
            device="cpu",
            context_length=self._plan.context_length,
            max_running=self._plan.slots,
            chat_template=self._request.model.chat_template,
            special_tokens=vocabulary.special_tokens,
            notes=(*self._plan.notes, _NOTE),
            capabilities=Capabilities(sampling=HONOURED, resume=True),
        )


def open_model(request: OpenRequest) -> Generator | Embedder | Reranker:
    """Load a model for its task.

    Raises:
        ConfigError, LoadFailed, OutOfMemory: it cannot be loaded.
    """
    if request.device not in {"auto", "cpu"}:
        raise LoadFailed(f"OpenVINO runs on the CPU here, not on {request.device}.")
    without_telemetry()
    if request.task == "generate":
        return _TextEngine(request)
    from headrace.engines.openvino.vectors import ScoreEngine, VectorEngine

    kinds = {"embed": VectorEngine, "rerank": ScoreEngine}
    return kinds[request.task](request, properties_of(settled(request)))


Engine = open_model


def _scheduler(config: SchedulerConfig, planned: CachePlan, options: Options) -> SchedulerConfig:
    config.num_kv_blocks = -(-planned.tokens // BLOCK) + 1
    config.max_num_seqs = planned.slots
    config.max_num_batched_tokens = max(options.batch_size, planned.slots)
    config.dynamic_split_fuse = True
    config.enable_prefix_caching = bool(options.prefix_cache)
    return config
