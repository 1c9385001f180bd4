"""The cost of Headrace: output tokens/s over its HTTP API, relative to the engine by itself.

Two sides take turns in one run, on the same GGUF with the same slots, threads, batch and context:

- http: `headrace serve`, with a raw HTTP client in its own process that requests streams; a turn
  lasts from the first connection to the last byte of the last stream;
- engine: xllamacpp called in a process of its own, one thread for each request, with a callback
  that takes the raw bytes; a turn lasts from the start of the first thread to the end of the last.

Both get the same prompts as text, of about 130 tokens and different in every request and round,
so that no prefix cache helps, and write 128 tokens, greedily, past the end token. Prefill and
tokenising are within the turn on both sides. Every other round begins with the other side. The
side that waits stays loaded; its CPU time is recorded, as it must be idle. A ratio is that of the
two turns of one round, and the table shows the median of the rounds.

With `--against DIR`, the other side is not the engine but `other`: the same over HTTP with the
Headrace of another checkout.
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
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil

import report
from headrace import runtime
from headrace.lab import drive, figures, load
from headrace.lab.drive import Program, Server
from headrace.models.reference import parse

GOAL, AIM = 0.95, 0.98
ROUNDS = {1: 6, 8: 5, 32: 3}
"""Rounds by the number of streams; more of the short ones."""
REPEATS = {1: 3}
"""Requests in sequence in a turn, where a single one would be too short to be timed."""
_CONTEXT, _BATCH = 512, 256
NAMES = {"engine": "the engine's own", "other": "that of the other checkout"}
_DISTURBED = 0.1
_TRIES = 3


class Side(NamedTuple):
    """A side of the comparison. `ask` answers texts all at once; `cpu` returns seconds so far."""

    name: str
    ask: Callable[[Sequence[str]], Awaitable[dict[str, Any]]]
    cpu: Callable[[], float]


class Turn(NamedTuple):
    """One side of one round. CPU seconds: of the side, its client, the idle sides, the rest."""

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


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = report.parser("Output tokens/s through HTTP over the engine's.")
    parser.add_argument("--model", default="smollm2", help="reference of a GGUF")
    parser.add_argument("--streams", type=int, nargs="+", default=tuple(ROUNDS))
    parser.add_argument("--rounds", type=int, help="by default 6, 5 and 3 at 1, 8 and 32 streams")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=cores(), help="of both; default: the cores")
    report.against(parser)
    options = parser.parse_args(argv)
    if options.quick:
        options.rounds, options.max_tokens, options.streams = 1, 16, (1, 4)
    return options


def prompts(streams: int, number: int) -> list[str]:
    """Return texts of about 130 tokens that differ from their first word on."""
    source = random.Random(f"{streams} {number}")
    return [load.prompt(source) for _ in range(streams)]


async def ask_http(
    server: Server, client: Program, texts: Sequence[str], max_tokens: int
) -> dict[str, Any]:
    """Stream all texts at once through a server."""
    fields = {
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    bodies = [{"prompt": text, **fields} for text in texts]
    await client.ask({"do": "open", "url": server.url, "bodies": bodies})
    done = await client.ask({"do": "drain"})
    pairs = [re.findall(r'"(prompt|completion)_tokens":(\d+)', tail) for tail in done["tails"]]
    usages = [dict(counts) for counts in pairs]
    if not all("[DONE]" in tail for tail in done["tails"]):
        raise SystemExit(f"A stream did not end well: {done['tails'][0]}")
    return {
        "seconds": done["seconds"],
        "tokens": [int(usage["completion"]) for usage in usages],
        "prompt_tokens": [int(usage["prompt"]) for usage in usages],
    }


def over_http(name: str, server: Server, client: Program, max_tokens: int) -> Side:
    """Return a server as a side."""
    return Side(
        name,
        lambda texts: ask_http(server, client, texts, max_tokens),
        lambda: server.program.cpu() + server.program.children_cpu(),
    )


async def by_itself(
    name: str, stack: contextlib.AsyncExitStack, settings: dict[str, Any], program: str, most: int
) -> Side:
    """Start an engine by itself in a process, as a side."""
    command = report.script(program, json.dumps(settings))
    engine = await stack.enter_async_context(drive.program(command))
    await engine.ask()
    return Side(
        name, lambda texts: engine.ask({"prompts": list(texts), "max_tokens": most}), engine.cpu
    )


async def turn(
    side: Side, sides: Sequence[Side], client: Program, streams: int, number: int
) -> Turn:
    """Measure one side."""
    texts = [prompts(streams, number * 100 + again) for again in range(REPEATS.get(streams, 1))]
    before = _cpu(sides, client)
    answers = [await side.ask(batch) for batch in texts]
    used = {name: after - before[name] for name, after in _cpu(sides, client).items()}
    tokens = [count for answer in answers for count in answer["tokens"]]
    if len(set(tokens)) != 1:
        raise SystemExit(f"{side.name}: not every request wrote the same: {tokens}")
    return Turn(
        side=side.name,
        streams=streams,
        round=number,
        tokens=sum(tokens),
        prompt_tokens=sum(sum(answer["prompt_tokens"]) for answer in answers),
        seconds=sum(answer["seconds"] for answer in answers),
        cpu=used[side.name],
        client_cpu=used["client"],
        idle_cpu=sum(used[other.name] for other in sides if other is not side),
        other_cpu=used["all"] - used["client"] - sum(used[other.name] for other in sides),
    )


async def take_turns(
    sides: Sequence[Side], client: Program, streams: int, rounds: int | None
) -> list[Turn]:
    """Let all sides take turns at one number of streams, after a short turn to warm up."""
    turns: list[Turn] = []
    for side in sides:
        await side.ask(prompts(streams, -1)[:2])
    for number in range(rounds or ROUNDS.get(streams, 3)):
        done = await _round(sides, client, streams, number)
        for turn in done:
            print(f"  {streams:3} streams  {turn.side:8} {turn.rate:7.1f} tok/s", flush=True)
        turns += done
    return turns


async def _round(sides: Sequence[Side], client: Program, streams: int, number: int) -> list[Turn]:
    # The order rotates, so that no side always follows the same other one.
    first = number % len(sides)
    order, done = [*sides[first:], *sides[:first]], list[Turn]()
    for again in range(_TRIES):
        # A repetition uses other prompts: the first ones are in the cache.
        texts = number + again * 1000
        done = [await turn(side, sides, client, streams, texts) for side in order]
        if max(turn.disturbed for turn in done) <= _DISTURBED:
            break
        print(f"  {streams:3} streams  disturbed", flush=True)
    return [turn._replace(round=number) for turn in done]


async def rounds(options: argparse.Namespace, streams: int, model: Path) -> list[Turn]:
    """Measure all sides at one number of streams."""
    shape = {"slots": streams, "threads": options.threads, "batch_size": _BATCH}
    flags = ("--context-length", str(_CONTEXT), "--fronts", "1")
    command = drive.serve(str(model), *flags, options=shape)
    settings = {"model": str(model), "context_length": _CONTEXT, **shape}
    async with contextlib.AsyncExitStack() as stack:
        client = await stack.enter_async_context(drive.program(load.command()))
        start = stack.enter_async_context
        server, most = await start(drive.server(command)), options.max_tokens
        sides = [over_http("http", server, client, most)]
        if options.against:
            other = await start(drive.server(command, drive.checkout(options.against)))
            sides.append(over_http("other", other, client, most))
        else:
            sides.append(await by_itself("engine", stack, settings, "tax_engine.py", most))
        turns = await take_turns(sides, client, streams, options.rounds)
    requests = streams * REPEATS.get(streams, 1)
    if {turn.tokens for turn in turns} != {requests * options.max_tokens}:
        raise SystemExit(f"Not every request wrote {options.max_tokens} tokens.")
    if len({(turn.round, turn.prompt_tokens) for turn in turns}) > len(
        {turn.round for turn in turns}
    ):
        raise SystemExit("The sides did not see the same prompts.")
    return turns


def rate(turns: Sequence[Turn], streams: int, side: str) -> float:
    """Return the median rate of a side."""
    return statistics.median(
        turn.rate for turn in turns if (turn.side, turn.streams) == (side, streams)
    )


def ratios(turns: Sequence[Turn], streams: int, side: str, base: str) -> list[float]:
    """Return the rate of one side over another's, for each round."""
    rates = {(turn.side, turn.round): turn.rate for turn in turns if turn.streams == streams}
    numbers = sorted({number for name, number in rates if name == base})
    return [rates[side, number] / rates[base, number] for number in numbers]


def table(
    turns: Sequence[Turn], facts: dict[str, Any], options: argparse.Namespace, base: str
) -> str:
    """Return the table of the figures."""
    lines = [
        f"Output tokens/s through HTTP over {NAMES[base]}, in one interleaved run",
        report.describe(facts),
        f"{options.model}, {options.threads} threads, {options.max_tokens} tokens out, "
        f"{turns[0].prompt_tokens // max(1, turns[0].tokens // options.max_tokens)} in",
        "",
        f"streams  http tok/s  {base:>6} tok/s  ratio (least-most)     CPU s/token, over {base}",
    ]
    for streams in sorted({turn.streams for turn in turns}):
        spent = [_cpu_per_token(turns, streams, side) for side in ("http", base)]
        lines.append(
            f"{streams:7}  {rate(turns, streams, 'http'):10.1f}"
            f"  {rate(turns, streams, base):12.1f}"
            f"  {figures.spread(ratios(turns, streams, 'http', base)):21}"
            f"  {spent[0] / spent[1]:.3f}"
        )
    idle = max(turn.idle_cpu / turn.seconds for turn in turns)
    others = max(turn.disturbed for turn in turns)
    goal = f"Goal: at least {GOAL} each, aim {AIM}. " if base == "engine" else ""
    waited = f"The side that waited used at most {idle:.1%} of a core, other programs {others:.1%}."
    return "\n".join([*lines, "", goal + waited])


def _cpu_per_token(turns: Sequence[Turn], streams: int, side: str) -> float:
    own = [turn for turn in turns if (turn.side, turn.streams) == (side, streams)]
    return sum(turn.cpu + turn.client_cpu for turn in own) / sum(turn.tokens for turn in own)


def _cpu(sides: Sequence[Side], client: Program) -> dict[str, float]:
    times = psutil.cpu_times()
    own = {side.name: side.cpu() for side in sides}
    return {"all": times.user + times.system, "client": client.cpu(), **own}


def cores() -> int:
    """Return how many cores this process may use, without their second threads."""
    logical = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(logical or 1, psutil.cpu_count(logical=False) or 1))


async def run(options: argparse.Namespace) -> list[Turn]:
    """Measure everything."""
    model = runtime.store(runtime.load_settings().config).fetch(parse(options.model))
    turns: list[Turn] = []
    for streams in options.streams:
        turns += await rounds(options, streams, model)
    return turns


def main() -> None:
    """Measure, print and keep the figures."""
    options, conditions = arguments(), report.Conditions()
    base = "other" if options.against else "engine"
    turns, facts = asyncio.run(run(options)), report.machine()
    text = f"{table(turns, facts, options, base)}{conditions}"
    print(f"\n{text}")
    record = {
        "machine": facts,
        "model": options.model,
        "threads": options.threads,
        "goal": GOAL,
        "ratios": {n: statistics.median(ratios(turns, n, "http", base)) for n in options.streams},
        "turns": [turn._asdict() for turn in turns],
    }
    report.write("tax-against" if options.against else "tax", text, record, options)


if __name__ == "__main__":
    main()
