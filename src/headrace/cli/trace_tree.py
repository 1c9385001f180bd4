"""The steps of a request, drawn on a scale of time."""

from __future__ import annotations

import shutil
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from headrace.cli import terminal
from headrace.cli.trace_text import took
from headrace.core.record import SpanRecord

_LEAST_BAR = 10


class _Scale(NamedTuple):
    """`cells` from `start` on, `per_cell` milliseconds each."""

    start: float
    per_cell: float
    cells: int
    mark: str

    def bar(self, span: SpanRecord) -> str:
        """Return a bar, at least one cell of it, where a step stands."""
        first = min(int((span.start_ms - self.start) / self.per_cell), self.cells - 1)
        after = min(round((span.start_ms + span.ms - self.start) / self.per_cell), self.cells)
        return " " * first + self.mark * max(after - first, 1)


def drawn(spans: Sequence[SpanRecord], *, details: bool) -> Iterator[str]:
    """Yield a line for each step: its name below its parent's, how long it took, and a bar."""
    steps = list(_nested(spans))
    if not steps:
        return
    names = ["  " * depth + terminal.printable(span.name) for depth, span in steps]
    times = [took(span.ms) or "" for _, span in steps]
    name_width, time_width = max(map(len, names)), max(map(len, times))
    cells = shutil.get_terminal_size().columns - name_width - time_width - len("  !  ")
    scale = _scale(spans, max(cells, _LEAST_BAR))
    for (depth, span), name, time in zip(steps, names, times, strict=True):
        head = f"{name:{name_width}}  {time:>{time_width}} {'!' if span.failed else ' '}"
        yield f"{head} {scale.bar(span)}"
        for key, value in span.attributes.items() if details else ():
            yield terminal.printable(f"{'  ' * depth}  {key}={value}")


def _scale(spans: Sequence[SpanRecord], cells: int) -> _Scale:
    start = min(span.start_ms for span in spans)
    whole = max(span.start_ms + span.ms for span in spans) - start
    # A file or a terminal of another encoding has no blocks.
    utf8 = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    return _Scale(start, (whole or 1) / cells, cells, "█" if utf8 else "#")


def _nested(spans: Sequence[SpanRecord]) -> Iterator[tuple[int, SpanRecord]]:
    """Yield each step with its depth: the roots, and below each its children as they began."""
    known = {span.span_id for span in spans}
    children: dict[str, list[SpanRecord]] = defaultdict(list)
    for span in sorted(spans, key=lambda one: one.start_ms)[::-1]:
        children[span.parent_id if span.parent_id in known else ""].append(span)
    left = [(0, span) for span in children[""]]
    while left:
        depth, span = left.pop()
        yield depth, span
        left.extend((depth + 1, child) for child in children.pop(span.span_id, ()))
