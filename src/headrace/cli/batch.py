"""`headrace batch`: the requests of a file, answered once each, however often it is begun."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from typer import Argument, Option

from headrace.api.batch.journal import Journal, NotAnswers
from headrace.api.batch.lines import Answer, Fault, Item, Tally, ahead, encode, key_of, read
from headrace.api.batch.work import Work
from headrace.cli import terminal
from headrace.cli.batch_place import Place, open_place
from headrace.cli.common import Common, Url, known_models
from headrace.core.errors import ConfigError, InvalidRequest

_STDIO = "-"
_SHOWN = 10


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """What came of a run. `before` were answered by earlier ones; the rest is of this one."""

    requests: int
    before: int
    answered: int
    failed: int
    seconds: float
    prompt_tokens: int
    completion_tokens: int


def batch(
    common: Common,
    requests: Annotated[
        str, Argument(metavar="FILE", help="Requests in OpenAI's form, a line each; - is stdin.")
    ],
    output: Annotated[
        str,
        Option("--output", "-o", metavar="OUT", help="Append the answers to this; - is stdout."),
    ],
    model: Annotated[
        str | None,
        Option(help="Send all to this model, whatever they name.", autocompletion=known_models),
    ] = None,
    parallel: Annotated[
        int | None, Option(min=1, max=256, help="Requests at a time; by default the model's slots.")
    ] = None,
    retry_failed: Annotated[
        bool, Option("--retry-failed", help="Send those again that OUT has an error for.")
    ] = False,
    local: Annotated[bool, Option("--local", help="Load the models in this process.")] = False,
    url: Url = None,
) -> None:
    """Answer the requests of a file; the same command goes on where it was ended.

    A running service answers, where live requests come first; otherwise the models are loaded for
    this command. With --url any server with OpenAI's API answers. The exit code is 1 if a request
    has failed.
    """
    if local and url:
        raise ConfigError("flag --local is for a model that is loaded here, not at --url.")
    if common.as_json and output == _STDIO:
        raise ConfigError("flag --json prints the figures to stdout, which -o - has for answers.")
    settings = common.settings()
    with _source(requests, output) as path:
        run = _Run(path, requests, model, parallel)
        run.check()
        with run.answers(output, retry_failed=retry_failed):
            figures = run.figures
            if run.left:
                place = open_place(settings, run.models, url=url, local=local)
                figures = _answered(run, place, resumes=output != _STDIO)
    common.show(figures, ()) if common.as_json else terminal.note(_sentence(figures, run, output))
    if run.failed:
        raise typer.Exit(1)


@contextlib.contextmanager
def _source(file: str, output: str) -> Generator[Path]:
    """Yield the file of the requests; those of stdin are written to one first."""
    if file != _STDIO:
        path, other = Path(file).expanduser(), Path(output).expanduser()
        if output != _STDIO and other.exists() and path.exists() and path.samefile(other):
            raise ConfigError(f"{file} has the requests, and cannot take the answers.")
        yield path
        return
    with tempfile.NamedTemporaryFile(suffix=".jsonl") as spooled:
        shutil.copyfileobj(sys.stdin.buffer, spooled)
        spooled.flush()
        yield Path(spooled.name)


class _Run:
    """The requests, and which of them have been answered; those of this run are in `tally`."""

    def __init__(self, path: Path, name: str, model: str | None, parallel: int | None) -> None:
        self._path = path
        self._name = "stdin" if name == _STDIO else name
        self._model = model
        self._parallel = parallel
        self._ids = set[bytes]()
        self._done = set[bytes]()
        self._commit: Callable[[Sequence[Answer]], None] = _to_stdout
        self.before, self.tally = Tally(), Tally()
        self.models: set[str] = {model} if model else set()
        self.seconds = 0.0

    @property
    def left(self) -> int:
        """How many requests have no answer."""
        return len(self._ids) - len(self._done)

    @property
    def failed(self) -> int:
        """How many requests have an error, also of earlier runs."""
        return self.before.failed + self.tally.failed

    @property
    def figures(self) -> Figures:
        """What has come of the run."""
        return Figures(
            requests=len(self._ids),
            before=self.before.completed + self.before.failed,
            answered=self.tally.completed,
            failed=self.tally.failed,
            seconds=round(self.seconds, 3),
            prompt_tokens=self.tally.read,
            completion_tokens=self.tally.written,
        )

    def check(self) -> None:
        """Read all requests once.

        Raises:
            InvalidRequest: one is not in OpenAI's form; each is noted. Nothing has been sent.
        """
        faults = list[Fault]()
        for item in read(self._path, faults):
            self._ids.add(key_of(item.custom_id))
            if not self._model:
                self.models.add(item.model)
        for fault in faults:
            terminal.note(terminal.printable(f"{self._name}:{fault.line}: {fault.message}"))
        if faults:
            number = f"{len(faults)} faults" if len(faults) > 1 else "1 fault"
            raise InvalidRequest(f"{self._name} is not sent: {number}, each in its line.")
        if not self._ids:
            raise InvalidRequest(f"{self._name} has no requests.")

    @contextlib.contextmanager
    def answers(self, output: str, *, retry_failed: bool) -> Generator[None]:
        """Open the file of the answers, and read those that it has.

        Raises:
            ConfigError: it is a file of something else, or another run writes it.
        """
        if output == _STDIO:
            yield
            return
        path = Path(output).expanduser()
        try:
            if retry_failed and path.exists():
                _drop_failed(path)
            journal = Journal(path, self._take, strict=True)
        except NotAnswers as error:
            raise ConfigError(f"{output} is not a file of answers: {error}.") from None
        except BlockingIOError:
            raise ConfigError(f"Another run writes its answers to {output}.") from None
        with contextlib.closing(journal):
            if not self._done <= self._ids:
                raise ConfigError(f"{output} has answers to other requests than {self._name}.")
            self._commit = journal.commit
            yield

    def _take(self, answer: Answer) -> None:
        self._done.add(key_of(answer.custom_id))
        self.before.add(answer)

    def _items(self) -> Iterator[Item]:
        for item in read(self._path):
            if key_of(item.custom_id) in self._done:
                continue
            yield item._replace(body=_renamed(item.body, self._model)) if self._model else item

    async def work(
        self, place: Place, note: Callable[[str], None], move: Callable[[], None]
    ) -> None:
        """Send what has no answer yet; `note` an error, and `move` the bar."""

        async def commit(answers: Sequence[Answer]) -> None:
            await asyncio.to_thread(self._commit, answers)
            for answer in answers:
                self._done.add(key_of(answer.custom_id))
                self.tally.add(answer)
                if answer.has_failed and self.tally.failed <= _SHOWN:
                    note(_problem(answer))
            move()

        async with place() as (send, slots):
            started = time.monotonic()
            try:
                work = Work(send, commit, lambda: self._parallel or slots())
                async with contextlib.aclosing(ahead(self._items())) as items:
                    await work.run(items)
            finally:
                self.seconds = time.monotonic() - started


def _to_stdout(answers: Sequence[Answer]) -> None:
    sys.stdout.buffer.write(b"".join(map(encode, answers)))
    sys.stdout.buffer.flush()


def _drop_failed(path: Path) -> None:
    """Write a file of answers again, without errors."""
    kept = list[Answer]()
    other = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with contextlib.closing(Journal(path, kept.append, strict=True)):
            with contextlib.closing(Journal(other, lambda answer: None)) as journal:
                journal.commit([answer for answer in kept if not answer.has_failed])
            other.replace(path)
    finally:
        other.unlink(missing_ok=True)


def _renamed(body: bytes, model: str) -> bytes:
    """Return a body for another model."""
    return msgspec.json.encode(msgspec.json.decode(body, type=dict[str, object]) | {"model": model})


class _Detail(msgspec.Struct, frozen=True):
    message: str


class _Body(msgspec.Struct, frozen=True):
    error: _Detail


def _problem(answer: Answer) -> str:
    response = answer.response
    assert response is not None, "this command makes no other errors"
    try:
        message = msgspec.json.decode(response.body, type=_Body).error.message
    except msgspec.MsgspecError:
        message = "an error"
    return terminal.printable(f"{answer.custom_id}: {response.status_code} {message}")


def _answered(run: _Run, place: Place, *, resumes: bool) -> Figures:
    """Send what is left, and show how far it is."""
    try:
        with _progress(run) as (note, move):
            asyncio.run(run.work(place, note, move))
    except BaseException:
        figures = run.figures
        done, all = figures.requests - run.left, figures.requests
        again = " The same command goes on from there." if resumes else ""
        terminal.note(f"Ended early: {done:,} of {all:,} are answered.{again}")
        raise
    return run.figures


@contextlib.contextmanager
def _progress(run: _Run) -> Generator[tuple[Callable[[str], None], Callable[[], None]]]:
    """Yield functions that write a line, and that move the bar; it is on a terminal only."""
    if not sys.stderr.isatty():
        yield terminal.note, lambda: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from headrace import log

    bars = Progress(
        TextColumn("{task.completed:,.0f} of {task.total:,.0f}"),
        BarColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        console=Console(stderr=True, no_color=not log.colourful()),
        transient=True,
    )
    all = run.figures.requests
    task = bars.add_task("", total=all, completed=all - run.left, rate="")

    def move() -> None:
        speed = bars.tasks[0].speed
        rate = f"{speed:,.1f}/s" if speed else ""
        bars.update(task, completed=all - run.left, rate=rate)

    def note(text: str) -> None:
        bars.console.print(text, markup=False, highlight=False)

    with bars:
        yield note, move


def _sentence(figures: Figures, run: _Run, output: str) -> str:
    """Return the figures as text."""
    answered = figures.answered + figures.failed
    parts = [f"{figures.requests:,} requests: {figures.answered:,} answered"]
    parts += [f"{figures.failed:,} failed"] if figures.failed else []
    parts += [f"{figures.before:,} before"] if figures.before else []
    if run.before.failed:
        parts[-1] += f" ({run.before.failed:,} failed; --retry-failed sends them again)"
    if answered and figures.seconds:
        rate, tokens = answered / figures.seconds, figures.completion_tokens / figures.seconds
        parts += [f"{terminal.span(figures.seconds)}, {rate:,.1f} a second"]
        parts += [f"{figures.prompt_tokens:,} tokens read, {figures.completion_tokens:,} written"]
        parts += [f"{tokens:,.1f} tok/s"] if tokens else []
    if figures.failed and output != _STDIO:
        parts += [f"the errors are in {output}"]
    return "; ".join(parts) + "."
