r"""What `headrace tune` is worth: Headrace's choice over HTTP against llama-server, in one run.

Two servers take turns, on the same model, with the same prompts, over HTTP, asked by the same raw
client in a process of its own:

- headrace: `headrace serve` with what `headrace tune MODEL` found best: for latency at one stream,
  for throughput at more; run it before, its record is read;
- peer: `llama-server`, built for this machine, with a slot for each stream.

With one stream there are more sides: each engine that agreed with the reference, by itself, with
its own best options for one stream, called in a process of its own (tax_engine.py for llamacpp,
tune_engine.py for openvino). The fastest of them is what Headrace's rate is divided by. This part
needs no llama-server: leave `--peer` out, and it runs alone.

Prompts, lengths and rounds are those of tax.py: about 130 tokens in, of which no two begin alike,
128 out, greedily, past the end token; prefill is within the turn. A ratio is that of the two turns
of one round, and the table shows the median. The answers of Headrace's choice and of the peer's
file are compared with the reference of `headrace tune`.

llama_server.py tells how the peer is built.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import re
import statistics
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

import llama_server
import report
import tax
from headrace import runtime
from headrace.config import Settings
from headrace.core.backend import Backend
from headrace.core.model import ModelSpec
from headrace.engines import openvino
from headrace.models.inspect import inspect
from headrace.models.reference import parse
from headrace.engines import measured as record
from headrace.lab.tune.agreement import Agreement, Reference
from load import Client
from serving import Server, headrace, serving

GOALS = {1: 0.9}
GOAL = 1.5
OWN = {"llamacpp": "tax_engine.py", "openvino": "tune_engine.py"}
"""The program that runs an engine by itself."""
_CONTEXT = 512


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
    parser.add_argument("--peer", type=Path, help="the llama-server program")
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
    if options.peer is None:
        options.streams = (1,)
    return options


class Found(NamedTuple):
    """What `headrace tune` found: the choice for each number of streams, and each engine's best."""

    chosen: dict[int, Choice]
    alone: dict[str, Choice]


def choices(options: argparse.Namespace, settings: Settings) -> Found:
    """Return what `headrace tune` found best."""
    path = runtime.store(settings.config).fetch(parse(options.model))
    file, home = inspect(path), settings.config.home
    found = record.load(home, file)
    if found is None:
        raise SystemExit(f"Nothing was measured: run `headrace tune {options.model}` first.")
    chosen: dict[int, Choice] = {}
    for streams in options.streams:
        best = found.winner("latency" if streams == 1 else "throughput")
        if best is None:
            raise SystemExit("No engine agreed with the reference.")
        chosen[streams] = Choice(best.engine, best.options, str(path))
    paths = {"llamacpp": str(path), "openvino": openvino.prepared(file, home).path}
    right = sorted((one for one in found.trials if not one.fault), key=lambda one: one.rate(1))
    able = [one for one in right if one.engine in paths and one.rate(1)]
    # The last one of an engine is its fastest.
    return Found(
        chosen, {one.engine: Choice(one.engine, one.options, paths[one.engine]) for one in able}
    )


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


async def rounds(
    options: argparse.Namespace, streams: int, choice: Choice, alone: dict[str, Choice]
) -> list[Turn]:
    """Let the sides take turns at one number of streams."""
    turns: list[Turn] = []
    async with contextlib.AsyncExitStack() as stack:
        flags = ("--engine", choice.engine, "--context-length", str(_CONTEXT))
        ours = await stack.enter_async_context(
            serving(headrace(choice.model, _options(options, choice), *flags))
        )
        servers, most = {"headrace": ours}, options.max_tokens
        if options.peer is not None:
            threads = options.threads or tax.arguments([]).threads
            model = str(options.peer_model or choice.model)
            theirs = llama_server.run(options.peer, model, streams, threads, _CONTEXT)
            servers["peer"] = await stack.enter_async_context(theirs)
        client = await Client.start()
        stack.push_async_callback(client.stop)
        sides: dict[str, Any] = {
            name: lambda texts, port=server.port: ask(client, port, texts, most)
            for name, server in servers.items()
        }
        for name, one in alone.items() if streams == 1 else ():
            engine = await stack.enter_async_context(tax.direct(_alone(options, one), OWN[name]))
            sides[name] = lambda texts, engine=engine: tax.say(engine, texts, most)
        for side in sides.values():
            await side(tax.prompts(streams, -1)[:2])
        for number in range(options.rounds or tax.ROUNDS.get(streams, 3)):
            # Each begins now and then, so that none is always after the same.
            names = list(sides)[number % len(sides) :] + list(sides)[: number % len(sides)]
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
    # Its default in Headrace on a CPU, or what the trial had.
    batch = {"llamacpp": 128}.get(choice.engine, 256)
    given = {"slots": 4, "threads": tax.arguments([]).threads, "batch_size": batch}
    given |= _options(options, choice)
    return given | {"model": choice.model, "context_length": _CONTEXT}


async def agreements(
    options: argparse.Namespace, settings: Settings, found: Found
) -> dict[str, Agreement]:
    """Compare the answers of all who were asked with those of the reference."""
    choice = found.chosen[max(found.chosen)]
    exact = {"kv_type": "bf16", "flash_attention": "on"}
    asked = {"headrace": choice}
    if 1 in found.chosen:
        asked |= {
            f"{name} alone": one._replace(model=choice.model) for name, one in found.alone.items()
        }
    if options.peer is not None:
        asked["llama-server"] = Choice("llamacpp", {}, str(options.peer_model or choice.model))
    async with _loaded(settings, Choice("llamacpp", exact, choice.model)) as worker:
        right = await Reference.ask(worker)
    agreed: dict[str, Agreement] = {}
    for side, one in asked.items():
        async with _loaded(settings, one) as worker:
            agreed[side] = await right.compare(worker)
    return agreed


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
    found: Found,
    agreed: dict[str, Agreement],
    options: argparse.Namespace,
) -> str:
    """Return the figures to be read."""
    theirs = f"; llama-server has {options.peer_model.name}" if options.peer_model else ""
    lines = [
        "Output tokens/s over HTTP of Headrace's choice beside others, in one interleaved run",
        report.describe(report.machine()),
        options.model + theirs,
        "",
        "streams  headrace  beside it  ratio (least-most)     who",
    ]
    for streams, choice in found.chosen.items():
        ours = _median(turns, streams, "headrace")
        lines.append(f"{streams:7}  {ours:8.1f}{'':35}headrace, {_words(choice)}")
        others = dict.fromkeys(one.side for one in turns if one.streams == streams)
        for side in [one for one in others if one != "headrace"]:
            who = "llama-server" if side == "peer" else f"alone: {_words(found.alone[side])}"
            lines.append(
                f"{streams:7}{'':10}  {_median(turns, streams, side):9.1f}"
                f"  {report.spread(ratios(turns, streams, 'headrace', side)):21}  {who}"
            )
    lines.append("")
    if 1 in found.chosen:
        best = max(found.alone, key=lambda side: _median(turns, 1, side))
        over = report.spread(ratios(turns, 1, "headrace", best))
        lines.append(f"One stream over the best engine by itself, {best}: {over}; goal {GOALS[1]}.")
    if max(found.chosen) > 1:
        lines.append(f"Goal over llama-server with several streams: {GOAL}.")
    for side, one in agreed.items():
        off = "-" if one.distance is None else f"{one.distance:.3f}"
        lines.append(
            f"Agreement of {side} with the reference: {one.forced:.1%} of {one.compared} next "
            f"tokens, log-probabilities off by {off}, {one.greedy:.0%} of an answer up to the "
            "first other token."
        )
    idle = max(one.idle_cpu / one.seconds for one in turns)
    lines.append(
        f"Servers that waited used at most {idle:.1%} of a core. Load {report.load_average()}."
    )
    return "\n".join(lines)


def _median(turns: Sequence[Turn], streams: int, side: str) -> float:
    return statistics.median(
        one.rate for one in turns if (one.side, one.streams) == (side, streams)
    )


def _words(choice: Choice) -> str:
    return " ".join([choice.engine, *(f"{key}={value}" for key, value in choice.options.items())])


async def run(
    options: argparse.Namespace, settings: Settings, found: Found
) -> tuple[list[Turn], dict[str, Agreement]]:
    """Measure everything."""
    turns: list[Turn] = []
    for streams, choice in found.chosen.items():
        turns += await rounds(options, streams, choice, found.alone)
    return turns, await agreements(options, settings, found)


def main() -> None:
    """Measure, print and keep the figures."""
    options = arguments()
    settings = runtime.load_settings(flags={"log_level": "warning"})
    found = choices(options, settings)
    turns, agreed = asyncio.run(run(options, settings, found))
    text = table(turns, found, agreed, options)
    print(f"\n{text}")
    sides = {str(streams): one for streams, one in found.chosen.items()}
    sides |= {f"{name} alone": one for name, one in found.alone.items()}
    kept = {
        "machine": report.machine(),
        "model": options.model,
        "goals": {"1": GOALS[1], "more": GOAL},
        "choices": {
            side: one._replace(model=Path(one.model).name)._asdict() for side, one in sides.items()
        },
        "agreement": msgspec.to_builtins(agreed),
        "turns": [one._asdict() for one in turns],
    }
    if options.json is not None or not options.quick:
        name = "tune-one" if max(options.streams) == 1 else "tune-peer"
        report.write(name, text, kept, options.json)


if __name__ == "__main__":
    main()
