"""The cost of telemetry: everything on against everything off.

Two parts, each in one interleaved run:

- collectors: `headrace serve echo` with a collector that is live, dead (its port is closed), slow
  (half a second for each export) and hung (it never answers). All have the trace file, metrics and
  usage. The engine has the speed of a small model: 128 ms of prefill, then 50 tokens/s. A client in
  its own process sends requests to all four servers at once, `--arrivals` a second to each, evenly
  and in rotation, so that a disturbance of the machine affects all servers.
  The times to the first event and to the end are measured by the client, and a p99 is that of all
  rounds together, with its 95 % interval by bootstrap over the rounds in brackets.
  Memory is the server's own, at the end.
- overhead: CPU of the serving process for each event at 32 and 512 echo streams, and output
  tokens/s of the real model, with everything on (a live collector, trace file, metrics, usage) over
  everything off. For CPU both sides run at the same time, and each round has servers of its own:
  the CPU time of an event varies by a third from one second to the next, and between processes.
  The rates of the real model vary too; the share of a core that the serving process uses is given
  with them, and the model cannot lose more than its growth.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import sys
from collections.abc import AsyncGenerator, Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import front
import report
import tax
from headrace import runtime
from headrace.lab import drive, load
from headrace.lab.drive import Server
from headrace.lab.figures import percentile, ratios, spread
from headrace.models.reference import parse

COLLECTORS = ("live", "dead", "slow", "hung")
SIDES = ("off", "on")
MOST_CPU, LEAST_THROUGHPUT, MOST_LATENCY = 1.05, 0.99, 1.01
_COLLECTOR = Path(__file__).parents[1] / "tests" / "telemetry" / "collector.py"
_OFF = {"HEADRACE_METRICS": "false", "HEADRACE_TRACES": "false", "HEADRACE_USAGE": "false"}
_STREAMS = 8


class Latency(NamedTuple):
    """One server, one round: milliseconds of each request, and the bytes of its process."""

    collector: str
    first: list[float]
    whole: list[float]
    memory: int


class Speed(NamedTuple):
    """One side, one round, with the real model; `cores` is what the serving process took."""

    side: str
    tokens_per_second: float
    cores: float


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = report.parser("What telemetry costs.")
    parser.add_argument("--only", choices=("collectors", "overhead"))
    parser.add_argument("--rounds", type=int, help="by default 12")
    parser.add_argument("--window", type=float, help="seconds of a round; by default 60 and 8")
    parser.add_argument("--arrivals", type=float, default=15, help="a second (collectors)")
    parser.add_argument("--streams", type=int, nargs="+", default=front.STREAMS)
    parser.add_argument("--rate", type=float, default=4000, help="events a second (overhead)")
    parser.add_argument("--model", default="smollm2", help="the real one; empty leaves it out")
    options = parser.parse_args(argv)
    if options.quick:
        options.rounds, options.window, options.rate = 1, 1.0, 2000
        options.streams, options.model = (32,), ""
    return options


@contextlib.asynccontextmanager
async def collecting(mode: str) -> AsyncGenerator[dict[str, str]]:
    """Run a collector, and yield the environment variables that name it."""
    async with contextlib.AsyncExitStack() as stack:
        url = f"http://127.0.0.1:{drive.free_port()}"
        if mode != "dead":
            command = [sys.executable, str(_COLLECTOR), "http", mode, "quiet"]
            collector = await stack.enter_async_context(drive.program(command))
            url = (await collector.line()).decode().strip()
        yield {"OTEL_EXPORTER_OTLP_ENDPOINT": url, "OTEL_TRACES_EXPORTER": "otlp"}


@contextlib.asynccontextmanager
async def server(command: Sequence[str], mode: str | None) -> AsyncGenerator[Server]:
    """Run a service with its own home and collector; without a mode all telemetry is off.

    It is yielded when its model is loaded, as only a limited number of requests may wait for that.
    """
    async with contextlib.AsyncExitStack() as stack:
        variables = await stack.enter_async_context(collecting(mode)) if mode else _OFF
        variables = {"HEADRACE_HOME": stack.enter_context(TemporaryDirectory()), **variables}
        run = drive.server(command, variables, ready="/health/ready")
        yield await stack.enter_async_context(run)


def sides(command: Sequence[str]) -> dict[str, front.Start]:
    """Return how to start a service with everything off, and one with everything on."""
    return {"off": partial(server, command, None), "on": partial(server, command, "live")}


# The two parts.


async def latencies(options: argparse.Namespace) -> list[Latency]:
    """Send requests to all servers at once, in another order each round."""
    pace = {"tokens_per_second": 50, "prefill_tokens_per_second": 500}
    body = {"model": "echo", "prompt": "abcdefgh" * 8, "stream": True, "max_tokens": 32}
    latencies: list[Latency] = []
    async with contextlib.AsyncExitStack() as stack:
        enter = stack.enter_async_context
        command = drive.serve("echo", "--fronts", "1", options=pace)
        servers = {mode: await enter(server(command, mode)) for mode in COLLECTORS}
        client = await enter(drive.program(load.command()))
        for number in range(-1, options.rounds or 12):
            turn = number % len(COLLECTORS)
            order = (*COLLECTORS[turn:], *COLLECTORS[:turn])
            # The first one warms up.
            seconds = (options.window or 60) if number >= 0 else 5
            urls = [servers[mode].url for mode in order]
            answer = await client.ask(
                {"do": "arrive", "urls": urls, "body": body, "rate": options.arrivals,
                 "seconds": seconds}
            )  # fmt: skip
            for mode, times in zip(order, answer["services"], strict=True):
                memory = servers[mode].program.process().memory_info().rss
                latency = Latency(mode, **times, memory=memory)
                if number >= 0:
                    latencies.append(latency)
                    print(
                        f"  {mode:5} p99 {p99([latency.first]):7.2f} {p99([latency.whole]):7.2f} ms"
                    )
    return latencies


def p99(rounds: Sequence[list[float]]) -> float:
    """Return the 99th percentile of all rounds together."""
    return percentile(chain(*rounds), 99)


async def events(options: argparse.Namespace, streams: int) -> list[front.Cell]:
    """Measure the CPU for each event of both sides at once, on new servers in each round."""
    speed = options.rate / 2 / streams
    starts, window = sides(front.in_step(speed)), options.window or 8
    return await front.beside(starts, options.rounds or 12, speed, window, streams)


async def speeds(options: argparse.Namespace) -> list[Speed]:
    """Measure the tokens/s of the real model of both sides in turn."""
    speeds: list[Speed] = []
    model = runtime.store(runtime.load_settings().config).fetch(parse(options.model))
    flags = ("--context-length", "512", "--fronts", "1")
    command = drive.serve(str(model), *flags, options={"slots": _STREAMS})
    async with contextlib.AsyncExitStack() as stack:
        client = await stack.enter_async_context(drive.program(load.command()))
        starts = sides(command).items()
        servers = {side: await stack.enter_async_context(start()) for side, start in starts}
        for number in range(-1, options.rounds or 12):
            for side in SIDES[:: 1 if number % 2 else -1]:
                before, texts = servers[side].program.cpu(), tax.prompts(_STREAMS, number)
                done = await tax.ask_http(servers[side], client, texts, 128)
                cores = (servers[side].program.cpu() - before) / done["seconds"]
                rate = sum(done["tokens"]) / done["seconds"]
                if number >= 0:
                    speeds.append(Speed(side, rate, cores))
                    print(f"  {side:3} {rate:7.1f} tok/s  {cores:.4f} cores", flush=True)
    return speeds


# The tables.


def of_collectors(figures: Sequence[Latency]) -> Iterator[str]:
    """Yield the table of the first part."""
    yield "p99 of all requests in ms, and over that of a live collector."
    yield "collector  requests  first event  over live             whole   over live             MB"
    by_mode = {
        mode: [latency for latency in figures if latency.collector == mode] for mode in COLLECTORS
    }
    for mode, those in by_mode.items():
        shown = [f"{mode:9}  {sum(len(latency.first) for latency in those):8}"]
        for kind, width in (("first", 11), ("whole", 6)):
            ours = [getattr(latency, kind) for latency in those]
            live = [getattr(latency, kind) for latency in by_mode["live"]]
            shown.append(f"{p99(ours):{width}.2f}  {ratio_of(ours, live):20}")
        yield "  ".join([*shown, f"{those[-1].memory / 2**20:.0f}"])
    yield f"Goal: dead, slow and hung over live at most {MOST_LATENCY}, and memory bounded."


def ratio_of(ours: Sequence[list[float]], others: Sequence[list[float]]) -> str:
    """Return the ratio of two p99 values, with its range over resampled rounds."""
    chance, drawn = random.Random(1), list[float]()
    for _ in range(200):
        rounds = chance.choices(range(len(ours)), k=len(ours))
        first, second = ([side[at] for at in rounds] for side in (ours, others))
        drawn.append(p99(first) / p99(second))
    drawn.sort()
    return f"{p99(ours) / p99(others):.3f} ({drawn[5]:.3f}-{drawn[-6]:.3f})"


def of_overhead(cells: Sequence[front.Cell], figures: Sequence[Speed]) -> Iterator[str]:
    """Yield the table of the second part."""
    for streams in sorted({cell.streams for cell in cells}):
        off, on = (front.of(cells, side, streams) for side in SIDES)
        yield (
            f"{streams:4} streams  off {spread(off)}  on {spread(on)} us/event"
            f"  on over off {spread(ratios(on, off))}"
        )
    yield f"Goal: at most {MOST_CPU}."
    if figures:
        sides = [[speed for speed in figures if speed.side == side] for side in SIDES]
        off, on = ([speed.tokens_per_second for speed in side] for side in sides)
        yield (
            f"real model   off {spread(off)}  on {spread(on)} tok/s"
            f"  on over off {spread(ratios(on, off))}"
        )
        yield f"Goal: at least {LEAST_THROUGHPUT}."
        off, on = ([100 * speed.cores for speed in side] for side in sides)
        yield f"its serving process   off {spread(off)}  on {spread(on)} % of a core"


def kept(latency: Latency) -> dict[str, Any]:
    """Return the summary of a round for the record; all its requests would be a megabyte."""
    figures: dict[str, Any] = {"collector": latency.collector, "memory": latency.memory}
    for kind, values in (("first", latency.first), ("whole", latency.whole)):
        parts = {f"p{part}": round(percentile(values, part), 3) for part in (50, 90, 99)}
        figures[f"{kind}_ms"] = parts | {"most": round(max(values), 3)}
    return figures | {"requests": len(latency.first)}


async def run(options: argparse.Namespace) -> tuple[list[str], dict[str, Any]]:
    """Run the selected parts; return the lines of the tables, and all figures."""
    lines: list[str] = []
    figures: dict[str, Any] = {}
    if options.only != "overhead":
        measured = await latencies(options)
        figures["collectors"] = [kept(latency) for latency in measured]
        lines += of_collectors(measured)
    if options.only != "collectors":
        cells = [cell for streams in options.streams for cell in await events(options, streams)]
        measured_speeds = await speeds(options) if options.model else []
        figures["overhead"] = [cell._asdict() for cell in cells]
        figures["throughput"] = [speed._asdict() for speed in measured_speeds]
        lines += ["", *of_overhead(cells, measured_speeds)]
    return lines, figures


def main() -> None:
    """Measure, print and keep the figures."""
    options, facts = arguments(), report.machine()
    lines, figures = asyncio.run(run(options))
    text = "\n".join(["What telemetry costs", report.describe(facts), "", *lines])
    print(f"\n{text}")
    name = f"telemetry-{options.only}" if options.only else "telemetry"
    report.write(name, text, {"machine": facts, **figures}, options)


if __name__ == "__main__":
    main()
