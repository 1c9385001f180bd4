"""`headrace trace`: finished requests, from the trace files of the service."""

from __future__ import annotations

import itertools
import shutil
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, NamedTuple, cast

import msgspec
import typer
from typer import Argument, Option

from headrace.cli import terminal
from headrace.cli.common import Common, known_models, with_common
from headrace.core.errors import InvalidRequest
from headrace.core.metrics import DeviceUse, InferenceMetrics
from headrace.core.record import Outcome, RequestRecord, SpanRecord, TraceFilter
from headrace.core.values import seconds
from headrace.telemetry import trace_file, trace_read
from headrace.telemetry.trace_read import ModelStats

Row = Sequence[Any]

_HEADS = ("ID", "TIME", "MODEL", "KEY", "TOKENS", "TTFT", "TOK/S", "TOTAL", "STATUS")
_OUTCOMES = ("ok", "refused", "error", "cancelled")
_FIGURES = {
    "queue_ms": "queue",
    "time_to_first_token_ms": "ttft",
    "time_per_output_token_ms": "per token",
    "tokens_per_second": "tokens/s",
    "total_ms": "total",
}
_SHORT_ID = 12
_LONGEST_NAME = 48
_LEAST_BAR = 10

app = typer.Typer(help="Show requests and their costs.", no_args_is_help=True)

Id = Annotated[str, Argument(metavar="ID", help="Id of the request or its trace, or a prefix.")]


@dataclass(frozen=True)
class Filters:
    """The filters of requests."""

    since: Annotated[
        str | None, Option(metavar="TIME", help="Received since: 1h ago, or 2030-01-31T12:00.")
    ] = None
    until: Annotated[str | None, Option(metavar="TIME", help="Received until then.")] = None
    model: Annotated[
        str | None, Option(help="Of this model.", autocompletion=known_models, show_default=False)
    ] = None
    status: Annotated[Outcome | None, Option(help="With this outcome.", show_default=False)] = None
    slower_than: Annotated[
        str | None, Option(metavar="DURATION", help="Took longer in total, as 500ms or 2s.")
    ] = None
    key: Annotated[str, Option(metavar="PREFIX", help="Beginning of the key's short id.")] = ""

    def records(self, folder: Path) -> Iterator[RequestRecord]:
        """Yield the records of a folder that pass, newest first.

        Raises:
            InvalidRequest: a time or a duration cannot be read.
        """
        wanted = TraceFilter(
            since=_moment("--since", self.since),
            until=_moment("--until", self.until),
            model=self.model,
            outcome=self.status,
            slower_than_ms=_duration("--slower-than", self.slower_than),
            client=self.key,
        )
        return trace_read.records(folder, wanted)


def ls(
    common: Common,
    filters: Filters,
    limit: Annotated[int, Option(min=0, help="Largest number of requests.")] = 50,
) -> None:
    """List requests, newest first."""
    folder = _folder(common)
    records = list(itertools.islice(filters.records(folder), limit))
    common.show(records, terminal.aligned(_HEADS, map(_row, records), _HEADS[4:8]))
    _note_if_none(common, folder, records)


def show(common: Common, id: Id) -> None:
    """Show a request: its figures, parameters and, if kept, its content."""
    record = find(common, id)
    common.show(record, _record_lines(record))


def tree(common: Common, id: Id) -> None:
    """Draw the steps of a request on a time scale; with -v, with their attributes."""
    record = find(common, id)
    common.show(record.spans, _tree(record.spans, details=bool(common.verbose)))
    if not (record.spans or common.as_json):
        terminal.note(f"No steps of {record.id} are kept.")


def stats(common: Common, filters: Filters) -> None:
    """Summarise requests by model: their outcomes, and percentiles of their figures."""
    folder = _folder(common)
    models = trace_read.stats(filters.records(folder))
    common.show(models, _stats_lines(models))
    _note_if_none(common, folder, models)


def find(common: Common, id: str) -> RequestRecord:
    """Return the record whose id or trace id has this prefix.

    Raises:
        HeadraceError: there is none, or more than one.
    """
    return trace_read.find(_folder(common), id)


def _folder(common: Common) -> Path:
    return common.settings().config.home / trace_file.FOLDER


def _note_if_none(common: Common, folder: Path, records: Sequence[object]) -> None:
    if not (records or common.as_json):
        terminal.note(f"No such request is kept in {folder}.")


def _moment(flag: str, text: str | None) -> float | None:
    """Return the Unix time of a time, local without a zone, or of a duration ago."""
    if text is None:
        return None
    try:
        if "-" not in text:
            return datetime.now(UTC).timestamp() - seconds(text)
        return datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError):
        message = f"{flag} {text!r} is no time: write 1h30m for so long ago, or 2030-01-31T12:00."
        raise InvalidRequest(message, param=flag[2:]) from None


def _duration(flag: str, text: str | None) -> float | None:
    try:
        return None if text is None else seconds(text) * 1000
    except ValueError as error:
        raise InvalidRequest(f"{flag}: {error}.", param=flag[2:].replace("-", "_")) from None


def _row(record: RequestRecord) -> Row:
    metrics = record.metrics
    # The ids of several prompts in one request differ only at their ends.
    name = record.id if "." in record.id else record.id[:_SHORT_ID]
    return (
        name,
        datetime.fromtimestamp(record.time).astimezone().strftime("%m-%d %H:%M:%S"),
        _short(record.model),
        record.client[:8] or None,
        tokens(metrics),
        took(metrics.time_to_first_token_ms),
        rate(metrics.decode_tokens_per_second),
        took(metrics.total_ms),
        f"{record.outcome} {record.error}",
    )


def _stats_lines(models: Iterable[ModelStats]) -> Iterator[str]:
    heads = ("MODEL", "REQUESTS", *map(str.upper, _OUTCOMES), "PROMPT", "COMPLETION")
    yield from terminal.aligned(heads, map(_counts, models), heads[1:])
    yield ""
    heads = ("MODEL", "FIGURE", "COUNT", "P50", "P90", "P99")
    rows = itertools.chain.from_iterable(map(_percentiles, models))
    yield from terminal.aligned(heads, rows, heads[2:])


def _counts(model: ModelStats) -> Row:
    ended = (model.outcomes.get(outcome, 0) for outcome in _OUTCOMES)
    tokens = model.prompt_tokens, model.completion_tokens
    return _short(model.model), model.requests, *ended, *tokens


def _percentiles(model: ModelStats) -> Iterator[Row]:
    for name, figure in model.figures.items():
        shown = rate if name == "tokens_per_second" else took
        values = map(shown, (figure.p50, figure.p90, figure.p99))
        yield _short(model.model), _FIGURES.get(name, name), figure.count, *values


def _short(model: str) -> str | None:
    # The name of an unknown model may have any length.
    return (model if len(model) <= _LONGEST_NAME else f"{model[: _LONGEST_NAME - 3]}...") or None


def _record_lines(record: RequestRecord) -> Iterator[str]:
    yield from terminal.aligned((), _facts(record))
    if record.content is not None:
        yield f"\nasked\n{content(record.content.input)}"
        for name, given in (("suffix", record.content.suffix), ("tools", record.content.tools)):
            if given:
                yield f"\n{name}\n{content(given)}"
        for answer in record.content.answered:
            yield f"\nanswered\n{terminal.printable(answer)}"


def _facts(record: RequestRecord) -> list[tuple[str, Any]]:
    when = datetime.fromtimestamp(record.time).astimezone()
    metrics, usage = record.metrics, record.metrics.usage
    facts = {
        "id": record.id,
        "trace": record.trace_id,
        "time": when.isoformat(" ", "milliseconds"),
        "operation": record.operation,
        "model": record.model,
        "key": record.client,
        "status": f"{record.outcome} {record.error}".rstrip(),
        "message": record.message,
        "finish": ", ".join(record.finish_reasons),
        "engine": metrics.engine,
        "worker": metrics.worker,
        "prompt": f"{usage.prompt_tokens} tokens, {usage.cached_tokens} cached",
        "completion": f"{usage.completion_tokens} tokens",
        "reasoning": usage.reasoning_tokens and f"{usage.reasoning_tokens} tokens of it",
        "drafted": usage.drafted_tokens
        and f"{usage.drafted_tokens} tokens, {usage.accepted_tokens} accepted",
        "calls": metrics.tool_calls,
        **_durations(metrics),
        "continued": metrics.continuations and f"{metrics.continuations}, {metrics.continued}",
        **{use.name: _use(use) for use in metrics.devices},
        **{f"  {name}": _plain(value) for name, value in record.parameters.items()},
    }
    return [(name, fact) for name, fact in facts.items() if fact not in (None, "", 0)]


def _durations(metrics: InferenceMetrics) -> dict[str, str | None]:
    gaps = metrics.inter_token_ms
    return {
        "queue": took(metrics.queue_ms),
        "load": took(metrics.load_ms or None),
        "ttft": took(metrics.time_to_first_token_ms),
        "prefill": _with_rate(metrics.prefill_ms, metrics.prefill_tokens_per_second),
        "per token": _with_rate(metrics.time_per_output_token_ms, metrics.decode_tokens_per_second),
        "gaps": gaps and f"p50 {took(gaps.p50)}, p99 {took(gaps.p99)}, max {took(gaps.max)}",
        "total": took(metrics.total_ms),
    }


def _use(device: DeviceUse) -> str:
    mean, peak = terminal.size(device.worker_mean), terminal.size(device.worker_peak)
    text = f"memory {mean}, peak {peak}"
    if device.busy_mean is not None and device.busy_peak is not None:
        text += f"; busy {device.busy_mean:.0%}, peak {device.busy_peak:.0%}"
    return text if device.joules is None else f"{text}; {device.joules:.1f} J"


def content(request: Any) -> str:
    """Return the content of a request as text, with one line for each turn of a conversation."""
    turns = cast("list[Any]", request) if isinstance(request, list) else [request]
    return terminal.printable("\n".join(map(_turn, turns)))


def _content_text(content: Any) -> str:
    if not isinstance(content, list):
        return str(content)
    parts = cast("list[Any]", content)
    return "".join(part if isinstance(part, str) else _picture(part) for part in parts)


def _picture(image: dict[str, Any]) -> str:
    extent = (
        f"{image['seconds']:g} s" if "seconds" in image else f"{image['width']}x{image['height']}"
    )
    size = f"{extent}, {terminal.size(image['size'])}"
    return f"[{image['format']} {size}, sha256 {image['digest'][:12]}]"


def _turn(turn: Any) -> str:
    if isinstance(turn, dict) and "role" in turn:
        message = cast("dict[str, Any]", turn)
        calls = (f"\n{call['name']} {call['arguments']}" for call in message.get("tool_calls", ()))
        text = _content_text(message.get("content") or "")
        return f"{message['role']}: {text}{''.join(calls)}"
    return _plain(turn)


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


def tokens(metrics: InferenceMetrics) -> str:
    """Return the tokens of prompt and answer: `120+64`."""
    return f"{metrics.usage.prompt_tokens}+{metrics.usage.completion_tokens}"


def took(ms: float | None) -> str | None:
    """Return a duration in three digits, or in minutes and hours."""
    if ms is None:
        return None
    if ms < 1000:
        return f"{ms:.3g} ms" if ms < 99.5 else f"{ms:.0f} ms"
    return f"{ms / 1000:.3g} s" if ms < 99_950 else terminal.span(ms / 1000)


def rate(per_second: float | None) -> str | None:
    """Return tokens per second."""
    return None if per_second is None else f"{per_second:.1f}"


def _with_rate(ms: float | None, per_second: float | None) -> str | None:
    speed = f", {rate(per_second)} tokens/s" if per_second is not None else ""
    return None if ms is None else f"{took(ms)}{speed}"


class _Scale(NamedTuple):
    """A scale of `cells` from `start` on, `per_cell` milliseconds each."""

    start: float
    per_cell: float
    cells: int
    mark: str

    def bar(self, span: SpanRecord) -> str:
        """Return the bar of a step, of at least one cell."""
        first = min(int((span.start_ms - self.start) / self.per_cell), self.cells - 1)
        after = min(round((span.start_ms + span.ms - self.start) / self.per_cell), self.cells)
        return " " * first + self.mark * max(after - first, 1)


def _tree(spans: Sequence[SpanRecord], *, details: bool) -> Iterator[str]:
    """Yield a line for each step: its name below its parent's, its duration, and a bar."""
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
    # Other encodings may have no block characters.
    utf8 = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    return _Scale(start, (whole or 1) / cells, cells, "█" if utf8 else "#")


def _nested(spans: Sequence[SpanRecord]) -> Iterator[tuple[int, SpanRecord]]:
    """Yield each step with its depth: each root, followed by its children in order of time."""
    known = {span.span_id for span in spans}
    children: dict[str, list[SpanRecord]] = defaultdict(list)
    for span in sorted(spans, key=lambda span: span.start_ms)[::-1]:
        children[span.parent_id if span.parent_id in known else ""].append(span)
    left = [(0, span) for span in children[""]]
    while left:
        depth, span = left.pop()
        yield depth, span
        left.extend((depth + 1, child) for child in children.pop(span.span_id, ()))


for _command in (ls, show, tree, stats):
    app.command(_command.__name__)(with_common(_command))
