"""`headrace bench`: the speed of a service, measured as a client."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from headrace.cli import bench_text, terminal
from headrace.cli.common import Common, ModelFlags, known_models
from headrace.core.errors import ConfigError

if TYPE_CHECKING:
    from headrace.cli.terminal import Report
    from headrace.config import Settings as Configured
    from headrace.lab.bench.record import Limit, Run
    from headrace.lab.bench.run import Source
    from headrace.lab.bench.settings import Settings

_KEYS = ("HEADRACE_API_KEY", "HEADRACE_ADMIN_KEY", "OPENAI_API_KEY")
_INTERRUPTED = 130


def _flag(text: str, panel: str, metavar: str | None = None, least: float | None = None) -> Any:
    return typer.Option(help=text, metavar=metavar, min=least, rich_help_panel=panel)


_LOAD, _ASK, _OUT, _SERVICE = "Load", "Requests", "Output", "Service"


@dataclass(frozen=True)
class _Given:
    """The flags, by name."""

    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL | compare FILE...",
            help="Model for a server of its own, by default default_model; or records of "
            "earlier runs to compare.",
            autocompletion=known_models,
        ),
    ] = None
    url: Annotated[str | None, _flag("Measure the service at this address.", _SERVICE)] = None
    model: Annotated[str | None, _flag("The model's name there.", _SERVICE)] = None
    api: Annotated[Literal["chat", "completions"], _flag("Route to measure.", _SERVICE)] = "chat"
    concurrency: Annotated[
        str | None, _flag("Closed loop: clients; 1,2,4,8 by default.", _LOAD, "N,..")
    ] = None
    rate: Annotated[str | None, _flag("Open loop: requests/s.", _LOAD, "N,..")] = None
    arrival: Annotated[
        Literal["poisson", "constant"], _flag("How they arrive in an open loop.", _LOAD)
    ] = "poisson"
    requests: Annotated[int | None, _flag("Number at each load.", _LOAD, least=1)] = None
    duration: Annotated[str | None, _flag("Time of each load; 10s by default.", _LOAD)] = None
    warm_up: Annotated[int, _flag("Requests before each load, not counted.", _LOAD, least=0)] = 1
    prompt_tokens: Annotated[
        str | None, _flag("Length of made-up prompts; 128 by default.", _ASK, "N|N-M")
    ] = None
    output_tokens: Annotated[str, _flag("Length of answers.", _ASK, "N|N-M")] = "64"
    prompts: Annotated[Path | None, _flag("Read from a .jsonl or text file.", _ASK, "FILE")] = None
    shared_prefix: Annotated[
        int, _flag("Number of tokens that all prompts share.", _ASK, least=0)
    ] = 0
    seed: Annotated[int, _flag("Same seed, same requests.", _ASK)] = 0
    temperature: Annotated[float, _flag("0 is greedy.", _ASK, least=0)] = 0.0
    body: Annotated[str, _flag("Further fields of each request.", _ASK, "JSON")] = ""
    timeout: Annotated[str, _flag("Longest time for a request.", _ASK)] = "600s"
    slo: Annotated[str, _flag("Share within, as ttft=500ms,itl=50ms,total=5s.", _OUT)] = ""
    plot: Annotated[Path | None, _flag("Draw a .png or .svg.", _OUT, "FILE")] = None
    output: Annotated[Path | None, _flag("Write the record, as JSON.", _OUT, "FILE")] = None
    raw: Annotated[
        bool, typer.Option("--raw", help="Keep every request.", rich_help_panel=_OUT)
    ] = False
    model_bytes: Annotated[
        str | None, _flag("Size of the weights, for the share of the limit.", _OUT)
    ] = None
    bandwidth: Annotated[
        str | None, _flag("Bytes/s of the memory, if not this machine's.", _OUT)
    ] = None

    @property
    def names(self) -> list[str]:
        return self.words or []


def bench(common: Common, given: _Given, own: ModelFlags) -> None:
    """Measure a service with OpenAI's API: any with --url, else a server of its own.

    `headrace bench compare A.json B.json` shows records side by side.
    """
    _check(given)
    if given.names[:1] == ["compare"]:
        _compare(common, given.names[1:], given.plot)
    else:
        _bench(common, given, own)


def _check(given: _Given) -> None:
    """Refuse flags that contradict each other, and files that cannot be written."""
    if given.plot is not None:
        from headrace.lab.bench import plot

        plot.check(given.plot)
    if given.output is not None and not given.output.parent.is_dir():
        raise ConfigError(f"flag --output: there is no folder {given.output.parent}.")
    if given.names[:1] == ["compare"]:
        return
    if len(given.names) > 1 or (given.url and given.names):
        raise ConfigError("One model at a time; with --url, name it with --model.")
    if given.prompts is not None and (given.prompt_tokens or given.shared_prefix):
        raise ConfigError("--prompts has its own lengths: no --prompt-tokens, no --shared-prefix.")
    if given.requests is not None and given.duration is not None:
        raise ConfigError("Either --requests or --duration.")
    if given.concurrency and given.rate:
        raise ConfigError("Either --concurrency (closed loop) or --rate (open loop).")


def _bench(common: Common, given: _Given, flags: ModelFlags) -> None:
    configured, plan, own = flags.settings(common), _plan(given), None
    if not given.url:
        own = given.names[0] if given.names else configured.config.default_model
    run = _measured(plan, configured, own, _of_server(common, flags), given)
    _show(common, run, given)
    _keep(run, configured.config.home)
    if run.interrupted:
        raise typer.Exit(_INTERRUPTED)


def _keep(run: Run, home: Path) -> None:
    """Keep the figures of a run, which the console shows."""
    from headrace import measurements
    from headrace.lab.bench.record import curve

    if any(level.ok for level in run.levels):
        try:
            measurements.keep(home, curve(run))
        except (OSError, ConfigError) as error:
            terminal.note(f"The run is not kept for the console: {error}")


def _plan(given: _Given) -> Settings:
    from headrace.lab.bench import settings as parse

    closed = given.concurrency or "1,2,4,8"
    duration_s = None if given.requests else parse.seconds("--duration", given.duration or "10s")
    made_up = given.prompt_tokens or "128"
    return parse.Settings(
        model=given.model or "",
        loads=parse.loads("open", given.rate) if given.rate else parse.loads("closed", closed),
        api=given.api,
        requests=given.requests,
        duration_s=duration_s,
        warm_up=given.warm_up,
        prompt=None if given.prompts else parse.span("--prompt-tokens", made_up),
        output=parse.span("--output-tokens", given.output_tokens),
        shared_prefix=given.shared_prefix,
        arrival=given.arrival,
        seed=given.seed,
        temperature=given.temperature,
        timeout_s=parse.seconds("--timeout", given.timeout),
        slo=parse.slo(given.slo),
        body=parse.extra_body(given.body),
    )


def _of_server(common: Common, own: ModelFlags) -> list[str]:
    """Return the flags for our own server."""
    flags = {
        "--config": common.file,
        "--home": common.home,
        "--engine": own.engine,
        "--device": own.device,
        "--context-length": own.context_length,
    }
    words = [str(part) for pair in flags.items() if pair[1] is not None for part in pair]
    return [*words, *(part for pair in own.option or [] for part in ("-o", pair))]


def _limit(configured: Configured, own: str | None, given: _Given) -> Limit | None:
    from headrace.lab.bench.run import memory_limit
    from headrace.lab.bench.settings import amount

    weights = int(amount("--model-bytes", given.model_bytes)) if given.model_bytes else 0
    rate = amount("--bandwidth", given.bandwidth) if given.bandwidth is not None else None
    return memory_limit(configured, own, given.url, weights, rate)


def _measured(
    plan: Settings,
    configured: Configured,
    own: str | None,
    arguments: Sequence[str],
    given: _Given,
) -> Run:
    import msgspec

    from headrace import runtime
    from headrace.lab.bench.run import Source
    from headrace.machine import loop_factory

    source = Source(
        url=given.url or "",
        key=next((os.environ[name] for name in _KEYS if os.environ.get(name)), None),
        own=own is not None,
        file=given.prompts,
        machine=msgspec.to_builtins(runtime.system()),
        limit=lambda: _limit(configured, own, given),
    )
    if own is not None:
        plan = msgspec.structs.replace(plan, model=configured.model_spec(own).name)
        arguments = [own, *arguments]
    with terminal.progress() as report, asyncio.Runner(loop_factory=loop_factory()) as runner:
        try:
            return runner.run(_measure(plan, source, arguments, report))
        except asyncio.CancelledError:
            raise typer.Exit(_INTERRUPTED) from None


async def _measure(plan: Settings, source: Source, arguments: Sequence[str], report: Report) -> Run:
    import msgspec

    from headrace.lab.bench import run

    stop, begun = asyncio.Event(), asyncio.Event()

    def progress(label: str, done: int, total: int) -> None:
        begun.set()
        report(label, done, total)

    async with contextlib.AsyncExitStack() as stack:
        stack.enter_context(_signals(stop, begun))
        if source.own:
            report("starting the server", 0, 0)
            own = await stack.enter_async_context(run.own_server(arguments))
            source = msgspec.structs.replace(source, url=own.url, key=own.key)
        return await run.measure(source, plan, progress, stop)


@contextlib.contextmanager
def _signals(stop: asyncio.Event, begun: asyncio.Event) -> Generator[None]:
    """Let the first signal end the measurement with its figures so far, the second everything."""
    loop, main = asyncio.get_running_loop(), asyncio.current_task()
    assert main is not None

    def interrupted() -> None:
        if stop.is_set() or not begun.is_set():
            main.cancel()
        stop.set()

    names = (signal.SIGINT, signal.SIGTERM)
    for name in names:
        loop.add_signal_handler(name, interrupted)
    try:
        yield
    finally:
        for name in names:
            loop.remove_signal_handler(name)


def _show(common: Common, run: Run, given: _Given) -> None:
    import msgspec

    from headrace.lab.bench.record import without_rows

    run = run if given.raw else without_rows(run)

    if given.output is not None:
        text = msgspec.json.format(msgspec.json.encode(run), indent=1)
        try:
            given.output.write_bytes(text + b"\n")
        except OSError as error:
            raise ConfigError(f"flag --output: {given.output}: {error.strerror}.") from None
    if given.plot is not None:
        from headrace.lab.bench.plot import draw

        draw({run.settings.model: run}, given.plot)
    if common.as_json:
        terminal.print_json(run)
    else:
        bench_text.show(run)


def _compare(common: Common, files: Sequence[str], plot: Path | None) -> None:
    from headrace.lab.bench.record import read

    if len(files) < 2:
        raise ConfigError("compare needs two records or more, as --output writes them.")
    stems = [Path(file).stem for file in files]
    names = stems if len(set(stems)) == len(stems) else list(files)
    runs = {name: read(Path(file)) for name, file in zip(names, files, strict=True)}
    if plot is not None:
        from headrace.lab.bench.plot import draw

        draw(runs, plot)
    if common.as_json:
        terminal.print_json(runs)
        return
    bench_text.show_beside(runs)
