"""POST /completion and /infill, as llama-server has them for editors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, cast

import msgspec
from msgspec import Meta

from headrace.api import fields, limits
from headrace.api.exchange import Call, Exchange, Service
from headrace.api.fields import Body, Peers
from headrace.api.limits import ApiSettings
from headrace.api.llama_server.answer import CompletionEncoder, CompletionHead, selected, whole
from headrace.api.status import described
from headrace.api.stream import send_stream
from headrace.api.wire import (
    GenerateFields,
    TokenId,
    generate_fields,
    inputs_schema,
    to_inputs,
    to_sampling,
)
from headrace.core.errors import InvalidRequest, Unsupported
from headrace.core.gap import Gap, LineLimits, SourceText
from headrace.core.request import GenerateRequest
from headrace.core.sampling import Sampling
from headrace.core.stream import collect

_LETTERS = {
    "e": "penalties", "d": "dry", "s": "top_n_sigma", "k": "top_k", "y": "typ_p", "p": "top_p",
    "m": "min_p", "x": "xtc", "t": "temperature", "i": "infill", "a": "adaptive_p",
}  # fmt: skip
_PARAMETERS = {
    "top_k": ("top_k",),
    "top_p": ("top_p",),
    "min_p": ("min_p",),
    "temperature": ("temperature",),
    "penalties": ("repetition_penalty", "presence_penalty", "frequency_penalty"),
}
_NAMES = {
    "max_tokens": "n_predict",
    "repetition_penalty": "repeat_penalty",
    "logprobs": "n_probs",
    "line_limits": "t_max_predict_ms",
}

_MOST_BIAS = 100
_Predicted = Annotated[int, Meta(ge=-2, le=2**31 - 1)]
_Temperature = Annotated[float, Meta(le=2, description="Randomness; 0 and below are greedy.")]
BiasPair = Annotated[list[int | float | bool | str], Meta(min_length=2, max_length=2)]


class LlamaFields(GenerateFields, frozen=True, kw_only=True):
    """Fields of both routes.

    `n_predict` is -1 for no limit, and 0 to compute the prompt alone. Parameters of samplers that
    `samplers` does not list have no effect. `n_indent` and `t_max_predict_ms` end an answer by its
    lines. `response_fields` are the fields of the answer; those with a slash are taken out of an
    object.
    """

    n_predict: _Predicted | None = None
    max_tokens: _Predicted | None = None
    temperature: _Temperature | None = None
    n_indent: Annotated[int, Meta(ge=0, le=1024)] | None = None
    n_probs: Annotated[int, Meta(ge=0, le=20)] | None = None
    t_max_predict_ms: Annotated[float, Meta(le=2**31)] | None = None
    samplers: str | Annotated[list[str], Meta(max_length=64)] | None = None
    response_fields: Annotated[list[str], Meta(max_length=64)] | None = None
    logit_bias: (  # pyright: ignore[reportIncompatibleVariableOverride]
        Annotated[dict[str, float | bool], Meta(max_length=limits.MAX_LOGIT_BIAS)]
        | Annotated[list[BiasPair], Meta(max_length=limits.MAX_LOGIT_BIAS)]
        | None
    ) = None

    peers: ClassVar[Peers] = fields.LLAMA


class LlamaCompletionRequest(LlamaFields, frozen=True, kw_only=True):
    """llama-server's request of a completion: one prompt, a text or token ids."""

    prompt: Annotated[
        str | list[str | TokenId | list[TokenId]],
        Meta(extra={"schema": inputs_schema(1)}),
    ]


class ExtraText(Body, frozen=True, kw_only=True):
    """A part of another file."""

    text: str
    filename: str | None = None

    peers: ClassVar[Peers] = fields.EXTRA


class InfillRequest(LlamaFields, frozen=True, kw_only=True):
    """llama-server's request of what comes between two texts.

    The answer goes on with `prompt`. `input_extra` are parts of other files, the most important
    last. What does not fit into the context is cut: the first of those, then the beginning of
    `input_prefix` and the end of `input_suffix`.
    """

    input_prefix: str | None = None
    input_suffix: str | None = None
    input_extra: Annotated[list[ExtraText], Meta(max_length=limits.MAX_DOCUMENTS)] | None = None
    prompt: str | None = None


_COMPLETION = msgspec.json.Decoder(LlamaCompletionRequest)
_INFILL = msgspec.json.Decoder(InfillRequest)


async def completion(service: Service, exchange: Exchange) -> None:
    """Continue a prompt, as llama-server does."""
    wire = await exchange.read(_COMPLETION)
    prompts = to_inputs("prompt", wire.prompt, limits.MAX_PROMPTS)
    if len(prompts) > 1:
        raise Unsupported(
            "One prompt is taken here; /v1/completions takes several.", param="prompt"
        )
    await _answer(service, exchange, wire, {"prompt": prompts[0]})


async def infill(service: Service, exchange: Exchange) -> None:
    """Fill the gap between two texts, as llama-server does."""
    wire = await exchange.read(_INFILL)
    others = (SourceText(extra.text, extra.filename or "") for extra in wire.input_extra or ())
    given = {
        "prompt": wire.input_prefix or "",
        "suffix": wire.input_suffix or "",
        "gap": Gap(wire.prompt or "", tuple(others)),
    }
    await _answer(service, exchange, wire, given)


async def _answer(
    service: Service, exchange: Exchange, wire: LlamaFields, given: dict[str, Any]
) -> None:
    exchange.call.names = wire.names() | _NAMES
    request = to_request(wire, exchange.settings, exchange.call, given)
    if not wire.model and "gap" in given:
        request = msgspec.structs.replace(request, model=await _filling(service, exchange.call))
    stream, head = service.backend.ask(request), _head(wire, service, request)
    if wire.stream:
        await exchange.unless_gone(send_stream(exchange, stream, CompletionEncoder(head)))
        return
    answer = await exchange.unless_gone(collect(stream))
    await exchange.answer(selected(whole(head, answer), head.fields), answer.metrics)


def to_request(
    wire: LlamaFields, settings: ApiSettings, call: Call, given: dict[str, Any]
) -> GenerateRequest:
    """Build the core request; `given` is the prompt, with its gap if there is one.

    Raises:
        InvalidRequest: fields contradict each other, or a value is out of its range.
        Unsupported: there is more than one choice.
    """
    if (wire.n or 1) > 1:
        raise Unsupported("One choice is given here.", param="n")
    after_ms = wire.t_max_predict_ms if (wire.t_max_predict_ms or 0) > 0 else None
    lines = LineLimits(wire.n_indent or 0, after_ms) if wire.n_indent or after_ms else None
    return GenerateRequest(
        **given,
        sampling=_sampling(wire),
        fit_max_tokens=True,
        line_limits=lines,
        **generate_fields(wire, settings, call),
    )


def _sampling(wire: LlamaFields) -> Sampling:
    most = wire.max_tokens if wire.n_predict is None else wire.n_predict
    # Nothing is computed without a token, which is not sent.
    most = None if most is None or most < 0 else max(most, 1)
    plain = msgspec.structs.replace(
        wire,
        logit_bias=cast("Any", _bias(wire.logit_bias)),
        # -1 is a random one, and below 0 is greedy.
        seed=None if wire.seed == -1 else wire.seed,
        temperature=None if wire.temperature is None else max(wire.temperature, 0.0),
    )
    return _sampled(wire, to_sampling(plain, max_tokens=most, logprobs=wire.n_probs or None))


def _sampled(wire: LlamaFields, sampling: Sampling) -> Sampling:
    """Return the parameters of the samplers that are listed."""
    if not wire.samplers:
        return sampling
    names = wire.samplers
    if isinstance(names, str):
        names = [_LETTERS.get(letter, letter) for letter in names]
    unknown = [name for name in names if name not in _LETTERS.values()]
    if unknown:
        raise InvalidRequest(f"samplers: {unknown[0][:64]!r} is unknown.", param="samplers")
    changes: dict[str, Any] = {
        field: None
        for sampler, fields in _PARAMETERS.items()
        if sampler not in names
        for field in fields
    }
    if "temperature" not in names:
        # Its sampler for gaps, which is near to greedy, is not here.
        changes["temperature"] = 0.0 if "infill" in names else 1.0
    return msgspec.structs.replace(sampling, **changes)


def _bias(wire: dict[str, float | bool] | Sequence[Sequence[Any]] | None) -> dict[int, float]:
    pairs = wire.items() if isinstance(wire, dict) else wire or ()
    return dict(_one_bias(token, value) for token, value in pairs)


def _one_bias(token: Any, value: Any) -> tuple[int, float]:
    number = token if isinstance(token, int) else int(token) if str(token).isdecimal() else None
    if number is None or isinstance(token, bool):
        raise Unsupported("A bias is that of a token id here.", param="logit_bias")
    bias = -_MOST_BIAS if value is False else value
    if isinstance(bias, str | bool) or abs(bias) > _MOST_BIAS or not 0 <= number < 1 << 31:
        raise InvalidRequest(
            f"A bias is a number from -{_MOST_BIAS} to {_MOST_BIAS}, or false.", param="logit_bias"
        )
    return number, float(bias)


async def _filling(service: Service, call: Call) -> str:
    """Return the only model that is known to fill gaps; empty if there are none or several."""
    models = [info for info in await described(service, call) if info.base is None]
    able = [info.id for info in models if info.capabilities.infill]
    return able[0] if len(able) == 1 else ""


def _head(wire: LlamaFields, service: Service, request: GenerateRequest) -> CompletionHead:
    settings = msgspec.to_builtins(request.sampling) | {
        "n_predict": -1 if request.sampling.max_tokens is None else request.sampling.max_tokens,
        "stream": bool(wire.stream),
    }
    return CompletionHead(
        model=service.model_name(request.model),
        settings=settings,
        fields=wire.response_fields or (),
        shows=wire.n_predict != 0,
    )
