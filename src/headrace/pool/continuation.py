"""Continuation of answers after their worker has failed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import msgspec

from headrace.core.errors import (
    CapacityError,
    EngineError,
    GenerationFailed,
    HeadraceError,
    LoadFailed,
    OutOfMemory,
    WorkerDied,
)
from headrace.core.events import (
    ChoicesLeft,
    Delta,
    Event,
    Finish,
    Progress,
    PromptTokens,
    ToolCallDelta,
)
from headrace.core.model import Capabilities
from headrace.core.model import Continuation as Policy
from headrace.core.request import AnyRequest, GenerateRequest

Way = Literal["exact", "fast"]
_LATER = (CapacityError, LoadFailed)
_SURVIVED = (WorkerDied, GenerationFailed, OutOfMemory)


class Diverged(Exception):
    """The second answer does not begin like the first."""


class _Sent:
    """What was sent of one choice, and how much of it the second answer has repeated."""

    __slots__ = (
        "_calls",
        "_reasoning",
        "_text",
        "_tokens",
        "calls",
        "has_prompt",
        "reasonings",
        "texts",
        "token_ids",
    )

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.reasonings: list[str] = []
        self.token_ids: list[int] = []
        self.calls: dict[int, list[str]] = {}
        self.has_prompt = False
        self._text = self._reasoning = ""
        self._calls: dict[int, str] = {}
        self._tokens = 0

    def note(self, delta: Delta) -> None:
        if delta.text:
            self.texts.append(delta.text)
        if delta.reasoning:
            self.reasonings.append(delta.reasoning)
        self.token_ids += delta.token_ids

    def note_call(self, delta: ToolCallDelta) -> None:
        # The name comes with the first part, so that the joined parts tell two calls apart.
        self.calls.setdefault(delta.call, []).append(delta.name + delta.arguments + delta.cut)

    def rewind(self) -> None:
        self._text, self._reasoning = "".join(self.texts), "".join(self.reasonings)
        self._calls = {call: "".join(parts) for call, parts in self.calls.items()}
        self._tokens = len(self.token_ids)

    @property
    def is_repeated(self) -> bool:
        return not (self._text or self._reasoning or any(self._calls.values()))

    def rest(self, delta: Delta) -> Delta:
        """Return the new part of a delta.

        Raises:
            Diverged: the rest of it is not what was sent before.
        """
        text, self._text = _after(delta.text, self._text)
        reasoning, self._reasoning = _after(delta.reasoning, self._reasoning)
        known = min(self._tokens, len(delta.token_ids))
        self._tokens -= known
        return Delta(text, delta.token_ids[known:], delta.index, reasoning, delta.logprobs[known:])

    def rest_of_call(self, delta: ToolCallDelta) -> ToolCallDelta | None:
        """Return the new part of a call's delta.

        Raises:
            Diverged: the rest of it is not what was sent before.
        """
        if delta.call not in self._calls:
            return delta
        rest, self._calls[delta.call] = _after(
            delta.name + delta.arguments + delta.cut, self._calls[delta.call]
        )
        if delta.cut:
            return delta if rest else None
        # Sent calls have their head already: what is new is a part of the arguments.
        return ToolCallDelta(delta.call, arguments=rest, index=delta.index) if rest else None


def _after(new: str, sent: str) -> tuple[str, str]:
    known = min(len(new), len(sent))
    if new[:known] != sent[:known]:
        raise Diverged
    return new[known:], sent[known:]


class Continuation:
    """One answer as the client receives it, from one worker or from several.

    `request` is the request of the next attempt. `way` is how the answer was continued, or None.
    `has_begun` is whether the client has a part of it.
    """

    def __init__(self, request: AnyRequest, policy: Policy, clock: Callable[[], float]) -> None:
        self.request = request
        self.way: Way | None = None
        self.is_whole = False
        self._original = request
        self._policy: Policy = policy
        self._clock = clock
        self._load_s: float | None = None
        self._turn_at = 0.0
        self._visible_at: float | None = None
        self._content_at: float | None = None
        self._sent = [_Sent() for _ in range(request.slots)]
        self.has_begun = False
        self._has_failed = False
        self._times = 0
        self._first_error: EngineError | None = None

    def start(self, load_s: float) -> AnyRequest:
        """Return the request for the worker, after a wait of `load_s` for a load."""
        if self._load_s is None:
            self._load_s, self._turn_at = load_s, self._clock()
        if not self._load_s:
            return self.request
        load_ms = self.request.load_ms + self._load_s * 1000
        return msgspec.structs.replace(self.request, load_ms=load_ms)

    def retry(
        self, error: HeadraceError | Diverged, capabilities: Capabilities, *, planned: bool = False
    ) -> Way:
        """Prepare another attempt after one has failed; return how it continues.

        An answer survives one failure, and any number of ends that were `planned` by an operator.

        Raises:
            HeadraceError: the first error, if the answer cannot be continued. Before anything has
                been sent it is the second, if that says when the model can be asked again.
        """
        try:
            way = self._next_way(error, capabilities, planned=planned)
            if way is None:
                raise self._last_word(error)
            if self._first_error is None:
                assert isinstance(error, EngineError), "no other error has a way"
                self._first_error = error
        finally:
            # A traceback has this frame: with the error in it, that would be a reference cycle.
            del error
        self.way = way
        self._times += 1
        self._has_failed = self._has_failed or not planned
        for sent in self._sent:
            sent.rewind()
        if way == "fast":
            answered = tuple(self._sent[0].token_ids)
            self.request = msgspec.structs.replace(self._original, answered=answered)
        return way

    def _last_word(self, error: HeadraceError | Diverged) -> HeadraceError:
        """Return the error that the client gets."""
        first, self._first_error = self._first_error, None
        if isinstance(error, _LATER) and error.retry_after_s and not self.has_begun:
            return error
        if first is None:
            assert isinstance(error, HeadraceError), "only a second answer can diverge"
            return error
        first.__cause__ = error
        return first

    def new(self, event: Event) -> Event | None:
        """Return the part of an event that was not sent yet, and record it as sent.

        Raises:
            Diverged: the second answer differs from the first.
        """
        if type(event) is Delta:
            return self._new_delta(event)
        if isinstance(event, ToolCallDelta):
            return self._new_call(event)
        if isinstance(event, PromptTokens):
            return self._new_prompt(event)
        if isinstance(event, Finish):
            return self._finish(event)
        if isinstance(event, ChoicesLeft):
            return None
        if not isinstance(event, Progress):
            # An event with the whole result is not sent twice.
            was_sent, self.has_begun = self.has_begun, True
            return None if was_sent else event
        return event

    def _new_delta(self, delta: Delta) -> Delta | None:
        sent = self._sent[delta.index]
        if self.way is not None:
            delta = sent.rest(delta)
            if not (delta.text or delta.token_ids or delta.reasoning):
                return None
        self.has_begun = True
        if self._content_at is None and (delta.text or delta.reasoning):
            self._note_first(thinking=not delta.text)
        if self._policy != "off":
            sent.note(delta)
        return delta

    def _new_prompt(self, prompt: PromptTokens) -> PromptTokens | None:
        sent = self._sent[prompt.index]
        was_sent, sent.has_prompt, self.has_begun = sent.has_prompt, True, True
        return None if was_sent else prompt

    def _new_call(self, delta: ToolCallDelta) -> ToolCallDelta | None:
        sent = self._sent[delta.index]
        if self.way is not None:
            new = sent.rest_of_call(delta)
            if new is None:
                return None
            delta = new
        self.has_begun = True
        if self._content_at is None:
            self._note_first(thinking=False)
        if self._policy != "off":
            sent.note_call(delta)
        return delta

    def _note_first(self, *, thinking: bool) -> None:
        now = self._clock()
        self._visible_at = now if self._visible_at is None else self._visible_at
        self._content_at = None if thinking else now

    def _finish(self, finish: Finish) -> Finish:
        """Return the Finish with the figures of the continuation.

        Raises:
            Diverged: the second answer is shorter than the sent part of the first.
        """
        if self.way is None:
            self.is_whole = True
            return finish
        if not all(sent.is_repeated for sent in self._sent):
            raise Diverged
        self.is_whole, self._first_error = True, None
        changes = {"continuations": self._times, "continued": self.way}
        if self._original.task == "generate":
            changes |= self._client_figures(finish)
        metrics = msgspec.structs.replace(finish.metrics, **changes)
        return msgspec.structs.replace(finish, metrics=metrics)

    def _client_figures(self, finish: Finish) -> dict[str, float | None]:
        """Return the figures from the client's view: of the first worker and the first text."""
        received, load_s = self._original.received, self._load_s or 0.0
        visible = finish.metrics.time_to_first_token_ms
        if self._visible_at is not None:
            visible = (self._visible_at - received) * 1000
        content = finish.metrics.time_to_first_content_ms
        if self._content_at is not None:
            content = (self._content_at - received) * 1000
        return {
            "queue_ms": max(0.0, self._turn_at - received - load_s) * 1000,
            "time_to_first_token_ms": visible,
            "time_to_first_content_ms": content,
        }

    def _next_way(
        self, error: HeadraceError | Diverged, capabilities: Capabilities, *, planned: bool
    ) -> Way | None:
        """Return how the answer can be continued after its worker has failed, or None.

        If nothing has been sent, or the engine repeats its answers, the request is repeated;
        otherwise the second attempt continues after the tokens that were sent.
        """
        if self._policy == "off" or not isinstance(error, _SURVIVED):
            return None
        if self._has_failed and not planned:
            return None
        request = self._original
        if not self.has_begun or not isinstance(request, GenerateRequest):
            return "exact"
        # A grammar, or one of several choices, cannot be resumed.
        simple = request.n == 1 and request.constraint is None and not request.echo
        simple = simple and not (request.enforces_calls or request.media)
        simple = simple and request.prompt_candidates is None
        if self._policy == "fast" and simple and capabilities.resume:
            return "fast"
        sampling = request.sampling
        repeats = sampling.temperature == 0 or sampling.seed is not None
        # Whether it does is checked against the part that was sent.
        return "exact" if repeats else None
