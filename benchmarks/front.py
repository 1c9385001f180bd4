"""CPU time of the API process for each streamed event, against the limit and a common design.

Three servers run side by side, each in a process of its own, with uvloop and httptools:

- limit: a bare ASGI app under uvicorn that sends fixed bytes, those of one chunk of Headrace;
- headrace: `headrace serve echo`, whose engine runs in a child process as any engine does;
- pydantic: FastAPI under uvicorn with a StreamingResponse that builds a pydantic model for each
  chunk, of the same fields, and yields `data: {model.model_dump_json()}`.

All send one token in each event and one event in each write, at `--rate` events a second in all,
well below what two cores can do. The two others use the cheapest timing: one timer wakes all
streams together, as the steps of a batching engine do. In Headrace the engine in the child does
that.

One client process holds the streams. CPU is user and system time of the server's process alone,
over a window in which all streams run; reading requests and starting and ending streams are
outside of it. The CPU of Headrace's child is reported too, but is not part of the figure: it is
the engine's, and the two others have no engine. The servers are measured in turn, round after
round; the ratio is that of the same round, and the table shows the median of the rounds.

With `--routes`, `headrace serve echo` answers by chat completions, `/v1/responses`,
`/v1/messages`, Ollama's `/api/chat` and llama-server's `/completion` at the same time, a process
for each, with a fifth of the rate; the ratios are those to chat completions.

With `--keys`, `headrace serve echo` has no keys, a key of the file, a key of a database, and such a
key with limits, at the same time, each with a fourth of the rate; the ratios are those to no keys.

With `--parser`, two of `headrace serve echo` answer chat completions with plain text at the same
time, each with half of the rate: to requests without tools, with a template that has neither tools
nor thinking, and to requests with tools and thinking, with a template that has both, so that all
text passes the parser of calls. The parser runs in the child: the CPU is that of both processes.

With `--against DIR`, only `headrace serve echo` of this checkout and that of another are measured,
both at the same time, with new processes in each round: the CPU of an event changes by a third from
one second to the next, and from process to process. Each has half of the rate.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import statistics
import sys
import tempfile
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import report
from front_requests import PARSERS, ROUTES, TEMPLATE, body_by, body_of
from headrace.lab import drive, figures, load
from headrace.lab.drive import Program, Server

GOAL = 2.5
ROUTE_GOAL = 1.3
KEY_GOAL = 1.03
PARSER_GOAL = 1.1
STREAMS = (32, 512)
SERVERS = ("limit", "headrace", "pydantic")
CHECKOUTS = ("headrace", "other")
KEYS: dict[str, Sequence[str]] = {
    "none": (),
    "file": (),
    "database": (),
    "limits": ("--concurrent", "100000", "--tokens-per-minute", "1000000000"),
}
"""The arguments of `headrace keys create` by the kind of key."""
_SETTLE_S = 0.5

Start = Callable[[], contextlib.AbstractAsyncContextManager[Server]]


class Cell(NamedTuple):
    """One server, one round: seconds of CPU over a window."""

    server: str
    streams: int
    events: int
    reads: int
    seconds: float
    cpu: float
    child_cpu: float
    load_average: float

    @property
    def each(self) -> float:
        """Microseconds of CPU for each event."""
        return self.cpu / self.events * 1e6


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = report.parser("CPU of the front for each streamed event.")
    parser.add_argument("--rate", type=float, default=4000, help="events a second, of all streams")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--window", type=float, default=7.0, help="seconds of one measurement")
    parser.add_argument("--streams", type=int, nargs="+", default=STREAMS)
    parser.add_argument("--routes", action="store_true", help="compare the APIs of chats")
    parser.add_argument("--keys", action="store_true", help="compare kinds of API keys")
    parser.add_argument("--parser", action="store_true", help="compare plain and parsed answers")
    report.against(parser)
    options = parser.parse_args(argv)
    if options.quick:
        options.rate, options.rounds, options.window = 2000, 1, 1.0
    return options


async def begin(
    server: Server, client: Program, body: dict[str, Any], streams: int, path: str = load.PATH
) -> None:
    """Open the streams, and wait until all run."""
    bodies, key = [body] * streams, server.key
    await client.ask({"do": "open", "url": server.url, "bodies": bodies, "path": path, "key": key})
    await asyncio.sleep(_SETTLE_S)


async def count(name: str, server: Server, client: Program, streams: int, window: float) -> Cell:
    """Count over a window, and close the streams."""
    before = await client.ask({"do": "count"})
    cpu, child = server.program.cpu(), server.program.children_cpu()
    await asyncio.sleep(window)
    after = await client.ask({"do": "count"})
    cpu, child = server.program.cpu() - cpu, server.program.children_cpu() - child
    if after["running"] < streams:
        raise SystemExit(f"{name}: {streams - after['running']} streams ended too early.")
    await client.ask({"do": "close"})
    return Cell(
        server=name,
        streams=streams,
        events=after["events"] - before["events"],
        reads=after["reads"] - before["reads"],
        seconds=after["at"] - before["at"],
        cpu=cpu,
        child_cpu=child,
        load_average=report.load_average(),
    )


async def chunk_of(server: Server, client: Program, body: dict[str, Any]) -> str:
    """Return a chunk as Headrace sends it."""
    await client.ask({"do": "open", "url": server.url, "bodies": [{**body, "max_tokens": 2}]})
    text: str = (await client.ask({"do": "drain"}))["tails"][0]
    start = text.index("data: ")
    return text[start : text.index("\n\n", start) + 2]


async def rounds(options: argparse.Namespace, streams: int) -> list[Cell]:
    """Measure all servers in turn at one number of streams."""
    speed, cells = options.rate / streams, list[Cell]()
    # Longer than the window, as starting many streams on a busy machine takes time.
    body = body_of(speed, options.window + 30)
    commands = {
        "limit": report.script("front_servers.py", "limit", str(speed)),
        "headrace": drive.serve("echo", "--fronts", "1", options={"tokens_per_second": speed}),
        "pydantic": report.script("front_servers.py", "pydantic", str(speed)),
    }
    async with contextlib.AsyncExitStack() as stack:
        start = stack.enter_async_context
        client = await start(drive.program(load.command()))
        servers = {name: await start(drive.server(commands[name])) for name in SERVERS}
        chunk = await chunk_of(servers["headrace"], client, body)
        bodies = dict.fromkeys(SERVERS, body) | {"limit": {**body, "chunk": chunk}}
        for _ in range(options.rounds):
            for name, server in servers.items():
                await begin(server, client, bodies[name], streams)
                cells.append(await count(name, server, client, streams, options.window))
                await asyncio.sleep(_SETTLE_S)
                print(f"  {streams:4} streams  {name:9} {cells[-1].each:6.2f} us/event", flush=True)
    return cells


async def beside(
    starts: Mapping[str, Start], rounds: int, speed: float, window: float, streams: int
) -> list[Cell]:
    """Measure servers at the same time, new ones in each round; `speed` is of one stream."""
    cells, names, seconds = list[Cell](), list(starts), window + 60
    paths = ROUTES | dict.fromkeys(PARSERS, ROUTES["chat"])
    bodies = {
        name: body_by(name, speed, seconds) if name in paths else body_of(speed, seconds)
        for name in names
    }
    async with contextlib.AsyncExitStack() as whole:
        clients = {
            name: await whole.enter_async_context(drive.program(load.command())) for name in names
        }
        for number in range(rounds):
            order = names[:: 1 if number % 2 else -1]
            async with contextlib.AsyncExitStack() as stack:
                servers = {name: await stack.enter_async_context(starts[name]()) for name in order}
                for name, server in servers.items():
                    path = paths.get(name, load.PATH)
                    await begin(server, clients[name], bodies[name], streams, path)
                counts = (count(n, servers[n], clients[n], streams, window) for n in names)
                cells += await asyncio.gather(*counts)
            shown = "  ".join(f"{cell.server} {cell.each:5.2f}" for cell in cells[-len(names) :])
            print(f"  {streams:4} streams  {shown} us/event", flush=True)
    return cells


def in_step(speed: float) -> list[str]:
    """Return the command of an echo service whose streams are in step.

    Otherwise the number of events that coincide would depend on when the streams began.
    """
    return drive.serve(
        "echo", "--fronts", "1", options={"tokens_per_second": speed, "in_step": True}
    )


async def checkouts(options: argparse.Namespace, streams: int) -> list[Cell]:
    """Measure this checkout beside another."""
    speed, other = options.rate / 2 / streams, drive.checkout(options.against)
    starts: dict[str, Start] = {
        "headrace": lambda: drive.server(in_step(speed), ready="/health/ready"),
        "other": lambda: drive.server(in_step(speed), other, ready="/health/ready"),
    }
    return await beside(starts, options.rounds, speed, options.window, streams)


async def routes(options: argparse.Namespace, streams: int) -> list[Cell]:
    """Measure the routes of this checkout beside one another."""
    speed = options.rate / len(ROUTES) / streams

    def start() -> contextlib.AbstractAsyncContextManager[Server]:
        return drive.server(in_step(speed), ready="/health/ready")

    starts: dict[str, Start] = dict.fromkeys(ROUTES, start)
    return await beside(starts, options.rounds, speed, options.window, streams)


@contextlib.asynccontextmanager
async def with_key(kind: str, speed: float) -> AsyncGenerator[Server]:
    """Run an echo service with a kind of key of `KEYS`, in a home of its own."""
    with tempfile.TemporaryDirectory() as home:
        environment, key = {"HEADRACE_HOME": home}, None if kind == "none" else "benchmark"
        if kind == "file":
            environment["HEADRACE_API_KEYS"] = "benchmark"
        if kind in ("database", "limits"):
            command = [sys.executable, "-m", "headrace", "keys", "create", "benchmark"]
            async with drive.program([*command, *KEYS[kind]], environment) as created:
                key = (await created.line()).decode().strip()
        async with drive.server(
            in_step(speed), environment, ready="/health/ready", key=key
        ) as server:
            yield server


async def keys(options: argparse.Namespace, streams: int) -> list[Cell]:
    """Measure kinds of keys beside one another."""
    speed = options.rate / len(KEYS) / streams
    starts: dict[str, Start] = {kind: partial(with_key, kind, speed) for kind in KEYS}
    return await beside(starts, options.rounds, speed, options.window, streams)


async def parsers(options: argparse.Namespace, streams: int) -> list[Cell]:
    """Measure plain answers with and without a parser, in both processes of each."""
    speed = options.rate / len(PARSERS) / streams

    def start(environment: dict[str, str]) -> contextlib.AbstractAsyncContextManager[Server]:
        return drive.server(in_step(speed), environment, ready="/health/ready")

    starts: dict[str, Start] = {
        "off": partial(start, {}),
        "on": partial(start, {"HEADRACE_ECHO__CHAT_TEMPLATE": TEMPLATE}),
    }
    cells = await beside(starts, options.rounds, speed, options.window, streams)
    return [cell._replace(cpu=cell.cpu + cell.child_cpu) for cell in cells]


def of(cells: Sequence[Cell], server: str, streams: int) -> list[float]:
    """Return the microseconds for each event of one server, round by round."""
    return [cell.each for cell in cells if (cell.server, cell.streams) == (server, streams)]


def ratios(cells: Sequence[Cell], server: str, streams: int, base: str = "limit") -> list[float]:
    """Return the ratio to another server, by default the limit, of each round."""
    return figures.ratios(of(cells, server, streams), of(cells, base, streams))


def table(
    cells: Sequence[Cell], facts: dict[str, Any], servers: Sequence[str], base: str
) -> list[str]:
    """Return the figures as lines of text."""
    lines = [
        "CPU of the API process for each streamed event, in one interleaved run",
        report.describe(facts),
        "",
        "streams  server     events   ev/s  reads/ev  us/event (least-most)      times the " + base,
    ]
    for streams in sorted({cell.streams for cell in cells}):
        for server in servers:
            own = [cell for cell in cells if (cell.server, cell.streams) == (server, streams)]
            events = sum(cell.events for cell in own)
            lines.append(
                f"{streams:7}  {server:9}{events:8}"
                f"  {events / sum(cell.seconds for cell in own):5.0f}"
                f"  {sum(cell.reads for cell in own) / events:8.2f}"
                f"  {figures.spread([cell.each for cell in own]):25}"
                f"  {figures.spread(ratios(cells, server, streams, base))}"
            )
    for server in [name for name in servers if name in CHECKOUTS]:
        own = [cell for cell in cells if cell.server == server]
        child = sum(cell.child_cpu for cell in own) / sum(cell.events for cell in own) * 1e6
        name = "Headrace's" if server == "headrace" else "The other's"
        lines += ["", f"{name} child (engine, worker, frames) took {child:.1f} us/event besides."]
    return lines


class Comparison(NamedTuple):
    """What is compared: the servers, that which the ratios are to, and the file of the results."""

    measure: Callable[[argparse.Namespace, int], Awaitable[list[Cell]]]
    servers: Sequence[str]
    base: str
    name: str
    goal: str


def comparison(options: argparse.Namespace) -> Comparison:
    """Return what the options ask for."""
    if options.against:
        return Comparison(checkouts, CHECKOUTS, "other", "front-against", "")
    if options.routes:
        goal = f"Goal: each at most {ROUTE_GOAL} times chat completions."
        return Comparison(routes, tuple(ROUTES), "chat", "front-routes", goal)
    if options.keys:
        goal = f"Goal: each at most {KEY_GOAL} times the service without keys."
        return Comparison(keys, tuple(KEYS), "none", "front-keys", goal)
    if options.parser:
        goal = f"CPU of the model's process included. Goal: at most {PARSER_GOAL} times off."
        return Comparison(parsers, tuple(PARSERS), "off", "front-parser", goal)
    goal = f"Goal: headrace at most {GOAL} times the limit."
    return Comparison(rounds, SERVERS, "limit", "front", goal)


async def run(measure: Comparison, options: argparse.Namespace) -> list[Cell]:
    """Measure everything."""
    cells = list[Cell]()
    for streams in options.streams:
        cells += await measure.measure(options, streams)
    return cells


def main() -> None:
    """Measure, print and keep the figures."""
    options, conditions = arguments(), report.Conditions()
    compared = comparison(options)
    servers, base = compared.servers, compared.base
    cells, facts = asyncio.run(run(compared, options)), report.machine()
    lines = table(cells, facts, servers, base)
    text = "\n".join([*lines, f"{compared.goal}{conditions}".strip()])
    print(f"\n{text}")
    record = {
        "machine": facts,
        "rate": options.rate,
        "window_s": options.window,
        "goal": GOAL,
        "ratios": {
            f"{server} {streams}": statistics.median(ratios(cells, server, streams, base))
            for streams in options.streams
            for server in servers
        },
        "cells": [cell._asdict() for cell in cells],
    }
    report.write(compared.name, text, record, options)


if __name__ == "__main__":
    main()
