"""`headrace trace`: what is known of requests that have ended, from the files of the service."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

from headrace.cli import terminal, trace_tree
from headrace.cli import trace_text as text
from headrace.cli.common import Common, known_models, with_common
from headrace.cli.ps import Url
from headrace.core.duration import seconds
from headrace.core.errors import InvalidRequest
from headrace.core.record import Outcome
from headrace.telemetry import trace_file, trace_read
from headrace.telemetry.trace_read import Wanted

_OUTCOMES = ("ok", "refused", "error", "cancelled")

app = typer.Typer(help="Tell what requests were and what they cost.", no_args_is_help=True)

Id = Annotated[
    str, typer.Argument(metavar="ID", help="Of the request or its trace, or how it begins.")
]
Since = Annotated[
    str | None, typer.Option(metavar="TIME", help="Received since: 1h ago, or 2030-01-31T12:00.")
]
Until = Annotated[str | None, typer.Option(metavar="TIME", help="Received until then.")]
Model = Annotated[
    str | None, typer.Option(help="Of this model.", autocompletion=known_models, show_default=False)
]
Status = Annotated[Outcome | None, typer.Option(help="Ended in this way.", show_default=False)]
SlowerThan = Annotated[
    str | None, typer.Option(metavar="DURATION", help="Took longer in all, as 500ms or 2s.")
]
Key = Annotated[str, typer.Option(metavar="PREFIX", help="How the short id of the key begins.")]


def ls(
    common: Common,
    since: Since = None,
    until: Until = None,
    model: Model = None,
    status: Status = None,
    slower_than: SlowerThan = None,
    key: Key = "",
    limit: Annotated[int, typer.Option(min=0, help="At most so many.")] = 50,
) -> None:
    """List requests, newest first."""
    folder = _folder(common)
    wanted = _wanted(since, until, model, status, slower_than, key)
    found = list(itertools.islice(trace_read.records(folder, wanted), limit))
    if common.as_json:
        terminal.print_json(found)
    else:
        _print(text.HEADS, map(text.row, found))
        _note_nothing(folder, found)


def show(common: Common, id: Id) -> None:
    """Tell all of one request: its figures, parameters and, where kept, its content."""
    record = trace_read.find(_folder(common), id)
    if common.as_json:
        terminal.print_json(record)
        return
    terminal.columns((), text.facts(record))
    if record.content is not None:
        print(f"\nasked\n{text.asked(record.content.asked)}")
        for answer in record.content.answered:
            print(f"\nanswered\n{terminal.printable(answer)}")


def tree(common: Common, id: Id) -> None:
    """Draw the steps of one request on a scale of time; with -v, tell their attributes."""
    record = trace_read.find(_folder(common), id)
    if common.as_json:
        terminal.print_json(record.spans)
        return
    if not record.spans:
        terminal.note(f"No steps of {record.id} are kept.")
    for line in trace_tree.drawn(record.spans, details=bool(common.verbose)):
        print(line)


def stats(
    common: Common,
    since: Since = None,
    until: Until = None,
    model: Model = None,
    status: Status = None,
    slower_than: SlowerThan = None,
    key: Key = "",
) -> None:
    """Sum requests up by model: how they ended, and percentiles of their figures."""
    folder = _folder(common)
    wanted = _wanted(since, until, model, status, slower_than, key)
    found = trace_read.stats(trace_read.records(folder, wanted))
    if common.as_json:
        terminal.print_json(found)
        return
    heads = ("MODEL", "REQUESTS", *map(str.upper, _OUTCOMES), "PROMPT", "COMPLETION")
    _print(heads, (text.counts(one, _OUTCOMES) for one in found))
    print()
    rows = itertools.chain.from_iterable(map(text.percentiles, found))
    _print(("MODEL", "FIGURE", "COUNT", "P50", "P90", "P99"), rows)
    _note_nothing(folder, found)


def replay(
    common: Common,
    id: Id,
    model: Annotated[
        str | None, typer.Option(help="Ask this one.", autocompletion=known_models)
    ] = None,
    url: Url = None,
) -> None:
    """Ask again what was asked, print the answer, and compare the figures.

    It needs a record with content: the service keeps it with telemetry.trace_content.
    """
    from headrace.cli import trace_replay
    from headrace.cli.client import address
    from headrace.telemetry.content import GONE

    settings = common.settings()
    record = trace_read.find(settings.config.home / trace_file.FOLDER, id)
    body = trace_replay.body(record, model)
    write = None if common.as_json else terminal.write
    done = asyncio.run(trace_replay.replay(address(settings, url), record, body, write))
    if common.as_json:
        terminal.print_json(done)
        return
    for line in text.table(("FIGURE", "THEN", "NOW"), text.comparison(record, done)):
        terminal.note(line)
    place = "" if done.differs_at is None else f" from character {done.differs_at} on"
    terminal.note("The text is equal." if done.equal else f"The text is another{place}.")
    if GONE in text.asked(body["messages" if "messages" in body else "prompt"]):
        terminal.note("What was asked is not quite the same: parts of it had been redacted.")


def _print(heads: Sequence[str], rows: Iterable[text.Row]) -> None:
    for line in text.table(heads, rows):
        print(line)


def _folder(common: Common) -> Path:
    return common.settings().config.home / trace_file.FOLDER


def _wanted(
    since: str | None,
    until: str | None,
    model: str | None,
    status: Outcome | None,
    slower_than: str | None,
    key: str,
) -> Wanted:
    return Wanted(
        since=_moment("--since", since),
        until=_moment("--until", until),
        model=model,
        outcome=status,
        slower_than_ms=_duration("--slower-than", slower_than),
        client=key,
    )


def _moment(flag: str, text: str | None) -> float | None:
    """Return Unix seconds of a time, or of how long ago it is; what has no zone is local."""
    if text is None:
        return None
    try:
        if "-" not in text:
            return time.time() - seconds(text)
        return datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError):
        said = f"{flag} {text!r} is no time: write 1h30m for so long ago, or 2030-01-31T12:00."
        raise InvalidRequest(said, param=flag[2:]) from None


def _duration(flag: str, text: str | None) -> float | None:
    try:
        return None if text is None else seconds(text) * 1000
    except ValueError as error:
        raise InvalidRequest(f"{flag}: {error}.", param=flag[2:].replace("-", "_")) from None


def _note_nothing(folder: Path, found: Sequence[object]) -> None:
    if not found:
        terminal.note(f"No such request is kept in {folder}.")


for _command in (ls, show, tree, stats, replay):
    app.command(_command.__name__)(with_common(_command))
