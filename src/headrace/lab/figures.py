"""The spread of measured values, and ratios of them."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

import msgspec

from headrace.core import metrics


class Summary(msgspec.Struct, frozen=True):
    """The spread of values; percentiles by nearest rank."""

    mean: float
    p50: float
    p90: float
    p99: float
    max: float


def percentile(values: Iterable[float], percent: int) -> float:
    """Return the percentile of values in any order, 0 of none."""
    ordered = sorted(values)
    return metrics.percentile(ordered, percent) if ordered else 0.0


def summary(values: Iterable[float | None]) -> Summary | None:
    """Return the spread of the values that are not None; None if there are none."""
    ordered = sorted(value for value in values if value is not None)
    if not ordered:
        return None
    p50, p90, p99 = (metrics.percentile(ordered, percent) for percent in (50, 90, 99))
    return Summary(sum(ordered) / len(ordered), p50, p90, p99, ordered[-1])


def ratio(part: float, whole: float) -> float:
    """Return a quotient; 0 if the divisor is 0."""
    return part / whole if whole else 0.0


def ratios(parts: Sequence[float], wholes: Sequence[float]) -> list[float]:
    """Return the quotients of paired values, such as those of one round."""
    return [part / whole for part, whole in zip(parts, wholes, strict=True)]


def spread(values: Sequence[float]) -> str:
    """Return the values as the text `median (minimum-maximum)`."""
    return f"{statistics.median(values):.3f} ({min(values):.3f}-{max(values):.3f})"
