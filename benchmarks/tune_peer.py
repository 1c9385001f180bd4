r"""What `headrace tune` is worth: Headrace's choice over HTTP against llama-server, in one run.

Two servers take turns, on the same model, with the same prompts, over HTTP, asked by the same raw
client in a process of its own:

- headrace: `headrace serve` with what `headrace tune MODEL` found best: for latency at one stream,
  for throughput at more; run it before, its record is read;
- peer: `llama-server`, built for this machine, with a slot for each stream.

With one stream there is a third side: the engine of that choice by itself, called in a process of
its own (xllamacpp, as in tax.py).

Prompts, lengths and rounds are those of tax.py: about 130 tokens in, of which no two begin alike,
128 out, greedily, past the end token; prefill is within the turn. A ratio is that of the two turns
of one round, and the table shows the median. The answers of Headrace's choice and of the peer's
file are compared with the reference of `headrace tune`.

The peer is not part of Headrace, and nothing of it is kept. To build it, take the source archive of
`llama-cpp-python` (`pip download --no-deps --no-binary :all: llama-cpp-python`), unpack it, and:

    cmake -S vendor/llama.cpp -B build -G Ninja -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON \
        -DBUILD_SHARED_LIBS=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF \
        -DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_APP=OFF
    ninja -C build llama-server llama-quantize

`--peer-model` is the file that the peer runs. Its kernels for Q4_1 are slow: give it the same
weights as Q8_0, by way of F16:

    build/bin/llama-quantize --allow-requantize MODEL.gguf f16.gguf F16
    build/bin/llama-quantize f16.gguf q8_0.gguf Q8_0
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import re
import socket
import statistics
import time
import urllib.error
import urllib.request
from asyncio.subprocess import DEVNULL
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import psutil

import report
import tax
from headrace import runtime
from headrace.config import Settings
from headrace.core.backend import Backend
from headrace.core.model import ModelSpec
from headrace.models.inspect import inspect
from headrace.models.reference import parse
from headrace.tune import record
from headrace.tune.agreement import Agreement, Reference
from load import Client
from serving import Server, headrace, serving

GOALS = {1: 0.9}
GOAL = 1.5
_CONTEXT = 512
_START_S = 120.0


class Choice(NamedTuple):
    """An engine with its options, and the file that it is given."""

    engine: str
    options: dict[str, Any]
    model: str


class Turn(NamedTuple):
    """One side of one round. `idle_cpu` are CPU seconds of the servers that had to wait."""

    side: str
    streams: int
    round: int
    tokens: int
    prompt_tokens: int
    seconds: float
    idle_cpu: float

    @property
    def rate(self) -> float:
        """Output tokens/s of all streams."""
        return self.tokens / self.seconds


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Headrace's choice over llama-server.")
    parser.add_argument("--peer", type=Path, required=True, help="the llama-server program")
    parser.add_argument("--peer-model", type=Path, help="its file, at best Q8_0 of the same")
    parser.add_argument("--model", default="smollm2", help="reference of a GGUF that was tuned")
    parser.add_argument("--streams", type=int, nargs="+", default=(1, 8, 32))
    parser.add_argument("--rounds", type=int, help="by default 6, 5 and 3 at 1, 8 and 32 streams")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, help="of all; default: the cores")
    parser.add_argument("--quick", action="store_true", help="one short round, for tests")
    parser.add_argument("--json", type=Path, help="write the raw figures here")
    options = parser.parse_args(argv)
    if options.quick:
        options.rounds, options.max_tokens, options.streams = 1, 16, (1, 4)
    return options


def choices(options: argparse.Namespace, settings: Settings) -> dict[int, Choice]:
    """Return what `headrace tune` found best at each number of streams."""
    path = runtime.store(settings.config).fetch(parse(options.model))
    file = inspect(path)
    found = record.load(settings.config.home, file)
    if found is None:
        raise SystemExit(f"Nothing was measured: run `headrace tune {options.model}` first.")
    chosen: dict[int, Choice] = {}
    for streams in options.streams:
        best = found.winner("latency" if streams == 1 else "throughput")
        if best is None:
            raise SystemExit("No engine agreed with the reference.")
        chosen[streams] = Choice(best.engine, best.options, str(path))
    return chosen


@contextlib.asynccontextmanager
async def peer(options: argparse.Namespace, streams: int, model: str) -> AsyncGenerator[Server]:
    """Run llama-server with a slot for each stream."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    threads = str(options.threads or tax.arguments([]).threads)
    flags = {
        "-m": str(options.peer_model or model),
        "-np": str(streams),
        "-c": str(streams * _CONTEXT),
        "-t": threads,
        "-tb": threads,
        "--cache-ram": "0",
        "--host": "127.0.0.1",
        "--port": str(port),
    }
    words = [word for pair in flags.items() for word in pair]
    process = await asyncio.create_subprocess_exec(
        str(options.peer), *words, stdout=DEVNULL, stderr=DEVNULL
    )
    try:
        await _healthy(port)
        yield Server(port, psutil.Process(process.pid))
    finally:
        process.kill()
        await process.wait()


async def _healthy(port: int) -> None:
    end = time.monotonic() + _START_S
    while time.monotonic() < end:
        with contextlib.suppress(OSError, urllib.error.URLError):
            await asyncio.to_thread(urllib.request.urlopen, f"http://127.0.0.1:{port}/health")
            return
        await asyncio.sleep(0.2)
    raise SystemExit("llama-server did not start.")


async def ask(client: Client, port: int, texts: Sequence[str], tokens: int) -> dict[str, Any]:
    """Stream all texts at once through a server."""
    fields = {
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    bodies = [{"prompt": text, **fields} for text in texts]
    await client.ask("open", host="127.0.0.1", port=port, path="/v1/completions", bodies=bodies)
    done = await client.ask("drain")
    found = [re.findall(r'"(prompt|completion)_tokens":(\d+)', tail) for tail in done["tails"]]
    usages = [dict(pairs) for pairs in found]
    if not all("[DONE]" in tail for tail in done["tails"]):
        raise SystemExit(f"A stream did not end well: {done['tails'][0]!r}")
    return {
        "seconds": done["seconds"],
        "tokens": [int(usage["completion"]) for usage in usages],
        "prompt_tokens": [int(usage["prompt"]) for usage in usages],
    }


async def rounds(options: argparse.Namespace, streams: int, choice: Choice) -> list[Turn]:
    """Let the sides take turns at one number of streams."""
    turns: list[Turn] = []
    async with contextlib.AsyncExitStack() as stack:
        flags = ("--engine", choice.engine, "--context-length", str(_CONTEXT))
        ours = await stack.enter_async_context(
            serving(headrace(choice.model, _options(options, choice), *flags))
        )
        theirs = await stack.enter_async_context(peer(options, streams, choice.model))
        servers = {"headrace": ours, "peer": theirs}
        client = await Client.start()
        stack.push_async_callback(client.stop)
        sides: dict[str, Any] = {
            "headrace": lambda texts: ask(client, ours.port, texts, options.max_tokens),
            "peer": lambda texts: ask(client, theirs.port, texts, options.max_tokens),
        }
        if streams == 1 and choice.engine == "llamacpp":
            engine = await stack.enter_async_context(tax.direct(_alone(options, choice)))
            bench = tax.Bench(ours, engine, client, options.max_tokens)
            sides["engine"] = lambda texts: tax.ask_engine(bench, texts)
        for side in sides.values():
            await side(tax.prompts(streams, -1)[:2])
        for number in range(options.rounds or tax.ROUNDS.get(streams, 3)):
            names = list(sides) if number % 2 == 0 else list(sides)[::-1]
            for name in names:
                waiting = [one for other, one in servers.items() if other != name]
                turns.append(await _turn(name, sides[name], waiting, streams, number))
                print(f"  {streams:3} streams  {name:8} {turns[-1].rate:7.1f} tok/s", flush=True)
    return turns


async def _turn(name: str, side: Any, waiting: Sequence[Server], streams: int, number: int) -> Turn:
    texts = [
        tax.prompts(streams, number * 100 + again) for again in range(tax.REPEATS.get(streams, 1))
    ]
    before = sum(one.cpu() + one.children_cpu() for one in waiting)
    answers = [await side(some) for some in texts]
    idle = sum(one.cpu() + one.children_cpu() for one in waiting) - before
    tokens = [count for answer in answers for count in answer["tokens"]]
    if len(set(tokens)) > 1:
        raise SystemExit(f"{name}: not every request wrote the same: {tokens}")
    return Turn(
        side=name,
        streams=streams,
        round=number,
        tokens=sum(tokens),
        prompt_tokens=sum(sum(answer["prompt_tokens"]) for answer in answers),
        seconds=sum(answer["seconds"] for answer in answers),
        idle_cpu=idle,
    )


def _options(options: argparse.Namespace, choice: Choice) -> dict[str, Any]:
    return choice.options | ({"threads": options.threads} if options.threads else {})


def _alone(options: argparse.Namespace, choice: Choice) -> dict[str, Any]:
    """Return what the engine by itself is given: the same as Headrace gives it."""
    return {
        "model": choice.model,
        "context_length": _CONTEXT,
        "slots": choice.options.get("slots", 4),
        "threads": options.threads or tax.arguments([]).threads,
        "batch_size": choice.options.get("batch_size", 128),
    }


async def agreements(
    options: argparse.Namespace, settings: Settings, choice: Choice
) -> dict[str, Agreement]:
    """Compare the answers of the choice, and of the peer's file, with those of the reference."""
    exact = {"kv_type": "bf16", "flash_attention": "on"}
    theirs = Choice("llamacpp", {}, str(options.peer_model or choice.model))
    async with _loaded(settings, Choice("llamacpp", exact, choice.model)) as worker:
        right = await Reference.ask(worker)
    found: dict[str, Agreement] = {}
    for side, one in (("headrace", choice), ("llama-server", theirs)):
        async with _loaded(settings, one) as worker:
            found[side] = await right.compare(worker)
    return found


@contextlib.asynccontextmanager
async def _loaded(settings: Settings, choice: Choice) -> AsyncGenerator[Backend]:
    spec = ModelSpec(
        name="x",
        model=choice.model,
        engine=choice.engine,
        context_length=1024,
        options=choice.options,
    )
    worker = runtime.open_worker(spec, settings.config)
    try:
        await worker.start()
        yield worker
    finally:
        await worker.aclose()


def ratios(turns: Sequence[Turn], streams: int, one: str, other: str) -> list[float]:
    """Return the rate of one side over another's, for each round."""
    rates = {(turn.side, turn.round): turn.rate for turn in turns if turn.streams == streams}
    numbers = sorted({number for side, number in rates if side == other})
    return [rates[one, number] / rates[other, number] for number in numbers]


def table(
    turns: Sequence[Turn],
    chosen: dict[int, Choice],
    agreed: dict[str, Agreement],
    options: argparse.Namespace,
) -> str:
    """Return the figures to be read."""
    lines = [
        "Output tokens/s over HTTP: Headrace's choice and llama-server, in one interleaved run",
        report.describe(report.machine()),
        f"{options.model}; llama-server has {(options.peer_model or Path(options.model)).name}",
        "",
        "streams  headrace  llama-server  ratio (least-most)     choice",
    ]
    for streams, choice in chosen.items():
        rate = {
            side: statistics.median(
                one.rate for one in turns if (one.side, one.streams) == (side, streams)
            )
            for side in ("headrace", "peer")
        }
        words = " ".join(
            [choice.engine, *(f"{key}={value}" for key, value in choice.options.items())]
        )
        lines.append(
            f"{streams:7}  {rate['headrace']:8.1f}  {rate['peer']:12.1f}"
            f"  {report.spread(ratios(turns, streams, 'headrace', 'peer')):21}  {words}"
        )
    lines.append("")
    if alone := ratios(turns, 1, "headrace", "engine"):
        lines.append(
            f"One stream over the engine by itself: {report.spread(alone)}; goal {GOALS[1]}."
        )
    lines.append(f"Goal over llama-server with several streams: {GOAL}.")
    for side, found in agreed.items():
        off = "-" if found.distance is None else f"{found.distance:.3f}"
        lines.append(
            f"Agreement of {side} with the reference: {found.forced:.1%} of {found.compared} next "
            f"tokens, log-probabilities off by {off}, {found.greedy:.0%} of an answer up to the "
            "first other token."
        )
    idle = max(one.idle_cpu / one.seconds for one in turns)
    lines.append(
        f"Servers that waited used at most {idle:.1%} of a core. Load {report.load_average()}."
    )
    return "\n".join(lines)


async def run(
    options: argparse.Namespace, settings: Settings, chosen: dict[int, Choice]
) -> tuple[list[Turn], dict[str, Agreement]]:
    """Measure everything."""
    turns: list[Turn] = []
    for streams, choice in chosen.items():
        turns += await rounds(options, streams, choice)
    return turns, await agreements(options, settings, chosen[max(chosen)])


def main() -> None:
    """Measure, print and keep the figures."""
    options = arguments()
    settings = runtime.load_settings(flags={"log_level": "warning"})
    chosen = choices(options, settings)
    turns, agreed = asyncio.run(run(options, settings, chosen))
    text = table(turns, chosen, agreed, options)
    print(f"\n{text}")
    kept = {
        "machine": report.machine(),
        "model": options.model,
        "goals": {"1": GOALS[1], "more": GOAL},
        "choices": {
            streams: choice._replace(model=Path(choice.model).name)._asdict()
            for streams, choice in chosen.items()
        },
        "agreement": msgspec.to_builtins(agreed),
        "turns": [one._asdict() for one in turns],
    }
    if options.json is not None or not options.quick:
        report.write("tune-peer", text, kept, options.json)


if __name__ == "__main__":
    main()
