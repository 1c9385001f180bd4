"""One request to vLLM: its parameters, its outputs, its errors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

from headrace.core.errors import (
    EngineError,
    GenerationFailed,
    HeadraceError,
    InvalidRequest,
    OutOfMemory,
    WorkerDied,
)
from headrace.core.events import TokenLogprob, TopLogprob
from headrace.engines.base import Admitted, EngineRequest, RawDelta, RawEvent, RawFinish
from headrace.engines.tokenizer import Vocabulary

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

_NO_MEMORY = (
    "out of memory",
    "outofmemory",
    "no available memory",
    "cannot allocate memory",
    "desired gpu memory utilization",
    "kv cache is needed",
    "less than requested memory",
)
_SEEDS, _LEAST_TOP_P, _MOST_TEMPERATURE = (1 << 63) - 1, 1e-6, 2.0


def keywords(request: EngineRequest, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of vLLM's SamplingParams that sampling decides on.

    `defaults` are those of the model.

    Raises:
        InvalidRequest: vLLM does not know the value.
    """
    sampling = request.sampling
    given = {name: getattr(sampling, name) for name in _SAME}
    chosen = {**defaults, **{name: value for name, value in given.items() if value is not None}}
    if chosen.get("temperature", 1.0) > _MOST_TEMPERATURE:
        raise InvalidRequest("temperature is at most 2 for this engine.", param="temperature")
    if "top_p" in chosen:
        chosen["top_p"] = max(chosen["top_p"], _LEAST_TOP_P)
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
        InvalidRequest: vLLM does not know the value.
    """
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    return SamplingParams(
        **keywords(request, defaults),
        structured_outputs=_schema(request.json_schema),
        output_kind=RequestOutputKind.DELTA,
        # The bytes of a token are looked up, which is cheaper and keeps what is no whole character.
        detokenize=False,
        skip_clone=True,
    )


def _schema(schema: dict[str, Any] | None) -> Any:
    from vllm.sampling_params import StructuredOutputsParams

    if schema is None:
        return None
    if not schema:
        return StructuredOutputsParams(json_object=True)
    return StructuredOutputsParams(json=schema)


class Call:
    """Turns outputs of one request into events."""

    def __init__(self, request: EngineRequest, vocabulary: Vocabulary) -> None:
        self._prompt = len(request.token_ids) + len(request.answered)
        self._most = request.sampling.logprobs or 0
        self._data = vocabulary.data
        self._begun = False
        self._sent = 0

    def events(self, output: Any) -> list[RawEvent]:
        """Return what one RequestOutput says: an engine step's tokens, or several steps'.

        Raises:
            GenerationFailed: vLLM gave the request up.
        """
        events: list[RawEvent] = []
        cached = output.num_cached_tokens or 0
        if not self._begun:
            self._begun = True
            events.append(Admitted(self._prompt, self._prompt, cached))
        made = output.outputs[0]
        token_ids, reason = tuple(made.token_ids), made.finish_reason
        ended = reason == "stop"
        kept = token_ids[:-1] if ended else token_ids
        self._sent += len(kept)
        if kept:
            data = b"".join(map(self._data, kept))
            events.append(RawDelta(data, kept, self._logprobs(kept, made.logprobs)))
        if reason is not None:
            events.append(self._finish(reason, cached))
        return events

    def _finish(self, reason: str, cached: int) -> RawFinish:
        if reason not in {"stop", "length"}:
            raise GenerationFailed(f"vLLM gave the request up ({reason}).")
        return RawFinish(
            reason=cast("Literal['stop', 'length']", reason),
            prompt_tokens=self._prompt,
            # The token that ended it is no part of it, and not counted.
            completion_tokens=self._sent,
            cached_tokens=cached,
        )

    def _logprobs(
        self, token_ids: Sequence[int], logprobs: Sequence[Mapping[int, Any]] | None
    ) -> tuple[TokenLogprob, ...]:
        pairs = zip(token_ids, logprobs or (), strict=False)
        return tuple(self._logprob(token, candidates) for token, candidates in pairs)

    def _logprob(self, token: int, candidates: Mapping[int, Any]) -> TokenLogprob:
        best = sorted(candidates.items(), key=lambda pair: pair[1].rank)[: self._most]
        top = tuple(TopLogprob(id_, self._data(id_), _finite(at.logprob)) for id_, at in best)
        return TokenLogprob(token, self._data(token), _finite(candidates[token].logprob), top)


def failure(error: Exception, core: str) -> HeadraceError:
    """Return our error for one of vLLM's; `core` is what its core failed with."""
    from vllm.exceptions import VLLMValidationError
    from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

    if isinstance(error, HeadraceError):
        return error
    if isinstance(error, EngineDeadError):
        return WorkerDied("vLLM's engine core has died.", detail=core or str(error))
    # It wraps most of what goes wrong with one request, and some of that twice.
    while type(error) is EngineGenerateError and isinstance(error.__cause__, Exception):
        error = error.__cause__
    if isinstance(error, ValueError | VLLMValidationError):
        return InvalidRequest(str(error))
    return _broken(f"{type(error).__name__}: {error}")


def _broken(reason: str) -> EngineError:
    if is_out_of_memory(reason):
        return OutOfMemory("vLLM ran out of memory.", detail=reason)
    return GenerationFailed("vLLM failed.", detail=reason)


def is_out_of_memory(reason: str) -> bool:
    """Whether an error's text says that there was not enough memory."""
    return any(sign in reason.lower() for sign in _NO_MEMORY)


def _finite(logprob: float) -> float:
    # JSON has no infinity: vLLM says so of a token that it holds impossible.
    return logprob if math.isfinite(logprob) else -9999.0
