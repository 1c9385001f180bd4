"""A request to vLLM: its parameters, its outputs, its errors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

from headrace.core.constraint import Constraint
from headrace.core.errors import (
    EngineError,
    GenerationFailed,
    HeadraceError,
    InvalidRequest,
    OutOfMemory,
    WorkerDied,
)
from headrace.core.events import PromptToken, TokenLogprob, TopLogprob
from headrace.engines.base import Admitted, EngineRequest, RawDelta, RawEvent, RawFinish
from headrace.engines.tokenizer import Vocabulary
from headrace.text.grammar import grammar

_SAME = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "min_tokens",
)
_BY_NAME = ("max_tokens", "seed", "stop_token_ids", "ignore_eos", "logprobs", "logit_bias")
HONOURED = frozenset(_SAME + _BY_NAME)
"""The sampling parameters that `keywords` translates."""
# vLLM says that these do not work with drafts, and ignores them.
_DROPPED = frozenset({"min_p", "logit_bias"})

_NO_MEMORY = (
    "out of memory",
    "outofmemory",
    "no available memory",
    "cannot allocate memory",
    "desired gpu memory utilization",
    "kv cache is needed",
    "less than requested memory",
)
_SEEDS, _MIN_TOP_P, _MAX_TEMPERATURE = (1 << 63) - 1, 1e-6, 2.0


def honoured(*, drafts: bool) -> frozenset[str]:
    """Return the sampling parameters that have an effect, with drafts or without."""
    return HONOURED - _DROPPED if drafts else HONOURED


def keywords(request: EngineRequest, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of vLLM's SamplingParams that depend on sampling.

    `defaults` are those of the model.

    Raises:
        InvalidRequest: vLLM does not support a value.
    """
    sampling = request.sampling
    values = {name: getattr(sampling, name) for name in _SAME}
    chosen = {**defaults, **{name: value for name, value in values.items() if value is not None}}
    if chosen.get("temperature", 1.0) > _MAX_TEMPERATURE:
        raise InvalidRequest("temperature is at most 2 for this engine.", param="temperature")
    if "top_p" in chosen:
        chosen["top_p"] = max(chosen["top_p"], _MIN_TOP_P)
    if sampling.seed is not None:
        chosen["seed"] = sampling.seed % _SEEDS
    return {
        **chosen,
        "max_tokens": request.max_tokens,
        "stop_token_ids": list(sampling.stop_token_ids),
        "ignore_eos": sampling.ignore_eos,
        "logprobs": sampling.logprobs,
        "logit_bias": sampling.logit_bias or None,
    }


def parameters(request: EngineRequest, defaults: Mapping[str, Any]) -> Any:
    """Return vLLM's SamplingParams; `defaults` are those of the model.

    Raises:
        InvalidRequest: vLLM does not support a value.
    """
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    return SamplingParams(
        **keywords(request, defaults),
        structured_outputs=_structured(request.constraint),
        output_kind=RequestOutputKind.DELTA,
        # Bytes of tokens are looked up, which is cheaper and keeps incomplete characters.
        detokenize=False,
        skip_clone=True,
    )


def scoring_parameters(candidates: int) -> Any:
    """Return vLLM's SamplingParams for the log probabilities of a prompt; it makes one token."""
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    return SamplingParams(
        temperature=0.0,
        max_tokens=1,
        prompt_logprobs=candidates,
        output_kind=RequestOutputKind.DELTA,
        detokenize=False,
    )


def prompt_tokens(
    token_ids: Sequence[int],
    scored: Sequence[Mapping[int, Any] | None],
    candidates: int,
    vocabulary: Vocabulary,
) -> list[PromptToken]:
    """Return the tokens of a prompt by vLLM's log probabilities, of which the first is None."""
    data, tokens = vocabulary.full_data, list[PromptToken]()
    for token, places in zip(token_ids, scored, strict=False):
        if places is None:
            tokens.append(PromptToken(token, data(token)))
            continue
        own = places[token]
        top = tuple(
            TopLogprob(other, data(other), _finite(at.logprob))
            for other, at in sorted(places.items(), key=lambda pair: pair[1].rank)[:candidates]
        )
        tokens.append(PromptToken(token, data(token), _finite(own.logprob), top, own.rank))
    return tokens


def _structured(constraint: Constraint | None) -> Any:
    from vllm.sampling_params import StructuredOutputsParams

    # The backend is llguidance, which takes its own language as a grammar.
    return None if constraint is None else StructuredOutputsParams(grammar=grammar(constraint))


class Call:
    """Turns the outputs of a request into events."""

    def __init__(self, request: EngineRequest, vocabulary: Vocabulary) -> None:
        self._prompt = len(request.token_ids) + len(request.answered)
        self._has_images = bool(request.media)
        self._top_logprobs = request.sampling.logprobs or 0
        self._data = vocabulary.reader(request.visible)
        self._admitted = False
        self._sent = 0

    def events(self, output: Any) -> list[RawEvent]:
        """Return the events of a RequestOutput: the tokens of one engine step, or of several.

        Raises:
            GenerationFailed: vLLM aborted the request.
        """
        events: list[RawEvent] = []
        cached = output.num_cached_tokens or 0
        if self._has_images and output.prompt_token_ids is not None:
            # With the tokens of its images.
            self._prompt = len(output.prompt_token_ids)
        if not self._admitted:
            self._admitted = True
            events.append(Admitted(self._prompt, self._prompt, cached))
        completion = output.outputs[0]
        token_ids, reason = tuple(completion.token_ids), completion.finish_reason
        ended = reason == "stop"
        kept = token_ids[:-1] if ended else token_ids
        self._sent += len(kept)
        if kept:
            data = b"".join(map(self._data, kept))
            events.append(RawDelta(data, kept, self._logprobs(kept, completion.logprobs)))
        if reason is not None:
            events.append(self._finish(reason, cached))
        return events

    def _finish(self, reason: str, cached: int) -> RawFinish:
        if reason not in {"stop", "length"}:
            raise GenerationFailed(f"vLLM aborted the request ({reason}).")
        return RawFinish(
            reason=cast("Literal['stop', 'length']", reason),
            prompt_tokens=self._prompt,
            # The token that ended it is not part of it, and not counted.
            completion_tokens=self._sent,
            cached_tokens=cached,
        )

    def _logprobs(
        self, token_ids: Sequence[int], logprobs: Sequence[Mapping[int, Any]] | None
    ) -> tuple[TokenLogprob, ...]:
        pairs = zip(token_ids, logprobs or (), strict=False)
        return tuple(self._logprob(token, candidates) for token, candidates in pairs)

    def _logprob(self, token: int, candidates: Mapping[int, Any]) -> TokenLogprob:
        best = sorted(candidates.items(), key=lambda pair: pair[1].rank)[: self._top_logprobs]
        top = tuple(TopLogprob(id_, self._data(id_), _finite(at.logprob)) for id_, at in best)
        return TokenLogprob(token, self._data(token), _finite(candidates[token].logprob), top)


def failure(error: Exception, core: str) -> HeadraceError:
    """Return the error for one of vLLM's; `core` is the error of its core."""
    from vllm.exceptions import VLLMValidationError
    from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

    if isinstance(error, HeadraceError):
        return error
    if isinstance(error, EngineDeadError):
        return WorkerDied("vLLM's engine core has died.", detail=core or str(error))
    # It wraps most errors of a request, and some of them twice.
    while type(error) is EngineGenerateError and isinstance(error.__cause__, Exception):
        error = error.__cause__
    if isinstance(error, ValueError | VLLMValidationError):
        return InvalidRequest(str(error))
    return _generation_error(f"{type(error).__name__}: {error}")


def _generation_error(reason: str) -> EngineError:
    if is_out_of_memory(reason):
        return OutOfMemory("vLLM ran out of memory.", detail=reason)
    return GenerationFailed("vLLM failed.", detail=reason)


def is_out_of_memory(reason: str) -> bool:
    """Whether an error's text is about too little memory."""
    return any(phrase in reason.lower() for phrase in _NO_MEMORY)


def _finite(logprob: float) -> float:
    # JSON has no infinity, which is vLLM's value for an impossible token.
    return logprob if math.isfinite(logprob) else -9999.0
