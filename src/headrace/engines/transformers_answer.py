"""One request to the model: its draw, and its tokens as events. And what torch's errors mean."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from headrace.core.errors import EngineError, GenerationFailed, OutOfMemory
from headrace.core.events import TokenLogprob, TopLogprob
from headrace.engines.base import EngineRequest, RawDelta, RawEvent, RawFinish
from headrace.engines.transformers_sample import Draw, Told
from headrace.engines.transformers_tokens import Vocabulary

_NO_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory", "footprint")


class Answer:
    """Turns the tokens of one request into events. `ends` are the model's own end tokens."""

    def __init__(
        self, request: EngineRequest, draw: Draw, vocabulary: Vocabulary, ends: Iterable[int]
    ) -> None:
        self.draw = draw
        self.prompt = [*request.token_ids, *request.answered]
        self.max_tokens = request.max_tokens
        self.cached: int | None = None
        self._stops = frozenset(request.sampling.stop_token_ids)
        own = () if request.sampling.ignore_eos else ends
        self._own = frozenset(own) - self._stops
        self.ends = sorted(self._stops | self._own)
        self._vocabulary = vocabulary
        self._sent = 0

    def delta(self, token_ids: Sequence[int]) -> RawDelta | None:
        """Return the next tokens as an event, without one of `stop_token_ids`; None if no more."""
        kept = tuple(token_ids[:-1] if token_ids[-1] in self._stops else token_ids)
        self._sent += len(kept)
        told = [self.draw.told.popleft() for _ in token_ids] if self.draw.told else []
        if not kept:
            return None
        shown = kept[:-1] if kept[-1] in self._own else kept
        data = b"".join([self._vocabulary.data(token) for token in shown])
        logprobs = tuple(self._logprob(one) for one in told[: len(kept)])
        return RawDelta(data, kept, logprobs)

    def finish(self, last: int | None) -> RawFinish:
        """Return the account; `last` is the last token that was made."""
        return RawFinish(
            reason="stop" if last in self.ends else "length",
            prompt_tokens=len(self.prompt),
            completion_tokens=self._sent,
            cached_tokens=self.cached or 0,
        )

    def events(self, token_ids: Sequence[int], *, over: bool) -> list[RawEvent]:
        """Return what new tokens amount to, with the account when it is over."""
        delta = self.delta(token_ids) if token_ids else None
        events: list[RawEvent] = [delta] if delta else []
        return [*events, self.finish(token_ids[-1] if token_ids else None)] if over else events

    def _logprob(self, told: Told) -> TokenLogprob:
        data = self._vocabulary.data
        top = tuple(TopLogprob(token, data(token), logprob) for token, logprob in told.top)
        return TokenLogprob(told.token, data(told.token), told.logprob, top)


def failure(error: str) -> EngineError:
    """Return our error for what torch or the library said."""
    if any(sign in error.lower() for sign in _NO_MEMORY):
        return OutOfMemory("The model ran out of memory.", detail=error)
    return GenerationFailed("transformers failed.", detail=error)
