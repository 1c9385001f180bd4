"""What both benchmarks write beside their figures: the machine, the versions, how busy it was."""

from __future__ import annotations

import datetime
import json
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from headrace.machine import system

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """Return the facts of this machine that a figure depends on."""
    facts = system()
    return {
        "cpu": facts.cpu,
        "cores": facts.cores,
        "memory_gb": round(facts.devices[0].total / 2**30, 1),
        "os": facts.os,
        "python": facts.python,
        "libraries": facts.libraries,
    }


def describe(facts: dict[str, Any]) -> str:
    """Return the facts as lines of text."""
    libraries = ", ".join(f"{name} {version}" for name, version in facts["libraries"].items())
    return (
        f"{facts['cpu']}, {facts['cores']} cores, {facts['memory_gb']} GB, {facts['os']}\n"
        f"Python {facts['python']}, {libraries}"
    )


def load_average() -> float:
    """Return the load of the last minute."""
    return round(os.getloadavg()[0], 2)


def spread(values: Sequence[float]) -> str:
    """Return `median (least-most)`."""
    return f"{statistics.median(values):.3f} ({min(values):.3f}-{max(values):.3f})"


def write(name: str, table: str, record: dict[str, Any], json_file: Path | None) -> Path | None:
    """Keep the table and the raw figures; return where.

    Without `json_file` they go to benchmarks/results, named by the day.
    """
    text = json.dumps(record, indent=1) + "\n"
    if json_file is not None:
        json_file.write_text(text)
        return json_file
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}-{datetime.datetime.now(datetime.UTC):%Y-%m-%d}.json"
    path.write_text(text)
    path.with_suffix(".txt").write_text(table + "\n")
    return path
