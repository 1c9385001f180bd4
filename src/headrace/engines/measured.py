"""Results of `headrace tune`, stored in `tuned.json` of the home for the choice of engine."""

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
from headrace.core.private import FILE_MODE, private_folder
from headrace.engines.choice import Measured
from headrace.models.transfer import write_atomically

log = logging.getLogger("headrace.tune")

FILE_NAME = "tuned.json"
MAX_RECORDS = 200
Aim = Literal["latency", "throughput"]
_EQUAL = 0.95
"""Rates of at least this share of the best count as equal: runs vary by as much."""
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
    """

    streams: int
    tokens_per_s: float
    spread: tuple[float, float]
    first_token_ms_p50: float
    first_token_ms_p99: float
    of_limit: float | None = None


class Trial(msgspec.Struct, frozen=True, kw_only=True):
    """One engine with one set of options. `fault` is the reason why it cannot be chosen.

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

    def rate(self, streams: int) -> float:
        """Return output tokens/s, 0 where it was not measured."""
        rates = (point.tokens_per_s for point in self.figures if point.streams == streams)
        return next(rates, 0.0)


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """One run of `headrace tune`. `bandwidth` is in bytes/s, `context_length` in tokens a request.

    `reference` is the engine that the others were compared with.
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
        """Return the fastest trial without a fault: with the fewest or with the most streams.

        Of trials that are about as fast, it is the one with the least memory.
        """
        streams = self.streams_for(aim)
        candidates = [trial for trial in self.trials if trial.fault is None and trial.rate(streams)]
        fastest = max((trial.rate(streams) for trial in candidates), default=0.0)
        best = [trial for trial in candidates if trial.rate(streams) >= _EQUAL * fastest]
        return min(best, key=lambda trial: sum(trial.memory.values()), default=None)

    def streams_for(self, aim: Aim) -> int:
        """Return the number of streams whose rates are compared."""
        return min(self.streams) if aim == "latency" else max(self.streams)


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


def load(home: Path, file: ModelFile) -> Record | None:
    """Return the latest run of this file on this machine."""
    records = _read(home / FILE_NAME)
    return records.get(_key(file)) if records else None


def known(home: Path, file: ModelFile) -> tuple[Measured, ...]:
    """Return the rates of each engine with this file, here, in the version that is installed."""
    record = load(home, file)
    return () if record is None else tuple(_by_engine(record))


def _by_engine(record: Record) -> Iterator[Measured]:
    for name in dict.fromkeys(trial.engine for trial in record.trials):
        trials = [trial for trial in record.trials if trial.engine == name]
        if name not in engines.names() or trials[0].version != engines.version(name):
            continue
        default = next((trial for trial in trials if not trial.options), None)
        best = [trial for trial in trials if trial.fault is None]
        yield Measured(
            engine=name,
            day=record.day,
            rates=_rates([default] if default else [], record.streams),
            best=_rates(best, record.streams),
            fault=default.fault if default else None,
        )


def _rates(trials: Sequence[Trial], streams: Sequence[int]) -> dict[int, float]:
    rates = {n: max((trial.rate(n) for trial in trials), default=0.0) for n in streams}
    return {n: rate for n, rate in rates.items() if rate}


@cache
def machine_id() -> str:
    """Return the hardware that figures depend on: the processor, its cores and the GPUs."""
    facts = machine.system()
    gpus = [device.name for device in facts.devices if device.kind != "cpu"]
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
        log.warning("headrace.lab.tune.damaged", extra={"data": data})
        return {}
