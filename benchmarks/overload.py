"""Goodput under overload: what is left of it at three times the load that can be served.

`headrace serve` with 4 slots and a bounded line answers short requests without streaming. First
its capacity is measured: eight clients, each of which asks again once it has its answer. Then
requests arrive by themselves, at random (Poisson, always the same series), at once and at three
times as many a second as it could serve, for equal times; at three times once with clients that
are content with a 429, and once with clients that come again after Retry-After until the deadline.

Goodput is output tokens/s of the answers that were whole within the deadline, counted from the
first time that the client asked. A client hangs up at its deadline. A turn has a warm-up, in which
requests arrive and nothing is counted; what ends after the turn is not counted either. The turns
at one and three times the capacity take turns.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import report
from serving import Server, headrace, serving

GOAL = 0.9
ROUNDS = 2
_CLIENTS, _SLOTS, _QUEUED, _CONTEXT = 8, 4, 16, 256
_TURNS = ((1.0, False), (3.0, False), (3.0, True))
_WORDS = ("river", "stone", "mill", "water", "wheel", "bridge", "valley", "winter", "bread")


class Asked(NamedTuple):
    """One request: when it came and when it was over, and how often it was told to come again.

    `status` is 0 for one that was given up at its deadline. Times are seconds of the turn.
    """

    came: float
    over: float
    status: int
    tokens: int
    refusals: int
    waits: tuple[float, ...] = ()


class Turn(NamedTuple):
    """One load for one time; `offered` is requests/s over the capacity."""

    offered: float
    obeys: bool
    seconds: float
    warm_s: float
    asked: list[Asked]

    @property
    def counted(self) -> list[Asked]:
        """Those that were over within the turn, without its warm-up."""
        return [one for one in self.asked if self.warm_s <= one.over < self.warm_s + self.seconds]

    @property
    def answered(self) -> list[Asked]:
        """Those of them that got an answer."""
        return [one for one in self.counted if one.status == 200]

    @property
    def goodput(self) -> float:
        """Tokens/s of answers in time."""
        return sum(one.tokens for one in self.answered) / self.seconds


class Bench(NamedTuple):
    """Whom to ask, for what, and when an answer is too late."""

    server: Server
    max_tokens: int
    deadline_s: float


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Goodput at three times the capacity.")
    parser.add_argument("--model", default="smollm2", help="a model, or echo")
    parser.add_argument("--seconds", type=float, default=25, help="of a turn")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument("--deadline", type=float, default=10, help="seconds for an answer")
    parser.add_argument("--quick", action="store_true", help="short turns, for tests")
    parser.add_argument("--json", type=Path, help="write the raw figures here")
    options = parser.parse_args(argv)
    if options.quick:
        options.seconds, options.rounds = 4, 1
    return options


async def post(bench: Bench, number: int) -> tuple[int, int, float]:
    """Ask once; return the status, the tokens, and the seconds of a Retry-After."""
    source = random.Random(number)
    body = {
        "prompt": f"{source.randrange(10**6)} {' '.join(source.choices(_WORDS, k=12))}",
        "max_tokens": bench.max_tokens,
        "temperature": 0,
        "ignore_eos": True,
    }
    content = json.dumps(body).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    reader, writer = await asyncio.open_connection("127.0.0.1", bench.server.port)
    try:
        writer.write(head.encode() + content)
        answer, _, rest = (await reader.read(-1)).partition(b"\r\n\r\n")
    finally:
        writer.transport.abort()
    lines = answer.decode().lower().split("\r\n")
    fields = dict(line.split(": ", 1) for line in lines[1:])
    status = int(lines[0].split()[1])
    tokens = json.loads(rest)["usage"]["completion_tokens"] if status == 200 else 0
    return status, tokens, float(fields.get("retry-after-ms", 0)) / 1000


async def client(bench: Bench, number: int, start: float, *, obeys: bool) -> Asked:
    """Ask, and come again when told to, until the deadline."""
    came, refusals, waits = time.monotonic(), 0, []
    status = tokens = 0
    try:
        async with asyncio.timeout(bench.deadline_s):
            while True:
                status, tokens, wait_s = await post(bench, number)
                if status != 429:
                    break
                refusals += 1
                waits.append(wait_s)
                if not obeys:
                    break
                status = 0
                # He who is told to come back after his deadline has no reason to wait for it.
                if time.monotonic() - came + wait_s > bench.deadline_s:
                    status = 429
                    break
                await asyncio.sleep(wait_s)
    except TimeoutError:
        status = 0
    return Asked(came - start, time.monotonic() - start, status, tokens, refusals, tuple(waits))


async def capacity(bench: Bench, seconds: float) -> Turn:
    """Keep all slots busy with clients that ask again and again."""
    start, warm_s = time.monotonic(), seconds / 4
    asked: list[Asked] = []

    async def ask(who: int) -> None:
        number = 0
        while time.monotonic() - start < warm_s + seconds:
            number += 1
            asked.append(await client(bench, who * 10**6 + number, start, obeys=False))

    await asyncio.gather(*(ask(who) for who in range(_CLIENTS)))
    return Turn(0.0, False, seconds, warm_s, asked)


async def arrivals(
    bench: Bench, rate: float, offered: float, seconds: float, seed: int, *, obeys: bool
) -> Turn:
    """Let requests arrive at random, `rate` times `offered` of them a second."""
    source, start = random.Random(seed), time.monotonic()
    # As long as it takes until the line is full and who waits in it is at his usual place.
    warm_s = seconds / 4
    tasks: list[asyncio.Task[Asked]] = []
    at = 0.0
    while (at := at + source.expovariate(rate * offered)) < warm_s + seconds:
        await asyncio.sleep(max(0.0, start + at - time.monotonic()))
        number = seed * 10**6 + len(tasks)
        tasks.append(asyncio.create_task(client(bench, number, start, obeys=obeys)))
    return Turn(offered, obeys, seconds, warm_s, [await task for task in tasks])


async def run(options: argparse.Namespace) -> list[Turn]:
    """Measure everything."""
    shape: dict[str, object] = {"slots": _SLOTS}
    if options.model == "echo":
        shape["tokens_per_second"] = 50
    flags = ("--context-length", str(_CONTEXT), "--max-queued", str(_QUEUED))
    turns: list[Turn] = []
    async with serving(headrace(options.model, shape, *flags)) as server:
        bench = Bench(server, options.max_tokens, options.deadline)
        for number in range(options.rounds):
            # Measured each round: what others do on this machine changes it.
            turns.append(await capacity(bench, options.seconds))
            print(_line(turns[-1]), flush=True)
            rate = len(turns[-1].answered) / options.seconds
            order = _TURNS if number % 2 == 0 else _TURNS[::-1]
            for offered, obeys in order:
                turns.append(
                    await arrivals(bench, rate, offered, options.seconds, number, obeys=obeys)
                )
                print(_line(turns[-1]), flush=True)
    return turns


def named(turns: Sequence[Turn], offered: float, *, obeys: bool = False) -> list[Turn]:
    """Return the turns of one kind, in the order of the rounds."""
    return [one for one in turns if (one.offered, one.obeys) == (offered, obeys)]


def ratio(turns: Sequence[Turn], offered: float, *, obeys: bool, over: float = 1.0) -> list[float]:
    """Return for each round the goodput of one kind over that of another."""
    pairs = zip(named(turns, offered, obeys=obeys), named(turns, over), strict=True)
    return [one.goodput / base.goodput for one, base in pairs]


def table(turns: Sequence[Turn], facts: dict[str, Any], options: argparse.Namespace) -> str:
    """Return the figures to be read."""
    lines = [
        f"Goodput (tokens/s of answers within {options.deadline:g} s) by offered load",
        report.describe(facts),
        f"{options.model}, {_SLOTS} slots, {_QUEUED} places, {options.max_tokens} tokens out, "
        f"{options.rounds} rounds of {options.seconds:g} s",
        "",
        "load                 goodput  of x1    of capacity  answered  429    late   "
        "s to an answer: p50  p95  p99",
    ]
    for offered, obeys in ((0.0, False), *_TURNS):
        those = named(turns, offered, obeys=obeys)
        counted = [one for turn in those for one in turn.counted]
        found = Counter(one.status for one in counted)
        goodput = statistics.median(one.goodput for one in those)
        of_one = statistics.median(ratio(turns, offered, obeys=obeys))
        of_all = statistics.median(ratio(turns, offered, obeys=obeys, over=0.0))
        took = sorted(one.over - one.came for turn in those for one in turn.answered)
        share = [found[status] / max(1, len(counted)) for status in (200, 429, 0)]
        lines.append(
            f"{_name(offered, obeys):19}  {goodput:7.1f}  {of_one:5.2f}  {of_all:13.2f}"
            f"  {share[0]:8.0%}  {share[1]:4.0%}  {share[2]:5.0%}"
            f"  {_at(took, 0.5):19.2f} {_at(took, 0.95):4.1f} {_at(took, 0.99):4.1f}"
        )
    refused = [one for turn in turns for one in turn.asked if one.refusals and not turn.obeys]
    slow = _at(sorted(one.over - one.came for one in refused), 0.99)
    lines += ["", f"Goal: at least {GOAL} of x1 at x3. 99 % of the 429 came within {slow:.3f} s."]
    return "\n".join(lines)


def _line(turn: Turn) -> str:
    found = Counter(one.status for one in turn.counted)
    kinds = ", ".join(f"{status or 'late'}: {count}" for status, count in sorted(found.items()))
    return f"  {_name(turn.offered, turn.obeys):19}  {turn.goodput:6.1f} tok/s  {kinds}"


def _name(offered: float, obeys: bool) -> str:
    kind = "comes again" if obeys else ("arrivals" if offered else "closed loop")
    return f"x{offered:g} {kind}" if offered else f"capacity, {kind}"


def _at(ordered: Sequence[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))] if ordered else 0.0


def main() -> None:
    """Measure, print and keep the figures."""
    options, began, load = arguments(), time.monotonic(), report.load_average()
    turns, facts = asyncio.run(run(options)), report.machine()
    busy = f" Load average {load} before, {report.load_average()} after."
    text = table(turns, facts, options) + busy + f" Took {time.monotonic() - began:.0f} s."
    print(f"\n{text}")
    record = {
        "machine": facts,
        "model": options.model,
        "deadline_s": options.deadline,
        "load_average": [load, report.load_average()],
        "goal": GOAL,
        "ratios": {_name(n, o): ratio(turns, n, obeys=o) for n, o in _TURNS[1:]},
        "turns": [
            {**one._asdict(), "goodput": one.goodput, "asked": [list(a) for a in one.asked]}
            for one in turns
        ],
    }
    if options.json is not None or not options.quick:
        report.write("overload", text, record, options.json)


if __name__ == "__main__":
    main()
