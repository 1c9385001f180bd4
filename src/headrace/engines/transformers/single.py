"""One request at a time, through the library's `generate`, for models without batching."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from transformers import GenerationConfig

from headrace.core.errors import ContextOverflow, InvalidRequest
from headrace.engines import threaded
from headrace.engines.base import Admitted, EngineRequest, RawEvent
from headrace.engines.pictures import decoded
from headrace.engines.threaded import Emit
from headrace.engines.transformers.answer import Answer, failure, settle
from headrace.engines.transformers.lowrank import LowRank


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
    """The model on a thread of its own; `processor` prepares images, if the model takes them."""

    max_running = 1

    def __init__(
        self,
        model: Any,
        step_tokens: int,
        adapters: LowRank,
        processor: Any = None,
        context_length: int = 0,
    ) -> None:
        self._model = model
        self._adapters = adapters
        self._processor = processor
        self._context_length = context_length
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
        self._adapters.all_rows(request.adapter)
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
        inputs = self._prepared(request) if request.media else None
        if inputs is not None:
            run.answer.prompt = inputs["input_ids"][0].tolist()
        token_ids = torch.tensor([run.answer.prompt], device=self._model.device)
        inputs = inputs or {"input_ids": token_ids, "attention_mask": torch.ones_like(token_ids)}
        left = self._context_length - len(run.answer.prompt)
        config = GenerationConfig(
            max_new_tokens=min(request.max_tokens, left) if request.media else request.max_tokens,
            do_sample=False,
            eos_token_id=run.answer.ends or None,
            pad_token_id=0,
            # Images are computed with the whole prompt.
            prefill_chunk_size=None if request.media else self._chunk,
        )
        self._model.generate(**inputs, generation_config=config, logits_processor=[run])

    def _prepared(self, request: EngineRequest) -> Any:
        """Return the arguments of `generate` for a prompt with images.

        Raises:
            InvalidRequest, ContextOverflow: an image cannot be decoded, or is too large.
        """
        images = [decoded(data) for data in request.media]
        bos = self._processor.tokenizer.bos_token
        has_bos = bool(bos) and request.text.startswith(bos)
        try:
            inputs = self._processor(
                text=[request.text],
                images=[images],
                add_special_tokens=not has_bos,
                return_tensors="pt",
            )
        except (ValueError, TypeError, IndexError, ZeroDivisionError) as error:
            raise InvalidRequest(
                "The model cannot take these images.", param="messages", detail=str(error)
            ) from error
        if (size := inputs["input_ids"].shape[-1]) >= self._context_length:
            raise ContextOverflow(
                f"The prompt has {size} tokens with its images, and the context length is "
                f"{self._context_length}.",
                param="messages",
            )
        return inputs.to(self._model.device, dtype=self._model.dtype)

    def _empty(self) -> None:
        if self._model.device.type == "cuda":
            torch.cuda.empty_cache()
