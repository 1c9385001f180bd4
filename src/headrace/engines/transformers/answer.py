"""Sampling of the next tokens, and the events of them.

Each request has a `Draw`, which applies its rules to the logits, and an `Answer`, which makes the
events.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch

from headrace.core.errors import EngineError, GenerationFailed, OutOfMemory
from headrace.core.events import TokenLogprob, TopLogprob
from headrace.core.sampling import Sampling
from headrace.engines.base import EngineRequest, RawDelta, RawEvent, RawFinish
from headrace.engines.tokenizer import Vocabulary

_NO_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory", "footprint")
# Below it a division would overflow, and the choice is certain anyway.
_MIN_TEMPERATURE = 1e-5
# So many of the likeliest are sorted first: mostly the others cannot be chosen.
_SORTED_FIRST = 1024


class Rules(NamedTuple):
    """The sampling rules of a request, by our names; the defaults change nothing."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logprobs: int | None = None

    @property
    def penalises(self) -> bool:
        """Whether the choice depends on earlier tokens."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (
            1.0,
            0.0,
            0.0,
        )

    @property
    def samples(self) -> bool:
        """Whether the choice is random."""
        return self.temperature >= _MIN_TEMPERATURE


class Chosen(NamedTuple):
    """A chosen token, its log-probability, and the likeliest with theirs."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


_NEUTRAL = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
"""Rules that may come from the model's `generation_config`, and their neutral values."""


def rules(sampling: Sampling, defaults: Any) -> Rules:
    """Return a request's rules; those not set are of the model's `generation_config`."""
    given: dict[str, Any] = {name: getattr(sampling, name) for name in Rules._fields}
    for name, neutral in _NEUTRAL.items():
        if given[name] is None and defaults.do_sample:
            given[name] = getattr(defaults, name, None)
        if given[name] is None:
            given[name] = neutral
    given["top_k"] = max(0, int(given["top_k"]))
    given["presence_penalty"] = given["presence_penalty"] or 0.0
    given["frequency_penalty"] = given["frequency_penalty"] or 0.0
    return Rules(**given)


_BY_NAME = ("max_tokens", "min_tokens", "seed", "stop_token_ids", "ignore_eos", "logit_bias")
HONOURED = frozenset(Rules._fields + _BY_NAME)
"""The sampling parameters that are translated: the rules, and those of `Draw` and `Answer`."""


class Draw:
    """The sampling of one request: its rules, its random generator and its tokens."""

    def __init__(
        self,
        rules: Rules,
        text: Sequence[int],
        seed: int | None = None,
        bias: dict[int, float] | None = None,
        matcher: Any = None,
        min_tokens: int = 0,
        ends: Sequence[int] = (),
    ) -> None:
        self.rules = rules
        self.reports: deque[Chosen] = deque()
        self._seed = seed
        self._generator: Any = None
        self._text = text
        self._bias = bias
        self._matcher = matcher
        self._counts: Any = None
        self._min_left = min_tokens
        self._ends = list(ends)
        self._shapes = bool(bias or min_tokens) or matcher is not None or rules.penalises
        self.plain = not (self._shapes or rules.samples or rules.logprobs is not None)

    def fill_times(self, times: torch.Tensor) -> None:
        """Overwrite the random times, if there is a seed, from its own generator."""
        if self._seed is None:
            return
        if self._generator is None:
            self._generator = torch.Generator(times.device).manual_seed(self._seed)
        times.exponential_(generator=self._generator)

    def shape(self, row: torch.Tensor) -> torch.Tensor:
        """Return the logits with bias, penalties, `min_tokens` and grammar applied."""
        if not self._shapes:
            return row
        if self._bias:
            places = torch.tensor(list(self._bias), device=row.device)
            row = row.index_add(0, places, row.new_tensor(list(self._bias.values())))
        if self.rules.penalises:
            row = self._penalised(row)
        if self._min_left > 0 and self._ends:
            ends = torch.tensor(self._ends, device=row.device)
            row = row.index_fill(0, ends, -torch.inf)
        if self._matcher is not None:
            allowed = torch.frombuffer(
                bytearray(self._matcher.compute_logit_bias()), dtype=torch.uint8
            )
            forbidden = allowed[: len(row)].to(row.device) == 0
            row = row.masked_fill(forbidden, -torch.inf)
        return row

    def take(self, token: int) -> None:
        """Record a chosen token."""
        self._min_left -= 1
        if self._counts is not None:
            self._counts[token] += 1
        if self._matcher is not None:
            self._matcher.consume_token(token)

    def _penalised(self, row: torch.Tensor) -> torch.Tensor:
        if self._counts is None:
            text = torch.tensor(self._text, device=row.device)
            self._counts = torch.bincount(text, minlength=len(row)).to(row.dtype)
        counts, rules = self._counts, self.rules
        seen = counts > 0
        if rules.repetition_penalty != 1:
            penalised = torch.where(
                row > 0, row / rules.repetition_penalty, row * rules.repetition_penalty
            )
            row = torch.where(seen, penalised, row)
        return row - rules.frequency_penalty * counts - rules.presence_penalty * seen


def settle(scores: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    """Choose a token for each draw; return the logits with the chosen ones highest."""
    rows = [row for row, draw in enumerate(draws) if not draw.plain]
    if not rows:
        return scores
    active = [draws[row] for row in rows]
    raw = scores[rows]
    shaped = torch.stack([draw.shape(row) for draw, row in zip(active, raw, strict=True)])
    chosen = _chosen(shaped, active)
    tokens = chosen.tolist()
    for draw, row, token in zip(active, raw, tokens, strict=True):
        draw.take(token)
        if draw.rules.logprobs is not None:
            draw.reports.append(_report(row, token, draw.rules.logprobs))
    scores[rows, chosen] = torch.inf
    return scores


def _report(row: torch.Tensor, token: int, count: int) -> Chosen:
    logprobs = row.log_softmax(-1)
    top = logprobs.topk(count)
    pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return Chosen(token, float(logprobs[token]), tuple(pairs))


def _chosen(scores: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    best = scores.argmax(-1)
    random_rows = [row for row, draw in enumerate(draws) if draw.rules.samples]
    if random_rows:
        best[random_rows] = _sampled(scores[random_rows], [draws[row] for row in random_rows])
    return best


def _sampled(scores: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    def column(values: Iterable[float]) -> torch.Tensor:
        return scores.new_tensor(list(values))[:, None]

    rules = [draw.rules for draw in draws]
    probs = (scores / column(rule.temperature for rule in rules)).softmax(-1)
    if any(rule.top_k or rule.top_p < 1 or rule.min_p for rule in rules):
        top_k = column(rule.top_k or scores.shape[-1] for rule in rules)
        floor = _floor(
            probs, top_k, column(rule.top_p for rule in rules), column(rule.min_p for rule in rules)
        )
        probs = probs.masked_fill(probs < floor, 0.0)
    # Each token has a random time of its own, and the first wins. So the choice depends little on
    # the last bits of the logits, which depend on the other requests of the batch.
    times = torch.empty_like(probs).exponential_()
    for row, draw in zip(times, draws, strict=True):
        draw.fill_times(row)
    return (probs / times).argmax(-1)


def _floor(
    probs: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor
) -> torch.Tensor:
    """Return the least probability that is allowed, for each row."""
    width = probs.shape[-1]
    held = probs.topk(min(_SORTED_FIRST, width)).values
    unlimited = top_k >= width
    enough = (top_k <= _SORTED_FIRST) | unlimited & (top_p < 1) & (
        held.sum(-1, keepdim=True) >= top_p
    )
    enough |= (unlimited | (top_p >= 1)) & (held[:, -1:] < min_p * held[:, :1])
    enough |= unlimited & (top_p >= 1) & (min_p <= 0)
    if not bool(enough.all()):
        held = probs.sort(-1, descending=True).values
    ranks = torch.arange(held.shape[-1], device=held.device)
    kept = held.where(ranks < top_k, 0.0)
    # top_p is a share of what top_k leaves.
    whole = kept.sum(-1, keepdim=True).where(~unlimited, 1.0)
    out = (kept.cumsum(-1) - kept >= top_p * whole) & (top_p < 1)
    out |= (kept < min_p * kept[:, :1]) | (kept <= 0)
    # The likeliest is always allowed.
    out[:, 0] = False
    least = kept.masked_fill(out, torch.inf).min(-1, keepdim=True).values
    return least.where(~unlimited | (top_p < 1) | (min_p > 0), 0.0)


def ends_of(sampling: Sampling, own: Iterable[int]) -> list[int]:
    """Return the tokens that end an answer; `own` are the model's own end tokens."""
    return sorted({*sampling.stop_token_ids, *(() if sampling.ignore_eos else own)})


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
        self.ends = ends_of(request.sampling, ends)
        self._own = frozenset(self.ends) - self._stops
        self._data = vocabulary.reader(request.visible)
        self._sent = 0

    def delta(self, token_ids: Sequence[int]) -> RawDelta | None:
        """Return the next tokens as an event, without one of `stop_token_ids`; None if empty."""
        kept = tuple(token_ids[:-1] if token_ids[-1] in self._stops else token_ids)
        self._sent += len(kept)
        reports = self.draw.reports
        chosen = [reports.popleft() for _ in token_ids] if reports else []
        if not kept:
            return None
        shown = kept[:-1] if kept[-1] in self._own else kept
        data = b"".join(map(self._data, shown))
        logprobs = tuple(map(self._logprob, chosen[: len(kept)]))
        return RawDelta(data, kept, logprobs)

    def finish(self, last: int | None) -> RawFinish:
        """Return the finish; `last` is the last generated token."""
        return RawFinish(
            reason="stop" if last in self.ends else "length",
            prompt_tokens=len(self.prompt),
            completion_tokens=self._sent,
            cached_tokens=self.cached or 0,
        )

    def events(self, token_ids: Sequence[int], *, over: bool) -> list[RawEvent]:
        """Return the events of new tokens, with the finish when it is over."""
        delta = self.delta(token_ids) if token_ids else None
        events: list[RawEvent] = [delta] if delta else []
        return [*events, self.finish(token_ids[-1] if token_ids else None)] if over else events

    def _logprob(self, chosen: Chosen) -> TokenLogprob:
        data = self._data
        top = tuple(TopLogprob(token, data(token), logprob) for token, logprob in chosen.top)
        return TokenLogprob(chosen.token, data(chosen.token), chosen.logprob, top)


def failure(error: str) -> EngineError:
    """Return the error for the text of an error of torch or the library."""
    if any(phrase in error.lower() for phrase in _NO_MEMORY):
        return OutOfMemory("The model ran out of memory.", detail=error)
    return GenerationFailed("transformers failed.", detail=error)
