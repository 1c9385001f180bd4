"""Many requests at once, through the library's own manager of continuous batching.

The manager samples in one way for all requests, but each can have arguments for processors of
logits. Ours is the request's `Call`, by which the processor chooses the token of each row. The
manager then takes the highest logit.
"""

from __future__ import annotations

import asyncio
import functools
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from headrace.core.errors import GenerationFailed, OutOfMemory
from headrace.core.stream import Mailbox
from headrace.engines.base import Admitted, EngineRequest, RawDraft, RawEvent
from headrace.engines.drafting import Ngrams
from headrace.engines.plan import PAGE, CachePlan
from headrace.engines.transformers import Options
from headrace.engines.transformers.answer import Answer, Draw, Rules, failure, settle
from headrace.engines.transformers.lowrank import LowRank, Names, Part

_POLL_S = 0.003
_STOP_S = 30.0
_PROBE_S = 120.0
_PROBED = 3
# How far the manager's logits may be from those of the model alone, relative to their length.
_TOLERANCE, _COARSE_TOLERANCE = 0.02, 0.15


class Unbatched(Exception):
    """The manager cannot run this model, or gets other logits; the message has the reason."""


class Call:
    """A request in the manager, which passes it to the processor with each step.

    `ngrams` makes its drafts, of at most `most` tokens; None without.
    """

    def __init__(self, name: str, answer: Answer, adapter: str, most: int = 0) -> None:
        self.name = name
        self.answer = answer
        self.adapter = adapter
        self.ngrams = Ngrams(answer.prompt, most) if most else None
        self._drafts: deque[RawDraft] = deque()
        self.manager: Any = None
        self.mailbox: Mailbox[Any] = Mailbox()
        self.loop = asyncio.get_running_loop()
        self.taken = self.closed = self.over = False
        self.prefilling = True
        self._read = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> Call:
        # The manager copies the arguments of a request that it has to compute again.
        return self

    def step(self, state: Any) -> None:
        """Note a step that computes some of its tokens. On the manager's thread."""
        if not self.prefilling:
            return
        self.prefilling = not state.has_new_token
        done, total = state.state.position_offset - state.query_length, len(self.answer.prompt)
        event = Admitted(done=done, total=total, cached=done)
        self.loop.call_soon_threadsafe(self.mailbox.put, event)

    def catch_up(self, state: Any) -> None:
        """Take the tokens that are new in the manager's state into the n-grams."""
        if self.ngrams is not None:
            # Of a request that was evicted, the first tokens are those of its prompt.
            new = len(state.initial_tokens) + len(state.generated_tokens) - len(self.ngrams)
            self.ngrams.extend(state.generated_tokens[-new:] if new else ())

    def checked(self, drafted: int, accepted: int) -> None:
        """Note a draft that the model has checked. On the manager's thread."""
        if self.ngrams is not None:
            self.ngrams.learn(drafted, accepted)
        self._drafts.append(RawDraft(drafted, accepted))

    def events(self, item: Any) -> Sequence[RawEvent]:
        """Return the events of an item of the mailbox.

        Raises:
            OutOfMemory, GenerationFailed: the manager reports an error.
        """
        if isinstance(item, Admitted):
            if self.answer.cached is None:
                self.answer.cached = item.cached
            return [Admitted(item.done, item.total, self.answer.cached)]
        if isinstance(item, Exception):
            raise item
        if item.error is not None:
            raise failure(item.error)
        new, self._read = item.generated_tokens[self._read :], len(item.generated_tokens)
        self.over = item.is_finished()
        drafts = [self._drafts.popleft() for _ in range(len(self._drafts))]
        return [*drafts, *self.answer.events(new, over=self.over)]


class Processors:
    """Replaces the manager's list of processors of logits."""

    tensors_required = 0
    do_processing = True

    def __init__(self, adapters: LowRank) -> None:
        self._adapters = adapters
        self.recorded: list[torch.Tensor] | None = None
        self._draws: list[Draw] = []

    def attach(self, batches: Any) -> None:
        """Prepare what makes the manager's batches, before the first."""

    def check_kwargs(self, kwargs: dict[str, Any]) -> None:
        """Note that the manager has taken a request off its queue."""
        if (call := kwargs.get("call")) is not None:
            call.taken = True

    def fill_defaults(self, tensor: torch.Tensor) -> None:
        """Do nothing: no arguments are in tensors."""

    def prepare_tensor_args(self, requests_in_batch: Sequence[Any], arg_storage: Any) -> Any:
        """Keep the draws of the requests that get a token in this step, in order."""
        self._draws = []
        self._adapters.rows([*map(self._part, requests_in_batch)])
        for state in requests_in_batch:
            call = call_of(state.state)
            if state.has_new_token:
                self._draws.append(GREEDY if call is None else call.answer.draw)
            if call is not None:
                call.step(state)
                if call.closed:
                    call.manager.cancel_request(call.name)
        return arg_storage

    def _part(self, future: Any) -> Part:
        call = call_of(future.state)
        return Part("" if call is None else call.adapter, future.query_length, self._ends(future))

    def _ends(self, future: Any) -> int:
        return int(future.has_new_token)

    def __call__(self, input_ids: Any, scores: torch.Tensor, args: Any) -> torch.Tensor:
        """Choose the tokens; the scores have a row for each draw."""
        del input_ids, args
        if self.recorded is not None:
            self.recorded.append(scores.clone())
        return settle(scores, self._draws)


GREEDY = Draw(Rules(), ())
"""The draw of a request without a `Call`, as a probe is."""


def call_of(state: Any) -> Call | None:
    """Return the request of a state of the manager; None for a probe."""
    return state.logit_processor_kwargs.get("call")


def one_at_a_time(model: Any) -> threading.Lock:
    """Let threads wait for each other's passes, and return the lock that each pass holds.

    A pass of the manager changes the model's configuration until its end, for its own mask; one of
    another thread would be computed without a causal mask, and could leave the change behind.
    """
    forward, turn = model.forward, threading.Lock()

    @functools.wraps(forward)
    def in_turn(*args: Any, **kwargs: Any) -> Any:
        with turn:
            return forward(*args, **kwargs)

    model.forward = in_turn
    return turn


class Batched:
    """The model behind a manager, which is replaced after a failure."""

    def __init__(
        self,
        model: Any,
        plan: CachePlan,
        step_tokens: int,
        options: Options,
        make_processors: Callable[[], Processors],
        names: Names,
    ) -> None:
        self._model = model
        self._make_processors = make_processors
        self._plan = plan
        self._step_tokens = step_tokens
        self._options = options
        self._names = names
        self._calls: set[Call] = set()
        self._replacing = asyncio.Lock()
        probe = list(range(1, min(18, model.config.get_text_config().vocab_size)))
        expected = _unbatched_logits(model, probe)
        self._manager, processors = self._open()
        try:
            _compare(expected, *_manager_logits(self._manager, processors, probe), model.dtype)
        except BaseException:
            self.close()
            raise

    @property
    def max_running(self) -> int:
        """How many requests are computed together."""
        return self._plan.slots

    async def generate(
        self, request: EngineRequest, answer: Answer
    ) -> AsyncGenerator[RawEvent, None]:
        """Yield the events of one request."""
        name, adapter = self._names.next(request.adapter), request.adapter
        call = Call(name, answer, adapter, self._options.most_drafted)
        await self._send(call, request)
        self._calls.add(call)
        try:
            while not call.over:
                for event in call.events(await call.mailbox.get()):
                    yield event
        except (OutOfMemory, GenerationFailed):
            await self._replace(call.manager)
            raise
        finally:
            self._calls.discard(call)
            await _cancel(call)

    def close(self) -> None:
        """End the manager's thread and free its cache. Blocking."""
        self._manager.stop(block=True, timeout=_STOP_S, hard_stop=True)
        self._manager.destroy()

    def _open(self) -> tuple[Any, Processors]:
        config = {
            "num_blocks": -(-self._plan.tokens // PAGE),
            "max_batch_tokens": self._step_tokens,
            "max_requests_per_batch": self._plan.slots,
            "max_memory_percent": 0.95,
            "allow_block_sharing": self._options.prefix_cache,
            # A step recorded as a graph would use the draws of the recording.
            "use_cuda_graph": False,
            "use_async_batching": False,
            "auto_switch_to_flash": self._options.attention == "auto",
        }
        known = ContinuousBatchingConfig.__dataclass_fields__
        manager = self._model.init_continuous_batching(
            generation_config=GenerationConfig(do_sample=False, eos_token_id=-1),
            continuous_batching_config=ContinuousBatchingConfig(
                **{name: value for name, value in config.items() if name in known}
            ),
        )
        manager.logit_processor = processors = self._make_processors()
        self._prepare(manager, processors)
        # Its thread is a daemon if the one that starts it is, so that an engine that was not closed
        # does not keep the process alive.
        starter = threading.Thread(target=manager.start, daemon=True)
        starter.start()
        starter.join()
        return manager, processors

    def _prepare(self, manager: Any, processors: Processors) -> None:
        """Prepare what makes the manager's batches, and their cache, on the manager's thread."""
        create = manager._create_batch_processor  # noqa: SLF001  # it is there before a request

        def created() -> Any:
            batches = create()
            processors.attach(batches)
            # The cache has to know the adapters of requests.
            self._names.keep_apart(batches.cache)
            return batches

        manager._create_batch_processor = created  # noqa: SLF001

    async def _send(self, call: Call, request: EngineRequest) -> None:
        for _ in range(2):
            call.manager = self._manager
            call.manager.register_result_handler(call.name, call.mailbox.put)
            sent = call.manager.add_request(
                call.answer.prompt,
                request_id=call.name,
                max_new_tokens=request.max_tokens,
                streaming=True,
                eos_token_id=call.answer.ends,
                call=call,
            )
            if sent is not None:
                return
            await self._replace(call.manager)
        raise GenerationFailed("transformers takes no requests.")

    async def _replace(self, failed: Any) -> None:
        """Replace a manager whose thread has failed."""
        async with self._replacing:
            if self._manager is not failed or failed.background_thread_status.local_status == 0:
                return
            await asyncio.to_thread(self._reopen)
            for call in self._calls:
                if call.manager is failed:
                    call.mailbox.put(
                        GenerationFailed("transformers failed while this request ran.")
                    )

    def _reopen(self) -> None:
        self.close()
        self._manager, _ = self._open()


async def _cancel(call: Call) -> None:
    """Cancel a request; return when the manager no longer has it."""
    call.closed = True
    manager = call.manager
    while not call.over and _holds(manager, call):
        # Repeated: the manager ignores it before it has taken the request.
        manager.cancel_request(call.name)
        await asyncio.sleep(_POLL_S)
    manager.output_router.result_handlers.pop(call.name, None)


def _holds(manager: Any, call: Call) -> bool:
    if not manager.is_running():
        return False
    processor = manager.batch_processor
    if processor is None or not call.taken:
        return True
    scheduler = processor.scheduler
    return call.name in scheduler.active_requests or call.name in scheduler.waiting_requests


def _unbatched_logits(model: Any, prompt: Sequence[int]) -> list[torch.Tensor]:
    """Return the logits of the next tokens, each computed from the whole text without batching."""
    text, logits = list(prompt), list[torch.Tensor]()
    with torch.inference_mode():
        for _ in range(_PROBED):
            token_ids = torch.tensor([text], device=model.device)
            logits.append(model(input_ids=token_ids, use_cache=False).logits[0, -1].float())
            text.append(int(logits[-1].argmax()))
    return logits


def _manager_logits(
    manager: Any, processors: Processors, prompt: Sequence[int]
) -> tuple[list[torch.Tensor], list[int]]:
    """Return the manager's logits and tokens for the prompt."""
    processors.recorded = []
    manager.add_request(list(prompt), request_id="0:probe", max_new_tokens=_PROBED)
    result = manager.get_result(timeout=_PROBE_S)
    recorded, processors.recorded = processors.recorded, None
    if result is None or result.error is not None:
        error = failure("no answer" if result is None else result.error)
        if isinstance(error, OutOfMemory):
            raise error
        raise Unbatched(error.detail)
    return [scores[0] for scores in recorded], result.generated_tokens


def _compare(
    expected: Sequence[torch.Tensor],
    logits: Sequence[torch.Tensor],
    tokens: Sequence[int],
    dtype: torch.dtype,
) -> None:
    """Compare the logits as long as the texts are the same.

    Raises:
        Unbatched: they differ by more than the rounding of the type.
    """
    limit = _TOLERANCE if dtype == torch.float32 else _COARSE_TOLERANCE
    for ours, theirs, token in zip(expected, logits, tokens, strict=True):
        distance = float((ours - theirs).norm() / ours.norm())
        if not distance <= limit:
            raise Unbatched(f"its logits in a batch are {distance:.2f} away from those alone")
        if int(ours.argmax()) != token:
            return
