"""The requests of a pipeline: their configuration, and the task that runs the steps."""

from __future__ import annotations

import asyncio
import itertools
import secrets
from collections.abc import AsyncGenerator, Callable
from typing import TYPE_CHECKING, Any

from headrace.core.errors import (
    GenerationFailed,
    HeadraceError,
    InvalidRequest,
    OutOfMemory,
    Unsupported,
)
from headrace.core.events import TokenLogprob
from headrace.core.sampling import Sampling
from headrace.core.stream import Mailbox
from headrace.engines.base import Admitted, EngineRequest, RawDelta, RawEvent, RawFinish

if TYPE_CHECKING:
    from openvino_genai import ContinuousBatchingPipeline, GenerationConfig, GenerationHandle

    from headrace.engines.openvino.vocabulary import Vocabulary

_PENALTIES = ("presence_penalty", "frequency_penalty", "repetition_penalty")
_DRAWN = ("temperature", "top_p", "top_k", "min_p", "seed")
_BY_NAME = ("max_tokens", "min_tokens", "stop_token_ids", "ignore_eos", "logprobs")
HONOURED = frozenset(_PENALTIES + _DRAWN + _BY_NAME)
"""The sampling parameters that `settings_of` translates; of `logprobs` only 0, the chosen token."""

# Turns of the loop between two steps, in which tokens are read and frames sent.
_TURNS = 3


class Stepper:
    """Runs the requests of a pipeline in steps, of one token each.

    The library holds Python's lock for the whole of a step, so a thread of its own would only
    add a switch to every token: the steps are taken on the event loop.
    """

    def __init__(
        self, reopen: Callable[[], ContinuousBatchingPipeline], vocabulary: Vocabulary
    ) -> None:
        self._reopen = reopen
        self._pipeline: ContinuousBatchingPipeline | None = reopen()
        self._vocabulary = vocabulary
        self._ends = self._pipeline.get_config().stop_token_ids | {vocabulary.eos}
        self._numbers = itertools.count()
        self._running: dict[int, _Call] = {}
        self._pump: asyncio.Task[None] | None = None
        self._closed = False

    async def stream(self, request: EngineRequest) -> AsyncGenerator[RawEvent, None]:
        """Yield what the pipeline generates. Closing it takes the request out of the next step.

        Raises:
            InvalidRequest, Unsupported: the library cannot honour it.
            GenerationFailed, OutOfMemory: it failed, for this request or for all of them.
        """
        number, call = self._begin(request)
        try:
            while True:
                event = await call.mailbox.get()
                if isinstance(event, HeadraceError):
                    raise event
                yield event
                if isinstance(event, RawFinish):
                    return
        finally:
            if self._running.pop(number, None) is not None:
                call.handle.cancel()

    def close(self) -> None:
        """Drop the pipeline. Idempotent."""
        self._closed = True
        self._fail(GenerationFailed("The engine is closed."))
        self._pipeline = None

    def _begin(self, request: EngineRequest) -> tuple[int, _Call]:
        import openvino as ov

        ends = frozenset(request.sampling.stop_token_ids)
        if not request.sampling.ignore_eos:
            ends |= self._ends
        config = _configured(request, ends)
        pipeline = self._opened()
        number = next(self._numbers)
        prompt = ov.Tensor(_row((*request.token_ids, *request.answered)))
        try:
            handle = pipeline.add_request(number, prompt, config)
        except RuntimeError as error:
            raise InvalidRequest(f"OpenVINO refuses the request: {_reason(error)}") from error
        call = self._running[number] = _Call(request, handle, ends, self._vocabulary)
        if self._pump is None or self._pump.done():
            self._pump = asyncio.ensure_future(self._run())
        return number, call

    def _opened(self) -> ContinuousBatchingPipeline:
        if self._closed:
            raise GenerationFailed("The engine is closed.")
        if self._pipeline is None:
            # After a failed step the state of the old one may be wrong.
            self._pipeline = self._reopen()
        return self._pipeline

    async def _run(self) -> None:
        try:
            while (pipeline := self._pipeline) and pipeline.has_non_finished_requests():
                pipeline.step()
                self._collect()
                for _ in range(_TURNS):
                    await asyncio.sleep(0)
        except Exception as error:  # noqa: BLE001  # every request gets the error
            self._pipeline = None
            self._fail(_failure(error))

    def _collect(self) -> None:
        finished = [number for number, call in self._running.items() if call.collect()]
        for number in finished:
            del self._running[number]

    def _fail(self, error: HeadraceError) -> None:
        running, self._running = self._running, {}
        for call in running.values():
            call.mailbox.put(error)


class _Call:
    """A running request."""

    def __init__(
        self,
        request: EngineRequest,
        handle: GenerationHandle,
        ends: frozenset[int],
        vocabulary: Vocabulary,
    ) -> None:
        self.mailbox: Mailbox[RawEvent | HeadraceError] = Mailbox()
        self.handle = handle
        self._request = request
        self._ends = ends
        self._vocabulary = vocabulary
        self._hidden = vocabulary.control - request.visible
        self._total = len(request.token_ids) + len(request.answered)
        self._generated = 0
        self.mailbox.put(Admitted(0, self._total))

    def collect(self) -> bool:
        """Emit the tokens of the last step; return whether the request is over."""
        while self.handle.can_read():
            for output in self.handle.read().values():
                if self._take(output.generated_ids, output.generated_log_probs):
                    return True
        status = self.handle.get_status().name
        if status == "RUNNING":
            if not self._generated:
                self.mailbox.put(Admitted(0, self._total))
            return False
        self.mailbox.put(_end_error(status))
        return True

    def _take(self, token_ids: list[int], logprobs: list[float]) -> bool:
        left = self._request.max_tokens - self._generated
        first = (self._request.sampling.min_tokens or 0) - self._generated
        ends = (at for at, token in enumerate(token_ids) if token in self._ends and at >= first)
        end = next(ends, None)
        shown = token_ids[: left if end is None else end]
        if end is not None and token_ids[end] not in self._request.sampling.stop_token_ids:
            shown = token_ids[: end + 1]
        if shown:
            self.mailbox.put(self._delta(shown, logprobs))
        self._generated += len(shown)
        if end is None and self._generated < self._request.max_tokens:
            return False
        self.handle.cancel()  # with ignore_eos the library does not have the stop tokens
        self.mailbox.put(
            RawFinish(
                reason="length" if end is None else "stop",
                prompt_tokens=self._total,
                completion_tokens=self._generated,
            )
        )
        return True

    def _delta(self, token_ids: list[int], logprobs: list[float]) -> RawDelta:
        vocabulary = self._vocabulary
        data = vocabulary.data(token_ids, self._hidden)
        if self._request.sampling.logprobs is None:
            return RawDelta(data, tuple(token_ids))
        pairs = zip(token_ids, logprobs, strict=False)
        chosen = (TokenLogprob(token, vocabulary.words[token], value) for token, value in pairs)
        return RawDelta(data, tuple(token_ids), tuple(chosen))


def settings_of(request: EngineRequest, ends: frozenset[int]) -> dict[str, Any]:
    """Return the fields of the library's GenerationConfig.

    Raises:
        Unsupported: more logprobs than that of the chosen token.
    """
    sampling = request.sampling
    if sampling.logprobs:
        raise Unsupported(
            "OpenVINO reports the log-probability of the chosen token only: logprobs is at most 0.",
            param="logprobs",
        )
    given = {name: getattr(sampling, name) for name in _PENALTIES}
    return {
        "apply_chat_template": False,
        "max_new_tokens": request.max_tokens,
        "min_new_tokens": sampling.min_tokens or 0,
        "ignore_eos": sampling.ignore_eos,
        "logprobs": 0 if sampling.logprobs is None else 1,
        **({} if sampling.ignore_eos else {"stop_token_ids": set(ends)}),
        **{name: value for name, value in given.items() if value is not None},
        **_draw(sampling),
    }


def _draw(sampling: Sampling) -> dict[str, Any]:
    # Where only one token can be chosen, the library needs do_sample off.
    if sampling.temperature == 0 or sampling.top_k == 1 or sampling.top_p == 0:
        return {"do_sample": False}
    # Without a seed the library would draw the same in each request.
    seed = secrets.randbits(32) if sampling.seed is None else sampling.seed
    chosen: dict[str, Any] = {
        "do_sample": True,
        "temperature": 1.0 if sampling.temperature is None else sampling.temperature,
        "rng_seed": seed % (1 << 64),
    }
    if sampling.top_p is not None:
        chosen["top_p"] = sampling.top_p
    if sampling.top_k is not None and sampling.top_k > 0:
        chosen["top_k"] = sampling.top_k
    if sampling.min_p is not None:
        chosen["min_p"] = min(sampling.min_p, 0.9999)
    return chosen


def _configured(request: EngineRequest, ends: frozenset[int]) -> GenerationConfig:
    import openvino_genai as genai

    config = genai.GenerationConfig()
    for name, value in settings_of(request, ends).items():
        setattr(config, name, value)
    return config


def _row(token_ids: tuple[int, ...]) -> Any:
    import numpy as np

    return np.array([token_ids], dtype=np.int64)


def _end_error(status: str) -> HeadraceError:
    if status == "IGNORED":
        return OutOfMemory("The KV cache has no room for this request.")
    return GenerationFailed("OpenVINO ended the request without a reason.", detail=status)


def _failure(error: Exception) -> HeadraceError:
    reason = f"{type(error).__name__}: {error}"
    if isinstance(error, MemoryError) or "bad_alloc" in reason or "allocat" in reason.lower():
        return OutOfMemory("OpenVINO ran out of memory.", detail=reason)
    return GenerationFailed("OpenVINO failed.", detail=reason)


def _reason(error: RuntimeError) -> str:
    # The text has the failed check, its place in the source, and perhaps an explanation.
    return str(error).partition(" failed at ")[0].strip()[:200]
