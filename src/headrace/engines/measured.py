"""Results of `headrace tune`, kept in `tuned.json` of the home. They decide nothing."""

from __future__ import annotations

import hashlib
import logging
import math
import statistics
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

import msgspec
from filelock import FileLock

from headrace import __version__, engines, machine
from headrace.core.model import ModelFile
from headrace.core.private import FILE_MODE, private_folder, write_atomically
from headrace.core.values import size

log = logging.getLogger("headrace.tune")

FILE_NAME = "tuned.json"
MAX_RECORDS = 200
Aim = Literal["latency", "throughput"]
NEAR = 0.9
"""A rate below this share of the best is slower, however few rounds there were."""
_SAME, _EQUAL = 0.99, 0.95
"""From this share of the best on rates are equal: always, and with too few rounds to tell."""
_CHANCE = 0.05
"""The chance of so many rounds won, or more, at which a difference is no accident."""
LEAST_PAIRS = 5
"""Of fewer rounds none is that unlikely."""
MIN_FORCED = 0.95
"""Share of next tokens, each after the reference's text, that have to be the reference's."""
MAX_DISTANCE = 0.15
"""Largest mean difference of the log-probabilities of the reference's tokens."""


class Agreement(msgspec.Struct, frozen=True, kw_only=True):
    """How close the answers of an engine are to those of the reference.

    `prompts` is the share of prompts with the same token ids. `greedy` is the share of an
    answer up to its first other token, on average; `forced` the share of next tokens that are the
    same, each after the reference's text, of those that are clear; `compared` counts these.
    `distance` is the mean difference of log-probabilities of the reference's tokens, None where the
    engine gives none.
    """

    prompts: float
    greedy: float
    forced: float
    distance: float | None
    compared: int

    def fault(self) -> str | None:
        """Return what differs, as a sentence without a full stop; None if the answers agree."""
        if self.prompts < 1:
            return f"only {self.prompts:.0%} of the prompts become the same tokens"
        if self.forced < MIN_FORCED:
            return f"only {self.forced:.0%} of its tokens are the reference's"
        if self.distance is not None and self.distance > MAX_DISTANCE:
            return f"its log-probabilities are off by {self.distance:.2f}"
        return None


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """The figures of one variant at one number of streams, over all rounds.

    `tokens_per_s` is the median of the rounds, of all output tokens over the time from the first
    request to the last token; `spread` is the minimum and maximum. Times to the first token are in
    milliseconds. `of_limit` is the share of the rate that memory alone would allow, None: unknown.
    `rates` are those of the rounds, in order; near ties have more rounds than others.
    """

    streams: int
    tokens_per_s: float
    spread: tuple[float, float]
    first_token_ms_p50: float
    first_token_ms_p99: float
    of_limit: float | None = None
    rates: tuple[float, ...] = ()


class Trial(msgspec.Struct, frozen=True, kw_only=True):
    """One engine with one set of options. `fault` is the reason why it cannot be chosen.

    `left_out` is the reason why it was not measured to the end: it was slower, or no time was left.
    `memory` is its peak, in bytes by device; `precision` the type of its stored weights.
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
    left_out: str | None = None

    @property
    def can_win(self) -> bool:
        """Whether it was compared with the reference, and nothing speaks against it."""
        return self.fault is None and self.left_out is None

    def rate(self, streams: int) -> float:
        """Return output tokens/s, 0 where it was not measured."""
        rates = (point.tokens_per_s for point in self.figures if point.streams == streams)
        return next(rates, 0.0)

    def rates(self, streams: int) -> tuple[float, ...]:
        """Return output tokens/s of each round."""
        points = (point for point in self.figures if point.streams == streams)
        return next((point.rates or (point.tokens_per_s,) for point in points), ())

    @property
    def title(self) -> str:
        """The engine and its options."""
        return " ".join([self.engine, *(f"{key}={value}" for key, value in self.options.items())])

    def summary(self, streams: int) -> str:
        """Return its speed with so many streams, and the memory that it takes."""
        if not self.rate(streams):
            return self.left_out or "not measured"
        memory = size(sum(self.memory.values()) or None)
        load = "1 stream" if streams == 1 else f"{streams} streams"
        return f"{self.rate(streams):.1f} tokens/s at {load}" + (f" in {memory}" if memory else "")


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """One run of `headrace tune`. `bandwidth` is in bytes/s, `context_length` in tokens a request.

    `reference` is the engine that the others were compared with. The run could take `budget_s`, and
    took `seconds`.
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
    budget_s: float | None = None
    seconds: float | None = None
    trials: tuple[Trial, ...] = ()

    def winner(self, aim: Aim) -> Trial | None:
        """Return the fastest trial without a fault: with the fewest or with the most streams.

        Of trials that are as fast it is the one with the least memory (`is_slower`).
        """
        streams = self.streams_for(aim)
        candidates = [trial for trial in self.trials if trial.can_win and trial.rate(streams)]
        if not candidates:
            return None
        best = max(candidates, key=lambda trial: trial.rate(streams)).rates(streams)
        equal = [trial for trial in candidates if not is_slower(trial.rates(streams), best)]
        return min(equal, key=lambda trial: sum(trial.memory.values()))

    def streams_for(self, aim: Aim) -> int:
        """Return the number of streams whose rates are compared."""
        return min(self.streams) if aim == "latency" else max(self.streams)


def is_slower(rates: Sequence[float], best: Sequence[float]) -> bool:
    """Whether rates are lower than those of the best, beyond the noise of their own rounds.

    Rounds are compared in pairs, by their numbers: by chance alone each is won with a probability
    of one half (the sign test). With fewer than five pairs 5 % decide.
    """
    share = statistics.median(rates) / statistics.median(best)
    if not NEAR <= share < _SAME:
        return share < NEAR
    pairs = list(zip(rates, best, strict=False))
    if len(pairs) < LEAST_PAIRS:
        return share < _EQUAL
    won = sum(ours < theirs for ours, theirs in pairs)
    ways = sum(math.comb(len(pairs), count) for count in range(won, len(pairs) + 1))
    return ways / 2 ** len(pairs) <= _CHANCE


def save(home: Path, file: ModelFile, record: Record) -> None:
    """Store a run, in place of an earlier one of the same file."""
    path = home / FILE_NAME
    private_folder(home)
    with FileLock(path.with_name(f".{path.name}.lock"), mode=FILE_MODE):
        records = _read(path)
        records.pop(_key(file), None)
        records[_key(file)] = record
        latest = dict(list(records.items())[-MAX_RECORDS:])
        write_atomically(path, msgspec.json.format(msgspec.json.encode(latest), indent=1))


def records(home: Path) -> list[Record]:
    """Return all runs, the newest first. Blocking."""
    return [*reversed(_read(home / FILE_NAME).values())]


def load(home: Path, file: ModelFile) -> Record | None:
    """Return the latest run of this file on this machine."""
    records = _read(home / FILE_NAME)
    return records.get(_key(file)) if records else None


def proposal(home: Path, file: ModelFile, engine: str) -> str:
    """Return a clause about what `tune` measured of an engine and proposes; "" if nothing.

    It counts for this file, this machine and the versions of engines that are installed.
    """
    record = load(home, file)
    best = record.winner("latency") if record else None
    if record is None or best is None or not all(map(_is_current, record.trials)):
        return ""
    streams = record.streams_for("latency")
    now = next((trial for trial in record.trials if trial.engine == engine), None)
    parts = [f"{engine} {now.fault or now.summary(streams)}"] if now else []
    if best is not now:
        parts.append(f"{best.title} {best.summary(streams)} (`headrace tune --write latency`)")
    return f"; tuned on {record.day}: {', '.join(parts)}"


def _is_current(trial: Trial) -> bool:
    return trial.engine in engines.names() and trial.version == engines.version(trial.engine)


@cache
def machine_id() -> str:
    """Return the hardware that figures depend on: the processor, its cores and the GPUs."""
    facts = machine.system()
    gpus = [device.name for device in facts.devices if device.kind != "cpu"]
    usable = machine.usable_cpus()
    cores = f"{usable} of {facts.cores}" if usable < facts.cores else f"{facts.cores}"
    return ", ".join([f"{facts.cpu}, {cores} cores", *gpus])


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
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, msgspec.DecodeError) as error:
        data = {"path": str(path), "error": str(error)}
        log.warning("headrace.lab.tune.damaged", extra={"data": data})
        return {}
