"""What the pool adds to a load: time from a request to its first token, against the engine's own.

Two models, copies of one file, are served under a budget for one. A round measures, in turn:

- resident: the model is loaded;
- unloaded: it is not, there is room, and its file is in the page cache;
- evicted: the same, but the other model has its memory and has to go first;
- cold: as evicted, but no page of its file is in the page cache.

Beside each, in turn, the engine alone: a fresh process that imports only xllamacpp, loads a third
copy of the file with the same slots, threads, batch and context, and answers as long a prompt. Its
time is from the start of the process to the first token; the time that the process needs before
it begins to load is given too. For `resident` it is the last of several prompts to that process.
The page cache is emptied of a copy with posix_fadvise and what is left is counted; the libraries
stay in it. Both sides have one thread: several would wait for each other by spinning, which
Headrace limits when cores are shared, so that the engine alone would look worse.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import json
import mmap
import os
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import report
from headrace import runtime
from headrace.lab import drive, load
from headrace.lab.drive import Server
from headrace.models.reference import parse
from tax import prompts

CASES = ("resident", "unloaded", "evicted", "cold")
GOAL_RATIO, GOAL_S = 1.10, 0.1
ROUNDS = 7
_CONTEXT, _SLOTS, _BATCH = 1024, 4, 128
_BUDGET = "420MB"
_RESIDENCE_S = 1.5
_PATIENCE_S = 120


class Times(NamedTuple):
    """One case in one round, in seconds; `opened` is the engine's load, `load` the worker's."""

    case: str
    round: int
    pool: float
    load: float
    engine: float
    started: float
    opened: float
    left: float
    """Share of the file that was still in the page cache, of either side; 1 where it should be."""


class Bench(NamedTuple):
    """The service, the files of its two models, and the file of the engine alone."""

    server: Server
    first: Path
    second: Path
    peer: Path
    threads: int


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = report.parser("What the pool adds to the engine's load.")
    parser.add_argument("--model", default="smollm2", help="reference of a GGUF")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--memory", default=_BUDGET, help="budget for one model but not two")
    parser.add_argument("--threads", type=int, default=1, help="of both")
    parser.add_argument("--folder", type=Path, help="a folder on a disk, for the copies")
    options = parser.parse_args(argv)
    if options.quick:
        options.rounds = 1
    return options


def drop(path: Path) -> None:
    """Take a file out of the page cache."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def warm(path: Path) -> None:
    """Read a file into the page cache."""
    with path.open("rb") as file:
        while file.read(1 << 22):
            pass


def cached(path: Path) -> float:
    """Return the share of a file's pages that are in the page cache."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE) as mapped:
        pages = -(-len(mapped) // mmap.PAGESIZE)
        resident = (ctypes.c_ubyte * pages)()
        byte = ctypes.c_char.from_buffer(mapped)
        try:
            library = ctypes.CDLL(None, use_errno=True)
            start = ctypes.c_void_p(ctypes.addressof(byte))
            if library.mincore(start, ctypes.c_size_t(len(mapped)), resident):
                raise OSError(ctypes.get_errno(), "mincore")
        finally:
            del byte
        return sum(page & 1 for page in resident) / pages


async def ask(bench: Bench, model: Path, prompt: str) -> float:
    """Stream one token on a new connection; return the seconds from before it to the token."""
    body = {"model": model.stem, "prompt": prompt, "max_tokens": 1, "temperature": 0}
    text = json.dumps({**body, "ignore_eos": True, "stream": True})
    http, stream = bench.server.http(), load.Stream()
    async with asyncio.timeout(_PATIENCE_S):
        await stream.run(http, load.PATH, text.encode())
    http.close()
    # Comments come before the first data while the model loads.
    if stream.status != 200 or stream.first_s is None or b"[DONE]" not in stream.tail:
        raise SystemExit(f"{model.stem} did not answer: {stream.status} {stream.tail!r}")
    return stream.first_s


async def admin(bench: Bench, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """Send a request to /admin, and return the answer."""
    http = bench.server.http()
    async with asyncio.timeout(_PATIENCE_S):
        status, answer = await http.fetch(f"/admin/{path}", body)
    http.close()
    if status != 200:
        raise SystemExit(f"{path}: {answer!r}")
    return json.loads(answer)


async def prepare(bench: Bench, case: str) -> float:
    """Set up the state of a case; return the share of the file that is in the page cache."""
    if case == "resident":
        for again in range(4):
            await ask(bench, bench.first, prompts(1, -2 - again)[0])
    else:
        await admin(bench, "models/unload", {"model": bench.first.stem})
    if case in {"evicted", "cold"}:
        await ask(bench, bench.second, prompts(1, -2)[0])
        await asyncio.sleep(_RESIDENCE_S)
    else:
        await admin(bench, "models/unload", {"model": bench.second.stem})
    for path in (bench.first, bench.peer):
        await asyncio.to_thread(drop if case == "cold" else warm, path)
    return max(cached(bench.first), cached(bench.peer))


async def ask_pool(bench: Bench, case: str, prompt: str) -> tuple[float, float]:
    """Measure Headrace: seconds to the first token, and seconds of the worker's load."""
    seconds = await ask(bench, bench.first, prompt)
    status = await admin(bench, f"models/{bench.first.stem}")
    other = await admin(bench, f"models/{bench.second.stem}")
    if case in {"evicted", "cold"} and other["state"] == "ready":
        raise SystemExit("Both models fit: use a smaller --memory.")
    return seconds, (status["replicas"][0]["load_ms"] or 0) / 1000


async def ask_engine(bench: Bench, texts: Sequence[str]) -> dict[str, float]:
    """Measure the engine in a process of its own."""
    settings = {
        "model": str(bench.peer),
        "context_length": _CONTEXT,
        "slots": _SLOTS,
        "threads": bench.threads,
        "batch_size": _BATCH,
        "prompts": list(texts),
    }
    command, began = report.script("swap_engine.py", json.dumps(settings)), time.monotonic()
    # Headrace's workers have it too, which matters with more than one thread.
    async with drive.program(command, {"GOMP_SPINCOUNT": "10000"}) as engine:
        answer = await engine.ask()
        await engine.wait()
    return {
        "cold": answer["first_at"] - began,
        "resident": answer["resident_s"],
        "started": answer["began_at"] - began,
        "opened": answer["opened_s"],
    }


async def measure(bench: Bench, case: str, number: int) -> Times:
    """Measure both sides of one case, the other one first in every other round."""
    left = await prepare(bench, case)
    source = random.Random(f"{case} {number}")
    texts = [" ".join(prompts(1, source.randrange(10**6))[0].split()[:16]) for _ in range(6)]
    pool: tuple[float, float] = (0.0, 0.0)
    engine: dict[str, float] = {}
    for side in ("pool", "engine") if number % 2 == 0 else ("engine", "pool"):
        if side == "pool":
            pool = await ask_pool(bench, case, texts[0])
        else:
            engine = await ask_engine(bench, texts[1:])
    return Times(
        case=case,
        round=number,
        pool=pool[0],
        load=0.0 if case == "resident" else pool[1],
        engine=engine["resident" if case == "resident" else "cold"],
        started=0.0 if case == "resident" else engine["started"],
        opened=0.0 if case == "resident" else engine["opened"],
        left=left,
    )


def middle(times: Sequence[Times], case: str, field: str) -> float:
    """Return the median of a field over the rounds."""
    return statistics.median(getattr(row, field) for row in times if row.case == case)


def verdict(times: Sequence[Times], case: str) -> dict[str, Any]:
    """Return the figures of one case; those of a pair are taken in its round."""
    pairs = [row for row in times if row.case == case]
    added = statistics.median(row.pool - row.engine for row in pairs)
    allowed = statistics.median(row.engine * (GOAL_RATIO - 1) + GOAL_S for row in pairs)
    return {
        **{name: middle(times, case, name) for name in Times._fields[2:]},
        "ratio": statistics.median(row.pool / row.engine for row in pairs),
        "added": added,
        "added_least": min(row.pool for row in pairs) - min(row.engine for row in pairs),
        "allowed": allowed,
        "met": added <= allowed,
    }


def table(times: Sequence[Times], facts: dict[str, Any], options: argparse.Namespace) -> str:
    """Return the table of the figures."""
    lines = [
        "Milliseconds from a request to its first token, beside the engine alone, medians",
        report.describe(facts),
        f"{options.model}, {_SLOTS} slots, {options.threads} threads, {_CONTEXT} tokens of "
        f"context, {options.rounds} rounds",
        "",
        "case       pool (least-most)    of it load  engine (least-most)   of it: start, open"
        "  ratio  added (of the least)  allowed",
    ]
    for case in CASES:
        figures = verdict(times, case)
        every = [row for row in times if row.case == case]
        lines.append(
            f"{case:9}  {_range([row.pool for row in every]):19}  {_ms(figures['load']):10}"
            f"  {_range([row.engine for row in every]):20}"
            f"  {_ms(figures['started']):11}, {_ms(figures['opened']):5}"
            f"  {figures['ratio']:5.2f}  {_ms(figures['added']):5} ({_ms(figures['added_least'])})"
            f"  {_ms(figures['allowed']):>13}"
            f"  {'met' if figures['met'] else 'missed'}"
        )
    left = max((row.left for row in times if row.case == "cold"), default=0.0)
    lines += ["", f"Goal: 10 % + 100 ms. Of the cold files {left:.1%} were in the page cache."]
    return "\n".join(lines)


def _range(values: Sequence[float]) -> str:
    return f"{_ms(statistics.median(values))} ({_ms(min(values))}-{_ms(max(values))})"


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.0f}" if seconds >= 0.1 else f"{seconds * 1000:.1f}"


@contextlib.asynccontextmanager
async def _bench(options: argparse.Namespace, model: Path) -> AsyncGenerator[Bench]:
    threads = options.threads
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        first, second, peer = (
            Path(folder) / f"{name}.gguf" for name in ("first", "second", "peer")
        )
        for path in (first, second, peer):
            shutil.copyfile(model, path)
        shape: dict[str, object] = {"slots": _SLOTS, "threads": threads, "batch_size": _BATCH}
        flags = ("--context-length", str(_CONTEXT), "--memory", options.memory)
        home = ("--home", str(Path(folder) / "home"))
        command = drive.serve(str(first), str(second), *flags, *home, options=shape)
        async with drive.server(command) as server:
            yield Bench(server, first, second, peer, threads)


async def run(options: argparse.Namespace) -> list[Times]:
    """Measure everything."""
    settings = runtime.load_settings()
    model = runtime.store(settings.config).fetch(parse(options.model))
    times: list[Times] = []
    async with _bench(options, model) as bench:
        # Not counted: the pool learns what a load needs, and the libraries are read.
        await measure(bench, "evicted", -1)
        for number in range(options.rounds):
            for case in CASES:
                row = await measure(bench, case, number)
                times.append(row)
                print(f"  {case:9} {_ms(row.pool):>6} ms, engine {_ms(row.engine):>6}", flush=True)
    return times


def main() -> None:
    """Measure, print and keep the figures."""
    options, conditions = arguments(), report.Conditions()
    times, facts = asyncio.run(run(options)), report.machine()
    text = f"{table(times, facts, options)}{conditions}"
    print(f"\n{text}")
    record = {
        "machine": facts,
        "model": options.model,
        "threads": options.threads,
        "load_average": conditions.load,
        "goal": {"ratio": GOAL_RATIO, "added_s": GOAL_S},
        "cases": {case: verdict(times, case) for case in CASES},
        "times": [row._asdict() for row in times],
    }
    report.write("swap", text, record, options)


if __name__ == "__main__":
    main()
