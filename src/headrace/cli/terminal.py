"""How things are shown: columns, sizes, JSON and progress."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import msgspec

Report = Callable[[str, int, int], None]
"""What is told of long work: what is being done, how much of it, of how much (0: not known)."""

# A model could move the cursor, rename the window or write to the clipboard.
_CONTROLS = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def printable(text: str) -> str:
    """Return text without what a terminal would obey."""
    return text.translate(_CONTROLS)


def write(text: str) -> None:
    """Write an answer to stdout at once; to a file or a pipe unchanged."""
    sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def note(text: str) -> None:
    """Say something beside the answer, on stderr."""
    print(text, file=sys.stderr, flush=True)


def print_json(value: object) -> None:
    """Print structs, paths and plain data as one JSON document."""
    text = msgspec.json.encode(value, enc_hook=str, order="sorted")
    print(msgspec.json.format(text, indent=2).decode())


def columns(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print rows in aligned columns; None is a dash."""
    for line in aligned(heads, rows):
        print(line)


def aligned(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> Iterator[str]:
    """Yield the lines of `columns`."""
    cells = [["-" if cell is None else printable(str(cell)) for cell in row] for row in rows]
    lines = [list(heads), *cells] if heads else cells
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        padded = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        yield "  ".join(padded).rstrip()


def size(count: int | None) -> str | None:
    """Return bytes in the largest fitting unit: `96.5 MB`."""
    if count is None:
        return None
    amount, units = float(count), iter(("B", "kB", "MB", "GB", "TB"))
    unit = next(units)
    while amount >= 1000 and unit != "TB":
        amount, unit = amount / 1000, next(units)
    return f"{amount:.0f} B" if unit == "B" else f"{amount:.1f} {unit}"


def colourful() -> bool:
    """Tell whether stderr is a terminal that may be coloured."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("HEADRACE_NO_COLOR")
    return sys.stderr.isatty() and not plain


@contextmanager
def progress() -> Generator[Report]:
    """Yield a function that reports long work; it draws bars on a terminal, else nothing."""
    if not sys.stderr.isatty():
        yield lambda what, done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    bars = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[amount]}"),
        TimeRemainingColumn(),
        console=Console(stderr=True, no_color=not colourful()),
        transient=True,
    )
    tasks: dict[str, Any] = {}

    def report(what: str, done: int, total: int) -> None:
        if what not in tasks:
            tasks[what] = bars.add_task(printable(what), amount="")
        # What is not counted in bytes is counted in percent, which the bar shows.
        amount = f"{size(done)} of {size(total)}" if total > 100 else ""
        bars.update(tasks[what], completed=done, total=total or None, amount=amount)

    with bars:
        yield report
