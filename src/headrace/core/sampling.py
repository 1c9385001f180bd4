"""Sampling parameters: name, type, range and help, each declared once.

The structs of the HTTP API inherit `SamplingFields` and the command line makes its flags of it;
`Sampling` checks the ranges. An engine supports the fields that it lists in
`Capabilities.sampling`; a value that changes nothing needs no support.
"""

from __future__ import annotations

import json
from collections.abc import Set
from typing import Annotated, Any, NamedTuple, cast, get_args, get_type_hints

import msgspec
from msgspec import Meta

from headrace.core.errors import InvalidRequest

_INT32 = 2**31 - 1
_TOP_LOGPROBS = 20
_BIAS = 100


class Range(NamedTuple):
    """The values that a parameter can have; `above` excludes the lower bound itself."""

    low: float
    high: float
    above: bool = False

    def includes(self, value: float) -> bool:
        """Whether a value is within the range; NaN is not."""
        return (self.low < value if self.above else self.low <= value) and value <= self.high

    def __str__(self) -> str:
        """Describe the range for an error message."""
        if self.above:
            return f"above {self.low} and at most {self.high}"
        return f"between {self.low} and {self.high}"


def _parameter(
    description: str,
    low: float,
    high: float,
    *,
    above: bool = False,
    neutral: tuple[float, ...] = (),
) -> Meta:
    # Not Meta's own bounds: the errors of msgspec do not name the field.
    return Meta(
        description=description,
        extra={"range": Range(low, high, above), "neutral": neutral},
        extra_json_schema={"exclusiveMinimum" if above else "minimum": low, "maximum": high},
    )


TOKEN_RANGE = Range(0, _INT32)
"""How many tokens can be asked for; 0 with an echo or log probabilities of the prompt only."""
MaxTokens = Annotated[int, _parameter("Most tokens to generate.", *TOKEN_RANGE[:2])]
AnyTokens = Annotated[int, _parameter("Most tokens to generate; -1 is no limit.", -1, _INT32)]
MinTokens = Annotated[
    int, _parameter("No end or stop before this many tokens.", 0, _INT32, neutral=(0,))
]
Temperature = Annotated[float, _parameter("Randomness; 0 is greedy.", 0, 2, neutral=(1,))]
TopP = Annotated[
    float, _parameter("Sample from the tokens with this total probability.", 0, 1, neutral=(1,))
]
TopK = Annotated[
    int,
    _parameter("Sample from this many tokens; 0 and -1 mean all.", -1, _INT32, neutral=(0, -1)),
]
MinP = Annotated[
    float, _parameter("Least probability relative to the likeliest token.", 0, 1, neutral=(0,))
]
PresencePenalty = Annotated[
    float, _parameter("Penalty for tokens already used.", -2, 2, neutral=(0,))
]
FrequencyPenalty = Annotated[
    float, _parameter("Penalty for each use of a token.", -2, 2, neutral=(0,))
]
RepetitionPenalty = Annotated[
    float, _parameter("Above 1 discourages repetition.", 0, 100, above=True, neutral=(1,))
]
Seed = Annotated[int, _parameter("Same seed, same random choices.", -(2**63), 2**64 - 1)]
LOGPROB_RANGE = Range(0, _TOP_LOGPROBS)
"""How many candidates can be reported for a token."""
Logprobs = Annotated[int, _parameter("Candidates reported per token.", *LOGPROB_RANGE[:2])]


class SamplingFields(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The scalar parameters. None leaves the engine's default."""

    max_tokens: MaxTokens | None = None
    min_tokens: MinTokens | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    min_p: MinP | None = None
    presence_penalty: PresencePenalty | None = None
    frequency_penalty: FrequencyPenalty | None = None
    repetition_penalty: RepetitionPenalty | None = None
    seed: Seed | None = None


class Sampling(SamplingFields, frozen=True, kw_only=True, omit_defaults=True):
    """How tokens are chosen.

    `logprobs` is the number of candidates reported for each token beside the chosen one (0
    reports the chosen one alone). `logit_bias` maps token ids to what is added to their logits,
    -100 to 100.

    Raises:
        InvalidRequest: a value is out of its range; `param` names the field.
    """

    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: Logprobs | None = None
    logit_bias: dict[int, float] = {}

    def __post_init__(self) -> None:
        """Refuse values outside of their range."""
        for name, allowed in _RANGES.items():
            value = getattr(self, name)
            if value is not None and not allowed.includes(value):
                raise InvalidRequest(f"{name} must be {allowed}.", param=name)
        if self.min_tokens and self.max_tokens and self.min_tokens > self.max_tokens:
            raise InvalidRequest("min_tokens is above max_tokens.", param="min_tokens")
        if not all(self.stop):
            raise InvalidRequest("A stop string is empty.", param="stop")
        if not all(-_BIAS <= bias <= _BIAS for bias in self.logit_bias.values()):
            raise InvalidRequest(f"logit_bias goes from -{_BIAS} to {_BIAS}.", param="logit_bias")

    def without_neutral(self, supported: Set[str]) -> Sampling:
        """Return it without values that change nothing, of fields that are not `supported`."""
        left_out = {
            name: None
            for name, values in _NEUTRAL.items()
            if name not in supported and getattr(self, name) in values
        }
        has_bias = "logit_bias" in supported or any(self.logit_bias.values())
        if not left_out and (has_bias or not self.logit_bias):
            return self
        bias = self.logit_bias if has_bias else {}
        return msgspec.structs.replace(self, logit_bias=bias, **left_out)


def checked_defaults(value: object) -> object:
    """Return parameters by their names, checked; text is JSON.

    Raises:
        ValueError: a name or a value is not accepted.
    """
    given: Any = json.loads(value) if isinstance(value, str) else value
    if not isinstance(given, dict):
        return given
    names = cast("dict[str, Any]", given)
    known = (*SamplingFields.__struct_fields__, "stop")
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"{unknown[0]} is none of {', '.join(known)}")
    stop = names.get("stop", ())
    fields = {**names, "stop": [stop] if isinstance(stop, str) else stop}
    try:
        built = msgspec.convert(fields, Sampling)
    except (msgspec.ValidationError, InvalidRequest) as error:
        raise ValueError(str(error).removesuffix(".")) from None
    plain: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(built))
    return {name: plain[name] for name in names if name in plain}


def described(fields: type[msgspec.Struct]) -> dict[str, tuple[type, Meta]]:
    """Return the type and the metadata of each field that is `Annotated[T, Meta(...)] | None`."""
    return {
        name: (plain, meta)
        for name, hint in get_type_hints(fields, include_extras=True).items()
        if (annotated := next(iter(get_args(hint)), None)) is not None
        for plain, meta in [_parts(annotated)]
        if meta is not None
    }


def _parts(annotated: Any) -> tuple[type, Meta | None]:
    plain, *metas = get_args(annotated) or (annotated,)
    return plain, next((meta for meta in metas if isinstance(meta, Meta)), None)


_EXTRA = {name: meta.extra or {} for name, (_, meta) in described(Sampling).items()}
_RANGES: dict[str, Range] = {name: extra["range"] for name, extra in _EXTRA.items()}
_NEUTRAL: dict[str, tuple[float, ...]] = {name: extra["neutral"] for name, extra in _EXTRA.items()}
