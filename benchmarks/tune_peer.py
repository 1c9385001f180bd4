r"""The choice of `headrace tune`, served over HTTP, against llama-server, in one run.

Two servers take turns, on the same model, with the same prompts, over HTTP, with the same raw
client in a process of its own:

- headrace: `headrace serve` with what `headrace tune MODEL` found best: for latency at one stream,
  for throughput at more; it must have run before, as its record is read;
- peer: `llama-server`, built for this machine, with a slot for each stream.

With one stream there are more sides: each engine that gave no other answers than the reference, by
itself, with its own best options for one stream, called in a process of its own (tax_engine.py for
llamacpp, tune_engine.py for openvino). The fastest of them is what Headrace's rate is divided by.
This part needs no llama-server: leave `--peer` out, and it runs alone.

Prompts, lengths and rounds are those of tax.py: about 130 tokens in, of which no two begin alike,
128 out, greedily, ignoring the end token; prefill is within the turn. A ratio is that of the two
turns of one round, and the table shows the median. The answers of Headrace's choice and of the
peer's file are compared with the reference of `headrace tune`.

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
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

import report
import tax
from headrace import engines, runtime
from headrace.config import Settings
from headrace.core.model import ModelSpec
from headrace.engines import measured
from headrace.engines.measured import Agreement
from headrace.lab import drive, figures, load
from headrace.lab.tune.agreement import Reference
from headrace.models.inspect import inspect
from headrace.models.reference import parse
from tax import Turn

GOALS = {1: 0.9}
GOAL = 1.5
OWN = {"llamacpp": "tax_engine.py", "openvino": "tune_engine.py"}
"""The program that runs an engine by itself."""
_CONTEXT = 512
_START_S = 120.0


class Choice(NamedTuple):
    """An engine with its options, and the file that it loads."""

    engine: str
    options: dict[str, Any]
    model: str


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = report.parser("Headrace's choice over llama-server.")
    parser.add_argument("--peer", type=Path, help="the llama-server program")
    parser.add_argument("--peer-model", type=Path, help="its file, at best Q8_0 of the same")
    parser.add_argument("--model", default="smollm2", help="reference of a GGUF that was tuned")
    parser.add_argument("--streams", type=int, nargs="+", default=(1, 8, 32))
    parser.add_argument("--rounds", type=int, help="by default 6, 5 and 3 at 1, 8 and 32 streams")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, help="of all; default: the cores")
    options = parser.parse_args(argv)
    if options.quick:
        options.rounds, options.max_tokens, options.streams = 1, 16, (1, 4)
    if options.peer is None:
        options.streams = (1,)
    return options


class Tuned(NamedTuple):
    """The results of `headrace tune`: the choice for each number of streams, each engine's best."""

    chosen: dict[int, Choice]
    alone: dict[str, Choice]


def choices(options: argparse.Namespace, settings: Settings) -> Tuned:
    """Return what `headrace tune` measured as best."""
    path = runtime.store(settings.config).fetch(parse(options.model))
    file, home = inspect(path), settings.config.home
    record = measured.load(home, file)
    if record is None:
        raise SystemExit(f"Nothing was measured: run `headrace tune {options.model}` first.")
    chosen: dict[int, Choice] = {}
    for streams in options.streams:
        best = record.winner("latency" if streams == 1 else "throughput")
        if best is None:
            raise SystemExit("No engine agreed with the reference.")
        chosen[streams] = Choice(best.engine, best.options, str(path))
    sound = sorted(
        (trial for trial in record.trials if not trial.fault), key=lambda trial: trial.rate(1)
    )
    # The last one of an engine is its fastest.
    alone = {
        trial.engine: Choice(
            trial.engine,
            trial.options,
            engines.prepared(trial.engine, file, home, trial.options).path,
        )
        for trial in sound
        if trial.engine in OWN and trial.rate(1)
    }
    return Tuned(chosen, alone)


def peer(options: argparse.Namespace, streams: int, choice: Choice, url: str) -> list[str]:
    """Return the command of a llama-server with a slot for each stream."""
    threads = str(options.threads or tax.cores())
    flags = {
        "-m": str(options.peer_model or choice.model),
        "-np": str(streams),
        "-c": str(streams * _CONTEXT),
        "-t": threads,
        "-tb": threads,
        "--cache-ram": "0",
        "--host": "127.0.0.1",
        "--port": url.rpartition(":")[2],
    }
    return [str(options.peer), *(word for pair in flags.items() for word in pair)]


async def rounds(
    options: argparse.Namespace, streams: int, choice: Choice, alone: dict[str, Choice]
) -> list[Turn]:
    """Let the sides take turns at one number of streams."""
    flags, most = ("--engine", choice.engine, "--context-length", str(_CONTEXT)), options.max_tokens
    async with contextlib.AsyncExitStack() as stack:
        start = stack.enter_async_context
        client = await start(drive.program(load.command()))
        command = drive.serve(choice.model, *flags, options=_options(options, choice))
        ours = await start(drive.server(command))
        sides = [tax.over_http("headrace", ours, client, most)]
        if options.peer is not None:
            url = f"http://127.0.0.1:{drive.free_port()}"
            command = peer(options, streams, choice, url)
            run = drive.server(command, url=url, ready="/health", start_s=_START_S)
            sides.append(tax.over_http("peer", await start(run), client, most))
        for name, other in alone.items() if streams == 1 else ():
            settings = _alone(options, other)
            sides.append(await tax.by_itself(name, stack, settings, OWN[name], most))
        return await tax.take_turns(sides, client, streams, options.rounds)


def _options(options: argparse.Namespace, choice: Choice) -> dict[str, Any]:
    return choice.options | ({"threads": options.threads} if options.threads else {})


def _alone(options: argparse.Namespace, choice: Choice) -> dict[str, Any]:
    """Return the settings of an engine by itself: those that Headrace gives it."""
    # Its default in Headrace on a CPU, or what the trial had.
    batch = {"llamacpp": 128}.get(choice.engine, 256)
    given = {"slots": 4, "threads": tax.cores(), "batch_size": batch}
    given |= _options(options, choice)
    return given | {"model": choice.model, "context_length": _CONTEXT}


async def agreements(
    options: argparse.Namespace, settings: Settings, tuned: Tuned
) -> dict[str, Agreement]:
    """Compare the answers of all sides with those of the reference."""
    choice = tuned.chosen[max(tuned.chosen)]
    exact = {"kv_type": "bf16", "flash_attention": "on"}
    sides = {"headrace": choice}
    if 1 in tuned.chosen:
        sides |= {
            f"{name} alone": own._replace(model=choice.model) for name, own in tuned.alone.items()
        }
    if options.peer is not None:
        sides["llama-server"] = Choice("llamacpp", {}, str(options.peer_model or choice.model))
    async with drive.model(_spec(Choice("llamacpp", exact, choice.model)), settings) as worker:
        right = await Reference.ask(worker)
    agreed: dict[str, Agreement] = {}
    for side, choice in sides.items():
        async with drive.model(_spec(choice), settings) as worker:
            agreed[side] = await right.compare(worker)
    return agreed


def _spec(choice: Choice) -> ModelSpec:
    return ModelSpec(
        name="x",
        model=choice.model,
        engine=choice.engine,
        context_length=1024,
        options=choice.options,
    )


def table(
    turns: Sequence[Turn],
    tuned: Tuned,
    agreed: dict[str, Agreement],
    options: argparse.Namespace,
) -> str:
    """Return the table of the figures."""
    theirs = f"; llama-server has {options.peer_model.name}" if options.peer_model else ""
    lines = [
        "Output tokens/s over HTTP of Headrace's choice beside others, in one interleaved run",
        report.describe(report.machine()),
        options.model + theirs,
        "",
        "streams  headrace  beside it  ratio (least-most)     side",
    ]
    for streams, choice in tuned.chosen.items():
        ours = tax.rate(turns, streams, "headrace")
        lines.append(f"{streams:7}  {ours:8.1f}{'':35}headrace, {_words(choice)}")
        others = dict.fromkeys(turn.side for turn in turns if turn.streams == streams)
        for side in [name for name in others if name != "headrace"]:
            label = "llama-server" if side == "peer" else f"alone: {_words(tuned.alone[side])}"
            lines.append(
                f"{streams:7}{'':10}  {tax.rate(turns, streams, side):9.1f}"
                f"  {figures.spread(tax.ratios(turns, streams, 'headrace', side)):21}  {label}"
            )
    lines.append("")
    if 1 in tuned.chosen:
        best = max(tuned.alone, key=lambda side: tax.rate(turns, 1, side))
        over = figures.spread(tax.ratios(turns, 1, "headrace", best))
        lines.append(f"One stream over the best engine by itself, {best}: {over}; goal {GOALS[1]}.")
    if max(tuned.chosen) > 1:
        lines.append(f"Goal over llama-server with several streams: {GOAL}.")
    for side, agreement in agreed.items():
        off = "-" if agreement.distance is None else f"{agreement.distance:.3f}"
        lines.append(
            f"Agreement of {side} with the reference: {agreement.forced:.1%} of "
            f"{agreement.compared} next tokens, log-probabilities off by {off}, "
            f"{agreement.greedy:.0%} of an answer up to the first other token."
        )
    idle = max(turn.idle_cpu / turn.seconds for turn in turns)
    lines.append(
        f"Sides that waited used at most {idle:.1%} of a core. Load {report.load_average()}."
    )
    return "\n".join(lines)


def _words(choice: Choice) -> str:
    return " ".join([choice.engine, *(f"{key}={value}" for key, value in choice.options.items())])


async def run(
    options: argparse.Namespace, settings: Settings, tuned: Tuned
) -> tuple[list[Turn], dict[str, Agreement]]:
    """Measure everything."""
    turns: list[Turn] = []
    for streams, choice in tuned.chosen.items():
        turns += await rounds(options, streams, choice, tuned.alone)
    return turns, await agreements(options, settings, tuned)


def main() -> None:
    """Measure, print and keep the figures."""
    options = arguments()
    settings = runtime.load_settings(flags={"log_level": "warning"})
    tuned = choices(options, settings)
    turns, agreed = asyncio.run(run(options, settings, tuned))
    text = table(turns, tuned, agreed, options)
    print(f"\n{text}")
    sides = {str(streams): choice for streams, choice in tuned.chosen.items()}
    sides |= {f"{name} alone": choice for name, choice in tuned.alone.items()}
    kept = {
        "machine": report.machine(),
        "model": options.model,
        "goals": {"1": GOALS[1], "more": GOAL},
        "choices": {
            side: choice._replace(model=Path(choice.model).name)._asdict()
            for side, choice in sides.items()
        },
        "agreement": msgspec.to_builtins(agreed),
        "turns": [turn._asdict() for turn in turns],
    }
    name = "tune-one" if max(options.streams) == 1 else "tune-peer"
    report.write(name, text, kept, options)


if __name__ == "__main__":
    main()
