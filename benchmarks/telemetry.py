"""What it costs to know what every request cost: everything on beside everything off.

Two parts, each in one interleaved run:

- collectors: `headrace serve echo` with a collector that is live, dead (its port is closed), slow
  (half a second for each export) and hung (it never answers). All have the trace file, metrics and
  usage. The engine has the pace of a small model: 128 ms of prefill, then 50 tokens/s. A client in
  its own process sends requests to all four servers at once, `--arrivals` a second to each, evenly
  and one server after the other: what disturbs the machine disturbs all.
  The time to the first event and that to the end are as the client sees them, and a p99 is that of
  all rounds together; what is in brackets are 95 of 100 draws of as many rounds (bootstrap).
  Memory is the server's own, at the end.
- overhead: CPU of the serving process for each event at 32 and 512 echo streams, and output
  tokens/s of the real model, with everything on (a live collector, trace file, metrics, usage) over
  everything off. For CPU both sides run at the same time, and each round has servers of its own:
  what an event takes changes by a third from one second to the next, and from process to process.
  The rates of the real model leave much to chance; beside them is what the serving process takes of
  a core then, and the model cannot lose more than that has grown by.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import socket
import sys
import time
import urllib.error
import urllib.request
from asyncio.subprocess import PIPE
from collections.abc import AsyncGenerator, Iterator, Sequence
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import uvloop

import front
import report
import tax
from headrace import runtime
from headrace.models.reference import parse
from load import Client, Stream, request_bytes
from serving import Server, headrace, serving

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
    """Read the command line."""
    parser = argparse.ArgumentParser(description="What telemetry costs.")
    parser.add_argument("--only", choices=("collectors", "overhead"))
    parser.add_argument("--rounds", type=int, help="by default 12")
    parser.add_argument("--window", type=float, help="seconds of a round; by default 60 and 8")
    parser.add_argument("--arrivals", type=float, default=15, help="a second (collectors)")
    parser.add_argument("--streams", type=int, nargs="+", default=front.STREAMS)
    parser.add_argument("--rate", type=float, default=4000, help="events a second (overhead)")
    parser.add_argument("--model", default="smollm2", help="the real one; empty leaves it out")
    parser.add_argument("--quick", action="store_true", help="one short round, for tests")
    parser.add_argument("--json", type=Path, help="write the raw figures here")
    options = parser.parse_args(argv)
    if options.quick:
        options.rounds, options.window, options.rate = 1, 1.0, 2000
        options.streams, options.model = (32,), ""
    return options


# The client of `collectors`, a process of its own.


class Timed(Stream):
    """A stream that keeps the time of its first event."""

    def __init__(self, request: bytes) -> None:
        super().__init__(request)
        self.first_at = 0.0

    def data_received(self, data: bytes) -> None:
        """Note when it came."""
        if not self.first_at and b"data: {" in data:
            self.first_at = time.monotonic()
        super().data_received(data)


async def ask_for(command: dict[str, Any]) -> list[dict[str, list[float]]]:
    """Send requests evenly to all ports in turn; return what was waited for, in milliseconds."""
    loop, ports = asyncio.get_running_loop(), command["ports"]
    told: list[dict[str, list[float]]] = [{"first": [], "whole": []} for _ in ports]
    pause = 1 / command["arrivals"] / len(ports)

    async def ask(number: int) -> None:
        stream, began = Timed(request_bytes(command, command["body"])), time.monotonic()
        await loop.create_connection(lambda: stream, "127.0.0.1", ports[number])
        await stream.over.wait()
        stream.close()
        told[number]["first"].append((stream.first_at - began) * 1000)
        told[number]["whole"].append((stream.over_at - began) * 1000)

    began, running = time.monotonic(), set[asyncio.Task[None]]()
    for number in range(int(command["window"] / pause)):
        await asyncio.sleep(began + number * pause - time.monotonic())
        task = asyncio.create_task(ask(number % len(ports)))
        running.add(task)
        task.add_done_callback(running.discard)
    while running:
        await asyncio.wait(running)
    return told


async def _client() -> None:
    loop, reader = asyncio.get_running_loop(), asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := await reader.readline():
        print(json.dumps(await ask_for(json.loads(line))), flush=True)


@contextlib.asynccontextmanager
async def asking() -> AsyncGenerator[asyncio.subprocess.Process]:
    """Run the client."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, __file__, "client", stdin=PIPE, stdout=PIPE, limit=1 << 24
    )
    try:
        yield process
    finally:
        process.kill()
        await process.wait()


# The servers.


@contextlib.contextmanager
def environment(**values: str) -> Iterator[None]:
    """Set variables for what is started within."""
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextlib.asynccontextmanager
async def collecting(mode: str) -> AsyncGenerator[dict[str, str]]:
    """Run a collector; return the variables by which it is found."""
    if mode == "dead":
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            yield _found(f"http://127.0.0.1:{taken.getsockname()[1]}")
        return
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(_COLLECTOR), "http", mode, "quiet", stdout=PIPE
    )
    assert process.stdout is not None
    try:
        yield _found((await process.stdout.readline()).decode().strip())
    finally:
        process.kill()
        await process.wait()


def _found(url: str) -> dict[str, str]:
    return {"OTEL_EXPORTER_OTLP_ENDPOINT": url, "OTEL_TRACES_EXPORTER": "otlp"}


@contextlib.asynccontextmanager
async def server(command: list[str], variables: dict[str, str]) -> AsyncGenerator[Server]:
    """Run `headrace serve` with further variables and a home of its own."""
    with TemporaryDirectory() as home:
        async with contextlib.AsyncExitStack() as stack:
            with environment(HEADRACE_HOME=home, **variables):
                started = await stack.enter_async_context(serving(command))
            await asyncio.to_thread(_wait, f"http://127.0.0.1:{started.port}/health/ready")
            yield started


def _wait(url: str) -> None:
    """Wait until the model is loaded: before, only so many may wait for it."""
    for _ in range(600):
        with contextlib.suppress(OSError, urllib.error.URLError):
            urllib.request.urlopen(url).close()
            return
        time.sleep(0.1)
    raise SystemExit("A server did not get ready.")


# The two parts.


async def latencies(options: argparse.Namespace) -> list[Latency]:
    """Ask all servers at once, in another order each round."""
    command = headrace("echo", {"tokens_per_second": 50, "prefill_tokens_per_second": 500})
    figures: list[Latency] = []
    async with contextlib.AsyncExitStack() as stack:
        enter = stack.enter_async_context
        servers: dict[str, Server] = {}
        for mode in COLLECTORS:
            servers[mode] = await enter(server(command, await enter(collecting(mode))))
        client = await enter(asking())
        for number in range(-1, options.rounds or 12):
            turn = number % len(COLLECTORS)
            order = (*COLLECTORS[turn:], *COLLECTORS[:turn])
            # The first one warms up.
            window = (options.window or 60) if number >= 0 else 5
            told = await _ask(client, [servers[mode].port for mode in order], options, window)
            for mode, times in zip(order, told, strict=True):
                one = Latency(mode, **times, memory=servers[mode].process.memory_info().rss)
                if number >= 0:
                    figures.append(one)
                    print(f"  {mode:5} p99 {_p99(one.first):7.2f} {_p99(one.whole):7.2f} ms")
    return figures


async def _ask(
    client: asyncio.subprocess.Process,
    ports: list[int],
    options: argparse.Namespace,
    window: float,
) -> list[dict[str, Any]]:
    assert client.stdin is not None
    assert client.stdout is not None
    command = {
        "host": "127.0.0.1",
        "port": ports[0],
        "ports": ports,
        "path": "/v1/completions",
        "body": {"model": "echo", "prompt": "abcdefgh" * 8, "stream": True, "max_tokens": 32},
        "arrivals": options.arrivals,
        "window": window,
    }
    client.stdin.write(json.dumps(command).encode() + b"\n")
    return json.loads(await client.stdout.readline())


def _p99(values: Sequence[float]) -> float:
    return sorted(values)[len(values) * 99 // 100]


async def events(options: argparse.Namespace, streams: int) -> list[front.Cell]:
    """Measure the CPU for each event of both sides at once, on new servers in each round."""
    speed, cells = options.rate / 2 / streams, list[front.Cell]()
    window = options.window or 8
    tokens = int(speed * (window + 60))
    body = {"prompt": "abcdefgh" * 8, "max_tokens": tokens, "stream": True, "ignore_eos": True}
    # In step, or a chance in the beginning decides how many events come at once.
    command = headrace("echo", {"tokens_per_second": speed, "in_step": True})
    clients = {side: await Client.start() for side in SIDES}
    try:
        for number in range(options.rounds or 12):
            async with both(command, SIDES[:: 1 if number % 2 else -1]) as servers:
                for side, server in servers.items():
                    await front.begin(server, clients[side], body, streams)
                counts = (
                    front.count(side, servers[side], clients[side], streams, window)
                    for side in SIDES
                )
                told = await asyncio.gather(*counts)
                await asyncio.gather(*(client.ask("close") for client in clients.values()))
            cells += told
            off, on = (cell.each for cell in told)
            print(f"  {streams:4} streams  off {off:5.2f}  on {on:5.2f} us/event", flush=True)
    finally:
        for client in clients.values():
            await client.stop()
    return cells


async def speeds(options: argparse.Namespace) -> list[Speed]:
    """Measure the tokens/s of the real model of both sides in turn."""
    figures: list[Speed] = []
    shape: dict[str, object] = {"slots": _STREAMS}
    model = runtime.store(runtime.load_settings().config).fetch(parse(options.model))
    async with both(headrace(str(model), shape, "--context-length", "512")) as servers:
        client = await Client.start()
        try:
            for number in range(-1, options.rounds or 12):
                for side in SIDES[:: 1 if number % 2 else -1]:
                    bench = tax.Bench(servers[side], None, client, 128)  # type: ignore[arg-type]
                    before = servers[side].cpu()
                    done = await tax.ask_http(bench, tax.prompts(_STREAMS, number))
                    cores = (servers[side].cpu() - before) / done["seconds"]
                    rate = sum(done["tokens"]) / done["seconds"]
                    if number >= 0:
                        figures.append(Speed(side, rate, cores))
                        print(f"  {side:3} {rate:7.1f} tok/s  {cores:.4f} cores", flush=True)
        finally:
            await client.stop()
    return figures


@contextlib.asynccontextmanager
async def both(
    command: list[str], order: Sequence[str] = SIDES
) -> AsyncGenerator[dict[str, Server]]:
    """Run a server with everything off, and one with everything on."""
    async with contextlib.AsyncExitStack() as stack:
        enter = stack.enter_async_context
        variables = {"off": _OFF, "on": await enter(collecting("live"))}
        yield {side: await enter(server(command, variables[side])) for side in order}


# What is told.


def ratios(off: Sequence[float], on: Sequence[float]) -> list[float]:
    """Return on over off for each round."""
    return [after / before for before, after in zip(off, on, strict=True)]


def of_collectors(figures: Sequence[Latency]) -> Iterator[str]:
    """Yield the table of the first part."""
    yield "p99 of all requests in ms, and over that of a live collector."
    yield "collector  requests  first event  over live             whole   over live             MB"
    by_mode = {mode: [one for one in figures if one.collector == mode] for mode in COLLECTORS}
    for mode, those in by_mode.items():
        shown = [f"{mode:9}  {sum(len(one.first) for one in those):8}"]
        for kind, width in (("first", 11), ("whole", 6)):
            ours = [getattr(one, kind) for one in those]
            live = [getattr(one, kind) for one in by_mode["live"]]
            shown.append(f"{_p99([*chain(*ours)]):{width}.2f}  {drawn(ours, live):20}")
        yield "  ".join([*shown, f"{those[-1].memory / 2**20:.0f}"])
    yield f"Goal: dead, slow and hung over live at most {MOST_LATENCY}, and memory bounded."


def drawn(ours: Sequence[list[float]], others: Sequence[list[float]]) -> str:
    """Return the ratio of two p99, with the range of it over draws of rounds."""
    chance, ratios = random.Random(1), list[float]()
    for _ in range(200):
        rounds = chance.choices(range(len(ours)), k=len(ours))
        one, other = ([*chain(*(side[at] for at in rounds))] for side in (ours, others))
        ratios.append(_p99(one) / _p99(other))
    ratios.sort()
    ratio = _p99([*chain(*ours)]) / _p99([*chain(*others)])
    return f"{ratio:.3f} ({ratios[5]:.3f}-{ratios[-6]:.3f})"


def of_overhead(cells: Sequence[front.Cell], figures: Sequence[Speed]) -> Iterator[str]:
    """Yield the table of the second part."""
    for streams in sorted({cell.streams for cell in cells}):
        off, on = (
            [one.each for one in cells if (one.server, one.streams) == (side, streams)]
            for side in SIDES
        )
        yield (
            f"{streams:4} streams  off {report.spread(off)}  on {report.spread(on)} us/event"
            f"  on over off {report.spread(ratios(off, on))}"
        )
    yield f"Goal: at most {MOST_CPU}."
    if figures:
        sides = [[one for one in figures if one.side == side] for side in SIDES]
        off, on = ([one.tokens_per_second for one in side] for side in sides)
        yield (
            f"real model   off {report.spread(off)}  on {report.spread(on)} tok/s"
            f"  on over off {report.spread(ratios(off, on))}"
        )
        yield f"Goal: at least {LEAST_THROUGHPUT}."
        off, on = ([100 * one.cores for one in side] for side in sides)
        yield f"its serving process   off {report.spread(off)}  on {report.spread(on)} % of a core"


def kept(one: Latency) -> dict[str, Any]:
    """Return what is written down of a round; all of its requests would be a megabyte."""
    figures: dict[str, Any] = {"collector": one.collector, "memory": one.memory}
    for kind, values in (("first", sorted(one.first)), ("whole", sorted(one.whole))):
        parts = {"p50": 50, "p90": 90, "p99": 99}
        told = {name: round(values[len(values) * part // 100], 3) for name, part in parts.items()}
        figures[f"{kind}_ms"] = told | {"most": round(values[-1], 3)}
    return figures | {"requests": len(one.first)}


async def run(options: argparse.Namespace) -> tuple[list[str], dict[str, Any]]:
    """Measure what is asked for; return the lines to be read, and all figures."""
    lines: list[str] = []
    figures: dict[str, Any] = {}
    if options.only != "overhead":
        found = await latencies(options)
        figures["collectors"] = [kept(one) for one in found]
        lines += of_collectors(found)
    if options.only != "collectors":
        cells = [cell for streams in options.streams for cell in await events(options, streams)]
        speed = await speeds(options) if options.model else []
        figures["overhead"] = [cell._asdict() for cell in cells]
        figures["throughput"] = [one._asdict() for one in speed]
        lines += ["", *of_overhead(cells, speed)]
    return lines, figures


def main() -> None:
    """Measure, print and keep the figures."""
    if sys.argv[1:] == ["client"]:
        uvloop.run(_client())
        return
    options, facts = arguments(), report.machine()
    lines, figures = asyncio.run(run(options))
    text = "\n".join(["What telemetry costs", report.describe(facts), "", *lines])
    print(f"\n{text}")
    if options.json is not None or not options.quick:
        name = f"telemetry-{options.only}" if options.only else "telemetry"
        record = {"machine": facts, **figures}
        report.write(name, text, record, options.json)


if __name__ == "__main__":
    main()
