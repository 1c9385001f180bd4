"""Durations as people write them: `90`, `5m`, `1h30m`, `-1`."""

from __future__ import annotations

import re

_UNITS = {"h": 3600, "m": 60, "s": 1, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
_NUMBER = r"(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)"
_PART = re.compile(f"({_NUMBER})(h|ms|m|s|us|ns)")
_TEXT = re.compile(f"([+-]?)(?:({_NUMBER})|((?:{_PART.pattern})+))")
# Longer than any machine runs, and short enough for every timer.
_LONGEST_S = 1e9


def seconds(value: str | float) -> float:
    """Return a duration in seconds: a number of them, or numbers with units, as Ollama takes it.

    -1 is for ever, which every negative value means.

    Raises:
        ValueError: it is none.
    """
    if isinstance(value, bool):
        raise ValueError(_refusal(value))
    amount = _parse(value) if isinstance(value, str) else float(value)
    return amount if 0 <= amount <= _LONGEST_S else -1.0


def _parse(text: str) -> float:
    # The sign of micro is two characters of Unicode.
    match = _TEXT.fullmatch(re.sub("[\u00b5\u03bc]", "u", text.strip()))
    if match is None:
        raise ValueError(_refusal(text))
    sign, number, parts = match.group(1, 2, 3)
    found = _PART.findall(parts or "")
    amount = sum(float(count) * _UNITS[unit] for count, unit in found) if found else float(number)
    return -amount if sign == "-" else amount


def _refusal(value: object) -> str:
    return f"{value!r} is no duration; write seconds, 5m, 1h30m, 0, or -1 for ever"
