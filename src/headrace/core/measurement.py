"""What `headrace bench` and `tune` have measured on this machine, as points to be plotted."""

from __future__ import annotations

from typing import Literal

import msgspec


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """The figures at one load. Tokens are those of answers, times are in milliseconds.

    `load` is as `4 clients` or `2.0 requests/s`. Percentiles are None where nothing was measured.
    """

    load: str
    tokens_per_s: float
    first_token_p50_ms: float | None = None
    first_token_p99_ms: float | None = None
    between_p50_ms: float | None = None
    between_p99_ms: float | None = None


class Curve(msgspec.Struct, frozen=True, kw_only=True):
    """One run of `bench`, or one engine with its options in a run of `tune`.

    `time` is ISO 8601, of `tune` a day. `title` is the measured service or engine, `fault` why an
    engine cannot be chosen. `memory` is the peak in bytes, None where it is not known.
    """

    kind: Literal["bench", "tune"]
    model: str
    title: str
    time: str
    machine: str = ""
    fault: str | None = None
    memory: int | None = None
    points: tuple[Point, ...] = ()
