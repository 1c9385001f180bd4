"""Types and fields that several routes share, and their translation to core requests.

The translation is pure: no I/O.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, ClassVar, Literal, Protocol, TypeVar, cast

import msgspec
from msgspec import Meta

from headrace.api import fields, limits
from headrace.api.exchange import Call
from headrace.api.fields import Body, Peers
from headrace.api.limits import ApiSettings
from headrace.core.constraint import AnyForm, Constraint, constraint_of
from headrace.core.errors import InvalidRequest, Unsupported
from headrace.core.sampling import AnyTokens, Logprobs, RepetitionPenalty, Sampling, SamplingFields
from headrace.core.values import keep_alive_seconds

T = TypeVar("T")
Prompt = str | tuple[int, ...]

ModelName = Annotated[str, Meta(max_length=512)]
TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Count = Annotated[int, Meta(ge=1, le=2**31 - 1)]
StopText = Annotated[str, Meta(min_length=1, max_length=1024)]
Bias = Annotated[float, Meta(ge=-100, le=100)]
KeepAlive = float | Annotated[str, Meta(max_length=64)]

JsonText = dict[str, Any] | str
"""A JSON schema, or its text."""

TOKEN_SCHEMA = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}


def inputs_schema(limit: int, **text: int) -> dict[str, Any]:
    """Return the JSON schema of a text, a list of texts, token ids, or a list of lists of them."""
    string = {"type": "string", **text}
    tokens = {"type": "array", "items": TOKEN_SCHEMA, "minItems": 1}
    several = {"type": "array", "minItems": 1, "maxItems": limit}
    return {"anyOf": [string, tokens, {**several, "items": string}, {**several, "items": tokens}]}


class StreamOptions(Body, frozen=True):
    """`include_usage` adds a last chunk with the token counts."""

    include_usage: bool | None = None

    peers: ClassVar[Peers] = fields.STREAM_OPTIONS


class JsonSchema(Body, frozen=True):
    """A named JSON schema for the answer."""

    name: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None

    peers: ClassVar[Peers] = fields.JSON_SCHEMA


class StructuredOutputs(Body, frozen=True):
    """vLLM's place for what the answer has to be: one of these."""

    json: JsonText | None = None
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None

    peers: ClassVar[Peers] = fields.STRUCTURED_OUTPUTS


class ResponseFormat(Body, frozen=True):
    """The required format of the answer; `schema` is llama-server's place for a JSON schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None
    schema: dict[str, Any] | None = None


class GenerateFields(SamplingFields, Body, frozen=True, kw_only=True):
    """Fields of every request that generates. null means absent.

    `repeat_penalty`, `json_schema` and `grammar` are llama-server's names, `regex` and `ebnf` those
    of SGLang, `structured_outputs` and `guided_*` those of vLLM.
    """

    max_tokens: AnyTokens | None = None
    # OpenAI's seed is a signed 64-bit integer; core also takes unsigned ones.
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None

    model: ModelName | None = None
    n: Annotated[int, Meta(ge=1, le=128)] | None = None
    stop: StopText | Annotated[list[StopText], Meta(max_length=limits.MAX_STOP)] | None = None
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=limits.MAX_STOP)] | None = None
    ignore_eos: bool | None = None
    logit_bias: (
        Annotated[
            dict[TokenId, Bias],
            Meta(
                max_length=limits.MAX_LOGIT_BIAS,
                extra_json_schema={"propertyNames": {"pattern": "^(0|[1-9][0-9]{0,8})$"}},
            ),
        ]
        | None
    ) = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    context_length: Count | None = None
    keep_alive: KeepAlive | None = None
    repeat_penalty: RepetitionPenalty | None = None
    json_schema: JsonText | None = None
    grammar: str | None = None
    regex: str | None = None
    ebnf: str | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: JsonText | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    prompt_logprobs: Logprobs | None = None

    @property
    def wants_usage(self) -> bool:
        """Whether the stream ends with a usage chunk."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def names(self) -> dict[str, str]:
        """Return the client's names for fields of the core, where they differ."""
        names = {_PARAMS[form]: place for place, form, _ in wanted_forms(self)}
        if self.repeat_penalty is not None and self.repetition_penalty is None:
            names["repetition_penalty"] = "repeat_penalty"
        return names


class Addressed(Protocol):
    """A request on the wire that names a model."""

    @property
    def model(self) -> str | None:
        """The model's id or an alias; None is the only model."""
        ...

    @property
    def keep_alive(self) -> float | str | None:
        """How long the model stays loaded after the request."""
        ...


def request_fields(wire: Addressed, settings: ApiSettings, call: Call) -> dict[str, Any]:
    """Return the fields that every core request has.

    Raises:
        InvalidRequest: keep_alive is not a duration, or longer than a year.
    """
    return envelope(wire.model, settings, call) | _keep_alive(wire.keep_alive, settings, call)


def envelope(model: str | None, settings: ApiSettings, call: Call) -> dict[str, Any]:
    """Return the fields of a core request that do not depend on its kind."""
    return {
        "id": call.id,
        "received": call.received,
        "deadline_s": settings.deadline_s,
        "load_wait_s": settings.load_wait_s,
        "model": model or "",
        "client": call.client,
        "batch": call.batch,
        "traceparent": call.traceparent,
        "tracestate": call.tracestate,
    }


def generate_fields(
    wire: GenerateFields, settings: ApiSettings, call: Call, *, prompts: int = 1
) -> dict[str, Any]:
    """Return the fields that every core request that generates has, except for its sampling.

    Raises:
        InvalidRequest: fields contradict each other, or there are too many choices.
        Unsupported: log probabilities of the prompt are requested in a stream.
    """
    if wire.stream_options is not None and not wire.stream:
        raise InvalidRequest("stream_options needs stream to be true.", param="stream_options")
    if (wire.n or 1) * prompts > limits.MAX_CHOICES:
        raise InvalidRequest(f"At most {limits.MAX_CHOICES} choices are accepted.", param="n")
    if wire.prompt_logprobs is not None and wire.stream:
        raise Unsupported("prompt_logprobs is not sent in a stream.", param="prompt_logprobs")
    return answer_fields(wire, settings, call, stream=bool(wire.stream)) | {
        "n": wire.n or 1,
        "prompt_logprobs": wire.prompt_logprobs,
        "constraint": _constraint(wire),
        "context_length": wire.context_length,
    }


class Truncated(Protocol):
    """A request on the wire whose texts may be cut."""

    @property
    def truncate(self) -> bool | None:
        """Whether a text that is too long is cut."""
        ...

    @property
    def truncate_prompt_tokens(self) -> int | None:
        """VLLM's field: -1 cuts to the model's context."""
        ...


def truncates(wire: Truncated) -> bool | None:
    """Return whether texts are cut to the context; None leaves it to the route.

    Raises:
        InvalidRequest: two fields contradict each other.
        Unsupported: they are to be cut to a number of tokens.
    """
    if (most := wire.truncate_prompt_tokens) is None:
        return wire.truncate
    if most != -1:
        raise Unsupported(
            "truncate_prompt_tokens is not supported here. Use -1, for the context of the model.",
            param="truncate_prompt_tokens",
        )
    if wire.truncate is False:
        raise InvalidRequest("truncate and truncate_prompt_tokens differ.", param="truncate")
    return True


def answer_fields(
    wire: Addressed, settings: ApiSettings, call: Call, *, stream: bool
) -> dict[str, Any]:
    """Return the fields that every core request has, for an answer that may be streamed.

    Raises:
        InvalidRequest: keep_alive is not a duration, or longer than a year.
    """
    values = request_fields(wire, settings, call)
    if stream:
        # The comments of a stream report the progress of the load, so that it has no time limit.
        values["load_wait_s"] = None
    return values


def to_sampling(wire: GenerateFields, *, max_tokens: int | None, logprobs: int | None) -> Sampling:
    """Build the core's parameters; scalars not named here are those of the wire.

    Raises:
        InvalidRequest: a value is out of its range.
    """
    # -1 is without limit, as llama-server has it.
    most = None if max_tokens == -1 else max_tokens
    values = scalars(wire) | {"max_tokens": most, "logprobs": logprobs}
    values["repetition_penalty"] = _either(
        "repeat_penalty", wire.repeat_penalty, "repetition_penalty", wire.repetition_penalty
    )
    return Sampling(
        **values,
        stop=(wire.stop,) if isinstance(wire.stop, str) else tuple(wire.stop or ()),
        stop_token_ids=tuple(wire.stop_token_ids or ()),
        ignore_eos=bool(wire.ignore_eos),
        logit_bias=wire.logit_bias or {},
    )


def scalars(wire: SamplingFields) -> dict[str, Any]:
    """Return the scalar parameters of a request as the core has them."""
    values = {name: getattr(wire, name) for name in SamplingFields.__struct_fields__}
    if wire.top_k == -1:
        # In vLLM's API -1 means that all tokens are candidates.
        values["top_k"] = 0
    # 0 has no effect, so that every engine accepts it.
    values["min_tokens"] = wire.min_tokens or None
    return values


def to_inputs(name: str, wire: str | Sequence[str | int | list[int]], limit: int) -> list[Prompt]:
    """Return the texts or lists of token ids of a field that may hold one or several.

    Raises:
        InvalidRequest: the list is empty, mixed or too long.
    """
    if isinstance(wire, str):
        return [wire]
    kinds = {type(item) for item in wire}
    if len(kinds) != 1:
        problem = "is an empty list" if not kinds else "mixes texts, tokens and lists"
        raise InvalidRequest(f"{name} {problem}.", param=name)
    if kinds == {int}:
        return [tuple(cast("Sequence[int]", wire))]
    if len(wire) > limit:
        raise InvalidRequest(f"{name}: at most {limit} are accepted.", param=name)
    return [item if isinstance(item, str) else tuple(cast("list[int]", item)) for item in wire]


def _either(alias: str, given: T | None, name: str, value: T | None) -> T | None:
    """Return the value of a field that has two names."""
    if given is not None and value is not None and given != value:
        raise InvalidRequest(f"{alias} and {name} differ.", param=alias)
    return value if given is None else given


def _keep_alive(value: float | str | None, settings: ApiSettings, call: Call) -> dict[str, Any]:
    if value is None:
        return {}
    try:
        wanted = keep_alive_seconds(value)
    except ValueError as error:
        raise InvalidRequest(f"keep_alive: {error}.", param="keep_alive") from error
    if call.is_admin or not settings.has_keys:
        return {"keep_alive": wanted}
    most = settings.max_keep_alive_s
    return {"keep_alive": most if wanted < 0 else min(wanted, most), "lengthens": True}


_PARAMS = {"json_schema": "response_format", "regex": "regex", "choice": "choice"}
_PARAMS["grammar"] = "grammar"
_PLACES: tuple[tuple[str, AnyForm], ...] = (
    ("json_schema", "json_schema"),
    ("guided_json", "json_schema"),
    ("structured_outputs.json", "json_schema"),
    ("regex", "regex"),
    ("guided_regex", "regex"),
    ("structured_outputs.regex", "regex"),
    ("guided_choice", "choice"),
    ("structured_outputs.choice", "choice"),
    ("grammar", "grammar"),
    ("ebnf", "grammar"),
    ("guided_grammar", "grammar"),
    ("structured_outputs.grammar", "grammar"),
)


def wanted_forms(wire: GenerateFields) -> Iterator[tuple[str, AnyForm, Any]]:
    """Yield what the answer has to be: the place in the request, the form, and its value.

    Raises:
        InvalidRequest: a response format has a part too many or too few.
    """
    for place, form in _PLACES:
        outer, _, name = place.rpartition(".")
        value = getattr(getattr(wire, outer) if outer else wire, name, None)
        # An empty text is no constraint in llama-server and SGLang.
        is_absent = value == "" and place in {"grammar", "regex", "ebnf"}
        if value is not None and not is_absent:
            yield place, form, value
    if wire.structured_outputs is not None and wire.structured_outputs.json_object:
        yield "structured_outputs.json_object", "json_schema", {"type": "object"}
    if (schema := _schema(wire.response_format)) is not None:
        yield "response_format", "json_schema", schema


def _constraint(wire: GenerateFields) -> Constraint | None:
    wanted = list(wanted_forms(wire))
    built = [(place, _built(place, form, value)) for place, form, value in wanted]
    for place, constraint in built[1:]:
        if constraint != built[0][1]:
            raise InvalidRequest(f"{built[0][0]} and {place} are both given.", param=built[0][0])
    return built[0][1] if built else None


def _built(place: str, form: AnyForm, value: Any) -> Constraint:
    if value == "":
        raise InvalidRequest(f"{place} is empty.", param=place)
    if form == "json_schema" and isinstance(value, str):
        limits.check_depth(value.encode(), place)
        try:
            value = msgspec.json.decode(value, type=dict[str, Any])
        except (msgspec.DecodeError, UnicodeError) as error:
            raise InvalidRequest(
                f"{place} is not the text of a JSON schema.", param=place
            ) from error
    return constraint_of(form, value)


def _schema(wanted: ResponseFormat | None) -> dict[str, Any] | None:
    if wanted is None:
        return None
    named, flat = wanted.json_schema, wanted.schema
    if wanted.type != "json_schema" and (
        named is not None or (wanted.type == "text" and flat is not None)
    ):
        raise InvalidRequest("A schema needs type json_schema.", param="response_format.type")
    if wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return {"type": "object"} if flat is None else flat
    if named is None and flat is None:
        raise InvalidRequest("json_schema is missing.", param="response_format.json_schema")
    if named is not None and flat is not None:
        raise InvalidRequest(
            "schema and json_schema are both given.", param="response_format.schema"
        )
    return (flat if named is None else named.schema) or {}
