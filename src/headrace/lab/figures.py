"""How values are spread."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

import msgspec


class Summary(msgspec.Struct, frozen=True):
    """The spread of values; percentiles by nearest rank."""

    mean: float
    p50: float
    p90: float
    p99: float
    max: float


def percentile(values: Iterable[float], percent: float) -> float:
    """Return the smallest value that at least `percent` % do not exceed (nearest rank); 0 of none.

    `percent` is above 0 and at most 100.
    """
    ordered = sorted(values)
    return ordered[int(-(-len(ordered) * percent // 100)) - 1] if ordered else 0.0


def summary(values: Iterable[float | None]) -> Summary | None:
    """Return the spread of the values that are there; None where there are none."""
    ordered = sorted(value for value in values if value is not None)
    if not ordered:
        return None
    p50, p90, p99 = (percentile(ordered, percent) for percent in (50, 90, 99))
    return Summary(sum(ordered) / len(ordered), p50, p90, p99, ordered[-1])


def ratio(part: float, whole: float) -> float:
    """Return a quotient, 0 where there is nothing to divide by."""
    return part / whole if whole else 0.0


def ratios(parts: Sequence[float], wholes: Sequence[float]) -> list[float]:
    """Return the quotients of values that belong together, as those of one round."""
    return [part / whole for part, whole in zip(parts, wholes, strict=True)]


def spread(values: Sequence[float]) -> str:
    """Return `median (least-most)` as text."""
    return f"{statistics.median(values):.3f} ({min(values):.3f}-{max(values):.3f})"
