"""`headrace top`: a live view of a running service."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Generator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer
from typer import Option

from headrace.cli.common import Common, Url
from headrace.cli.terminal import span
from headrace.cli.top_frame import Snapshot, Sort, lines
from headrace.core.errors import ConfigError, HeadraceError, Unsupported, UpstreamError
from headrace.core.record import Activity
from headrace.core.values import seconds

if TYPE_CHECKING:
    from headrace.cli.client import Client

_SHORTEST_S, _LONGEST_S = 0.1, 3600.0
_PATIENCE_S = 5.0
_PIPE_WIDTH = 160
_HISTORY = 60
_TERMINATED = 128 + signal.SIGTERM


def top(
    common: Common,
    interval: Annotated[str, Option(metavar="TIME", help="Time between updates.")] = "1s",
    once: Annotated[bool, Option("--once", help="Print it once, and end.")] = False,
    sort: Annotated[Sort, Option(help="Which running requests come first.")] = "slowest",
    url: Url = None,
) -> None:
    """Show a running service live: models, speeds, memory, the slowest requests.

    `q` ends it. Into a pipe it prints one frame; with --json, one document each time.
    """
    every = _interval(interval)

    async def show(client: Client) -> int:
        monitor = _Monitor(client, every)
        if not once and common.as_json:
            return await _print_each(monitor, every)
        await monitor.poll()
        if once or not _is_screen():
            width = shutil.get_terminal_size((_PIPE_WIDTH, 0)).columns
            frame = lines(monitor.snapshot, monitor.url, width, sort=sort)
            plain = ("".join(text for text, _ in line).rstrip() for line in frame)
            common.show(monitor.snapshot, plain)
            return 0
        return await _live(monitor, sort)

    if code := common.ask(url, show):
        raise typer.Exit(code)


def _is_screen() -> bool:
    return sys.stdout.isatty() and os.environ.get("TERM") not in (None, "", "dumb")


def _interval(text: str) -> float:
    with contextlib.suppress(ValueError):
        if _SHORTEST_S <= (every := seconds(text)) <= _LONGEST_S:
            return every
    raise ConfigError(f"{text!r} is no time from 100ms to 1h.", param="interval")


class _Monitor:
    """Polls a service, and keeps its last snapshot."""

    def __init__(self, client: Client, every: float) -> None:
        self.url = client.url
        self.snapshot = Snapshot(time=time.time())
        self.history = deque[float](maxlen=_HISTORY)
        self._client = client
        self._every = every
        self._answered = time.monotonic()
        self._error = ""

    async def poll(self) -> None:
        """Take a snapshot.

        Raises:
            HeadraceError: there was no answer, or a refusal.
        """
        try:
            async with asyncio.timeout(_PATIENCE_S):
                status, activity = await self._client.status(), await self._activity()
        except TimeoutError:
            raise UpstreamError(f"The service at {self.url} does not answer.") from None
        self.snapshot = Snapshot(time=time.time(), status=status, activity=activity)
        rates = activity.rates if activity else ()
        self.history.append(sum(model.completion_tokens_per_second for model in rates))
        self._answered, self._error = time.monotonic(), ""

    async def follow(self, changed: Callable[[], object]) -> None:
        """Take snapshots until cancelled, despite errors; call `changed` after each."""
        while True:
            await asyncio.sleep(self._every)
            try:
                await self.poll()
            except HeadraceError as error:
                self._error = error.message
            changed()

    def now(self) -> Snapshot:
        """Return the last snapshot, with an error if it is too old."""
        silent = time.monotonic() - self._answered
        if not self._error and silent < 2 * self._every + 1:
            return self.snapshot
        error = f"no answer since {span(silent)}, trying again. {self._error}"
        return msgspec.structs.replace(self.snapshot, error=error)

    async def _activity(self) -> Activity | None:
        try:
            return await self._client.activity()
        except Unsupported:
            return None


async def _print_each(monitor: _Monitor, every: float) -> int:
    """Print a snapshot as a line of JSON each time, until Ctrl-C or the pipe is closed."""
    await monitor.poll()
    while True:
        print(msgspec.json.encode(monitor.snapshot).decode(), flush=True)
        await asyncio.sleep(every)
        try:
            await monitor.poll()
        except HeadraceError as error:
            monitor.snapshot = Snapshot(time=time.time(), error=error.message)


async def _live(monitor: _Monitor, sort: Sort) -> int:
    """Show snapshots in place until the user ends it; the terminal is always restored."""
    from rich.console import Console, Group
    from rich.live import Live
    from rich.text import Text

    console = Console(no_color=bool(os.environ.get("HEADRACE_NO_COLOR")) or None, highlight=False)
    changed = asyncio.Event()
    ended = asyncio.get_running_loop().create_future()

    def end(code: int) -> None:
        if not ended.done():
            ended.set_result(code)
        changed.set()

    def drawn() -> Group:
        width, height = console.size
        history = monitor.history
        frame = lines(monitor.now(), monitor.url, width, height, sort=sort, history=history)
        return Group(*(Text.assemble(*line) for line in frame))

    with ExitStack() as before:
        before.enter_context(_signals(end, changed.set))
        before.enter_context(_keys(lambda: end(0)))
        live = Live(drawn(), console=console, screen=True, auto_refresh=False)
        before.enter_context(live)
        following = asyncio.ensure_future(monitor.follow(changed.set))
        before.callback(following.cancel)
        while not ended.done():
            live.update(drawn(), refresh=True)
            changed.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(changed.wait(), 1.0)
            if following.done():
                following.result()
    return ended.result()


@contextlib.contextmanager
def _signals(end: Callable[[int], None], resized: Callable[[], None]) -> Generator[None]:
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGINT, end, 0)
    loop.add_signal_handler(signal.SIGTERM, end, _TERMINATED)
    loop.add_signal_handler(signal.SIGWINCH, resized)
    try:
        yield
    finally:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGWINCH):
            loop.remove_signal_handler(number)


@contextlib.contextmanager
def _keys(end: Callable[[], None]) -> Generator[None]:
    """Call `end` when q or Ctrl-C is pressed, or the terminal is closed."""
    if not sys.stdin.isatty():
        yield
        return
    from prompt_toolkit.input import create_input
    from prompt_toolkit.keys import Keys

    keys = create_input()

    def pressed() -> None:
        names = {press.key for press in keys.read_keys()}
        if keys.closed or names & {"q", "Q", Keys.ControlC, Keys.ControlD}:
            end()

    with keys.raw_mode(), keys.attach(pressed):
        yield
