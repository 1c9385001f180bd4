"""What was measured, and where it is kept: `tuned.json`, shared by all who use this home."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

import msgspec
from filelock import FileLock

from headrace import __version__, engines, machine
from headrace.core.model import ModelFile
from headrace.engines.choice import Measured
from headrace.models.transfer import write_atomically
from headrace.tune.agreement import Agreement

log = logging.getLogger("headrace.tune")

FILE_NAME = "tuned.json"
MAX_RECORDS = 200
Aim = Literal["latency", "throughput"]
_ABOUT = 0.95
"""Rates that are nearer than this to the best are as good: runs differ by as much."""


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """What one variant did with so many streams at once, over all rounds.

    `tokens_per_s` is the median of the rounds, of all output tokens over the time from the first
    request to the last token; `spread` are the least and the most. Times to the first token are in
    milliseconds. `of_limit` is the share of what memory alone would allow, None if not known.
    """

    streams: int
    tokens_per_s: float
    spread: tuple[float, float]
    first_token_ms_p50: float
    first_token_ms_p99: float
    of_limit: float | None = None


class Trial(msgspec.Struct, frozen=True, kw_only=True):
    """One engine with one set of options. `fault` is why it is not to be chosen.

    `memory` is the most that it held, in bytes by device; `precision` how its weights are stored.
    """

    engine: str
    version: str | None
    options: dict[str, Any] = {}
    precision: str | None = None
    load_s: float | None = None
    memory: dict[str, int] = {}
    agreement: Agreement | None = None
    figures: tuple[Figures, ...] = ()
    fault: str | None = None

    def rate(self, streams: int) -> float:
        """Return output tokens/s, 0 where it was not measured."""
        return next((one.tokens_per_s for one in self.figures if one.streams == streams), 0.0)


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """One run of `headrace tune`. `bandwidth` is in bytes/s; `reference` who the others agree with.

    `context_length` is what each request could hold, in tokens.
    """

    model: str
    source: str
    day: str
    machine: str
    headrace: str = __version__
    bandwidth: float | None = None
    reference: str = ""
    context_length: int | None = None
    streams: tuple[int, ...] = ()
    trials: tuple[Trial, ...] = ()

    def winner(self, aim: Aim) -> Trial | None:
        """Return the fastest one that may be chosen: alone, or with the most streams.

        Of those that are about as fast, it is the one with the least memory.
        """
        streams = min(self.streams) if aim == "latency" else max(self.streams)
        able = [one for one in self.trials if one.fault is None and one.rate(streams)]
        fastest = max((one.rate(streams) for one in able), default=0.0)
        about = [one for one in able if one.rate(streams) >= _ABOUT * fastest]
        return min(about, key=lambda one: sum(one.memory.values()), default=None)


def save(home: Path, file: ModelFile, record: Record) -> None:
    """Keep a run; it replaces the one before of the same file."""
    path = home / FILE_NAME
    home.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):
        records = _read(path)
        records.pop(_key(file), None)
        records[_key(file)] = record
        latest = dict(list(records.items())[-MAX_RECORDS:])
        write_atomically(path, msgspec.json.format(msgspec.json.encode(latest), indent=1))


def load(home: Path, file: ModelFile) -> Record | None:
    """Return the latest run of this file on this machine."""
    records = _read(home / FILE_NAME)
    return records.get(_key(file)) if records else None


def measured(home: Path, file: ModelFile) -> tuple[Measured, ...]:
    """Return what is known of each engine and this file, here, in the version that is installed."""
    record = load(home, file)
    return () if record is None else tuple(_by_engine(record))


def _by_engine(record: Record) -> Iterator[Measured]:
    for name in dict.fromkeys(one.engine for one in record.trials):
        trials = [one for one in record.trials if one.engine == name]
        if name not in engines.names() or trials[0].version != engines.version(name):
            continue
        usual = next((one for one in trials if not one.options), None)
        best = [one for one in trials if one.fault is None]
        yield Measured(
            engine=name,
            day=record.day,
            rates=_rates([usual] if usual else [], record.streams),
            best=_rates(best, record.streams),
            fault=usual.fault if usual else None,
        )


def _rates(trials: Sequence[Trial], streams: Sequence[int]) -> dict[int, float]:
    rates = {n: max((one.rate(n) for one in trials), default=0.0) for n in streams}
    return {n: rate for n, rate in rates.items() if rate}


@cache
def machine_id() -> str:
    """Return what a figure depends on: the processor, its cores and the GPUs."""
    facts = machine.system()
    gpus = [one.name for one in facts.devices if one.kind != "cpu"]
    return ", ".join([f"{facts.cpu}, {facts.cores} cores", *gpus])


def _key(file: ModelFile) -> str:
    stamp = (0, 0)
    if file.path and Path(file.path).exists():
        status = Path(file.path).stat()
        stamp = (status.st_size, status.st_mtime_ns)
    facts = [file.path or file.architecture, file.format, stamp, machine_id()]
    return hashlib.sha256(msgspec.json.encode(facts)).hexdigest()[:32]


def _read(path: Path) -> dict[str, Record]:
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Record])
    except FileNotFoundError:
        return {}
    except (OSError, msgspec.DecodeError) as error:
        data = {"path": str(path), "error": str(error)}
        log.warning("headrace.tune.damaged", extra={"data": data})
        return {}
