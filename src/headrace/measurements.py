"""Results of `headrace bench`, kept in `bench.json` of the home, and those of `tune`, as curves."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import msgspec
from filelock import FileLock

from headrace.core.measurement import Curve, Point
from headrace.core.private import FILE_MODE, private_folder, write_atomically
from headrace.engines import measured

log = logging.getLogger("headrace.lab.bench")

FILE_NAME = "bench.json"
MAX_RUNS = 50


def keep(home: Path, curve: Curve) -> None:
    """Add a run of `bench` to those that are kept. Blocking."""
    path = home / FILE_NAME
    private_folder(home)
    with FileLock(path.with_name(f".{path.name}.lock"), mode=FILE_MODE):
        runs = [*_runs(home), curve][-MAX_RUNS:]
        write_atomically(path, msgspec.json.format(msgspec.json.encode(runs), indent=1))


def read(home: Path) -> list[Curve]:
    """Return the runs of `bench` and of `tune`, each with the newest first. Blocking."""
    tuned = [curve for record in measured.records(home) for curve in _of_tune(record)]
    return [*reversed(_runs(home)), *tuned]


def _runs(home: Path) -> list[Curve]:
    path = home / FILE_NAME
    try:
        return msgspec.json.decode(path.read_bytes(), type=list[Curve])
    except (FileNotFoundError, NotADirectoryError):
        return []
    except (OSError, msgspec.DecodeError) as error:
        data = {"path": str(path), "error": str(error)}
        log.warning("headrace.lab.bench.damaged", extra={"data": data})
        return []


def _of_tune(record: measured.Record) -> Iterator[Curve]:
    for trial in record.trials:
        yield Curve(
            kind="tune",
            model=record.model,
            title=trial.title,
            time=record.day,
            machine=record.machine,
            fault=trial.fault,
            memory=max(trial.memory.values(), default=None),
            points=tuple(map(_point, trial.figures)),
        )


def _point(figures: measured.Figures) -> Point:
    return Point(
        load="1 stream" if figures.streams == 1 else f"{figures.streams} streams",
        tokens_per_s=figures.tokens_per_s,
        first_token_p50_ms=figures.first_token_ms_p50,
        first_token_p99_ms=figures.first_token_ms_p99,
    )
