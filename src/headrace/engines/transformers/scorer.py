"""Log probabilities of the tokens of a prompt: one forward pass, a part at a time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from headrace.core.events import PromptToken, TopLogprob
from headrace.engines import threaded
from headrace.engines.threaded import Emit
from headrace.engines.tokenizer import Vocabulary
from headrace.engines.transformers.answer import failure
from headrace.engines.transformers.lowrank import LowRank

_CHUNK = 256
# Rows of logits that are computed with at a time, in 32 bits.
_ROWS = 64


class Scorer:
    """The model on a thread, with a cache of its own for the prompt that is computed."""

    def __init__(
        self,
        model: Any,
        vocabulary: Vocabulary,
        thread: ThreadPoolExecutor | None,
        adapters: LowRank,
    ) -> None:
        self._adapters = adapters
        self._model = model
        self._vocabulary = vocabulary
        self._thread = thread or ThreadPoolExecutor(1, "prompts")
        self._owns_thread = thread is None
        self._inbox: threaded.Inbox | None = None

    def tokens(
        self, token_ids: Sequence[int], candidates: int, adapter: str
    ) -> AsyncGenerator[Sequence[PromptToken], None]:
        """Yield the tokens with their log probabilities, part after part."""
        if self._inbox is None:
            self._inbox = threaded.Inbox(asyncio.get_running_loop())
        return threaded.stream(
            lambda emit: self._run(token_ids, candidates, adapter, emit),
            inbox=self._inbox,
            executor=self._thread,
        )

    def close(self) -> None:
        """End the thread, if no other uses it."""
        if self._owns_thread:
            self._thread.shutdown(wait=False)

    def _run(
        self,
        token_ids: Sequence[int],
        candidates: int,
        adapter: str,
        emit: Emit[Sequence[PromptToken]],
    ) -> None:
        self._adapters.all_rows(adapter)
        try:
            with torch.inference_mode():
                part = [PromptToken(token_ids[0], self._vocabulary.full_data(token_ids[0]))]
                for begin, logits in self._logits(token_ids):
                    following = token_ids[begin + 1 : begin + 1 + len(logits)]
                    for start in range(0, len(following), _ROWS):
                        rows = logits[start : start + _ROWS]
                        part += self._scored(rows, following[start : start + _ROWS], candidates)
                    if emit(part):
                        return
                    part = []
        except RuntimeError as error:
            raise failure(str(error)) from error

    def _logits(self, token_ids: Sequence[int]) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield the place of a part, and the logits that follow each of its tokens."""
        # A recurrent model takes its prompt whole.
        size = len(token_ids) if getattr(self._model, "_is_stateful", False) else _CHUNK
        cache = None
        for begin in range(0, len(token_ids), size):
            part = torch.tensor([token_ids[begin : begin + size]], device=self._model.device)
            output = self._model(input_ids=part, past_key_values=cache, use_cache=True)
            cache = getattr(output, "past_key_values", None)
            yield begin, output.logits[0]

    def _scored(
        self, logits: torch.Tensor, token_ids: Sequence[int], candidates: int
    ) -> Iterator[PromptToken]:
        logprobs = logits[: len(token_ids)].float().log_softmax(-1)
        own = logprobs.gather(1, torch.tensor(token_ids, device=logprobs.device)[:, None])
        ranks = (logprobs > own).sum(-1).add(1).tolist()
        best = logprobs.topk(candidates)
        rows = zip(
            token_ids,
            own[:, 0].tolist(),
            ranks,
            best.indices.tolist(),
            best.values.tolist(),
            strict=True,
        )
        data = self._vocabulary.full_data
        for token, logprob, rank, ids, values in rows:
            pairs = zip(ids, values, strict=True)
            top = tuple(TopLogprob(other, data(other), value) for other, value in pairs)
            yield PromptToken(token, data(token), logprob, top, rank)
