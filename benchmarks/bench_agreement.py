r"""`headrace bench` compared with an independent load client, guidellm, in turns.

One server at a time, three cases; in each round both clients send prompts of 128 words, none twice,
for answers of 32 to 96 tokens (the end token is ignored), with the same concurrency:

- `echo`: an engine that answers at a set pace (2,000 tokens/s of prompt, 50 tokens/s of answer for
  each of 8), so that what is compared is how the clients measure;
- `model, 1` and `model, 2`: SmolLM2 by llamacpp with one thread, so that on a machine of two cores
  the clients do not take the model's own.

Every other round begins with the other client. A ratio is that of one round, headrace bench /
guidellm; the table has the median, the least and the most. The goal is that the medians are within
5 %. Below it is each client's mean over the server's own, of the same requests: a client that takes
cores from the model makes it slower, and reports that correctly. So each has its own cores, and the
lengths of the answers differ, or chance would decide whether two streams begin together for a whole
round. guidellm needs an environment of its own:

    python -m venv guide && guide/bin/pip install torch==2.13.0 guidellm==0.8.1

`--guidellm` is its program, `--tokenizer` a folder with the tokenizer of SmolLM2 in Hugging Face's
form (`python tests/models_made.py smollm2 MODEL.gguf FOLDER` makes one).
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import statistics
import sys
import tempfile
from asyncio.subprocess import PIPE, STDOUT
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from prometheus_client.parser import text_string_to_metric_families

import report
from headrace.lab import drive, figures
from headrace.lab.bench.prompts import Vocabulary, synthetic, vocabulary
from headrace.lab.bench.settings import Load, Settings
from headrace.lab.drive import Server
from headrace.lab.http import Http

_TOKENS = (32, 96)
_PATIENCE_S = 300.0
_NAMES = {
    "tokens_per_s": "output tokens/s",
    "ttft_ms_mean": "TTFT, mean",
    "ttft_ms_p50": "TTFT, median",
    "inter_token_ms_mean": "inter-token, mean",
    "inter_token_ms_p50": "inter-token, median",
}

_SERVERS = {
    "ttft_ms_mean": "gen_ai_server_time_to_first_token_seconds",
    "inter_token_ms_mean": "gen_ai_server_time_per_output_token_seconds",
}


class Case(NamedTuple):
    """A server, and the load on it."""

    name: str
    model: str
    options: dict[str, object]
    streams: int
    requests: int
    flags: tuple[str, ...] = ("--engine", "llamacpp")


CASES = (
    Case("echo", "echo", {"tokens_per_second": 50, "prefill_tokens_per_second": 2000}, 8, 48, ()),
    Case("model, 1", "smollm2", {"threads": 1}, 1, 10),
    Case("model, 2", "smollm2", {"threads": 1}, 2, 24),
)


async def ours(case: Case, server: Server, file: Path, folder: Path) -> dict[str, float]:
    """Return the figures of `headrace bench`."""
    record = folder / "ours.json"
    await _finish(
        *(sys.executable, "-m", "headrace", "bench", "--prompts", str(file)),
        *("--url", server.url, "--concurrency", str(case.streams)),
        *("--requests", str(case.requests)),
        # As guidellm does it: no warm-up, and no greedy sampling.
        *("--warm-up", "0", "--temperature", "1"),
        *("--output", str(record)),
    )
    level = json.loads(record.read_text())["levels"][0]
    assert level["ok"] == case.requests, level["errors"]
    assert not level["short"], "an answer was shorter"
    return {
        "tokens_per_s": level["output_tokens_per_s"],
        "ttft_ms_mean": level["ttft_ms"]["mean"],
        "ttft_ms_p50": level["ttft_ms"]["p50"],
        "inter_token_ms_mean": level["inter_token_ms"]["mean"],
        "inter_token_ms_p50": level["inter_token_ms"]["p50"],
        "server_ttft_ms_mean": level["server"]["time_to_first_token_ms"]["mean"],
        "server_inter_token_ms_mean": level["server"]["time_per_output_token_ms"]["mean"],
    }


async def theirs(
    case: Case, server: Server, file: Path, folder: Path, program: str, tokenizer: Path
) -> dict[str, float]:
    """Return the figures of guidellm."""
    http = server.http()
    target, before = server.url, await totals(http)
    await _finish(
        *(program, "run", "--disable-console"),
        *("--backend", f"kind=openai_http,target={target},model={case.model}"),
        *("--profile", f"kind=concurrent,streams={case.streams}"),
        *("--constraint", f"kind=max_requests,count={case.requests}"),
        *("--tokenizer", f"kind=huggingface_auto,model={tokenizer}"),
        *("--data", f"kind=json_file,path={file}"),
        *("--output", f"kind=json,path={folder / 'theirs.json'}"),
    )
    results = json.loads((folder / "theirs.json").read_text())["benchmarks"][0]
    metrics = results["metrics"]
    total = metrics["request_totals"]
    tokens = metrics["output_token_count"]["successful"]["total_sum"]
    # It may stop one request short of the configured number.
    assert case.requests >= total["successful"] == total["total"] >= case.requests - 1, total
    after = await totals(http)
    http.close()
    seconds = {
        f"server_{key}": (after[name][1] - before[name][1]) / (after[name][0] - before[name][0])
        for key, name in _SERVERS.items()
    }
    first = metrics["time_to_first_token_ms"]["successful"]
    between = metrics["inter_token_latency_ms"]["successful"]
    return {
        "tokens_per_s": tokens / results["duration"],
        "ttft_ms_mean": first["mean"],
        "ttft_ms_p50": first["median"],
        "inter_token_ms_mean": between["mean"],
        "inter_token_ms_p50": between["median"],
        **{key: 1000 * value for key, value in seconds.items()},
    }


async def measure(case: Case, rounds: int, program: str, tokenizer: Path) -> list[dict[str, Any]]:
    """Run both clients on one server, in turns."""
    turns: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cores = sorted(os.sched_getaffinity(0))
        half = len(cores) // 2
        # Each has its own cores, so that a client takes no CPU time from the model.
        os.sched_setaffinity(0, cores[:half])
        command = drive.serve(case.model, *case.flags, options=case.options)
        async with drive.server(command) as server:
            os.sched_setaffinity(0, cores[half:])
            # The first answer takes longer.
            body = {"model": case.model, "prompt": "one", "max_tokens": 2}
            await server.http().fetch("/v1/completions", body)
            for number in range(rounds):
                turn: dict[str, Any] = {}
                for client in ("ours", "theirs")[:: 1 if number % 2 else -1]:
                    file = folder / f"{number}-{client}.jsonl"
                    await _write(case, file, f"{case.name}/{number}", client)
                    turn[client] = await (
                        ours(case, server, file, folder)
                        if client == "ours"
                        else theirs(case, server, file, folder, program, tokenizer)
                    )
                turns.append(turn)
                print(case.name, number, json.dumps(turn), file=sys.stderr, flush=True)
    os.sched_setaffinity(0, cores)
    return turns


async def totals(http: Http) -> dict[str, list[float]]:
    """Return the count and the sum, in seconds, of the server's own figures."""
    _, answer = await http.fetch("/metrics")
    families = text_string_to_metric_families(answer.decode())
    samples = [sample for family in families for sample in family.samples]
    return {
        name: [
            sum(sample.value for sample in samples if sample.name == f"{name}_{part}")
            for part in ("count", "sum")
        ]
        for name in _SERVERS.values()
    }


async def _write(case: Case, file: Path, seed: str, client: str) -> None:
    """Write prompts that were not sent before, as those are cached; a word counts as a token.

    The lengths of the answers are the same for both.
    """

    async def uncounted(text: str) -> None:
        return None

    words: Vocabulary = await vocabulary(uncounted)
    settings = Settings(model=case.model, loads=(Load("closed", case.streams),))
    asks = itertools.islice(synthetic(settings, words, f"{seed}/{client}"), case.requests)
    source = random.Random(seed)
    lengths = (source.randint(*_TOKENS) for _ in range(case.requests))
    lines = [
        json.dumps({"prompt": ask.content, "max_tokens": length, "output_tokens_count": length})
        for ask, length in zip(asks, lengths, strict=True)
    ]
    await asyncio.to_thread(file.write_text, "\n".join(lines) + "\n")


async def _finish(*command: str) -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    process = await asyncio.create_subprocess_exec(
        *command, stdout=PIPE, stderr=STDOUT, env=environment
    )
    async with asyncio.timeout(_PATIENCE_S):
        output, _ = await process.communicate()
    assert process.returncode == 0, output.decode()[-2000:]


def _table(cases: dict[str, list[dict[str, Any]]], facts: dict[str, Any]) -> Iterator[str]:
    yield "headrace bench and guidellm on the same server, in turns"
    yield report.describe(facts)
    yield ""
    yield f"{'case':<10}{'figure':<22}{'headrace bench':>15}{'guidellm':>12}  ratio (least-most)"
    for name, turns in cases.items():
        for key, label in _NAMES.items():
            mine, other = ([turn[client][key] for turn in turns] for client in ("ours", "theirs"))
            middles = f"{statistics.median(mine):>15.1f}{statistics.median(other):>12.1f}"
            yield f"{name:<10}{label:<22}{middles}  {figures.spread(figures.ratios(mine, other))}"
    yield ""
    yield "each client's mean over the server's own"
    for name, turns in cases.items():
        for key in _SERVERS:
            mine, other = (
                figures.spread(
                    [turn[client][key] / turn[client][f"server_{key}"] for turn in turns]
                )
                for client in ("ours", "theirs")
            )
            yield f"{name:<10}{_NAMES[key]:<20} headrace bench {mine}  guidellm {other}"
    yield ""
    yield f"Goal: medians from 0.95 to 1.05. Load {report.load_average()}."


async def _main(arguments: argparse.Namespace) -> None:
    load = report.load_average()
    cases = {
        case.name: await measure(
            case, arguments.rounds, arguments.guidellm, arguments.tokenizer.resolve()
        )
        for case in CASES
        if not arguments.case or case.name in arguments.case
    }
    facts = report.machine()
    table = "\n".join(_table(cases, facts))
    print(table)
    record = {"machine": facts, "load_before": load, "tokens": _TOKENS, "cases": cases}
    report.write("bench-agreement", table + "\n", record, arguments)


if __name__ == "__main__":
    parser = report.parser(__doc__, quick=False)
    parser.add_argument("--guidellm", required=True, help="its program")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of the tokenizer")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--case", action="append", help="only this; may be repeated")
    asyncio.run(_main(parser.parse_args()))
