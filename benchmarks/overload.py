"""Goodput under overload: what is left of it at three times the load that can be served.

`headrace serve` with 4 slots and a bounded queue answers short requests without streaming. First
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
from typing import Any, NamedTuple

import report
from headrace.lab import drive, load
from headrace.lab.figures import percentile
from headrace.lab.http import Http, Whole

GOAL = 0.9
ROUNDS = 2
_CLIENTS, _SLOTS, _QUEUED, _CONTEXT = 8, 4, 16, 256
_TURNS = ((1.0, False), (3.0, False), (3.0, True))


class Asked(NamedTuple):
    """One request: when it came and when it was over, and how often it was refused.

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
    """The service, the length of an answer, and when it is too late."""

    http: Http
    max_tokens: int
    deadline_s: float


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = report.parser("Goodput at three times the capacity.")
    parser.add_argument("--model", default="smollm2", help="a model, or echo")
    parser.add_argument("--seconds", type=float, default=25, help="of a turn")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument("--deadline", type=float, default=10, help="seconds for an answer")
    options = parser.parse_args(argv)
    if options.quick:
        options.seconds, options.rounds = 4, 1
    return options


async def post(bench: Bench, number: int) -> tuple[int, int, float]:
    """Send one request; return the status, the tokens, and the seconds of a Retry-After."""
    source, answer = random.Random(number), Whole()
    body = {
        "prompt": load.prompt(source, 12),
        "max_tokens": bench.max_tokens,
        "temperature": 0,
        "ignore_eos": True,
    }
    await bench.http.send(load.PATH, json.dumps(body).encode(), answer)
    tokens = json.loads(answer.data)["usage"]["completion_tokens"] if answer.status == 200 else 0
    return answer.status, tokens, float(answer.headers.get("retry-after-ms", 0)) / 1000


async def client(bench: Bench, number: int, start: float, *, obeys: bool) -> Asked:
    """Ask, and come again when refused, until the deadline."""
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
                # A client that would come back after its deadline does not wait for it.
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
    # As long as it takes until the queue is full and waits are as long as usual.
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
    async with drive.server(drive.serve(options.model, *flags, options=shape)) as server:
        bench = Bench(server.http(), options.max_tokens, options.deadline)
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
        took = [one.over - one.came for turn in those for one in turn.answered]
        at = [percentile(took, percent) for percent in (50, 95, 99)]
        share = [found[status] / max(1, len(counted)) for status in (200, 429, 0)]
        lines.append(
            f"{_name(offered, obeys):19}  {goodput:7.1f}  {of_one:5.2f}  {of_all:13.2f}"
            f"  {share[0]:8.0%}  {share[1]:4.0%}  {share[2]:5.0%}"
            f"  {at[0]:19.2f} {at[1]:4.1f} {at[2]:4.1f}"
        )
    refused = [one for turn in turns for one in turn.asked if one.refusals and not turn.obeys]
    slow = percentile((one.over - one.came for one in refused), 99)
    lines += ["", f"Goal: at least {GOAL} of x1 at x3. 99 % of the 429 came within {slow:.3f} s."]
    return "\n".join(lines)


def _line(turn: Turn) -> str:
    found = Counter(one.status for one in turn.counted)
    kinds = ", ".join(f"{status or 'late'}: {count}" for status, count in sorted(found.items()))
    return f"  {_name(turn.offered, turn.obeys):19}  {turn.goodput:6.1f} tok/s  {kinds}"


def _name(offered: float, obeys: bool) -> str:
    kind = "comes again" if obeys else ("arrivals" if offered else "closed loop")
    return f"x{offered:g} {kind}" if offered else f"capacity, {kind}"


def main() -> None:
    """Measure, print and keep the figures."""
    options, watch = arguments(), report.Watch()
    turns, facts = asyncio.run(run(options)), report.machine()
    text = f"{table(turns, facts, options)}{watch}"
    print(f"\n{text}")
    record = {
        "machine": facts,
        "model": options.model,
        "deadline_s": options.deadline,
        "load_average": watch.load,
        "goal": GOAL,
        "ratios": {_name(n, o): ratio(turns, n, obeys=o) for n, o in _TURNS[1:]},
        "turns": [
            {**one._asdict(), "goodput": one.goodput, "asked": [list(a) for a in one.asked]}
            for one in turns
        ],
    }
    report.write("overload", text, record, options)


if __name__ == "__main__":
    main()
