"""The log-probabilities of tokens: what llama.cpp reports, and a look-up of what it does not."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from headrace.core.events import TokenLogprob, TopLogprob
from headrace.engines.base import EngineRequest

_LIKELY, _ALL = 64, 1 << 24


class Candidate(msgspec.Struct):
    """A token that could have been chosen."""

    id: int
    bytes: list[int]
    logprob: float | None = None

    def top(self) -> TopLogprob:
        """Return it as an event has it."""
        return TopLogprob(self.id, bytes(self.bytes), finite(self.logprob))


class Token(Candidate):
    """A chosen token, with the likeliest."""

    top_logprobs: list[Candidate] = []


class Lookup:
    """The log-probabilities that the library does not report.

    Of a character of several tokens it reports the last one, as if it were the whole character. The
    others are among the candidates of a request for one more token after those before.
    """

    def __init__(
        self,
        candidates: Callable[[Sequence[int], int, int], Sequence[Candidate]],
        request: EngineRequest,
        split: Callable[[str], tuple[int, ...]],
    ) -> None:
        self._after = candidates
        self._limit = request.sampling.logprobs or 0
        self._text = [*request.token_ids, *request.answered]
        # Any token that is a whole character: of others the library reports nothing.
        self._whole = lambda: split("a")[-1]

    def completed(
        self, token_ids: Sequence[int], logprobs: tuple[TokenLogprob, ...]
    ) -> tuple[TokenLogprob, ...]:
        """Return an entry for each of the next tokens; `logprobs` are those of the last ones."""
        missing = token_ids[: len(token_ids) - len(logprobs)]
        first = tuple(self._entry(token_ids, place) for place in range(len(missing)))
        self._text += token_ids
        if not (first and logprobs):
            return first or logprobs
        before = sum(len(entry.data) for entry in first)
        last = msgspec.structs.replace(logprobs[0], data=logprobs[0].data[before:])
        return (*first, last, *logprobs[1:])

    def _entry(self, token_ids: Sequence[int], place: int) -> TokenLogprob:
        token, text = token_ids[place], [*self._text, *token_ids[:place]]
        candidates = self._candidates(text, max(_LIKELY, self._limit))
        if all(candidate.id != token for candidate in candidates):
            candidates = self._candidates(text, _ALL)
        chosen = next(candidate for candidate in candidates if candidate.id == token).top()
        top = tuple(candidate.top() for candidate in candidates[: self._limit])
        return TokenLogprob(token, chosen.data, chosen.logprob, top)

    def _candidates(self, text: Sequence[int], most: int) -> Sequence[Candidate]:
        return self._after(text, most, self._whole())


def finite(logprob: float | None) -> float:
    """Return a log-probability, of an impossible token too."""
    # JSON has no infinity: the library writes null for an impossible token.
    return -9999.0 if logprob is None else logprob
