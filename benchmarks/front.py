"""CPU time of the API process for each streamed event: Headrace beside the limit and a common way.

Three servers run side by side, each in a process of its own, on uvicorn with uvloop, httptools
and the settings of `headrace serve`:

- limit: a bare ASGI app that sends ready bytes, those of one chunk of Headrace's own;
- headrace: `headrace serve echo`, whose engine runs in a child process as any engine does;
- pydantic: FastAPI with a StreamingResponse that builds a pydantic model for each chunk, of the
  same fields, and yields `data: {model.model_dump_json()}`.

All send one token in each event, and each event for itself, at `--rate` events a second in all,
well below what two cores can do. The two others have the cheapest pace there is: one timer
wakes all streams together, as the steps of a batching engine do. Headrace's is the engine's in
the child.

One client process holds the streams. CPU is user and system time of the server's process alone,
over a window in which all streams run; reading requests and starting and ending streams are
outside of it. The CPU of Headrace's child is told too, but is not part of the figure: it is the
engine's, and the two others have no engine. The servers are measured in turn, round after
round; the ratio is that of the same round, and the table shows the median of the rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import report
from load import Client
from serving import Server, headrace, script, serving

GOAL = 2.5
STREAMS = (32, 512)
SERVERS = ("limit", "headrace", "pydantic")
_PATH = "/v1/completions"
_SETTLE_S = 0.5


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
    """Read the command line."""
    parser = argparse.ArgumentParser(description="CPU of the front for each streamed event.")
    parser.add_argument("--rate", type=float, default=4000, help="events a second, of all streams")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--window", type=float, default=7.0, help="seconds of one measurement")
    parser.add_argument("--streams", type=int, nargs="+", default=STREAMS)
    parser.add_argument("--quick", action="store_true", help="one short round, for tests")
    parser.add_argument("--json", type=Path, help="write the raw figures here")
    options = parser.parse_args(argv)
    if options.quick:
        options.rate, options.rounds, options.window = 2000, 1, 1.0
    return options


async def measure(
    name: str, server: Server, client: Client, body: dict[str, Any], streams: int, window: float
) -> Cell:
    """Open the streams, count over a window, and hang up."""
    await begin(server, client, body, streams)
    cell = await count(name, server, client, streams, window)
    await client.ask("close")
    await asyncio.sleep(_SETTLE_S)
    return cell


async def begin(server: Server, client: Client, body: dict[str, Any], streams: int) -> None:
    """Open the streams, and wait until all run."""
    await client.ask(
        "open", host="127.0.0.1", port=server.port, path=_PATH, bodies=[body] * streams
    )
    await asyncio.sleep(_SETTLE_S)


async def count(name: str, server: Server, client: Client, streams: int, window: float) -> Cell:
    """Count over a window."""
    before, cpu, child = await client.ask("count"), server.cpu(), server.children_cpu()
    await asyncio.sleep(window)
    after, cpu, child = (
        await client.ask("count"),
        server.cpu() - cpu,
        server.children_cpu() - child,
    )
    if after["running"] < streams:
        raise SystemExit(f"{name}: {streams - after['running']} streams ended too early.")
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


async def chunk_of(server: Server, client: Client, body: dict[str, Any]) -> str:
    """Return a chunk as Headrace sends it."""
    short = {**body, "max_tokens": 2}
    await client.ask("open", host="127.0.0.1", port=server.port, path=_PATH, bodies=[short])
    done = await client.ask("drain")
    text: str = done["tails"][0]
    start = text.index("data: ")
    return text[start : text.index("\n\n", start) + 2]


async def rounds(options: argparse.Namespace, streams: int, client: Client) -> list[Cell]:
    """Measure all servers in turn at one number of streams."""
    speed, cells = options.rate / streams, list[Cell]()
    # Longer than the window: a start of many streams on a busy machine takes its time.
    tokens = int(speed * (options.window + 30))
    body = {
        "prompt": "abcdefgh" * 8,
        "max_tokens": tokens,
        "stream": True,
        "ignore_eos": True,
    }
    async with contextlib.AsyncExitStack() as stack:
        start = stack.enter_async_context
        servers = {
            "limit": await start(serving(script("front_servers.py", "limit", str(speed)))),
            "headrace": await start(serving(headrace("echo", {"tokens_per_second": speed}))),
            "pydantic": await start(serving(script("front_servers.py", "pydantic", str(speed)))),
        }
        chunk = await chunk_of(servers["headrace"], client, body)
        bodies = dict.fromkeys(SERVERS, body) | {"limit": {**body, "chunk": chunk}}
        for _ in range(options.rounds):
            for name in SERVERS:
                cell = await measure(
                    name, servers[name], client, bodies[name], streams, options.window
                )
                cells.append(cell)
                print(f"  {streams:4} streams  {name:9} {cell.each:6.2f} us/event", flush=True)
    return cells


def ratios(cells: Sequence[Cell], server: str, streams: int) -> list[float]:
    """Return the ratio to the limit of each round."""
    those = [cell.each for cell in cells if (cell.server, cell.streams) == (server, streams)]
    limits = [cell.each for cell in cells if (cell.server, cell.streams) == ("limit", streams)]
    return [one / limit for one, limit in zip(those, limits, strict=True)]


def table(cells: Sequence[Cell], facts: Mapping[str, Any], seconds: float) -> str:
    """Return the figures to be read."""
    lines = [
        "CPU of the API process for each streamed event, in one interleaved run",
        report.describe(dict(facts)),
        "",
        "streams  server     events   ev/s  reads/ev  us/event (least-most)      times the limit",
    ]
    for streams in sorted({cell.streams for cell in cells}):
        for server in SERVERS:
            those = [one for one in cells if (one.server, one.streams) == (server, streams)]
            events = sum(cell.events for cell in those)
            lines.append(
                f"{streams:7}  {server:9}{events:8}"
                f"  {events / sum(cell.seconds for cell in those):5.0f}"
                f"  {sum(cell.reads for cell in those) / events:8.2f}"
                f"  {report.spread([cell.each for cell in those]):25}"
                f"  {report.spread(ratios(cells, server, streams))}"
            )
    ours = [cell for cell in cells if cell.server == "headrace"]
    child = sum(cell.child_cpu for cell in ours) / sum(cell.events for cell in ours) * 1e6
    noise = [cell.load_average for cell in cells]
    lines += [
        "",
        f"Headrace's child (engine, worker, frames) took {child:.1f} us/event besides.",
        f"Goal: headrace at most {GOAL} times the limit. Took {seconds:.0f} s; "
        f"load average {min(noise)}-{max(noise)}.",
    ]
    return "\n".join(lines)


async def run(options: argparse.Namespace) -> list[Cell]:
    """Measure everything."""
    client, cells = await Client.start(), list[Cell]()
    try:
        for streams in options.streams:
            cells += await rounds(options, streams, client)
    finally:
        await client.stop()
    return cells


def main() -> None:
    """Measure, print and keep the figures."""
    options, began = arguments(), time.monotonic()
    cells, facts = asyncio.run(run(options)), report.machine()
    text = table(cells, facts, time.monotonic() - began)
    print(f"\n{text}")
    record = {
        "machine": facts,
        "rate": options.rate,
        "window_s": options.window,
        "goal": GOAL,
        "ratios": {
            f"{server} {streams}": statistics.median(ratios(cells, server, streams))
            for streams in options.streams
            for server in SERVERS
        },
        "cells": [cell._asdict() for cell in cells],
    }
    if options.json is not None or not options.quick:
        report.write("front", text, record, options.json)


if __name__ == "__main__":
    main()
