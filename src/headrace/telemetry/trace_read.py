"""Reads trace files, also while they are written, and summarizes them."""

from __future__ import annotations

import mmap
import os
from collections import Counter, defaultdict
from collections.abc import Generator, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import msgspec

from headrace.core.errors import ConfigError, InvalidRequest, UnknownRequest
from headrace.core.metrics import InferenceMetrics, percentile
from headrace.core.record import RequestRecord, TraceFilter
from headrace.telemetry.trace_file import CURRENT, renamed_files

_decode = msgspec.json.Decoder(RequestRecord).decode
_NAMED_IN_AN_ERROR = 4


class Percentiles(msgspec.Struct, frozen=True, kw_only=True):
    """By nearest rank, over the `count` requests that have the figure."""

    count: int
    p50: float
    p90: float
    p99: float


class ModelStats(msgspec.Struct, frozen=True, kw_only=True):
    """Statistics of one model.

    For `total_ms` only successful requests count; for other figures all that have them.
    """

    model: str
    requests: int
    outcomes: dict[str, int]
    prompt_tokens: int
    completion_tokens: int
    figures: dict[str, Percentiles]


# `trace stats --json` has a shorter name for this one.
_COLUMNS = {"decode_tokens_per_second": "tokens_per_second"}
_SUMMARISED = {
    name: _COLUMNS.get(name, name)
    for name, figure in InferenceMetrics.declared().items()
    if figure.summarised
}


def records(folder: Path, wanted: TraceFilter | None = None) -> Generator[RequestRecord]:
    """Yield the matching records in the order of their end, newest first, one at a time.

    Raises:
        ConfigError: a file cannot be read, for example of another user.
    """
    wanted = wanted or TraceFilter()
    for line in _lines(folder, wanted.since or 0):
        record = _record(line)
        if record is not None and wanted.takes(record):
            yield record


def find(folder: Path, name: str) -> RequestRecord:
    """Return the record with an id, as in an answer (`chatcmpl-...`), or a prefix of an id.

    Raises:
        UnknownRequest: there is none.
        InvalidRequest: there is more than one.
        ConfigError: as `records`.
    """
    # Ids in answers have a prefix such as `chatcmpl-`.
    name = name.rpartition("-")[2]
    matches: list[RequestRecord] = []
    for line in _lines(folder):
        record = _record(line) if name.encode(errors="replace") in line else None
        if record is None:
            continue
        if record.id == name:
            return record
        if record.id.startswith(name) or record.trace_id.startswith(name):
            matches.append(record)
    if len(matches) == 1:
        return matches[0]
    if not matches:
        raise UnknownRequest(f"No trace of {name!r} is kept in {folder}.", param="id")
    ids = [record.id for record in matches[:_NAMED_IN_AN_ERROR]]
    more = " ..." if len(matches) > len(ids) else ""
    raise InvalidRequest(
        f"{len(matches)} requests begin with {name!r}: {', '.join(ids)}{more}", param="id"
    )


def stats(selected: Iterable[RequestRecord]) -> list[ModelStats]:
    """Return the statistics of each model, in the order of their names."""
    outcomes: dict[str, Counter[str]] = defaultdict(Counter)
    tokens: dict[str, Counter[str]] = defaultdict(Counter)
    values: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for record in selected:
        usage = record.metrics.usage
        outcomes[record.model][record.outcome] += 1
        tokens[record.model].update(prompt=usage.prompt_tokens, completion=usage.completion_tokens)
        for column, value in _figures(record):
            values[record.model][column].append(value)
    return [
        ModelStats(
            model=model,
            requests=ended.total(),
            outcomes=dict(ended),
            prompt_tokens=tokens[model]["prompt"],
            completion_tokens=tokens[model]["completion"],
            figures={name: _percentiles(of) for name, of in values[model].items()},
        )
        for model, ended in sorted(outcomes.items())
    ]


def _figures(record: RequestRecord) -> Iterator[tuple[str, float]]:
    for name, column in _SUMMARISED.items():
        value = getattr(record.metrics, name)
        if value is not None and (name != "total_ms" or record.outcome == "ok"):
            yield column, value


def _percentiles(values: list[float]) -> Percentiles:
    values.sort()
    p50, p90, p99 = (percentile(values, percent) for percent in (50, 90, 99))
    return Percentiles(count=len(values), p50=p50, p90=p90, p99=p99)


def _record(line: bytes) -> RequestRecord | None:
    # The last line may be truncated, and other versions may write other fields.
    with suppress(msgspec.DecodeError):
        return _decode(line)
    return None


@contextmanager
def _opened(folder: Path) -> Generator[list[BinaryIO]]:
    """Open all files, newest first. A file that is renamed meanwhile may be there twice."""
    with ExitStack() as stack:
        files: list[BinaryIO] = []
        for path in _paths(folder):
            try:
                files.append(stack.enter_context(path.open("rb")))
            except FileNotFoundError:
                continue
            except OSError as error:
                raise ConfigError(f"{path} cannot be read: {error.strerror}.") from None
        yield files


def _paths(folder: Path) -> Iterator[Path]:
    # The current file first: if it is renamed now, it is listed twice, and none is missed.
    yield folder / CURRENT
    yield from reversed(renamed_files(folder))


def _lines(folder: Path, since: float = 0) -> Iterator[bytes]:
    """Yield the lines of files modified after `since`, last line first."""
    seen: set[tuple[int, int]] = set()
    with _opened(folder) as files:
        for file in files:
            status = os.fstat(file.fileno())
            key = status.st_dev, status.st_ino
            if key not in seen and status.st_size and status.st_mtime >= since:
                yield from _backwards(file)
            seen.add(key)


def _backwards(file: BinaryIO) -> Iterator[bytes]:
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        end = len(data)
        while end > 0:
            start = data.rfind(b"\n", 0, end) + 1
            yield data[start:end]
            end = start - 1
