"""Answers that outlive their worker: what the client has got, and how the rest can be had."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import msgspec

from headrace.core.errors import EngineError, GenerationFailed, OutOfMemory, WorkerDied
from headrace.core.events import Delta, Finish
from headrace.core.model import Capabilities, Continuation
from headrace.core.request import GenerateRequest

Way = Literal["exact", "fast"]
_SURVIVED = (WorkerDied, GenerationFailed, OutOfMemory)


class Diverged(Exception):
    """The second answer does not begin as the first did."""


class _Said:
    """What the client has got of one choice, and how much of it has come by once more."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.reasonings: list[str] = []
        self.token_ids: list[int] = []
        self._text = self._reasoning = ""
        self._tokens = 0

    def note(self, delta: Delta) -> None:
        if delta.text:
            self.texts.append(delta.text)
        if delta.reasoning:
            self.reasonings.append(delta.reasoning)
        self.token_ids += delta.token_ids

    def rewind(self) -> None:
        self._text, self._reasoning = "".join(self.texts), "".join(self.reasonings)
        self._tokens = len(self.token_ids)

    @property
    def is_through(self) -> bool:
        return not (self._text or self._reasoning)

    def rest(self, delta: Delta) -> Delta:
        """Return what of a delta is new.

        Raises:
            Diverged: it is not what was said before.
        """
        text, self._text = _after(delta.text, self._text)
        reasoning, self._reasoning = _after(delta.reasoning, self._reasoning)
        known = min(self._tokens, len(delta.token_ids))
        self._tokens -= known
        return Delta(text, delta.token_ids[known:], delta.index, reasoning, delta.logprobs[known:])


def _after(new: str, said: str) -> tuple[str, str]:
    known = min(len(new), len(said))
    if new[:known] != said[:known]:
        raise Diverged
    return new[known:], said[known:]


def may_repeat(error: EngineError, continuation: Continuation) -> bool:
    """Tell whether a request whose answer does not depend on chance is made once more."""
    return continuation != "off" and isinstance(error, _SURVIVED)


class Answer:
    """One answer as the client gets it, from one worker or from two."""

    def __init__(
        self, request: GenerateRequest, continuation: Continuation, clock: Callable[[], float]
    ) -> None:
        self._request = request
        self._clock = clock
        self._load_s: float | None = None
        self._turn_at = 0.0
        self._visible_at: float | None = None
        self._continuation: Continuation = continuation
        self._said = [_Said() for _ in range(request.n)]
        self._began = False
        self.continued: Way | None = None
        self.is_whole = False

    def asked(self, request: GenerateRequest, load_s: float) -> GenerateRequest:
        """Return what a worker is asked, now that it is the request's turn."""
        if self._load_s is None:
            self._load_s, self._turn_at = load_s, self._clock()
        if not self._load_s:
            return request
        return msgspec.structs.replace(request, load_ms=request.load_ms + self._load_s * 1000)

    def way_on(self, error: EngineError, capabilities: Capabilities) -> Way | None:
        """Tell how the answer can go on after its worker failed; None where it cannot.

        It can once. Where nothing has been sent, or the engine repeats itself, the request is
        made again; otherwise the tokens that were sent are the beginning of the second answer.
        """
        if self.continued or not may_repeat(error, self._continuation):
            return None
        if not self._began:
            return "exact"
        request, sampling = self._request, self._request.sampling
        # A grammar, or one of several choices, cannot be taken up in the middle.
        simple = request.n == 1 and request.json_schema is None and not request.echo
        if self._continuation == "fast" and simple and capabilities.resume:
            return "fast"
        repeats = sampling.temperature == 0 or sampling.seed is not None
        # Whether the engine really does is seen when the first part comes by again.
        return "exact" if repeats else None

    def again(self, way: Way) -> GenerateRequest:
        """Return the request for the second worker; what it says goes through `new`."""
        self.continued = way
        for said in self._said:
            said.rewind()
        ids = tuple(self._said[0].token_ids) if way == "fast" else ()
        return msgspec.structs.replace(self._request, answered=ids)

    def new(self, delta: Delta) -> Delta | None:
        """Return what of a delta the client has not got yet, and note that he has it now.

        Raises:
            Diverged: the second answer is not as the first.
        """
        said = self._said[delta.index]
        if self.continued is not None:
            delta = said.rest(delta)
            if not (delta.text or delta.token_ids or delta.reasoning):
                return None
        self._began = True
        if self._visible_at is None and (delta.text or delta.reasoning):
            self._visible_at = self._clock()
        if self._continuation != "off" and self.continued is None:
            said.note(delta)
        return delta

    def check(self, finish: Finish) -> Finish:
        """Return the Finish, which says whether and how the answer was continued.

        Raises:
            Diverged: the second answer is shorter than what was sent of the first.
        """
        if self.continued is None:
            self.is_whole = True
            return finish
        if not all(said.is_through for said in self._said):
            raise Diverged
        self.is_whole = True
        received, load_s = self._request.received, self._load_s or 0.0
        # What the client felt: the first worker's turn, and the first text that came at all.
        visible = finish.metrics.time_to_first_token_ms
        if self._visible_at is not None:
            visible = (self._visible_at - received) * 1000
        metrics = msgspec.structs.replace(
            finish.metrics,
            queue_ms=max(0.0, self._turn_at - received - load_s) * 1000,
            time_to_first_token_ms=visible,
            continuations=1,
            continued=self.continued,
        )
        return msgspec.structs.replace(finish, metrics=metrics)
