"""The figures of one request, each declared once: name, type, unit, definition, merge rule.

All else follows from the declarations: the figures of several requests together, attributes of
spans, columns of statistics, the help of metrics, the table in docs/figures.md. A new figure is a
field here and its computation in the worker's meter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Annotated, Any, NamedTuple, Self, get_type_hints

import msgspec
from msgspec import Meta

Merge = Callable[[Sequence[Any]], Any]
"""Makes one value of those of several requests: at least one, and none of them None."""


class Figure(NamedTuple):
    """What is declared of a figure; `summarised` ones are columns of statistics."""

    unit: str
    help: str
    merge: Merge
    summarised: bool = False


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """A struct whose fields are figures."""

    @classmethod
    @cache
    def declared(cls) -> dict[str, Figure]:
        """Return the figures by the names of their fields. Not to be changed."""
        hints = get_type_hints(cls, include_extras=True)
        return {name: hints[name].__metadata__[0].extra["figure"] for name in cls.__struct_fields__}

    @classmethod
    def merged(cls, several: Sequence[Self]) -> Self:
        """Return the figures of several requests (at least one) together."""
        if len(several) == 1:
            return several[0]
        together: dict[str, Any] = {}
        for name, figure in cls.declared().items():
            values = [value for item in several if (value := getattr(item, name)) is not None]
            if values:
                together[name] = figure.merge(values)
        return cls(**together)


def percentile(ordered: Sequence[float], percent: int) -> float:
    """Return the smallest of sorted values that `percent` % of all do not exceed (nearest rank)."""
    return ordered[-(-len(ordered) * percent // 100) - 1]


def _figure(unit: str, help: str, merge: Merge, *, summarised: bool = False) -> Meta:
    return Meta(description=help, extra={"figure": Figure(unit, help, merge, summarised)})


def _first(values: Sequence[Any]) -> Any:
    return values[0]


def _first_given(values: Sequence[str]) -> str:
    return next(filter(None, values), "")


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _whole_mean(values: Sequence[int]) -> int:
    return sum(values) // len(values)


def _undefined(_values: Sequence[Any]) -> None:
    """Return None: a mixture of several requests would mean nothing."""


def _by_device(values: Sequence[tuple[DeviceUse, ...]]) -> tuple[DeviceUse, ...]:
    uses: dict[str, list[DeviceUse]] = {}
    for use in (use for devices in values for use in devices):
        uses.setdefault(use.name, []).append(use)
    return tuple(map(DeviceUse.merged, uses.values()))


_ms, _rate, _count = partial(_figure, "ms"), partial(_figure, "tokens/s"), partial(_figure, "count")
_tokens, _bytes = partial(_figure, "tokens"), partial(_figure, "bytes")
_share, _text = partial(_figure, "0 to 1"), partial(_figure, "")


class Usage(Figures, frozen=True, kw_only=True):
    """Token counts, exact, as the engine reports them."""

    prompt_tokens: Annotated[
        int, _tokens("Tokens of the prompt, template and cached ones included.", sum)
    ] = 0
    cached_tokens: Annotated[
        int, _tokens("Tokens of the prompt from the engine's cache, not computed.", sum)
    ] = 0
    completion_tokens: Annotated[
        int, _tokens("Tokens written, over all choices; some of them may show no text.", sum)
    ] = 0
    reasoning_tokens: Annotated[
        int, _tokens("Tokens written while thinking, of the completion.", sum)
    ] = 0
    drafted_tokens: Annotated[
        int, _tokens("Tokens that speculation drafted and the model checked.", sum)
    ] = 0
    accepted_tokens: Annotated[
        int, _tokens("Tokens of the completion that a draft had and the model accepted.", sum)
    ] = 0

    @property
    def total_tokens(self) -> int:
        """Prompt and completion together."""
        return self.prompt_tokens + self.completion_tokens


class Gaps(Figures, frozen=True, kw_only=True):
    """Milliseconds between one delta with tokens and the next."""

    p50: Annotated[float, _ms("Median gap between a delta with tokens and the next.", _undefined)]
    p99: Annotated[float, _ms("The gap that 99 % do not exceed.", _undefined)]
    max: Annotated[float, _ms("The longest gap.", _undefined)]


class DeviceUse(Figures, frozen=True, kw_only=True):
    """Memory of one device in bytes; `worker_*` is what this worker holds of it.

    Mean and peak are over the request, sampled in the background. What is not known is None, and
    so is `busy_*` of a request that was soon over.
    """

    name: Annotated[str, _text("The device: `cpu`, or `cuda:0` and its product.", _first)]
    total: Annotated[int, _bytes("Memory of the device.", _first)]
    used: Annotated[int, _bytes("Memory of the device in use, by any process.", _first)]
    worker_used: Annotated[int, _bytes("Memory that the worker holds at the end.", _first)]
    worker_mean: Annotated[int, _bytes("The same, as a mean over the request.", _whole_mean)]
    worker_peak: Annotated[int, _bytes("The most of it during the request.", max)]
    busy_mean: Annotated[
        float | None, _share("How busy the device was, as a mean over time.", _mean)
    ] = None
    busy_peak: Annotated[float | None, _share("The most of it in one period of sampling.", max)] = (
        None
    )
    joules: Annotated[
        float | None, _figure("J", "The request's share of the GPU's energy.", sum)
    ] = None


class InferenceMetrics(Figures, frozen=True, kw_only=True):
    """What one request cost. Durations are monotonic milliseconds; an undefined figure is None."""

    started_at: Annotated[
        float, _figure("s", "The request's arrival on the wall clock, since 1970-01-01 UTC.", min)
    ]
    queue_ms: Annotated[
        float | None,
        _ms(
            "From arrival until the engine admits it, without loading and compiling.",
            max,
            summarised=True,
        ),
    ] = None
    load_ms: Annotated[float, _ms("How long the request waited for its model to load.", max)] = 0.0
    compile_ms: Annotated[
        float | None, _ms("Compiling the JSON schema of the answer, before the engine.", max)
    ] = None
    time_to_first_token_ms: Annotated[
        float | None, _ms("From arrival to the first text of the answer.", min, summarised=True)
    ] = None
    time_to_first_content_ms: Annotated[
        float | None,
        _ms("From arrival to the first text or call, after any thinking.", min, summarised=True),
    ] = None
    prefill_ms: Annotated[float | None, _ms("From admission to the first token.", _undefined)] = (
        None
    )
    prefill_tokens_per_second: Annotated[
        float | None, _rate("(`prompt_tokens` - `cached_tokens`) / `prefill_ms`.", _undefined)
    ] = None
    time_per_output_token_ms: Annotated[
        float | None,
        _ms("First token to last, for each token after the first.", _undefined, summarised=True),
    ] = None
    decode_tokens_per_second: Annotated[
        float | None,
        _rate(
            "Tokens after the first, over the time from first to last.", _undefined, summarised=True
        ),
    ] = None
    inter_token_ms: Annotated[
        Gaps | None, _ms("Gaps between a delta with tokens and the next.", _undefined)
    ] = None
    total_ms: Annotated[
        float, _ms("From arrival to the end, however it ended.", max, summarised=True)
    ] = 0.0
    chunks: Annotated[int, _count("Deltas, those without visible text included.", sum)] = 0
    tool_calls: Annotated[int, _count("Calls of tools, over all choices.", sum)] = 0
    usage: Annotated[Usage, _tokens("Token counts.", Usage.merged)] = Usage()
    devices: Annotated[tuple[DeviceUse, ...], _text("The use of each device.", _by_device)] = ()
    engine: Annotated[str, _text("The engine that answered.", _first)] = ""
    worker: Annotated[str, _text("The worker that answered.", _first)] = ""
    model: Annotated[str, _text("The model that answered.", _first)] = ""
    outcome: Annotated[str, _text("Why it ended: a finish reason or `error`.", _first)] = ""
    continuations: Annotated[
        int, _count("How often a worker died and the answer went on.", sum)
    ] = 0
    continued: Annotated[
        str, _text("In which way it went on: `exact` or `fast`.", _first_given)
    ] = ""
