"""Common parts of the benchmarks: flags, facts of the machine, and the files of results."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from headrace.machine import system

RESULTS = Path(__file__).parent / "results"


def parser(description: str | None, *, quick: bool = True) -> argparse.ArgumentParser:
    """Return a command line with the flags that all benchmarks have."""
    made = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    made.add_argument("--json", type=Path, help="write the raw figures here")
    if quick:
        made.add_argument("--quick", action="store_true", help="one short round, for tests")
    return made


def against(parser: argparse.ArgumentParser) -> None:
    """Add the flag that measures another checkout beside this one."""
    text = "another checkout (a folder with src/ in it) to measure beside this one"
    parser.add_argument("--against", type=Path, metavar="DIR", help=text)


def script(name: str, *arguments: str) -> list[str]:
    """Return the command of a program in this folder."""
    return [sys.executable, str(Path(__file__).with_name(name)), *arguments]


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


class Conditions:
    """The load average before and after a run, and its duration."""

    def __init__(self) -> None:
        self.load = [load_average()]
        self._began = time.monotonic()

    def __str__(self) -> str:
        """Return a sentence for the end of a table."""
        self.load[1:] = [load_average()]
        seconds = time.monotonic() - self._began
        return f" Load average {self.load[0]} before, {self.load[1]} after. Took {seconds:.0f} s."


def write(
    name: str, table: str, record: dict[str, Any], options: argparse.Namespace
) -> Path | None:
    """Write the table and the raw figures, unless the run was a quick one; return the path.

    Without `--json` they go to benchmarks/results, named by the day.
    """
    text = json.dumps(record, indent=1) + "\n"
    if options.json is not None:
        options.json.write_text(text)
        return options.json
    if getattr(options, "quick", False):
        return None
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}-{datetime.datetime.now(datetime.UTC):%Y-%m-%d}.json"
    path.write_text(text)
    path.with_suffix(".txt").write_text(table + "\n")
    return path
