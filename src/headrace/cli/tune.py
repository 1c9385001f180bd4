"""`headrace tune`: measures the engines that can run a model here, and records the best."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from headrace.cli import terminal
from headrace.cli.common import (
    Common,
    ContextLength,
    Device,
    ModelArgument,
    Options,
    parse_options,
    write_model,
)
from headrace.core.errors import ConfigError

if TYPE_CHECKING:
    from headrace.config import Settings
    from headrace.core.model import ModelSpec
    from headrace.engines.measured import Record, Trial

Aim = Literal["latency", "throughput"]
AIMS: tuple[Aim, ...] = ("latency", "throughput")

Streams = Annotated[str, typer.Option(metavar="N,N,...", help="Numbers of concurrent requests.")]
Rounds = Annotated[
    int, typer.Option(min=1, help="Most turns of each; near ties have up to 5 more.")
]
Budget = Annotated[
    float,
    typer.Option(
        metavar="SECONDS", min=1.0, help="Time of the whole run, after downloads and conversions."
    ),
]
Write = Annotated[Aim | None, typer.Option(help="Write the winner into the configuration.")]

_HEADS = (
    *("ENGINE", "OPTIONS", "WEIGHTS", "STREAMS", "TOKENS/S", "LEAST-MOST", "FIRST TOKEN", "P99"),
    *("OF LIMIT", "MEMORY", "LOAD", "AGREES"),
)


def tune(
    common: Common,
    model: ModelArgument,
    streams: Streams = "1,8,32",
    engines: Annotated[str, typer.Option(metavar="NAME,NAME,...", help="Only these engines.")] = "",
    seconds: Annotated[float, typer.Option(min=0.0, help="Time of each turn.")] = 5.0,
    rounds: Rounds = 3,
    tokens: Annotated[int, typer.Option(min=1, help="Length of each answer.")] = 128,
    budget: Budget = 300.0,
    device: Device = None,
    context_length: ContextLength = None,
    option: Options = None,
    write: Write = None,
) -> None:
    """Measure the engines and options that can run a model on this machine, in --budget seconds.

    The fastest are compared with a reference; one that does not agree with it is not proposed. What
    is slower, or had no time, is left out and named. Nothing is changed without --write.
    """
    from headrace import runtime
    from headrace.lab.tune import tuner
    from headrace.lab.tune.measure import Shape

    settings = common.settings(
        device=device, context_length=context_length, options=parse_options(option)
    )
    spec = settings.model_spec(model)
    shape = Shape(
        streams=_numbers(streams), seconds=seconds, rounds=rounds, tokens=tokens, budget_s=budget
    )
    wanted = [name.strip() for name in engines.split(",") if name.strip()]
    terminal.note(f"This takes at most {budget:g} s (--budget), after downloads and conversions.")
    with terminal.progress() as report:
        record = asyncio.run(tuner.tune(settings, spec, shape, wanted, report))
    if common.as_json:
        terminal.print_json(record)
    else:
        _print(record, runtime.describe(spec, settings.config).engine)
    if write is not None:
        _write(settings, spec, record, write)
    else:
        terminal.note("Nothing is changed; --write latency or --write throughput writes a winner.")


def _numbers(text: str) -> tuple[int, ...]:
    try:
        numbers = tuple(sorted({int(word) for word in text.split(",")}))
    except ValueError:
        numbers = ()
    if not numbers or not 0 < min(numbers) <= max(numbers) <= 1024:
        raise ConfigError(f"flag --streams: {text} is not like 1,8,32, up to 1024.")
    return numbers


def _print(record: Record, engine: str) -> None:
    print(f"{record.model} on {record.machine}, {record.context_length} tokens of context each")
    terminal.columns(_HEADS, [row for trial in record.trials for row in _rows(trial)])
    print()
    for trial in record.trials:
        if trial.fault is not None:
            print(f"Not {trial.title}: {trial.fault}.")
        elif trial.left_out is not None:
            print(f"Left out: {trial.title}: {trial.left_out}.")
    for line in _verdicts(record, engine):
        print(line)


def _rows(trial: Trial) -> Iterator[list[Any]]:
    """Yield a row for each number of streams; common values are in the first only."""
    own: list[Any] = [trial.engine, _options(trial) or None, trial.precision]
    last = [
        terminal.size(max(trial.memory.values(), default=0)) if trial.memory else None,
        f"{trial.load_s:.1f} s" if trial.load_s is not None else None,
        _agreement(trial),
    ]
    for point in trial.figures:
        limit = None if point.of_limit is None else f"{point.of_limit:.0%}"
        spread = f"{point.spread[0]:.1f}-{point.spread[1]:.1f}"
        first = [f"{point.first_token_ms_p50:.0f} ms", f"{point.first_token_ms_p99:.0f} ms", limit]
        yield [*own, point.streams, f"{point.tokens_per_s:.1f}", spread, *first, *last]
        own, last = [""] * len(own), [""] * len(last)
    if not trial.figures:
        yield [*own, *[None] * (len(_HEADS) - 1 - len(own)), trial.fault and "no"]


def _agreement(trial: Trial) -> str | None:
    if trial.agreement is None:
        return None if trial.fault is None else "no"
    off = trial.agreement.distance
    text = f"{trial.agreement.forced:.0%}" + ("" if off is None else f" +-{off:.2f}")
    return text if trial.fault is None else f"no, {text}"


def _options(trial: Trial) -> str:
    return " ".join(f"{key}={value}" for key, value in trial.options.items())


def _verdicts(record: Record, engine: str) -> Iterator[str]:
    """Yield what is proposed, beside `engine`, which runs the model now."""
    yield f"AGREES is with {record.reference}."
    if record.seconds is not None and record.budget_s is not None:
        yield f"Took {record.seconds:.0f} of {record.budget_s:g} s."
    if record.bandwidth:
        yield f"LIMIT is what {record.bandwidth / 1e9:.1f} GB/s of memory allow."
    now = next((trial for trial in record.trials if trial.engine == engine), None)
    for aim in AIMS:
        if (best := record.winner(aim)) is not None:
            streams = record.streams_for(aim)
            usual = "as it is" if best is now else now and f"{now.title}, {now.summary(streams)}"
            usual = usual or f"{engine}, which was not measured"
            yield f"For {aim}: {best.title}, {best.summary(streams)} (now: {usual})."


def _write(settings: Settings, spec: ModelSpec, record: Record, aim: Aim) -> None:
    from headrace import runtime

    best = record.winner(aim)
    if best is None:
        raise ConfigError(f"No measured engine can be written for {aim}.")
    path = settings.file or settings.searched[-1]
    streams = record.streams_for(aim)
    known = runtime.engine_options()[best.engine].model_fields
    own = {key: value for key, value in spec.options.items() if key in known}
    changes: dict[str, Any] = {"engine": best.engine, "options": {**best.options, **own}}
    if spec.name not in settings.config.models and spec.model != spec.name:
        changes = {"model": spec.model, **changes}
    remark = f"tuned {record.day} for {aim}: {best.summary(streams)}"
    write_model(path, spec.name, changes, remark)
