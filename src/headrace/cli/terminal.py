"""Output to the terminal: text, tables, sizes, durations, JSON and progress."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from textwrap import wrap
from typing import Any, NamedTuple, Protocol

import msgspec

from headrace import log
from headrace.core.values import as_text
from headrace.core.values import flat as flat
from headrace.core.values import size as size
from headrace.core.values import span as span

Report = Callable[[str, int, int], None]
"""Receives the progress of long work: its name, the amount done, the total (0: unknown)."""

# The text of a model could move the cursor, rename the window or write to the clipboard.
_CONTROLS = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
_DIM = "\x1b[2m{}\x1b[0m"
GAP = "  "
_WIDEST = 48


def printable(text: str) -> str:
    """Return text without the control characters that a terminal would obey."""
    return text.translate(_CONTROLS)


class Write(Protocol):
    """Writes the next piece of an answer, or of the thinking before it."""

    def __call__(self, text: str, *, thinking: bool = False) -> None:
        """Write a piece."""
        ...


def write(text: str, style: str = "{}") -> None:
    """Write text to stdout and flush it; without control characters on a terminal."""
    sys.stdout.write(style.format(printable(text)) if sys.stdout.isatty() else text)
    sys.stdout.flush()


@contextmanager
def plain() -> Generator[Write]:
    """Yield a function that writes the pieces of an answer; at the end its last line is ended.

    Thinking is dimmed on a terminal, and left out elsewhere.
    """
    last, has_thought = "\n", False

    def piece(text: str, *, thinking: bool = False) -> None:
        nonlocal last, has_thought
        if thinking and not sys.stdout.isatty():
            return
        if has_thought and not thinking:
            write("\n\n")
        last, has_thought = text, thinking
        write(text, _DIM if thinking and log.colourful() else "{}")

    try:
        yield piece
    finally:
        if not last.endswith("\n"):
            write("\n")


def note(text: str) -> None:
    """Write a line to stderr; stdout is for answers."""
    print(text, file=sys.stderr, flush=True)


def print_json(value: object) -> None:
    """Print structs, paths and plain data as one JSON document."""
    text = msgspec.json.encode(value, enc_hook=str, order="sorted")
    print(msgspec.json.format(text, indent=2).decode())


def columns(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print the lines of `aligned`."""
    for line in aligned(heads, rows):
        print(line)


def aligned(
    heads: Sequence[str], rows: Iterable[Sequence[Any]], numbers: Collection[str] = ()
) -> Iterator[str]:
    """Yield the lines of a table; the columns named in `numbers` are aligned to the right.

    None is a dash. With empty `heads` there is no line of heads. A table that is wider than the
    terminal is written as records: a row over several lines, each cell after its head.
    """
    rows = list(rows)
    by_column = list(zip(*rows, strict=True)) or [()] * len(heads)
    names = heads or [""] * len(by_column)
    columns = [
        Column(head, ["-" if cell is None else as_text(cell) for cell in column], head in numbers)
        for head, column in zip(names, by_column, strict=True)
    ]
    lines = [GAP.join(line).rstrip() for line in table(columns)[not heads :]]
    width = shutil.get_terminal_size().columns if heads and sys.stdout.isatty() else None
    if width is not None and max(map(cells, lines), default=0) > width:
        yield from records(columns, width)
    else:
        yield from lines


def records(columns: Sequence[Column], width: int) -> Iterator[str]:
    """Yield each row as lines of at most `width` cells, where words allow; dashes are left out."""
    for name, *row in zip(*(column.cells for column in columns), strict=True):
        yield flat(name)
        facts = zip(columns[1:], row, strict=True)
        parts = [f"{column.head} {flat(cell)}" for column, cell in facts if cell != "-"]
        for line in packed(parts, max(1, width - len(GAP))):
            yield from wrap(line, width, initial_indent=GAP, subsequent_indent=2 * GAP)


def packed(parts: Iterable[str], width: int, gap: str = GAP) -> list[str]:
    """Return lines with as many parts beside one another as fit into `width` cells."""
    lines: list[str] = []
    for part in parts:
        if lines and cells(lines[-1] + gap + part) <= width:
            lines[-1] += gap + part
        else:
            lines.append(part)
    return lines


class Column(NamedTuple):
    """Cells below a head. If space is short, the highest `rank` is left out first, and 0 never.

    Text can be shortened, to no less than `least` while there are columns to leave out.
    """

    head: str
    cells: Sequence[str]
    is_number: bool = True
    rank: int = 0
    least: int = 8

    def needed(self, limit: int | None) -> int:
        """Return the width of the widest cell; for text, at most `limit`."""
        widest = max(map(cells, self.cells))
        return widest if self.is_number or limit is None else min(widest, limit)


def table(columns: Sequence[Column], width: int | None = None) -> list[list[str]]:
    """Return the padded cells of each line, the heads first.

    Without a `width` all is shown. With one, columns are left out until the rest fits, and then
    text is shortened.
    """
    shown = [
        column._replace(cells=list(map(flat, (column.head, *column.cells)))) for column in columns
    ]
    if width is not None:
        _leave_out(shown, width)
    widths = [column.needed(None if width is None else _WIDEST) for column in shown]
    if width is not None:
        _shorten(shown, widths, width)
    padded = (
        [_fitted(cell, size, to_the_right=column.is_number) for cell in column.cells]
        for column, size in zip(shown, widths, strict=True)
    )
    return [list(line) for line in zip(*padded, strict=True)]


def _leave_out(columns: list[Column], width: int) -> None:
    while sum(len(GAP) + column.needed(column.least) for column in columns) > width + len(GAP):
        last = max(columns, key=lambda column: column.rank)
        if not last.rank:
            break
        columns.remove(last)


def _shorten(columns: Sequence[Column], widths: list[int], width: int) -> None:
    texts = [index for index, column in enumerate(columns) if not column.is_number]
    while sum(widths) + len(GAP) * (len(widths) - 1) > width:
        widest = max(texts, key=widths.__getitem__)
        if widths[widest] == 1:
            break
        widths[widest] -= 1


def _fitted(text: str, width: int, *, to_the_right: bool) -> str:
    text = shortened(text, width)
    padding = " " * (width - cells(text))
    return padding + text if to_the_right else text + padding


def shortened(text: str, width: int) -> str:
    """Return text of at most `width` cells; an ellipsis marks a cut."""
    from rich.cells import set_cell_size

    if cells(text) <= width:
        return text
    return set_cell_size(text, width - 1) + "…" if width > 0 else ""


def cells(text: str) -> int:
    """Return how many cells of the terminal a text takes."""
    from rich.cells import cell_len

    return cell_len(text)


def _amount(done: int, total: int) -> str:
    """Return what is done: in percent, and in bytes unless the total is 100 or less."""
    percent = f"{100 * done // total}%" if total else ""
    in_bytes = [size(done), f"of {size(total)}" if total else ""] if max(done, total) > 100 else []
    return " ".join(part for part in (*in_bytes, percent) if part)


@contextmanager
def progress() -> Generator[Report]:
    """Yield a function that shows the current stage as a bar on a terminal, else nothing."""
    if not sys.stderr.isatty():
        yield lambda name, done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    bars = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[amount]}"),
        TimeRemainingColumn(),
        console=Console(stderr=True, no_color=not log.colourful()),
        transient=True,
    )
    task, stage = bars.add_task("", amount="", total=None, visible=False), ""

    def report(name: str, done: int, total: int) -> None:
        nonlocal stage
        if name != stage:
            stage = name
            bars.reset(task, description=printable(name), visible=True)
        bars.update(task, completed=done, total=total or None, amount=_amount(done, total))

    with bars:
        yield report
