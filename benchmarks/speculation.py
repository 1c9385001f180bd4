"""Output tokens/s with speculation over without, on three kinds of text, and whether texts agree.

Each engine loads the model once for each way of drafting (`off`, `ngram`, and `draft` with
`--draft`), in a process of its own, and all stay loaded. In each round every way answers the same
requests, greedily; every other round is reversed, so that a busy moment affects all. A ratio is
that of the two turns of one round; the table has the median, the least and the most. Texts are:

- code: a program that is to be printed with one name changed, twice as long as its answer;
- extraction: a text whose sentences are to be repeated;
- prose: a story, which repeats nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import statistics
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import report
from headrace import engines, runtime
from headrace.core.backend import Backend
from headrace.core.metrics import Usage
from headrace.core.request import GenerateRequest, Message
from headrace.core.sampling import Sampling
from headrace.core.stream import collect
from headrace.lab import drive, figures

_NAMES = ("add", "subtract", "multiply", "divide", "power", "remainder")
_PROGRAM = "\n\n".join(
    f"def {name}(first, second):\n    result = calculate('{name}', first, second)\n"
    f"    log('{name}', result)\n    return result"
    for name in _NAMES
)
_REPORT = (
    "The river runs from the hills to the sea, past mills and towns. It is slow and brown in "
    "summer, and fast and cold in spring. Two bridges cross it, one of stone and one of iron."
)
TEXTS = {
    "code": f"Rename result to value, and print the whole program:\n\n{_PROGRAM}",
    "extraction": f"Repeat each sentence of this text, word for word:\n\n{_REPORT}",
    "prose": "Write a short story about a miller and a river.",
}


class Turn(NamedTuple):
    """One answer of all streams: its texts, its tokens and its time."""

    texts: tuple[str, ...]
    usage: Usage
    seconds: float

    @property
    def rate(self) -> float:
        """Output tokens/s of all streams."""
        return self.usage.completion_tokens / self.seconds


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = report.parser("Tokens/s with speculation over without.")
    parser.add_argument("--model", default="smollm2", help="reference of the model")
    parser.add_argument("--draft", help="reference of a draft model, to be measured too")
    parser.add_argument("--engines", nargs="+", default=["llamacpp", "llama_server"])
    parser.add_argument("--streams", type=int, nargs="+", default=[1])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--max-tokens", type=int, default=160)
    parser.add_argument("--draft-tokens", type=int)
    parser.add_argument("--threads", type=int)
    kinds = ("file", "q8_0")
    parser.add_argument("--weights", nargs="+", choices=kinds, default=["file"], help="weight_type")
    options = parser.parse_args(argv)
    if options.quick:
        options.rounds, options.max_tokens = 1, 24
    return options


async def ask(backend: Backend, text: str, streams: int, tokens: int) -> Turn:
    """Answer a text in several streams at once."""
    sampling = Sampling(temperature=0, max_tokens=tokens)
    request = GenerateRequest(messages=(Message("user", text),), sampling=sampling)
    began = time.monotonic()
    results = await asyncio.gather(*(collect(backend.ask(request)) for _ in range(streams)))
    seconds = time.monotonic() - began
    usage = Usage.merged([result.usage for result in results])
    return Turn(tuple(result.text for result in results), usage, seconds)


def ways(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Return the options of each way of drafting, for each type of weights."""
    common = {"draft_tokens": options.draft_tokens} if options.draft_tokens else {}
    common |= {"threads": options.threads} if options.threads else {}
    made: dict[str, dict[str, Any]] = {}
    for kind in options.weights:
        end = "" if kind == "file" else f" {kind}"
        own = {**common, "weight_type": kind} if end else common
        made |= {f"off{end}": own, f"ngram{end}": {**own, "speculation": "ngram"}}
        if options.draft:
            drafted = {"speculation": "draft", "draft_model": options.draft}
            made[f"draft{end}"] = {**own, **drafted}
    return made


async def measure(engine: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row for each text, number of streams and way of drafting."""
    settings = runtime.load_settings()
    async with contextlib.AsyncExitStack() as held:
        loaded: dict[str, Backend] = {}
        for way, given in ways(options).items():
            fields = {"engine": engine, "context_length": 1024, "max_running": 4}
            spec = settings.model_spec(options.model, {**fields, "options": given})
            loaded[way] = await held.enter_async_context(drive.model(spec, settings, "process"))
        rows: list[dict[str, Any]] = []
        for kind, text in TEXTS.items():
            for streams in options.streams:
                turns = await rounds(loaded, text, streams, options)
                rows += [row(engine, kind, streams, way, turns) for way in loaded]
        return rows


async def rounds(
    loaded: dict[str, Backend], text: str, streams: int, options: argparse.Namespace
) -> dict[str, list[Turn]]:
    """Let all ways answer in turns, after one answer that is not counted."""
    turns: dict[str, list[Turn]] = {way: [] for way in loaded}
    for number in range(options.rounds + 1):
        for way in list(loaded)[:: -1 if number % 2 else 1]:
            turn = await ask(loaded[way], text, streams, options.max_tokens)
            if number:
                turns[way].append(turn)
    return turns


def row(
    engine: str, kind: str, streams: int, way: str, turns: dict[str, list[Turn]]
) -> dict[str, Any]:
    """Return the figures of one way on one kind of text."""
    # With the same weights.
    own, plain = turns[way], turns[" ".join(["off", *way.split()[1:]])]
    rate = statistics.median(turn.rate for turn in own)
    ratios = [turn.rate / base.rate for turn, base in zip(own, plain, strict=True)]
    usage = Usage.merged([turn.usage for turn in own])
    return {
        "engine": engine,
        "text": kind,
        "streams": streams,
        "way": way,
        "tokens_per_s": round(rate, 1),
        "ratio": figures.spread(ratios),
        "drafted": usage.drafted_tokens,
        "accepted": usage.accepted_tokens,
        "same_text": all(turn.texts == plain[0].texts for turn in own),
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the rows as a table in Markdown."""
    head = list(rows[0])
    lines = [head, ["---"] * len(head), *([str(row[name]) for name in head] for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


async def measured(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure all engines that are installed, one after the other."""
    rows: list[dict[str, Any]] = []
    for engine in options.engines:
        if engines.status(engine).available:
            rows += await measure(engine, options)
    return rows


def main(options: argparse.Namespace) -> None:
    """Measure, print the table, and keep the figures."""
    conditions = report.Conditions()
    rows = asyncio.run(measured(options))
    facts = report.machine()
    text = f"{report.describe(facts)}\n\n{table(rows)}\n\n{conditions}"
    print(text)
    report.write("speculation", text, {"machine": facts, "rows": rows}, options)


if __name__ == "__main__":
    main(arguments())
