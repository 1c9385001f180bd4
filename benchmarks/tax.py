"""What Headrace costs: output tokens/s through its HTTP over the rate of the engine by itself.

Two sides take turns in one run, on the same GGUF with the same slots, threads, batch and context:

- http: `headrace serve`, asked over HTTP for streams by a raw client in its own process; a turn
  lasts from the first connection to the last byte of the last stream;
- engine: xllamacpp called in a process of its own, one thread for each request, with a callback
  that takes the raw bytes; a turn lasts from the start of the first thread to the end of the last.

Both get the same prompts as text, of about 130 tokens and different in every request and round,
so that no prefix cache helps, and write 128 tokens, greedily, past the end token. Prefill and
tokenising are within the turn on both sides. Every other round begins with the other side. The
side that waits stays loaded; its CPU is watched, as it must be idle. A ratio is that of the two
turns of one round, and the table shows the median of the rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import statistics
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil

import report
from headrace import runtime
from headrace.models.reference import parse
from load import Client
from serving import Server, headrace, script, serving

GOAL, AIM = 0.95, 0.98
ROUNDS = {1: 6, 8: 5, 32: 3}
"""More of the short ones."""
REPEATS = {1: 3}
"""Requests one after another in a turn, where one alone would be over too soon to be timed."""
_CONTEXT, _BATCH = 512, 256
_WORDS = (
    *("river", "stone", "mill", "water", "wheel", "bridge", "valley", "winter", "bread", "flour"),
    *("grain", "farmer", "market", "road", "horse", "child", "music", "letter", "window", "ship"),
)
_DISTURBED = 0.1
_TRIES = 3


class Turn(NamedTuple):
    """One side of one round. CPU in seconds: of the side, its client, who waited, and the rest."""

    side: str
    streams: int
    round: int
    tokens: int
    prompt_tokens: int
    seconds: float
    cpu: float
    client_cpu: float
    idle_cpu: float
    other_cpu: float

    @property
    def rate(self) -> float:
        """Output tokens/s of all streams."""
        return self.tokens / self.seconds

    @property
    def disturbed(self) -> float:
        """Cores that other programs took."""
        return self.other_cpu / self.seconds


class Bench(NamedTuple):
    """What a round needs."""

    server: Server
    engine: Process
    client: Client
    max_tokens: int


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Output tokens/s through HTTP over the engine's.")
    parser.add_argument("--model", default="smollm2", help="reference of a GGUF")
    parser.add_argument("--streams", type=int, nargs="+", default=tuple(ROUNDS))
    parser.add_argument("--rounds", type=int, help="by default 6, 5 and 3 at 1, 8 and 32 streams")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=_cores(), help="of both; default: the cores")
    parser.add_argument("--quick", action="store_true", help="one short round, for tests")
    parser.add_argument("--json", type=Path, help="write the raw figures here")
    options = parser.parse_args(argv)
    if options.quick:
        options.rounds, options.max_tokens, options.streams = 1, 16, (1, 4)
    return options


def prompts(streams: int, number: int) -> list[str]:
    """Return texts of about 130 tokens that differ from their first word on."""
    source = random.Random(f"{streams} {number}")
    return [
        f"{source.randrange(10**6)} " + " ".join(source.choices(_WORDS, k=124))
        for _ in range(streams)
    ]


async def ask_http(bench: Bench, texts: Sequence[str]) -> dict[str, Any]:
    """Stream all texts at once through the server."""
    fields = {
        "max_tokens": bench.max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    bodies = [{"prompt": text, **fields} for text in texts]
    await bench.client.ask(
        "open", host="127.0.0.1", port=bench.server.port, path="/v1/completions", bodies=bodies
    )
    done = await bench.client.ask("drain")
    found = [re.findall(r'"(prompt|completion)_tokens":(\d+)', tail) for tail in done["tails"]]
    usages = [dict(pairs) for pairs in found]
    if not all("[DONE]" in tail for tail in done["tails"]):
        raise SystemExit(f"A stream did not end well: {done['tails'][0]}")
    return {
        "seconds": done["seconds"],
        "tokens": [int(usage["completion"]) for usage in usages],
        "prompt_tokens": [int(usage["prompt"]) for usage in usages],
    }


async def ask_engine(bench: Bench, texts: Sequence[str]) -> dict[str, Any]:
    """Have the engine answer all texts at once."""
    return await say(bench.engine, texts, bench.max_tokens)


async def turn(side: str, bench: Bench, streams: int, number: int) -> Turn:
    """Measure one side."""
    ask = {"http": ask_http, "engine": ask_engine}[side]
    texts = [prompts(streams, number * 100 + again) for again in range(REPEATS.get(streams, 1))]
    before = _cpu(bench)
    answers = [await ask(bench, some) for some in texts]
    used = {name: after - before[name] for name, after in _cpu(bench).items()}
    tokens = [count for answer in answers for count in answer["tokens"]]
    if set(tokens) != {bench.max_tokens}:
        raise SystemExit(f"{side}: not every request wrote {bench.max_tokens} tokens: {tokens}")
    return Turn(
        side=side,
        streams=streams,
        round=number,
        tokens=sum(tokens),
        prompt_tokens=sum(sum(answer["prompt_tokens"]) for answer in answers),
        seconds=sum(answer["seconds"] for answer in answers),
        cpu=used[side],
        client_cpu=used["client"] if side == "http" else 0.0,
        idle_cpu=used["engine" if side == "http" else "http"],
        other_cpu=used["all"] - used["http"] - used["engine"] - used["client"],
    )


async def rounds(options: argparse.Namespace, streams: int, model: Path) -> list[Turn]:
    """Let both sides take turns at one number of streams."""
    shape = {"slots": streams, "threads": options.threads, "batch_size": _BATCH}
    turns: list[Turn] = []
    async with contextlib.AsyncExitStack() as stack:
        serve = headrace(str(model), shape, "--context-length", str(_CONTEXT))
        server = await stack.enter_async_context(serving(serve))
        settings = {"model": str(model), "context_length": _CONTEXT, **shape}
        engine = await stack.enter_async_context(direct(settings))
        client = await Client.start()
        stack.push_async_callback(client.stop)
        bench = Bench(server, engine, client, options.max_tokens)
        for side in (ask_http, ask_engine):
            await side(bench, prompts(streams, -1)[:2])
        for number in range(options.rounds or ROUNDS.get(streams, 3)):
            pair = await _round(bench, streams, number)
            if pair[0].prompt_tokens != pair[1].prompt_tokens:
                raise SystemExit("The two sides did not see the same prompts.")
            for one in pair:
                print(f"  {streams:3} streams  {one.side:6} {one.rate:7.1f} tok/s", flush=True)
            turns += pair
    return turns


async def _round(bench: Bench, streams: int, number: int) -> list[Turn]:
    sides = ("http", "engine") if number % 2 == 0 else ("engine", "http")
    pair: list[Turn] = []
    for again in range(_TRIES):
        # Other prompts when it is done again: these are in the cache.
        pair = [await turn(side, bench, streams, number + again * 1000) for side in sides]
        if max(one.disturbed for one in pair) <= _DISTURBED:
            break
        print(f"  {streams:3} streams  disturbed", flush=True)
    return [one._replace(round=number) for one in pair]


def ratios(turns: Sequence[Turn], streams: int) -> list[float]:
    """Return http over engine for each round."""
    rates = {(one.side, one.round): one.rate for one in turns if one.streams == streams}
    numbers = sorted({number for _, number in rates})
    return [rates["http", number] / rates["engine", number] for number in numbers]


def table(turns: Sequence[Turn], facts: dict[str, Any], options: argparse.Namespace) -> str:
    """Return the figures to be read."""
    lines = [
        "Output tokens/s through HTTP over the engine's own, in one interleaved run",
        report.describe(facts),
        f"{options.model}, {options.threads} threads, {options.max_tokens} tokens out, "
        f"{turns[0].prompt_tokens // max(1, turns[0].tokens // options.max_tokens)} in",
        "",
        "streams  http tok/s  engine tok/s  ratio (least-most)     CPU s/token, http over engine",
    ]
    for streams in sorted({one.streams for one in turns}):
        sides = {
            side: [one for one in turns if (one.side, one.streams) == (side, streams)]
            for side in ("http", "engine")
        }
        rate = {side: statistics.median(one.rate for one in those) for side, those in sides.items()}
        cpu = {
            side: sum(one.cpu + one.client_cpu for one in those) / sum(one.tokens for one in those)
            for side, those in sides.items()
        }
        lines.append(
            f"{streams:7}  {rate['http']:10.1f}  {rate['engine']:12.1f}"
            f"  {report.spread(ratios(turns, streams)):21}  {cpu['http'] / cpu['engine']:.3f}"
        )
    idle = max(one.idle_cpu / one.seconds for one in turns)
    others = max(one.disturbed for one in turns)
    lines += [
        "",
        f"Goal: at least {GOAL} each, aim {AIM}. The side that waited used at most {idle:.1%} of a "
        f"core, other programs {others:.1%}.",
    ]
    return "\n".join(lines)


@contextlib.asynccontextmanager
async def direct(
    settings: dict[str, Any], program: str = "tax_engine.py"
) -> AsyncGenerator[Process]:
    """Run the engine by itself in a process."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *script(program, json.dumps(settings)),
        stdin=PIPE,
        stdout=PIPE,
        limit=1 << 24,
    )
    try:
        assert process.stdout is not None
        await process.stdout.readline()
        yield process
    finally:
        process.kill()
        await process.wait()


async def say(process: Process, texts: Sequence[str], max_tokens: int) -> dict[str, Any]:
    """Have an engine of `direct` answer all texts at once."""
    command = {"prompts": list(texts), "max_tokens": max_tokens}
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps(command).encode() + b"\n")
    return json.loads(await process.stdout.readline())


def _cpu(bench: Bench) -> dict[str, float]:
    times = psutil.cpu_times()
    return {
        "all": times.user + times.system,
        "http": bench.server.cpu() + bench.server.children_cpu(),
        "engine": _process_cpu(bench.engine.pid),
        "client": _process_cpu(bench.client.pid),
    }


def _process_cpu(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return times.user + times.system


def _cores() -> int:
    logical = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(logical or 1, psutil.cpu_count(logical=False) or 1))


async def run(options: argparse.Namespace) -> list[Turn]:
    """Measure everything."""
    settings = runtime.load_settings()
    model = runtime.store(settings.config).fetch(parse(options.model))
    turns: list[Turn] = []
    for streams in options.streams:
        turns += await rounds(options, streams, model)
    return turns


def main() -> None:
    """Measure, print and keep the figures."""
    options, began = arguments(), time.monotonic()
    turns, facts = asyncio.run(run(options)), report.machine()
    text = table(turns, facts, options) + f" Took {time.monotonic() - began:.0f} s."
    print(f"\n{text}")
    record = {
        "machine": facts,
        "model": options.model,
        "threads": options.threads,
        "goal": GOAL,
        "ratios": {n: statistics.median(ratios(turns, n)) for n in options.streams},
        "turns": [one._asdict() for one in turns],
    }
    if options.json is not None or not options.quick:
        report.write("tax", text, record, options.json)


if __name__ == "__main__":
    main()
