"""Drafts in the library's continuous batching, which has one token of each request in a step.

Some of its methods are replaced. The scheduler is given a draft behind the last token of a request;
the model computes the logits of all of them; and the processor of logits chooses one token after
the other, as long as the draft has the same. Those are put into the request before the manager adds
the last one. Keys and values of wrong tokens are behind its end, and overwritten by the next step.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from headrace.engines.drafting import Gain
from headrace.engines.transformers.answer import settle
from headrace.engines.transformers.batched import GREEDY, Call, Processors, call_of
from headrace.engines.transformers.lowrank import LowRank

_SLIDING = "sliding_attention"


class _Row(NamedTuple):
    """A request that gets tokens in a step: the first of its logits, and its draft."""

    future: Any
    call: Call | None
    first: int
    draft: Sequence[int]

    @property
    def state(self) -> Any:
        """The manager's state of the request."""
        return self.future.state


class Drafting(Processors):
    """Processors of logits that put drafts into the steps, and check them."""

    def __init__(self, adapters: LowRank, gain: Gain) -> None:
        super().__init__(adapters)
        self._gain = gain
        self._batches: Any = None
        self._drafts: dict[str, list[int]] = {}
        self._rows: list[_Row] = []
        self._computed: list[int] = []
        self._is_decoding = False
        self._made = 0
        self._began = 0.0

    def attach(self, batches: Any) -> None:
        """Put drafts into the batches of a manager, unless its cache has a window.

        There, wrong tokens would overwrite the oldest.
        """
        if _SLIDING in batches.cache.cache_allocators:
            return
        self._batches = batches
        self._schedule_batch = batches.scheduler.schedule_batch
        batches.scheduler.schedule_batch = self._schedule
        self._model_kwargs = batches.inputs_and_outputs.get_model_kwargs
        batches.inputs_and_outputs.get_model_kwargs = self._with_drafts
        self._update_batch = batches.update_batch
        batches.update_batch = self._updated

    @property
    def drafts(self) -> bool:
        """Whether tokens can be drafted."""
        return self._batches is not None

    def _schedule(self, token_budget: int, cache_budget: int) -> Any:
        self._propose(token_budget)
        return self._schedule_batch(token_budget, cache_budget)

    def _propose(self, budget: int) -> None:
        """Put drafts behind the last tokens of requests, as far as the step has room for them."""
        self._drafts.clear()
        states = [state for state in self._active() if state.generated_tokens]
        allowed = self._gain.allows(len(states))
        left = budget - len(states)
        for state in states:
            last, call = state.generated_tokens[-1], call_of(state)
            draft: list[int] = []
            if call is not None and call.ngrams is not None:
                call.catch_up(state)
                most = min(left, state.max_new_tokens - len(state.generated_tokens) - 1)
                draft = call.ngrams.draft(most) if allowed else []
            if draft and self._fits(state, draft):
                self._drafts[state.request_id] = draft
                left -= len(draft)
            else:
                draft = []
            state.tokens_to_process = [last, *draft]

    def _active(self) -> Iterator[Any]:
        active = self._batches.scheduler.active_requests.values()
        return (state for state in active if state.status.name == "DECODING")

    def _fits(self, state: Any, draft: Sequence[int]) -> bool:
        cache = self._batches.cache
        return cache.can_store_request_tokens(state, 1 + len(draft), dry_run=True)

    def prepare_tensor_args(self, requests_in_batch: Sequence[Any], arg_storage: Any) -> Any:
        """Note which logits of the step belong to which request."""
        self._rows, self._computed, end = [], [], 0
        self._is_decoding = True
        for future in requests_in_batch:
            end += future.query_length
            if not future.has_new_token:
                self._is_decoding = False
                continue
            draft = self._drafts.get(future.state.request_id, ())
            self._is_decoding &= future.query_length == 1 + len(draft)
            row = _Row(future, call_of(future.state), len(self._computed), draft)
            self._computed += range(end - 1 - len(draft), end)
            self._rows.append(row)
        self._began = time.perf_counter()
        return super().prepare_tensor_args(requests_in_batch, arg_storage)

    def _ends(self, future: Any) -> int:
        drafted = len(self._drafts.get(future.state.request_id, ()))
        return 1 + drafted if future.has_new_token else 0

    def _with_drafts(self, use_padding: bool = False) -> Any:
        kwargs = self._model_kwargs(use_padding)
        if len(self._computed) > len(self._rows):
            device = kwargs["logits_indices"].device
            kwargs["logits_indices"] = torch.tensor(self._computed, device=device)
        return kwargs

    def __call__(self, input_ids: Any, scores: torch.Tensor, args: Any) -> torch.Tensor:
        """Choose the tokens of each request; its last one is that of its first row."""
        if len(self._computed) == len(self._rows):
            self._made = len(self._rows)
            return super().__call__(input_ids, scores, args)
        chosen = self._checked(scores)
        last = torch.tensor([tokens[-1] for tokens in chosen], device=scores.device)
        # The manager reads one row for each request, by the highest logit.
        scores[torch.arange(len(chosen), device=scores.device), last] = torch.inf
        for row, tokens in zip(self._rows, chosen, strict=True):
            if row.draft:
                self._accept(row, tokens[:-1])
        self._made = sum(map(len, chosen))
        return scores

    def _checked(self, scores: torch.Tensor) -> list[list[int]]:
        """Return the tokens of each request, as the model alone would choose them."""
        best = scores.argmax(-1).tolist()
        chosen: list[list[int]] = [[] for _ in self._rows]
        left = list(enumerate(self._rows))
        for place in itertools.count():
            left = [(at, row) for at, row in left if _goes_on(row, chosen[at], place)]
            if not left:
                break
            shaped = [(at, row) for at, row in left if not _draw(row).plain]
            if shaped:
                rows = [row.first + place for _, row in shaped]
                settled = settle(scores[rows], [_draw(row) for _, row in shaped])
                for number, token in zip(rows, settled.argmax(-1).tolist(), strict=True):
                    best[number] = token
            for at, row in left:
                chosen[at].append(best[row.first + place])
        return chosen

    def _accept(self, row: _Row, accepted: Sequence[int]) -> None:
        """Put the accepted tokens of a draft into the state of a request."""
        state, cache = row.state, self._batches.cache
        # The manager counts whole blocks, to share them, with the wrong tokens.
        state.position_offset -= row.future.query_length
        row.future.complete_blocks = cache.count_new_complete_blocks(state, 1 + len(accepted))
        state.position_offset += 1 + len(accepted)
        state.generated_tokens.extend(accepted)
        if row.call is not None:
            row.call.checked(len(row.draft), len(accepted))

    def _updated(self) -> None:
        self._update_batch()
        if self._is_decoding:
            drafted, seconds = len(self._computed) - len(self._rows), time.perf_counter()
            self._gain.note(len(self._rows), self._made, drafted, seconds - self._began)


def _draw(row: _Row) -> Any:
    return GREEDY if row.call is None else row.call.answer.draw


def _goes_on(row: _Row, chosen: Sequence[int], place: int) -> bool:
    """Whether the token at a place of a draft is to be chosen: those before are as drafted."""
    if place == 0:
        return True
    if place > len(row.draft) or len(chosen) < place or chosen[-1] != row.draft[place - 1]:
        return False
    return row.call is None or chosen[-1] not in row.call.answer.ends
