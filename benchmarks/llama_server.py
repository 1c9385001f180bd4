"""llama-server by itself and under Headrace in turn: tokens/s, first tokens, gaps.

    python benchmarks/llama_server.py MODEL.gguf --executable llama-server

Both have the same executable, slots, context and flags, and are measured A B, B A by one client
process that only records when bytes arrive. Prompts are 128 token ids, drawn from a seed; answers
are greedy and of one length. On a GPU both models have to fit at once.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import re
import shutil
import statistics
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import report
from headrace.lab import drive, load
from headrace.lab.bench.runner import served_models
from headrace.lab.drive import Program, Server
from headrace.lab.figures import percentile

_START_S, _CONTEXT, _PROMPT = 150.0, 1024, 128
_REPEATS = {1: 5}
_FIGURES = ("tokens_per_s", "first_ms", "gap_p99_ms")


def main() -> None:
    """Measure, print the table and keep the raw figures."""
    parser = report.parser(__doc__)
    parser.add_argument("model", type=Path, help="a GGUF")
    parser.add_argument("--executable", default="llama-server", help="a path or a name on PATH")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--tokens", type=int, default=192, help="of each answer")
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    if options.quick:
        options.streams, options.tokens, options.rounds = [1, 2], 16, 1
    asyncio.run(_main(options))


async def _main(options: argparse.Namespace) -> None:
    conditions = report.Conditions()
    rounds: list[dict[str, Any]] = []
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(drive.program(load.command()))
        sides = {"llama-server": await _itself(stack, options)}
        sides["headrace"] = await _headrace(stack, options)
        for streams in options.streams:
            for number in range(-1, options.rounds):
                for side in list(sides)[:: 1 if number % 2 == 0 else -1]:
                    figures = await _turn(client, *sides[side], streams, number, options)
                    if number >= 0:
                        rounds.append({"side": side, "streams": streams, "round": number} | figures)
                        print(rounds[-1], flush=True)
    record = {"machine": report.machine(), "model": options.model.name, "rounds": rounds}
    lines = [f"{options.model.name}, llama-server by itself / under Headrace", *_table(rounds)]
    table = "\n".join([*lines, report.describe(record["machine"]), f"Goal: 0.98.{conditions}"])
    print(table)
    report.write("llama-server", table, record, options)


async def _itself(stack: AsyncExitStack, options: argparse.Namespace) -> tuple[str, str]:
    slots, port = max(options.streams), drive.free_port()
    words: dict[str, object] = {
        "-m": options.model, "-np": slots, "-c": slots * _CONTEXT, "-ngl": 999, "-b": 2048,
        "-ub": 512, "--cache-ram": 0, "-lv": 1, "--host": "127.0.0.1", "--port": port,
        "-t": os.cpu_count(), "-tb": os.cpu_count(), "--threads-http": slots + 2,
    }  # fmt: skip
    flags = [str(word) for pair in words.items() for word in pair]
    command = [str(shutil.which(options.executable)), *flags]
    url = f"http://127.0.0.1:{port}"
    run = drive.server(command, url=url, ready="/health", start_s=_START_S)
    return await _place(await stack.enter_async_context(run))


async def _place(server: Server) -> tuple[str, str]:
    http = server.http()
    (name,) = await served_models(http)
    http.close()
    return server.url, name


async def _headrace(stack: AsyncExitStack, options: argparse.Namespace) -> tuple[str, str]:
    given = {"slots": max(options.streams), "executable": shutil.which(options.executable)}
    flags = ("--engine", "llama_server", "--context-length", str(_CONTEXT))
    command = drive.serve(str(options.model), *flags, options=given | {"threads": os.cpu_count()})
    run = drive.server(command, ready="/health/ready", start_s=_START_S)
    return await _place(await stack.enter_async_context(run))


async def _turn(
    client: Program,
    url: str,
    model: str,
    streams: int,
    number: int,
    options: argparse.Namespace,
) -> dict[str, float]:
    rates: list[float] = []
    firsts: list[float] = []
    gaps: list[float] = []
    for again in range(_REPEATS.get(streams, 2)):
        seeds = [f"{number} {again} {stream}" for stream in range(streams)]
        bodies = [_body(model, seed, options.tokens) for seed in seeds]
        await client.ask({"do": "open", "url": url, "bodies": bodies})
        answer = await client.ask({"do": "drain", "times": True})
        counts = [re.findall(r'"completion_tokens": ?(\d+)', tail) for tail in answer["tails"]]
        if any(not count or int(count[-1]) != options.tokens for count in counts):
            raise SystemExit(f"An answer was not whole: {answer['tails'][0][-300:]}")
        last = max(stream["last"] for stream in answer["streams"])
        rates.append(streams * options.tokens / (last - answer["began"]))
        firsts += [stream["first"] * 1000 for stream in answer["streams"]]
        gaps += [gap * 1000 for stream in answer["streams"] for gap in stream["gaps"]]
    middle = (statistics.median(rates), statistics.median(firsts), percentile(sorted(gaps), 99))
    return dict(zip(_FIGURES, middle, strict=True))


def _body(model: str, seed: str, tokens: int) -> dict[str, Any]:
    source = random.Random(seed)
    prompt = [source.randrange(100, 30_000) for _ in range(_PROMPT)]
    fixed = {"temperature": 0, "ignore_eos": True, "stream": True}
    usage = {"stream_options": {"include_usage": True}}
    return {"model": model, "prompt": prompt, "max_tokens": tokens} | fixed | usage


def _table(rounds: list[dict[str, Any]]) -> list[str]:
    lines = ["streams  tokens/s          ratio  first token ms   gap p99 ms"]
    for streams in sorted({row["streams"] for row in rounds}):
        pairs: list[list[float]] = []
        for figure in _FIGURES:
            pairs.append(
                [
                    statistics.median(
                        row[figure]
                        for row in rounds
                        if (row["side"], row["streams"]) == (side, streams)
                    )
                    for side in ("llama-server", "headrace")
                ]
            )
        (theirs, ours), first, gap = pairs
        lines.append(
            f"{streams:7}  {theirs:7.0f} / {ours:7.0f} {ours / theirs:5.3f}"
            f"  {first[0]:6.1f} / {first[1]:6.1f}  {gap[0]:5.1f} / {gap[1]:5.1f}"
        )
    return lines


if __name__ == "__main__":
    main()
