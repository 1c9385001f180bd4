"""One request at a time, through the library's `generate`, for models without batching."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from transformers import GenerationConfig

from headrace.engines import threaded
from headrace.engines.base import Admitted, EngineRequest, RawEvent
from headrace.engines.threaded import Emit
from headrace.engines.transformers.answer import Answer, failure, settle


class _Closed(Exception):
    """The stream was closed."""


class _Run:
    """Observes one `generate`, as a hook before each forward pass and as a processor of logits."""

    def __init__(self, answer: Answer, emit: Emit[RawEvent]) -> None:
        self.answer = answer
        self.last: int | None = None
        self._emit = emit
        self._done = 0

    def before(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        del module, args
        token_ids = kwargs.get("input_ids")
        if self.last is None:
            self._send(Admitted(done=self._done, total=len(self.answer.prompt)))
            self._done += 0 if token_ids is None else token_ids.shape[-1]

    def __call__(self, input_ids: Any, scores: torch.Tensor) -> torch.Tensor:
        del input_ids
        scores = settle(scores, [self.answer.draw])
        self.last = int(scores[0].argmax())
        if delta := self.answer.delta((self.last,)):
            self._send(delta)
        return scores

    def _send(self, event: RawEvent) -> None:
        if self._emit(event):
            raise _Closed


class Single:
    """The model on a thread of its own."""

    max_running = 1

    def __init__(self, model: Any, step_tokens: int) -> None:
        self._model = model
        # A recurrent model takes its prompt whole.
        self._chunk = None if getattr(model, "_is_stateful", False) else step_tokens
        self.thread = ThreadPoolExecutor(1, "transformers")
        self._inbox: threaded.Inbox | None = None

    def generate(self, request: EngineRequest, answer: Answer) -> AsyncGenerator[RawEvent, None]:
        """Return the events of one request."""
        if self._inbox is None:
            self._inbox = threaded.Inbox(asyncio.get_running_loop())
        return threaded.stream(
            lambda emit: self._run(request, answer, emit), inbox=self._inbox, executor=self.thread
        )

    def close(self) -> None:
        """End the thread."""
        self.thread.shutdown(wait=False)

    def _run(self, request: EngineRequest, answer: Answer, emit: Emit[RawEvent]) -> None:
        run = _Run(answer, emit)
        hook = self._model.register_forward_pre_hook(run.before, with_kwargs=True)
        try:
            self._generate(request, run)
            emit(answer.finish(run.last))
        except _Closed:
            pass
        except RuntimeError as error:
            self._empty()
            raise failure(str(error)) from error
        finally:
            hook.remove()

    def _generate(self, request: EngineRequest, run: _Run) -> None:
        token_ids = torch.tensor([run.answer.prompt], device=self._model.device)
        config = GenerationConfig(
            max_new_tokens=request.max_tokens,
            do_sample=False,
            eos_token_id=run.answer.ends or None,
            pad_token_id=0,
            prefill_chunk_size=self._chunk,
        )
        self._model.generate(
            inputs=token_ids,
            attention_mask=torch.ones_like(token_ids),
            generation_config=config,
            logits_processor=[run],
        )

    def _empty(self) -> None:
        if self._model.device.type == "cuda":
            torch.cuda.empty_cache()
